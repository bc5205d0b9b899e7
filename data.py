"""Text in, batches of tokens out, all of it offline unless a tokenizer must be downloaded.

- The texts and their split: sources.py.
- Tokenizers: `python4096` (its ranks are shipped), `bytes`, and the named encodings of tiktoken, downloaded by it.
- Token files with a checked header, memory-mapped. Batches: a pure function of (seed, step), nothing to save or to
  replay; evaluation windows meet every target exactly once.
`python data.py train_tokenizer OUT` wrote config/python4096.tiktoken, and writes the same bytes wherever the default
corpus has the fingerprint RANKS_CORPUS.
Left out: shuffled epochs (a batch is drawn with replacement), padding between documents, other formats than text.
"""

import base64
import difflib
import hashlib
import importlib.util
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch

from configurator import UserError, cli
from formats import MAGIC
from sources import encode, part_pieces, read_texts

EOT = "<|endoftext|>"
RANKS = Path(__file__).parent / "config" / "python4096.tiktoken"
N_RANKS = 4095  # with <|endoftext|> the vocabulary is a power of two
RANKS_CORPUS = "b16a70ae0727112cb88e30f8cf573dd61a96103c44d36b240fcc800c3b1075bc"
# A word with the one character before it (space, dot, bracket, underscore); up to three digits; punctuation with all
# the white space after it, so that ":" + newline + indentation is one token; white space. Possessive quantifiers
# only: time and stack stay linear even in a megabyte of spaces, where GPT-2's own pattern overflows.
PATTERN = r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++\s*+|\s++"
VERSION, HEADER = 2, 1024  # raise VERSION with any change of header, split or choice of files


# ---- tokenizers

def read_ranks(path: Path) -> dict[bytes, int]:
    """The `base64 rank` lines of a file. Not tiktoken's own reader: that one caches by path and returns stale ranks."""
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the ranks ({error}); restore it from the repository") from error
    # A byte without a rank would end the process later, at encoding, with a panic that is not even an Exception.
    if sorted(ranks.values()) != list(range(N_RANKS)) or not all(bytes([b]) in ranks for b in range(256)):
        raise UserError(f"{path}: not {N_RANKS} ranks with all 256 bytes; restore it from the repository")
    return ranks


def make_encoding(name: str, pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """An encoding whose only special token, <|endoftext|>, comes behind the ranks."""
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """"python4096", "bytes" or a named encoding of tiktoken. Raises UserError: unknown name, failed download."""
    if name == "python4096":
        return make_encoding(name, PATTERN, read_ranks(RANKS))
    if name == "bytes":
        return make_encoding(name, "(?s:.{1,64})", {bytes([b]): b for b in range(256)})
    names = ["python4096", "bytes", *tiktoken.list_encoding_names()]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise UserError(f"unknown tokenizer {name!r}: did you mean {', '.join(near)}?")
    try:  # requests' errors are OSErrors; a download with a wrong hash is a ValueError
        enc = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {name!r} is not here and its download failed ({type(error).__name__}): go online "
                        "once, or set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=python4096 "
                        "or --tokenizer=bytes, which need no download") from error
    if EOT not in enc.special_tokens_set:
        raise UserError(f"tokenizer {name!r} has no {EOT} to end a text with: use another, e.g. --tokenizer=python4096")
    return enc


def tokenizer_hash(enc: tiktoken.Encoding) -> str:
    """sha256 of all that decides the ids of a text: pattern, special tokens, ranks."""
    parts = (enc._pat_str, sorted(enc._special_tokens.items()), sorted(enc._mergeable_ranks.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def token_bytes(enc: tiktoken.Encoding, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: the bytes of each id, 0 for special and unused ids. Bits per byte = nats / ln 2 / bytes."""
    if vocab_size < enc.n_vocab:
        raise UserError(f"vocab_size {vocab_size} is smaller than the {enc.n_vocab} tokens of {enc.name!r}: set "
                        f"--vocab_size={enc.n_vocab} or more")
    lengths = np.zeros(vocab_size, np.int64)
    for token, rank in enc._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


def token_text(enc: tiktoken.Encoding, token: int) -> bytes:
    """The bytes of one id; none where a vocabulary larger than the tokenizer's has ids without a text."""
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return b""


def text_of(enc: tiktoken.Encoding, tokens: Iterable[int]) -> str:
    """The text of ids, with a replacement sign for a character that is cut."""
    return b"".join(token_text(enc, token) for token in tokens).decode("utf-8", errors="replace")


# ---- token files

def write_tokens(path: Path, ids: Iterator[Sequence[int]], enc: tiktoken.Encoding, source: str) -> None:
    """A token file: a header of HEADER bytes (MAGIC, JSON, spaces), then the ids. Complete, or not there at all."""
    dtype = "uint16" if enc.n_vocab <= 1 << 16 else "uint32"
    temporary, count = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp"), 0
    try:
        with temporary.open("wb") as file:
            file.write(bytes(HEADER))
            for some in ids:
                file.write(np.array(some, dtype).tobytes())
                count += len(some)
            meta = {"version": VERSION, "dtype": dtype, "tokenizer": enc.name, "tokenizer_hash": tokenizer_hash(enc),
                    "vocab_size": enc.n_vocab, "tokens": count, "source": source}
            file.seek(0)
            file.write((MAGIC + json.dumps(meta).encode()).ljust(HEADER))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def highest_id(path: str | Path, dtype: np.dtype) -> int:
    """Of a token file. It is read, not mapped: the pages of a map that were touched count as memory of the process."""
    top = 0
    with open(path, "rb") as file:
        file.seek(HEADER)
        while len(some := np.fromfile(file, dtype, 1 << 22)):
            top = max(top, int(some.max()))
    return top


def load_tokens(path: str | Path, vocab_size: int | None = None, source: str | None = None) -> np.memmap:
    """The ids of a token file, memory-mapped. Raises UserError: foreign (no token file, or not made from the text with
    the fingerprint `source`), damaged, too short, an id >= vocab_size."""
    def bad(reason: str) -> UserError:
        return UserError(f"{path}: {reason}; delete it, and it will be built again from the text")

    try:
        with open(path, "rb") as file:
            head, size = file.read(HEADER), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot read the token file ({error.strerror}); check --cache_dir") from error
    if not head.startswith(MAGIC):
        raise bad("not a token file" if head else "empty file")
    if len(head) < HEADER:
        raise bad("truncated within its header")
    try:
        meta = json.loads(head[len(MAGIC):])
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
        count, version = int(meta["tokens"]), meta["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise bad(f"damaged header ({type(error).__name__})") from error
    if version != VERSION:
        raise bad(f"token file of version {version}, this program reads version {VERSION}")
    if size != HEADER + count * dtype.itemsize:
        raise bad(f"truncated or damaged, {size} bytes instead of {HEADER + count * dtype.itemsize}")
    if source is not None and meta.get("source") != source:
        raise bad("made from another text")
    if count < 2:
        raise bad(f"too short, {count} tokens")
    if vocab_size is not None and (top := highest_id(path, dtype)) >= vocab_size:
        raise UserError(f"{path}: token id {top} is beyond vocab_size {vocab_size}; set --vocab_size={top + 1} or "
                        "more, or delete the file, and it will be built again")
    return np.memmap(path, dtype, "r", HEADER, (count,))


@dataclass(frozen=True)
class Corpus:
    train: np.memmap  # token ids
    val: np.memmap
    enc: tiktoken.Encoding
    fingerprint: str  # of the source texts
    description: str  # for the log
    warnings: tuple[str, ...] = ()  # what the user must not miss


def prepare(data: str, tokenizer: str, cache_dir: str, out_dir: str = "", val_fraction: float = 0.1,
            val_data: str = "", text_field: str = "text") -> Corpus:  # fmt: skip
    """The tokens of `data` ("" = the default corpus, else a file or folder), encoded at first use into `cache_dir`.
    Validation is `val_data`, or `val_fraction` of the text; JSON lines have theirs in `text_field`. What a run writes,
    `cache_dir` and `out_dir`, is no part of it. Raises UserError: no text, unreadable, no room."""
    enc = get_tokenizer(tokenizer)
    try:
        written = {Path(folder).expanduser().resolve() for folder in (cache_dir, out_dir) if folder}
        texts = read_texts(data, val_data, val_fraction, text_field, written)
        # Other ranks or another format never meet old files: all three are in the name.
        key = hashlib.sha256(f"{texts.fingerprint} {tokenizer_hash(enc)} {VERSION}".encode()).hexdigest()[:12]
        paths = [Path(cache_dir, f"{texts.name}-{tokenizer}-{key}-{side}.bin") for side in ("train", "val")]
        for path, part in zip(paths, texts.parts, strict=True):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tokens(path, encode(part, enc), enc, texts.fingerprint)
    except OSError as error:
        raise UserError(f"{error.filename or cache_dir}: {error.strerror or error}; the data must be readable (--data) "
                        "and the cache writable, with room (--cache_dir)") from error
    tokens = [load_tokens(path, enc.n_vocab, texts.fingerprint) for path in paths]
    share = len(tokens[1]) / sum(map(len, tokens))
    return Corpus(*tokens, enc, texts.fingerprint, f"{texts.title}, {len(tokens[0]):,} training and "
                  f"{len(tokens[1]):,} validation tokens ({tokenizer}). Validation: {share:.1%} of the tokens and "
                  f"{texts.rule}.", (texts.warning,) if texts.warning else ())


# ---- batches

Batch = tuple[torch.Tensor, torch.Tensor]  # x and y, int64 [batch_size, block_size], y one token ahead of x


def get_batch(tokens: np.ndarray, batch_size: int, block_size: int, seed: int, step: int,
              rows: slice = slice(None)) -> Batch:  # fmt: skip
    """A pure function of (seed, step), or of it these `rows`. Raises UserError: fewer tokens than one window."""
    if len(tokens) <= block_size:
        raise UserError(f"block_size {block_size} needs {block_size + 1} tokens, the training text has {len(tokens)}: "
                        "set a smaller --block_size or give more text with --data")
    first = np.random.default_rng([seed, step, 0]).integers(len(tokens) - block_size, size=batch_size)[rows]
    texts = torch.from_numpy(tokens[first[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return texts[:, :-1].contiguous(), texts[:, 1:].contiguous()


def eval_batches(tokens: np.ndarray, batch_size: int, block_size: int, max_batches: int = 0) -> Iterator[Batch]:
    """Windows side by side that meet each target once; or max_batches of them, evenly spread. All of one shape, for a
    compiled model: where the text or the windows end, x is padded with 0 and y with -1, which the loss ignores."""
    if len(tokens) < 2:
        raise UserError(f"{len(tokens)} validation tokens are too few to evaluate on: give more text with --data")
    windows = math.ceil((len(tokens) - 1) / block_size)
    chosen = min(windows, max_batches * batch_size) if max_batches else windows
    firsts = np.arange(chosen) * windows // chosen * block_size
    for batch in np.split(firsts, range(batch_size, chosen, batch_size)):
        x = torch.zeros(batch_size, block_size, dtype=torch.int64)
        y = torch.full((batch_size, block_size), -1)
        for row, first in enumerate(batch):
            window = torch.from_numpy(tokens[first:first + block_size + 1].astype(np.int64))
            x[row, :len(window) - 1] = window[:-1]
            y[row, :len(window) - 1] = window[1:]
        yield x, y


def main(args: list[str]) -> None:
    """Train python4096's ranks on the training side of the default corpus and write them to a file."""
    if len(args) != 2 or args[0] != "train_tokenizer":
        raise UserError(f"{' '.join(args)!r} is no command of this file: python data.py train_tokenizer OUT")
    if importlib.util.find_spec("rustbpe") is None:
        raise UserError("rustbpe, a tool for this command only, is not installed: pip install rustbpe==0.1.0")
    import rustbpe

    texts = read_texts("")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(filter(None, part_pieces(texts.parts[0])), N_RANKS, pattern=PATTERN)
    ranks = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks]
    Path(args[1]).write_text("".join(lines), newline="\n")
    same = "that of" if texts.fingerprint == RANKS_CORPUS else "NOT that of"
    print(f"{args[1]}: {len(ranks)} ranks of {texts.title}, {same} the shipped ranks ({texts.fingerprint[:12]})")


if __name__ == "__main__":
    cli(main)
