"""Texts: which files are the corpus, what is in them, which part of them validates, and their tokens.

- Corpus: the machine's Python standard library, or the user's file or folder: UTF-8 text (a document a file) or JSON
  lines (a document a record), plain or in gzip. Exact duplicates are dropped, every document is closed by
  <|endoftext|>, and a fingerprint names it all: compare losses at equal ones only.
- A folder's runs and token caches are no part of it, whichever run wrote them; linked folders are followed once. What
  is no text (formats.py) is named by reason and example, with what helps.
- Split: by the hash of the files' paths where whole files make up the part that is asked for; else the joined text's
  tail, cut at a document's or a line's end; or a text of its own (`val_data`).
- Tokens: on all cores, in bounded memory, the same on any number of them.
Left out: a split by the records of a file.
"""

import glob
import hashlib
import os
import platform
import re
import sysconfig
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from configurator import UserError, say
from files import is_run_file
from formats import CHUNK, SHARD, TextFile, Unfit, checked_pieces, inspect, is_our_shard, is_token_file, visible
from machine import cores

SLACK = 0.1  # validation may differ from the part that is asked for by this part of it
PROGRESS_SECONDS = 3
MOST_CORES = 16
HIDDEN, WRITTEN, LINKED = "hidden", "with a run or a cache in it", "links to what is above, elsewhere or seen"
SHARDED = Unfit("with shards of `data.py shard` in it", advice="give that folder alone to train on them")
NO_CORPUS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
FEWEST_FILES = 100  # a standard library with fewer is zipped, frozen or stripped


# ---- files below a folder

@dataclass
class Skipped:
    """What a scan of the folder `root` left out: for each reason how often, and the first example."""

    root: Path = Path()
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[str, Unfit]] = field(default_factory=dict)

    def add(self, unfit: Unfit, name: str) -> None:
        self.counts[unfit.reason] += 1
        self.examples.setdefault(unfit.reason, (name, unfit))

    def warning(self, kept: int) -> str:
        """Loud words where more than half of the files were left out, hidden ones not counted."""
        usual = (HIDDEN, WRITTEN, LINKED, SHARDED.reason)
        counts = Counter({reason: count for reason, count in self.counts.items() if reason not in usual})
        lost = counts.total()
        if lost <= kept:
            return ""
        reason, count = counts.most_common(1)[0]
        return (f"{lost} of {lost + kept} files were skipped, more than half of them, such as {count} {reason} "
                f"({self.example(reason)}); the line of the corpus has them all")

    def example(self, reason: str) -> str:
        """The first file that was left out for it, where that shows and what helps."""
        name, unfit = self.examples[reason]
        where = ", ".join(filter(None, (visible(name), unfit.place)))
        return ": ".join(filter(None, (where, unfit.remedy(f"{self.root}/{name}"))))

    def __str__(self) -> str:
        parts = [f"{self.counts[reason]} {reason} ({self.example(reason)})" for reason in sorted(self.examples)]
        return "skipped: " + ("; ".join(parts) or "nothing")


@dataclass(frozen=True)
class Source:
    name: str  # begins the names of the token files
    title: str  # for the log
    root: Path
    files: list[TextFile]  # sorted by name
    skipped: Skipped
    text_field: str  # of JSON lines
    by_path: bool = False  # split by the hash of the paths alone, whatever share of the text this is

    def fingerprint(self) -> str:
        """sha256 over the sorted paths and contents."""
        return hashlib.sha256(b"".join(os.fsencode(f.name) + b"\0" + f.digest for f in self.files)).hexdigest()

    def size(self) -> int:
        return sum(file.size for file in self.files)


def kind_of(entry: os.DirEntry) -> str:
    """"folder", "file", or "" for a device and for a link that leads nowhere, which may be to itself."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else ""
    except OSError:
        return ""


def is_written(entries: list[os.DirEntry]) -> bool:
    """Whether a folder holds a run of any --out_dir or the token files of any --cache_dir."""
    names = {entry.name for entry in entries}
    if {"config.toml", "log.jsonl"} <= names or any(name.endswith(".pt") and is_run_file(name) for name in names):
        return True
    return any(is_token_file(entry.path) for entry in entries
               if entry.name.endswith(".bin") and kind_of(entry) == "file")  # fmt: skip


def list_files(root: Path, skipped: Skipped, without: Collection[str | Path] = (), follow: bool = True) -> list[str]:
    """Names of the files below `root`, sorted; no hidden ones, none in the folders `without` (names, or absolute
    paths), none that a run wrote. Links to folders are followed once each, behind the folders themselves, so that a
    loop ends; without `follow` none is, nor a link to a file outside of `root`."""
    names, seen, folders, links = [], set(), deque([("", str(root))]), deque()
    while folders or links:
        prefix, real = folders.popleft() if folders else links.popleft()
        if real in seen or (prefix and root.is_relative_to(real)):
            skipped.add(Unfit(LINKED), prefix)
            continue
        seen.add(real)
        entries = sorted(os.scandir(real), key=lambda entry: entry.name)
        written = is_written(entries)
        if written and prefix:
            skipped.add(Unfit(WRITTEN), prefix)
            continue
        if prefix and any(is_our_shard(entry.path) for entry in entries if kind_of(entry) == "file"):
            skipped.add(SHARDED, prefix)
            continue
        for entry in entries:
            name, linked, kind = prefix + entry.name, entry.is_symlink(), kind_of(entry)
            if entry.name.startswith("."):
                skipped.add(Unfit(HIDDEN), name)
            elif written and is_run_file(entry.name):
                continue
            elif kind == "folder":
                path = os.path.realpath(entry.path) if linked else os.path.join(real, entry.name)
                if linked and not follow:
                    skipped.add(Unfit(LINKED), name)
                elif entry.name not in without and Path(path) not in without:
                    (links if linked else folders).append((name + "/", path))
            elif not kind:
                skipped.add(Unfit("broken links and devices"), name)
            elif linked and not follow and not Path(os.path.realpath(entry.path)).is_relative_to(root):
                skipped.add(Unfit(LINKED), name)
            else:
                names.append(name)
    return sorted(names)


def scan(source: Source, names: list[str]) -> Source:
    """Inspect the named files below the source's root; keep the texts, each once, and count the others."""
    files: dict[bytes, TextFile] = {}
    for name in names:
        found = inspect(f"{source.root}/{name}", name, source.text_field)
        if isinstance(found, Unfit):
            source.skipped.add(found, name)
        elif files.setdefault(found.digest, found) is not found:
            source.skipped.add(Unfit("duplicate"), name)
    return replace(source, files=list(files.values()))


def default_source() -> Source:
    """The standard library without its tests and tables."""
    library = Path(sysconfig.get_path("stdlib")).resolve()
    source = Source("stdlib", f"Python {platform.python_version()} standard library", library, [], Skipped(), "", True)
    names = []
    for name in list_files(library, source.skipped, NO_CORPUS, follow=False) if library.is_dir() else ():
        if not name.endswith(".py") or name.startswith(("_sysconfigdata", "pydoc_data/topics.py")):
            continue
        # Tables of the character sets repeat each other: validation would be a copy of training.
        if not name.startswith("encodings/") or b"decoding_table" not in (library / name).read_bytes():
            names.append(name)
    if len(names) < FEWEST_FILES:
        raise UserError(f"no Python sources in {library}: give a text file or folder with --data=PATH")
    return scan(source, names)


def user_source(data: str, without: Collection[Path] = (), field: str = "text", option: str = "data") -> Source:
    """A file of text or JSON lines, or all of them below a folder. Raises UserError: none there, with the way to
    convert a single file."""
    path = Path(os.path.realpath(os.path.expanduser(data)))
    if not os.path.exists(path) and glob.has_magic(data):
        raise UserError(f"--{option}={data}: this glob finds no token shards, files *_train_*.bin and *_val_*.bin, and "
                        "others it is not for: give the path of a text file or of a folder of them")  # fmt: skip
    if not os.path.isfile(path) and not os.path.isdir(path):
        reason = "a pipe or a device" if os.path.exists(path) else "no such file or folder"
        raise UserError(f"--{option}={data}: {reason}; give the path of a text file or of a folder of them")
    root = path if path.is_dir() else path.parent
    source = Source(re.sub(r"[^\w.-]", "_", path.name)[:40] or "data", visible(str(path)), root, [], Skipped(root),
                    field)  # fmt: skip
    names = list_files(path, source.skipped, without) if path.is_dir() else [path.name]
    source = scan(source, names)
    for _, unfit in source.skipped.examples.values() if path.is_file() else ():
        where = f" ({unfit.place})" if unfit.place else ""
        remedy = unfit.remedy(str(path)) or "give UTF-8 text"
        raise UserError(f"--{option}={visible(data)}: not text but {unfit.reason}{where}: {remedy}")
    if sum(file.chars for file in source.files) < 2:  # one for each side
        raise UserError(f"--{option}={visible(data)}: no text in it ({source.skipped}); give UTF-8 text of two "
                        "characters or more")  # fmt: skip
    return source


def source_warnings(source: Source) -> list[str]:
    """What the user must not miss of a scan."""
    found = [source.skipped.warning(len(source.files))]
    if SHARD.reason in source.skipped.counts:
        found.append(f"token shards are not read beside texts ({source.skipped.example(SHARD.reason)})")
    alike = [file for file in source.files if file.like]
    if alike:
        name, like = visible(alike[0].name), alike[0].like
        remedy = (like._replace(advice="") if like.command else like).remedy(f"{source.root}/{alike[0].name}")
        found.append(f"{len(alike)} files are read as texts, as their names say, but look like something else, such as "
                     f"{name}, a {like.reason}; if it is one, convert it: {remedy}")
    return [*filter(None, found)]


# ---- split

class Part(NamedTuple):
    """One side of the split."""

    source: Source
    spans: list[tuple[int, int]]  # of each file, the characters that are on this side: first and last + 1
    size: int  # bytes


def whole(source: Source) -> Part:
    return Part(source, [(0, file.chars) for file in source.files], source.size())


def path_hash(name: str) -> int:
    """0 to 99 by the path only: by content a file would change sides from one Python version to the next."""
    return int(hashlib.sha256(os.fsencode(name)).hexdigest()[:8], 16) % 100


def validation_files(source: Source, fraction: float) -> set[str]:
    """The files with the lowest hashes that together are `fraction` of the text; none where whole files cannot be."""
    if source.by_path:
        return {file.name for file in source.files if path_hash(file.name) < 100 * fraction}
    files = sorted(source.files, key=lambda file: (path_hash(file.name), file.name))
    away = np.abs(np.cumsum([file.size for file in files]) - fraction * source.size())
    count = int(away.argmin()) + 1
    if away[count - 1] > SLACK * fraction * source.size() or count == len(files):
        return set()
    return {file.name for file in files[:count]}


def byte_count(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


class Place(NamedTuple):
    """Where a file can be cut. The least one is the best."""

    rank: int  # 0 at a document's end, 1 at a line's, 2 elsewhere
    away: int  # bytes from the target
    size: int  # bytes before it in the file
    chars: int


def places(source: Source, number: int, target: int, reach: float) -> Iterator[Place]:
    """Where file `number` can be cut, up to `reach` bytes around its byte `target`."""
    if number > 0:
        yield Place(0, target, 0, 0)
        yield Place(2, target, 0, 0)
    size, chars = 0, 0
    for text in checked_pieces(source.root, source.files[number], source.text_field):
        if not text:
            yield Place(0, abs(size - target), size, chars)
        length = byte_count(text)
        if text and size - reach <= target <= size + length + reach:
            at = max(1, len(text.encode()[: max(0, target - size)].decode(errors="ignore")))
            for rank, cut in ((1, text.rfind("\n", 0, at) + 1), (1, text.find("\n", at) + 1), (2, at)):
                before = size + byte_count(text[:cut])
                if cut > 0:
                    yield Place(rank, abs(before - target), before, chars + cut)
        size += length
        chars += len(text)
        if size > target + reach:
            return


def tail_cut(source: Source, fraction: float) -> tuple[int, Place]:
    """The file and the place in it at which the last `fraction` of the joined text begins: the end of a document or of
    a line, if there is one near."""
    total = source.size()
    target = min(max(1, total - round(fraction * total)), total - 1)
    ends = np.cumsum([file.size for file in source.files])
    number = int(np.searchsorted(ends, target, side="right"))
    start, reach = int(ends[number]) - source.files[number].size, SLACK * fraction * total
    found = [place for place in places(source, number, target - start, reach)
             if (place.rank == 2 or place.away <= reach) and 0 < start + place.size < total]  # fmt: skip
    return number, min(found)


def split(source: Source, fraction: float) -> tuple[Part, Part, str]:
    """Training, validation and the rule by which they were divided."""
    files, chosen, rule = source.files, validation_files(source, fraction), "whole files, by the hash of their paths"
    cuts = [0 if file.name in chosen else file.chars for file in files]
    size = sum(file.size for file in files if file.name in chosen)
    if not chosen:
        number, place = tail_cut(source, fraction)
        rule = "the tail of the joined text"
        cuts = [file.chars for file in files[:number]] + [place.chars] + [0] * (len(files) - number - 1)
        size = sum(file.size for file in files[number:]) - place.size
    spans = [(cut, file.chars) for cut, file in zip(cuts, files, strict=True)]
    return Part(source, [(0, cut) for cut in cuts], source.size() - size), Part(source, spans, size), rule


OTHER_SHARE = "set another part with --val_fraction, or give it a text of its own with --val_data=PATH"
OTHER_TEXT = "give it another text with --val_data=PATH"


def split_warning(train_tokens: int, val_tokens: int, block_size: int, remedy: str) -> str:
    """What is wrong with the sizes of the two sides, and what helps; empty where nothing is."""
    share = val_tokens / (train_tokens + val_tokens)
    if 0.01 <= share <= 0.25 and val_tokens > block_size:
        return ""
    few = f", fewer than one block of {block_size}" if val_tokens <= block_size else ""
    return f"validation has {val_tokens:,} of {train_tokens + val_tokens:,} tokens, {share:.1%}{few}: {remedy}"


def no_effect(option: str, value: object, default: object, reason: str) -> list[str]:
    """A warning of an option that was set for nothing."""
    return [f"--{option}={value} has no effect: {reason}"] if value != default else []


@dataclass(frozen=True)
class Texts:
    name: str  # begins the names of the token files
    fingerprint: str  # of contents and split
    parts: tuple[Part, Part]  # training, validation
    title: str  # what it is, and how large
    rule: str  # how it was divided, and what was left out
    remedy: str  # for another division
    warnings: tuple[str, ...]  # what the user must not miss


def read_texts(data: str, val_data: str = "", fraction: float = 0.1, field: str = "text",
               written: Collection[Path] = ()) -> Texts:  # fmt: skip
    """The text of `data` ("" = the default corpus) and its split. Raises UserError: no text, no such split."""
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction={fraction}: choose a value above 0 and below 1")
    source = user_source(data, written, field) if data else default_source()
    fingerprint, warnings = source.fingerprint(), source_warnings(source)
    files, remedy = source.files, OTHER_SHARE
    if val_data:
        other = user_source(val_data, written, field, "val_data")
        files, remedy = [*files, *other.files], OTHER_TEXT
        theirs = {file.digest for file in other.files}
        source = replace(source, files=[file for file in source.files if file.digest not in theirs])
        if not source.files:
            raise UserError(f"--val_data={val_data}: it has every text of --data, which leaves none to train on")
        parts, rule = (whole(source), whole(other)), f"the text of {other.title} ({other.skipped})"
        fingerprint = hashlib.sha256(f"{source.fingerprint()} {other.fingerprint()}".encode()).hexdigest()
        warnings += source_warnings(other)
        warnings += no_effect("val_fraction", fraction, 0.1, "--val_data validates")
    else:
        *parts, rule = split(source, fraction)
        if fraction != 0.1:
            fingerprint = hashlib.sha256(f"{fingerprint} {fraction}".encode()).hexdigest()
    if not any(file.lines for file in files):
        warnings += no_effect("text_field", field, "text", "the text has no JSON lines")
    sizes = [part.size for part in parts]
    title = f"{source.title}: {len(source.files)} files, {source.size():,} bytes"
    rule = f"{sizes[1] / sum(sizes):.1%} of the bytes, {rule}; {source.skipped}"
    return Texts(source.name, fingerprint, tuple(parts), title, rule, remedy, tuple(warnings))


# ---- tokens

def part_pieces(part: Part) -> Iterator[str]:
    """The pieces of one side; an empty one ends a document, or what of it is on this side. UserError where a file has
    changed since it was scanned."""
    for file, (begin, end) in zip(part.source.files, part.spans, strict=True):
        seen, written = 0, False
        for text in checked_pieces(part.source.root, file, part.source.text_field) if begin < end else ():
            if seen >= end:
                continue  # what follows is on the other side, but only its end tells that the file is as it was
            kept = text[max(0, begin - seen) : max(0, end - seen)]
            seen += len(text)
            if kept or (written and not text):
                yield kept
                written = bool(kept)
        if written:
            yield ""


def bundles(part: Part) -> Iterator[list[str]]:
    """Pieces in lists of CHUNK characters or a little more: work for one core, whatever the size of the documents."""
    bundle: list[str] = []
    size = 0
    for text in part_pieces(part):
        bundle.append(text)
        size += len(text)
        if size >= CHUNK:
            yield bundle
            bundle, size = [], 0
    if bundle:
        yield bundle


def encode_bundle(enc: tiktoken.Encoding, bundle: list[str]) -> tuple[np.ndarray, int]:
    """The ids, <|endoftext|> for an empty piece, and the bytes. A text that spells a special token stays text."""
    end = np.array([enc.eot_token], np.uint32)
    ids = [enc.encode_to_numpy(text, disallowed_special=()) if text else end for text in bundle]
    return np.concatenate(ids), sum(map(byte_count, bundle))


def encode(part: Part, enc: tiktoken.Encoding) -> Iterator[np.ndarray]:
    """The ids of one side, in order, encoded on all cores a few bundles ahead; progress on stderr if it takes long."""
    mine = threading.local()

    def start() -> None:
        # Threads that share an encoding wait for each other: two of them are no faster than one.
        mine.enc = tiktoken.Encoding(enc.name, pat_str=enc._pat_str, mergeable_ranks=enc._mergeable_ranks,
                                     special_tokens=enc._special_tokens)  # fmt: skip

    began = shown = time.monotonic()
    done, waiting, todo = 0, deque(), bundles(part)
    workers = min(cores(), MOST_CORES)  # each holds an encoding, of large vocabularies 40 MB
    with ThreadPoolExecutor(workers, initializer=start) as pool:
        while True:
            for bundle in islice(todo, 2 * workers - len(waiting)):
                waiting.append(pool.submit(lambda bundle: encode_bundle(mine.enc, bundle), bundle))
            if not waiting:
                return
            ids, size = waiting.popleft().result()
            yield ids
            done += size
            now = time.monotonic()
            if now - shown >= PROGRESS_SECONDS:
                shown, rate = now, done / (now - began)
                say(f"tokens: {done / 1e6:.0f} of {part.size / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, "
                    f"{(part.size - done) / rate:.0f} s left", error=True)  # fmt: skip
