"""Texts: which files are the corpus, what is in them, which part of them validates, and their tokens.

- Corpus: the machine's Python standard library, or the user's text file or folder. UTF-8 only, exact duplicates
  dropped, every file closed by <|endoftext|>, named by a fingerprint: compare losses at equal ones only.
- Split: by the hash of a file's path, so that no file changes sides; where that leaves one side empty, the last tenth.
Left out: other formats than text.
"""

import codecs
import hashlib
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from configurator import UserError

CHUNK = 1 << 18  # bytes or characters at once: twice as much still fits the stack of every tiktoken pattern
NO_CORPUS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
FEWEST_FILES = 100  # a standard library with fewer is zipped, frozen or stripped


# ---- source texts


@dataclass(frozen=True)
class TextFile:
    name: str  # path below the root, with slashes: the same on every system
    size: int  # bytes
    chars: int
    digest: bytes  # sha256 of the content


@dataclass(frozen=True)
class Source:
    name: str  # begins the names of the token files
    title: str  # for the log
    root: Path
    files: list[TextFile]  # sorted by name
    skipped: Counter[str]  # reason -> files

    def fingerprint(self) -> str:
        """sha256 over the sorted paths and contents."""
        return hashlib.sha256(b"".join(os.fsencode(f.name) + b"\0" + f.digest for f in self.files)).hexdigest()


def is_validation(name: str) -> bool:
    """The side of a file, by its path only: by content it would change sides from one Python version to the next."""
    return int(hashlib.sha256(os.fsencode(name)).hexdigest()[:8], 16) % 100 < 10


def list_files(root: Path, skipped: Counter[str], without: Collection[str | Path] = ()) -> list[str]:
    """Names of the regular files below `root`, sorted; no hidden ones, none that a link reaches outside of it, none in
    the folders `without` (names, or absolute paths)."""
    names = []
    folders = [root]
    while folders:
        for path in folders.pop().iterdir():
            if path.name.startswith("."):
                skipped["hidden"] += 1
            elif path.is_dir():
                if not (path.is_symlink() or path.name in without or path in without):
                    folders.append(path)
            elif path.is_file() and (not path.is_symlink() or path.resolve().is_relative_to(root)):
                names.append(path.relative_to(root).as_posix())
            else:
                skipped["links and devices"] += 1
    return sorted(names)


def inspect(path: Path, name: str) -> TextFile | str:
    """The file's sizes and hash, read in chunks, or the reason why it is not text."""
    decoder, digest, size, chars = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), 0, 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                if b"\0" in chunk:
                    return "binary"
                chars += len(decoder.decode(chunk))
                digest.update(chunk)
                size += len(chunk)
        decoder.decode(b"", final=True)  # fails within a character
    except UnicodeDecodeError:
        return "not UTF-8"
    return TextFile(name, size, chars, digest.digest()) if size else "empty"


def scan(name: str, title: str, root: Path, names: list[str], skipped: Counter[str]) -> Source:
    """Inspect the named files; keep the texts, each once, and count the others."""
    files: dict[bytes, TextFile] = {}
    for found in (inspect(root / path, path) for path in names):
        if isinstance(found, str):
            skipped[found] += 1
        elif files.setdefault(found.digest, found) is not found:
            skipped["duplicate"] += 1
    return Source(name, title, root, list(files.values()), skipped)


def default_source() -> Source:
    """The standard library without its tests and tables."""
    library = Path(sysconfig.get_path("stdlib")).resolve()
    skipped: Counter[str] = Counter()
    names = []
    for name in list_files(library, skipped, NO_CORPUS) if library.is_dir() else ():
        if not name.endswith(".py") or name.startswith(("_sysconfigdata", "pydoc_data/topics.py")):
            continue
        # Tables of the character sets repeat each other: validation would be a copy of training.
        if not name.startswith("encodings/") or b"decoding_table" not in (library / name).read_bytes():
            names.append(name)
    if len(names) < FEWEST_FILES:
        raise UserError(f"no Python sources in {library}: give a text file or folder with --data=PATH")
    return scan("stdlib", f"Python {platform.python_version()} standard library", library, names, skipped)


def user_source(data: str, without: Collection[Path] = ()) -> Source:
    """A text file, or every text file below a folder."""
    path = Path(data).expanduser().resolve()
    skipped: Counter[str] = Counter()
    if not path.is_file() and not path.is_dir():
        raise UserError(f"--data={data}: no such file or folder; give the path of a text file or of a folder of them")
    root, names = (path, list_files(path, skipped, without)) if path.is_dir() else (path.parent, [path.name])
    source = scan(re.sub(r"[^\w.-]", "_", path.name)[:40] or "data", str(path), root, names, skipped)
    if sum(file.chars for file in source.files) < 2:  # one for each side
        raise UserError(f"--data={data}: no text in it ({reasons(skipped)}); give UTF-8 text that is not empty")
    return source


def reasons(skipped: Counter[str]) -> str:
    return "skipped: " + (", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()) if n) or "nothing")


# ---- split and tokens

def tail_cut(source: Source) -> int | None:
    """None where the files divide by the hash of their paths; else the character at which validation begins."""
    if len({is_validation(file.name) for file in source.files}) == 2:
        return None
    return sum(file.chars for file in source.files) * 9 // 10


def texts(path: Path) -> Iterator[str]:
    """A file in chunks that end with a line (within a line only if it is huge); line ends are left as they are."""
    with path.open(encoding="utf-8", newline="") as file:
        while text := file.read(CHUNK):
            yield text + file.readline(CHUNK)


def encode(source: Source, enc: tiktoken.Encoding, validation: bool) -> Iterator[list[int]]:
    """The ids of one side. Both sides walk the same chunks, so they agree on the place of a cut."""
    cut, seen = tail_cut(source), 0
    for file in source.files:
        if cut is None and is_validation(file.name) != validation:
            continue
        written = False
        for text in texts(source.root / file.name):
            if cut is not None:
                at, seen = min(max(cut - seen, 0), len(text)), seen + len(text)
                if 0 < at < len(text):  # go to the line's start, or to its end, or stay within the only line
                    at = text.rfind("\n", 0, at) + 1 or text.find("\n", at, -1) + 1 or at
                text = text[at:] if validation else text[:at]
            if text:
                written = True
                yield enc.encode_ordinary(text)  # text that spells a special token stays text
        if written:
            yield [enc.eot_token]
