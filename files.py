"""Files that are whole or absent, whoever dies when.

- `complete_file`: written under a temporary name of its own, which is opened exclusively, so that a planted link is
  never written through, and renamed when its bytes are on the disk.
- `reason_of` and `file_hash`: what the system says, and whether a file is still what was written.
- `remove_leftovers`: what killed processes left under such names. A writer holds a lock of the kernel on its file, so
  that nothing of a living one is taken away.
Left out: locks between machines on a file system that has none.
"""

import contextlib
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from configurator import UserError


class Damaged(UserError):
    """A file that is missing, or is not what was written: another may stand for it."""


def locks(file: BinaryIO, wait: bool = True) -> bool:
    """Lock an open file until it is closed or the process ends; False where another process has it. A file system
    without locks grants every one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def open_temporary(folder: Path) -> BinaryIO:
    """A new, locked file under a name that nobody has."""
    while True:
        path = folder / f".hydra-{uuid.uuid4().hex}.tmp"
        file = path.open("xb")
        locks(file)
        if path.exists():  # else `remove_leftovers` of another process was faster than the lock
            return file
        file.close()


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files below `folder` that no living process writes."""
    for path in folder.glob(".hydra-*.tmp"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            if locks(file, wait=False):
                path.unlink()


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is at `path` once it is complete, and nowhere if it is not. Raises OSError."""
    file = open_temporary(path.parent)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with none of the bytes
            os.replace(file.name, path)
    finally:
        Path(file.name).unlink(missing_ok=True)


def reason_of(error: BaseException) -> str:
    """The system's words for what went wrong: torch's writers raise an error of their own behind the system's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0]


@contextlib.contextmanager
def saved_file(path: Path) -> Iterator[BinaryIO]:
    """`complete_file` that raises UserError; a RuntimeError is torch's way to say that a disk is full."""
    try:
        with complete_file(path) as file:
            yield file
    except (OSError, RuntimeError) as error:
        reason = reason_of(error)
        raise UserError(f"cannot write {path} ({reason}): free some space or choose another folder") from error


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in bounded memory. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """A whole text file; UserError where it cannot be written."""
    with saved_file(path) as file:
        file.write(text.encode())
