"""compare.py finds what is there and nothing else: statistics by hand, the search for a rate, whole comparisons of
minute models, which train in this process, one test apart; and one that was stopped goes on to the same result.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import interrupt_after

import compare
import train
import trials
from accounting import count_params, flops_per_token, state_bytes
from attention import GQA, KINDS
from configurator import UserError, field_comments
from model import HydraConfig
from train import TrainConfig

ROOT = Path(compare.__file__).parent
SHAPE = {"vocab_size": 257, "block_size": 16, "dim": 16, "n_head": 2, "n_kv_head": 1, "n_layer": 1, "mlp_ratio": 1.0,
         "pattern": "A", "tokenizer": "bytes", "batch_size": 2, "max_iters": 6, "warmup_iters": 2,
         "learning_rate": 0.01, "log_interval": 2}  # fmt: skip


def write(path: Path, **keys) -> str:
    """A configuration's file."""
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in (SHAPE | keys).items()))
    return str(path)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with a text in it, in which to be. What follows a letter depends on the one before it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("aabb" * 400)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def made(monkeypatch):
    """Runs train in this process. Yields the command lines of those that were made, and how many may be at a time."""
    found = []

    def train_here(self, orders, jobs):
        for trial, argv in orders:
            found.append((argv, jobs))
            code, problem = trials.train_one(argv)
            if code not in (0, 1):
                raise KeyboardInterrupt
            assert not problem
            yield trial, 1.0

    monkeypatch.setattr(trials.Team, "train", train_here)
    monkeypatch.setattr("machine.matmul_peak", lambda device, dtype, n=0: 1e9)
    monkeypatch.setattr("runs.git_hash", lambda: "")
    return found


def run(*argv: str, code: int = 0) -> dict:
    """compare.py's whole result."""
    assert compare.main(["--data=text.txt", "--jobs=1", "--cache_dir=cache", *argv]) == code
    return json.loads(Path("out_compare/compare.json").read_text()) if code == 0 else {}


def numbers(result: dict) -> dict:
    """A result without its times, dates and commands."""
    found = json.loads(json.dumps(result["bases"]))
    for basis in found.values():
        for part in (*basis["rows"], *basis["curves"].values()):
            del part["seconds"]
    return found | {name: result[name] for name in ("notes", "validation_tokens", "fingerprint")}


# ---- statistics


def test_paired_differences_by_hand():
    """Mean 3, standard deviation sqrt(2.5), so an error of sqrt(0.5) at 4 degrees of freedom."""
    found = compare.paired([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764 * math.sqrt(0.5)
    assert [found["low"], found["difference"], found["high"]] == pytest.approx([3 - half, 3, 3 + half], abs=1e-4)
    assert found["p"] == pytest.approx(0.0132, abs=5e-5) and found["verdict"] == "worse"
    assert compare.paired([-1.0, -2.0, -3.0, -4.0, -5.0])["verdict"] == "better"
    assert compare.paired([-1.0, 2.0, -3.0, 4.0, 1.0])["verdict"] == "not resolved"
    for differences in ([], [0.7], [0.0, 0.0, 0.0]):  # too few to know their spread, or none
        assert compare.paired(differences)["verdict"] == "not resolved"
    assert compare.paired([0.7])["difference"] == 0.7 and compare.paired([0.7])["p"] is None
    assert compare.paired([0.0, 0.0])["p"] == 1 and compare.paired([0.5, 0.5])["verdict"] == "worse"


def test_nineteen_of_twenty_intervals_hold_the_truth():
    generator = np.random.default_rng(0)
    found = [compare.paired(generator.normal(0.3, 1.0, 5).tolist()) for _ in range(600)]
    assert 0.93 < np.mean([row["low"] <= 0.3 <= row["high"] for row in found]) < 0.97


# ---- the rate


def test_rates_are_tried_where_the_lowest_loss_is():
    def losses(first, *values):
        return dict(enumerate(values, first))

    assert compare.next_powers({}, 5) == [-1, 0, 1]
    assert compare.next_powers(losses(-1, 2, 1, 2), 5) == [-2, 2]
    assert compare.next_powers(losses(-1, 2, 1, 2), 6) == [-2, 2, 3]
    assert compare.next_powers(losses(-1, 3, 2, 1), 5) == [2, 3]
    assert compare.next_powers(losses(-1, 1, 2, 3), 5) == [-3, -2]
    assert compare.next_powers(losses(-2, 3, 2, 1, 2, 3), 5) == []
    assert compare.next_powers(losses(-1, 5, 4, 3, 2, 1), 5) == [4]  # at an edge
    assert compare.next_powers(losses(-1, 5, 4, 3, 2, 1, 2), 5) == []
    assert compare.next_powers(losses(-2, 1, 2, 3, 4, 5), 5) == [-3]
    assert compare.next_powers(losses(-1, *range(8, 0, -1)), 5) == []  # as far as it goes
    assert compare.next_powers(losses(-1, 3, 2, 1), 12) == [-5, -4, -3, -2, 2, 3, 4, 5, 6]  # and then on the other side
    assert compare.next_powers(losses(-1, 1, 2, 3), 13) == [-6, -5, -4, -3, -2, 2, 3, 4, 5, 6]
    assert compare.next_powers(losses(-1, math.inf, math.inf, math.inf), 5) == [-3, -2]  # all diverged: lower
    assert compare.next_powers(losses(-1, 1, 2, math.inf), 3) == [-2]


def test_the_minimum_of_a_parabola_over_log_rate():
    rates = [1e-3 * 2 ** (k / 2) for k in range(-3, 4)]
    for lowest in (0.8e-3, 1e-3, 1.3e-3):
        losses = {rate: 2 + 3 * math.log(rate / lowest) ** 2 for rate in rates}
        assert compare.best_rate(losses) == pytest.approx(lowest, rel=5e-3)  # three digits
    assert compare.best_rate({rate: rate for rate in rates}) == compare.rounded(rates[0])  # nothing beyond is known
    assert compare.best_rate(dict(zip(rates[:5], [3.0, 2.0, 1.0, 2.0, 90.0], strict=True))) >= rates[1]
    diverged = {1e-3: 2.0, 2e-3: 1.0, 4e-3: math.inf}
    assert compare.best_rate(diverged) == 2e-3
    steep = {1e-3: 2.0, 2e-3: 1.0, 4e-3: 1.9, 8e-3: math.inf}
    assert 1e-3 < compare.best_rate(steep) < 4e-3
    assert compare.best_rate({1e-3: 1.0, 2e-3: 1.5, 4e-3: 1.2}) == 1e-3


# ---- contestants and their runs


def contest_of(*argv: str) -> compare.Contest:
    options, given, entrants = compare.configure(["--data=text.txt", *argv])
    return compare.Contest(options, given, entrants, Path("out_compare"), 1)


def test_rates_are_tried_with_runs_as_long_as_those_of_the_seeds():
    contest = contest_of(write(Path("a.toml"), max_iters=40, warmup_iters=10))
    it = contest.first
    tried, (run, *_) = contest.rate_trial(it, 1).run, contest.seed_trials(it, "tokens", 1.0)
    assert (tried.max_iters, tried.warmup_iters) == (run.run.max_iters, run.run.warmup_iters) == (40, 10)


def test_the_warmup_keeps_its_part_of_a_run_that_seconds_end():
    contest = contest_of(write(Path("a.toml"), max_iters=40, warmup_iters=10), "--equal=seconds", "--max_seconds=6")
    run = contest.seed_trials(contest.first, "seconds", 1.0, 6.0, 0.5)[0].run
    assert (run.max_seconds, run.warmup_iters, run.max_iters) == (6.0, 3, 12)


def test_an_edge_of_the_rates_is_told():
    contest = contest_of(write(Path("a.toml")), "--seeds=5")
    rows = {"tokens": [{"tokens_per_parameter": 9.0, "diverged": 0}]}
    assert list(compare.remarks(contest, {"a": {1.0: 3.0, 2.0: 2.0, 4.0: 3.0}}, rows)) == []
    (note,) = compare.remarks(contest, {"a": {1.0: 3.0, 2.0: 2.0, 4.0: 1.0}}, rows)
    assert note.startswith("a: the lowest loss is at 4, an edge of the rates")


def test_what_diverged_is_no_part_of_a_curve():
    it = contest_of(write(Path("a.toml"))).first
    good = [compare.Outcome(1.0, 2.0, 2, [(1, 1.0, 3.0 + i), (2, 2.0, 1.0 + i)]) for i in range(2)]
    bad = compare.Outcome(None, 1.0, 1, [(1, 1.0, 9.0), (2, 2.0, 9.0)])
    assert compare.curves_of(it, [*good, bad])["losses"] == [[3.0, 4.0], [1.0, 2.0]]


# ---- whole comparisons


def test_a_configuration_against_itself_resolves_nothing(made, capsys):
    """Not at equal seeds, where nothing differs, nor against other seeds."""
    files = [write(Path("a.toml")), write(Path("b.toml"))]
    result = run(*files, "--seeds=3", "--rates=3", "--max_iters=4")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["tokens"] == result["bases"]["tokens"]["rows"] and last["measure"] == "bits/byte"
    assert not list(Path("out_compare").rglob("*.pt"))
    first, second = last["tokens"]
    assert first["losses"] == second["losses"] and first["rate"] == second["rate"]
    assert second["difference"] == 0 and second["p"] == 1 and second["verdict"] == "not resolved"
    options = ["--seeds=3", "--rates=0", f"--learning_rate={first['rate']}", "--seed=50", "--max_iters=4"]
    others = run(files[0], *options)["bases"]["tokens"]["rows"][0]
    assert others["losses"] != first["losses"]
    pairs = zip(first["losses"], others["losses"], strict=True)
    assert compare.paired([a - b for a, b in pairs])["verdict"] == "not resolved"


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_rest_takes_as_long_as_what_is_done_did(made, monkeypatch, capsys, jobs):
    """Equal runs of a second each, as many at a time as there may be; at equal seconds one by one."""
    monkeypatch.setattr(compare, "cores", lambda: 2)
    run(write(Path("a.toml")), "--rates=0", "--seeds=4", "--max_tokens=192", f"--jobs={jobs}")
    out = capsys.readouterr().out.splitlines()
    assert [line.split("ETA ")[1] for line in out if "ETA" in line and " of 4 | a/" in line] == {
        1: ["0:03", "0:02", "0:01", "0:00"], 2: ["0:01", "0:01", "0:00", "0:00"]}[jobs]
    run("a.toml", "--rates=0", "--seeds=2", "--max_seconds=1", "--equal=seconds", f"--jobs={jobs}")
    out = capsys.readouterr().out.splitlines()
    assert [line.split("ETA ")[1] for line in out if "ETA" in line and " of 2 | a/" in line] == ["0:01", "0:00"]


class Mute(GQA):
    """MHA that says nothing."""

    def forward(self, x_BTD, ctx, state=None):
        return 0 * super().forward(x_BTD, ctx, state)


@pytest.mark.slow
def test_a_model_without_attention_is_resolved_as_worse(made, monkeypatch):
    monkeypatch.setitem(KINDS, "Z", KINDS["A"]._replace(make=lambda c: Mute(c, c.n_head)))
    files = [write(Path("a.toml"), pattern="C", compression=1), write(Path("z.toml"), pattern="Z")]
    options = ["--seeds=3", "--rates=0", "--max_iters=60", "--eval_interval=60", "--batch_size=8"]
    result = run(*files, *options, "--learning_rate=0.02")
    with_attention, without = result["bases"]["tokens"]["rows"]
    assert with_attention["mean"] < without["mean"] - 0.1
    assert without["verdict"] == "worse" and 0 < without["low"] and without["p"] < 0.05
    swapped = run(*reversed(files), *options, "--learning_rate=0.02")["bases"]["tokens"]["rows"]
    assert swapped[1]["verdict"] == "better"
    assert len(made) == 6  # those of the first comparison


def test_what_a_row_says(made):
    config = run(write(Path("a.toml")), write(Path("b.toml"), pattern="M"), "--seeds=2", "--rates=3")
    rows, curves = (config["bases"]["tokens"][name] for name in ("rows", "curves"))
    for row in rows:
        it = config["contestants"][row["contestant"]]
        shape = compare.HydraConfig(**{k: v for k, v in it["config"].items() if k in SHAPE | {"latent_head_dim": 0}
                                       and k in compare.HydraConfig.__dataclass_fields__})  # fmt: skip
        assert row["parameters"] == count_params(shape) and row["tokens"] == 6 * 2 * 16
        assert row["tokens_per_parameter"] == pytest.approx(192 / count_params(shape))
        assert row["flops"] == pytest.approx(192 * 3 * flops_per_token(shape, 16))
        assert row["state_bytes_per_token"] == state_bytes(shape, 16) / 16
        assert row["mean"] == pytest.approx(np.mean(row["losses"])) and row["runs"] == 2
        assert row["sd"] == pytest.approx(np.std(row["losses"], ddof=1)) and row["seconds"] > 0
        assert row["rate"] == it["rate"] == compare.best_rate(dict(it["search"])) and len(it["search"]) >= 3
        curve = curves[row["contestant"]]
        assert curve["tokens"] == [64, 128, 192] and len(curve["losses"]) == 3
        assert curve["flops"][-1] == pytest.approx(row["flops"])
    differences = np.subtract(rows[1]["losses"], rows[0]["losses"])
    assert rows[1]["difference"] == pytest.approx(differences.mean())
    assert config["validation_tokens"] == 192 / 2 and config["threads"] == 1 and config["cpu"] and config["git"]
    notes = " ".join(config["notes"])
    assert "b has -" in notes and "more than 1% apart" in notes and "less than 5 tokens a parameter" in notes


def test_a_stored_comparison_is_printed_in_markdown(made, capsys):
    """Every row, with what the file says; and nothing is trained."""
    files = [write(Path(f"{name}.toml"), learning_rate=rate) for name, rate in (("a", 0.01), ("b", 0.003))]
    result = run(*files, "--seeds=3", "--rates=0", "--equal=tokens,flops")
    made.clear()
    capsys.readouterr()
    assert compare.main(["out_compare/compare.json", "out_compare"]) == 0  # by its file and by its folder
    assert not made
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("`python ") and "compare.py --data=text.txt --jobs=1" in lines[0]
    assert out.count("Equal flops, bits/byte") == 2 and out.count(" tokens, 3 seeds:") == 4
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| b ")]
    assert len(rows) == 4
    row = result["bases"]["tokens"]["rows"][1]
    assert rows[0][5] == f"{row['mean']:.4f} ({row['sd']:.4f})" and rows[0][8].strip(" |") == row["verdict"]
    part = row["mean"] / result["bases"]["tokens"]["rows"][0]["mean"] - 1
    assert rows[0][6] == f"{part:+.1%}: {row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {10}
    assert compare.main(["out_compare/compare.json", "--against=b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| a ")]
    assert rows[0][6].split()[1] == f"{-row['difference']:+.4f}" and sum("| reference |" in line for line in lines) == 2
    with pytest.raises(UserError, match="against='x': it is none of the contestants: use a, b"):
        compare.main(["out_compare/compare.json", "--against=x"])


def test_each_basis_has_its_lengths_and_no_run_is_made_twice(made):
    """b has more FLOPs a token, and batches of twice the tokens."""
    files = [write(Path("a.toml")), write(Path("b.toml"), dim=32, batch_size=4)]
    result = run(*files, "--seeds=2", "--rates=0", "--equal=tokens,flops,seconds", "--max_iters=10", "--jobs=1")
    found = {basis: result["bases"][basis]["rows"] for basis in compare.BASES}
    assert [row["tokens"] for row in found["tokens"]] == [320, 320]
    assert found["flops"][0]["losses"] == found["tokens"][0]["losses"]
    a, b = (row["flops"] for row in found["flops"])
    assert a <= b < a + b / (found["flops"][1]["tokens"] / 64)  # less than a step more
    limit = compare.rounded(np.median([row["seconds"] for row in found["tokens"][:1]]))
    for row in found["seconds"]:
        assert row["seconds"] >= limit
    folders = list(Path("out_compare").rglob("seed-1337*/log.jsonl"))
    assert len(folders) == 5 and len(made) == 10  # a has the same run for its tokens and for its FLOPs
    assert "see the batches of a" in " ".join(result["notes"])


def test_runs_whose_seconds_count_are_alone(made):
    files = [write(Path("a.toml")), write(Path("b.toml"))]
    args = [*files, "--seeds=2", "--rates=0", "--equal=seconds,tokens", "--max_seconds=0.05", "--data=text.txt"]
    contest = compare.Contest(*compare.configure(args), Path("out_compare"), 2)
    assert [trial.alone for basis in ("seconds", "tokens")
            for trial in contest.seed_trials(contest.first, basis, 0.1)] == [True, True, False, False]  # fmt: skip
    run(*args, "--jobs=2")
    jobs = {("--max_seconds=0.05" in argv): jobs for argv, jobs in made}
    assert jobs == {True: 1, False: min(2, compare.cores())}


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on(made, monkeypatch, capsys):
    files = [write(Path("a.toml")), write(Path("b.toml"), pattern="M")]
    args = [*files, "--seeds=2", "--rates=3", "--equal=tokens,flops"]
    for stop in (4, 20, 45):  # steps of all runs together: in the first one, in the search, among the seeds
        with monkeypatch.context() as patch:
            interrupt_after(patch, stop)
            run(*args, code=130)
        out = capsys.readouterr().out
        assert "runs have ended; to go on: python " in out and " ".join(args) in out
    broken = run(*args)
    logs = list(Path("out_compare").glob("*/*/*/log.jsonl"))
    assert len(made) == len(logs) + 3 and sum("resumed_at" in log.read_text() for log in logs) == 3
    before = len(made)
    assert numbers(run(*args)) == numbers(broken) and len(made) == before
    Path("out_compare").rename("stopped")
    straight = run(*args)
    assert numbers(straight) == numbers(broken)


def test_a_run_of_another_configuration_or_text_is_not_taken(made):
    args = ["--seeds=1", "--rates=0"]
    first = run(write(Path("a.toml")), *args)
    other = run(write(Path("a.toml"), n_layer=2), *args)
    assert len(made) == 2 and first["bases"]["tokens"]["rows"][0]["mean"] != other["bases"]["tokens"]["rows"][0]["mean"]
    assert len(list(Path("out_compare").rglob("run-1/log.jsonl"))) == 1  # set aside
    Path("text.txt").write_text("something else\n" * 100)
    run("a.toml", *args)
    assert len(made) == 3
    run("a.toml", *args, "--keep")
    assert len(made) == 3


def test_a_log_that_is_older_than_an_option_is_of_its_default(tmp_path):
    trial = trials.Trial(HydraConfig(dim=64), TrainConfig(out_dir=str(tmp_path)), 0.0)
    text = trials.Text("it", {trial.run.tokenizer: "its hash"})
    for changes, found in (({}, 1), ({"log_layers": 2}, 0)):
        config = asdict(trial.config) | asdict(trial.run)
        del config["log_layers"]
        header = {"config": config | changes, "fingerprint": "it", "tokenizer": "its hash"}
        (tmp_path / "log.jsonl").write_text(json.dumps(header) + "\n")
        assert len(trials.records_of(trial, text)) == found
    assert trials.records_of(trial, trials.Text("it", {trial.run.tokenizer: "another"})) == []


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    trial = trials.Trial(HydraConfig(dim=64), TrainConfig(out_dir=str(tmp_path)), 0.0)
    text = trials.Text("it", {trial.run.tokenizer: "its hash"})
    header = {"config": asdict(trial.config) | asdict(trial.run), "fingerprint": "it", "tokenizer": "its hash"}
    end = b'{"step": 4, "seconds": 2.5, "val_loss": 3.5, "final": true}'
    damaged = [b"\xff\xfe{}", b"[" * 100_000, b'{"step": "a"}', b"3", b'{"cut": ', b'{"config": 3}', b'{"final": true}',
               b'{"step": 9, "seconds": "x", "final": true}', b'{"stopped": 1}',
               b'{"step": 2, "best": 3, "val_loss": 3}', b'{"step": 9, "final": true}']  # fmt: skip
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*damaged, json.dumps(header).encode(), end, *damaged]))
    found = trials.outcome_of(trials.records_of(trial, text), "val_loss")
    assert found == trials.Outcome(3.5, 2.5, 4, [])
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    assert trials.records_of(trial, text) == []


def test_a_folder_of_data_may_hold_the_comparison(made):
    args = [write(Path("a.toml")), "--seeds=1", "--rates=0", "--data=."]
    run(*args)
    run(*args)
    assert len(made) == 1


@pytest.mark.slow
def test_what_diverges_is_a_bad_rate_and_is_reported_among_the_seeds(made, monkeypatch):
    real = train.train_step

    def train_step(model, optimizer, *args):
        """Fails at the highest rate of the search, and with one seed of each."""
        done = real(model, optimizer, *args)
        if optimizer.defaults["lr"] > 0.012 or model.seed == (1338 if model.config.pattern == "A" else 1339):
            done = done._replace(loss=done.loss * math.nan)
        return done

    begin = train.begin

    def noted(model, optimizer, source, initial, run, ids, ranks):
        model.seed = run.seed
        return begin(model, optimizer, source, initial, run, ids, ranks)

    monkeypatch.setattr(train, "begin", noted)
    monkeypatch.setattr(train, "train_step", train_step)
    files = [write(Path("a.toml")), write(Path("b.toml"), pattern="M")]
    result = run(*files, "--seeds=4", "--rates=3", "--max_iters=12")
    search = dict(result["contestants"]["a"]["search"])
    assert search[0.0141] is None and result["contestants"]["a"]["rate"] <= 0.01
    a, b = result["bases"]["tokens"]["rows"]
    assert [row["losses"].index(None) for row in (a, b)] == [1, 2]
    for row in (a, b):
        assert row["runs"] == 4 and row["diverged"] == 1 and row["mean"] == pytest.approx(
            np.mean([loss for loss in row["losses"] if loss is not None]))  # fmt: skip
    pairs = [b["losses"][i] - a["losses"][i] for i in (0, 3)]
    assert b["difference"] == pytest.approx(np.mean(pairs))
    assert "equal tokens: 1 of 4 runs of b diverged" in " ".join(result["notes"])
    before = len(made)
    run(*files, "--seeds=4", "--rates=3", "--max_iters=12")
    assert len(made) == before  # what diverged is not tried again


def test_no_rate_that_works_is_said(made, monkeypatch):
    monkeypatch.setattr(compare, "REACH", 1)
    real = train.train_step
    lost = torch.tensor(math.nan)
    monkeypatch.setattr(train, "train_step", lambda *args: real(*args)._replace(loss=lost))
    with pytest.raises(UserError, match="a: it diverges at every rate from 0.00707 to 0.0141"):
        run(write(Path("a.toml")), "--rates=3", "--max_iters=12")


def test_the_warmup_stays_its_part_of_the_run(made):
    def warmup(*options):
        contest = compare.Contest(*compare.configure(["a.toml", *options]), Path("out"), 1)
        return [trial.run.warmup_iters for trial in contest.seed_trials(contest.first, "tokens", 0.1)][0]

    write(Path("a.toml"), max_iters=100, warmup_iters=10)
    assert [warmup(), warmup("--max_iters=40"), warmup(f"--max_tokens={50 * 32}")] == [10, 4, 5]
    assert warmup("--max_iters=40", "--warmup_iters=7") == 7


def test_the_evaluations_can_be_chosen(made):
    args = [write(Path("a.toml")), "--seeds=1", "--rates=3"]
    result = run(*args, "--final_eval_iters=2", "--eval_interval=3", "--eval_iters=1")
    assert result["validation_tokens"] == 2 * 2 * 16
    assert result["bases"]["tokens"]["curves"]["a"]["tokens"] == [96, 192]
    batches = {"/rate-" in "".join(argv): [a for a in argv if a.startswith("--final_eval")] for argv, _ in made}
    assert batches == {True: ["--final_eval_iters=1"], False: ["--final_eval_iters=2"]}  # a rate's are fewer


def test_shards_without_bytes_compare_in_nats(made):
    tokens = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint16)
    for side in ("train", "val"):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(tokens)
        Path(f"x_{side}_0.bin").write_bytes(header.tobytes() + tokens.tobytes())
    files = [write(Path("a.toml"), tokenizer="none"), write(Path("b.toml"), tokenizer="none", n_layer=2)]
    result = run(*files, "--data=x_*.bin", "--seeds=1", "--rates=0")
    assert result["measure"] == "nats/token"
    assert result["bases"]["tokens"]["rows"][0]["mean"] == pytest.approx(math.log(257), abs=0.3)
    write(Path("b.toml"), tokenizer="bytes")
    with pytest.raises(UserError, match="losses of different tokens compare in bits per byte only"):
        run(*files, "--data=x_*.bin")


# ---- processes


def launch(*args: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "compare.py"), *args], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)  # fmt: skip


def wait_for(path: Path, text: str, process: subprocess.Popen) -> None:
    for _ in range(6000):
        if path.exists() and text in path.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{text} never came into {path}")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_save_when_the_comparison_is_stopped(signum):
    """A Ctrl-C, which only the parent hears, a termination, and a death; then the same command goes on to the end."""
    files = [write(Path("a.toml"), max_iters=2000), write(Path("b.toml"), max_iters=2000)]
    args = [*files, "--data=text.txt", "--seeds=1", "--rates=0", "--eval_iters=1", "--eval_interval=100000",
            "--final_eval_iters=1", "--jobs=2"]  # fmt: skip
    process = launch(*args)
    runs = [Path(f"out_compare/{name}/2000-steps/seed-1337-rate-0.01") for name in "ab"][: compare.cores()]
    for folder in runs:
        wait_for(folder / "log.jsonl", '"step": 20', process)
    os.kill(process.pid, signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if signum == signal.SIGKILL else 130), out + err
    assert "Traceback" not in err and (signum == signal.SIGKILL or "compare.py a.toml b.toml" in out)
    for folder in runs:
        for _ in range(1000):  # where the parent died the runs stop by themselves
            if (folder / "last.pt").exists():
                break
            time.sleep(0.01)
        assert (folder / "last.pt").exists() and '"final"' not in (folder / "log.jsonl").read_text()
    time.sleep(0.5)
    process = launch(*args)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    assert json.loads(out.splitlines()[-1])["tokens"][1]["difference"] == 0
    assert all("resumed_at" in (folder / "log.jsonl").read_text() for folder in runs)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.2, 1.0])
def test_a_terminal_s_interrupt_while_processes_start_is_no_traceback(seconds):
    """It reaches all of them at once, those that import torch too."""
    args = [write(Path("a.toml"), max_iters=100_000), "--data=text.txt", "--seeds=2", "--rates=0", "--compile=off"]
    process = subprocess.Popen([sys.executable, str(ROOT / "compare.py"), *args], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    process.stdout.readline()
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "" and "to go on: python" in out


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_comparison(tmp_path):
    """At the next line that it would have got; the runs that are under way save."""
    files = [write(Path("a.toml"), max_iters=2), write(Path("b.toml"), max_iters=100_000)]
    process = launch(*files, "--data=text.txt", "--seeds=1", "--rates=0", "--compile=off", "--eval_interval=100000")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=100) == 1 and process.stderr.read() == ""


# ---- errors


@pytest.mark.parametrize("args, words", [
    ([], "nothing to compare: name configurations"), (["a.toml", "--equal=hours"], "equal='hours': use tokens, flops,"),
    (["a.toml", "--rates=2"], "rates=2: use 0, or 3 to"), (["a.toml", "--seeds=0"], "seeds=0: it must be at least 1"),
    (["a.toml", "--jobs=0"], "jobs=0"), (["a.toml", "--json=no/such/x.json"], "its folder does not exist"),
    (["a.toml", "--resume"], "--resume: this program does not read it"), (["planned.toml"], "plan=True of plann"),
    (["a.toml", "--profile=3"], "--profile: "), (["a.toml", "--max_seconds=5"], "max_seconds=5.0: give --equal=sec"),
    (["a.toml", "--learning_rate=0"], "learning_rate=0.0 of a: there is nothing around it to try"),
    (["a.toml", "--max_iters=0"], "max_iters=0 of a: nothing would be trained"), (["b.toml"], "b.toml' does not exist"),
    (["a.toml", "other.toml"], "val_fraction=0.2 of other: losses compare on one text only"),
    (["a.toml", "--out_dir=text.txt/x"], "out_dir='text.txt/x': Not a directory: choose a folder"),
    (["a.toml", "--out_dir=run"], "out_dir='run' holds a run of train.py"), (["a.toml", "--sedes=3"], "you mean seed"),
    (["a.toml", "--max_tokens=9", "--max_flops=9"], "one of them can end a run"),
    (["x" * 300], "xxx. does not exist"), (["a.toml", "--json=."], "json='.': it is no file"),
    (["a.toml", "--against=b"], "it is for stored comparisons"), (["a.toml", "--init_from=x"], "--init_from: this"),
    (["a.toml", "log.jsonl.toml"], "'log.jsonl' cannot be: rename it"), (["...toml"], "'..' cannot be: rename"),
    (["a.toml", "bf.toml"], "dtype='bfloat16' of bf: all runs are made alike: give --dtype"),
    (["long.toml", "--max_iters=5"], "max_iters=5: max_tokens=200 ends the run of long: leave one out, or set --max_"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(args, words, made):
    write(Path("a.toml"))
    write(Path("other.toml"), val_fraction=0.2)
    write(Path("planned.toml"), plan=True)
    write(Path("bf.toml"), dtype="bfloat16")
    write(Path("long.toml"), max_tokens=200)
    for name in ("log.jsonl.toml", "...toml"):
        write(Path(name))
    Path("run").mkdir()
    Path("run/last.pt").touch()
    with pytest.raises(UserError, match=words) as error:
        run(*args)
    assert "\n" not in str(error.value) and not made and not Path("out_compare").exists()


@pytest.mark.parametrize("content", [None, "", "[1]", "{}", '{"bases": {"tokens": {"rows": [{}]}}}', '{"tables": {}}'])
def test_what_is_no_stored_comparison(content):
    if content is not None:
        Path("x.json").write_text(content)
    words = "'x.json' is no JSON of a comparison" if content is not None else "'x.json' cannot be read: No such file"
    with pytest.raises(UserError, match=words):
        compare.main(["x.json"])


@pytest.mark.parametrize("args, words", [
    (["x.json", "--foo"], "'--foo': stored comparisons take nothing but --against=CONTESTANT: leave it out"),
    (["x.json", "a.toml"], "'x.json'"), (["a.toml", "x.json"], "'x.json'"), (["x.json", "--against="], "against=''"),
])  # fmt: skip
def test_a_stored_comparison_takes_nothing_else(args, words):
    with pytest.raises(UserError, match=words):
        compare.main(args)


def test_a_folder_and_a_file_may_stand_behind_their_options(made, capsys):
    """They look like stored comparisons, once they are there."""
    args = [write(Path("a.toml")), "--seeds=1", "--rates=0", "--out_dir", "oc", "--json", "x.json", "--data=text.txt"]
    for _ in range(2):
        assert compare.main([*args, "--jobs=1", "--cache_dir=cache"]) == 0
    assert len(made) == 1 and Path("oc/config.toml").exists() and Path("x.json").exists()
    with pytest.raises(SystemExit):
        compare.main(["oc", "--help"])
    assert "usage" in capsys.readouterr().out.lower()
    monkey = json.loads(Path("x.json").read_text()) | {"reference": "nobody"}
    Path("x.json").write_text(json.dumps(monkey))
    with pytest.raises(UserError, match="'x.json' is no JSON of a comparison"):
        compare.main(["x.json"])


def test_files_of_others_are_not_overwritten(made):
    """A contestant's own folder, and one of a run that has lost its last.pt."""
    for name in ("exp", "run"):
        Path(name).mkdir()
    args = ["--seeds=1", "--rates=0"]
    own = write(Path("exp/config.toml"))
    write(Path("run/config.toml"))
    Path("run/log.jsonl").write_text('{"kind": "header", "config": {}}\n')
    before = [path.read_bytes() for path in (Path(own), Path("run/config.toml"), Path("run/log.jsonl"))]
    for out in ("exp", "run"):
        with pytest.raises(UserError, match=f"out_dir='{out}' holds a run of train.py, or other files"):
            run(own, *args, f"--out_dir={out}")
    assert before == [path.read_bytes() for path in (Path(own), Path("run/config.toml"), Path("run/log.jsonl"))]
    assert not made


def test_checkpoints_that_were_kept_stay(made):
    args = [write(Path("a.toml")), "--rates=0"]
    run(*args, "--seeds=1", "--keep")
    kept = sorted(Path("out_compare").rglob("*.pt"))
    run(*args, "--seeds=2")
    assert sorted(Path("out_compare").rglob("*.pt")) == kept and len(kept) == 2 and len(made) == 2


def test_a_tokenizer_that_has_changed_makes_new_runs(made, monkeypatch):
    """Of the same name: nothing that was trained on its ids counts."""
    args = [write(Path("a.toml")), "--seeds=1", "--rates=0"]
    run(*args)
    monkeypatch.setattr(compare, "tokenizer_hash", lambda enc: "another")
    monkeypatch.setattr(train, "tokenizer_hash", lambda enc: "another")
    run(*args)
    assert len(made) == 2


def test_no_two_contestants_have_one_name(made):
    Path("x").mkdir()
    files = [write(Path("a.toml")), write(Path("x/a.toml"), n_layer=2), write(Path("a~2.toml"), pattern="M")]
    rows = run(*files, "--seeds=1", "--rates=0")["bases"]["tokens"]["rows"]
    assert [row["contestant"] for row in rows] == ["a", "a~2", "a~2~2"]
    assert len({row["mean"] for row in rows}) == 3 and len(made) == 3


def test_what_each_one_is_evaluated_on_is_told(made):
    files = [write(Path("a.toml"), batch_size=2), write(Path("b.toml"), batch_size=7, max_iters=2)]
    result = run(*files, "--seeds=2", "--rates=0", "--final_eval_iters=3")
    assert [result["contestants"][name]["validation_tokens"] for name in "ab"] == [96, 160]
    assert "b is evaluated on 160 tokens, a on 96" in result["notes"]


def test_a_file_may_need_an_option_to_be_complete(made):
    """As train.py has it: neither of these can be built alone."""
    files = [write(Path("a.toml"), router="random"), write(Path("b.toml"), n_head=3, n_kv_head=3, router="random")]
    found = compare.configure([*files, "--mod_capacity=0.5", "--dim=24", "--n_layer=2"])[2]
    assert [it.config.dim for it in found] == [24, 24] and {it.warmup for it in found} == {2 / 6}


def test_seconds_beside_tokens(made):
    """A length of its own for each basis."""
    args = [write(Path("a.toml")), "--seeds=1", "--rates=0", "--equal=tokens,seconds", "--max_tokens=64"]
    result = run(*args, "--max_seconds=0.05")
    assert result["bases"]["tokens"]["rows"][0]["tokens"] == 64
    assert ["--max_seconds=0.05" in argv for argv, _ in made] == [False, True]
    with pytest.raises(UserError, match="max_seconds=-1.0: it must not be negative"):
        run(*args, "--max_seconds=-1")


def test_it_starts_its_own_processes(made, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="without torchrun"):
        run(write(Path("a.toml")))


def test_two_comparisons_do_not_share_a_folder(made):
    Path("out_compare").mkdir()
    with compare.open_log(Path("out_compare")), pytest.raises(UserError, match="another command is at work there"):
        run(write(Path("a.toml")))


def test_every_key_has_its_comment():
    assert all(field_comments(compare.CompareConfig).values())
    assert asdict(replace(compare.CompareConfig(), seeds=2))["seeds"] == 2
