"""Token shards: files of ids that other projects write, read where they lie, and written for them.

- A header of 256 int32 (magic, version, number of ids), then uint16 or uint32 ids: FORMATS; or uint16 ids alone under
  the name train.bin or val.bin, as karpathy/nanoGPT has them (its meta.pkl is a pickle, and never read).
- Memory-mapped and never read as a whole, so that 100 GB cost nothing: a fingerprint over names, sizes and samples, and
  every slice that is read is checked.
"""

import functools
import glob
import hashlib
import mmap
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import UserError
from files import complete_file
from formats import is_token_file

# (magic, version) -> type of the ids. karpathy/llm.c, dev/data/data_common.py, has the first (GPT-2) and the last
# (Llama 3); the second is the first with wide ids, as a public script for other tokenizers writes it.
FORMATS = {(20240520, 1): "<u2", (20240520, 2): "<u4", (20240801, 7): "<u4"}
HEADER, SHARD_TOKENS = 1024, 100_000_000  # bytes of a header; ids of a shard that this program writes
SAMPLES, SAMPLE = 17, 2048  # a shard's fingerprint reads so many places, of so many ids each


@dataclass(frozen=True, eq=False)  # a file opened twice may have changed, so it is two shards
class Shard:
    """The ids of a file that this program did not write, read like an array: by len() and slices. Memory-mapped, and
    never read as a whole: it may be larger than memory, so every slice is checked."""

    path: Path
    dtype: str
    offset: int  # bytes before the ids
    count: int
    limit: int  # ids are below it

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, where: slice) -> np.ndarray:
        ids = mapped(self)[where]
        top = int(ids.max(initial=0))
        if top >= self.limit:
            raise UserError(f"{self.path}: token id {top} is beyond the vocabulary of {self.limit}; name the one that "
                            "made the shard by --tokenizer=NAME, or --tokenizer=none --vocab_size=N, or, if it is "
                            "damaged, download it again")
        return ids

    def sample(self) -> bytes:
        """What the fingerprint reads: name, size, and ids at places evenly spaced, which is all of a small shard."""
        return os.fsencode(self.path.name) + self.content()

    def content(self) -> bytes:
        firsts = sorted({max(0, self.count - SAMPLE) * i // (SAMPLES - 1) for i in range(SAMPLES)})
        parts = [self[first:first + SAMPLE].tobytes() for first in firsts]
        return f"\0{self.dtype}{self.count}\0".encode() + b"".join(parts)


@functools.lru_cache(maxsize=256)  # a map keeps its file open, systems allow about a thousand, and corpora have more
def mapped(shard: Shard) -> np.ndarray:
    """The ids as a read-only array over the file."""
    with shard.path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # else a window of a few pages waits until megabytes around it are read
        content.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(content, shard.dtype, shard.count, shard.offset)


def has_wide_ids(shard: Shard) -> bool:
    """Whether uint16 ids look like the halves of uint32 or int64 ones, little-endian: in a sample every second is 0 or
    small, as ids below a million have it, and the others are not."""
    ids = mapped(shard)
    firsts = {max(0, len(ids) - SAMPLE) * i // (SAMPLES - 1) // 4 * 4 for i in range(SAMPLES)}
    sample = np.concatenate([ids[first:first + SAMPLE] for first in sorted(firsts)])
    low, high = sample[:len(sample) // 2 * 2].reshape(-1, 2).T.astype(int)
    return len(ids) % 2 == 0 and len(low) >= 4 and high.max() < 16 and bool(np.mean(low > 16 * high.max()) > 0.3)


def open_shard(path: Path, limit: int) -> Shard:
    """A shard of one of FORMATS, or a train.bin or val.bin without a header. Raises UserError: unreadable, foreign,
    cut."""
    def bad(reason: str, remedy: str = "copy or download it again") -> UserError:
        return UserError(f"{path}: {reason}; {remedy}")

    try:
        with path.open("rb") as file:
            head, size = file.read(HEADER), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise bad(f"cannot read the shard ({error.strerror})", "make it readable") from error
    if size == 0:
        raise bad("empty file")
    magic, version, count = struct.unpack("<3i", head[:12].ljust(12, b"\0"))
    versions = [known for known, _ in FORMATS if known == magic]
    if versions and size < HEADER:
        raise bad(f"cut or damaged, {size} bytes are fewer than a header's {HEADER}")
    if not versions and path.name in ("train.bin", "val.bin"):
        if size % 2:
            raise bad(f"{size} bytes, an odd number, are no uint16 ids")
        shard = Shard(path, "<u2", 0, size // 2, limit)
        if has_wide_ids(shard):
            raise bad("every second of its uint16 ids is 0 or small, as in uint32 or int64 ids", "without a header "
                      "only uint16 is read: convert it by numpy's astype('uint16'), or put 256 int32 before "
                      "uint32 ids: 20240801, 7, the number of ids, zeros")
        return shard
    if not versions:
        raise bad("not a token shard, its first int32 is no magic number such as 20240520", "give shards with a header "
                  "of 256 int32, or ids without one in files of the names train.bin and val.bin")
    if (magic, version) not in FORMATS:
        readable = ", ".join(f"{known} version {v}" for known, v in FORMATS)
        raise bad(f"version {version} of the shards with magic {magic}", f"this program reads {readable}")
    dtype = FORMATS[magic, version]
    expected = HEADER + count * np.dtype(dtype).itemsize
    if count < 1:
        raise bad(f"its header tells of {count} ids")
    if size != expected:
        raise bad(f"cut or damaged, {size} bytes, but its header tells of {count} ids in {expected}")
    return Shard(path, dtype, HEADER, count, limit)


def is_ours(path: Path) -> bool:
    """Whether it is a token file of a cache, which may lie beside its text."""
    try:
        return is_token_file(path)
    except OSError:
        return False  # open_shard will say why


def shard_files(data: str) -> list[Path]:
    """Files *.bin that are no token files of a cache, of a folder, a glob or a file `data`, sorted."""
    path = Path(os.path.expanduser(data))
    found: Iterable[Path] = [path]
    if os.path.isdir(path):
        found = path.glob("*.bin")
    elif not os.path.exists(path):
        found = map(Path, glob.glob(str(path)))
    return sorted(file for file in found if file.suffix == ".bin" and os.path.isfile(file) and not is_ours(file))


def find_shards(data: str) -> dict[str, list[Path]]:
    """Side -> the `shard_files` with train or val as a word of their names."""
    sides: dict[str, list[Path]] = {}
    for file in shard_files(data):
        words = re.findall(r"(?<![a-z])(train|val)(?![a-z])", file.stem.lower())
        if words:
            sides.setdefault(words[-1], []).append(file)
    return sides


def validation_shards(val_data: str) -> list[Path]:
    """The validation side of `val_data`, or all of its shards where they have no such side. Raises UserError: none."""
    found = find_shards(val_data).get("val") or shard_files(val_data)
    if not found:
        raise UserError(f"--val_data={val_data}: no token shards *.bin there, and --data has shards; give a folder, a "
                        "glob or a file of them, made by the same tokenizer")
    return found


def repeats(shards: Iterable[Shard], others: Iterable[Shard]) -> list[Path]:
    """Which of the `others` look like one of the shards."""
    known = {hashlib.sha256(shard.content()).digest() for shard in shards}
    return [shard.path for shard in others if hashlib.sha256(shard.content()).digest() in known]


def check_apart(sides: dict[str, list[Path]], option: str) -> None:
    """UserError where a file is on both sides, under whatever name; the one to blame is `option`."""
    train = {(at.st_dev, at.st_ino) for at in map(os.stat, sides["train"])}
    for path in sides["val"]:
        at = path.stat()
        if (at.st_dev, at.st_ino) in train:
            raise UserError(f"{option}: {path} is in the training data too; give validation shards of its own")


def files_beside(data: str, sides: dict[str, list[Path]]) -> list[str]:
    """Names of the other files of the folder `data`; hidden ones, nanoGPT's meta.pkl and caches do not count."""
    folder = Path(os.path.expanduser(data))
    shards = {path for paths in sides.values() for path in paths}
    others = [path for path in folder.iterdir() if path not in shards] if os.path.isdir(folder) else []
    return sorted(path.name for path in others if os.path.isfile(path) and path.name != "meta.pkl"
                  and not path.name.startswith(".") and not is_ours(path))  # fmt: skip


def write_shards(folder: Path, side: str, ids: np.ndarray, vocab_size: int) -> None:
    """Ids as shards text_SIDE_NUMBER.bin of one of FORMATS, each complete or not there at all."""
    magic, version = (20240520, 1) if vocab_size <= 1 << 16 else (20240801, 7)
    for number, first in enumerate(range(0, len(ids), SHARD_TOKENS)):
        part = ids[first:first + SHARD_TOKENS].astype(FORMATS[magic, version])
        path = folder / f"text_{side}_{number:06}.bin"
        with complete_file(path) as file:
            file.write(struct.pack("<3i", magic, version, len(part)).ljust(HEADER, b"\0"))
            file.write(part)
