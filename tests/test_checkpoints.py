"""Checkpoints under damage: bytes that rotted, parts that lack, values that cannot be, and what a run saves and keeps.

Checkpoints of other versions are in test_runs.py, exact resumes in test_train.py.
"""

import math
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from test_parallel import alone, tiny  # noqa: F401 the fixture `alone` is used by its name
from test_train import (  # noqa: F401 the fixture `signals` is used by its name
    TEXT,
    checkpoint,
    equal,
    interrupt_after,
    losses,
    options,
    records,
    signals,
    step_records,
)

import checkpoints
import data
import files
import parallel
import sample
import soundness
import sources
import tokenfiles
import train
from checkpoints import Kept, Progress
from configurator import UserError, cli
from files import Damaged
from model import Hydra, HydraConfig
from parallel import Ranks
from train import TrainConfig

KINDS = {"model_config": HydraConfig, "train_config": TrainConfig}
SMALL = {"n_layer": 1, "pattern": "M", "sample_tokens": 0, "eval_iters": 1, "final_eval_iters": 1, "dtype": "float32"}


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of four steps with a checkpoint of every second, in a folder with a space in its name."""
    tmp = tmp_path_factory.mktemp("trained")
    train.main(options(tmp, "a run", max_iters=4, eval_interval=1, keep_every=2, keep_last=2, learning_rate=1e-2,
                       **SMALL))  # fmt: skip
    assert {path.name for path in (tmp / "a run").glob("*.pt")} == {"last.pt", "best.pt", "step-2.pt", "step-3.pt"}
    return tmp / "a run"


@pytest.fixture
def out(trained, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "a run"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(ours: object, theirs: object) -> bool:
    """Equal in types and all values."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def between_records(path: Path) -> list[int]:
    """The places of an archive that no record's bytes take."""
    reader = torch._C.PyTorchFileReader(str(path))
    taken = bytearray(path.stat().st_size)
    for name in reader.get_all_records():
        begin, size = reader.get_record_offset(name), reader.get_record_size(name)
        taken[begin : begin + size] = b"\1" * size
    return [place for place, is_taken in enumerate(taken) if not is_taken]


def check_flips(path: Path, places: list[int], read) -> int:
    """Flip a random bit at each place in turn: `read` says in one line that names the file that it is damaged, or finds
    what it found before. Returns how often it was noticed."""
    expected, noticed = read(), 0
    for place in places:
        bit = random.randrange(8)
        flip(path, place, bit)
        try:
            assert same(read(), expected), (path, place, bit)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            noticed += 1
        flip(path, place, bit)
    assert same(read(), expected)
    return noticed


# ---- bytes that rotted


@pytest.mark.slow
@pytest.mark.faults
def test_every_flipped_bit_is_noticed_or_changes_nothing(out, tmp_path):
    """A thousand of them: in the records of checkpoints, between these, and in a token file."""
    random.seed(0)
    for name, count, read in (("last.pt", 200, checkpoints.load_run), ("best.pt", 100, checkpoints.load_checkpoint)):
        path = out / name
        size, rest = path.stat().st_size, between_records(path)
        everywhere = [random.randrange(size) for _ in range(count)]
        noticed = check_flips(path, everywhere, lambda: read(path, KINDS)[0])  # noqa: B023 called at once
        assert noticed >= count - sum(place in rest for place in everywhere)
        check_flips(path, random.sample(rest, count), lambda: read(path, KINDS)[0])  # noqa: B023
    path = tmp_path / "tokens.bin"
    ids = np.random.default_rng(0).integers(0, 257, 3000)
    tokenfiles.write_tokens(path, iter([ids]), data.get_tokenizer("bytes"), "text")
    places = [random.randrange(path.stat().st_size) for _ in range(300)] + random.sample(range(tokenfiles.HEADER), 100)

    def read_tokens() -> list[int]:
        return tokenfiles.load_tokens(path, 257, "text").tolist()

    assert read_tokens() == ids.tolist() and check_flips(path, places, read_tokens) == 400


def archive(path: Path, change) -> None:
    """Write an archive anew, its entries as (name, bytes) through `change`; sums are right."""
    with zipfile.ZipFile(path) as old:
        entries = change([(entry.filename, old.read(entry)) for entry in old.infolist()])
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries:
            new.writestr(zipfile.ZipInfo(name), content)


@pytest.mark.faults
def test_a_bit_that_torch_s_reader_does_not_look_at_is_noticed(out):
    """In a weight; and the one that makes an entry a folder, whose bytes it takes from memory as they are."""
    path = out / "best.pt"
    reader = torch._C.PyTorchFileReader(str(path))
    good = checkpoint(out, "best")["model"]
    flip(path, reader.get_record_offset("data/1") + 3, 4)
    assert not equal(checkpoint(out, "best")["model"], good)  # torch alone reads another weight
    with pytest.raises(Damaged, match="best.pt is no checkpoint of this project, it is damaged or foreign"):
        checkpoints.load_checkpoint(path, KINDS)
    flip(path, reader.get_record_offset("data/1") + 3, 4)
    checkpoints.load_checkpoint(path, KINDS)
    at = path.read_bytes().rindex(b"PK\1\2") + 38  # attributes of the last entry
    flip(path, at, 4)
    with pytest.raises(Damaged, match="damaged or foreign"):
        checkpoints.load_checkpoint(path, KINDS)


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("change", [
    lambda entries: entries[:-1] + [(entries[-1][0] + "x", b""), *entries[-1:], *entries[-1:]],  # twice the same name
    lambda entries: [(name, content[:-4]) if "/data/" in name else (name, content) for name, content in entries],
    lambda entries: [(name, content) for name, content in entries if not name.endswith("data/3")],
    lambda entries: [],
], ids=["twice", "short", "lacking", "empty"])  # fmt: skip
def test_an_archive_that_is_not_torch_s_is_refused(out, change):
    archive(out / "best.pt", change)
    with pytest.raises(Damaged, match="best.pt is no checkpoint of this project, it is damaged or foreign"):
        checkpoints.load_checkpoint(out / "best.pt", KINDS)


@pytest.mark.faults
def test_a_flipped_bit_in_a_sharded_checkpoint_is_noticed(alone, tmp_path):  # noqa: F811
    random.seed(0)
    path = sharded(tmp_path, 4)
    checkpoints.load_checkpoint(path, {})
    for part in (tmp_path / "shards-4").iterdir():
        places = [random.randrange(part.stat().st_size) for _ in range(20)]
        assert check_flips(part, places, lambda: checkpoints.load_checkpoint(path, {})[0]) == 20
    check_flips(path, [random.randrange(path.stat().st_size) for _ in range(40)],
                lambda: checkpoints.load_checkpoint(path, {})[0])  # fmt: skip
    (tmp_path / "shards-4" / ".metadata").unlink()
    with pytest.raises(Damaged, match=r"shards-4/.metadata does not exist: restore it"):
        checkpoints.load_checkpoint(path, {})


def test_the_shipped_ranks_are_those_that_were_shipped(tmp_path, monkeypatch):
    text = data.RANKS.read_text().splitlines()
    monkeypatch.setattr(data, "RANKS", tmp_path / "ranks")
    data.RANKS.write_text("\r\n".join(text))
    assert len(data.shipped_ranks()) == data.N_RANKS
    text[300], text[301] = text[300].split()[0] + " 301", text[301].split()[0] + " 300"
    data.RANKS.write_text("\n".join(text))
    with pytest.raises(UserError, match="not the 4095 ranks of this project; restore it"):
        data.get_tokenizer("python4096")


# ---- a checkpoint is checked whole


def without(part: str):
    return lambda content: content.pop(part)


def put(value: object, *keys: object):
    """Replace what stands at the end of `keys`."""

    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def first(content: dict, *keys: object) -> torch.Tensor:
    for key in keys:
        content = content[key]
    return next(iter(content.values()))


def spoil(value: float, *keys: object):
    """Put a value into the first tensor at the end of `keys`."""
    return lambda content: first(content, *keys).view(-1)[:1].fill_(value)


def states(content: dict) -> list[dict]:
    return list(content["optimizer"]["state"].values())


GONE = [*checkpoints.PARTS, "model", "optimizer", "skipped", "streak", "clipped", "counted"]
WEIGHT, STATE = "blocks.0.attn.qkv.weight", ("optimizer", "state", 0)
CHANGES = {
    **{f"without {part}": without(part) for part in GONE},
    **{f"{part} is none": put(None, part) for part in GONE},
    **{f"{name} is negative": put(-1, name) for name in ("step", "skipped", "streak", "clipped", "counted")},
    **{f"{name} is a fraction": put(1.5, name) for name in ("step", "skipped", "streak", "clipped", "counted")},
    "step is a truth": put(True, "step"),
    "step is a tensor": put(torch.tensor(4), "step"),
    "windows are a text": put("8", "eval_windows"),
    "windows are negative": put(-1, "eval_windows"),
    "windows are a fraction": put(3.5, "eval_windows"),
    "windows are none": put(None, "eval_windows"),
    "windows are a table": put({}, "eval_windows"),
    "windows are more than could be": put(10**15, "eval_windows"),
    "windows are all, not those of a batch": put(0, "eval_windows"),
    "a launch of another kind": put(3, "launch"),
    "more skipped than steps": put(5, "skipped"),
    "more counted than steps": put(10**12, "counted"),
    "more losses than steps": put([1e9, 1.0, 1.0], "running"),
    "a step before the moments'": lambda content: content.update(step=3, clipped=0, counted=0),
    "best is zero": put(0.0, "best"),
    "best is nan": put(math.nan, "best"),
    "best is negative": put(-1.0, "best"),
    "best is a count": put(3, "best"),
    "more in a row than in all": put(3, "streak"),
    "more clipped than counted": put(99, "clipped"),
    "running is short": put([0.0], "running"),
    "running is not finite": put([1.0, math.nan, 0.0], "running"),
    "running is negative": put([1.0, 1.0, -1.0], "running"),
    "a fingerprint of bytes": put(b"abc", "fingerprint"),
    "no weights": put({}, "model"),
    "a weight is missing": lambda content: content["model"].pop(WEIGHT),
    "a weight too many": put(torch.zeros(3), "model", "more"),
    "a weight of a name that is none": put(torch.zeros(3), "model", 3),
    "a weight of another shape": put(torch.zeros(3, 32), "model", WEIGHT),
    "a weight in another order": lambda content: put(content["model"][WEIGHT].T, "model", WEIGHT)(content),
    "a weight in fp64": lambda content: put(content["model"][WEIGHT].double(), "model", WEIGHT)(content),
    "a weight that is a list": put([1.0], "model", WEIGHT),
    "a sparse weight": lambda content: put(content["model"][WEIGHT].to_sparse(), "model", WEIGHT)(content),
    "a weight without numbers": lambda content: put(content["model"][WEIGHT].to("meta"), "model", WEIGHT)(content),
    "a weight that is nan": spoil(math.nan, "model"),
    "a weight that is infinite": spoil(-math.inf, "model"),
    "an optimiser that is a list": put([1], "optimizer"),
    "an optimiser without groups": without("optimizer"),
    "no groups": put([], "optimizer", "param_groups"),
    "groups without parameters": put([{}, {}], "optimizer", "param_groups"),
    "another group": lambda content: content["optimizer"]["param_groups"].pop(),
    "a parameter less": lambda content: content["optimizer"]["param_groups"][0]["params"].pop(),
    "parameters in another order": lambda content: content["optimizer"]["param_groups"][0]["params"].reverse(),
    "no moments": put({}, "optimizer", "state"),
    "moments of a parameter are missing": lambda content: content["optimizer"]["state"].pop(1),
    "moments of a parameter too many": put({}, "optimizer", "state", 77),
    "moments that are none": put(None, *STATE),
    "a moment is missing": lambda content: content["optimizer"]["state"][0].pop("exp_avg_sq"),
    "a moment of another shape": put(torch.zeros(2), *STATE, "exp_avg"),
    "a moment of another dtype": lambda content: put(first(content, *STATE[:2])["exp_avg"].half(), *STATE, "exp_avg")(
        content),
    "a moment that is nan": lambda content: content["optimizer"]["state"][2]["exp_avg"].view(-1)[-1:].fill_(math.nan),
    "a square that is negative": lambda content: content["optimizer"]["state"][2]["exp_avg_sq"].view(-1)[:1].fill_(-1),
    "a step that is no number": lambda content: content["optimizer"]["state"][2]["step"].fill_(math.nan),
    "a step that is a fraction": lambda content: [state["step"].fill_(1.5) for state in states(content)],
    "a step that is negative": lambda content: [state["step"].fill_(-1) for state in states(content)],
    "a step beyond the checkpoint's": lambda content: [state["step"].fill_(20) for state in states(content)],
    "steps that differ": lambda content: states(content)[1]["step"].fill_(3),
    "an optimiser that is a tensor": put(torch.zeros(3), "optimizer"),
    "a step of two": put(torch.zeros(2), *STATE, "step"),
    "an option of another type": put("32", "model_config", "dim"),
    "an option that is a tensor": put(torch.zeros(2, 2), "train_config", "max_iters"),
    "an option that is not finite": put(math.inf, "train_config", "learning_rate"),
    "an option that cannot be": put(-3, "model_config", "dim"),
    "layers that cannot be": put(-1, "model_config", "n_layer"),
    "a batch that cannot be": put(0, "train_config", "batch_size"),
    "a shape that is another": put(64, "model_config", "dim"),
    "shards of no name": lambda content: content.update(shards="../../etc"),
    "shards that are not there": lambda content: content.update(shards="shards-9"),
    "shards whose hashes are none": lambda content: content.update(shards="shards-9", hashes={"../x": "a"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.faults
def test_a_checkpoint_that_is_not_whole_is_one_line_and_changes_nothing(out, monkeypatch, capsys):
    """By the program, before anything on disk is touched; every other checkpoint of the run is away."""
    for path in (out / "best.pt", *out.glob("step-*.pt")):
        path.unlink()
    good = (out / "last.pt").read_bytes()
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", f"--out_dir={out}", "--max_iters=6"])
    for name, change in CHANGES.items():
        (out / "last.pt").write_bytes(good)
        content = checkpoint(out)
        change(content)
        torch.save(content, out / "last.pt")
        before = bytes_of(out)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli(train.main)
        printed, err = capsys.readouterr()
        assert ended.value.code == 2 and printed == "", (name, err)
        assert err.count("\n") == 1 and err.startswith("error: "), (name, err)
        assert str(out) in err, (name, err)
        assert bytes_of(out) == before, name
    (out / "last.pt").write_bytes(good)
    with pytest.raises(SystemExit) as ended:
        cli(train.main)
    assert ended.value.code == 0


@pytest.mark.faults
@pytest.mark.parametrize("change, words", [
    (put("8", "eval_windows"), r"are missing or not it \(eval_windows\): restore it, or name another checkpoint"),
    (put(-1, "eval_windows"), "eval_windows=-1 are not those of eval_iters=1 batches: restore or delete it; or go on"),
    (put(5, "skipped"), r"skipped=5 and counted=\d are more than its steps: restore or delete it; or go on from"),
    (put(-1, "model_config", "n_layer"), r"options that cannot be \(n_layer=-1: .*\): restore or delete it; or go on"),
    (lambda content: states(content)[1]["step"].fill_(3), "its optimiser has seen 3, 4 updates, not up to 4: restore"),
], ids=["kind", "sign", "counters", "option", "updates"])  # fmt: skip
def test_what_cannot_be_is_named_and_another_one_that_can_is_offered(out, change, words):
    """Step 3 is spoiled in the same way, so that step 2 is."""
    for name in ("last", "step-3") if "updates" not in words else ("last",):
        content = checkpoint(out, name)
        change(content)
        torch.save(content, out / f"{name}.pt")
    before = bytes_of(out)
    with pytest.raises(UserError, match=f"last.pt is .*{words}") as error:
        train.main([f"--out_dir={out}", "--resume", "--max_iters=6"])
    path = out / ("step-3.pt" if "updates" in words else "step-2.pt")
    assert offered(error.value) == [f"--resume={path}"] and bytes_of(out) == before
    (out / "last.pt").rename(out / "mine.pt")
    with pytest.raises(UserError, match="mine.pt is ") as error:
        train.main([f"--resume={out / 'mine.pt'}", "--max_iters=6"])
    assert "delete" not in str(error.value)


@pytest.mark.faults
def test_a_file_that_is_no_run_s_is_never_to_be_deleted(tmp_path):
    """And one that is missing is looked for where it was named."""
    for name, content in (("notes.txt", b"mine"), ("config.toml", b"dim = 32"), ("mine.pt", b"PK")):
        (tmp_path / name).write_bytes(content)
        for option in ("resume", "init_from"):
            with pytest.raises(UserError, match=f"{name} is no checkpoint.*: name the checkpoint of a run") as error:
                train.main([f"--{option}={tmp_path / name}", f"--out_dir={tmp_path / 'new'}"])
            assert "delete" not in str(error.value) and (tmp_path / name).read_bytes() == content
    torch.save({"weights": torch.zeros(2)}, tmp_path / "last.pt")  # whole, of another project
    with pytest.raises(UserError, match="last.pt is no checkpoint.*parts are missing: restore it, or name") as error:
        train.main([f"--resume={tmp_path}"])
    assert "delete" not in str(error.value)
    for path in (tmp_path / "none.pt", tmp_path / "notes.txt" / "last.pt"):
        with pytest.raises(UserError, match=f"{path} does not exist: .* with --resume=PATH"):
            train.main([f"--resume={path}"])


@pytest.mark.faults
def test_torch_s_warnings_do_not_stand_beside_the_error(out, monkeypatch):
    """Of strange tensors, in reading them and in holding them against the model."""
    load, check = torch.load, checkpoints.check_tensor

    def warned(real):
        def call(*args, **keys):
            warnings.warn("deprecated", stacklevel=1)
            return real(*args, **keys)

        return call

    monkeypatch.setattr(torch, "load", warned(load))
    monkeypatch.setattr(checkpoints, "check_tensor", warned(check))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strange = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    for change in (put(strange, "model", WEIGHT), put(torch.zeros(3), "optimizer"), put(strange, *STATE, "exp_avg")):
        content = load(out / "step-3.pt", weights_only=True)
        change(content)
        torch.save(content, out / "last.pt")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with pytest.raises(UserError, match="last.pt .*or go on from"):
                train.main([f"--out_dir={out}", "--resume", "--max_iters=6"])
        assert [str(warning.message) for warning in said] == []


@pytest.mark.faults
@pytest.mark.parametrize("name", ["last.pt", "best.pt", "step-2.pt", "log.jsonl", "config.toml"])
@pytest.mark.parametrize("kind, words", [("pipe", "it is a pipe"), ("/dev/full", "it is a device"),
                                         ("/dev/zero", "it is a device"), ("folder", "Is a directory")])  # fmt: skip
def test_a_file_of_a_run_that_is_none_is_refused_unopened(out, name, kind, words):
    """Nothing waits for a pipe, reads a device without an end, or has changed half of the files."""
    (out / name).unlink()
    if kind == "pipe":
        os.mkfifo(out / name)
    elif kind == "folder":
        (out / name).mkdir()
    else:
        (out / name).symlink_to(kind)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    calls = [(train.main, ["--resume", "--max_iters=6"])]
    if name in ("last.pt", "best.pt"):
        calls.append((sample.main, [f"--checkpoint={name[:4]}", "--max_new_tokens=2"]))
        calls.append((train.main, ["--resume", "--plan"] if name == "last.pt" else [f"--resume={out / name}"]))
    if kind == "folder" and name == "best.pt":
        calls.pop()  # a folder stands for its last.pt
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(30)  # a read that waits ends the test
    try:
        for call, args in calls:
            with pytest.raises(UserError, match=rf"{name} cannot be read \({words}\): move it away"):
                call([f"--out_dir={out}", *args])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


@pytest.mark.faults
@pytest.mark.parametrize("call", [
    lambda out: sample.main([f"--out_dir={out}", "--prompt=a", "--max_new_tokens=2"]),
    lambda out: train.main([f"--init_from={out}", f"--out_dir={out.parent / 'new'}", f"--data={TEXT}"]),
    lambda out: train.main([f"--resume={out / 'best.pt'}", "--max_iters=9"]),
], ids=["sample", "init_from", "resume"])  # fmt: skip
def test_weights_that_are_not_finite_are_named_wherever_they_are_read(out, call):
    content = checkpoint(out, "best")
    content["model"][WEIGHT][0, 0] = math.nan
    torch.save(content, out / "best.pt")
    for kept in ("last.pt", "step-2.pt", "step-3.pt"):
        (out / kept).unlink()
    with pytest.raises(UserError, match=f"best.pt: {WEIGHT} has values that are not finite"):
        call(out)
    assert not (out.parent / "new").exists()


@pytest.mark.faults
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_cannot_be_read_is_not_called_damaged(out, monkeypatch, error):
    """And nothing else is offered instead of it."""
    before = bytes_of(out)

    def no_open(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "open", no_open, raising=False)
        for call, name in ((train.main, "last"), (sample.main, "best")):
            with pytest.raises(UserError, match=rf"{name}.pt cannot be read \({error.strerror}\)") as found:
                call([f"--out_dir={out}", *(["--resume"] if name == "last" else [])])
            assert "damaged" not in str(found.value) and "delete" not in str(found.value)
    assert bytes_of(out) == before
    (out / "last.pt").unlink()
    (out / "last.pt").mkdir()
    with pytest.raises(UserError, match=r"last.pt cannot be read \(Is a directory\)"):
        train.main([f"--out_dir={out}", "--resume"])


@pytest.mark.faults
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you ..")])
def test_a_file_that_memory_is_too_small_for_is_not_called_damaged(out, monkeypatch, error):
    monkeypatch.setattr(torch, "load", lambda *args, **keys: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=r"last.pt cannot be read \(there is not enough memory for it\)") as found:
        train.main([f"--out_dir={out}", "--resume"])
    assert "damaged" not in str(found.value)


@pytest.mark.faults
def test_shards_of_another_model_do_not_fit(alone, tmp_path):  # noqa: F811
    path = sharded(tmp_path, 4)
    content = checkpoints.load_checkpoint(path, {})[0]
    wide = Hydra(HydraConfig(**tiny("none")[0].config.__dict__ | {"mlp_ratio": 20.0}))
    with pytest.raises(Damaged, match=r"shards-4 does not fit this run, .*gate_up.weight is torch.float32 \[512"):
        checkpoints.load_weights(wide, content, path)
    short = Hydra(HydraConfig(**tiny("none")[0].config.__dict__ | {"n_layer": 2}))
    with pytest.raises(Damaged, match=r"shards-4 does not fit this run, 'model.blocks.2.* is no weight of it"):
        checkpoints.load_weights(short, content, path)
    long = Hydra(HydraConfig(**tiny("none")[0].config.__dict__ | {"n_layer": 4}))
    with pytest.raises(Damaged, match="shards-4 does not fit this run, it lacks model.blocks.3"):
        checkpoints.load_weights(long, content, path)


@pytest.mark.faults
def test_shards_that_are_not_finite_are_refused(alone, tmp_path):  # noqa: F811
    path = sharded(tmp_path, 4, math.nan)
    model, _, optimizer, _ = tiny("fsdp")
    content = checkpoints.load_checkpoint(path, {})[0]
    with pytest.raises(Damaged, match=r"last.pt: exp_avg of norm.weight has values that are not finite"):
        checkpoints.restore(path, content, model, optimizer, Ranks("fsdp"))


@pytest.mark.faults
def test_shards_of_more_updates_than_steps_are_refused(alone, tmp_path):  # noqa: F811
    path = sharded(tmp_path, 2)
    model, _, optimizer, _ = tiny("fsdp")
    content = checkpoints.load_checkpoint(path, {})[0]
    checkpoints.restore(path, content, model, optimizer, Ranks("fsdp"))
    with pytest.raises(Damaged, match="its optimiser has seen 2 updates, not up to 1: restore or delete it"):
        checkpoints.restore(path, content | {"skipped": 1}, model, optimizer, Ranks("fsdp"))


# ---- another one instead


def offered(error: UserError) -> list[str]:
    """The arguments of the command that a message ends with."""
    assert "\n" not in str(error)
    words = shlex.split(str(error).partition(": python ")[2])
    assert words[0] == "train.py"
    return words[1:]


@pytest.mark.faults
@pytest.mark.parametrize("missing", [True, False])
def test_the_newest_whole_checkpoint_is_offered_by_the_command(out, missing):
    """The kept ones first, then best.pt, with what is lost; then nothing is left to offer."""
    lost = []
    expected = [("step-3.pt", "go on from step 3: "), ("step-2.pt", "go on from step 2: "),
                ("best.pt", r"go on from the weights of step 4 \(the optimiser's state is lost\): ")]  # fmt: skip
    for name, words in expected:
        lost.append(out / ("last.pt" if not lost else expected[len(lost) - 1][0]))
        if missing:
            lost[-1].unlink()
        else:
            flip(lost[-1], lost[-1].stat().st_size // 2, 3)
        reason = "last.pt does not exist" if missing else "last.pt is no checkpoint of this project, it is damaged"
        before = bytes_of(out)
        with pytest.raises(UserError, match=f"{reason}.*; or {words}python train.py") as error:
            train.main([f"--out_dir={out}", "--resume"])
        assert offered(error.value) == [f"--resume={out / name}"] and bytes_of(out) == before
        if not missing:  # the one that is asked for by its path is not offered again
            with pytest.raises(UserError) as error:
                train.main([f"--resume={lost[-1]}"])
            assert offered(error.value) == [f"--resume={out / name}"]
    (out / "best.pt").write_bytes(b"")
    with pytest.raises(UserError) as error:
        train.main([f"--out_dir={out}", "--resume"])
    assert "or go on" not in str(error.value)


@pytest.mark.faults
def test_a_checkpoint_of_another_shape_is_not_offered_for_itself(out):
    """Which is seen only when there is a model to hold it against."""
    content = checkpoint(out)
    content["model"][WEIGHT] = torch.zeros(2, 2)
    torch.save(content, out / "last.pt")
    before = bytes_of(out)
    with pytest.raises(UserError, match=f"last.pt does not fit its configuration .{WEIGHT} is .*go on from") as error:
        train.main([f"--out_dir={out}", "--resume", "--max_iters=6"])
    assert offered(error.value) == [f"--resume={out / 'step-3.pt'}"] and bytes_of(out) == before


@pytest.mark.faults
def test_the_command_that_is_offered_goes_on_in_its_folder_to_the_same_end(out, trained, capsys):
    flip(out / "last.pt", 1000, 3)
    (out / "step-3.pt").unlink()
    with pytest.raises(UserError) as error:
        train.main([f"--out_dir={out}", "--resume"])
    assert train.main(offered(error.value)) == 0
    assert f"going on from {out / 'step-2.pt'}, step 2: what {out} has of later steps" in capsys.readouterr().out
    ours, theirs = ([line[:7] for line in losses(folder)] for folder in (out, trained))  # all but what was the best
    assert ours == theirs and [r["resumed_at"] for r in records(out) if "resumed_at" in r] == [2]
    assert equal(checkpoint(out)["model"], checkpoint(trained)["model"])
    assert same(checkpoint(out)["optimizer"]["state"], checkpoint(trained)["optimizer"]["state"])
    assert not (out / "run-1").exists()


def test_a_checkpoint_goes_on_in_a_folder_of_its_own(out, trained, tmp_path):
    """Which keeps what was in it, and leaves the first one as it is."""
    before = bytes_of(out)
    other = tmp_path / "other"
    train.main(options(tmp_path, "other", max_iters=1, seed=5, **SMALL))
    earlier = bytes_of(other)
    assert train.main([f"--resume={out / 'step-2.pt'}", f"--out_dir={other}"]) == 0
    assert bytes_of(out) == before and bytes_of(other / "run-1") == earlier
    assert [r["step"] for r in step_records(other)] == [3, 4] and records(other)[0]["resumed_at"] == 2
    assert equal(checkpoint(other)["model"], checkpoint(trained)["model"])
    assert (other / "best.pt").exists() and {path.name for path in other.glob("step-*")} == {"step-3.pt"}


@pytest.mark.faults
def test_the_best_checkpoint_restarts_a_run_without_moments(out, capsys):
    best = checkpoint(out, "best")
    assert train.main([f"--resume={out / 'best.pt'}", f"--max_iters={best['step'] + 1}"]) == 0
    assert f"{out / 'best.pt'} has no state of the optimiser: its moments begin at zero" in capsys.readouterr().out
    last = checkpoint(out)
    assert last["step"] == best["step"] + 1
    assert {int(state["step"]) for state in last["optimizer"]["state"].values()} == {1}
    assert (last["model"][WEIGHT] - best["model"][WEIGHT]).abs().max() < 0.1


def test_a_folder_stands_for_its_last_checkpoint(out, capsys):
    assert train.main([f"--resume={out}", "--max_iters=5"]) == 0
    assert checkpoint(out)["step"] == 5 and "going on from" not in capsys.readouterr().out
    with pytest.raises(UserError, match="~nobody-at-all/last.pt.: there is no such user"):
        train.main(["--resume=~nobody-at-all/last.pt"])
    with pytest.raises(UserError, match="--resume='' is an empty path: name one, or leave the option out"):
        train.main(["--resume=", *options(out.parent, "none")])


def test_a_best_of_later_steps_is_not_replaced_by_a_worse_one(out, monkeypatch):
    """A run that goes on from an earlier step evaluates 5.0 again, where the folder has a lower one."""
    before = (out / "best.pt").read_bytes()
    low = checkpoint(out, "best")["best"]
    monkeypatch.setattr(train, "evaluate", lambda *args: {"val_loss": low + 1e-3, "val_bpb": low})
    assert train.main([f"--resume={out / 'step-2.pt'}"]) == 0
    assert (out / "best.pt").read_bytes() == before and checkpoint(out)["best"] == low


# ---- what is kept


def test_checkpoints_stay_as_they_were_at_their_step(tmp_path, monkeypatch):
    """Of every third step, though evaluations are of every second, and the newest two."""
    saved, there = {}, {}
    real = checkpoints.save_checkpoint

    def save_checkpoint(path, content):
        real(path, content)
        if path.name == "last.pt":
            saved[content["step"]] = path.read_bytes()

    monkeypatch.setattr(checkpoints, "save_checkpoint", save_checkpoint)
    for every, last in ((3, 1), (0, 3), (4, 2), (0, 1)):
        out = tmp_path / f"{every}-{last}"
        saved.clear()
        train.main(options(tmp_path, out.name, max_iters=7, eval_interval=2, keep_every=every, keep_last=last, **SMALL))
        there[every, last] = sorted(checkpoints.kept_steps(out))
        assert {3, 6} <= saved.keys() if every == 3 else saved.keys() == {2, 4, 6, 7}
        assert (out / "last.pt").read_bytes() == saved[7]
        for step in there[every, last]:
            assert (out / f"step-{step}.pt").read_bytes() == saved[step]
    assert there == {(3, 1): [3, 6], (0, 3): [4, 6], (4, 2): [4, 6], (0, 1): []}


def test_what_is_kept_goes_on_over_a_resume_and_is_set_aside_with_the_run(tmp_path, monkeypatch):
    """Also where a file system has no links."""
    monkeypatch.setattr(os, "link", lambda *paths, **_: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    out = tmp_path / "run"
    args = dict(eval_interval=2, keep_every=4, keep_last=2, **SMALL)
    train.main(options(tmp_path, "run", max_iters=4, **args))
    train.main([f"--out_dir={out}", "--resume", "--max_iters=10"])
    assert checkpoints.kept_steps(out) == [8, 4]
    assert [checkpoints.load_run(out / f"step-{step}.pt", KINDS)[0]["step"] for step in (4, 8)] == [4, 8]
    train.main([f"--out_dir={out}", "--resume", "--max_iters=12", "--keep_last=1", "--keep_every=0"])
    assert checkpoints.kept_steps(out) == [8, 4]  # what was kept once is not taken away
    old = bytes_of(out)
    train.main(options(tmp_path, "run", max_iters=1, **args))
    assert bytes_of(out / "run-1") == old and checkpoints.kept_steps(out) == []
    shutil.rmtree(out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "step-4.pt").write_bytes(b"")
    skipped = sources.Skipped()
    assert sources.list_files(tmp_path, skipped, ["cache"]) == [] and skipped.counts[sources.WRITTEN] == 1
    assert sources.list_files(tmp_path / "other", sources.Skipped()) == []


def sharded(folder: Path, step: int, value: float = 0.0, kept: Kept = checkpoints.ONLY_LAST,
            replaced: int | None = None) -> Path:  # fmt: skip
    """A sharded checkpoint of two updates, `value` added to the last parameter's first moment."""
    model, trained, optimizer, batches = tiny("fsdp")
    for _ in range(2):
        train.train_step(trained, optimizer, batches, 1.0, torch.autocast("cpu", enabled=False), Ranks("fsdp"))
    parallel.local(optimizer.state[model.norm.weight]["exp_avg"]).add_(value)
    content = {"model_config": {}, "train_config": {"tokenizer": "bytes"}, "fingerprint": "", "tokenizer": ""}
    checkpoints.save_run(folder / "last.pt", content | asdict(Progress(step=step)), model, optimizer, Ranks("fsdp"),
                         kept, replaced)  # fmt: skip
    return folder / "last.pt"


@pytest.mark.slow
def test_the_shards_of_kept_checkpoints_stay(alone, tmp_path):  # noqa: F811
    replaced = None
    for step in (2, 4, 6, 8):
        path = sharded(tmp_path, step, kept=Kept(4, 2), replaced=replaced)
        replaced = step
    assert checkpoints.kept_steps(tmp_path) == [6, 4]
    assert sorted(path.name for path in tmp_path.glob("shards-*")) == ["shards-4", "shards-6", "shards-8"]
    for name, step in (("last.pt", 8), ("step-6.pt", 6), ("step-4.pt", 4)):
        content = checkpoints.load_run(tmp_path / name, {})[0]
        assert content["step"] == step and content["shards"] == f"shards-{step}"
        model, _, optimizer, _ = tiny("fsdp")
        checkpoints.restore(tmp_path / name, content, model, optimizer, Ranks("fsdp"))
    flip(tmp_path / "shards-8" / "__0_0.distcp", 5000, 1)
    with pytest.raises(UserError, match="__0_0.distcp is damaged.*; or go on from step 6: python train.py"):
        with checkpoints.offers_another(path):
            checkpoints.load_run(path, {})


# ---- what is saved is sound


@pytest.mark.faults
def test_the_first_value_that_is_not_finite_is_named():
    model = Hydra(HydraConfig(**tiny("none")[0].config.__dict__))
    optimizer = train.make_optimizer(model, TrainConfig())
    assert checkpoints.not_finite(model, optimizer, Ranks()) == ""
    idx = torch.zeros(1, 8, dtype=torch.int64)
    train.train_step(model, optimizer, [(idx, idx)], 1.0, torch.autocast("cpu", enabled=False))
    assert checkpoints.not_finite(model, optimizer, Ranks()) == ""
    last, inner = model.norm.weight, model.blocks[1].mlp.down.weight
    optimizer.state[last]["exp_avg_sq"][3] = -1e-9
    assert checkpoints.not_finite(model, optimizer, Ranks()) == "exp_avg_sq of norm.weight"
    assert checkpoints.not_finite(model, None, Ranks()) == ""
    optimizer.state[inner]["exp_avg"][0, 1] = math.inf
    assert checkpoints.not_finite(model, optimizer, Ranks()) == "exp_avg of blocks.1.mlp.down.weight"
    inner.data[5, 5] = math.nan
    assert checkpoints.not_finite(model, optimizer, Ranks()) == "blocks.1.mlp.down.weight"


@pytest.mark.faults
@pytest.mark.parametrize("what", ["weight", "moment"])
def test_what_is_not_finite_is_never_saved_and_ends_with_1(tmp_path, monkeypatch, capsys, what):
    """It comes with step 4, where no loss shows it: the checkpoints of step 3 stay, and nobody is sent to sample."""
    real, taken = train.train_step, []

    def train_step(model, optimizer, *args):
        step = real(model, optimizer, *args)
        taken.append(1)
        if len(taken) == 4:
            spoiled = model.embed.weight.data[256]  # no text has an end of text within it
            if what == "moment":
                spoiled = optimizer.state[model.blocks[0].mlp.down.weight]["exp_avg_sq"][0]
            spoiled.fill_(math.nan if what == "weight" else math.inf)
        return step

    monkeypatch.setattr(train, "train_step", train_step)
    name = "embed.weight" if what == "weight" else "exp_avg_sq of blocks.0.mlp.down.weight"
    assert train.main(options(tmp_path, "run", max_iters=5, eval_interval=3, learning_rate=1e-2, **SMALL)) == 1
    printed, err = capsys.readouterr()
    out = tmp_path / "run"
    assert f"step     5 | {name} is not finite: not saved, the checkpoint in {out} is kept" in printed
    assert "sample it with" not in printed and f"error: the run ended and {name} is not finite" in err
    assert {"kind": "unsaved", "step": 5, "unsaved": name} in records(out)
    assert checkpoint(out)["step"] == 3 and checkpoint(out, "best")["step"] == 3
    checkpoints.load_run(out / "last.pt", KINDS)


@pytest.mark.faults
def test_a_loss_of_zero_is_none_to_beat(tmp_path, monkeypatch):
    """No checkpoint has it as its best one, which would be refused, and no line of a log makes it so."""
    monkeypatch.setattr(train, "evaluate", lambda *args: {"val_loss": 0.0})
    out = tmp_path / "run"
    assert train.main(options(tmp_path, "run", max_iters=2, **SMALL)) == 0
    assert checkpoint(out)["best"] == math.inf and not (out / "best.pt").exists()
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 1, "val_loss": -5.0, "best": true}\n')
    monkeypatch.undo()
    monkeypatch.setattr("machine.matmul_peak", lambda device, dtype, n=0: 1e9)
    assert train.main([f"--out_dir={out}", "--resume", "--max_iters=3"]) == 0
    assert 0 < checkpoint(out, "best")["best"] < math.inf


@pytest.mark.faults
@pytest.mark.parametrize("what", ["validation", "training"])
def test_a_run_that_ends_with_a_loss_that_is_not_finite_ends_with_1(tmp_path, monkeypatch, capsys, what):
    real = train.train_step
    if what == "validation":
        monkeypatch.setattr(train, "evaluate", lambda *args: {"val_loss": math.nan, "val_bpb": math.nan})
    else:
        monkeypatch.setattr(train, "train_step", lambda *args: real(*args)._replace(loss=torch.tensor(math.inf)))
    assert train.main(options(tmp_path, "run", max_iters=2, **SMALL)) == 1
    printed, err = capsys.readouterr()
    assert "sample it with" not in printed
    assert err.count("\n") == 1 and "error: the run ended and the loss is not finite; " in err
    assert records(tmp_path / "run")[-1]["stopped"] == "the run ended and the loss is not finite"


@pytest.mark.faults
def test_a_disk_that_is_full_is_said_in_the_system_s_words(out):
    """By a limit of this process on the size of files, which torch meets within its archive."""
    before = (out / "last.pt").read_bytes()
    content = checkpoint(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1, 70_000, len(before) - 10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(UserError) as error:
                checkpoints.save_checkpoint(out / "last.pt", content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        words = f"cannot write {out / 'last.pt'} (File too large): free some space or choose another folder"
        assert str(error.value) == words
        assert (out / "last.pt").read_bytes() == before and not list(out.glob(".hydra-*"))
    assert files.reason(RuntimeError("one\ntwo")) == "one"


@pytest.mark.faults
def test_a_disk_that_is_full_for_shards_is_said_in_the_system_s_words(alone, tmp_path):  # noqa: F811
    path = sharded(tmp_path, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*shards-4 \(File too large\): free some space"):
            sharded(tmp_path, 4, replaced=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.load_run(path, {})[0]["step"] == 2


# ---- spikes


def test_the_running_loss_is_a_mean_at_first_and_exponential_later():
    rng = np.random.default_rng(0)
    running = torch.zeros(3)
    values = rng.normal(5, 1, 300).astype(np.float32)
    for value in values[:50]:
        soundness.update_running(running, torch.tensor(value), torch.tensor(True))
    assert running.tolist() == pytest.approx([50, values[:50].mean(), values[:50].var()], rel=1e-4)
    mean, variance = values[:50].mean(), values[:50].var()
    for value in values[50:]:
        soundness.update_running(running, torch.tensor(value), torch.tensor(True))
        variance = 0.98 * (variance + 0.02 * (value - mean) ** 2)
        mean += 0.02 * (value - mean)
    assert running.tolist() == pytest.approx([300, mean, variance], rel=1e-4)
    before = running.clone()
    for value in (math.nan, math.inf, 100.0):
        soundness.update_running(running, torch.tensor(value), torch.tensor(False))
    assert torch.equal(running, before)
    bound = mean + 3 * math.sqrt(variance)
    for value, is_spike in ((bound + 0.01, True), (bound - 0.01, False), (-100.0, False)):
        assert soundness.is_spike(torch.tensor(value), running, 3.0).item() == is_spike
    running[0] = soundness.WATCHED - 1  # too few to tell
    assert not soundness.is_spike(torch.tensor(100.0), running, 3.0)


def spikes(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """The training loss is 50 higher in these steps (from 1), its gradient as it was."""
    real, calls = Hydra.forward, []

    def forward(self, idx, targets=None):
        output = real(self, idx, targets)
        if targets is not None and torch.is_grad_enabled():
            calls.append(1)
            if len(calls) in steps:
                output = output._replace(cross_entropy=output.cross_entropy + 50)
        return output

    patch.setattr(Hydra, "forward", forward)


SPIKY = {"max_iters": 30, "eval_interval": 30, "log_interval": 5, "warmup_iters": 5, **SMALL}


@pytest.mark.faults
def test_a_spike_updates_nothing_and_is_counted(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        spikes(patch, 10)  # before there are losses enough to tell
        assert train.main(options(tmp_path, "early", spike=6, **SPIKY | {"max_iters": 12})) == 0
    assert checkpoint(tmp_path / "early")["skipped"] == 0
    capsys.readouterr()
    spikes(monkeypatch, 25)
    assert train.main(options(tmp_path, "run", spike=6, **SPIKY)) == 0
    skipped = [r for r in records(tmp_path / "run") if "skipped" in r and "loss" not in r]
    assert [r["step"] for r in skipped] == [25] and skipped[0]["skipped"].startswith("spike of the loss to 5")
    assert "update skipped (1 so far)" in capsys.readouterr().out
    last = checkpoint(tmp_path / "run")
    assert last["skipped"] == 1 and {int(state["step"]) for state in last["optimizer"]["state"].values()} == {29}
    assert last["running"][0] == 29 and last["running"][1] < 10
    monkeypatch.undo()
    monkeypatch.setattr("machine.matmul_peak", lambda device, dtype, n=0: 1e9)
    with monkeypatch.context() as patch:
        spikes(patch, 22)
        train.main(options(tmp_path, "off", **SPIKY | {"max_iters": 23}))
    assert checkpoint(tmp_path / "off")["skipped"] == 0 and checkpoint(tmp_path / "off")["running"] == [0.0] * 3


@pytest.mark.faults
def test_spikes_are_told_alike_after_a_resume(tmp_path, monkeypatch):
    """Interrupted behind the losses that tell them."""
    with monkeypatch.context() as patch:
        spikes(patch, 25)
        train.main(options(tmp_path, "straight", spike=6, **SPIKY))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 21)
        assert train.main(options(tmp_path, "broken", spike=6, **SPIKY)) == 130
    with monkeypatch.context() as patch:
        spikes(patch, 3)
        train.main([f"--out_dir={tmp_path / 'broken'}", "--resume"])
    ours, theirs = checkpoint(tmp_path / "broken"), checkpoint(tmp_path / "straight")
    assert ours["running"] == theirs["running"] and ours["skipped"] == 1 and equal(ours["model"], theirs["model"])


def test_ten_spikes_in_a_row_end_a_run(tmp_path, monkeypatch, capsys):
    spikes(monkeypatch, *range(22, 60))
    assert train.main(options(tmp_path, "run", spike=6, **SPIKY | {"max_iters": 60, "log_interval": 1})) == 1
    assert "10 steps in a row were not finite, or spikes; the checkpoint" in capsys.readouterr().err
