"""Token files: the ids of a text, made once and memory-mapped. A header says of which text they are, and by which
tokenizer; header and ids are checked by hashes.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from configurator import UserError
from files import complete_file
from formats import MAGIC

VERSION, HEADER = 3, 1024  # raise VERSION with any change of header, split or choice of files


def tokenizer_hash(enc: tiktoken.Encoding | None) -> str:
    """sha256 of all that decides the ids of a text: pattern, special tokens, ranks; "none" of no tokenizer."""
    if enc is None:
        return "none"
    parts = (enc._pat_str, sorted(enc._special_tokens.items()), sorted(enc._mergeable_ranks.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def sealed(head: bytes) -> bytes:
    """A header of HEADER bytes: its text, spaces, and the sha256 of both in hexadecimal."""
    text = head.ljust(HEADER - 64)
    return text + hashlib.sha256(text).hexdigest().encode()


def write_tokens(path: Path, ids: Iterator[Sequence[int]], enc: tiktoken.Encoding, source: str) -> None:
    """A token file: a header of HEADER bytes (MAGIC, JSON, spaces, sha256 of these), then the ids, whose sha256 is in
    the JSON. Complete, or not there at all."""
    dtype = "uint16" if enc.n_vocab <= 1 << 16 else "uint32"
    count, digest = 0, hashlib.sha256()
    with complete_file(path) as file:
        file.write(bytes(HEADER))
        for some in ids:
            content = np.array(some, dtype).tobytes()
            file.write(content)
            digest.update(content)
            count += len(some)
        if count < 2:
            raise UserError(f"{path} would have {count} tokens: its text has changed while it was read: run again")
        meta = {"version": VERSION, "dtype": dtype, "tokenizer": enc.name, "tokenizer_hash": tokenizer_hash(enc),
                "vocab_size": enc.n_vocab, "tokens": count, "source": source, "sha256": digest.hexdigest()}
        file.seek(0)
        file.write(sealed(MAGIC + json.dumps(meta).encode()))


def digest_and_top(path: str | Path, dtype: np.dtype) -> tuple[str, int]:
    """sha256 of a token file's ids, and the highest of them. They are read, not mapped: the pages of a map that were
    touched count as memory of the process. Raises OSError."""
    digest, top = hashlib.sha256(), 0
    with open(path, "rb") as file:
        file.seek(HEADER)
        while len(some := np.fromfile(file, dtype, 1 << 22)):
            digest.update(some)
            top = max(top, int(some.max()))
    return digest.hexdigest(), top


def load_tokens(path: str | Path, vocab_size: int | None = None, source: str | None = None) -> np.memmap:
    """The ids of a token file, memory-mapped. Raises UserError: foreign (no token file, or not made from the text with
    the fingerprint `source`), damaged, too short, an id >= vocab_size."""
    def bad(reason: str) -> UserError:
        return UserError(f"{path}: {reason}; delete it, and it will be built again from the text")

    def unreadable(error: OSError) -> UserError:
        return UserError(f"{path}: cannot read the token file ({error.strerror}); check --cache_dir")

    try:
        with open(path, "rb") as file:
            head, size = file.read(HEADER), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise unreadable(error) from error
    if not head.startswith(MAGIC):
        raise bad("not a token file" if head else "empty file")
    if len(head) < HEADER:
        raise bad("truncated within its header")
    try:
        meta = json.loads(head[len(MAGIC):HEADER - 64])
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
        count, version = int(meta["tokens"]), meta["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise bad(f"damaged header ({type(error).__name__})") from error
    if version != VERSION:
        raise bad(f"token file of version {version!r}, this program reads version {VERSION}")
    if head != sealed(head[:HEADER - 64]):
        raise bad("damaged header (its hash is another)")
    if size != HEADER + count * dtype.itemsize:
        raise bad(f"truncated or damaged, {size} bytes instead of {HEADER + count * dtype.itemsize}")
    if source is not None and meta.get("source") != source:
        raise bad("made from another text")
    if count < 2:
        raise bad(f"too short, {count} tokens")
    try:
        digest, top = digest_and_top(path, dtype)
    except OSError as error:
        raise unreadable(error) from error
    if digest != meta.get("sha256"):
        raise bad("damaged, its ids have another hash than when they were written")
    if vocab_size is not None and top >= vocab_size:
        raise UserError(f"{path}: token id {top} is beyond vocab_size {vocab_size}; set --vocab_size={top + 1} or "
                        "more, or delete the file, and it will be built again")
    return np.memmap(path, dtype, "r", HEADER, (count,))
