"""Files that are whole or absent, whoever dies when; which files are a run's; one process a folder.

- `complete_file`: written under a temporary name of its own, which is opened exclusively, so that a planted link is
  never written through, and renamed when its bytes are on the disk.
- `reason` and `file_hash`: what the system says, and whether a file is still what was written.
- `remove_leftovers`: what killed processes left under such names. A writer holds a lock of the kernel on its file, so
  that nothing of a living one is taken away.
- `Lock`: the same lock on a folder; the kernel takes it back when its process ends, however it ends.
Left out: locks between machines on a file system that has none.
"""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from configurator import UserError

RUN_FILES = ("last.pt", "best.pt", "log.jsonl", "config.toml", "trace.json", "memory.pickle",  # the last two: profiles
             "step-*.pt", "shards-*")  # fmt: skip
LOCK = ".lock"  # in the folder that it is of


def is_run_file(name: str) -> bool:
    """Whether a run writes a file, or a folder, of this name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in RUN_FILES)


def reason(error: BaseException) -> str:
    """Why something failed, in the system's words: an OSError's, also of one that torch turned into another error."""
    found: BaseException | None = error
    while found:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        found = found.__cause__ or found.__context__
    text = (str(error).splitlines() or [""])[0].strip()
    system = re.search(r"Error code \d+ \((.+)\)|\[Errno \d+\] ([^:]+)", text)  # a C++ allocator's, a Python one's
    if system:
        return system[1] or system[2]
    return text or type(error).__name__


def remedy(error: OSError) -> str:
    """Of a folder that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "free some space, or choose a folder on another disk" if full else "choose a folder that can be written"


def check_regular(path: Path) -> None:
    """OSError where the system cannot look at it; UserError where it is a folder, or a pipe or a device, which would be
    waited for, or read without an end."""
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return
    kinds = (stat.S_ISDIR, "Is a directory"), (stat.S_ISFIFO, "it is a pipe"), (stat.S_ISSOCK, "it is a socket")
    found = next((text for is_kind, text in kinds if is_kind(mode)), "it is a device")
    raise UserError(f"{path} cannot be read ({found}): move it away, or name another one")


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
        with contextlib.suppress(OSError):
            number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # nor does a planted pipe make it wait
            with open(number, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not `locks`: without locks nobody knows whose it is
                path.unlink()


class Lock:
    """A folder that belongs to this process from `take` on, until `release` or the end of the process."""

    def __init__(self):
        self.file: BinaryIO | None = None

    def take(self, folder: Path) -> None:
        """UserError where another process has the folder, or where it cannot be written."""
        if self.file:
            return
        path = folder / LOCK
        try:
            while True:
                file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644), "r+b", 0)
                if not locks(file, wait=False):
                    with file:
                        raise UserError(f"out_dir={str(folder)!r}: {holder(file)} has it: wait for it or stop it, or "
                                        "choose another folder with --out_dir=PATH")  # fmt: skip
                if os.fstat(file.fileno()).st_nlink:
                    break
                file.close()  # who had it has removed it meanwhile
            self.file, self.path = file, path
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            text = f"process {os.getpid()} on {platform.node()}, since {since}: {shlex.join(sys.argv)}\n"
            file.truncate(0)
            file.write(text.encode(errors="replace"))
        except OSError as error:
            raise UserError(f"out_dir={str(folder)!r}: {reason(error)}: {remedy(error)}") from error

    def release(self) -> None:
        file, self.file = self.file, None
        if file:
            with contextlib.suppress(OSError):
                self.path.unlink()  # before it is anybody else's
            file.close()


def holder(file: BinaryIO) -> str:
    """What the one that has a lock wrote into it, in one line, whatever is there."""
    text = file.read(500).decode(errors="replace").partition("\n")[0]
    return "".join(c for c in text if c.isprintable()) or "another process"


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


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Around what writes a file: UserError where it fails; a RuntimeError is torch's way to say that a disk is full."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path} ({reason(error)}): free some space or choose another folder") from error


@contextlib.contextmanager
def saved_file(path: Path) -> Iterator[BinaryIO]:
    """`complete_file` that raises UserError."""
    with saving(path), complete_file(path) as file:
        yield file


def second_name(path: Path, other: Path) -> None:
    """Give a file another name too, or a copy under it, where the file system has no second names or the name has been
    given away: it is replaced. OSError where it cannot be written, UserError where `path` is no file to be read."""
    try:
        os.link(path, other, follow_symlinks=False)
    except OSError:
        check_regular(path)
        with path.open("rb") as content, complete_file(other) as file:
            shutil.copyfileobj(content, file)


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in bounded memory. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(option: str, path: str, kind: str = "") -> str:
    """A text file that is not blank, of an option; UserError where there is none, asking for a text file of a kind."""
    remedy = f"give a UTF-8 text file{kind}"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{option}={path!r}: {reason(error)}: {remedy}") from error
    if not text.strip():
        raise UserError(f"{option}={path!r}: it is blank: {remedy}")
    return text


def write_text(path: Path, text: str) -> None:
    """A whole text file; UserError where it cannot be written."""
    with saved_file(path) as file:
        file.write(text.encode())
