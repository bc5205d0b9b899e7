"""The probes of diagnose.py: their texts are those of the protocol, attention solves them, what must fail fails, and a
measurement that was stopped goes on. Everything at a minute size."""

import json
import multiprocessing
import os
import re
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_plot import size

import diagnose
import plot
import probes
import stability
import train
from configurator import UserError
from model import HydraConfig
from probes import EVALUATION, Probe, RecallConfig, Variant, induction_texts, mqar_texts, train_probe
from train import TrainConfig
from trials import Team

FAST = ["--jobs=1", "--max_iters=4", "--check_every=2", "--rates=2", "--seeds=2", "--batch_size=4", "--dim=16",
        "--n_head=2", "--n_kv_head=1", "--pairs=1,2", "--vocab_size=16", "--block_size=8"]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- texts

@pytest.mark.parametrize("noise", [False, True])
def test_mqar_obeys_its_protocol(noise):
    """Keys and values without replacement from their halves of the vocabulary, every key once more behind them at an
    even place, labelled there with its value; nothing else is labelled."""
    pairs, vocab, tokens = 5, 32, 24
    texts, answers = mqar_texts(200, pairs, vocab, tokens, noise, torch.Generator().manual_seed(0))
    for text, answer in zip(texts.tolist(), answers.tolist(), strict=True):
        keys, values = text[0 : 2 * pairs : 2], text[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert set(keys) <= set(range(1, vocab // 2)) and set(values) <= set(range(vocab // 2, vocab))
        asked = [t for t in range(tokens) if answer[t] != -1]
        assert len(asked) == pairs and all(t >= 2 * pairs and t % 2 == 0 for t in asked)
        assert {text[t]: answer[t] for t in asked} == dict(zip(keys, values, strict=True))
        if not noise:
            assert set(Counter(text)[key] for key in keys) == {2} and text.count(0) == tokens - 3 * pairs
    assert noise == bool((texts[:, 2 * pairs + 1 :: 2] != 0).any())
    assert {key for text in texts.tolist() for key in text[0 : 2 * pairs : 2]} == set(range(1, vocab // 2))
    assert {value for text in texts.tolist() for value in text[1 : 2 * pairs : 2]} == set(range(vocab // 2, vocab))


def test_the_gaps_of_mqar_follow_a_power_law():
    """p(gap) ~ gap^-0.99: of a single pair, the place of its question; and as many pairs as slots take all of them."""
    _, answers = mqar_texts(20000, 1, 8, 18, False, torch.Generator().manual_seed(1))
    counts = (answers != -1).sum(0)[2::2].double()
    expected = torch.arange(1, 9) ** -0.99
    torch.testing.assert_close(counts / 20000, expected / expected.sum(), atol=0.01, rtol=0, check_dtype=False)
    _, answers = mqar_texts(10, 4, 16, 16, False, torch.Generator().manual_seed(1))
    assert ((answers != -1).nonzero()[:, 1].view(10, 4) == torch.tensor([8, 10, 12, 14])).all()


def test_induction_asks_for_what_followed_the_marker():
    texts, answers = induction_texts(300, 8, 10, torch.Generator().manual_seed(0))
    for text, answer in zip(texts.tolist(), answers.tolist(), strict=True):
        first = text.index(7)
        assert text.count(7) == 2 and text[-1] == 7
        assert answer == [-1] * 9 + [text[first + 1]] and answer[-1] != 7
    assert {text.index(7) for text in texts.tolist()} == set(range(8))


def probe(variant, task="mqar", pairs="2", seed=0, **run):
    """A run of recall at a size that is solved in seconds."""
    shape = {"mqar": {"vocab_size": 16, "block_size": 8}, "induction": {"vocab_size": 8, "block_size": 16}}[task]
    config = HydraConfig(dim=32, n_head=2, n_kv_head=1, n_layer=2, rope_theta=100.0, compression=2)
    changes = {"learning_rate": 4e-3, "warmup_iters": 20, "batch_size": 32, "max_iters": 400}
    return Probe(task, variant, replace(config, **shape, **variant.changes), TrainConfig(**changes | run, seed=seed),
                 RecallConfig(pairs=pairs, check_every=20))  # fmt: skip


A = Variant("A", {"pattern": "A"})


def test_texts_are_fresh_and_the_evaluation_has_its_own():
    seen = [probe(A, pairs="1,2", seed=seed).batch(step)[0] for seed in (0, 1) for step in (1, 2, 3)]
    seen += [torch.cat([probe(A).texts(16, pairs, EVALUATION, 0)[0] for pairs in (1, 2)])]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert torch.equal(probe(A, pairs="1,2", seed=1).batch(3)[0], seen[5])
    idx, answers = probe(A, pairs="1,2").batch(1)
    assert idx.shape == (32, 8) and (answers != -1).sum(1).tolist() == [1] * 16 + [2] * 16
    with pytest.raises(UserError, match="below 2\\*\\*63"):
        TrainConfig(seed=EVALUATION)


# ---- what is solved, and what is not

@pytest.mark.slow
@pytest.mark.parametrize("task", ["mqar", "induction"])
def test_attention_solves_it_and_what_must_fail_fails(task):
    """MHA reaches 99%, with the steps to it; without attention's output, with one layer, with a short window it does
    not come near."""
    found = train_probe(probe(A, task))
    assert min(found["accuracy"].values()) >= 0.99 and found["steps_to_99"] <= found["steps"] <= 400
    steps = found["steps"]
    for variant in probes.variants_of(task)[-3:]:
        assert variant.control
        if variant.name.startswith("window"):
            variant = variant._replace(changes=variant.changes | {"window": 2})
        found = train_probe(probe(variant, task, max_iters=steps))
        assert max(found["accuracy"].values()) < 0.7, variant.name


def test_zeroed_attention_is_caught():
    """A step of such a model gives attention no gradient; its row says that it fails, and one that passes is named."""
    blind = probes.variants_of("mqar")[-1]
    model = probes.probe_model(probe(blind).config, blind.blind, 0)
    model(*probe(blind).batch(1)).loss.backward()
    assert all(block.attn.qkv.weight.grad.abs().sum() == 0 for block in model.blocks)
    run = {"accuracy": {"1": 1.0, "2": 0.2}, "steps_to_99": None}
    assert probes.row_of(probe(blind, pairs="1,2"), [run])["verdict"] == "fails, as it must"
    run["accuracy"]["2"] = 0.9
    assert "measures nothing" in probes.row_of(probe(blind, pairs="1,2"), [run])["verdict"]


def test_a_probe_has_no_mlp_and_matrices_of_a_width():
    """Standard deviations: a matrix as large for its width as 0.02 is for 768."""
    model = probes.probe_model(HydraConfig(vocab_size=64, block_size=8, dim=64, n_layer=2, pattern="A"), False, 0)
    x = torch.randn(2, 8, 64)
    assert all((block.mlp(x) == 0).all() for block in model.blocks) and not any(
        "mlp." in name for name, _ in model.named_parameters())  # fmt: skip
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02 * (768 / 64) ** 0.5, rel=0.05)


def test_the_best_rate_is_the_fastest_or_else_the_most_accurate():
    def run(steps, accuracy):
        return {"steps_to_99": steps, "accuracy": {"1": accuracy}}

    several = [probe(A, learning_rate=rate) for rate in (1e-3, 2e-3, 4e-3)]
    for runs, rate in [((run(None, 0.98), run(300, 0.99), run(200, 0.99)), 4e-3),
                       ((run(None, 0.98), run(300, 0.99), run(None, 0.97)), 2e-3),
                       ((run(None, 0.5), run(None, 0.9), run(None, 0.6)), 2e-3)]:  # fmt: skip
        found = dict(zip((it.key for it in several), runs, strict=True))
        assert probes.best_of(several, found).run.learning_rate == rate


def test_a_rate_that_is_slower_than_another_is_given_up(monkeypatch):
    """At the step at which the other one had reached 99%; one that has reached it by then goes on as if alone."""
    for seen, steps in [([0.5, 0.5, 0.98], 6), ([0.5, 0.99, 0.99, 0.995], 8), ([0.5, 0.5, 0.99, 0.995], 8)]:
        seen = iter(seen)
        monkeypatch.setattr(probes, "is_poor", lambda model, test: False)
        monkeypatch.setattr(probes, "accuracy", lambda model, test, seen=seen: next(seen))
        it = probe(A, max_iters=20)
        it = it._replace(options=replace(it.options, check_every=2))
        assert train_probe(it, until=6)["steps"] == steps
    calls = []

    def fake(it, until=0):
        calls.append((it.variant.name, it.run.learning_rate, it.run.seed, until))
        steps = 10 if it.variant.name == "A" else None
        return {"task": "mqar", "accuracy": {"1": 1.0, "2": 1.0}, "steps_to_99": steps, "steps": 4, "seconds": 1.0}

    monkeypatch.setattr(probes, "train_probe", fake)
    diagnose.main(["recall", *FAST, "--rates=3", "--tasks=mqar", "--variants=A,G", "--seeds=1"])
    assert calls[:6] == [("A", 2e-3, 1337, 0), ("G", 2e-3, 1337, 0), ("A", 1e-3, 1337, 10), ("A", 4e-3, 1337, 10),
                         ("G", 1e-3, 1337, 0), ("G", 4e-3, 1337, 0)]  # fmt: skip


def test_a_quarter_of_the_texts_can_show_that_a_model_is_poor(monkeypatch):
    """As all of them would say, with fewer forwards where it is clear."""
    looked = []

    def counted(model, batch):
        looked.append(len(batch[0]))
        return batch[1].double().mean().item()

    monkeypatch.setattr(probes, "accuracy", counted)
    for wrong_there, wrong_elsewhere, poor, looks in [
            (0, 1, False, [50, 200]), (2, 0, False, [50, 200]), (1, 2, True, [50, 200]), (3, 0, True, [50])]:
        looked.clear()
        answers = torch.ones(200, 1)
        answers[:wrong_there] = answers[100 : 100 + wrong_elsewhere] = 0
        assert probes.is_poor(None, (torch.zeros(200, 1), answers)) == poor == (counted(0, (answers,) * 2) < 0.99)
        assert looked[:-1] == looks


def test_any_pattern_can_be_asked_for():
    """In the order that was asked for, behind those that have a name; with as many layers as letters."""
    found = probes.chosen_probes({}, RecallConfig(tasks="mqar", variants="LMC,CCCCC,A,MC"))
    assert [(it.variant.name, it.config.layers) for it in found] == [
        ("A", "AA"), ("MC", "MC"), ("LMC", "LMC"), ("CCCCC", "CCCCC")]  # fmt: skip


def test_every_letter_is_probed_plain_and_fair():
    names = [variant.name for variant in probes.variants_of("mqar")]
    assert {"A", "A fair", "C", "L", "L fair", "MC", "MMCCCLML", "one layer", "window 4", "no attention"} < set(names)
    assert "window 8" in [variant.name for variant in probes.variants_of("induction")]
    for variant in probes.variants_of("mqar"):
        fair = {"qk_norm": True, "short_conv": 3}.items() <= variant.changes.items()
        assert fair == variant.name.endswith(" fair") and set(variant.changes["pattern"]) <= set(variant.name + "AM")
        HydraConfig(**probes.SHAPE | variant.changes)


# ---- the command

def numbers(path):
    """A result without what depends on the clock."""
    found = json.loads(Path(path).read_text())
    return [{name: value for name, value in run.items() if name != "seconds"} for run in found["runs"].values()], [
        row for row in found["rows"]]  # fmt: skip


def test_recall_goes_on_where_it_stopped(capsys, monkeypatch):
    monkeypatch.setattr(probes, "FURTHEST", 2)  # rates
    args = ["recall", *FAST, "--variants=A,one layer"]
    assert diagnose.main([*args, "--json=whole.json"]) == 0
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert [(row["task"], row["variant"]) for row in last["rows"]] == [
        (task, name) for task in ("mqar", "induction") for name in ("A", "one layer")]
    assert "10 runs of up to 4 steps" in out and "10 of 10" in out and "fails, as it must" in out
    assert "texts of 8 tokens, 16 words, width 16" in out and "8192 words" in out  # ours and the published
    real, calls = probes.train_probe, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(probes, "train_probe", interrupted)
    assert diagnose.main([*args, "--json=parts.json"]) == 130
    assert len(json.loads(Path("parts.json").read_text())["runs"]) == 7
    out = capsys.readouterr().out
    assert "7 runs are in parts.json; to go on: python " in out and "diagnose.py recall" in out
    monkeypatch.setattr(probes, "train_probe", real)
    assert diagnose.main([*args, "--json=parts.json"]) == 0
    assert numbers("parts.json") == numbers("whole.json")
    capsys.readouterr()
    assert diagnose.main([*args, "--json=parts.json"]) == 0 and " of 10 |" not in capsys.readouterr().out
    with pytest.raises(UserError, match="other values of dim: name another file"):
        diagnose.main([*args, "--json=parts.json", "--dim=32"])


def test_a_run_ends_when_all_numbers_of_pairs_are_solved(monkeypatch):
    """The most pairs are looked at first; the end has every number's accuracy, in the order of the numbers."""
    # step 2: the most pairs fail; step 4: they pass, others do not; step 6: all pass
    poor, seen = iter([True, False, False]), iter([0.9, 0.99, 1.0, 1.0])
    monkeypatch.setattr(probes, "is_poor", lambda model, test: next(poor))
    monkeypatch.setattr(probes, "accuracy", lambda model, test: next(seen))
    it = probe(A, pairs="1,2", max_iters=20)
    found = train_probe(it._replace(options=replace(it.options, check_every=2)))
    assert found["steps_to_99"] == found["steps"] == 6 and found["accuracy"] == {"1": 1.0, "2": 1.0}
    poor, seen = iter([True]), iter([0.75, 0.5])
    monkeypatch.setattr(probes, "accuracy", lambda model, test: next(seen))
    it = probe(A, pairs="1,2", max_iters=4)
    found = train_probe(it._replace(options=replace(it.options, check_every=2)))
    assert (found["steps_to_99"], found["steps"], found["accuracy"]) == (None, 4, {"1": 0.75, "2": 0.5})


@pytest.mark.slow
def test_recall_in_processes_finds_the_same():
    args = ["recall", *FAST, "--variants=A", "--tasks=mqar"]
    diagnose.main([*args, "--json=one.json"])
    diagnose.main([*args, "--json=two.json", "--jobs=2"])
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    assert one["rows"] == two["rows"] and one["runs"].keys() == two["runs"].keys()
    with pytest.raises(UserError, match=r"x \| rate 1: its process was killed or failed: the same command goes on"):
        list(probes.made([probes.Order("x | rate 1", partial(os._exit, 9), 1.0)] * 3, 2))
    began = time.monotonic()
    with pytest.raises(ValueError, match="invalid literal"):  # what others are in is not waited for
        list(probes.made([probes.Order("long", partial(time.sleep, 60), 1.0),
                          probes.Order("wrong", partial(int, "x"), 1.0)], 2))  # fmt: skip
    assert time.monotonic() - began < 30 and not multiprocessing.active_children()


@pytest.mark.parametrize("args, words", [
    ([], "no subject: name one of recall, stability, checkpoint, report"), (["--jobs=2"], "no subject"), ([""], "''"),
    (["recal"], "'recal' is no subject: use recall, stability, checkpoint, report"),
    (["recall", "--pairs=0"], "pairs='0': give whole numbers"), (["recall", "--pairs=2,"], "give whole numbers"),
    (["recall", "--pairs=16"], "block_size=32: 16 pairs need block_size to be 64"),
    (["recall", "--pairs=4", "--vocab_size=8"], "vocab_size=8: 4 pairs need vocab_size to be 10"),
    (["recall", "--tasks=copy"], "tasks='copy': use mqar, induction"),
    (["recall", "--variants=A,B"], "variants: 'B' is none of mqar,induction: use A, A fair"),
    (["recall", "--variants=no"], "variants: 'no' is none of mqar,induct"), (["recall", "--json=."], "it is no file"),
    (["recall", "--variants=window 8", "--tasks=mqar"], "variants: 'window 8' is none of mqar: use A, A fair"),
    (["recall", "--pattern=G"], "--pattern: this program does not read"), (["stability", "--json=."], "it is no file"),
    (["recall", "--data=x.txt"], "--data: this program does not read it"), (["recall", "--seeds=0"], "seeds=0"),
    (["recall", "--json=no/such.json"], "its folder does not exist"), (["recall", "--sedes=1"], "unknown key"),
    (["stability", "--high=1"], "high=1.0: choose a factor above 1"),
    (["recall", "--max_iters=0"], "max_iters=0: nothing would be trained"),
    (["recall", "--tasks=induction", "--block_size=2"], "block_size=2: induction needs block_size to be 4"),
    (["recall", "--tasks=induction", "--vocab_size=1"], "vocab_size=1: induction needs vocab_size to be 4"),
    (["recall", "--tasks=induction", "--vocab_size=3000000000"], "an evaluation needs 98,304.0 GB, of which there"),
    (["stability", "--max_iters=0"], "max_iters=0: nothing would be trained"),
    (["stability", "--learning_rate=0"], "learning_rate=0.0: there is nothing to be high beside"),
    (["stability", "--profile=3"], "--profile: this program does not read it"),
])  # fmt: skip
def test_errors_are_one_line(args, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        diagnose.main(args)
    assert "\n" not in str(error.value) and not list(Path().iterdir())


@pytest.mark.parametrize("content", ["", "[1]", '{"runs": 3}', '{"subject": "bench"}'])
def test_a_file_of_another_kind_is_left_as_it_is(content):
    Path("x.json").write_text(content)
    with pytest.raises(UserError, match="no result of recall: name another"):
        diagnose.main(["recall", *FAST, "--json=x.json"])
    assert Path("x.json").read_text() == content


def test_help_names_the_subjects(capsys):
    assert diagnose.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"- {subject}" in out for subject in diagnose.SUBJECTS)
    with pytest.raises(SystemExit):
        diagnose.main(["recall", "--help"])
    out = capsys.readouterr().out
    assert "--pairs=" in out and out.startswith("usage: python diagnose.py recall [config/x.toml ...]")
    assert all(f"--{key}" in out for key in ("dim=64", "max_iters=1000", 'out_dir="out_recall"')) and (
        "--pattern" not in out and "--resume" not in out)  # fmt: skip
    with pytest.raises(SystemExit):
        diagnose.main(["checkpoint", "--help"])
    assert capsys.readouterr().out.startswith("usage: python diagnose.py checkpoint PATH [--key=value ...]")


def test_another_rate_is_tried_where_none_solves_it_and_the_best_is_at_an_edge():
    several = [probe(A).at(rate, 0) for rate in (1e-3, 2e-3, 4e-3)]

    def further(several, accuracies, solved=None):
        runs = [{"steps_to_99": solved, "accuracy": {"2": accuracy}} for accuracy in accuracies]
        return probes.further(several, dict(zip((it.key for it in several), runs, strict=True)))

    assert further(several, (0.1, 0.2, 0.3)) == 8e-3 and further(several, (0.3, 0.2, 0.1)) == 5e-4
    assert further(several, (0.1, 0.3, 0.2)) is further(several, (0.1, 0.2, 0.3), solved=7) is None
    control = [it._replace(variant=probes.variants_of("mqar")[-1]) for it in several]
    assert further(control, (0.1, 0.2, 0.3)) is None
    more = several + [probe(A).at(rate, 0) for rate in (8e-3, 16e-3, 32e-3)]
    assert further(more, range(6)) is None


def test_an_extended_search_is_measured_and_goes_on(capsys):
    args = ["recall", *FAST, "--variants=A", "--tasks=mqar", "--json=x.json", "--seeds=1"]
    assert diagnose.main(args) == 0
    first = json.loads(Path("x.json").read_text())
    rates = {run["rate"] for run in first["runs"].values()}
    best = first["rows"][0]["rate"]
    assert len(rates) == probes.FURTHEST or min(rates) < best < max(rates)
    capsys.readouterr()
    assert diagnose.main([*args[:-1], "--seeds=2"]) == 0  # one run more, and it says when it began
    second = json.loads(Path("x.json").read_text())
    assert len(second["runs"]) == len(first["runs"]) + 1 and second["rows"][0]["rate"] == best
    assert (second["date"], second["command"]) == (first["date"], first["command"])


def test_the_accuracy_is_of_texts_that_no_run_trains_on(monkeypatch):
    """Every text of an evaluation has the evaluation's own seed."""
    seeds, real = [], probes.texts
    monkeypatch.setattr(probes, "texts", lambda *args: seeds.append(args[5:]) or real(*args))
    train_probe(probe(A, pairs="1,2", max_iters=3, seed=5))
    tested = [seed for seed, step in seeds if step == 0]
    assert tested == [EVALUATION] * 2 and {seed for seed, step in seeds if step > 0} == {5}


def test_a_variant_of_one_task_is_probed_alone():
    options = probes.RecallConfig(variants="window 8,C")
    assert [(it.task, it.variant.name) for it in probes.chosen_probes({}, options)] == [
        ("mqar", "C"), ("induction", "C"), ("induction", "window 8")]  # fmt: skip


# ---- stability

def test_each_fix_is_tried_alone():
    found = stability.variants()
    default = HydraConfig()
    assert list(found) == ["before", "gain alone", "norm alone", "alpha alone", "clip alone", "after"]
    assert found["after"] == {} and found["before"] == {
        "qk_gain": 0.5, "ccqa_norm": False, "pre_out_norm": False, "alpha": "one", "grad_clip": 0.0}
    assert all(value != getattr(default, name, TrainConfig.grad_clip) for name, value in found["before"].items())
    fixed = [found["before"].keys() - found[f"{fix} alone"].keys() for fix in stability.FIXES]
    assert set.union(*fixed) == set(found["before"]) and sum(map(len, fixed)) == len(found["before"])


def stability_args(folder):
    return ["stability", f"--data={folder}", "--tokenizer=bytes", "--vocab_size=257", "--dim=16", "--n_head=2",
            "--n_kv_head=1", "--n_layer=4", "--pattern=MCLA", "--block_size=16", "--max_iters=4", "--warmup_iters=1",
            "--log_layers=2", "--log_interval=2", "--final_eval_iters=1", "--compression=2"]  # fmt: skip


def in_this_process(team, orders, jobs):
    """`Team.train`, without its processes."""
    for trial, argv in orders:
        assert train.main(argv) == 0
        yield trial, 1.0


def test_stability_measures_real_runs(folder, capsys, monkeypatch, quick):
    """Every variant at both rates, by the logs of train.py: the layers' norms are those of the gradient before the
    clip. The same command makes no run again."""
    monkeypatch.setattr(Team, "train", in_this_process)
    args = [*stability_args(folder), "--high=10"]
    assert diagnose.main([*args, "--json=s.json"]) == 0
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [(row["variant"], row["rate"]) for row in rows] == [
        (name, rate) for name in stability.variants() for rate in (1.4e-3, 1.4e-2)]
    assert "12 of 12 runs of train.py" in out
    found = json.loads(Path("s.json").read_text())
    for row, it in zip(rows, found["runs"], strict=True):
        (run,) = it["runs"]
        assert run["steps"] == [2, 4] and [step for step, _ in run["losses"]] == [1, 2, 4]
        layers = {"embed", "norm", *(f"blocks.{i}" for i in range(4))}
        assert layers == set(run["norms"]) == set(row["largest_of_layers"])
        log = Path("out_stability", it["variant"].replace(" ", "-"), f"rate-{it['rate']:g}", "seed-1337", "log.jsonl")
        records = [json.loads(line) for line in log.read_text().splitlines()]
        norms = [record["grad_norm"] for record in records if record["kind"] == "step" and record["step"] > 1]
        assert stability.norms_of(run) == pytest.approx(norms, rel=1e-5)
        assert row["largest_norm"] == pytest.approx(max(norms)) and row["clipped"] == (
            1.0 if row["variant"] in ("clip alone", "after") else 0.0)  # all norms are above 1 in the first steps
        assert row["diverged"] == 0 and not run["diverged"] and row["loss"] < run["start"]

    def fail(*_):
        raise AssertionError("a run was made again")

    monkeypatch.setattr("train.main", fail)
    assert diagnose.main([*args, "--json=again.json"]) == 0
    assert json.loads(Path("again.json").read_text())["rows"] == rows


def test_a_divergence_is_counted():
    start = {"kind": "evaluation", "step": 0, "val_loss": 5.0}
    layers = {"kind": "layers", "step": 1, "layers": {"embed": None, "blocks.0": 3.0}}
    records = [start, {"kind": "step", "step": 1, "loss": 4.9, "clipped": 1.0},
               {"kind": "step", "step": 4, "loss": None, "clipped": 0.0}, layers,
               {"kind": "skipped", "step": 1, "skipped": "loss"}]  # fmt: skip
    for loss, diverged in ((None, True), (5.1, True), (4.0, False)):
        run = stability.found_in(records, "val_loss", stability.Outcome(loss, 1.0, 1, []))
        assert run["diverged"] == diverged and run["skipped"] == 1 and stability.norms_of(run) == []
        row = stability.row_of("before", 0.1, [run])
        assert row["diverged"] == int(diverged) and row["clipped"] == 0.25 and row["largest_norm"] is None
        assert row["largest_of_layers"] == {"embed": None, "blocks.0": 3.0}
        assert all(isinstance(line, str) for line in stability.stability_table([row]))


# ---- pictures

def recall_result():
    rows = [{"task": task, "variant": name, "control": name == "one layer", "accuracy": accuracy,
             "steps_to_99": [None, 100]}
            for task, accuracy in (("mqar", {"2": 1.0, "4": 0.5}), ("induction", {"1": 0.9}))
            for name in ("A", "A fair", "MC", "one layer")]  # fmt: skip
    return {"subject": "recall", "rows": rows}


def stability_result():
    run = {"diverged": True, "steps": [1, 2], "norms": {"embed": [1, 2], "blocks.0": [1.0, None], "blocks.1": [2, 3]}}
    config = {"pattern": "MC", "n_layer": 2}
    return {"subject": "stability", "config": config, "runs": [{"variant": name, "rate": rate, "runs": [run]}
                                             for name in ("before", "after") for rate in (0.1, 1.0)]}  # fmt: skip


@pytest.mark.parametrize("result, pixels, axes", [(recall_result, (1100, 900), 4), (stability_result, (1100, 600), 4)])
def test_results_are_drawn(result, pixels, axes, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="charts are optional: pip install matplotlib")
    image = pytest.importorskip("matplotlib.image")
    drawn, real = [], figure.Figure.savefig

    def keep(self, *args, **options):
        drawn.append(self)
        return real(self, *args, **options)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    Path("x.json").write_text(json.dumps(result()))
    assert plot.main(["x.json", "--out=x.png"]) == 0
    assert size(Path("x.png")) == pixels and image.imread("x.png").std() > 0.05
    assert len(drawn[0].axes) == axes
    left, right = drawn[0].axes[:2]
    labels = [line.get_label() for line in left.lines]
    assert labels[:2] == (["2 pairs", "4 pairs"] if result is recall_result else ["layer 0, M", "layer 1, C"])
    if result is recall_result:  # a mark for each number of pairs, a dot for each seed, a row for each variant
        assert [(*line.get_xdata(), *line.get_ydata()) for line in left.lines] == [
            (x, y) for y in range(4) for x in (1.0, 0.5)]  # fmt: skip
        assert [list(line.get_xdata()) for line in right.lines] == [[100]] * 4
        names = ["A", "A fair", "MC", "one layer"]
        assert all([text.get_text() for text in axes.get_yticklabels()] == names for axes in (left, right))
        assert not right.texts and "mqar" in left.get_xlabel() and "induction" in drawn[0].axes[3].get_xlabel()
