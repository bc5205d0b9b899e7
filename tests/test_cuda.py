"""What a GPU alone can say: `python -m pytest -m cuda`; skipped where there is none.

The device is one name, so that a body which needs nothing but tensors runs on a CPU too once DEVICE says so, which is
how they were written. Numerics are held against fp64 on the CPU, in fp32 without TF32.
"""

import contextlib
import copy
import json
import math
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FAIR
from torch import Tensor

import layers
import machine
import train
from attention import KINDS
from generate import generate
from layers import IGNORE, cross_entropy, loss_chunk
from machine import Prefetch
from model import Hydra, HydraConfig
from train import TrainConfig, learning_rate_at, make_optimizer, train_step

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no GPU here"),
]

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
T = 200  # no multiple of FlexAttention's tiles of 128
# heads of 16 channels in every letter, the narrowest that FlexAttention takes
SHAPE = {"vocab_size": 257, "block_size": 256, "dim": 128, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "compression": 2,
         "latent_head_dim": 16, "mlp_ratio": 1.0}  # fmt: skip
CASES = {
    **{letter: {"pattern": letter} for letter in KINDS},
    "window": {"pattern": "M", "window": 48},
    "MoD": {"pattern": "MCLA", "n_layer": 4, "mod_capacity": 0.5},
    "MoR": {"pattern": "MCL", "n_layer": 3, "mor_recursions": 3},
    "MoD in MoR": {"pattern": "LC", "mod_capacity": 0.5, "mor_recursions": 2},
    "hybrid": {"pattern": "MMCCCLML", "n_layer": 8},
    "fair": FAIR[-1] | {"pattern": "AGMLC", "n_layer": 5},
}
every_case = pytest.mark.parametrize("case", CASES)
some_cases = pytest.mark.parametrize("case", ["hybrid", "MoD", "MoR", "fair"])
RUN = [*(f"--{name}={value}" for name, value in SHAPE.items()), "--n_layer=8", "--tokenizer=bytes", "--batch_size=4",
       f"--data={ROOT / 'config' / 'python4096.tiktoken'}", f"--device={DEVICE}", "--eval_iters=2", "--log_interval=1",
       "--final_eval_iters=4", "--sample_tokens=4", "--learning_rate=1e-2", "--warmup_iters=20"]  # fmt: skip


@pytest.fixture(autouse=True)
def exact():
    """Products in full fp32, no graphs of other tests, and pytest's own signal handlers, which a run replaces."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def chunked(monkeypatch):
    """A loss in chunks, as that of a large vocabulary."""
    monkeypatch.setattr(layers, "MAX_LOGITS", 257 * 40)


def make(case: str, **changes) -> Hydra:
    """A model on the CPU in which no parameter is at its start, and whose routers decide this way as often as that."""
    torch.manual_seed(0)
    net = Hydra(HydraConfig(**SHAPE | CASES[case] | changes))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p)) if "router" in name else p.add_(torch.randn_like(p) * 0.02)
    return net


def on_device(net: Hydra, compiled: bool) -> Hydra:
    net = copy.deepcopy(net).to(DEVICE)
    if compiled:
        net.compile_training()
    return net


def texts(step: int, B: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens and targets [B, T] that can be learnt: every text counts on by a number of its own."""
    generator = torch.Generator().manual_seed(step)
    start, by = torch.randint(1, 20, (2, B, 1), generator=generator)
    tokens = (start + by * torch.arange(T + 1)) % 257
    return tokens[:, :-1], tokens[:, 1:]


def gradients(net: Hydra, idx: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The loss and all its gradients, that of the embedded text too, in fp64 on the CPU."""
    embedded = []

    def keep(module, args, output):
        output.retain_grad()
        embedded.append(output)

    hook = net.embed.register_forward_hook(keep)
    loss = net(idx, targets).loss
    loss.backward()
    hook.remove()
    found = {"loss": loss.detach(), "input": embedded[0].grad}
    found |= {name: p.grad for name, p in net.named_parameters()}
    return {name: t.double().cpu() for name, t in found.items()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    """Each tensor within `limit` of the expected one's norm."""
    assert found.keys() == expected.keys()
    errors = {name: ((t - expected[name]).norm() / expected[name].norm()).item() for name, t in found.items()}
    assert {name: error for name, error in errors.items() if not error <= limit} == {}


def losses_of(case: str, device: torch.device, dtype: torch.dtype, compiled: bool, steps: int) -> list[float]:
    """The loss of every step of a short training."""
    net = make(case).to(device)
    if compiled:
        net.compile_training()
    run = TrainConfig(learning_rate=3e-3, warmup_iters=5)
    optimizer = make_optimizer(net, run)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    losses = []
    for step in range(steps):
        batch = tuple(t.to(device) for t in texts(step))
        losses.append(train_step(net, optimizer, [batch], 1.0, autocast).loss)
    return torch.stack(losses).tolist()


def logged(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def run(tmp: Path, name: str, *argv: str) -> list[float]:
    """The losses that a run of train.py logs."""
    assert train.main([*RUN, f"--out_dir={tmp / name}", f"--cache_dir={tmp / 'cache'}", *argv]) == 0
    return logged(tmp / name)


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- numerics


@every_case
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_forward_and_backward_equal_fp64_on_the_cpu(case, compiled, chunked):
    """fp32's roundings of 6e-8 pile up to some 1e-6, rotation angles of up to 200 radians add as much; with TF32 it
    would be 4e-4."""
    net = make(case)
    idx, targets = texts(0)
    expected = gradients(copy.deepcopy(net).double(), idx, targets)
    found = gradients(on_device(net, compiled), idx.to(DEVICE), targets.to(DEVICE))
    assert_near(found, expected, 1e-4)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_compiled_loss_equals_the_plain_one(monkeypatch, dtype, limit):
    """In several chunks, with ignored targets; in bf16 (2^-9) up to its rounding of logits and gradients."""
    monkeypatch.setattr(layers, "MAX_LOGITS", 257 * 8)
    torch.manual_seed(0)
    x, weight = torch.randn(96, 64), torch.randn(257, 64) * 0.3
    targets = torch.randint(0, 257, (96,))
    targets[::5] = IGNORE
    exact = [t.double().requires_grad_() for t in (x, weight)]
    leaves = [t.to(DEVICE).requires_grad_() for t in (x, weight)]
    chunks = []

    def counted(*args):
        chunks.append(len(args[0]))
        return compiled(*args)

    compiled = torch.compile(loss_chunk, fullgraph=True, dynamic=False)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits, loss = cross_entropy(*leaves, targets.to(DEVICE), counted)
    plain = F.cross_entropy(exact[0] @ exact[1].t(), targets, ignore_index=IGNORE)
    loss.backward()
    plain.backward()
    assert logits is None and len(chunks) > 1 and sum(chunks) == 96
    found = {"loss": loss.detach(), "x": leaves[0].grad, "weight": leaves[1].grad}
    expected = {"loss": plain.detach(), "x": exact[0].grad, "weight": exact[1].grad}
    assert_near({name: t.double().cpu() for name, t in found.items()}, expected, limit)


@pytest.mark.parametrize("case, limit", [("hybrid", 0.03), ("MoD", 0.03), ("MoR", 0.1)])
def test_twenty_steps_in_bf16_lose_what_the_cpu_loses_in_fp32(case, limit):
    """bf16 on a CPU comes within 0.01 of fp32, with recursions, whose tokens are other ones then, within 0.035."""
    expected = losses_of(case, CPU, torch.float32, False, 20)
    found = losses_of(case, DEVICE, torch.bfloat16, True, 20)
    assert expected[-1] < 0.85 * expected[0]
    assert found == pytest.approx(expected, rel=limit)


@some_cases
def test_greedy_text_is_the_cpus(case):
    """From prompts of different lengths, whose keys and values lie in preallocated slots."""
    net = make(case).eval()
    prompts = [texts(0)[0][0, :n] for n in (5, 31, 17)]
    expected = torch.stack(list(generate(net, prompts, 40, temperature=0.0)), dim=1)
    found = torch.stack(list(generate(on_device(net, False), prompts, 40, temperature=0.0)), dim=1)
    assert torch.equal(found.cpu(), expected)


@some_cases
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_captured_decoding_is_eager_decoding(case, temperature):
    """Past 128 slots, where another graph begins, in rows of different lengths."""
    net = on_device(make(case).eval(), False)
    prompts = [texts(0)[0][0, :n] for n in (100, 31, 120)]
    found = []
    for capture in (False, True):
        generator = torch.Generator(DEVICE).manual_seed(1)
        steps = generate(net, prompts, 40, temperature, top_p=0.95, generator=generator, static=True, capture=capture)
        found.append(torch.stack(list(steps), dim=1))
    assert found[0].shape == (3, 40) and torch.equal(*found)


def test_captured_decoding_waits_for_nothing():
    net = on_device(make("hybrid").eval(), False)
    generator = torch.Generator(DEVICE).manual_seed(1)
    steps = generate(net, [texts(0)[0][0, :9]], 40, 0.8, top_p=0.95, generator=generator, static=True)
    for _ in range(3):  # the prefill, the warm-up, the capture
        next(steps)
    machine.sync(DEVICE)
    with waiting_is_an_error():
        tokens = [next(steps) for _ in range(20)]
    assert torch.stack(tokens).unique().numel() > 1


@pytest.mark.parametrize("case, compiled", [("hybrid", False), ("hybrid", True), ("MoD", False), ("MoR", False)])
def test_recomputed_blocks_have_the_same_gradients_for_less_memory(case, compiled):
    net = make(case)
    idx, targets = (t.to(DEVICE) for t in texts(0, B=16))
    found, peaks = [], []
    for recompute in (False, True):
        mine = on_device(net, compiled)
        mine.recompute = recompute
        found.append(gradients(mine, idx, targets))
        mine.zero_grad()
        peaks.append(machine.memory_of(lambda mine=mine: mine(idx, targets).loss.backward(), DEVICE)["step_mb"])
    assert_near(found[1], found[0], 1e-5)
    assert peaks[1] < 0.9 * peaks[0]


# ---- the step


def stepping(case: str, dtype: torch.dtype = torch.bfloat16):
    """One training step after the other, compiled, on batches that are copied while the last one runs."""
    net = on_device(make(case), True)
    run = TrainConfig(learning_rate=1e-3, warmup_iters=5)
    optimizer = make_optimizer(net, run)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    batches = Prefetch(lambda step: [texts(2 * step), texts(2 * step + 1)], DEVICE)

    def step(number: int) -> train.Step:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(number, run, run.max_iters)
        return train_step(net, optimizer, batches(number), 1.0, autocast)

    return net, step


@some_cases
def test_steps_behind_the_first_compile_nothing_and_wait_for_nothing(case, chunked):
    """Fifty of them, of which the batches are copied while the step before runs."""
    _, step = stepping(case)
    step(0)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    machine.sync(DEVICE)
    with torch._dynamo.config.patch(error_on_recompile=True), waiting_is_an_error():
        losses = [step(number).loss for number in range(1, 51)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    assert torch.stack(losses).isfinite().all()


def test_waiting_is_noticed():
    """Else the tests below say nothing."""
    with waiting_is_an_error(), pytest.raises(RuntimeError):
        torch.ones((), device=DEVICE).item()


def test_a_gradient_that_is_not_finite_updates_nothing(chunked):
    net, step = stepping("hybrid", torch.float32)
    step(0)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    poison = net.blocks[5].mlp.down.weight.register_hook(lambda grad: grad * math.inf)
    bad = step(1)
    poison.remove()
    assert not bad.grad_norm.isfinite() and bad.loss.isfinite()
    assert not bad.norms["blocks.5.mlp.down.weight"].isfinite() and bad.norms["embed.weight"].isfinite()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    step(2)
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_batches_arrive_whole_while_the_device_is_busy():
    batches = Prefetch(lambda step: [texts(step)], DEVICE)
    busy = torch.randn(2048, 2048, device=DEVICE)
    kept = []
    for step in range(6):
        kept.append([t.clone() for t in chain(*batches(step))])
        busy = (busy @ busy).tanh()
    for step, found in enumerate(kept):
        for t, expected in zip(found, texts(step), strict=True):
            assert t.device.type == DEVICE.type and torch.equal(t.cpu(), expected)


# ---- runs


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """Up to the order of atomic additions."""
    straight = run(tmp_path, "straight", "--dtype=float32", "--max_iters=8")
    run(tmp_path, "two", "--dtype=float32", "--max_iters=4")
    assert run(tmp_path, "two", "--resume", "--max_iters=8") == pytest.approx(straight, rel=1e-4)
    assert len(straight) == 8


@pytest.mark.parametrize("routing, graphs", [([], 6), (["--mod_capacity=0.5"], 10)], ids=["dense", "MoD"])
def test_a_run_compiles_few_graphs(tmp_path, routing, graphs):
    """Of three letters one for training and one for evaluation, which also checks a state before it is saved."""
    torch._dynamo.utils.counters.clear()
    run(tmp_path, "run", "--compile=on", "--max_iters=4", "--eval_interval=2", *routing)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most")
def test_a_run_stays_on_the_gpu_that_was_asked_for(tmp_path):
    before = torch.cuda.memory_reserved(0)
    run(tmp_path, "run", "--device=cuda:1", "--max_iters=3", "--eval_interval=2")
    assert torch.cuda.max_memory_allocated(1) > 0 and torch.cuda.memory_reserved(0) == before


# ---- measuring


def test_events_and_the_host_agree_on_long_work():
    a = torch.randn(4096, 4096, device=DEVICE)

    def work():
        for _ in range(30):
            a @ a

    work()
    machine.sync(DEVICE)
    start = time.perf_counter()
    work()
    machine.sync(DEVICE)
    assert machine.seconds_of(work, DEVICE) == pytest.approx(time.perf_counter() - start, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measured_peak_is_below_the_data_sheets(dtype):
    torch.set_float32_matmul_precision("high")  # as a run does
    listed = machine.datasheet_peak(DEVICE, dtype)
    if listed is None:
        pytest.skip("this device's data sheet is not known here")
    assert 0.4 * listed < machine.matmul_peak(DEVICE, dtype) < 1.05 * listed


def test_inputs_in_turn_exceed_the_cache():
    x = torch.randn(1, 1024, 768, device=DEVICE)
    found = machine.cold_copies(x, machine.cache_bytes(DEVICE))
    assert len(found) > 2 and sum(t.nbytes for t in found[1:]) >= 2 * machine.cache_bytes(DEVICE)


@pytest.mark.slow
def test_the_bench_has_all_its_tables(tmp_path):
    shape = [f"--{name}={value}" for name, value in (SHAPE | CASES["hybrid"]).items()]
    options = [f"--device={DEVICE}", "--rounds=2", f"--json={tmp_path / 'all.json'}"]
    command = [sys.executable, "bench.py", *shape, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tables = json.loads((tmp_path / "all.json").read_text())["tables"]
    assert len(tables) == 8 and all(len(rows) > 0 for rows in tables.values())
    for name in ("speed", "compression", "length", "train", "decode", "routing"):
        assert any(row.get("tflops", 0) > 0 for row in tables[name]), name
