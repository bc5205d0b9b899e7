"""data.py: round trips, the token files and their errors, batches, evaluation windows. CPU, no network."""

import base64
import hashlib
import json
import math
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
import torch

import data
import tokenfiles
from configurator import UserError, build, parse
from model import HydraConfig
from tokenfiles import sealed
from train import TrainConfig

AWKWARD = ("\ufeffdef f(x):\r\n\tif x:\n        return 'naïve 数 🐍 e\u0301'\x00\x0b\u3000\u2028<|endoftext|> 12345\r\n"
           "\n\n  \u200b_a__b \U0010ffff")
TOKENIZERS = ("python4096", "bytes")


def prepare(source, tmp_path, tokenizer="bytes"):
    return data.prepare(str(source), tokenizer, str(tmp_path / "cache"))


def text_of(tokens, enc):
    return enc.decode_bytes(tokens.tolist()).replace(b"<|endoftext|>", b"")


def token_file(path, ids):
    enc = data.make_encoding("bytes", "(?s:.)", {bytes([b]): b for b in range(256)})
    tokenfiles.write_tokens(path, iter([ids]), enc, "source")
    return path


# ---- tokenizers

@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_text_comes_back(name):
    enc = data.get_tokenizer(name)
    every = "".join(chr(c) for c in range(0x3100) if not 0xD800 <= c < 0xE000)
    for text in (AWKWARD, every, " " * 300_000 + "x", "\n" * 300_000, "=" * 300_000, ""):
        ids = enc.encode_ordinary(text)
        assert enc.decode_bytes(ids) == text.encode()
        assert enc.eot_token not in ids


def test_vocabulary_sizes_and_shipped_ranks():
    assert data.get_tokenizer("python4096").n_vocab == 4096 and data.get_tokenizer("python4096").eot_token == 4095
    assert data.get_tokenizer("bytes").n_vocab == 257 and data.get_tokenizer("bytes").eot_token == 256
    ranks = data.shipped_ranks()
    assert len(ranks) == 4095 and all(bytes([b]) in ranks for b in range(256))
    assert data.RANKS.stat().st_size < 60_000


def test_indented_line_ends_are_single_tokens():
    enc = data.get_tokenizer("python4096")
    for text in (":\n        ", "):\n    ", "\n\n    ", " self", ".append"):
        assert len(enc.encode_ordinary(text)) == 1, text


@pytest.mark.parametrize("change", ["drop byte", "twice", "cut", "garbage", "missing"])
def test_damaged_ranks_are_an_error(change, tmp_path, monkeypatch):
    lines = data.RANKS.read_text().splitlines()
    if change == "drop byte":  # the number of ranks stays right
        lines[65] = f"{base64.b64encode(b'never a rank before').decode()} 65"
    elif change == "twice":
        lines[4000] = lines[3999]
    elif change == "cut":
        del lines[4000:]
    elif change == "garbage":
        lines[7] = "no base64 at all"
    monkeypatch.setattr(data, "RANKS", tmp_path / "ranks")
    if change != "missing":
        data.RANKS.write_text("\n".join(lines))
    with pytest.raises(UserError, match="restore it"):
        data.get_tokenizer("python4096")


def test_unknown_tokenizer_names_the_nearest():
    with pytest.raises(UserError, match="unknown tokenizer 'pyhton4096': did you mean python4096"):
        data.get_tokenizer("pyhton4096")
    with pytest.raises(UserError, match="bytes, gpt2"):
        data.get_tokenizer("???")


@pytest.mark.parametrize("error", [requests.exceptions.ConnectionError("no route"), ValueError("Hash mismatch")])
def test_failed_download_names_the_remedies(error, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(UserError, match="online once.*TIKTOKEN_CACHE_DIR.*--tokenizer=python4096") as caught:
        data.get_tokenizer("gpt2")
    assert "\n" not in str(caught.value)


def test_an_encoding_without_end_of_text_is_an_error(monkeypatch):
    bare = tiktoken.Encoding("bare", pat_str="(?s:.)", mergeable_ranks={bytes([b]): b for b in range(256)},
                             special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bare)
    with pytest.raises(UserError, match="no <|endoftext|>"):
        data.get_tokenizer("gpt2")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_bytes_sum_to_the_bytes_of_the_text(name):
    enc = data.get_tokenizer(name)
    lengths = data.token_bytes(enc, 5000)
    assert lengths.shape == (5000,) and lengths.dtype == np.int64
    assert lengths[enc.encode_ordinary(AWKWARD)].sum() == len(AWKWARD.encode())
    assert lengths[enc.eot_token] == 0 and not lengths[enc.n_vocab:].any()
    with pytest.raises(UserError, match="vocab_size 256 is smaller"):
        data.token_bytes(enc, 256)


def test_training_without_rustbpe_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install rustbpe"):
        data.main(["train_tokenizer", str(tmp_path / "out")])
    with pytest.raises(UserError, match="train_tokenizer OUT"):
        data.main(["train"])


# ---- token files

def test_tokens_are_written_once_and_reused(folder, tmp_path, monkeypatch):
    first = prepare(folder, tmp_path)
    monkeypatch.setattr(data, "write_tokens", None)  # must not be called
    again = prepare(folder, tmp_path)
    assert isinstance(again.train, np.memmap) and again.train.dtype == np.uint16
    assert np.array_equal(first.train, again.train) and first.description == again.description
    assert len(os.listdir(tmp_path / "cache")) == 2


def test_changed_text_ranks_or_version_do_not_meet_old_files(folder, tmp_path, monkeypatch):
    old = prepare(folder, tmp_path)
    swapped = {bytes([b]): b ^ 1 for b in range(256)}
    with monkeypatch.context() as patch:
        patch.setattr(data, "get_tokenizer", lambda name: data.make_encoding(name, "(?s:.{1,64})", swapped))
        assert text_of(prepare(folder, tmp_path).val, data.get_tokenizer("bytes")) == text_of(old.val, old.enc)
    (tmp_path / "texts/part0/0.txt").write_text("changed")
    assert b"changed" in text_of(prepare(folder, tmp_path).train, old.enc)
    for module in (data, tokenfiles):
        monkeypatch.setattr(module, "VERSION", 4)
    prepare(folder, tmp_path)
    assert len(os.listdir(tmp_path / "cache")) == 8


def test_header(tmp_path):
    path = token_file(tmp_path / "t.bin", [1, 2, 256])
    raw = path.read_bytes()
    assert raw.startswith(b"HYDRATOK{") and len(raw) == 1024 + 3 * 2 and raw[1024:] == b"\1\0\2\0\0\1"
    meta = json.loads(raw[8:960])
    assert len(meta.pop("tokenizer_hash")) == 64 and meta.pop("sha256") == hashlib.sha256(raw[1024:]).hexdigest()
    assert raw[960:1024] == hashlib.sha256(raw[:960]).hexdigest().encode()
    assert meta == {"version": tokenfiles.VERSION, "dtype": "uint16", "tokenizer": "bytes", "vocab_size": 257,
                    "tokens": 3, "source": "source"}
    wide = data.make_encoding("wide", "(?s:.)", {i.to_bytes(3, "big"): i for i in range(70_000)})
    tokenfiles.write_tokens(tmp_path / "wide.bin", iter([[69_999, 1]]), wide, "")
    assert tokenfiles.load_tokens(tmp_path / "wide.bin").tolist() == [69_999, 1]


def test_a_crash_while_writing_leaves_nothing(folder, tmp_path, monkeypatch):
    def crash():
        yield [1, 2, 3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenfiles.write_tokens(tmp_path / "t.bin", crash(), data.get_tokenizer("bytes"), "")
    assert not list(tmp_path.glob("t.bin*"))
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left.*--cache_dir"):
        prepare(folder, tmp_path)
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda raw: raw[:-1], "truncated"),
    (lambda raw: raw + b"\0\0", "damaged"),
    (lambda raw: raw[:500], "within its header"),
    (lambda raw: b"", "empty file"),
    (lambda raw: b"PK" + raw[2:], "not a token file"),
    (lambda raw: raw.replace(b'"version": 3', b'"version": 9'), "version 9"),
    (lambda raw: raw.replace(b'"source": "source"', b'"source": "sauces"'), "damaged header"),
    (lambda raw: raw[:1024] + b"\7" + raw[1025:], "damaged, its ids have another hash"),
    (lambda raw: sealed(raw[:960].replace(b'"tokens": 3', b'"tokens": 1'))[:1024] + raw[1024:1026], "too short"),
    (lambda raw: raw.replace(b"uint16", b"int-16"), "damaged header"),
    (lambda raw: raw[:20] + b"\xff" + raw[21:], "damaged header"),
])
def test_bad_token_files(damage, reason, tmp_path):
    path = token_file(tmp_path / "t.bin", [1, 2, 3])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"t.bin: .*{reason}.*delete it"):
        tokenfiles.load_tokens(path)


def test_missing_token_file_and_tokens_beyond_the_vocabulary(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        tokenfiles.load_tokens(tmp_path / "none.bin")
    path = token_file(tmp_path / "t.bin", [1, 2, 200])
    assert tokenfiles.load_tokens(path, 201).tolist() == tokenfiles.load_tokens(path, 50257).tolist() == [1, 2, 200]
    with pytest.raises(UserError, match="token id 200 is beyond vocab_size 200; set --vocab_size=201"):
        tokenfiles.load_tokens(path, 200)


# ---- batches

def test_batches_are_a_pure_function_of_seed_and_step(tmp_path):
    tokens = tokenfiles.load_tokens(token_file(tmp_path / "t.bin", [i % 251 for i in range(5000)]))
    x, y = data.get_batch(tokens, 4, 16, 1337, 7)
    torch.manual_seed(0)
    np.random.seed(0)
    again = data.get_batch(tokens, 4, 16, 1337, 7)
    assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert torch.equal((x + 1) % 251, y)  # the tokens count upwards
    for other in ((1338, 7), (1337, 8)):
        assert not torch.equal(x, data.get_batch(tokens, 4, 16, *other)[0])
    parts = [data.get_batch(tokens, 4, 16, 1337, 7, rows) for rows in (slice(0, 1), slice(1, 4))]
    assert torch.equal(x, torch.cat([part[0] for part in parts])) and torch.equal(y, torch.cat([p[1] for p in parts]))


def test_batches_reach_the_first_and_the_last_token():
    tokens = np.arange(10, dtype=np.uint16)
    x, y = data.get_batch(tokens, 200, 8, 0, 0)
    assert set(x[:, 0].tolist()) == {0, 1} and y.max() == 9
    assert data.get_batch(tokens, 2, 9, 0, 0)[1].tolist() == [list(range(1, 10))] * 2
    with pytest.raises(UserError, match="needs 11 tokens.*--block_size.*--data"):
        data.get_batch(tokens, 2, 10, 0, 0)


@pytest.mark.parametrize("count", [2, 16, 17, 18, 33, 100, 129])
def test_evaluation_meets_every_target_once(count):
    tokens = np.arange(count, dtype=np.uint16) + 1
    batches = list(data.eval_batches(tokens, 3, 8))
    targets = torch.cat([y.flatten() for _, y in batches])
    assert targets[targets != -1].tolist() == tokens[1:].tolist()
    for x, y in batches:
        assert x.shape == y.shape == (3, 8)
        assert torch.equal(x[y != -1], y[y != -1] - 1) and not x[y == -1].any()
    assert len(batches) == math.ceil(math.ceil((count - 1) / 8) / 3)


def test_text_of_tokens_survives_cuts_and_unknown_ids():
    enc = data.get_tokenizer("bytes")
    ids = enc.encode_ordinary("aé")
    assert data.text_of(enc, ids) == "aé" and data.text_of(enc, ids[:-1]) == "a\ufffd"
    assert data.text_of(enc, [97, 5000, enc.eot_token, 98]) == "a<|endoftext|>b"


def test_limited_evaluation_is_spread_evenly_and_repeats():
    tokens = np.arange(801, dtype=np.uint16)  # 100 windows
    first = [x[:, 0].tolist() for x, _ in data.eval_batches(tokens, 2, 8, max_windows=10)]
    assert first == [[0, 80], [160, 240], [320, 400], [480, 560], [640, 720]]
    assert first == [x[:, 0].tolist() for x, _ in data.eval_batches(tokens, 2, 8, max_windows=10)]
    everything = sum((y != -1).sum().item() for _, y in data.eval_batches(tokens, 2, 8, max_windows=2000))
    assert everything == 800
    with pytest.raises(UserError, match="too few"):
        next(data.eval_batches(tokens[:1], 2, 8))


@pytest.mark.faults
def test_the_commands_that_the_commands_end_with_run_as_printed(tmp_path, capsys, monkeypatch):
    """With a path that the shell must not read."""
    monkeypatch.chdir(Path(data.__file__).parent)
    (tmp_path / "a.txt").write_text("some text\n" * 99)
    out = tmp_path / "it's $HOME; a"
    data.main(["shard", str(out), f"--data={tmp_path / 'a.txt'}", f"--cache_dir={tmp_path}", "--tokenizer=bytes"])
    program, script, *args = shlex.split(capsys.readouterr().out.rpartition(" Train on them with: ")[2])
    assert [program, script] == ["python", "train.py"]
    config, run = build(parse(args, HydraConfig, TrainConfig), HydraConfig, TrainConfig)
    corpus = data.prepare(run.data, run.tokenizer, str(tmp_path), vocab_size=config.vocab_size)
    assert config.vocab_size == corpus.enc.n_vocab and len(corpus.train) > 500
