"""The bench measures what it says, its figures agree with each other, a table that fails costs no other, and it refuses
what it cannot do."""

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch

import bench
import contestants
from accounting import attention_flops, attention_state, count_params, flops_per_token, skeleton, state_bytes
from attention import GQA, KINDS, Kind
from bench import Bench, Contestant
from configurator import UserError
from generate import prefill
from model import Hydra, HydraConfig
from routing import layer_tokens

TINY = ["--dim=32", "--n_head=2", "--n_kv_head=1", "--compression=2", "--latent_head_dim=0", "--n_layer=3",
        "--pattern=MCL", "--vocab_size=64", "--mlp_ratio=1", "--prompt_tokens=8", "--new_tokens=4", "--context=16",
        "--rounds=2"]  # fmt: skip
CPU = torch.device("cpu")
LETTERS = "".join(KINDS)


@pytest.fixture
def quick(monkeypatch):
    """Tiny shapes, a machine that does 1 TFLOP/s in every dtype, and no processes: their own test starts some."""
    monkeypatch.setattr(bench, "SHAPES", ((2, 16),))
    monkeypatch.setattr(bench, "LENGTHS", (16, 32, 64))
    monkeypatch.setattr(bench, "MACRO_LENGTHS", (32,))
    monkeypatch.setattr(bench, "in_child", lambda call, *args: call(*args))
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e10)


@pytest.fixture
def run(quick, tmp_path):
    """Runs the bench at a tiny shape, returns what it stored."""

    def stored(*argv, code=0):
        path = tmp_path / "bench.json"
        assert bench.main([*argv[:1], *TINY, *argv[1:], f"--json={path}"]) == code
        return json.loads(path.read_text())

    return stored


def small(pattern="MCL", **changes) -> HydraConfig:
    shape = dict(dim=32, n_head=2, n_kv_head=1, compression=2, latent_head_dim=0, n_layer=3, vocab_size=64,
                 mlp_ratio=1.0, pattern=pattern)  # fmt: skip
    return HydraConfig(**shape | changes)


def a_bench(config, **more) -> Bench:
    return Bench(bench.BenchConfig(rounds=2), config, CPU, {"float32": 1e12}, **more)


def check(rows: list[dict]) -> None:
    """Every figure of a timed row follows from the others."""
    assert rows
    for row in rows:
        seconds, level, name = row["ms"] / 1e3, row["level"], row["mix"]
        assert row["tokens_per_s"] == pytest.approx(row["B"] * row["T"] / seconds)
        assert row["of_peak"] == pytest.approx(row["tflops"])  # of 1 TFLOP/s
        assert row["rounds"] == 2 and row["spread"] >= 0
        if level in ("attention", "macro", "block", "model"):
            assert 0 < row["forward_ms"] and row["forward_x_first"] > 0
            assert row.get("x_first", 1.0) == 1.0 if set(name) == {"A"} else row["x_first"] > 0
            config = small("C", compression=int(name[1:-1])) if name.endswith("x") else small(name)
            flops = contestants.step_flops(level, config, row["B"], row["T"])
            assert row["tflops"] == pytest.approx(flops / seconds / 1e12)
        if row["mode"] == "compiled":
            assert row["compile_s"] > 0 and row["x_eager"] > 0


# ---- figures


def test_a_ratio_is_of_the_row_to_the_other():
    seconds = {"A": 4.0, "C": 1.0, "Zaya": 2.0}
    times = {(name, "eager", "step"): [s, 3 * s] for name, s in seconds.items()}
    times |= {("A", "eager", "forward"): [1.0, 2.0], ("C", "eager", "forward"): [0.5, 1.0]}
    times |= {("C", "compiled", "step"): [0.5, 1.0], ("A", "compiled", "step"): [1.0, 4.0]}
    eager, compiled = (bench.figures(times, "C", mode) for mode in bench.MODES)
    assert eager["x_first"] == 0.25 and eager["x_zaya"] == 0.5
    assert eager["forward_ms"] == 750 and eager["forward_x_first"] == 0.5
    assert eager["backward_x_first"] == pytest.approx((0.5 / 3 + 2 / 10) / 2)  # 0.5 and 2 s, of 3 and 10
    assert "forward_ms" not in compiled and "backward_x_first" not in compiled
    assert "x_eager" not in eager and eager["ms"] == 2000 and eager["rounds"] == 2
    assert compiled["x_eager"] == pytest.approx((0.5 + 1 / 3) / 2) and compiled["x_first"] == 0.375
    alone = bench.figures({("C", "eager", "step"): [1.0]}, "C", "eager")
    assert alone["x_first"] == 1 and "x_zaya" not in alone


def test_turns_are_interleaved_after_one_that_is_not_counted():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = bench.in_turns(contestants, 3, CPU)
    assert calls == list("abababab") and {name: len(t) for name, t in seconds.items()} == {"a": 3, "b": 3}
    assert {len(t) for t in bench.in_turns(contestants, 9, CPU, limit=0).values()} == {1}
    assert bench.ratio([2.0, 9.0, 4.0], [1.0, 1.0, 2.0]) == 2.0
    assert bench.spread([1.0, 2.0, 3.0]) == 0.5 and bench.spread([1.0]) == 0


# ---- the tables


@pytest.mark.slow
def test_speed_has_every_subject_in_every_precision(run):
    result = run("speed", "--only=eager")
    rows = result["tables"]["speed"]
    check(rows)
    assert [(r["level"], r["mix"]) for r in rows if r["dtype"] == "bfloat16"] == [
        *(("attention", a) for a in LETTERS), *(("block", a) for a in LETTERS),
        ("macro", "AAA"), ("macro", "MCL"), ("model", "AAA"), ("model", "MCL")]  # fmt: skip
    assert len(rows) == 2 * (2 * len(LETTERS) + 4)
    assert result["torch"] == torch.__version__ and "dim = 32" in result["config"]
    assert result["cpu"] and result["threads"] >= 1 and result["seed"] == 1337 and result["date"] and result["git"]


@pytest.mark.slow
def test_a_letter_of_the_user_is_measured(run, monkeypatch):
    monkeypatch.setitem(KINDS, "X", Kind(lambda c: GQA(c, 1), 1.0, GQA.check, "one more"))
    rows = run("speed", "--only=eager attention float32")["tables"]["speed"]
    assert [r["mix"] for r in rows if "ms" in r] == [*LETTERS, "X"]
    rows = run("length", "--only=eager float32")["tables"]["length"]
    assert {r["mix"] for r in rows if r.get("T") == 64 and "ms" in r} == {*LETTERS, "X"}
    assert [r["mix"] for r in run("flops")["tables"]["flops"]] == [*LETTERS, "X", "hybrid"]


def test_a_letter_that_the_shape_cannot_have_is_left_out(run):
    result = run("speed", "--pattern=M", "--latent_ratio=0.3", "--only=eager attention float32")
    assert [r["mix"] for r in result["tables"]["speed"] if "ms" in r] == [a for a in LETTERS if a != "L"]
    assert [note for note in result["notes"] if note.startswith("L is left out") and "latent_ratio" in note]


@pytest.mark.slow
def test_compiled_rows_have_their_compilation_apart(quick):
    rows = list(bench.compare(a_bench(small()), {"A": ("attention", small("A"))}, 2, 16, "float32"))
    assert [(r["mix"], r["mode"]) for r in rows] == [("A", mode) for mode in bench.MODES]
    check(rows)
    assert all(r["compile_s"] > 20 * r["ms"] / 1e3 for r in rows if r["mode"] == "compiled")


@pytest.mark.slow
def test_length_has_every_letter_at_every_length(run):
    rows = run("length", "--only=eager")["tables"]["length"]
    check(rows)
    found = {(r["mix"], r["dtype"], r["T"]) for r in rows if r["level"] == "attention"}
    assert found == set(product(LETTERS, bench.DTYPES, (16, 32, 64)))
    assert {(r["mix"], r["T"]) for r in rows if r["level"] == "macro"} == {("AAA", 32), ("MCL", 32)}


def test_on_cuda_length_goes_on_to_the_longest_in_bfloat16(monkeypatch):
    cases = []
    monkeypatch.setattr(bench, "compare", lambda of, what, B, T, dtype: cases.append((T, dtype)) or iter(()))
    for device in (CPU, torch.device("cuda:1")):
        cases.clear()
        list(bench.length_table(Bench(bench.BenchConfig(), small(), device, {})))
        attentions = [*product(bench.LENGTHS, bench.DTYPES)]
        assert cases[:12] == attentions
        assert cases[12:-4] == ([(16384, "bfloat16")] if device.type == "cuda" else [])


@pytest.mark.slow
@pytest.mark.parametrize("listed", [4e12, None])
def test_a_known_data_sheet_is_a_second_peak(run, monkeypatch, listed):
    monkeypatch.setattr(bench.machine, "datasheet_peak", lambda device, dtype: listed)
    result = run("length", "--only=eager float32")
    assert result["datasheet_peaks"] == {"float32": listed, "bfloat16": listed}
    for row in result["tables"]["length"]:
        if "ms" in row:
            assert row.get("of_sheet") == (pytest.approx(row["of_peak"] / 4) if listed else None)


@pytest.mark.parametrize("level", ["attention", "block", "macro"])
def test_a_call_has_the_input_that_was_used_the_longest_ago(level, monkeypatch):
    """As many of them as exceed the cache twice; none keeps a gradient, all compute the same."""
    monkeypatch.setattr(bench.machine, "cache_bytes", lambda device: 2 * 16 * 32 * 4)
    it = Contestant(level, small("A"), 2, 16, CPU, "float32")
    seen, outputs = [], []
    it.parts[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]) or outputs.append(output))
    for _ in range(2):
        it.step()
        it.forward()
    addresses = [x.data_ptr() for x in seen]
    assert len(set(addresses[:3])) == 3 and addresses[3] == addresses[0]
    assert all(x.requires_grad and torch.equal(x, seen[0]) for x in seen)
    assert seen[0].grad is not None and seen[3].grad is None and all(leaf.grad is None for leaf in it.leaves)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.slow
def test_train_is_rated_by_three_forwards(run, monkeypatch, tmp_path):
    (tmp_path / "tiny.toml").write_text("dim = 32\nn_head = 2\nn_kv_head = 1\nn_layer = 1\npattern = 'A'\n"
                                        "vocab_size = 64\nblock_size = 8\nbatch_size = 3\n")  # fmt: skip
    (tmp_path / "small.toml").write_text("")
    monkeypatch.setattr(bench, "CONFIGS", tmp_path)
    rows = run("train", "--only=eager")["tables"]["train"]
    check(rows)
    pair = [("tiny", 3, 8), ("documents", 3, 8)]
    assert [(r["mix"], r["B"], r["T"]) for r in rows] == pair * 2 + [("shape", 4, 256)] * 2
    for row in rows[4:]:
        flops = 3 * flops_per_token(small(), 256) * row["tokens_per_s"]
        assert row["tflops"] == pytest.approx(flops / 1e12)


def test_a_training_step_moves_the_weights():
    it = Contestant("train", small(), 2, 16, CPU, "float32")
    before = [p.detach().clone() for p in it.leaves]
    it.step()
    assert all((a != b).any() for a, b in zip(before, it.leaves, strict=True))
    assert all(p.grad is None for p in it.leaves)


def test_compression_relates_parameters_and_cache(run):
    rows = run("compression", "--only=eager float32")["tables"]["compression"]
    timed = [r for r in rows if "ms" in r]
    check(timed)
    assert [r["mix"] for r in timed] == ["A", "C2x", "C4x", "C8x"]
    for row in timed[1:]:
        attn = skeleton(small("C", n_layer=1, compression=int(row["mix"][1]))).blocks[0].attn
        assert row["params"] == count_params(attn) and row["kv_bytes"] == 2 * 2 * attn.kappa


def test_flops_are_a_part_of_the_baseline(run):
    rows = run("flops")["tables"]["flops"]
    assert [r["mix"] for r in rows] == [*LETTERS, "hybrid"]
    assert {rows[0][key] for key in rows[0] if key.startswith("of_")} == {1}
    for row in rows:
        assert {"of_attn_512", "of_layer_1024", "of_attn_8192", "of_kv", "params", "kv_bytes"} <= row.keys()
    attns = [skeleton(small(letter, n_layer=1)).blocks[0].attn for letter in "MCLA"]
    each = [attention_flops(attn, 512) for attn in attns]
    assert rows[-1]["of_attn_512"] == pytest.approx(sum(each[:3]) / 3 / each[3])
    added = [attention_state(attn, 9) - attention_state(attn, 8) for attn in attns]
    assert rows[-1]["kv_bytes"] == round(2 * sum(added[:3]) / 3)


def test_the_percentages_of_the_small_shape():
    config = HydraConfig(vocab_size=50257, dim=768, n_head=12, n_kv_head=3, n_layer=24, mlp_ratio=3.0,
                         latent_head_dim=0, window=1)  # fmt: skip
    rows = {row["mix"]: row for row in bench.flops_table(a_bench(config))}
    assert [round(rows["C"][f"of_layer_{T}"], 3) for T in (512, 1024, 8192)] == [0.718, 0.696, 0.520]
    assert [rows[mix]["kv_bytes"] for mix in "AGMCL"] == [3072, 768, 256, 192, 800]  # however little a window sees


@pytest.mark.slow
def test_memory_has_every_letter_and_a_training_step(run):
    rows = run("memory")["tables"]["memory"]
    assert [(r["level"], r["mix"]) for r in rows[:2]] == [("train", "shape")] * 2
    assert [(r["level"], r["mix"]) for r in rows[2:]] == [("attention", a) for a in LETTERS] * 2
    for row in rows:
        assert row["step_mb"] == pytest.approx(row["peak_mb"] - row["base_mb"])


class Allocation:
    def __init__(self, megabytes: int):
        self.batch = torch.ones(300 * 2**18)  # what is there before the step is not its peak
        self.step = lambda: torch.ones(megabytes * 2**18).sum()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_of_its_own_sees_what_is_allocated_there():
    torch.ones(300 * 2**18)  # this process's peak is not the child's
    few, many = (bench.in_child(bench.peak_of, Allocation, n) for n in (8, 208))
    assert many["step_mb"] - few["step_mb"] == pytest.approx(200 * 2**20 / 1e6, rel=0.05)
    assert few["step_mb"] < 30 < 300 < few["base_mb"]
    assert many["peak_mb"] - many["base_mb"] == pytest.approx(many["step_mb"])
    assert bench.in_child(die) is None


def test_a_killed_process_is_a_row_left_out(run, monkeypatch):
    monkeypatch.setattr(bench, "in_child", lambda call, *args: None)
    rows = run("memory", "--only=shape float32")["tables"]["memory"]
    assert [row["mix"] for row in rows if "killed" in row["left_out"]] == ["shape"]


@pytest.mark.slow
def test_rows_that_do_not_fit_are_listed_with_the_reason(run, monkeypatch, capsys):
    monkeypatch.setattr(bench, "free_memory", lambda device: 1e3)
    monkeypatch.setattr(bench, "step_bytes", lambda *_: (1e4, 1e4))  # its plan has its own tests
    rows = run("speed", "--only=eager")["tables"]["speed"]
    assert len(rows) == 8 and all("GB of memory" in r["left_out"] for r in rows)
    reason = "left out, more than the 0.0 GB of memory that are free: attention A G M C L 2 16 float32\n"
    assert reason in capsys.readouterr().out


def test_the_short_run_lists_what_it_has_no_time_for(run, monkeypatch):
    monkeypatch.setattr(bench, "SHORT_SECONDS", 0)
    tables = run()["tables"]
    assert list(tables) == list(bench.TABLES)
    for name, rows in tables.items():
        assert name == "flops" or all(f"(python bench.py {name} has it)" in r["left_out"] for r in rows)
    assert len(tables["speed"]) == 8


# ---- generation and routing


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(contestants, "compile_decoding", lambda model: None)


@pytest.mark.slow
def test_decode_measures_every_dtype_and_batch(run, uncompiled):
    rows = run("decode", "--pattern=M")["tables"]["decode"]
    ways = [("decode", "compiled"), ("prefill", "eager"), ("uncached", "eager"), ("ours", "eager"), ("MHA", "eager")]
    expected = []
    for dtype, B in product(bench.DTYPES, (1, 8)):
        # on a CPU a compiled step is for a single text
        expected += [(dtype, B, "decode", "eager"), *((dtype, B, *way) for way in ways[B == 8 :])]
    assert [(r["dtype"], r["B"], r["mix"], r["mode"]) for r in rows] == expected
    for row in rows:
        assert row["T"] == (16 if row["mix"] in ("ours", "MHA") else 10)
        if row["level"] == "decode":
            assert row["tokens_per_s"] == pytest.approx(row["B"] / row["ms"] * 1e3)
        if row["mix"] == "decode":
            itemsize = bench.DTYPES[row["dtype"]].itemsize
            read = itemsize * count_params(small("M")) + row["B"] * state_bytes(small("M"), 10, itemsize)
            assert 1e6 * row["gb_per_s"] * row["ms"] == pytest.approx(read)
            assert row["of_copy"] == pytest.approx(row["gb_per_s"] / 10)  # of the 1e10 of `quick`


def test_decoding_is_compared_by_how_much_slower_the_others_are(run, uncompiled, monkeypatch):
    """What the rounds take, by contestant: a step of decoding is CYCLE tokens."""
    seconds = {"decode": bench.CYCLE * 1.0, "ours": bench.CYCLE * 1.0, "MHA": bench.CYCLE * 5.0, "prefill": 3.0,
               "uncached": 20.0}  # fmt: skip
    monkeypatch.setattr(bench, "in_turns", lambda calls, *_: {key: [seconds[key[0]]] * 2 for key in calls})
    rows = {r["mix"]: r for r in run("decode", "--only=1 float32 eager")["tables"]["decode"] if "ms" in r}
    assert rows["decode"]["ms"] == rows["ours"]["ms"] == 1000 and rows["MHA"]["mha_x"] == 5
    assert rows["uncached"]["uncached_x"] == 4 * 20 / (3 + 3 * 1)


@pytest.mark.slow
def test_decode_has_compiled_rows_alone(run, uncompiled):
    rows = [r for r in run("decode", "--only=compiled float32")["tables"]["decode"] if "ms" in r]
    assert [(r["mix"], r["mode"], r["B"]) for r in rows] == [("decode", "compiled", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("breaks", ["reorder", "capabilities"])
def test_decode_works_where_weights_cannot_be_packed(breaks, run, uncompiled, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("could not create a primitive\nmore")

    if breaks == "reorder":
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    result = run("decode", "--pattern=M")
    assert len([row for row in result["tables"]["decode"] if row["ms"] > 0]) == 22
    said = [note for note in result["notes"] if "plain weights are measured" in note]
    if breaks == "reorder":
        assert len(said) == 2 and all("could not create a primitive" in note for note in said)  # one for each dtype
    output = capsys.readouterr().out
    assert all(output.count(note) == 1 for note in said)


def test_routing_says_that_it_measures_plain_weights(run, monkeypatch):
    def refuse(*_):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    monkeypatch.setattr(bench, "ROUTED_T", 32)
    result = run("routing", "--pattern=M", "--only=prefill float32")
    assert [row["mix"] for row in result["tables"]["routing"] if "ms" in row] == ["dense", "mod0.125", "mod0.5"]
    assert len(result["notes"]) == 1 and "plain weights are measured" in result["notes"][0]


def test_forced_routers_select_their_part():
    net = Hydra(small(mod_capacity=0.125, mor_recursions=3)).eval()
    contestants.force_routers(net)
    routers = [*net.depth_routers, *net.recursion_routers]
    for router, share in zip(routers, [1 / 8, 2 / 3, 1 / 2], strict=True):
        assert (router(torch.zeros(2, 240, 32)) > 0).sum() == 2 * 240 * share
        assert sum((router(torch.zeros(1, 1, 32)) > 0).item() for _ in range(bench.CYCLE)) == bench.CYCLE * share


def test_decoding_is_timed_behind_a_past_of_routed_tokens(monkeypatch):
    net = Hydra(small(mod_capacity=0.25, mor_recursions=2)).eval()
    contestants.force_routers(net)
    seen = []
    real = contestants.decode_step

    def decode_step(model, token, state, visible, uniform):
        assert uniform and visible == state.tokens == 65
        seen.append([layer.get("count", state.pos_B).item() for layer in state.layers])
        return real(model, token, state, visible, uniform)

    monkeypatch.setattr(contestants, "decode_step", decode_step)
    monkeypatch.setattr(contestants, "CYCLE", 2)
    step = torch.no_grad()(contestants.decoder(net, 1, 64))
    step()
    step()
    assert seen == [layer_tokens(net.config, 64)] * 4 == [[64, 16, 64, 32, 8, 32]] * 4


def test_a_prefill_is_timed_at_the_routers_capacity(monkeypatch):
    """Into a new state each time, with as many tokens in each layer as training has."""
    states = []

    def prefill_into(model, prompts, state):
        states.append(state)
        return prefill(model, prompts, state)

    monkeypatch.setattr(contestants, "prefill", prefill_into)
    config = small(mod_capacity=0.25)
    it = Contestant("prefill", config, 2, 64, CPU, "float32")
    it.step()
    it.step()
    assert len(states) == 2 and all(state.tokens == 64 for state in states)
    for state in states:
        assert [layer["count"].tolist() for layer in state.layers if "count" in layer] == [[16, 16]]


def test_flops_of_a_prefill_have_one_head():
    config = small()
    head = 2 * config.dim * config.vocab_size
    found = contestants.step_flops("prefill", config, 2, 64)
    assert found == pytest.approx(2 * (64 * (flops_per_token(config, 64) - head) + head))


@pytest.mark.slow
def test_routing_sets_times_next_to_flops(run, monkeypatch):
    monkeypatch.setattr(bench, "ROUTED_T", 64)
    rows = run("routing", "--n_layer=6")["tables"]["routing"]
    names = ["dense", "mod0.125", "mod0.5", "mor3", "mod0.125+mor3"]
    assert [(r["level"], r["dtype"], r["mix"]) for r in rows] == [
        (level, dtype, name) for level in ("train", "prefill", "decode") for dtype in reversed(bench.DTYPES)
        for name in names]  # fmt: skip
    dense = small(n_layer=6)
    for row in rows:
        level = row["level"]
        tokens = 1 if level == "decode" else 64
        assert row["tokens_per_s"] == pytest.approx(tokens / row["ms"] * 1e3)
        if row["mix"] == "mod0.125":
            routed = small(n_layer=6, mod_capacity=0.125)
            expected = contestants.step_flops(level, routed, 1, 64) / contestants.step_flops(level, dense, 1, 64)
            assert row["flops_x_first"] == pytest.approx(expected) and expected < 1 and 0 < row["x_first"]
        if row["mix"] == "dense":
            assert row["x_first"] == row["flops_x_first"] == 1
        if row["mix"] == "dense" and level != "prefill":
            expected = flops_per_token(dense, 128) if level == "decode" else 3 * 64 * flops_per_token(dense, 64)
            assert row["tflops"] * row["ms"] == pytest.approx(expected / 1e9)


def test_routing_compiled_is_a_training_step(run, monkeypatch):
    monkeypatch.setattr(bench, "ROUTED_T", 32)
    monkeypatch.setattr(Hydra, "compile_training", lambda self: None)
    rows = run("routing", "--pattern=M", "--n_layer=2", "--mod_capacity=0.5", "--only=compiled float32")
    rows = [r for r in rows["tables"]["routing"] if "ms" in r]
    assert [(r["level"], r["mode"], r["mix"]) for r in rows] == [("train", "compiled", n) for n in ("dense", "routed")]


def test_a_given_routing_is_set_against_its_dense_shape(run, tmp_path):
    """Whether an option or a file gives it; dense has as many layers as a token can meet."""
    (tmp_path / "routed.toml").write_text("mor_recursions = 2\n")
    shapes = small(mor_recursions=2), small(n_layer=6)
    routed, dense = (contestants.step_flops("prefill", shape, 1, 1024) for shape in shapes)
    for given in ("--mor_recursions=2", str(tmp_path / "routed.toml")):
        rows = run("routing", given, "--only=prefill float32")["tables"]["routing"]
        assert [r["mix"] for r in rows if "ms" in r] == ["dense", "routed"]
        row = next(r for r in rows if r["mix"] == "routed")
        assert row["flops_x_first"] == pytest.approx(routed / dense) and routed < dense


@pytest.mark.slow
def test_zaya_is_called_as_ours_and_timed_in_turns(run):
    pytest.importorskip("transformers", reason="a development-only comparison: pip install transformers")
    assert import_module("transformers.models.zaya.modeling_zaya")
    rows = run("length", "--peers", "--only=eager attention float32")["tables"]["length"]
    rows = [r for r in rows if r.get("T") == 64 and "ms" in r]
    assert [r["mix"] for r in rows] == [*LETTERS, "Zaya"] and rows[3]["x_zaya"] > 0


# ---- failures


def fails(_):
    yield {"level": "attention", "mix": "A", "ms": 1.0}
    raise RuntimeError("could not create a primitive\nsecond line")


@pytest.mark.parametrize("table", bench.TABLES)
def test_a_table_that_fails_costs_no_other(table, run, monkeypatch, capsys):
    def one_row(_):
        yield {"level": "attention", "mix": "A", "ms": 2.0}

    monkeypatch.setattr(bench, "TABLES", dict.fromkeys(bench.TABLES, one_row) | {table: fails})
    tables = run("--only=A", code=1)["tables"]
    for name, rows in tables.items():
        expected = [1.0] if name == table else [2.0]
        assert [row["ms"] for row in rows if "ms" in row] == expected
        assert len(rows) == (2 if name == table else 1)
    assert "could not create a primitive" in tables[table][1]["failed"] and "second" not in tables[table][1]["failed"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "could not create" in line]
    assert len(lines) == 1 and lines[0].startswith("failed: ")


def test_a_user_error_is_the_users_where_the_table_was_asked_for(run, monkeypatch):
    def refuses(_):
        yield {"level": "attention", "mix": "A", "ms": 1.0}
        raise UserError("dim=1: it cannot be")

    monkeypatch.setattr(bench, "TABLES", bench.TABLES | {"flops": refuses, "speed": refuses})
    with pytest.raises(UserError, match="dim=1"):
        run("flops")
    monkeypatch.setattr(bench, "TABLES", {"speed": refuses})
    assert "dim=1" in run("--only=A", code=1)["tables"]["speed"][1]["failed"]


@pytest.mark.parametrize("error", [MemoryError(), OSError("x"), KeyError("x"), TypeError("x"), AttributeError("x")])
def test_other_errors_are_rows_too(error, run, monkeypatch):
    def raises(_):
        raise error
        yield

    monkeypatch.setattr(bench, "TABLES", {"flops": raises})
    (row,) = run("flops", code=1)["tables"]["flops"]
    assert type(error).__name__ in row["failed"]


def test_the_json_is_whole_after_every_row(run, monkeypatch, tmp_path):
    seen = []

    def looks(_):
        for i in range(3):
            seen.append(json.loads((tmp_path / "bench.json").read_text()))
            yield {"level": "attention", "mix": "A", "ms": float(i)}

    monkeypatch.setattr(bench, "TABLES", {"speed": looks, "flops": looks})
    run("--only=A")
    assert [[len(rows) for rows in result["tables"].values()] for result in seen] == [[], [1], [2], [3], [3, 1], [3, 2]]
    assert all(result["torch"] and result["peaks"] for result in seen)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.fixture
def emulating(monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e9 if dtype == torch.bfloat16 else 1.89e11)


@pytest.mark.slow
def test_emulated_bfloat16_is_said_once_and_left_out(run, emulating, capsys):
    result = run("speed", "--only=eager")
    sentence = ("bfloat16 is emulated on this CPU (189 GFLOP/s in float32, 1 GFLOP/s in bfloat16): its rows are "
                "left out; ask for them with --only=bfloat16")  # fmt: skip
    assert result["notes"] == [sentence] and capsys.readouterr().out.count("bfloat16 is emulated") == 1
    assert {row["dtype"] for row in result["tables"]["speed"]} == {"float32"}


def test_emulated_bfloat16_is_measured_if_asked_for(run, emulating):
    result = run("speed", "--only=eager attention bfloat16")
    assert [row["mix"] for row in result["tables"]["speed"] if "ms" in row] == [*LETTERS]
    assert len(result["notes"]) == 1 and "left out" not in result["notes"][0]


def test_a_machine_with_bfloat16_says_nothing(run):
    assert run("flops")["notes"] == []


# ---- everything on a GPU in one call


def test_the_gpu_script_runs_every_part_and_names_those_that_fail(tmp_path):
    """With a stub instead of Python: sampling fails."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *sample.py*) exit 3;; esac\n')
    stub.chmod(0o755)
    script = Path(bench.__file__).parent / "tests" / "gpu.sh"
    done = subprocess.run([script, tmp_path / "out", stub, "cpu"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "failed: sample", done.stdout + done.stderr
    names = {path.stem for path in (tmp_path / "out").glob("*.txt")}
    assert names == {"device", "train", "sample", "nccl", "tests", "length", "bench"}
    texts = {name: (tmp_path / "out" / f"{name}.txt").read_text() for name in names}
    assert "-m pytest -q -m cuda" in texts["tests"] and "--device=cpu" in texts["bench"]
    stub.write_text("#!/bin/sh\n")
    done = subprocess.run([script, tmp_path / "out", stub], capture_output=True, text=True)
    assert done.returncode == 0 and "all parts passed" in done.stdout
    limits = [int(line.split()[2]) for line in script.read_text().splitlines() if line.startswith("part ")]
    assert len(limits) == len(names) and sum(limits) < 600


# ---- refusals


@pytest.mark.parametrize("args, words", [
    (["speeds"], "unknown table .speeds.: use speed, memory"), (["decode", "--rounds=0"], "rounds=0"),
    (["--pears"], "did you mean peers"), (["speed", "--dim=33"], "dim=33"), (["--learning_rate=1"], "unknown key"),
    (["speed", "--only=nothing"], "no row of speed"), (["speed", "--mod_capacity=0.5"], "only table routing"),
    (["routing", "--only=compiled decode"], "no row of routing"), (["--seed=-1"], "seed=-1"), (["scaling"], "unknown"),
    (["--json=no/such/folder/x.json"], "its folder does not exist"), (["--json=tests"], "it is no file: name another"),
    (["--json="], "is an empty path"), (["--json=" + "a" * 300], "File name too long"), (["--rounds=1_0"], "int"),
    (["decode", f"--context={2**62}"], "positions beyond"), (["decode", f"--new_tokens={2**62}"], "positions beyond"),
    (["flops", f"--n_layer={10**6}"], "1,000,000 layers in a row"), (["flops", f"--dim={10**8}"], "one matrix of dim"),
    (["config/tinny.toml"], "did you mean"),
])  # fmt: skip
def test_bad_input_is_refused(args, words, quick, monkeypatch):
    monkeypatch.setattr(bench, "Contestant", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(UserError, match=words):
        bench.main(args)


def test_a_missing_package_is_named_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(bench, "begin", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(UserError, match="pip install transformers"):
        bench.main([*TINY, "--peers"])


def test_the_help_names_tables_and_letters(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    output = capsys.readouterr().out
    assert all(name in output for name in (*bench.TABLES, "CCQA", "--only", "--prompt_tokens"))
