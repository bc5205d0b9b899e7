"""The files of a run: whole or absent, nothing overwritten, a log without repeats, checkpoints of other versions."""

import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from conftest import write_folder
from test_train import (  # noqa: F401 the fixture `signals` is used by its name
    SHAPE,
    TEXT,
    checkpoint,
    equal,
    finish,
    losses,
    options,
    records,
    shape,
    signals,
    start,
    step_records,
    text_tokens,
)

import checkpoints
import files
import machine
import runs
import sample
import sources
import train
from configurator import UserError, cli
from data import tokenizer_hash
from model import Hydra

pytestmark = pytest.mark.usefixtures("quick")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- nothing is overwritten


def test_checkpoints_and_configurations_are_written_that_way(tmp_path, monkeypatch):
    written = []
    real = files.complete_file

    def complete_file(path):
        written.append(path.name)
        return real(path)

    monkeypatch.setattr(files, "complete_file", complete_file)
    train.main(options(tmp_path, "run", max_iters=1))
    assert written == ["config.toml", "last.pt", "best.pt"]
    written.clear()
    train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=2", "--sample_tokens=0"])
    assert written[:3] == ["log.jsonl", "config.toml", "last.pt"]


def test_a_new_run_overwrites_nothing(tmp_path, capsys):
    train.main(options(tmp_path, "run", max_iters=2))
    before = contents(tmp_path / "run")
    assert before.keys() == {"last.pt", "best.pt", "log.jsonl", "config.toml"}
    train.main(options(tmp_path, "run", max_iters=1))
    assert contents(tmp_path / "run" / "run-1") == before
    assert "its files are in" in capsys.readouterr().out
    assert checkpoint(tmp_path / "run")["step"] == 1 and records(tmp_path / "run")[0]["started"] == 0


def test_every_earlier_run_has_its_folder(tmp_path):
    """Whatever of a run there is; other files stay where they are."""
    assert runs.set_aside(tmp_path) == "" and os.listdir(tmp_path) == []
    (tmp_path / "notes.txt").write_text("mine")
    assert runs.set_aside(tmp_path) == ""
    for number, pattern in enumerate(files.RUN_FILES, 1):
        name = pattern.replace("*", "12")
        (tmp_path / name).write_text(name)
        said = runs.set_aside(tmp_path)
        assert f"run-{number} now" in said and "--resume" in said
        assert contents(tmp_path / f"run-{number}") == {name: name.encode()}
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_no_file_of_a_run_is_a_text(tmp_path):
    """Not even where the run's folder is the text's."""
    write_folder(tmp_path, {name.replace("*", "12"): "" for name in files.RUN_FILES[:-1]} | {"notes.txt": "mine"})
    write_folder(tmp_path, {"shards-12/part.txt": "a text by its looks"})
    assert sources.list_files(tmp_path, sources.Skipped()) == ["notes.txt"]


def test_a_folder_that_cannot_be_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out_dir=.*file/run.*: choose a folder that can be written"):
        train.main(options(tmp_path, "file/run"))


# ---- the log


def test_a_resumed_log_repeats_nothing(tmp_path):
    """Headers stay; later steps go; the evaluations of the step itself go where the run evaluates again; a last line
    that was cut goes too. The lowest validation loss is that of what stays;
    the one at the end is over other batches."""
    path = tmp_path / "log.jsonl"
    lines = [{"started": 0}, {"step": 0, "val_bpb": 8.0, "val_loss": 6.0, "best": True}, {"step": 1, "loss": 2.0},
             {"step": 2, "skipped": "loss"}, {"step": 2, "loss": 1.5},
             {"step": 2, "val_bpb": 7.0, "val_loss": 5.0, "best": True},
             {"step": 2, "val_bpb": 3.0, "val_loss": 2.0, "final": True}, {"resumed_at": 2},
             {"step": 2, "val_bpb": 7.0, "val_loss": 5.5, "best": False}, {"step": 3, "loss": 1.0},
             {"step": 4, "val_bpb": 6.0, "val_loss": 4.0, "best": True}]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)

    def kept(step: int, evaluates: bool) -> tuple[list[dict], float]:
        path.write_text(text + '{"step": 1, "lo')
        best, unreadable = runs.truncate_log(path, step, evaluates)
        assert unreadable == 1
        assert path.read_text().endswith("}\n")
        return records(tmp_path), best

    assert kept(4, False) == (lines, 4.0)
    assert kept(4, True) == (lines[:-1], 5.0)
    assert kept(3, False) == kept(3, True) == (lines[:10], 5.0)
    assert kept(2, False) == (lines[:9], 5.0)
    assert kept(2, True) == ([line for line in lines[:9] if line.get("step") != 2 or "val_bpb" not in line], 6.0)
    assert kept(0, True) == ([{"started": 0}, {"resumed_at": 2}], math.inf)
    assert runs.truncate_log(tmp_path / "none.jsonl", 3, True) == (math.inf, 0)


def test_a_killed_run_resumes_with_a_log_that_repeats_nothing(tmp_path):
    """The log got further than last.pt, and its last line was cut."""
    out = tmp_path / "run"
    train.main(options(tmp_path, "run", max_iters=3))
    whole = records(out)
    with open(out / "log.jsonl", "a") as file:
        for step in (4, 5):
            file.write(json.dumps({"step": step, "loss": 9.0}) + "\n")
        file.write('{"step": 6, "lo')
    train.main([f"--out_dir={out}", "--resume", "--max_iters=4"])
    log = records(out)
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4] and log[-3]["loss"] != 9.0
    assert log[: len(whole)] == whole
    assert [r["step"] for r in log if "val_bpb" in r] == [0, 3, 3, 4, 4]


def test_lines_that_were_cut_anywhere_do_not_stop_a_resume(tmp_path):
    """A header that was cut behind its configuration ends with a brace too."""
    path = tmp_path / "log.jsonl"
    good = json.dumps({"step": 1, "loss": 2.0}) + "\n"
    path.write_text('{"started": 0, "config": {"dim": 32}\n' + good + "3}\n[1, 2]\n\n" + good)
    assert runs.truncate_log(path, 1, False) == (math.inf, 3)
    assert path.read_text() == 2 * good


def test_a_log_that_is_gone_begins_anew(tmp_path):
    out = tmp_path / "run"
    train.main(options(tmp_path, "run", max_iters=2))
    (out / "log.jsonl").unlink()
    train.main([f"--out_dir={out}", "--resume", "--max_iters=3"])
    assert [r["step"] for r in records(out) if "loss" in r] == [3]


def test_a_best_checkpoint_cannot_stand_for_the_last(tmp_path):
    """It has no moments of the optimiser; nothing is changed, and one sentence says so."""
    out = tmp_path / "run"
    train.main(options(tmp_path, "run", max_iters=2))
    (out / "last.pt").write_bytes((out / "best.pt").read_bytes())
    before = contents(out)
    with pytest.raises(UserError, match="last.pt lacks optimizer, without which nothing goes on exactly") as error:
        train.main([f"--out_dir={out}", "--resume", "--max_iters=3"])
    assert "\n" not in str(error.value) and contents(out) == before


def test_weights_that_do_not_fit_the_configuration_are_one_line(tmp_path):
    out = tmp_path / "run"
    train.main(options(tmp_path, "run", max_iters=2))
    content = checkpoint(out)
    content["model_config"]["mlp_ratio"] = 20.0
    torch.save(content, out / "last.pt")
    for call, args in ((train.main, ["--resume", "--max_iters=3"]), (sample.main, ["--checkpoint=last"])):
        with pytest.raises(UserError, match="last.pt does not fit its configuration .*gate_up.weight is") as error:
            call([f"--out_dir={out}", *args])
        assert "\n" not in str(error.value)


def test_a_run_without_steps_does_not_advise_to_sample_it(tmp_path, capsys):
    train.main(options(tmp_path, "run", max_iters=0))
    assert "sample it with" not in capsys.readouterr().out
    train.main(options(tmp_path, "other", max_iters=1))
    assert "sample it with: python sample.py --out_dir=" in capsys.readouterr().out


def test_every_record_is_a_line_of_json_at_once(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    log = runs.RunLog(path)
    log.start(3, True, {"dtype": "float32"})
    log.write("any", {"step": 1, "loss": math.nan, "lr": math.inf, "name": "nan", "parts": {"a": [math.nan, 2]}})
    log.skipped(7, 2, "loss")
    log.evaluation({"step": 8, "val_loss": 2.0, "val_bpb": 3.0, "best": True})
    log.evaluation({"step": 9, "val_loss": 2.5, "val_bpb": 3.5, "best": False})
    step = {"step": 10, "loss": 1.0, "lr": 1e-3, "grad_norm": 2.0, "clipped": 0.25, "ms": 12.0, "tokens_per_s": 1234.0,
            "mfu": 0.5, "mfu_6n": 0.4, "eta_s": 125.9, "skipped": 0}  # fmt: skip
    log.step(40, step, {"routed_fraction": 0.125})
    found = records(tmp_path)  # the file is still open
    header = found[0]
    assert header["resumed_at"] == 3 and header["dtype"] == "float32" and header["git"] == machine.git_hash()
    assert header["torch"] == torch.__version__ and {"numpy", "python"} <= header.keys()
    assert found[1] == {"kind": "any", "step": 1, "loss": None, "lr": None, "name": "nan", "parts": {"a": [None, 2]}}
    assert found[2] == {"kind": "skipped", "step": 7, "skipped": "loss"}
    assert found[5] == {"kind": "step"} | step | {"routed_fraction": 0.125}
    runs.RunLog(path).start(0, False, {})
    assert records(tmp_path)[:6] == found and records(tmp_path)[6]["started"] == 0
    assert capsys.readouterr().out.splitlines() == [
        "step     7 | loss is not finite: update skipped (2 so far)",
        "step     8 | validation 2.0000 nats/token, 3.0000 bits/byte (best)",
        "step     9 | validation 2.5000 nats/token, 3.5000 bits/byte",
        "step    10 |  25% | loss 1.0000 | lr 1.00e-03 | norm 2.00 | clipped  25% | 12 ms | 1,234 tokens/s | MFU 50%, "
        "by 6N 40% | "
        "routed_fraction 0.125 | ETA 2:05",
    ]  # fmt: skip


def test_the_commit_is_named_where_there_is_one(tmp_path, monkeypatch):
    found = machine.git_hash()
    assert found == "unknown" or len(found) == 40
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert machine.git_hash() == "unknown"

    def no_git(*args, **keys):
        raise FileNotFoundError

    monkeypatch.setattr(machine.subprocess, "run", no_git)
    assert machine.git_hash() == "unknown"


# ---- checkpoints


@dataclass
class Options:
    width: int = 3
    name: str = "x"


def stored(**parts) -> dict:
    whole = {"model_config": {}, "train_config": {"tokenizer": "bytes"}, "fingerprint": "", "tokenizer": "",
             "model": {}, "optimizer": {}}  # fmt: skip
    return whole | asdict(checkpoints.Progress()) | parts


def test_a_checkpoint_is_fitted_to_the_options_of_today(tmp_path):
    path = tmp_path / "last.pt"
    torch.save(stored(model_config={"width": 5, "name": "y"}), path)
    found, notes = checkpoints.load_checkpoint(path, {"model_config": Options})
    assert found["model_config"] == {"width": 5, "name": "y"} and notes == []
    torch.save(stored(model_config={"width": 5}, step=7), path)
    found, notes = checkpoints.load_checkpoint(path, {"model_config": Options})
    assert found["model_config"] == {"width": 5, "name": "x"} and found["step"] == 7
    assert notes == [f"{path} is older than the option name, which is 'x' for it"]
    torch.save(stored(model_config={"width": 5, "colour": "red"}), path)
    with pytest.raises(UserError, match="has the option 'colour', which this version of the project does not know"):
        checkpoints.load_checkpoint(path, {"model_config": Options})
    assert checkpoints.load_checkpoint(path, {})[1] == []


def test_a_damaged_or_foreign_checkpoint_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 half a zip"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no checkpoint of this project, it is damaged or foreign"):
            train.main([*options(tmp_path, "run"), "--resume"])
        assert contents(path.parent) == {"last.pt": content}
    lacking = stored()
    del lacking["best"]
    for content in ({}, {"model": 1}, [1], torch.zeros(2), lacking):
        torch.save(content, path)
        with pytest.raises(UserError, match="parts are missing"):
            train.main([*options(tmp_path, "run"), "--resume"])
    torch.save(stored(model=Path("/")), path)  # an object that would run code of its own
    with pytest.raises(UserError, match="damaged or foreign"):
        checkpoints.load_checkpoint(path, {})
    with pytest.raises(UserError, match="best.pt does not exist: train first"):
        checkpoints.load_checkpoint(path.with_name("best.pt"), {})


def change(path: Path, **parts) -> None:
    """Some parts of a checkpoint, replaced."""
    torch.save(torch.load(path, weights_only=True) | parts, path)


def test_a_checkpoint_without_an_option_of_today_goes_on_and_says_so(tmp_path, capsys):
    out = tmp_path / "run"
    train.main(options(tmp_path, "run", max_iters=1, compile="off"))
    for name in ("last", "best"):
        old = checkpoint(out, name)
        del old["model_config"]["qk_gain"], old["train_config"]["beta2"]
        change(out / f"{name}.pt", model_config=old["model_config"], train_config=old["train_config"])
    capsys.readouterr()
    assert train.main([f"--out_dir={out}", "--resume", "--max_iters=2"]) == 0
    printed = capsys.readouterr().out
    for name, default in (("qk_gain", 0.25), ("beta2", 0.95)):
        assert f"last.pt is older than the option {name}, which is {default} for it" in printed
    assert checkpoint(out)["model_config"]["qk_gain"] == 0.25 and checkpoint(out)["step"] == 2
    change(out / "best.pt", model_config=old["model_config"], train_config=old["train_config"])
    assert sample.main([f"--out_dir={out}", "--prompt=ab", "--max_new_tokens=3"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("best.pt is older than the option qk_gain, which is 0.25 for it") == 1
    assert "older" not in printed.out


@pytest.mark.parametrize("part", ["model_config", "train_config"])
def test_a_checkpoint_with_an_unknown_option_is_refused_by_its_name(tmp_path, monkeypatch, capsys, part):
    """One line, exit code 2, and nothing on the disk is touched."""
    out = tmp_path / "run"
    train.main(options(tmp_path, "run", max_iters=1))
    for name in ("last", "best"):
        change(out / f"{name}.pt", **{part: checkpoint(out, name)[part] | {"heads": 3}})
    before = contents(out)
    programs = [(train.main, ["--resume", "--max_iters=2"])]
    if part == "model_config":  # sampling takes no notice of how it was trained
        programs.append((sample.main, ["--prompt=a"]))
    for main, args in programs:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["program", f"--out_dir={out}", *args])
        with pytest.raises(SystemExit) as ended:
            cli(main)
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == 1 and "has the option 'heads', which this version" in err
    assert contents(out) == before and not (out / "run-1").exists()


OLD_TRAINING = {
    "resume": False, "tokenizer": "bytes", "batch_size": 2, "gradient_accumulation_steps": 1, "max_iters": 2,
    "learning_rate": 0.01, "warmup_iters": 1, "min_lr_ratio": 0.1, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95,
    "grad_clip": 1.0, "eval_interval": 10, "eval_iters": 2, "final_eval_iters": 4, "log_interval": 1,
    "sample_tokens": 0, "sample_prompt": "def", "device": "auto", "dtype": "auto", "compile": "auto", "seed": 1337,
}  # fmt: skip
OLD_MODEL = SHAPE | {
    "n_layer": 3, "pattern": "MCL", "conv_kernel": 3, "qk_gain": 0.25, "value_shift": True, "latent_ratio": 0.5,
    "window": 0, "rope_theta": 10000.0, "norm_eps": 1e-6, "mod_capacity": 0.0, "mor_recursions": 1,
    "attn_backend": "auto",
}  # fmt: skip


def test_a_run_from_before_the_files_were_divided_goes_on(tmp_path, capsys):
    """The format of a checkpoint then, written out: its parts, its options, two groups of the optimiser, matrices
    first, in the order of the model's parameters."""
    out = tmp_path / "run"
    out.mkdir()
    torch.manual_seed(1)
    model = Hydra(shape(n_layer=3, pattern="MCL"))
    matrices, vectors = [], []
    for name, p in model.named_parameters():
        p.grad = torch.full_like(p, float(p.numel()))
        group = vectors if p.dim() < 2 or name.endswith("conv_depthwise") else matrices
        group.append(p)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.5, 0.95), fused=True)
    optimizer.step()
    corpus = text_tokens(tmp_path)
    paths = {"out_dir": str(out), "data": TEXT, "cache_dir": str(tmp_path / "cache"), "max_iters": 5}
    old = {"model": model.state_dict(), "model_config": OLD_MODEL, "train_config": OLD_TRAINING | paths,
           "fingerprint": corpus.fingerprint, "tokenizer": tokenizer_hash(corpus.enc), "step": 4, "best": 5.5,
           "skipped": 3, "streak": 0, "clipped": 0, "counted": 0}  # fmt: skip
    torch.save(old, out / "best.pt")
    assert sample.main([f"--out_dir={out}", "--prompt=ab", "--max_new_tokens=3"]) == 0
    assert capsys.readouterr().out.startswith("ab")
    torch.save(old | {"optimizer": optimizer.state_dict()}, out / "last.pt")
    assert train.main([f"--out_dir={out}", "--resume"]) == 0
    (record,) = step_records(out)
    new = checkpoint(out)
    assert record["step"] == new["step"] == 5 and record["skipped"] == 3
    names = {p: name for name, p in model.named_parameters()}
    order = [names[p] for p in [*matrices, *vectors]]
    for name, state in zip(order, new["optimizer"]["state"].values(), strict=True):
        p = model.get_parameter(name)
        assert state["step"] == 2 and state["exp_avg"].shape == p.shape
        # the mean of a first gradient of numel, half of it kept then and nine tenths now, and of one of at most 1
        assert (state["exp_avg"] - 0.45 * p.numel()).abs().max() < 0.11, name
    assert not equal(new["model"], old["model"])


def test_another_model_cannot_be_resumed_but_another_core_can(tmp_path):
    @dataclass
    class Model:
        dim: int = 1
        attn_backend: str = "auto"

    @dataclass
    class Run:
        tokenizer: str = "bytes"
        init_from: str = ""
        max_iters: int = 1

    trained = {"tokenizer": "gpt2", "init_from": "other", "max_iters": 8}
    content = stored(model_config={"dim": 2, "attn_backend": "flex"}, train_config=trained, step=5)
    torch.save(content, tmp_path / "last.pt")
    for given in ({}, {"dim": 2}, {"attn_backend": "sdpa"}, {"tokenizer": "gpt2", "max_iters": 9},
                  {"init_from": "other"}):  # fmt: skip
        found, notes = checkpoints.resumable(tmp_path / "last.pt", given, Model, Run)
        assert found["model_config"]["dim"] == 2 and notes == []
    for given, words in (({"dim": 1}, "dim=1: the run in .* has 2"), ({"tokenizer": "bytes"}, "has 'gpt2'"),
                         ({"init_from": "more"}, "init_from='more': the run in .* has 'other'")):  # fmt: skip
        with pytest.raises(UserError, match=words + ", which --resume cannot change"):
            checkpoints.resumable(tmp_path / "last.pt", given, Model, Run)


def test_a_changed_text_or_tokenizer_is_named(tmp_path):
    ids = {"fingerprint": "a" * 64, "tokenizer": "b" * 64}
    checkpoints.check_text(ids, ids, tmp_path, "text")
    for name, what in (("fingerprint", "text"), ("tokenizer", "tokenizer")):
        with pytest.raises(UserError, match=f"the {what} has changed since .*cccc.*, not {ids[name][:12]}") as no:
            checkpoints.check_text(ids, ids | {name: "c" * 64}, tmp_path, "text")
        assert ("from its weights" in str(no.value)) == (what == "text")  # they are for no other tokenizer


def test_a_run_killed_behind_its_evaluation_keeps_its_best(tmp_path, monkeypatch):
    """Killed after the best.pt of step 2, before anything else: the evaluation comes again, and again is the best."""
    out = tmp_path / "run"
    real = checkpoints.save_checkpoint

    def save_checkpoint(path, content):
        real(path, content)
        if path.name == "best.pt":
            raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", save_checkpoint)
        with pytest.raises(SystemExit):
            train.main(options(tmp_path, "run", max_iters=3, eval_interval=2, learning_rate=0.01))
    killed = checkpoint(out, "best")
    assert killed["step"] == 2 and checkpoint(out)["best"] > killed["best"]
    train.main([f"--out_dir={out}", "--resume"])
    evaluations = [(r["step"], r["best"]) for r in records(out) if "best" in r]
    assert evaluations == [(0, True), (2, True), (3, True)]


def test_the_program_refuses_in_one_line_and_ends_with_2(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"PK")
    out, err = finish(start([f"--out_dir={tmp_path}", "--resume"]), 2)
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and "damaged or foreign" in err
    assert os.listdir(tmp_path) == ["last.pt"]


# ---- the profile of a run


@pytest.mark.slow
def test_a_profile_has_the_steps_behind_the_warm_up(tmp_path, capsys):
    """And changes nothing; three steps of warm-up, then those that were asked for, or what there is of them."""
    train.main(options(tmp_path, "plain", max_iters=6))
    assert "profiled" not in capsys.readouterr().out and not (tmp_path / "plain" / "trace.json").exists()
    for name, asked, taken in (("run", 2, 2), ("short", 100, 3), ("none", 0, 0)):
        train.main(options(tmp_path, name, max_iters=6, profile=asked))
        assert losses(tmp_path / name) == losses(tmp_path / "plain")
        assert equal(checkpoint(tmp_path / name)["model"], checkpoint(tmp_path / "plain")["model"])
        lines = capsys.readouterr().out.splitlines()
        assert (tmp_path / name / "trace.json").exists() == (taken > 0)
        if not taken:
            continue
        said = next(i for i, line in enumerate(lines) if line.startswith(f"{taken} steps profiled"))
        row = re.compile(r" *([0-9.]+)% +[0-9.]+ ms +\d+ calls  .+")
        rows = [row.fullmatch(line) for line in lines[said + 1 : said + 11]]
        shares = [float(row[1]) for row in rows]
        assert shares == sorted(shares, reverse=True) and 20 < sum(shares) <= 100.5
        assert re.fullmatch("step .*|-*.*sample.*|whole .*|4 batches .*", lines[said + 11])
        events = json.loads((tmp_path / name / "trace.json").read_text())["traceEvents"]
        names = [event.get("name") for event in events]
        assert {"GatedDown", "RMSNormFunction", "GatedDownBackward"} <= set(names)
        assert names.count("Optimizer.step#AdamW.step") == taken


def test_a_resumed_run_is_not_profiled_again(tmp_path, capsys):
    train.main(options(tmp_path, "run", max_iters=4, profile=1))
    assert capsys.readouterr().out.count("1 steps profiled") == 1
    train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=9"])
    assert "profiled" not in capsys.readouterr().out
    train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=14", "--profile=1"])
    assert capsys.readouterr().out.count("1 steps profiled") == 1
    with pytest.raises(UserError, match="profile=-1: it must not be negative"):
        train.main([*options(tmp_path, "run"), "--profile=-1"])
