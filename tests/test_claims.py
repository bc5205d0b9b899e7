"""The report that answers an older one: what is counted follows closed formulas, what was measured is read from files,
and what was not says so with its command."""

import json
import re

import formulas
import pytest

import claims
from configurator import UserError


def measured(folder, claim: str) -> list[dict]:
    """The rows of the claim that begins so."""
    return [row for row in claims.report(claims.read_results(folder)) if row["claim"].startswith(claim)]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_what_is_counted_follows_the_formulas(tmp_path):
    """Of parameters, states and FLOPs, with nothing stored."""
    (row,) = measured(tmp_path, "Small / Medium")
    counts = [formulas.count_params(claims.shipped(name)) / 1e6 for name in ("small", "medium", "large")]
    assert numbers(row["measured"]) == pytest.approx(counts, abs=0.05)
    small, D, H, G = claims.shipped("small"), 768, 12, 3
    (row,) = measured(tmp_path, '"KV-cache')
    kept = {"C": 2 * G * 16, "M": 2 * D // H, "L": D // 2 + 16}  # K = 16 in CCQA and for MLA's shared key
    assert numbers(row["measured"]) == pytest.approx([100 * (1 - n / (2 * D)) for n in kept.values()], abs=0.01)

    def trunk(pattern, T):
        config = claims.replace(small, pattern=pattern)
        return formulas.flops_per_token(config, T) - 2 * D * config.vocab_size

    (row,) = measured(tmp_path, "FLOPs \"62%")
    parts = [100 * trunk("C", T) / trunk("A", T) for T in (512, 1024, 8192)]
    assert numbers(row["measured"]) == pytest.approx(parts, abs=0.05)
    (row,) = measured(tmp_path, "FLOPs \"37.5%")
    parts = [100 * trunk(small.pattern, T) / trunk("A", T) for T in (512, 1024, 8192)]
    assert numbers(row["measured"])[:3] == pytest.approx(parts, abs=0.05)


def test_nothing_is_claimed_that_was_not_measured(tmp_path, capsys):
    """Without results every claim that cannot be counted says so, and how it would be measured."""
    rows = claims.report(claims.read_results(tmp_path / "none"))
    assert [row["claim"] for row in rows] == [claim.claim for claim in claims.CLAIMS]
    for row in rows:
        counted = row["command"] == "python diagnose.py report"
        assert (row["measured"] is not None) == counted and row["command"].startswith("python ")
    assert sum(row["measured"] is None for row in rows) > 6
    assert claims.main([f"--results={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["rows"] == rows
    assert printed.count("\n    not measured here\n") == sum(row["measured"] is None for row in rows)


STORED = {
    "compare": {"command": "python compare.py a.toml b.toml", "measure": "bits/byte", "reference": "mha",
                "contestants": {"mha": {"config": {"pattern": "A"}}, "hybrid": {"config": {"pattern": "MC"}}},
                "bases": {"tokens": {"rows": [
                    {"contestant": "mha", "verdict": "reference"},
                    {"contestant": "hybrid", "difference": -0.0123, "low": -0.02, "high": -0.004, "verdict": "better"},
                    {"contestant": "same", "difference": 0.1, "low": -1.0, "high": 1.0, "verdict": "not resolved"},
                    {"contestant": "lost", "difference": None, "low": None, "verdict": "not resolved"}]}}},
    "others": {"command": "python compare.py", "measure": "bits/byte", "reference": "c", "bases": {"flops": {"rows": [
        {"contestant": "d", "difference": 0.5, "low": 0.4, "high": 0.6, "verdict": "worse"}]}},
        "contestants": {"c": {"config": {"pattern": "C"}}}},
    "recall": {"subject": "recall", "command": "python diagnose.py recall --x=1", "rows": [
        {"task": "mqar", "variant": "A", "control": False, "accuracy": {"4": 1.0, "16": 0.75}, "verdict": "it does"},
        {"task": "mqar", "variant": "one", "control": True, "accuracy": {"4": 0.5, "16": 0.01}, "verdict": "fails"},
        {"task": "copy", "variant": "C", "control": False, "accuracy": {"8": 0.25}, "verdict": "it does not"}]},
    "stability": {"subject": "stability", "command": "python diagnose.py stability --x=2", "config": {"log_layers": 10},
                  "rows": [
        {"variant": "before", "rate": 0.01, "loss": 3.5, "diverged": 0, "clipped": 0.25, "median_norm": 2.0,
         "largest_norm": 7.0},
        {"variant": "after", "rate": 0.01, "loss": None, "diverged": 1, "clipped": 1.0, "median_norm": 3.0,
         "largest_norm": None}]},
    "speed": {"cpu": "a CPU", "gpu": None, "command": "python bench.py speed --x=3", "tables": {"speed": [
        {"level": "attention", "mix": "C", "B": 1, "T": 256, "dtype": "float32", "mode": "eager", "ms": 1.25},
        {"level": "attention", "mix": "C", "B": 4, "T": 512, "dtype": "float32", "mode": "eager", "ms": 9.0},
        {"level": "macro", "mix": "MC", "B": 1, "T": 256, "dtype": "float32", "mode": "eager", "ms": 7.5},
        {"level": "attention", "mix": "C", "B": 1, "T": 256, "dtype": "float32", "mode": "compiled", "ms": 0.5},
        {"level": "attention", "mix": "C", "B": 1, "T": 64, "mode": "eager", "left_out": "no time"}]}},
    "scaling": {"command": "python scaling.py --x=4", "tables": {"scaling": [
        {"level": "scaling", "mix": "scale_1", "routed_fraction": 0.5}]}},
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    for name, content in STORED.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "note.txt").write_text("{")
    return tmp_path


LEARNED = "held-out bits/byte against mha at equal tokens: better: hybrid -0.012 [-0.020, -0.004]; not resolved: same"
SHAKEN = "python diagnose.py stability --x=2"
TENTH = " (norms of every 10th step)"
TIMED = "python bench.py speed --x=3"


@pytest.mark.parametrize("claim, words, command", [
    ('"Learning improvement"', LEARNED, "python compare.py a.toml b.toml"),
    ('"Macro-block', "loss at rate 0.01: before 3.5; diverged at rate 0.01: before 0, after 1", SHAKEN),
    ('"Exploding', "largest norm at rate 0.01: before 7; clipped at rate 0.01: before 0.25, after 1" + TENTH, SHAKEN),
    ('"Gradient flow', "median norm at rate 0.01: before 2, after 3" + TENTH, SHAKEN),
    ("Speed of CCGQA", "ms at 256 tokens on a CPU: attention C float32 1.25", TIMED),
    ("Speed of macro", "ms at 256 tokens on a CPU: macro MC float32 7.50", TIMED),
    ("Scaling", "scale_1 (scaling): routed_fraction 0.5", "python scaling.py --x=4"),
])  # fmt: skip
def test_what_was_measured_is_read_with_its_command(results, claim, words, command):
    assert [(row["measured"], row["command"]) for row in measured(results, claim)] == [(words, command)]


def test_recall_is_told_at_the_most_pairs(results):
    found = [row["measured"] for row in measured(results, "What each attention")]
    assert found == ["mqar, 16 pairs: A 75.0%, one 1.0% (fails)", "copy, 8 pairs: C 25.0%"]


def test_every_result_of_a_kind_is_a_row(results):
    (results / "second.json").write_text(json.dumps(STORED["compare"] | {"command": "another"}))
    assert [row["command"] for row in measured(results, '"Learning')] == ["python compare.py a.toml b.toml", "another"]


def test_the_table_is_markdown(results, capsys):
    (results / "recall.json").write_text(json.dumps(STORED["recall"] | {"command": "python a | b"}))
    assert claims.main([f"--results={results}", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| the older report | measured here | by |" and lines[1] == "|---|---|---|"
    assert all(len(re.split(r"(?<!\\)\|", line)) == 5 for line in lines)
    assert any("`python a \\| b`" in line for line in lines)


@pytest.mark.parametrize("args, words", [
    (["--results=/no/such"], "results='/no/such': it is no folder"), (["--result=x"], "did you mean results"),
    (["--results=."], "cut.json: .*: measure it again, or delete it"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.json").write_text('{"tables": {')
    with pytest.raises(UserError, match=words) as error:
        claims.main(args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{"bases": 3, "contestants": {"a": 1}, "reference": "a"}, {"tables": [1]},
                                     {"subject": "recall", "rows": 7}, {"tables": {"speed": [3]}}])  # fmt: skip
def test_a_result_of_another_form_is_named(tmp_path, content):
    (tmp_path / "odd.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="odd.json: .*: measure it again, or delete it"):
        claims.report(claims.read_results(tmp_path))
