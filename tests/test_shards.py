"""Token shards: formats written byte by byte here, read by a reader of this file's own, windows, epochs, fingerprints,
errors, and the commands of data.py. CPU, no network."""

import base64
import os
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import requests
import test_train
import tiktoken
import torch

import data
import formats
import sample
import shards
import train
from configurator import UserError

WIDTH = 1000  # ids of one shard are WIDTH * its number + position, so that an id says where it is from


def shard_bytes(ids, magic=20240520, version=1, code="H", count=None):
    header = struct.pack("<256i", magic, version, len(ids) if count is None else count, *[0] * 253)
    return header + struct.pack(f"<{len(ids)}{code}", *ids)


def read_shard(path):
    """The ids of a shard, by the description of the format: 256 int32, then uint16 (GPT-2) or uint32 (Llama 3)."""
    raw = path.read_bytes()
    magic, version, count, *rest = struct.unpack("<256i", raw[:1024])
    code = {(20240520, 1): "H", (20240801, 7): "I"}[magic, version]
    assert not any(rest)
    return list(struct.unpack(f"<{count}{code}", raw[1024:]))


def write_side(folder, side, lengths, first=0):
    folder.mkdir(exist_ok=True)
    for number, length in enumerate(lengths, first):
        ids = [WIDTH * number + i for i in range(length)]
        (folder / f"corpus_{side}_{number:06}.bin").write_bytes(shard_bytes(ids))


@pytest.fixture
def folder(tmp_path):
    write_side(tmp_path / "shards", "train", (50, 5, 200))
    write_side(tmp_path / "shards", "val", (30, 1, 17), first=3)
    return tmp_path / "shards"


def write_text(tmp_path):
    (tmp_path / "text.txt").write_text("text\n" * 100)
    return str(tmp_path / "text.txt")


def prepare(path, tokenizer="none", vocab_size=0):
    return data.prepare(str(path), tokenizer, "no_cache", vocab_size=vocab_size)


def in_order(lengths, first=0):
    return data.Tokens([WIDTH * i + np.arange(n) for i, n in enumerate(lengths, first)])


# ---- formats

@pytest.mark.parametrize(("magic", "version", "code"), [(20240520, 1, "H"), (20240520, 2, "I"), (20240801, 7, "I")])
def test_ids_behind_a_header(magic, version, code, tmp_path):
    top = 128_255 if code == "I" else 50_256
    for side, ids in (("train", [1, 2, top]), ("val", [top, 0])):
        (tmp_path / f"fineweb_{side}_000001.bin").write_bytes(shard_bytes(ids, magic, version, code))
    corpus = prepare(tmp_path)
    assert corpus.train.shards[0][:].tolist() == [1, 2, top] and corpus.val.shards[0][:].tolist() == [top, 0]
    flags = corpus.train.shards[0][:].flags
    assert not flags.owndata and not flags.writeable  # a map of the file
    assert len(corpus.train) == 3 and corpus.enc is None
    assert "1 with 3 training and 1 with 2 validation tokens" in corpus.description
    assert "nats per token only" in corpus.description


def test_ids_without_a_header_and_a_pickle_beside_them(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    (tmp_path / "train.bin").write_bytes(struct.pack("<5H", 0, 64, 3, 2, 1))
    (tmp_path / "val.bin").write_bytes(struct.pack("<2H", 7, 8))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "input.txt").write_text("the text itself")
    corpus = prepare(tmp_path, "auto", vocab_size=65)
    assert corpus.train.shards[0][:].tolist() == [0, 64, 3, 2, 1] and corpus.val.shards[0][:].tolist() == [7, 8]
    assert not (tmp_path / "unpickled").exists()
    with pytest.raises(UserError, match="train.bin: token id 64 is beyond the vocabulary of 64; .*--vocab_size=N"):
        prepare(tmp_path, "none", vocab_size=64)
    assert prepare(tmp_path, "bytes").enc.n_vocab == 257


def test_folder_and_glob_are_the_same_and_sides_are_words(folder, tmp_path):
    (folder / "trainer_notes.bin").write_bytes(b"no shard: train is no word of its name")
    (folder / "corpus_val_000005.bin").rename(folder / "train_set_val_000005.bin")  # the last word counts
    (folder / "corpus_train.txt").write_text("no shard: not .bin")
    corpus = prepare(folder)
    assert prepare(folder / "*.bin").fingerprint == prepare(folder / "[ct]*_*").fingerprint == corpus.fingerprint
    assert corpus.train.lengths.tolist() == [50, 5, 200] and corpus.val.lengths.tolist() == [30, 1, 17]
    for name in ("corpus_train_*.bin", "corpus_train_000000.bin"):
        with pytest.raises(UserError, match=r"no token shards \*_val_\*.bin beside corpus_train_000000.bin; give"):
            prepare(folder / name)


def validated(folder, val_data, **keys):
    return data.prepare(str(folder), "none", "no_cache", val_data=str(val_data), **keys)


def test_validation_shards_of_their_own_are_a_side_or_all(folder, tmp_path):
    write_side(tmp_path / "other", "train", (70, 80), first=6)
    own = prepare(folder)
    other = tmp_path / "other"
    for val_data, lengths in ((other, [70, 80]), (other / "*_000007.bin", [80]), (folder, [30, 1, 17])):
        corpus = validated(folder, val_data)
        assert corpus.val.lengths.tolist() == lengths and corpus.train.lengths.tolist() == [50, 5, 200]
        assert (corpus.fingerprint == own.fingerprint) == (val_data == folder)
    write_side(other, "val", (9, 8), first=8)
    assert validated(folder, other).val.lengths.tolist() == [9, 8]  # its training shards validate nothing
    (tmp_path / "heldout.bin").write_bytes(shard_bytes(range(11)))
    assert validated(folder, tmp_path / "heldout.bin").val.lengths.tolist() == [11]
    only = folder / "corpus_train_*.bin"
    assert validated(only, other).train.lengths.tolist() == [50, 5, 200]


def test_validation_shards_that_are_none_or_train_too_are_blamed_on_their_option(folder, tmp_path):
    os.symlink(folder / "corpus_train_000001.bin", tmp_path / "a_val_1.bin")
    os.link(folder / "corpus_train_000001.bin", tmp_path / "b_val_1.bin")
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "empty").mkdir()
    none, both = "no token shards", "in the training data too"
    for val_data, reason in (("nowhere", none), ("text.txt", none), ("empty", none), ("a_val_1.bin", both),
                             ("b_val_1.bin", both), (folder / "corpus_train_000002.bin", both),
                             (folder / "*train*", both)):
        with pytest.raises(UserError, match="^--val_data=.*: .*") as caught:
            validated(folder, tmp_path / val_data)
        assert reason in str(caught.value) and "--data=" not in str(caught.value).replace("--val_data=", "")
    os.symlink(folder / "corpus_train_000001.bin", folder / "again_val_1.bin")
    with pytest.raises(UserError, match="^--data=.*again_val_1.bin is in the training data too"):
        prepare(folder)


def test_options_and_files_that_shards_do_not_read_are_a_line_each(folder, tmp_path):
    assert prepare(folder).warnings == () and "--val_data=PATH" in prepare(folder).remedy
    assert "--val_fraction" not in prepare(folder).remedy
    (folder / "meta.pkl").write_bytes(b"")
    data.prepare(write_text(tmp_path), "bytes", str(folder))  # a cache in it
    assert prepare(folder).warnings == ()
    (folder / "b.txt").write_text("a text")
    (folder / "another.bin").write_bytes(shard_bytes([1]))
    said = validated(folder, folder, val_fraction=0.2, text_field="body").warnings
    assert len(said) == 3 and "2 other files are not read, such as another.bin" in said[0]
    assert "--val_fraction=0.2 has no effect" in said[1] and "--text_field=body has no effect" in said[2]
    assert prepare(folder / "*_[tv]*_*.bin").warnings == ()  # a glob says what it means


def test_shards_without_a_window_are_a_warning():
    tokens = in_order((10, 9, 11, 30))
    assert data.short_shards(tokens, 8) == "" and data.short_shards(tokens.shards[0], 9) == ""
    assert "2 of 4 training shards have fewer than block_size + 1 = 11 ids" in data.short_shards(tokens, 10)


def test_shards_that_are_not_found_are_known_by_their_content(folder, tmp_path):
    assert {magic for magic, _ in shards.FORMATS} == {
        int.from_bytes(head, "little") for head, unfit in formats.FORMATS.items() if unfit is formats.SHARD}
    (tmp_path / "deep").mkdir()
    for side in ("train", "val"):
        write_side(tmp_path / f"deep/{side}", "part", (9, 9))
    remedy = "token shard .*name the shards .*_train_.*_val_.*in one folder"
    for path in (tmp_path / "deep", tmp_path / "deep/train", tmp_path / "deep/val/corpus_part_000000.bin"):
        with pytest.raises(UserError, match=remedy.replace(" .*", ".*", 1)):
            data.prepare(str(path), "auto", str(tmp_path / "cache"))
        with pytest.raises(UserError, match=r"no token shards there.*\*_train_\*.bin and \*_val_\*.bin"):
            prepare(path)
    (tmp_path / "deep/readme.txt").write_text("text\n" * 9)
    (tmp_path / "deep/b.txt").write_text("text b\n" * 9)
    warnings = data.prepare(str(tmp_path / "deep"), "bytes", str(tmp_path / "cache")).warnings
    assert any("token shards are not read beside texts" in warning for warning in warnings)
    with pytest.raises(UserError, match="this glob finds no token shards, files .*_train_"):
        data.prepare(str(tmp_path / "no*.bin"), "auto", str(tmp_path / "cache"))


def test_a_folder_of_our_own_shards_is_no_part_of_a_text(tmp_path):
    write_text(tmp_path)
    for side in ("train", "val"):
        (tmp_path / "out").mkdir(exist_ok=True)
        shards.write_shards(tmp_path / "out", side, np.arange(9), 300)
    corpus = data.prepare(str(tmp_path), "bytes", str(tmp_path / "cache"))
    assert "1 with shards of `data.py shard` in it (out/: give" in corpus.description and corpus.warnings == ()


def test_a_copy_of_a_training_shard_that_validates_is_a_warning(folder):
    assert prepare(folder).warnings == ()
    (folder / "copy_val_1.bin").write_bytes((folder / "corpus_train_000002.bin").read_bytes())
    (warning,) = prepare(folder).warnings
    assert "copy_val_1.bin looks like a copy of a training shard: give other shards with --val_data" in warning


def test_a_side_without_a_target_is_refused_before_the_runs_folder_is_touched(tmp_path):
    write_side(tmp_path / "shards", "train", (50,))
    write_side(tmp_path / "shards", "val", (1, 1), first=3)
    out = tmp_path / "run"
    keys = {"data": tmp_path / "shards", "tokenizer": "none", "vocab_size": 5000}
    with pytest.raises(UserError, match="2 validation tokens in 2 pieces.*too few to evaluate on: .*--val_data=PATH$"):
        train.main(test_train.options(tmp_path, "run", block_size=8, **keys))
    assert not [path.name for path in out.rglob("*") if path.name != ".lock"]


def test_texts_that_are_no_shards_and_text_shards_that_validate_a_text(folder, tmp_path):
    with pytest.raises(UserError, match="--val_data=.*: no text in it .skipped: 6 "):
        data.prepare(write_text(tmp_path), "bytes", str(tmp_path / "cache"), val_data=str(folder))


@pytest.mark.parametrize(("dtype", "top"), [("<u4", 50257), ("<u4", 128_256), ("<i4", 256_000), ("<u4", 65),
                                            ("<i8", 50257), ("<u8", 152_000)])
@pytest.mark.parametrize("count", [20, 100_000])
def test_wide_ids_without_a_header_are_refused(dtype, top, count, tmp_path):
    ids = np.random.default_rng(0).integers(1, top, count)
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    shard_folder = tmp_path / "shards"
    shard_folder.mkdir()
    (shard_folder / "a_train_1.bin").write_bytes(shard_bytes(ids.tolist(), 20240801, 7, "I"))
    for folder in (tmp_path, shard_folder):
        np.arange(9, dtype="<u2").tofile(folder / "val.bin")
    with pytest.raises(UserError, match=r"train.bin: every second .*astype\('uint16'\), or put 256 int32") as caught:
        prepare(tmp_path)
    assert "\n" not in str(caught.value)
    assert np.array_equal(prepare(shard_folder).train.shards[0][:], ids)  # by the header that the message tells of


@pytest.mark.parametrize("seed", range(20))
def test_narrow_ids_without_a_header_are_not_refused(seed, tmp_path):
    random = np.random.default_rng(seed)
    top, count = int(random.choice([2, 4, 20, 65, 257, 50257])), int(random.choice([2, 7, 16, 300, 50_000]))
    ids = random.integers(0, top, count, dtype=np.uint16)
    if seed % 3 == 0:
        ids[count // 2:] = 0  # padding
    for side in ("train", "val"):
        ids.tofile(tmp_path / f"{side}.bin")
    assert len(prepare(tmp_path).train) == count


def test_a_cache_beside_its_text_is_no_shard(tmp_path):
    (tmp_path / "a.txt").write_text("text\n" * 100)
    first, again = (data.prepare(str(tmp_path), "bytes", str(tmp_path)) for _ in range(2))
    assert (tmp_path / first.train.filename).parent == tmp_path
    assert first.fingerprint == again.fingerprint and np.array_equal(first.train, again.train)


def test_more_shards_than_files_may_be_open(tmp_path):
    write_side(tmp_path / "shards", "train", [12] * 60)
    for i in range(240):
        (tmp_path / f"shards/corpus_val_{i:06}.bin").write_bytes(shard_bytes(range(12)))
    corpus = prepare(tmp_path / "shards")
    targets = torch.cat([y.flatten() for _, y in data.eval_batches(corpus.val, 7, 4)])
    assert (targets != -1).sum() == 240 * 11
    assert shards.mapped.cache_info().currsize <= shards.mapped.cache_info().maxsize < 300


# ---- windows

def test_one_file_draws_the_windows_it_always_drew():
    tokens = np.random.default_rng(0).integers(0, 65536, 4000).astype(np.uint16)
    for block, batch, step in ((16, 5, 0), (255, 3, 11), (3999, 2, 4)):
        first = np.random.default_rng([7, step, 0]).integers(4000 - block, size=batch)
        expected = tokens[first[:, None] + np.arange(block + 1)].astype(np.int64)
        for given in (tokens, data.Tokens([tokens])):
            x, y = data.get_batch(given, batch, block, 7, step)
            assert np.array_equal(x, expected[:, :-1]) and np.array_equal(y, expected[:, 1:])
            assert x.is_contiguous() and y.is_contiguous()


@pytest.mark.parametrize("seed", range(20))
def test_no_window_crosses_shards(seed):
    random = np.random.default_rng(seed)
    tokens = in_order(random.integers(0, 40, size=8))
    block = int(random.integers(1, tokens.lengths.max()))
    for draw in (data.get_batch, data.epoch_batch):
        x, y = draw(tokens, 64, block, seed, 3)
        assert x.shape == y.shape == (64, block) and torch.equal(y, x + 1)
        assert ((x[:, 0] // WIDTH) == (y[:, -1] // WIDTH)).all()
        assert (y[:, -1] % WIDTH < torch.from_numpy(tokens.lengths)[x[:, 0] // WIDTH]).all()


def test_windows_are_uniform_over_all_starts_of_all_shards():
    tokens = in_order((12, 3, 30, 9))
    starts = [WIDTH * i + at for i, n in enumerate((12, 3, 30, 9)) for at in range(max(0, n - 8))]
    draws = 40_000
    found, counts = np.unique(data.get_batch(tokens, draws, 8, 0, 0)[0][:, 0], return_counts=True)
    assert found.tolist() == starts  # the second shard has none
    p = 1 / len(starts)
    assert abs(counts / draws - p).max() < 5 * (p * (1 - p) / draws) ** 0.5


@pytest.mark.parametrize("lengths", [(9, 1, 20, 0, 8), (2,), (1, 2, 1), (17, 17)])
def test_evaluation_meets_every_target_of_every_shard_once(lengths):
    tokens = in_order(lengths)
    batches = list(data.eval_batches(tokens, 3, 8))
    targets = torch.cat([y.flatten() for _, y in batches])
    assert targets[targets != -1].tolist() == [WIDTH * i + at for i, n in enumerate(lengths) for at in range(1, n)]
    for x, y in batches:
        assert x.shape == y.shape == (3, 8) and torch.equal(x[y != -1], y[y != -1] - 1)
    some = [x[:, 0].tolist() for x, _ in data.eval_batches(in_order((17, 17)), 1, 8, max_windows=2)]
    assert some == [[0], [WIDTH]]


def test_too_short_shards_are_an_error(folder):
    corpus = prepare(folder)
    for draw in (data.get_batch, data.epoch_batch):
        with pytest.raises(UserError, match="needs 201 tokens, the longest training shard has 200: .*--block_size"):
            draw(corpus.train, 2, 200, 0, 0)
    with pytest.raises(UserError, match="2 validation tokens in 2 pieces, .* too few"):
        next(data.eval_batches(in_order((1, 1)), 2, 8))


# ---- epochs

@pytest.mark.parametrize("seed", range(20))
def test_an_epoch_meets_every_window_once_whatever_the_ranks(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 60, size=5) + [0, 0, 0, 0, 20]
    block, ranks, per_rank = (int(n) for n in random.integers((1, 1, 1), (9, 5, 5)))
    tokens, batch = in_order(lengths), ranks * per_rank
    windows = [WIDTH * i + at for i, n in enumerate(lengths) for at in range(0, n - block, block)]
    seen = []
    for step in range(3 * len(windows) // batch + 1):
        parts = [data.epoch_batch(tokens, batch, block, seed, step, slice(r * per_rank, (r + 1) * per_rank))
                 for r in range(ranks)]  # fmt: skip
        x, y = data.epoch_batch(tokens, batch, block, seed, step)
        assert torch.equal(x, torch.cat([part[0] for part in parts]))
        assert torch.equal(y, torch.cat([part[1] for part in parts]))
        seen += x[:, 0].tolist()
    epochs = [seen[i * len(windows):(i + 1) * len(windows)] for i in range(3)]
    assert all(sorted(epoch) == windows for epoch in epochs)
    if len(windows) > 8:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and windows not in epochs


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 65_536, 65_537])
def test_shuffled_is_a_permutation_of_its_own_for_seed_and_epoch(count):
    places = np.arange(count)
    orders = [data.shuffled(places, count, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert np.array_equal(np.sort(order), places)
    if count >= 1000:  # neither places, neighbours nor other epochs tell where a window stands
        assert np.array_equal(orders[0][[5, 999]], data.shuffled(np.array([5, 999]), count, 0, 0))
        for one, other in ((orders[0], places), (orders[0][1:], orders[0][:-1]), (orders[0], orders[1]),
                           (orders[0], orders[2]), (orders[0] % 2, places % 2)):  # fmt: skip
            assert abs(np.corrcoef(one, other)[0, 1]) < 4 / count**0.5


def test_every_order_of_few_windows_comes():
    orders = {tuple(data.shuffled(np.arange(4), 4, 0, epoch)) for epoch in range(500)}
    assert len(orders) == 24


def test_an_order_of_a_trillion_windows_needs_no_memory():
    found = data.shuffled(np.arange(1000) * 10**9, 10**12, 0, 0)
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < 10**12


# ---- fingerprints and errors

def sparse(path, size, header=b""):
    path.write_bytes(header)
    os.truncate(path, size)


def test_fingerprint_and_check_of_100_gigabytes_read_samples_only(tmp_path):
    """The file is a hole: reading all of it would take minutes."""
    sparse(tmp_path / "train.bin", 98 * 10**9)
    (tmp_path / "val.bin").write_bytes(bytes(2000))
    smaller = prepare(tmp_path, vocab_size=100)
    sparse(tmp_path / "train.bin", 100 * 10**9)
    before = prepare(tmp_path, vocab_size=100)
    assert smaller.fingerprint != before.fingerprint  # the samples are all zeros
    assert len(before.train) == 50 * 10**9
    assert data.get_batch(before.train, 4, 256, 0, 0)[0].sum() == 0
    for at in (0, 50 * 10**9, 100 * 10**9 - 1):  # the samples have both ends and the middle
        with (tmp_path / "train.bin").open("r+b") as file:
            file.seek(at - at % 2)
            file.write(b"\1")
        after = prepare(tmp_path, vocab_size=100)
        assert after.fingerprint != before.fingerprint
        before = after


def test_ids_between_the_samples_are_checked_when_they_are_drawn(tmp_path):
    ids = np.zeros(200_000, np.uint16)
    ids[15_000:24_000] = 300  # samples begin at every 12,372nd id
    for side in ("train", "val"):
        ids.tofile(tmp_path / f"{side}.bin")
    corpus = prepare(tmp_path, vocab_size=300 + 1)
    for draw in (data.get_batch, data.epoch_batch):
        assert draw(corpus.train, 1, 190_000, 0, 0)[0].max() == 300
    with pytest.raises(UserError, match="token id 300 is beyond the vocabulary of 257"):
        list(data.eval_batches(prepare(tmp_path, "bytes", vocab_size=10**4).val, 8, 256))
    corpus = prepare(tmp_path, vocab_size=300)  # all that is read of it at once is in order
    for draw in (data.get_batch, data.epoch_batch):
        with pytest.raises(UserError, match="train.bin: token id 300 is beyond the vocabulary of 300; .*--tokenizer"):
            draw(corpus.train, 1, 190_000, 0, 0)
    with pytest.raises(UserError, match="val.bin: token id 300"):
        list(data.eval_batches(corpus.val, 8, 256))


def test_fingerprint_sees_names_sizes_and_every_byte_of_small_shards(folder, tmp_path):
    path = folder / "corpus_train_000002.bin"
    raw = path.read_bytes()
    found = [prepare(folder).fingerprint]
    for at in (1024, 1200, len(raw) - 1):
        (tmp_path / "new").write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:])
        (tmp_path / "new").rename(path)  # a map of the old file would live on
        found.append(prepare(folder).fingerprint)
    path.write_bytes(raw)
    (folder / "corpus_val_000004.bin").write_bytes(shard_bytes([9]))
    found.append(prepare(folder).fingerprint)
    (folder / "corpus_val_000004.bin").write_bytes(shard_bytes([4000]))
    path.write_bytes(shard_bytes(range(2000, 2199)))
    found.append(prepare(folder).fingerprint)
    path.write_bytes(raw)
    path.rename(folder / "corpus_train_000003.bin")
    found.append(prepare(folder).fingerprint)
    (folder / "corpus_train_000003.bin").rename(folder / "corpus_val_000006.bin")
    found.append(prepare(folder).fingerprint)
    assert len(set(found)) == len(found)
    (folder / "corpus_val_000006.bin").rename(path)
    folder.rename(tmp_path / "moved")
    assert prepare(tmp_path / "moved").fingerprint == found[0]


@pytest.mark.parametrize(("name", "raw", "reason"), [
    ("a_train_1.bin", shard_bytes(range(9))[:-1], "cut or damaged, 1041 bytes, but its header tells of 9 ids in 1042;"),
    ("a_train_1.bin", shard_bytes(range(9))[:700], "cut or damaged, 700 bytes"),
    ("a_train_1.bin", shard_bytes(range(9), code="I"), "cut or damaged, 1060 bytes"),
    ("a_train_1.bin", shard_bytes(range(9)) + b"\0\0", "cut or damaged, 1044 bytes"),
    ("a_train_1.bin", shard_bytes(range(9))[:8], "cut or damaged, 8 bytes"),
    ("a_train_1.bin", b"", "empty file; copy or download it again"),
    ("a_train_1.bin", shard_bytes([]), "its header tells of 0 ids"),
    ("a_train_1.bin", shard_bytes(range(9), version=3), "version 3 .*magic 20240520; this program reads 20240520 vers"),
    ("a_train_1.bin", shard_bytes(range(9), version=1, magic=20240801), "version 1 .*magic 20240801; this program"),
    ("a_train_1.bin", shard_bytes(range(9), magic=20240522), "not a token shard.*; give shards with a header"),
    ("a_train_1.bin", struct.pack("<9H", *range(9)), "not a token shard.*names train.bin and val.bin"),
    ("a_train_1.bin", b"PK", "not a token shard"),
    ("train.bin", struct.pack("<9H", *range(9))[:-1], "17 bytes, an odd number, are no uint16 ids; copy"),
    ("train.bin", shard_bytes(range(9))[:-2], "cut or damaged"),
    ("train.bin", struct.pack("<2H", 1, 100), "token id 100 is beyond the vocabulary of 100; .*--vocab_size=N"),
    ("a_train_1.bin", shard_bytes([1, 100]), "token id 100 is beyond the vocabulary of 100; .*--vocab_size=N"),
])
def test_bad_shards_are_one_line(name, raw, reason, tmp_path):
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "a_val_1.bin").write_bytes(shard_bytes([1, 2, 3]))
    with pytest.raises(UserError, match=f"^[^\n]*{name}: {reason}") as caught:
        prepare(tmp_path, vocab_size=100)
    assert "\n" not in str(caught.value)


def test_an_unreadable_shard_is_one_line(folder, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shards.Path, "open", refuse)
    with pytest.raises(UserError, match="corpus_train_000000.bin: cannot read the shard .Permission denied.; make it"):
        prepare(folder)


# ---- tokenizers of shards and of one's own

def test_ids_of_a_named_tokenizer_have_bytes_and_of_none_have_not(tmp_path, monkeypatch):
    enc = data.get_tokenizer("python4096")
    for side in ("train", "val"):
        (tmp_path / f"{side}.bin").write_bytes(struct.pack("<4H", 4094, 65, 66, 4095))
    named, unnamed = prepare(tmp_path, "python4096"), prepare(tmp_path, "auto")
    assert data.tokenizer_hash(named.enc) == data.tokenizer_hash(enc) and "ids of python4096" in named.description
    assert data.tokenizer_hash(unnamed.enc) == "none" and named.fingerprint == unnamed.fingerprint
    assert not data.token_bytes(unnamed.enc, 70).any() and data.token_bytes(unnamed.enc, 70).shape == (70,)
    assert data.tokenizer_hash(data.get_tokenizer("auto")) == data.tokenizer_hash(enc)
    with pytest.raises(UserError, match="'none' is for token shards; a text needs one"):
        data.prepare("", "none", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="without a tokenizer, so its ids have no text"):
        data.stored_tokenizer("auto", "none")

    def fail(name):
        raise requests.exceptions.ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError, match="token shards train without a tokenizer, by --tokenizer=none --vocab_size=N"):
        prepare(tmp_path, "gpt2")


def rank_file(path, merges):
    ranks = [bytes([b]) for b in range(255, -1, -1)] + merges
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks)))
    return path


def test_a_rank_file_is_a_tokenizer_that_a_checkpoint_finds_again(tmp_path, monkeypatch):
    path = rank_file(tmp_path / "my ranks.tiktoken", [b"th", b"the", b" the"])
    enc = data.get_tokenizer(str(path))
    assert enc.encode_ordinary("the the") == [257, 258] and enc.n_vocab == 260 and enc.eot_token == 259
    (tmp_path / "one.txt").write_text("the the\n" * 100)
    corpus = data.prepare(str(tmp_path / "one.txt"), str(path), str(tmp_path / "cache"))
    assert corpus.train[0] == 257 and "(my_ranks)" in corpus.description
    assert data.stored_tokenizer(str(path), data.tokenizer_hash(enc)).n_vocab == 260
    rank_file(path, [b"th"])
    with pytest.raises(UserError, match="my ranks.tiktoken' has changed since the run began .*: restore it"):
        data.stored_tokenizer(str(path), data.tokenizer_hash(enc))
    monkeypatch.chdir(tmp_path)
    rank_file(tmp_path / "plain", [])
    assert data.get_tokenizer("plain").n_vocab == 257


@pytest.mark.parametrize(("change", "reason"), [
    (lambda lines: lines[:200] + lines[201:], "not ranks from 0 on, each once, with all 256 bytes"),
    (lambda lines: lines[:255] + [lines[256].replace("256", "255")], "not ranks from 0"),  # a byte is missing
    (lambda lines: [*lines, lines[-1]][:-2] + ["dGg= 300"], "not ranks from 0"),
    (lambda lines: ["hello"], "cannot read the ranks"),
    (lambda lines: [], "not ranks from 0"),
    (None, r"cannot read the ranks \(No such file or directory\)"),
])
def test_bad_rank_files_are_one_line(change, reason, tmp_path):
    path = tmp_path / "ranks"
    if change:
        lines = rank_file(path, [b"th"]).read_text().splitlines()
        path.write_text("\n".join(change(lines)))
    with pytest.raises(UserError, match=f"ranks: {reason}.*; give a file that `python data.py train_tok") as caught:
        data.get_tokenizer(str(path))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_is_too_small_names_the_padded_one():
    enc = data.get_tokenizer("bytes")
    with pytest.raises(UserError, match="set --vocab_size=257 or more; 320 is padded to a multiple of 64"):
        data.token_bytes(enc, 256)


# ---- training

@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_training_on_shards_is_training_on_their_text(sampling, tmp_path, monkeypatch, capsys):
    """By a tokenizer that is named and by none, and stopped and resumed."""
    out, cache = tmp_path / "shards", tmp_path / "cache"
    data.main(["shard", str(out), f"--data={test_train.TEXT}", "--tokenizer=bytes", f"--cache_dir={cache}"])

    def run(name: str, **more) -> int:
        given = {"max_iters": 4, "eval_interval": 2, "sampling": sampling, "dtype": "float32", "n_layer": 2}
        return train.main(test_train.options(tmp_path, name, **given, **more))

    run("text")
    run("named", data=out)
    assert "bits/byte" in capsys.readouterr().out
    run("none", data=out, tokenizer="none")
    said = capsys.readouterr().out.split("\nstep     0 ")[1]
    assert "nats/token" in said and "bits/byte" not in said and "sample" not in said
    text, named, none = (test_train.records(tmp_path / name) for name in ("text", "named", "none"))
    for key in ("loss", "val_loss", "val_bpb"):
        assert [r.get(key) for r in text] == [r.get(key) for r in named]
    for key in ("loss", "val_loss"):
        assert [r.get(key) for r in text] == [r.get(key) for r in none]
    assert not any("val_bpb" in r for r in none)
    with pytest.raises(UserError, match="its ids have no text"):
        sample.main([f"--out_dir={tmp_path / 'none'}", "--prompt=a"])

    with monkeypatch.context() as patch:
        test_train.interrupt_after(patch, 2)
        assert run("part", data=out, tokenizer="none") == 130
    train.main([f"--out_dir={tmp_path / 'part'}", "--resume"])
    assert test_train.losses(tmp_path / "part") == test_train.losses(tmp_path / "none")
    assert test_train.equal(*(test_train.weights(tmp_path / name) for name in ("part", "none")))


# ---- commands

@pytest.fixture
def text_folder(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / f"texts/{i}.txt").write_text(f"text {i}\nénd {i * i}\n" * 20)
    return tmp_path / "texts"


def options(tmp_path, text_folder, *more):
    return [f"--data={text_folder}", f"--cache_dir={tmp_path / 'cache'}", *more]


def test_shard_splits_as_it_is_told(tmp_path, text_folder, capsys):
    (tmp_path / "held.txt").write_text("held out\n" * 200)
    cache = str(tmp_path / "cache")
    for name, keys in (("a", {"val_fraction": 0.3}), ("b", {"val_data": str(tmp_path / "held.txt")})):
        more = [f"--{key}={value}" for key, value in keys.items()]
        data.main(["shard", str(tmp_path / name), *options(tmp_path, text_folder, "--tokenizer=bytes", *more)])
        text = data.prepare(str(text_folder), "bytes", cache, **keys)
        assert read_shard(tmp_path / name / "text_val_000000.bin") == text.val.tolist()
        assert read_shard(tmp_path / name / "text_train_000000.bin") == text.train.tolist()
    said = capsys.readouterr().out
    assert said.count("WARNING") == 1 and "WARNING: validation has " in said  # of the first


def test_shard_writes_a_corpus_that_trains_like_its_text(tmp_path, text_folder, monkeypatch, capsys):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 3000)
    out = tmp_path / "out"
    given = options(tmp_path, text_folder, "--tokenizer=bytes")
    data.main(["shard", str(out), *given])
    assert f"--data={out} --tokenizer=bytes --vocab_size=257" in capsys.readouterr().out
    text, ours = data.prepare(str(text_folder), "bytes", str(tmp_path / "cache")), prepare(out, "bytes")
    for side in ("train", "val"):
        paths = sorted(out.glob(f"*_{side}_*.bin"))
        ids = [read_shard(path) for path in paths]
        assert sum(ids, []) == getattr(text, side).tolist()
        assert [len(one) for one in ids[:-1]] == [3000] * (len(ids) - 1) and len(ids[-1]) <= 3000
        assert getattr(ours, side).lengths.tolist() == [len(one) for one in ids]
    assert len(os.listdir(out)) == len(ours.train.shards) + len(ours.val.shards) > 3
    with pytest.raises(UserError, match="out has shards already: give an empty folder"):
        data.main(["shard", str(out), *given])
    with pytest.raises(UserError, match="has token shards already: .* take a text"):
        data.main(["shard", str(tmp_path / "new"), f"--data={out}"])


def test_wide_ids_are_written_as_uint32_and_a_crash_leaves_nothing(tmp_path, monkeypatch):
    shards.write_shards(tmp_path, "train", np.array([70_000, 1], np.uint32), 70_001)
    assert read_shard(tmp_path / "text_train_000000.bin") == [70_000, 1]
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        shards.write_shards(tmp_path, "val", np.array([1]), 2)
    assert os.listdir(tmp_path) == ["text_train_000000.bin"]


class Trainer:
    """What data.py uses of rustbpe.Tokenizer: keeps what it is given, and merges nothing but "th"."""

    def train_from_iterator(self, texts, count, pattern):
        Trainer.given = list(texts), count, pattern

    def get_mergeable_ranks(self):
        return [(list(b"th"), 256), *(([b], b) for b in range(256))]


def test_a_tokenizer_is_trained_on_the_training_side_alone(tmp_path, text_folder, monkeypatch, capsys):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "rustbpe", types.SimpleNamespace(Tokenizer=Trainer))
    out = tmp_path / "ranks"
    data.main(["train_tokenizer", str(out), *options(tmp_path, text_folder, "--vocab_size=300")])
    texts, count, pattern = Trainer.given
    corpus = data.prepare(str(text_folder), "bytes", str(tmp_path / "cache"))
    train = corpus.train.tolist()
    assert "".join(texts).encode() == bytes(t for t in train if t != 256)
    assert count == 299 and pattern == data.PATTERN and len(texts) == train.count(256)
    assert data.get_tokenizer(str(out)).encode_ordinary("th") == [256]
    said = capsys.readouterr().out
    assert "257 ranks" in said and "NOT that of the shipped ranks" in said and "--vocab_size=258" in said


def test_train_tokenizer_overwrites_nothing_and_says_what_to_type(tmp_path, text_folder, monkeypatch, capsys):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "rustbpe", types.SimpleNamespace(Tokenizer=Trainer))
    out = tmp_path / "new/folder/ranks"
    given = options(tmp_path, text_folder)
    data.main(["train_tokenizer", str(out), *given, "--vocab_size=300"])
    said = capsys.readouterr().out
    assert "WARNING: 257 ranks came, not the 299 of --vocab_size=300: " in said
    assert f"train.py --data={text_folder} --tokenizer={out} --vocab_size=258" in said
    content = out.read_bytes()
    data.main(["train_tokenizer", str(out.with_name("exact")), *given, "--vocab_size=258", "--val_fraction=0.2"])
    said = capsys.readouterr().out
    assert "WARNING" not in said and "--val_fraction=0.2 --tokenizer" in said
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    monkeypatch.setattr(data, "command_texts", None)  # before the text is read
    for path in (out, tmp_path / "link", text_folder):
        with pytest.raises(UserError, match=f"^{path} exists already: name a new file$"):
            data.main(["train_tokenizer", str(path), *given])
    assert out.read_bytes() == content


def test_train_tokenizer_needs_a_folder_before_it_trains(tmp_path, text_folder, monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "rustbpe", types.SimpleNamespace(Tokenizer=None))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*OUT writable"):
        data.main(["train_tokenizer", str(tmp_path / "file/out"), *options(tmp_path, text_folder)])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="texts is not writable: name a file in another folder"):
        data.main(["train_tokenizer", str(text_folder / "out"), *options(tmp_path, text_folder)])


def test_help_has_one_usage(capsys):
    with pytest.raises(SystemExit):
        data.main(["--help"])
    assert capsys.readouterr().out.count("usage:") == 1


def test_bench_compares_ours_with_one_call(tmp_path, text_folder, capsys):
    data.main(["bench", *options(tmp_path, text_folder, "--tokenizer=bytes")])
    said = capsys.readouterr().out
    assert "tokenizer bytes, medians of 5" in said and "one call of tiktoken" in said and "ratio" in said
    assert not (tmp_path / "cache").exists()


def test_commands_and_their_options_are_checked(tmp_path):
    for command in ("shard", "train_tokenizer"):
        with pytest.raises(UserError, match=f"^{command}: name OUT, which it writes: python data.py"):
            data.main([command, f"--data={tmp_path}"])
    write_side(tmp_path / "shards", "train", (9,))
    for words in (["bench"], ["shard", "out"], ["train_tokenizer", "out"]):
        with pytest.raises(UserError, match="--data=.*shards has token shards already: .* take a text"):
            data.main([*words, f"--data={tmp_path / 'shards'}"])
    for option, reason in (("text_field=", "name a"), ("val_fraction=0", "above 0"), ("val_fraction=1", "below 1")):
        with pytest.raises(UserError, match=reason):
            data.main(["bench", f"--{option}"])
    for args in ([], ["bench", "more"], ["shard", "a", "b"]):
        with pytest.raises(UserError, match="is no command of this file: python data.py .train_tokenizer OUT, shard"):
            data.main(args)
    with pytest.raises(UserError, match="vocab_size=256: 256 bytes and <|endoftext|> need at least 257"):
        data.main(["train_tokenizer", "out", "--vocab_size=256"])
    with pytest.raises(UserError, match="unknown key 'dat'"):
        data.main(["shard", "out", "--dat=x"])
    (tmp_path / "a.txt").write_text("text\n" * 10)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*OUT writable"):
        data.main(["shard", str(tmp_path / "file/out"), *options(tmp_path, tmp_path / "a.txt")])
