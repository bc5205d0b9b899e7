"""What accounting.py counts from the modules, against the closed formulas of formulas.py and against torch's own count:
parameters, FLOPs and the bytes of a state, of every letter and ablation, routed or not."""

import ctypes
import gc
import re
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import formulas
import pytest
import torch
from conftest import FAIR
from test_train import TINY
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import accounting
import machine
import train
from attention import KINDS
from configurator import parse
from generate import new_state, prefill
from model import Hydra, HydraConfig
from routing import Router
from train import TrainConfig, make_optimizer, train_step

ROOT = Path(accounting.__file__).parent
SHAPE = dict(vocab_size=97, block_size=64, dim=64, n_head=4, n_kv_head=2, compression=2, latent_head_dim=0,
             mlp_ratio=1.0)  # fmt: skip
SMALL = dict(latent_head_dim=0, vocab_size=50257, block_size=1024, dim=768, n_head=12, n_kv_head=3,
             n_layer=24, mlp_ratio=3.0)  # fmt: skip
MEDIUM = SMALL | dict(dim=896, n_head=14, n_kv_head=2, mlp_ratio=3.5)
LARGE = SMALL | dict(dim=1024, n_head=16, n_kv_head=4, mlp_ratio=4.0)
CHANGES = [{}, {"conv_kernel": 0}, {"conv_kernel": 1}, {"compression": 4}, {"compression": 8, "n_kv_head": 4},
           {"latent_ratio": 0.25}, {"latent_head_dim": 16}, {"value_shift": False}, {"qk_gain": 0.0}, {"window": 7},
           {"n_layer": 5}]  # fmt: skip
ROUTED = [{"mod_capacity": 0.125}, {"mod_capacity": 0.75}, {"mor_recursions": 3}, {"mor_recursions": 2},
          {"mod_capacity": 0.5, "mor_recursions": 3}]  # fmt: skip
ALL = "AGMLCC"  # routers, where there are any, stand before a G, an L and a C
SHAPES = [(ALL, changes) for changes in [*CHANGES, *ROUTED]]
for one in formulas.LETTERS:
    SHAPES += [(one, {}), (one, ROUTED[-1])]
SHAPES += [(fair["pattern"], fair) for fair in FAIR] + [(ALL, FAIR[-1] | ROUTED[-1] | {"pattern": ALL})]
every_shape = pytest.mark.parametrize("pattern, changes", SHAPES, ids=str)


def shape(pattern=ALL, /, **changes) -> HydraConfig:
    return HydraConfig(**SHAPE | {"pattern": pattern, "n_layer": max(3, len(pattern))} | changes)


def torch_flops(config: HydraConfig, B: int, T: int) -> int:
    """torch's count of a training forward, told of the CPU's attention kernel."""

    def core(q, k, v, *args, out_val=None, **kwargs):
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    core._get_raw = True
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    idx = torch.zeros(B, T, dtype=torch.long)
    net = Hydra(config)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={kernel: core}) as counter:
        net(idx, idx)
    return counter.get_total_flops()


# ---- parameters


def test_the_skeleton_holds_no_numbers_and_is_made_once():
    config = HydraConfig(**LARGE | {"n_layer": 96})
    assert {p.device.type for p in accounting.skeleton(config).parameters()} == {"meta"}
    assert accounting.skeleton(config) is accounting.skeleton(HydraConfig(**LARGE | {"n_layer": 96}))


@every_shape
def test_parameters_are_those_of_the_formula_and_of_the_model(pattern, changes):
    config = shape(pattern, **changes)
    net = Hydra(config)
    assert accounting.count_params(config) == formulas.count_params(config)
    assert accounting.count_params(config) == sum(p.numel() for p in net.parameters())
    assert accounting.count_params(net) == accounting.count_params(config)
    for letter, block in zip(config.layers, net.blocks, strict=True):
        assert accounting.count_params(block.attn) == formulas.attention_params(config, letter)


@pytest.mark.parametrize("letter", KINDS)
def test_letters_without_a_formula_are_counted_too(letter):
    config = shape(letter, mod_capacity=0.5, mor_recursions=2)
    net = Hydra(config)
    assert accounting.count_params(config) == sum(p.numel() for p in net.parameters())
    assert accounting.state_bytes(config, 40, 4, allocated=True) == new_state(net, 1, 40).bytes()
    matrices = sum(p.numel() for p in net.blocks[0].attn.parameters() if p.dim() > 1)
    assert accounting.attention_flops(net.blocks[0].attn, 40) > 2 * matrices


def test_routers_are_a_vector_each():
    dense = accounting.count_params(shape())
    assert accounting.count_params(shape(mod_capacity=0.5)) - dense == 3 * 64
    assert accounting.count_params(shape(mor_recursions=3)) - dense == 2 * 64
    assert accounting.count_params(shape(mod_capacity=0.5, mor_recursions=3)) - dense == 5 * 64


@pytest.mark.parametrize("named, millions", [(SMALL, 186.8), (MEDIUM, 287.4), (LARGE, 389.9)])
def test_the_named_shapes(named, millions):
    config = HydraConfig(**named)
    assert accounting.count_params(config) == formulas.count_params(config)
    assert round(accounting.count_params(config) / 1e6, 1) == millions


SCALES = {"100m": (768, 32, 12, 3), "250m": (1024, 48, 16, 4), "500m": (1536, 64, 24, 4), "750m": (1792, 80, 28, 4),
          "900m": (2048, 80, 32, 4), "1000m": (2048, 96, 32, 8), "1500m": (2560, 120, 40, 8),
          "4b": (4096, 160, 64, 8)}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_the_scales_have_the_report_s_shapes_and_the_stated_parameters(name):
    path = ROOT / "config" / f"scale_{name}.toml"
    given = parse([str(path)], HydraConfig, TrainConfig)
    config = HydraConfig(**{key: value for key, value in given.items() if key in HydraConfig.__dataclass_fields__})
    assert (config.dim, config.n_layer * config.mor_recursions, config.n_head, config.n_kv_head) == SCALES[name]
    assert config.n_layer % 8 == 0 and (config.pattern, config.vocab_size) == ("MMCCCLML", 50257)
    assert accounting.count_params(config) == formulas.count_params(config)
    stated = re.search(r"([\d,]+) parameters", path.read_text())[1]
    assert int(stated.replace(",", "")) == accounting.count_params(config)


# ---- FLOPs


@every_shape
def test_flops_are_those_of_the_formula(pattern, changes):
    config = shape(pattern, **changes)
    for T in (1, 2, 7, 8, 40, 64):
        assert accounting.flops_per_token(config, T) == pytest.approx(formulas.flops_per_token(config, T), rel=1e-12)
        for letter, block in zip(config.layers, accounting.skeleton(config).blocks, strict=True):
            expected = formulas.attention_flops(config, letter, T)
            assert accounting.attention_flops(block.attn, T) == pytest.approx(expected, rel=1e-12)
        layers = accounting.layer_flops(config, T)
        expected = [tokens * (formulas.attention_flops(config, letter, tokens) + 6 * config.dim * config.mlp_hidden)
                    for letter, tokens in formulas.layer_tokens(config, T)]  # fmt: skip
        assert layers == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pattern, changes", [it for it in SHAPES if "window" not in it[1]], ids=str)
def test_flops_are_those_that_torch_counts(pattern, changes):
    config = shape(pattern, **changes)
    assert torch_flops(config, 2, 40) == pytest.approx(2 * formulas.torch_flops(config, 40), rel=1e-12)


def test_windowed_flops_count_the_visible_pairs():
    pairs = sum(min(t + 1, 8) for t in range(64))
    full = accounting.flops_per_token(shape("M", n_layer=1), 64)
    windowed = accounting.flops_per_token(shape("M", n_layer=1, window=8), 64)
    scores = windowed - (full - 2 * 64 * 64)
    assert scores == pytest.approx(4 * 64 * (pairs - 64 / 2 * 8 / 64) / 64, rel=1e-3)  # the mean of t keys, not t+1
    assert accounting.flops_per_token(shape("M", n_layer=1, window=64), 64) == full
    assert accounting.flops_per_token(shape("C", window=8), 64) == accounting.flops_per_token(shape("C"), 64)


def test_flops_fall_with_the_capacity_and_rise_with_the_recursions():
    T = 40
    flops = [accounting.flops_per_token(shape(mod_capacity=part), T) for part in (0.125, 0.25, 0.5)]
    dense = accounting.flops_per_token(shape(), T)
    assert flops == sorted(flops) and flops[-1] < dense
    recursive = accounting.flops_per_token(shape(mor_recursions=3), T)
    assert dense < recursive < 3 * dense


# ---- states


@every_shape
def test_state_bytes_are_those_of_the_formula_and_of_the_state(pattern, changes):
    config = shape(pattern, **changes)
    net = Hydra(config)
    for T in (1, 7, 40):
        tail = formulas.tail_bytes(config)
        assert accounting.state_bytes(config, T) == formulas.kv_bytes(config, T) + tail
        allocated = accounting.state_bytes(config, T, allocated=True)
        assert allocated == formulas.kv_bytes(config, T, allocated=True) + tail
        assert accounting.state_bytes(config, T, 4, allocated=True) == 2 * allocated
        for B in (1, 3):
            assert new_state(net, B, T).bytes() == B * 2 * allocated  # fp32
    with torch.autocast("cpu", torch.bfloat16):
        assert new_state(net, 3, 40).bytes() == 3 * allocated
    assert new_state(net.to(torch.bfloat16), 3, 40).bytes() == 3 * allocated


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["M", "C", "L", "LMMCCL"])
@pytest.mark.parametrize("changes", [*ROUTED, {"mod_capacity": 0.5, "window": 5}], ids=str)
def test_routers_at_their_training_capacity_fill_what_is_counted(pattern, changes, monkeypatch):
    """What is allocated does not depend on them."""
    config = shape(pattern, n_layer=6, **changes)
    net = Hydra(config).eval()
    B = 3
    T = 40
    allowed = []  # tokens that each router lets pass, in the order of the calls
    for recursion, tokens in enumerate(formulas.recursion_tokens(config, T)):
        if recursion:
            allowed.append(tokens)
        allowed += [max(1, int(config.mod_capacity * tokens))] * len(net.depth_routers)
    allowed = iter(allowed)

    def first_ones(self, x_BTD):
        return (torch.arange(x_BTD.size(1)) < next(allowed)).float().expand(x_BTD.shape[:2]) - 0.5

    monkeypatch.setattr(Router, "forward", first_ones)
    state = new_state(net, B, T)
    assert state.bytes(filled=True) == B * formulas.tail_bytes(config, 4)
    prefill(net, torch.zeros(B, T, dtype=torch.long), state)
    assert next(allowed, None) is None
    assert state.bytes(filled=True) == B * accounting.state_bytes(config, T, 4)
    assert state.bytes() == B * accounting.state_bytes(config, T, 4, allocated=True)
    dense = replace(config, mod_capacity=0.0, mor_recursions=1)
    everything = accounting.state_bytes(config, T, allocated=True)
    assert everything == config.mor_recursions * accounting.state_bytes(dense, T)
    assert accounting.state_bytes(config, T) < everything or config.window


def test_state_bytes_of_the_architecture_page():
    config = HydraConfig(**SMALL)
    attns = {letter: KINDS[letter].make(config) for letter in "AGML"}
    values = [accounting.attention_state(attn, 1) for attn in attns.values()]
    assert values == [1536, 384, 128, 400]
    ccqa = KINDS["C"].make(config)
    assert accounting.attention_state(ccqa, 8) - accounting.attention_state(ccqa, 7) == 96
    assert (accounting.state_bytes(config, 2) - accounting.state_bytes(config, 1)) / 2 / 24 == 184
    windowed = HydraConfig(**SMALL | {"window": 100})
    assert accounting.state_bytes(config, 1000) - accounting.state_bytes(windowed, 1000) == 2 * 900 * 128 * 9


# ---- the memory of a step


def allocated_peak(config: HydraConfig, B: int, T: int, mixed: bool, recompute: bool, forwards: int) -> int:
    """What torch's allocator has handed out at most in a step's forwards and backwards."""
    net = Hydra(config)
    net.recompute = recompute
    idx = torch.randint(config.vocab_size, (B, T))
    with torch.profiler.profile(profile_memory=True) as profiler:
        for _ in range(forwards):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                output = net(idx, idx)
            output.loss.backward()
    events = [it for it in profiler.profiler.kineto_results.events() if it.name() == "[memory]"]
    sizes = [it.nbytes() for it in sorted(events, key=lambda it: it.start_ns())]
    return max(accumulate(sizes))


PLANNED = [*((letter, {}, {}) for letter in KINDS), ("M", {"window": 8}, {}), (ALL, {"mod_capacity": 0.25}, {}),
           (ALL, {"mod_capacity": 0.5, "mor_recursions": 3}, {}), (ALL, {}, {"mixed": True}),
           (ALL, {}, {"recompute": True}), (ALL, {"mod_capacity": 0.5}, {"recompute": True, "mixed": True}),
           (ALL, {}, {"forwards": 2}), (ALL, FAIR[-1] | {"pattern": ALL}, {"mixed": True}),
           ("C", {"vocab_size": 400_000}, {}), ("C", {"vocab_size": 400_000}, {"mixed": True})]  # fmt: skip


@pytest.mark.parametrize("pattern, changes, how", PLANNED, ids=str)
def test_a_plan_is_what_torch_allocates(pattern, changes, how):
    """Every letter, routing, recomputation, the loss in one piece and in chunks: what is alive besides the weights and
    the optimiser, in the course of a step. The allocator rounds up, and indices of a few bytes stay on."""
    how = {"mixed": False, "recompute": False, "forwards": 1} | how
    config = shape(pattern, **changes)
    dtype = torch.bfloat16 if how["mixed"] else torch.float32
    history = accounting.step_history(config, 3, 64, dtype, "", how["recompute"], how["forwards"])
    weights = 4 * formulas.count_params(config)
    counted = max(sum(live.values()) for live in history) - weights
    assert counted == pytest.approx(allocated_peak(config, 3, 64, **how), rel=0.01)
    assert history[0]["parameters"] == history[-1]["parameters"] == weights == history[-1]["gradients"]
    kept = max(live["activations"] for live in history)
    assert history[-1]["copies"] == 0 and history[-1]["activations"] + history[-1]["backward"] < 2**14 < kept


@pytest.mark.slow
@pytest.mark.parametrize("pattern, changes, dtype", [
    (ALL, {}, torch.bfloat16), ("MC", {"mod_capacity": 0.5, "mor_recursions": 2, "n_layer": 2}, torch.float32),
], ids=str)  # fmt: skip
def test_devices_share_the_batch_and_with_fsdp_the_weights(pattern, changes, dtype):
    config = shape(pattern, **changes)
    weights = 4 * accounting.count_params(config)
    one = accounting.memory_plan(config, 8, 64, dtype)
    assert tuple(one) == accounting.PARTS and one["gathered"] == 0
    assert (one["parameters"], one["optimiser"]) == (weights, 2 * weights)
    for devices in (2, 8):
        alone = accounting.memory_plan(config, 8 // devices, 64, dtype)
        ddp = accounting.memory_plan(config, 8, 64, dtype, devices=devices)
        fsdp = accounting.memory_plan(config, 8, 64, dtype, devices=devices, parallel="fsdp")
        assert (ddp["parameters"], ddp["gradients"], ddp["optimiser"]) == (weights, weights, 2 * weights)
        assert sum(alone.values()) <= sum(ddp.values()) <= sum(alone.values()) + weights
        assert (fsdp["parameters"], fsdp["optimiser"]) == (weights / devices, 2 * weights / devices)
        assert fsdp["gradients"] <= weights / devices and fsdp["copies"] == ddp["gathered"] == 0 < fsdp["gathered"]
        added = accounting.memory_plan(config, 8, 64, dtype, devices=devices, parallel="fsdp", forwards=2)
        assert weights / devices < added["gradients"] <= weights  # FSDP2 adds up whole ones where it does not reduce
    assert (one["copies"] > 0) == (dtype == torch.bfloat16)


def test_a_plan_knows_recomputation_and_accumulation():
    config = shape("MCL")
    plain, again, twice = (accounting.memory_plan(config, 4, 64, torch.float32, **how)
                           for how in ({}, {"recompute": True}, {"forwards": 5}))  # fmt: skip
    assert again["activations"] < plain["activations"] / 4
    assert sum(twice.values()) == pytest.approx(sum(plain.values()) + twice["parameters"], rel=0.01)


@pytest.mark.slow
def test_a_plan_knows_what_compilation_keeps():
    """The blocks' backwards are written to keep little: a compiler keeps no more. Its loss has larger chunks."""
    config = shape("MC", n_layer=2)
    torch._dynamo.reset()
    eager, compiled = (accounting.memory_plan(config, 4, 64, torch.float32, how)["activations"] for how in ("", "cpu"))
    assert eager / 2 < compiled <= 1.02 * eager
    wide = shape("C", n_layer=1, vocab_size=400_000)
    torch._dynamo.reset()
    eager, fused = (accounting.memory_plan(wide, 8, 64, torch.bfloat16, how)["loss"] for how in ("", "cuda"))
    logits = 2 * 400_000 * 8 * 64  # all of them in one chunk, in bf16
    assert eager < 2 * logits < fused < 2 * logits + (2 + 4 + 2) * 400_000 * 64  # the weight's copy, gradient, product


def step_peak(config: HydraConfig, B: int, T: int, mixed: bool) -> dict[str, float]:
    """A model, its optimiser and some steps, measured after the same once. glibc gives every freed tensor back: its
    heap would keep gaps of up to a third."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD

    def steps() -> None:
        net = Hydra(config)
        optimizer = make_optimizer(net, TrainConfig())
        idx = torch.randint(config.vocab_size, (B, T))
        for _ in range(3):
            train_step(net, optimizer, [(idx, idx)], 1.0, torch.autocast("cpu", torch.bfloat16, enabled=mixed))

    steps()
    gc.collect()
    return machine.memory_of(steps, torch.device("cpu"))


MEASURED = [  # of different kinds: the default run, few wide layers, two routers in bf16, a loss in chunks
    (HydraConfig(), 4, 256, False), (HydraConfig(dim=512, n_layer=2, pattern="ML", block_size=512), 4, 512, False),
    (HydraConfig(mod_capacity=0.25, mor_recursions=2, block_size=1024), 2, 1024, True),
    (HydraConfig(vocab_size=50257, dim=128, n_layer=4, pattern="C", block_size=512), 4, 512, False)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak is read from Linux's /proc")
@pytest.mark.parametrize("config, B, T, mixed", MEASURED, ids=range(len(MEASURED)))
def test_a_plan_is_what_a_process_takes(config, B, T, mixed):
    dtype = torch.bfloat16 if mixed else torch.float32
    plan = accounting.memory_plan(config, B, T, dtype)
    found = machine.in_child(step_peak, config, B, T, mixed)["step_mb"]
    print(f"planned {sum(plan.values()) / 1e6:.1f} MB, measured {found:.1f} MB")
    assert sum(plan.values()) / 1e6 == pytest.approx(found, rel=0.15)


def test_a_plan_is_printed_and_nothing_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "prepare", lambda *_: pytest.fail("it prepared data"))
    out = tmp_path / "out"
    assert train.main([*TINY, "--plan", "--batch_size=12", "--n_layer=2", f"--out_dir={out}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[2:-1]]
    assert rows[0] == ["devices", "parallel", *accounting.PARTS, "total", "fits"] and not out.exists()
    assert [row[:2] for row in rows[1:]] == [["1", "none"], ["2", "ddp"], ["2", "fsdp"], ["4", "ddp"], ["4", "fsdp"]]
    for row in rows[1:]:
        assert sum(map(float, row[2:-2])) == pytest.approx(float(row[-2]), abs=0.01) and row[-1] == "yes"
    assert re.fullmatch(r"cpu has [0-9.]+ GB, [0-9.]+ GB of them free now", lines[-1])
    monkeypatch.setattr(accounting, "free_memory", lambda device: 1e5)
    assert train.main([*TINY, "--plan", "--batch_size=1"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].endswith(" no")


@pytest.mark.slow
def test_a_gpu_is_planned_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch._dynamo.reset()
    lines = [*accounting.plan_lines(shape("M", n_layer=1), TrainConfig(device="cuda", batch_size=1), 1e9)]
    assert "torch.bfloat16, compiled for cuda" in lines[1] and len(lines) == 4 and lines[-1].endswith("not known")


@pytest.mark.slow
def test_the_plan_of_a_large_model_takes_little_memory():
    """7 GB of weights alone: in a process that may have 4 GB."""
    command = f"ulimit -v 4000000; exec {sys.executable} train.py config/scale_1500m.toml --plan --batch_size=1"
    found = subprocess.run(["bash", "-c", f"{command} --compile=off --dtype=bfloat16"], cwd=ROOT, text=True,
                           capture_output=True, timeout=300)  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert float(found.stdout.splitlines()[3].split()[2]) == pytest.approx(4 * 1_765_122_504 / 1e9, abs=1e-3)


def test_step_bytes_are_the_plan_s():
    config = shape("MC", n_layer=2)
    kept, needed = accounting.step_bytes(config, 2, 40, 4)
    assert kept == 4 * 4 * formulas.count_params(config)
    plan = accounting.memory_plan(config, 2, 40, torch.float32)
    assert kept / 4 + needed == sum(plan.values()) - plan["optimiser"] - plan["gradients"]
    assert needed >= 4 * (2 * 40 * config.vocab_size + config.n_layer * 2 * 40 * config.dim)
    assert accounting.step_bytes(config, 4, 40, 4)[1] == pytest.approx(2 * needed, rel=0.05)
    assert accounting.step_bytes(replace(config, mod_capacity=0.125), 2, 40, 4)[1] < needed


@pytest.mark.parametrize("changes", [{}, {"pattern": "A"}, {"mlp_ratio": 4.0}, {"mor_recursions": 2}, {"dim": 32}])
def test_the_bound_is_above_the_plan(changes):
    config = replace(HydraConfig(dim=64, n_head=4, n_kv_head=2, n_layer=2, pattern="CM", vocab_size=512), **changes)
    for B, T in ((1, 16), (2, 128)):
        assert accounting.step_bound(config, B, T) > sum(accounting.memory_plan(config, B, T, torch.float32).values())


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "short_conv": 3}, {"mod_capacity": 0.5, "router": "random"},
                                     {"mor_recursions": 3, "router": "random"}])  # fmt: skip
def test_the_least_of_a_step_is_known_for_every_option(changes):
    """Also for those that one letter alone, or one layer, would be refused with."""
    config = replace(HydraConfig(dim=64, n_head=4, n_kv_head=2, n_layer=4, pattern="MCLA", vocab_size=512), **changes)
    blocks = accounting.one_of_each(config)
    assert set(blocks) == set("MCLA")
    sizes = {letter: accounting.count_params(block) for letter, block in blocks.items()}
    routers = [*accounting.skeleton(config).depth_routers, *accounting.skeleton(config).recursion_routers]
    routed = sum(map(accounting.count_params, routers))
    assert sum(sizes.values()) + 64 * 512 + 64 + routed == accounting.count_params(config)
    assert accounting.least_memory(config, 2, 1, True) < sum(
        accounting.memory_plan(config, 2, 256, torch.float32).values())  # fmt: skip
