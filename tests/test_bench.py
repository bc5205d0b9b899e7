"""The bench measures what it says, its figures agree with each other, and it refuses what it cannot do."""

import json
import math
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
from attention import make_attention
from configurator import UserError
from model import HydraConfig, count_params, flops_per_token, state_values

TINY = ["--dim=32", "--n_head=2", "--n_kv_head=1", "--compression=2", "--latent_head_dim=0",
        "--n_layer=3", "--pattern=MCL", "--vocab_size=64",
        "--mlp_ratio=1", "--prompt_tokens=8", "--new_tokens=4", "--context=16", "--rounds=2"]  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the bench at a tiny shape, returns what it stored."""
    monkeypatch.setattr(bench, "SHAPES", ((2, 16),))
    monkeypatch.setattr(bench, "LENGTHS", (16, 32, 64))
    monkeypatch.setattr(bench, "MACRO_LENGTHS", (32,))
    monkeypatch.setattr(bench, "in_child", lambda call, *args, method="": call(*args))  # its own test starts processes
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e10)

    def stored(*argv):
        assert bench.main([*argv[:1], *TINY, *argv[1:], f"--json={tmp_path / 'bench.json'}"]) == 0
        return json.loads((tmp_path / "bench.json").read_text())

    return stored


def small(pattern="MCL", **changes) -> HydraConfig:
    return HydraConfig(**dict(dim=32, n_head=2, n_kv_head=1, compression=2, latent_head_dim=0,
                              n_layer=3, vocab_size=64, mlp_ratio=1.0,
                              pattern=pattern) | changes)  # fmt: skip


def check(rows: list[dict]) -> None:
    """Every figure of a timed row follows from the others."""
    assert rows
    for row in rows:
        seconds, (level, name) = row["ms"] / 1e3, (row["level"], row["mix"])
        assert row["tokens_per_s"] == pytest.approx(row["B"] * row["T"] / seconds)
        assert row["of_peak"] == pytest.approx(row["tflops"] / row["peak_tflops"]) and row["peak_tflops"] == 1.0
        assert row["rounds"] == 2 and row["spread"] >= 0
        if level in ("attention", "macro", "block", "model"):
            assert 0 < row["forward_ms"] and row["forward_x_first"] > 0
            assert row.get("x_first", 1.0) == 1.0 if set(name) == {"A"} else row["x_first"] > 0
            pattern = "C" if name.startswith("C") and name.endswith("x") else name
            c = small(pattern, compression=int(name[1:-1])) if pattern != name else small(pattern)
            flops = bench.step_flops(level, c, row["B"], row["T"])
            assert row["tflops"] == pytest.approx(flops / seconds / 1e12)
        if row["mode"] == "compiled":
            assert row["compile_s"] > 0 and row["x_eager"] > 0


def test_a_ratio_is_of_the_row_to_the_other(monkeypatch):
    seconds = {"A": 4.0, "C": 1.0, "Zaya": 2.0}
    times = {(name, "eager", what): [s, 3 * s] for name, s in seconds.items() for what in ("step", "forward")}
    times |= {("C", "compiled", "step"): [0.5, 1.0], ("A", "compiled", "step"): [1.0, 4.0]}
    eager, compiled = (bench.figures(times, "C", mode, "A", 10) for mode in bench.MODES)
    assert eager["x_first"] == eager["forward_x_first"] == 0.25 and eager["x_zaya"] == 0.5 and "x_eager" not in eager
    assert eager["x_first_spread"] == 0 and eager["ms"] == 2000 and eager["tokens_per_s"] == 5
    assert compiled["x_eager"] == pytest.approx((0.5 + 1 / 3) / 2) and compiled["x_first"] == 0.375
    assert compiled["x_first_spread"] == pytest.approx(0.125 / 0.375)
    assert not any(key.startswith("x_") for key in bench.figures({("C", "eager", "step"): [1.0]}, "C", "eager", "C", 1))


def test_what_decoding_is_compared_with_counts_how_much_slower_that_is(monkeypatch):
    seconds = {"ours": 1.0, "compiled": 0.5, "prefill": 3.0, "uncached": 20.0, "hybrid": 2.0, "MHA": 5.0, "peer": 8.0}
    monkeypatch.setattr(bench, "in_turns", lambda calls, *_: {name: [seconds[name]] * 2 for name in calls})
    model, peer = bench.Hydra(small("M")).eval(), torch.nn.Module()
    b = bench.BenchConfig(prompt_tokens=8, new_tokens=4, context=16)
    row = bench.decode_row({"ours": model, "compiled": model}, model, peer, 1, b, 1e10)
    assert row["mha_x"] == 2.5 and row["llama_x_ours"] == 8 and row["llama_x_compiled"] == 16
    assert row["uncached_x"] == 4 * 20 / (3 + 3 * 1) and row["tokens_per_s"] == 1


def test_a_start_is_timed_with_empty_and_with_filled_caches(monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(bench, "first_step", lambda it, compiled, device: 99.0)
    children = iter([7.0, 3.0, 7.0, None])
    monkeypatch.setattr(bench, "in_child", lambda call, *args, method: next(children))
    run = bench.Run("train", small("M"), bench.BenchConfig(rounds=2), CPU, {"float32": 1e12})
    row, killed = (list(bench.compare(run, {"shape": ("train", small("M"))}, 2, 16, "float32"))[1] for _ in range(2))
    assert [row[key] + row["ms"] / 1e3 for key in ("compile_s", "warm_s")] == pytest.approx([7, 3])
    assert "compile_s" in killed and "warm_s" not in killed


def test_speed_has_every_subject_in_every_precision(run):
    result = run("speed", "--only=eager")
    rows = result["tables"]["speed"]
    check(rows)
    assert [(r["level"], r["mix"]) for r in rows if r["dtype"] == "bfloat16"] == [
        *(("attention", a) for a in "AGMCL"), *(("block", a) for a in "AGMCL"),
        ("macro", "AAA"), ("macro", "MCL"), ("model", "AAA"), ("model", "MCL")]  # fmt: skip
    assert len(rows) == 28 and result["torch"] == torch.__version__ and "dim = 32" in result["config"]
    assert result["cpu"] and result["threads"] >= 1 and result["seed"] == 1337 and result["date"] and result["git"]


@pytest.mark.slow
def test_compiled_rows_have_their_compilation_apart(monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e10)
    run = bench.Run("speed", small(), bench.BenchConfig(rounds=2), CPU, {"float32": 1e12})
    rows = list(bench.compare(run, {"A": ("attention", small("A"))}, 2, 16, "float32"))
    assert [(r["mix"], r["mode"]) for r in rows] == [("A", mode) for mode in bench.MODES]
    check(rows)
    assert all(r["compile_s"] > 20 * r["ms"] / 1e3 for r in rows if r["mode"] == "compiled")


def test_length_fits_an_exponent_for_every_letter(run):
    rows = run("length", "--only=eager")["tables"]["length"]
    fits = [r for r in rows if r["level"] == "fit"]
    assert {(r["mix"], r["dtype"]) for r in fits} == {(a, d) for a in "AGMCL" for d in bench.DTYPES}
    assert all((r["from_T"], r["to_T"]) == (16, 64) for r in fits)
    check([r for r in rows if r["level"] != "fit"])
    assert {r["T"] for r in rows if r["level"] == "macro"} == {32}
    chosen = {r["T"]: r["ms"] for r in rows if (r["level"], r["mix"], r["dtype"]) == ("attention", "C", "float32")}
    fit = next(r["exponent"] for r in fits if (r["mix"], r["dtype"]) == ("C", "float32"))
    assert fit == pytest.approx(bench.exponent(list(chosen), list(chosen.values())))


def test_the_exponent_of_a_power_is_found():
    lengths = [256, 512, 1024, 8192]
    assert bench.exponent(lengths, [3e-9 * n**1.7 for n in lengths]) == pytest.approx(1.7)


def test_train_is_rated_by_its_parameters(run, monkeypatch, tmp_path):
    (tmp_path / "tiny.toml").write_text("dim = 32\nn_head = 2\nn_kv_head = 1\nn_layer = 1\npattern = 'A'\n"
                                        "vocab_size = 64\nblock_size = 8\nbatch_size = 3\n")  # fmt: skip
    (tmp_path / "small.toml").write_text("")
    monkeypatch.setattr(bench, "CONFIGS", tmp_path)
    rows = run("train", "--only=eager")["tables"]["train"]
    check(rows)
    assert [(r["mix"], r["B"], r["T"]) for r in rows] == [("tiny", 3, 8)] * 2 + [("shape", 4, 256)] * 2
    for row in rows[2:]:
        assert row["tflops"] == pytest.approx(6 * count_params(small()) * row["tokens_per_s"] / 1e12)


def test_a_train_step_moves_the_weights():
    it = bench.Contestant("train", small(), 2, 16, CPU, "float32")
    before = [p.detach().clone() for p in it.leaves]
    it.step()
    assert all((a != b).any() for a, b in zip(before, it.leaves, strict=True))
    assert all(p.grad is None for p in it.leaves)


def test_compression_relates_latent_parameters_and_cache(run):
    rows = run("compression", "--only=eager")["tables"]["compression"]
    check(rows)
    assert [(r["mix"], r["latent"]) for r in rows[:4]] == [("A", 32), ("C2x", 16), ("C4x", 8), ("C8x", 4)]
    for row in rows[1:4]:
        c = small("C", compression=int(row["mix"][1]))
        assert row["params"] == sum(p.numel() for p in make_attention("C", c).parameters())
        assert row["kv_bytes"] == 2 * state_values(c, "C") and row["step_mb"] > 0


def test_the_flops_table_equals_the_counter(run):
    rows = run("flops")["tables"]["flops"]
    assert [r["mix"] for r in rows] == [*"AGMCL", "hybrid"]
    for row in rows:
        assert row["counted"] == row["formula"]
        assert {"of_attn_512", "of_layer_1024", "of_attn_8192", "of_kv", "report_claims"} <= row.keys()
    assert rows[0]["of_layer_512"] == rows[0]["of_kv"] == 1 and "62%" in rows[3]["report_claims"]


def test_the_percentages_of_the_small_shape():
    c = HydraConfig(vocab_size=50257, dim=768, n_head=12, n_kv_head=3, n_layer=24, mlp_ratio=3.0, latent_head_dim=0)
    row = next(r for r in bench.flops(bench.Run("flops", c, bench.BenchConfig(), CPU, {})) if r["mix"] == "C")
    assert [round(row[f"of_layer_{T}"], 3) for T in (512, 1024, 8192)] == [0.718, 0.696, 0.520]


def test_memory_has_every_subject_and_the_naive_path(run):
    rows = run("memory")["tables"]["memory"]
    assert [(r["level"], r["mix"]) for r in rows[:2]] == [("naive", "naive"), ("train", "ours")]
    assert len(rows) == 4 + 28
    for row in rows:
        assert row["step_mb"] == pytest.approx(row["peak_mb"] - row["base_mb"]) and row["saved_mb"] > 0


def allocate(megabytes: int) -> dict:
    return bench.peak_of(lambda: torch.ones(megabytes * 2**18).sum(), CPU)


def test_a_process_of_its_own_sees_what_is_allocated_there():
    torch.ones(300 * 2**18)  # this process's peak is not the child's
    few, many = bench.in_child(allocate, 8), bench.in_child(allocate, 208)
    assert many["step_mb"] - few["step_mb"] == pytest.approx(200 * 2**20 / 1e6, rel=0.05)
    assert few["step_mb"] < 30 < few["base_mb"]
    assert many["peak_mb"] - many["base_mb"] == pytest.approx(many["step_mb"])


def die() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_a_row_left_out(run, monkeypatch):
    monkeypatch.setattr(bench, "in_child", lambda call, *args: None)
    rows = run("memory", "--only=naive float32")["tables"]["memory"]
    assert [row["mix"] for row in rows if "killed" in row["left_out"]] == ["naive", "ours"]
    monkeypatch.undo()
    assert bench.in_child(die) is None


def test_saved_bytes_are_distinct_storages_without_the_weights():
    w, x = torch.ones(4, 4, requires_grad=True), torch.ones(8, 4, requires_grad=True)
    double = torch.float64.itemsize * 8 * 4

    def forward():  # x.double() is saved by two products, w is a weight
        y = x.double()
        return (y * y).sum() + (y * y).sum() + (x @ w).sum()

    assert bench.saved_bytes(forward, [w]) == double + x.nbytes


@pytest.mark.parametrize("pattern", ["A", "G", "M", "C", "L"])
def test_the_naive_path_has_the_same_parameters(pattern):
    ours, naive = (bench.Contestant(level, small(pattern), 2, 16, CPU, "float32") for level in ("train", "naive"))
    assert sum(p.numel() for p in naive.leaves) == sum(p.numel() for p in ours.leaves) == count_params(small(pattern))
    assert naive.forward().isfinite()
    naive.step()


def test_the_naive_path_saves_more(monkeypatch):
    monkeypatch.setattr(bench, "MAX_LOGITS", 2**6)
    monkeypatch.setattr(bench.accounting, "MAX_LOGITS", 0)  # set by `measure`, set back at the end of this test
    c = small(vocab_size=512)
    ours, naive = (bench.measure(level, c, 4, 64, CPU, "float32")["saved_mb"] for level in ("train", "naive"))
    logits, gradient = 4 * 64 * 512, 512 * 32  # ours saves the head's gradient in place of the logits
    gated = 4 * 64 * 3 * 2 * c.mlp_hidden  # silu(gate) and its product with up, of each layer
    normed = 4 * 64 * (7 * 32 + 32 + 16 + 2 * 16)  # of blocks and trunk, of the heads, of the latent of L
    assert naive - ours == pytest.approx(4 * (logits - gradient + gated + normed) / 1e6, rel=0.01)
    assert bench.accounting.MAX_LOGITS == sys.maxsize


def test_rows_that_do_not_fit_are_listed_with_the_reason(run, monkeypatch, capsys):
    monkeypatch.setattr(bench, "available", lambda device: 1e3)
    rows = run("speed", "--only=eager")["tables"]["speed"]
    assert len(rows) == 8 and all("GB of memory" in r["left_out"] for r in rows)
    reason = "left out, more than the 0.0 GB of memory that are free: attention A G M C L 2 16 float32;"
    assert reason in capsys.readouterr().out


def test_the_short_run_lists_what_it_has_no_time_for(run, monkeypatch):
    monkeypatch.setattr(bench, "SHORT", dict.fromkeys(bench.TABLES, 0))
    tables = run()["tables"]
    assert list(tables) == list(bench.TABLES)
    for name, rows in tables.items():
        assert name == "flops" or all(f"python bench.py {name} has it" in r["left_out"] for r in rows)
    assert len(tables["speed"]) == 8 + 1 and tables["speed"][-1]["mode"] == "compiled"


def test_decode_measures_every_dtype_and_batch(run):
    rows = run("decode", "--pattern=M")["tables"]["decode"]
    assert [(r["dtype"], r["B"]) for r in rows] == [(d, B) for d in bench.DTYPES for B in (1, 8)]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(row["B"] / row["ms"] * 1e3)
        assert all(row[k] > 0 for k in ("gb_per_s", "of_copy", "uncached_x", "mha_x"))
        assert ("compiled_ms" in row) == (row["B"] == 1)  # on a CPU
        if row["B"] == 1:
            assert row["of_copy"] * row["ms"] == pytest.approx(row["compiled_of_copy"] * row["compiled_ms"])
        read = 1e6 * row["gb_per_s"] * row["ms"]  # bytes of a step
        itemsize = bench.DTYPES[row["dtype"]].itemsize
        c = small("M")
        assert read == pytest.approx(itemsize * (count_params(c) + row["B"] * state_values(c, "M") * 3 * 10))


def test_turns_are_interleaved_after_one_that_is_not_counted():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = bench.in_turns(contestants, 3, CPU)
    assert calls == list("abababab") and {name: len(t) for name, t in seconds.items()} == {"a": 3, "b": 3}
    assert {len(t) for t in bench.in_turns(contestants, 9, CPU, limit=0).values()} == {1}
    assert bench.ratio([2.0, 9.0, 4.0], [1.0, 1.0, 2.0]) == 2.0
    assert bench.spread([1.0, 2.0, 3.0]) == 0.5 and bench.spread([1.0]) == 0


def test_forced_routers_pick_their_part():
    c = small(mod_capacity=0.125, mor_recursions=3)
    net = bench.Hydra(c).eval()
    bench.force_routers(net)
    routers = [*net.depth_routers, *net.recursion_routers]
    for router, share in zip(routers, [1 / 8, 2 / 3, 1 / 2], strict=True):
        assert (router(torch.zeros(2, 240, 32)) > 0).sum() == 2 * 240 * share
        assert sum((router(torch.zeros(1, 1, 32)) > 0).item() for _ in range(bench.CYCLE)) == bench.CYCLE * share


def test_decoding_is_timed_behind_a_past_of_routed_tokens():
    net = bench.Hydra(small(mod_capacity=0.25, mor_recursions=2)).eval()
    bench.force_routers(net)
    seen = []
    net.decode = lambda token, state: seen.append([layer.get("count", state.pos_B).item() for layer in state.layers])
    step = bench.decoder(net, 1, 64)
    step(), step()
    assert seen == [[64, 16, 64, 32, 8, 32]] * 2


def test_routing_sets_times_next_to_flops(run, monkeypatch):
    monkeypatch.setattr(bench, "ROUTED_T", 64)
    rows = run("routing", "--n_layer=6")["tables"]["routing"]
    names = ["dense", "mod0.125", "mod0.5", "mor3", "mod0.125+mor3"]
    assert [(r["level"], r["dtype"], r["mix"]) for r in rows] == [
        (level, dtype, name) for level in ("step", "eval", "decode") for dtype in reversed(bench.DTYPES)
        for name in names]  # fmt: skip
    dense = small(n_layer=6)
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(bench.step_tokens(row["level"], 1, 64) / row["ms"] * 1e3)
        T = 128 if row["level"] == "decode" else 64
        if row["mix"] == "mod0.125":
            routed = small(n_layer=6, mod_capacity=0.125)
            expected = flops_per_token(routed, T) / flops_per_token(dense, T)
            assert row["flops_x_first"] == pytest.approx(expected) and 0 < row["x_first"]
        if row["mix"] == "dense":
            assert row["x_first"] == row["flops_x_first"] == 1
            texts = {"step": 3, "eval": 1, "decode": 24 / 64}[row["level"]]
            expected = texts * 64 * flops_per_token(dense, T)
            assert row["tflops"] * row["ms"] == pytest.approx(expected / 1e9)


def test_routing_compiled_is_a_training_step(run, monkeypatch):
    monkeypatch.setattr(bench, "ROUTED_T", 32)
    monkeypatch.setattr(bench, "first_step", lambda it, compiled, device: 99.0)
    rows = run("routing", "--pattern=M", "--n_layer=2", "--mod_capacity=0.5", "--only=compiled float32")
    rows = [r for r in rows["tables"]["routing"] if "ms" in r]
    assert [(r["level"], r["mode"], r["mix"]) for r in rows] == [("step", "compiled", n) for n in ("dense", "routed")]


def test_a_given_routing_is_set_against_its_dense_shape(run, tmp_path):
    """Whether an option or a file gives it; dense has as many layers as a token can meet."""
    (tmp_path / "routed.toml").write_text("mor_recursions = 2\n")
    expected = flops_per_token(small(mor_recursions=2), 1024) / flops_per_token(small(n_layer=6), 1024)
    for given in ("--mor_recursions=2", str(tmp_path / "routed.toml")):
        rows = run("routing", given, "--only=eval float32")["tables"]["routing"]
        assert [r["mix"] for r in rows if "ms" in r] == ["dense", "routed"]
        routed = next(r for r in rows if r["mix"] == "routed")
        assert routed["flops_x_first"] == pytest.approx(expected) and expected < 1


# the older report's rows that were not paged to disk: parameters in millions, its "MoD prob", its ms/step
REPORT = ([100.5, 216.3, 569.6, 926.8, 1194.8, 1420.4], [0.808, 0.787, 0.759, 0.779, 0.847, 0.798],
          [150, 241, 323, 451, 731, 536])  # fmt: skip


def test_the_fit_of_the_older_report():
    x = [math.log(p) for p in REPORT[0]]
    fraction = bench.fit(x, [bench.logit(p) for p in REPORT[1]])
    assert not fraction.sloped and abs(fraction.slope) < 2 * fraction.error
    middle, low, high = map(bench.logistic, fraction.predict(math.log(7200)))
    assert [middle, low, high] == pytest.approx([0.798, 0.627, 0.914], abs=5e-4)
    time = bench.fit(x, [math.log(ms) for ms in REPORT[2]])
    assert time.sloped and time.slope == pytest.approx(0.53, abs=0.005)
    middle, low, high = map(math.exp, time.predict(math.log(7200)))
    assert low < middle < high < 47527 / 4
    near, far = (time.predict(math.log(p)) for p in (500, 7200))
    assert far[2] - far[1] > 1.4 * (near[2] - near[1])


def test_a_slope_without_significance_is_a_constant():
    x = [0.0, 1.0, 2.0, 3.0]
    assert bench.fit(x, [1.0, 3.0, 5.0, 7.1]).sloped and not bench.fit(x, [1.0, 9.0, 2.0, 7.0]).sloped
    assert not bench.fit(x[:3], [1.0, 3.0, 6.5]).sloped  # three points: the error of the slope is hardly known
    assert bench.fit(x, [2.0] * 4).predict(99.0) == (2.0, 2.0, 2.0)


@pytest.fixture
def scales(tmp_path, monkeypatch):
    """Five tiny presets; the memory is enough for four."""
    (tmp_path / "small.toml").write_text("")
    for i, dim in enumerate((32, 48, 64, 96, 512)):
        (tmp_path / f"scale_{i}.toml").write_text(
            f"dim = {dim}\nn_head = 2\nn_kv_head = 1\nlatent_head_dim = 0\npattern = 'MC'\nn_layer = 2\n"
            f"mod_capacity = 0.5\nmor_recursions = {3 + i % 2}\nvocab_size = 64\nblock_size = 32\n")  # fmt: skip
    monkeypatch.setattr(bench, "CONFIGS", tmp_path)
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(bench, "SCALING_T", 32)
    monkeypatch.setattr(bench, "available", lambda device: 20e6)
    tokens = np.random.default_rng(0).integers(0, 64, 4096).astype(np.uint16)
    corpus = SimpleNamespace(train=tokens, val=tokens, enc=SimpleNamespace(n_vocab=64))
    monkeypatch.setattr(bench, "prepare", lambda *_: corpus)

    def stored(*argv):
        assert bench.main(["scaling", "--rounds=2", f"--json={tmp_path / 'b.json'}", *argv]) == 0
        return json.loads((tmp_path / "b.json").read_text())["tables"]["scaling"]

    return stored


def test_scaling_measures_what_fits_and_predicts_the_rest(scales, capsys):
    rows = scales()
    measured, left_out = [r for r in rows if "steps" in r], [r for r in rows if "left_out" in r]
    assert [r["mix"] for r in measured] == ["scale_0", "scale_1", "scale_2", "scale_3"]
    for i, row in enumerate(measured):
        assert 0 <= row["routed_fraction"] <= 1 and 1 <= row["mean_depth"] <= 3 + i % 2
        assert row["params"] > 0 and row["ms_per_token"] > 0 and row["steps"] == 3
    assert [r["mix"] for r in left_out] == ["scale_4"] and "GB of memory" in left_out[0]["left_out"]
    fits = {r["mix"]: r for r in rows if r["level"] == "fit"}
    assert fits.keys() == {"ms_per_token", "routed_fraction", "recursing"}
    assert all(r["form"] in ("line", "constant") and r["measured"] == 4 for r in fits.values())
    (row,) = [r for r in rows if r["level"] == "predicted"]
    c = HydraConfig(dim=512, n_head=2, n_kv_head=1, latent_head_dim=0, pattern="MC", n_layer=2, mod_capacity=0.5,
                    mor_recursions=3, vocab_size=64)  # fmt: skip
    assert row["params"] == count_params(c) and "beyond 3x" in row["note"]
    for key, top in (("routed_fraction", 1), ("mean_depth", 3), ("ms_per_token", math.inf)):
        assert 0 <= row[f"{key}_low"] <= row[key] <= row[f"{key}_high"] <= top
    assert "a guess" in capsys.readouterr().out


def test_scaling_where_everything_fits_predicts_nothing(scales, monkeypatch):
    monkeypatch.setattr(bench, "available", lambda device: 1e12)
    monkeypatch.setattr(bench, "SCALING_SECONDS", 1e9)
    rows = scales()
    assert len([r for r in rows if "steps" in r]) == 5 and {r["level"] for r in rows} == {"scaling", "fit"}


def test_scaling_needs_three_shapes_to_predict(scales, monkeypatch):
    monkeypatch.setattr(bench, "available", lambda device: 1e6)
    rows = scales()
    assert len([r for r in rows if "steps" in r]) < 3 and "three measured shapes" in rows[-1]["left_out"]


def test_scaling_is_drawn(scales, tmp_path):
    pytest.importorskip("matplotlib", reason="charts are optional: pip install matplotlib")
    scales(f"--plot={tmp_path}", "--mod_capacity=0")  # a panel stays empty
    (tmp_path / "scaling.png").unlink()
    scales(f"--plot={tmp_path}")
    assert (tmp_path / "scaling.png").stat().st_size > 10000


def test_extremes_of_a_fraction_can_be_fitted():
    assert bench.to_fit("ms_per_token", 2.0) == math.log(2)
    none, all_ = bench.to_fit("routed_fraction", 0.0), bench.to_fit("recursing", 1.0)
    assert none == pytest.approx(-all_) and none < -4
    assert bench.logistic(bench.logit(0.3)) == pytest.approx(0.3) and bench.logistic(-1e5) == 0


def test_scaling_of_dense_shapes_and_of_some(scales, monkeypatch):
    rows = scales("--mor_recursions=1", "--mod_capacity=0")
    assert [r["mix"] for r in rows if r["level"] == "fit"] == ["ms_per_token"]
    assert not any({"mean_depth", "routed_fraction"} & r.keys() for r in rows)
    with pytest.raises(UserError, match="no row of scaling"):
        scales("--only=nothing")
    monkeypatch.setattr(bench, "SCALING_SECONDS", 0)
    assert ["more than 0 s on a CPU" in r["left_out"] for r in scales("--only=scale_1") if r["mix"] == "scale_1"][0]


def test_a_loss_that_is_not_finite_is_no_measurement(scales, monkeypatch):
    real = bench.Contestant.forward
    monkeypatch.setattr(bench.Contestant, "forward", lambda self: real(self) * (1 if self.net.training else math.nan))
    rows = scales()
    assert all("left_out" in r for r in rows) and "not finite" in rows[0]["left_out"]


@pytest.mark.parametrize("args, words", [
    (["speeds"], "unknown table .speeds.: use speed, memory"), (["decode", "--rounds=0"], "rounds=0"),
    (["--pears"], "did you mean peers"), (["speed", "--dim=33"], "dim=33"), (["--learning_rate=1"], "unknown key"),
    (["speed", "--only=nothing"], "no row of speed"), (["speed", "--mod_capacity=0.5"], "only table routing"),
    (["scaling", "config/tiny.toml"], "scaling has its own files"),
    (["--json=no/such/folder/x.json"], "its folder does not exist"), (["config/tinny.toml"], "did you mean"),
])  # fmt: skip
def test_bad_input_is_refused(args, words, monkeypatch):
    monkeypatch.setattr(bench, "Contestant", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e12)
    with pytest.raises(UserError, match=words):
        bench.main(args)


@pytest.mark.parametrize("option, name", [("--peers", "transformers"), ("--plot=.", "matplotlib")])
def test_a_missing_package_is_named_before_anything_is_measured(option, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(bench, "fill", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(UserError, match=f"pip install {name}"):
        bench.main([*TINY, option])


def test_charts_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="charts are optional: pip install matplotlib")
    row = {"level": "attention", "B": 1, "T": 16, "dtype": "float32", "mode": "eager", "mix": "A", "ms": 1.0}
    nothing = [{"mix": "A", "left_out": "no time"}]
    bench.draw({"length": [row, row | {"T": 32}], "speed": nothing,
                "flops": [{"mix": "A", "of_layer_1024": 1.0}]}, tmp_path)  # fmt: skip
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("length", "flops"))
    assert not (tmp_path / "speed.png").exists()


def test_zaya_is_called_as_ours_and_timed_in_turns(run):
    pytest.importorskip("transformers", reason="a development-only comparison: pip install transformers")
    assert import_module("transformers.models.zaya.modeling_zaya")
    rows = run("length", "--peers", "--only=eager attention float32")["tables"]["length"]
    rows = [r for r in rows if r.get("T") == 64 and "ms" in r]
    assert [r["mix"] for r in rows] == [*"AGMCL", "Zaya"] and rows[3]["x_zaya"] > 0
