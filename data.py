"""Text in, batches of tokens out, all of it offline unless a tokenizer must be downloaded.

- The texts and their split: sources.py.
- Tokenizers: `python4096` (its ranks are shipped), `bytes`, a rank file of your own, and the named encodings of
  tiktoken, downloaded by it.
- The files that texts are encoded into: tokenfiles.py. Shards of other projects: shards.py.
- Batches: a pure function of (seed, step), drawn with replacement or in shuffled epochs, nothing to save or to replay;
  evaluation windows meet every target exactly once. No window crosses from one shard into the next.
Commands: `shard OUT` writes a text's tokens as shards, `bench` times their making beside tiktoken alone,
`train_tokenizer OUT` writes a rank file: it wrote config/python4096.tiktoken, and writes the same bytes wherever the
default corpus has the fingerprint RANKS_CORPUS.
Left out: padding between documents.
"""

import base64
import difflib
import hashlib
import importlib.util
import math
import os
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch

from configurator import AnyPath, UserError, build, cli, command, need, parse, usable_path
from files import reason, write_text
from machine import in_turns
from shards import Shard, check_apart, files_beside, find_shards, open_shard, repeats, validation_shards, write_shards
from sources import Texts, encode, no_effect, part_pieces, read_texts, split_warning
from tokenfiles import VERSION, load_tokens, tokenizer_hash, write_tokens

EOT = "<|endoftext|>"
RANKS = Path(__file__).parent / "config" / "python4096.tiktoken"
RANKS_HASH = "573bf6348b282ff857766cf4f716796d31df9060209e7f99fa6773d5af98c787"  # of what they say
N_RANKS = 4095  # with <|endoftext|> the vocabulary is a power of two
RANKS_CORPUS = "b16a70ae0727112cb88e30f8cf573dd61a96103c44d36b240fcc800c3b1075bc"
# A word with the one character before it (space, dot, bracket, underscore); up to three digits; punctuation with all
# the white space after it, so that ":" + newline + indentation is one token; white space. Possessive quantifiers
# only: time and stack stay linear even in a megabyte of spaces, where GPT-2's own pattern overflows.
PATTERN = r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++\s*+|\s++"
OTHER_SHARDS = "give other shards with --val_data=PATH"
USAGE = "python data.py (train_tokenizer OUT, shard OUT or bench) [--key=value ...]"


# ---- tokenizers

def read_ranks(path: Path, remedy: str) -> dict[bytes, int]:
    """The `base64 rank` lines of a file. Not tiktoken's own reader: that one caches by path and returns stale ranks."""
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the ranks ({reason(error)}); {remedy}") from error
    # A byte without a rank would end the process later, at encoding, with a panic that is not even an Exception.
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise UserError(f"{path}: not ranks from 0 on, each once, with all 256 bytes; {remedy}")
    return ranks


def make_encoding(name: str, pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """An encoding whose only special token, <|endoftext|>, comes behind the ranks."""
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def shipped_ranks() -> dict[bytes, int]:
    """python4096's."""
    ranks = read_ranks(RANKS, "restore it from the repository")
    if hashlib.sha256(repr(sorted(ranks.items())).encode()).hexdigest() != RANKS_HASH:
        raise UserError(f"{RANKS}: not the {N_RANKS} ranks of this project; restore it from the repository")
    return ranks


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """"python4096" (and "auto"), "bytes", a named encoding of tiktoken or the path of a rank file, whose words are
    PATTERN's. Raises UserError: unknown name, no ranks, failed download."""
    if name in ("python4096", "auto"):
        return make_encoding("python4096", PATTERN, shipped_ranks())
    if name == "bytes":
        return make_encoding(name, "(?s:.{1,64})", {bytes([b]): b for b in range(256)})
    if name == "none":
        raise UserError("tokenizer 'none' is for token shards; a text needs one, e.g. --tokenizer=python4096")
    names = ["python4096", "bytes", *tiktoken.list_encoding_names()]
    path = Path(os.path.expanduser(name))
    if name not in names and (os.path.isfile(path) or len(path.parts) > 1 or path.suffix):
        ranks = read_ranks(path, f"give a file that `{command('data.py', 'train_tokenizer', 'OUT')}` wrote")
        return make_encoding(re.sub(r"[^\w.-]", "_", path.stem)[:40], PATTERN, ranks)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise UserError(f"unknown tokenizer {name!r}: did you mean {', '.join(near)}, or the path of a rank file?")
    try:  # requests' errors are OSErrors; a download with a wrong hash is a ValueError
        enc = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {name!r} is not here and its download failed ({type(error).__name__}): go online "
                        "once, or set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=python4096 "
                        "or --tokenizer=bytes, which need no download; token shards train without a tokenizer, by "
                        "--tokenizer=none --vocab_size=N") from error
    if EOT not in enc.special_tokens_set:
        raise UserError(f"tokenizer {name!r} has no {EOT} to end a text with: use another, e.g. --tokenizer=python4096")
    return enc


def stored_tokenizer(name: str, stored_hash: str) -> tiktoken.Encoding:
    """The tokenizer of a run, which stored its name and hash. Raises UserError: it had none, or it has changed."""
    if stored_hash == "none":
        raise UserError("the run was trained on token shards without a tokenizer, so its ids have no text: train with "
                        "--tokenizer=NAME or PATH to sample text")
    enc = get_tokenizer(name)
    if tokenizer_hash(enc) != stored_hash:
        raise UserError(f"tokenizer {name!r} has changed since the run began ({tokenizer_hash(enc)[:12]}, not "
                        f"{stored_hash[:12]}): restore it")
    return enc


def token_bytes(enc: tiktoken.Encoding | None, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: the bytes of each id, 0 for special and unused ids and without a tokenizer. Bits per byte =
    nats / ln 2 / bytes."""
    lengths = np.zeros(vocab_size, np.int64)
    if enc is None:
        return lengths
    if vocab_size < enc.n_vocab:
        padded = math.ceil(enc.n_vocab / 64) * 64
        raise UserError(f"vocab_size {vocab_size} is smaller than the {enc.n_vocab} tokens of {enc.name!r}: set "
                        f"--vocab_size={enc.n_vocab} or more; {padded} is padded to a multiple of 64")
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


# ---- token sequences and corpora

class Tokens:
    """Token ids in one or more shards, each an array or a Shard. len() counts all ids; no window crosses shards."""

    def __init__(self, shards: Sequence[np.ndarray | Shard]):
        self.shards = shards
        self.lengths = np.array([len(shard) for shard in shards], np.int64)

    def __len__(self) -> int:
        return int(self.lengths.sum())

    def windows(self, numbers: np.ndarray, counts: np.ndarray, stride: int, size: int) -> list[np.ndarray]:
        """The windows of these numbers: shard i has counts[i] of them, `stride` ids apart, of up to `size` ids."""
        ends = np.cumsum(counts)
        shards = np.searchsorted(ends, numbers, side="right")
        firsts = (numbers - (ends - counts)[shards]) * stride
        return [self.shards[i][first:first + size] for i, first in zip(shards, firsts, strict=True)]


def as_tokens(tokens: np.ndarray | Tokens) -> Tokens:
    return tokens if isinstance(tokens, Tokens) else Tokens([tokens])


@dataclass(frozen=True)
class Corpus:
    train: np.memmap | Tokens  # token ids
    val: np.memmap | Tokens
    enc: tiktoken.Encoding | None  # None: ids whose texts are not known, so there are no samples and no bits per byte
    fingerprint: str  # of the source texts, or of the shards
    description: str  # for the log
    remedy: str  # for another part that validates
    warnings: tuple[str, ...] = ()  # what the user must not miss


def shard_corpus(data: str, sides: dict[str, list[Path]], tokenizer: str, vocab_size: int, val_data: str) -> Corpus:
    """Token shards, by side, as a corpus; those of `val_data` validate. Raises UserError: a side is missing, a file is
    on both, a bad shard."""
    beside = files_beside(data, sides)
    option = f"--data={data}"
    if val_data:
        sides = sides | {"val": validation_shards(val_data)}
        option = f"--val_data={val_data}"
    for side in ("train", "val"):
        if not sides.get(side):
            there = next(paths[0].name for paths in sides.values() if paths)
            raise UserError(f"--data={data}: no token shards *_{side}_*.bin beside {there}; give a folder, or a glob "
                            "such as 'FOLDER/*.bin', that has both sides, or shards that validate by --val_data")
    check_apart(sides, option)
    enc = None if tokenizer in ("auto", "none") else get_tokenizer(tokenizer)
    limit = enc.n_vocab if enc else vocab_size or 1 << 32
    shards = {side: [open_shard(path, limit) for path in sides[side]] for side in ("train", "val")}
    digest = hashlib.sha256()
    for shard in (*shards["train"], *shards["val"]):
        digest.update(shard.sample())
    train, val = (Tokens(side) for side in shards.values())
    ids = f"ids of {enc.name}" if enc else "ids of a tokenizer that is not named: nats per token only, no samples"
    warnings = [f"{path} looks like a copy of a training shard: {OTHER_SHARDS}" for path in repeats(*shards.values())]
    if beside:
        warnings.append(f"{data} has token shards, beside which {len(beside)} other files are not read, "
                        f"such as {beside[0]}: give texts without shards, or shards alone")
    return Corpus(train, val, enc, digest.hexdigest(), f"{data}: token shards, {len(train.shards)} with {len(train):,} "
                  f"training and {len(val.shards)} with {len(val):,} validation tokens ({ids}).", OTHER_SHARDS,
                  tuple(warnings))


def prepare(data: str, tokenizer: str, cache_dir: str, out_dir: str = "", val_fraction: float = 0.1,
            val_data: str = "", text_field: str = "text", vocab_size: int = 0) -> Corpus:  # fmt: skip
    """The tokens of `data`: "" = the default corpus; a text file or folder, encoded at first use into `cache_dir`; or
    token shards, whose ids are the tokenizer's or, with "auto" and "none", below `vocab_size`. Validation is
    `val_data`, or `val_fraction` of a text; JSON lines have theirs in `text_field`. What a run writes, `cache_dir` and
    `out_dir`, is no part of a text. Raises UserError: no text, unreadable, no room, a bad shard."""
    sides = find_shards(data) if data else {}
    if sides:
        corpus = shard_corpus(data, sides, tokenizer, vocab_size, val_data)
        useless = no_effect("val_fraction", val_fraction, 0.1, "shards validate by their names, or by --val_data")
        useless += no_effect("text_field", text_field, "text", "shards have no JSON lines")
        return replace(corpus, warnings=(*corpus.warnings, *useless))
    if data and tokenizer == "none":
        raise UserError(f"--data={data}: no token shards there, which --tokenizer=none is for: they are files "
                        "*_train_*.bin and *_val_*.bin, or train.bin and val.bin, in one folder or of a glob; a text "
                        "needs a tokenizer, e.g. --tokenizer=python4096")
    enc = get_tokenizer(tokenizer)
    made: list[Path] = []
    try:
        written = {Path(os.path.realpath(folder)) for folder in (cache_dir, out_dir) if folder}
        texts = read_texts(data, val_data, val_fraction, text_field, written)
        # Other ranks or another format never meet old files: all three are in the name.
        key = hashlib.sha256(f"{texts.fingerprint} {tokenizer_hash(enc)} {VERSION}".encode()).hexdigest()[:12]
        paths = [Path(cache_dir, f"{texts.name}-{enc.name}-{key}-{side}.bin") for side in ("train", "val")]
        for path, part in zip(paths, texts.parts, strict=True):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tokens(path, encode(part, enc), enc, texts.fingerprint)
                made.append(path)
    except UserError:
        for path in made:  # the other side has changed since the fingerprint was taken: nobody will ask for this one
            path.unlink(missing_ok=True)
        raise
    except OSError as error:
        raise UserError(f"{error.filename or cache_dir}: {error.strerror or error}; the data must be readable (--data) "
                        "and the cache writable, with room (--cache_dir)") from error
    tokens = [load_tokens(path, enc.n_vocab, texts.fingerprint) for path in paths]
    share = len(tokens[1]) / sum(map(len, tokens))
    return Corpus(*tokens, enc, texts.fingerprint, f"{texts.title}, {len(tokens[0]):,} training and "
                  f"{len(tokens[1]):,} validation tokens ({enc.name}). Validation: {share:.1%} of the tokens and "
                  f"{texts.rule}.", texts.remedy, texts.warnings)


# ---- batches

Batch = tuple[torch.Tensor, torch.Tensor]  # x and y, int64 [batch_size, block_size], y one token ahead of x


def pairs(windows: list[np.ndarray]) -> Batch:
    ids = torch.from_numpy(np.stack(windows).astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def too_short(tokens: Tokens, block_size: int) -> UserError:
    where = "the training text" if len(tokens.shards) == 1 else "the longest training shard"
    return UserError(f"block_size {block_size} needs {block_size + 1} tokens, {where} has {tokens.lengths.max()}: "
                     "set a smaller --block_size or give more text with --data")


def short_shards(tokens: np.ndarray | Tokens, block_size: int) -> str:
    """A warning where shards have no window, so that nothing of them is ever drawn; else empty."""
    lengths = as_tokens(tokens).lengths
    short = int((lengths <= block_size).sum())
    if short == 0:
        return ""
    return (f"{short} of {len(lengths)} training shards have fewer than block_size + 1 = {block_size + 1} ids and are "
            "never drawn: set a smaller --block_size, or join short shards")


def get_batch(tokens: np.ndarray | Tokens, batch_size: int, block_size: int, seed: int, step: int,
              rows: slice = slice(None)) -> Batch:  # fmt: skip
    """Windows drawn from all that there are: a pure function of (seed, step), or of it these `rows`. Raises UserError:
    fewer tokens than one window."""
    tokens = as_tokens(tokens)
    counts = np.maximum(tokens.lengths - block_size, 0)
    if not counts.any():
        raise too_short(tokens, block_size)
    numbers = np.random.default_rng([seed, step, 0]).integers(int(counts.sum()), size=batch_size)[rows]
    return pairs(tokens.windows(numbers, counts, 1, block_size + 1))


def shuffled(places: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """What stands at `places` in a random order of range(count), of which nothing else is computed: a Feistel network
    permutes the numbers of 2 * half bits, whatever its rounds are, and is walked until it is back below `count`."""
    half = np.uint64(max(1, math.ceil((count - 1).bit_length() / 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng([seed, epoch, 1]).integers(1 << 64, size=8, dtype=np.uint64)

    def permuted(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # wraps around
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return left << half | right

    found = permuted(places.astype(np.uint64))
    while (outside := found >= count).any():
        found[outside] = permuted(found[outside])
    return found.astype(np.int64)


def epoch_batch(tokens: np.ndarray | Tokens, batch_size: int, block_size: int, seed: int, step: int,
                rows: slice = slice(None)) -> Batch:  # fmt: skip
    """The windows side by side of every shard, each once in an epoch, in an order of the epoch's own: a pure function
    of (seed, step), or of it these `rows`. Less than a window at a shard's end is left out. Raises as get_batch."""
    tokens = as_tokens(tokens)
    counts = np.maximum(tokens.lengths - 1, 0) // block_size
    windows = int(counts.sum())
    if windows == 0:
        raise too_short(tokens, block_size)
    places = step * batch_size + np.arange(batch_size)[rows]
    epochs = places // windows  # one, or more where an epoch ends within the batch
    numbers = np.empty_like(places)
    for epoch in np.unique(epochs):
        numbers[epochs == epoch] = shuffled(places[epochs == epoch] % windows, windows, seed, int(epoch))
    return pairs(tokens.windows(numbers, counts, block_size, block_size + 1))


def eval_batches(tokens: np.ndarray | Tokens, batch_size: int, block_size: int,
                 max_windows: int = 0) -> Iterator[Batch]:  # fmt: skip
    """Windows side by side that meet each target once; or max_windows of them, evenly spread. All of one shape, for a
    compiled model: where a shard or the windows end, x is padded with 0 and y with -1, which the loss ignores."""
    tokens = as_tokens(tokens)
    targets = np.maximum(tokens.lengths - 1, 0)  # the first id of a shard is none
    counts = (targets + block_size - 1) // block_size  # rounded up
    windows = int(counts.sum())
    if windows == 0:
        raise UserError(f"{len(tokens)} validation tokens in {len(targets)} pieces, of which the first of each is no "
                        "target, are too few to evaluate on: validate by another text, or other shards, with "
                        "--val_data=PATH")
    chosen = min(windows, max_windows) if max_windows else windows
    numbers = np.arange(chosen) * windows // chosen
    for batch in np.split(numbers, range(batch_size, chosen, batch_size)):
        x = torch.zeros(batch_size, block_size, dtype=torch.int64)
        y = torch.full((batch_size, block_size), -1)
        for row, ids in enumerate(tokens.windows(batch, counts, block_size, block_size + 1)):
            window = torch.from_numpy(ids.astype(np.int64))
            x[row, :len(window) - 1] = window[:-1]
            y[row, :len(window) - 1] = window[1:]
        yield x, y


# ---- commands

@dataclass(frozen=True)
class CommandConfig:
    """What the commands work on."""

    data: AnyPath = ""  # a text file or folder; empty: the Python standard library on this machine
    text_field: str = "text"  # of JSON lines: where the text is
    val_fraction: float = 0.1  # part of the text that validates
    val_data: AnyPath = ""  # or a text of its own
    tokenizer: AnyPath = "python4096"  # of shard and bench: a name, or the path of a rank file
    vocab_size: int = N_RANKS + 1  # of train_tokenizer: tokens, with <|endoftext|>
    cache_dir: AnyPath = "cache"  # folder of the token files

    def __post_init__(self):
        need(self, "vocab_size", self.vocab_size > 256, "256 bytes and <|endoftext|> need at least 257")
        need(self, "val_fraction", 0 < self.val_fraction < 1, "choose a value above 0 and below 1")
        need(self, "text_field", len(self.text_field) > 0, "name a field")


def command_texts(options: CommandConfig) -> Texts:
    return read_texts(options.data, options.val_data, options.val_fraction, options.text_field)


def print_warnings(*texts: str) -> None:
    for text in filter(None, texts):
        print(f"WARNING: {text}")


def train_tokenizer(out: Path, options: CommandConfig) -> None:
    """Train ranks on the training side of a text and write them to a file."""
    if importlib.util.find_spec("rustbpe") is None:
        raise UserError("rustbpe, a tool for this command only, is not installed: pip install rustbpe==0.1.0")
    import rustbpe

    if os.path.lexists(out):
        raise UserError(f"{out} exists already: name a new file")
    text = command_texts(options)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out.parent} is not writable: name a file in another folder")
    print_warnings(*text.warnings)
    trainer = rustbpe.Tokenizer()
    pieces = filter(None, part_pieces(text.parts[0]))
    trainer.train_from_iterator(pieces, options.vocab_size - 1, pattern=PATTERN)
    ranks = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks]
    write_text(out, "".join(lines))
    if len(ranks) < options.vocab_size - 1:
        print_warnings(f"{len(ranks)} ranks came, not the {options.vocab_size - 1} of --vocab_size="
                       f"{options.vocab_size}: the text has no more pairs to merge; give more of it with --data")
    corpus = {name: getattr(options, name) for name in ("data", "val_data", "val_fraction", "text_field")}
    given = {name: value for name, value in corpus.items() if value != getattr(CommandConfig, name)}
    same = "that of" if text.fingerprint == RANKS_CORPUS else "NOT that of"
    print(f"{out}: {len(ranks)} ranks of {text.title}, {same} the shipped ranks ({text.fingerprint[:12]}). Use them "
          f"with: {command('train.py', **given, tokenizer=out, vocab_size=len(ranks) + 1)}")


def write_corpus(out: Path, options: CommandConfig) -> None:
    """Write a text's tokens as shards into a folder that has none yet."""
    if any(out.glob("*.bin")):
        raise UserError(f"{out} has shards already: give an empty folder, or a new one")
    corpus = prepare(options.data, options.tokenizer, options.cache_dir, str(out), options.val_fraction,
                     options.val_data, options.text_field)  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for side, ids in (("val", corpus.val), ("train", corpus.train)):
        write_shards(out, side, ids, corpus.enc.n_vocab)
    print_warnings(*corpus.warnings, split_warning(len(corpus.train), len(corpus.val), 0, corpus.remedy))
    print(f"{out}: {corpus.description} Train on them with: "
          + command("train.py", data=out, tokenizer=options.tokenizer, vocab_size=corpus.enc.n_vocab))


def bench(options: CommandConfig) -> None:
    """Time what `prepare` does with a text's content beside one call of tiktoken."""
    enc = get_tokenizer(options.tokenizer)
    texts = command_texts(options)
    print_warnings(*texts.warnings)
    text = "".join(piece for part in texts.parts for piece in part_pieces(part))

    cpu_seconds = []

    def ours() -> None:
        began = time.process_time()
        for part in texts.parts:
            for _ in encode(part, enc):
                pass
        cpu_seconds.append(time.process_time() - began)

    calls = {"ours": ours, "one call": lambda: enc.encode_ordinary(text)}
    times = in_turns(calls, 5, torch.device("cpu"), limit=5)
    size = sum(part.size for part in texts.parts) / 1e6
    cpu, mine, one = map(statistics.median, (cpu_seconds, *times.values()))
    print(f"{texts.title}, tokenizer {enc.name}, medians of {len(times['ours'])}: this program "
          f"{size / mine:.1f} MB/s (it got {cpu / mine:.1f} cores), one call of tiktoken {size / one:.1f} MB/s, "
          f"ratio {one / mine:.2f}")


def main(args: list[str]) -> None:
    words = [arg for arg in args if not arg.startswith("-")]
    given = parse([arg for arg in args if arg.startswith("-")], CommandConfig, doc=f"usage: {USAGE}\n\n{__doc__}")
    (options,) = build(given, CommandConfig)
    if words in (["train_tokenizer"], ["shard"]):
        raise UserError(f"{words[0]}: name OUT, which it writes: {USAGE}")
    if options.data and find_shards(options.data):
        raise UserError(f"--data={options.data} has token shards already: the commands of this file take a text")
    try:
        if words == ["bench"]:
            bench(options)
        elif len(words) == 2 and words[0] == "train_tokenizer":
            train_tokenizer(Path(usable_path(words[1], "OUT=")), options)
        elif len(words) == 2 and words[0] == "shard":
            write_corpus(Path(usable_path(words[1], "OUT=")), options)
        else:
            raise UserError(f"{' '.join(words) or 'nothing'!r} is no command of this file: {USAGE}")
    except OSError as error:
        raise UserError(f"{error.filename or words[-1]}: {error.strerror}; texts must be readable, and OUT writable, "
                        "with room") from error


if __name__ == "__main__":
    cli(main)
