"""What HYDRA costs: `python bench.py` prints every table in a version of three minutes for two CPU cores,
`python bench.py TABLE [config/x.toml] [--key=value ...]` one of them in full. Shape: config/small.toml, random weights.

- speed: forward and forward+backward of each attention, of one block, of the macro-block and of the whole transformer.
- memory: bytes of a training step of the same, and of the whole step against the naive path (see `naive`).
- compression: CCQA at 2x, 4x, 8x. - flops: cost and cache against MHA, counted and by formula, beside an older report.
- length: time against T for each letter, and the fitted exponent. - train: a whole optimiser step of tiny and of small.
- decode: generation with states against without, the hybrid against MHA; --peers: against a Llama of equal size.

Everything that is compared runs in one process, in turns; the median counts, the spread is (Q3 - Q1) / median, a ratio
is the median of the round-by-round ratios. Warm-up and compilation (with empty caches) are apart from the steady state.
bf16 is autocast over fp32 weights, as train.py trains, decode apart. FLOPs are counted by the closed formulas of
model.py, which the flops table holds against the modules, a backward twice its forward; "of peak" is against a large
matrix product in that dtype, timed before and after. Absolute times of a shared CPU mean little, ratios more.
A row that does not fit the memory, or the short run's time, is listed as left out with the reason.
"""

import ctypes
import datetime
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import model as model_module
from attention import CCQA, GQA, MLA
from configurator import UserError, build, cli, need, parse, to_toml
from model import Hydra, HydraConfig, SwiGLU, attention_flops, attention_params, count_params, flops_per_token
from model import kv_bytes, state_values
from train import TrainConfig, copy_bandwidth, git_hash, matmul_peak, pick_device, sync, write_atomically

CONFIGS = Path(__file__).parent / "config"
LETTERS = {"A": "MHA", "G": "GQA", "M": "MQA", "C": "CCQA", "L": "MLA"}
DTYPES = (torch.float32, torch.bfloat16)
MODES = ("eager", "compiled")
SHAPES = ((1, 256), (4, 512), (8, 1024))  # (B, T) of speed and memory
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
SHORT = {"speed": 35, "memory": 25, "compression": 12, "flops": 4, "length": 30, "train": 35, "decode": 25}  # seconds


@dataclass(frozen=True)
class BenchConfig:
    """What to measure; raises UserError, in one line, for values that cannot be."""

    rounds: int = 12  # timed turns of every contestant, after one that is not counted; slow ones take fewer, at least 3
    only: str = ""  # the comparisons that have all these words, such as "attention 1024 float32 eager"
    peers: bool = False  # length and decode: compare with transformers too
    prompt_tokens: int = 512  # decode: length of the prompts
    new_tokens: int = 128  # decode: tokens generated behind them
    context: int = 4096  # decode: length of the past in the comparison of hybrid and MHA
    json: str = ""  # also write everything to this file
    plot: str = ""  # also draw charts into this folder (needs matplotlib)
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    seed: int = 1337  # of the weights and inputs

    def __post_init__(self):
        for name in ("prompt_tokens", "new_tokens", "context", "rounds"):
            need(self, name, getattr(self, name) >= 1, "it must be at least 1")
        folder = os.path.dirname(self.json) or "."
        need(self, "json", os.path.isdir(folder), f"there is no folder {folder}: make it first")


@dataclass
class Run:
    """One table's run: what is measured, where, and until when."""

    table: str
    c: HydraConfig
    b: BenchConfig
    device: torch.device
    full: bool
    peaks: dict[torch.dtype, float]
    until: float = math.inf  # on time.perf_counter's clock

    @property
    def modes(self) -> tuple[str, ...]:
        asked = tuple(m for m in MODES if m in self.b.only.split())
        return asked or (MODES if self.full else MODES[:1])

    @property
    def seconds(self) -> float:
        """After so long a comparison takes no further round, once it has three."""
        return 60.0 if self.full else 1.5

    def wants(self, label: dict) -> bool:
        return {w for w in self.b.only.split() if w not in MODES} <= set(map(str, label.values()))

    def refuse(self, size: float, seconds: float) -> str:
        """Why this cannot be measured here ("" where it can): `size` bytes do not fit, or the time does not."""
        if size > available(self.device):
            return f"needs about {size / 1e9:.1f} GB, {available(self.device) / 1e9:.1f} are available"
        if time.perf_counter() + seconds > self.until:
            return f"no time in the short run: python bench.py {self.table}"
        progress(f"{self.table}: about {seconds:.0f} s for the next rows")
        return ""


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def available(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return 1024 * int(meminfo.read_text().partition("MemAvailable:")[2].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------------------------------------------
# timing


def in_turns(contestants: dict, rounds: int, device: torch.device, limit: float = math.inf) -> dict:
    """Seconds of every contestant in every round; one round of warm-up is not counted. After `limit` seconds no further
    round begins, once there are three."""
    seconds: dict[object, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > 3 and time.perf_counter() - began > limit:
            break
        for name, call in contestants.items():
            sync(device)
            start = time.perf_counter()
            call()
            sync(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios round by round: a slow phase of the machine is in both."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def spread(t: list[float]) -> float:
    """Interquartile range over the median."""
    if len(t) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(t, method="inclusive")
    return (high - low) / middle


def exponent(lengths: list[int], seconds: list[float]) -> float:
    """p of the least-squares fit seconds = a * T**p, on logarithms."""
    return statistics.linear_regression([math.log(T) for T in lengths], [math.log(s) for s in seconds]).slope


# ---------------------------------------------------------------------------------------------------------------------
# what is measured


def make(level: str, c: HydraConfig, B: int, T: int, device: torch.device) -> tuple[list, list, Callable[[], Tensor]]:
    """(leaves that get gradients, modules to compile, forward on a fixed random input). Levels: attention, block (of
    the pattern's first letter), macro (its layers once), model (with embedding, head and loss), peer (ZayaAttention).
    The parts of a trunk get an input that requires a gradient, as they do behind other layers."""
    if level == "model":
        model = Hydra(replace(c, block_size=max(T, c.block_size))).to(device)
        idx, targets = torch.randint(0, c.vocab_size, (2, B, T), device=device)
        return list(model.parameters()), list(model.blocks), lambda: model(idx, targets)[1]
    trunk = Hydra(replace(c, vocab_size=1, n_layer=len(c.pattern) if level == "macro" else 1)).to(device)
    x = torch.randn(B, T, c.dim, device=device, requires_grad=True)
    ctx = trunk.context(torch.arange(T, device=device))
    if level == "peer":
        theirs = zaya(c).to(device)
        cos, sin = (t.squeeze(1).expand(B, -1, -1) for t in ctx.rope[trunk.blocks[0].attn.rope_width])
        first, second = sin.chunk(2, dim=-1)
        rope = cos, torch.cat((-first, second), dim=-1)  # ours carries the half's sign
        return [x, *theirs.parameters()], [theirs], lambda: theirs(x, position_embeddings=rope)[0]
    parts = [trunk.blocks[0].attn] if level == "attention" else list(trunk.blocks)

    def forward() -> Tensor:
        y = x
        for part in parts:
            y = part(y, ctx)
        return y

    return [x, *(p for part in parts for p in part.parameters())], parts, forward


def zaya(c: HydraConfig) -> nn.Module:
    """transformers' CCQA of the same widths and taps (random weights; the tests hold the two equal)."""
    transformers = import_or_say("transformers", "--peers")
    K = c.dim // c.compression // c.n_head
    config = transformers.ZayaConfig(
        hidden_size=c.dim, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=K, vocab_size=1,
        cca_time0=c.conv_kernel, cca_time1=c.conv_kernel, num_hidden_layers=1, attn_implementation="sdpa")  # fmt: skip
    attn = transformers.models.zaya.modeling_zaya.ZayaAttention(config, 0)
    for p in attn.parameters():
        nn.init.normal_(p, std=0.02)
    return attn


def import_or_say(name: str, what: str):
    """An optional package, or the sentence that says how to get it."""
    try:
        module = __import__(name)
    except ImportError as error:
        raise UserError(f"{what} needs {name}, which is not installed: pip install {name}") from error
    return module


def forward_flops(level: str, c: HydraConfig, B: int, T: int) -> float:
    if level == "model":
        return B * T * flops_per_token(c, T)
    mlp = 6 * c.dim * c.mlp_hidden if level in ("block", "macro") else 0
    return B * T * sum(attention_flops(c, a, T) + mlp for a in (c.pattern if level == "macro" else c.pattern[0]))


def estimated_bytes(level: str, c: HydraConfig, B: int, T: int, copies: int) -> tuple[float, float]:
    """(bytes of `copies` of the weights, of what a step saves), roughly: to leave out what cannot fit."""
    layers = {"model": c.n_layer, "macro": len(c.pattern)}.get(level, 1)
    weights = count_params(c) if level == "model" else layers * (4 * c.dim**2 + 3 * c.dim * c.mlp_hidden)
    logits = 12 * min(B * T * c.vocab_size, model_module.MAX_LOGITS) if level == "model" else 0
    return 4 * copies * weights, 4 * layers * B * T * (16 * c.dim + 5 * c.mlp_hidden) + logits


def backward_of(leaves: list, forward: Callable[[], Tensor], dtype: torch.dtype) -> tuple[Callable, Callable]:
    """(forward, forward and backward) under autocast where `dtype` is bf16. The output's gradient is random, fixed."""
    device = leaves[0].device.type

    def run_forward() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return forward()

    grad = torch.randn_like(run_forward())

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        run_forward().backward(grad)

    return run_forward, step


def compare(run: Run, what: dict[str, tuple[str, HydraConfig]], B: int, T: int, dtype: torch.dtype) -> Iterator[dict]:
    """Rows of everything in `what`, name -> (level, shape), timed in turns; the first is what the others relate to."""
    modes, first = run.modes, next(iter(what))
    label = {"subject": what[first][0], "B": B, "T": T, "dtype": short_name(dtype)}
    if not run.wants(label):
        return
    sizes = [estimated_bytes(*w, B, T, 2 * len(modes)) for w in what.values()]
    once = 4 * len(modes) * sum(forward_flops(*w, B, T) for w in what.values()) / run.peaks[dtype]
    reason = run.refuse(sum(s[0] for s in sizes) + max(s[1] for s in sizes), 5 * once / 0.25)
    if reason:
        yield label | {"mix": " ".join(what), "left_out": reason}
        return
    torch.manual_seed(run.b.seed)
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    calls, cold = {}, {}
    with fresh_cache() if "compiled" in modes else nullcontext():
        for name, (level, c) in what.items():
            for mode in modes if level != "peer" else modes[:1]:
                leaves, parts, forward = make(level, c, B, T, run.device)
                calls[name, mode, "forward"], calls[name, mode, "step"] = pair = backward_of(leaves, forward, dtype)
                for part in parts if mode == "compiled" else []:
                    part.compile(fullgraph=True)
                start = time.perf_counter()
                pair[1]()
                sync(run.device)
                cold[name, mode] = time.perf_counter() - start
        before = matmul_peak(run.device, dtype)
        t = in_turns(calls, run.b.rounds, run.device, run.seconds)
        peak = max(before, matmul_peak(run.device, dtype))
    for name, mode in cold:
        level, c = what[name]
        forward, step = t[name, mode, "forward"], t[name, mode, "step"]
        seconds, baseline = statistics.median(step), (first, mode if (first, mode) in cold else modes[0])
        rate = 3 * forward_flops(level, c, B, T) / seconds
        row = label | {"subject": level, "mix": name, "mode": mode, "rounds": len(step)}
        row |= {"forward_ms": statistics.median(forward) * 1e3, "forward_spread": spread(forward),
                "ms": seconds * 1e3, "spread": spread(step), "tokens_per_s": B * T / seconds,
                "tflops": rate / 1e12, "peak_tflops": peak / 1e12, "of_peak": rate / peak,
                "forward_ratio": ratio(forward, t[*baseline, "forward"]), "ratio": ratio(step, t[*baseline, "step"])}
        if mode == "compiled":
            row["compile_s"] = cold[name, mode] - seconds
        if mode == "compiled" and (name, "eager") in cold:
            row["to_eager"] = ratio(step, t[name, "eager", "step"])
        if name == "C" and "Zaya" in what:
            row["to_peer"] = ratio(step, t["Zaya", modes[0], "step"])
        yield row


def of_letters(level: str, c: HydraConfig) -> dict[str, tuple[str, HydraConfig]]:
    return {letter: (level, replace(c, pattern=letter)) for letter in LETTERS}


def of_mixes(level: str, c: HydraConfig) -> dict[str, tuple[str, HydraConfig]]:
    """MHA in every layer, and the pattern."""
    return {"A": (level, replace(c, pattern="A" * len(c.pattern))), c.pattern: (level, c)}


def not_in_short(run: Run, what: str) -> Iterator[dict]:
    if not run.full:
        yield {"subject": what, "left_out": f"no time in the short run: python bench.py {run.table}"}


# ---------------------------------------------------------------------------------------------------------------------
# the tables, each a generator of rows


def speed(run: Run) -> Iterator[dict]:
    for B, T in SHAPES:
        for level in ("attention", "block", "macro", "model"):
            for dtype in DTYPES:
                what = of_letters(level, run.c) if level in ("attention", "block") else of_mixes(level, run.c)
                yield from compare(run, what, B, T, dtype)
    yield from not_in_short(run, "compiled")


def length(run: Run) -> Iterator[dict]:
    what = of_letters("attention", run.c) | ({"Zaya": ("peer", run.c)} if run.b.peers else {})
    times: dict[tuple, list] = {}
    for T in LENGTHS:
        for dtype in DTYPES:
            for row in compare(run, what, 1, T, dtype):
                yield row
                if "ms" in row:
                    times.setdefault((row["mix"], row["dtype"], row["mode"]), []).append((T, row["ms"]))
    for T in (1024, 4096):
        for dtype in DTYPES:
            yield from compare(run, of_mixes("macro", run.c), 1, T, dtype)
    for (mix, dtype, mode), points in times.items():
        if len(points) > 1:
            yield {"subject": "fit", "mix": mix, "dtype": dtype, "mode": mode, "from": points[0][0],
                   "to": points[-1][0], "exponent": exponent(*zip(*points, strict=True))}  # fmt: skip
    yield from not_in_short(run, "compiled")


def trainer(c: HydraConfig, B: int, T: int, device: torch.device, dtype: torch.dtype, change=None) -> tuple:
    """(model, its forward, its whole optimiser step as train.py does it); `change` is done to the model first."""
    t, model = TrainConfig(), Hydra(replace(c, block_size=max(T, c.block_size)))
    if change:
        change(model)
    model.to(device)
    optimizer = torch.optim.AdamW(model.optimizer_groups(t.weight_decay), lr=t.learning_rate,
                                  betas=(t.beta1, t.beta2), fused=True)  # fmt: skip
    idx, targets = torch.randint(0, c.vocab_size, (2, B, T), device=device)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(idx, targets)[1]

    def step() -> None:
        forward().backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        nn.utils.clip_grads_with_norm_(model.parameters(), t.grad_clip, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, forward, step


def first_step(c: HydraConfig, B: int, T: int, device: torch.device, dtype: torch.dtype) -> tuple[float, Callable]:
    """(seconds of the first step of a compiled model, compilation included, and the step)."""
    model, _, step = trainer(c, B, T, device, dtype)
    for block in model.blocks:
        block.compile(fullgraph=True)
    start = time.perf_counter()
    step()
    sync(device)
    return time.perf_counter() - start, step


def first_step_seconds(*args) -> float:
    return first_step(*args)[0]


def train(run: Run) -> Iterator[dict]:
    (tiny, t) = build(parse([str(CONFIGS / "tiny.toml")], HydraConfig, TrainConfig), HydraConfig, TrainConfig)
    for name, c, B, T in (("tiny", tiny, t.batch_size, tiny.block_size), ("shape", run.c, 4, 256)):
        for dtype in (torch.bfloat16, torch.float32):
            label = {"subject": name, "mix": c.pattern, "B": B, "T": T, "dtype": short_name(dtype)}
            if not run.wants(label):
                continue
            work = 6 * count_params(c) * B * T
            weights, saved = estimated_bytes("model", c, B, T, 4 * len(run.modes))
            reason = run.refuse(weights + saved, 4 * len(run.modes) * work / run.peaks[dtype] / 0.5)
            if reason:
                yield label | {"left_out": reason}
                continue
            torch.manual_seed(run.b.seed)
            torch._dynamo.reset()
            steps, cold, warm = {}, 0.0, 0.0
            if "eager" in run.modes:
                steps["eager"] = trainer(c, B, T, run.device, dtype)[2]
            with fresh_cache() if "compiled" in run.modes else nullcontext():
                if "compiled" in run.modes:
                    progress(f"train: compiling {name}")
                    cold, steps["compiled"] = first_step(c, B, T, run.device, dtype)
                    warm = in_child(first_step_seconds, c, B, T, run.device, dtype, method="spawn")
                before = matmul_peak(run.device, dtype)
                times = in_turns(steps, run.b.rounds, run.device, run.seconds)
            peak = max(before, matmul_peak(run.device, dtype))
            for mode, seconds in times.items():
                median = statistics.median(seconds)
                row = label | {"mode": mode, "rounds": len(seconds), "ms": median * 1e3, "spread": spread(seconds),
                               "tokens_per_s": B * T / median, "tflops": work / median / 1e12,
                               "peak_tflops": peak / 1e12, "of_peak": work / median / peak}  # fmt: skip
                if mode == "compiled":
                    row |= {"compile_s": cold - median, "warm_s": warm - median}
                if len(times) > 1:
                    row["to_eager"] = ratio(seconds, times["eager"])
                yield row
    yield from not_in_short(run, "compiled")


# ---- memory


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def peak_of(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """(bytes before `call`, at most during it), by the device's own counter."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return before, torch.cuda.max_memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # what the construction freed is not the call's to use
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    call()
    return before, resident("VmHWM")


def saved_bytes(forward: Callable[[], Tensor], weights: list) -> int:
    """Bytes that autograd keeps for the backward: distinct storages, the weights themselves apart."""
    known, kept = {p.untyped_storage().data_ptr() for p in weights}, {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(kept.values())


class Separate(nn.Module):
    """One fused projection as the separate ones that it stands for."""

    def __init__(self, fused: nn.Linear, widths: list[int]):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(fused.in_features, width, bias=False) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def naive(net: Hydra) -> None:
    """The naive path, in place: separate projections of q, k, v and of gate and up, rotation tables made anew in every
    layer, the fp32 logits of all tokens kept for the backward. (It never makes the T x T scores: SDPA is the same.)"""
    model_module.MAX_LOGITS = 2**62
    for module in list(net.modules()):
        if isinstance(module, GQA):
            kv = module.n_kv_head * module.head_width
            module.qkv = Separate(module.qkv, [module.qkv.in_features, kv, kv])
        elif isinstance(module, CCQA):
            module.down = Separate(module.down, [module.latent, module.kappa, module.kappa // 2, module.kappa // 2])
        elif isinstance(module, MLA):
            module.up = Separate(module.up, [module.latent, module.latent // 2, module.rope_width, module.latent])
        elif isinstance(module, SwiGLU):
            module.gate_up = Separate(module.gate_up, [module.gate_up.out_features // 2] * 2)
    for block in net.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: (args[0], net.context(args[1].pos), *args[2:]))


def measure_memory(level: str, c: HydraConfig, B: int, T: int, device: torch.device, dtype: torch.dtype) -> dict:
    """Bytes of one forward and backward, or (level "step" and "naive") of one optimiser step whose state exists."""
    torch.manual_seed(0)
    if level in ("step", "naive"):
        model, forward, step = trainer(c, B, T, device, dtype, naive if level == "naive" else None)
        step()
        weights = list(model.parameters())
    else:
        weights, _, call = make(level, c, B, T, device)
        forward, step = backward_of(weights, call, dtype)
    before, peak = peak_of(step, device)
    return {"base_bytes": before, "peak_bytes": peak, "step_bytes": peak - before,
            "saved_bytes": saved_bytes(forward, weights)}  # fmt: skip


def answer(pipe, call: Callable, args: tuple) -> None:
    pipe.send(call(*args))


def in_child(call: Callable, *args, method: str = "forkserver"):
    """`call(*args)` in a process of its own, whose peak is nobody else's; None where the system killed it."""
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["torch"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(theirs, call, args))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        result = None
    process.join()
    if process.exitcode > 0:
        raise RuntimeError(f"{call.__name__} failed in its process, see above")
    return result


def memory_row(run: Run, level: str, c: HydraConfig, mix: str, B: int, T: int, dtype: torch.dtype) -> dict | None:
    """One row; None where it is not wanted."""
    label = {"subject": level, "mix": mix, "B": B, "T": T, "dtype": short_name(dtype)}
    if not run.wants(label):
        return None
    whole = level in ("step", "naive")
    kind = "model" if whole else level
    weights, saved = estimated_bytes(kind, c, B, T, 4 if whole else 2)
    flops = 3 * forward_flops(kind, c, B, T) * (3 if whole else 2)
    reason = run.refuse(weights + saved, 2 + flops / run.peaks[dtype] / 0.4)
    if reason:
        return label | {"left_out": reason}
    args = (level, c, B, T, run.device, dtype)
    cuda = run.device.type == "cuda"  # its counter can be set back, so it needs no child
    measured = measure_memory(*args) if cuda else in_child(measure_memory, *args)
    return label | (measured or {"left_out": "the system killed its process: too little memory"})


def memory(run: Run) -> Iterator[dict]:
    if run.device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        yield {"subject": "all", "left_out": "a CPU's peak is read from Linux's /proc"}
        return
    for dtype in reversed(DTYPES):
        rows = [memory_row(run, level, run.c, run.c.pattern, 4, 256, dtype) for level in ("naive", "step")]
        if all(row and "left_out" not in row for row in rows):
            rows[1]["to_naive"] = rows[1]["step_bytes"] / rows[0]["step_bytes"]
            rows[1]["peak_to_naive"] = rows[1]["peak_bytes"] / rows[0]["peak_bytes"]
        yield from filter(None, rows)
    for B, T in SHAPES:
        for level in ("attention", "block", "macro", "model"):
            for dtype in DTYPES:
                what = of_letters(level, run.c) if level in ("attention", "block") else of_mixes(level, run.c)
                baseline = None
                for name, (_, c) in what.items():
                    row = memory_row(run, level, c, name, B, T, dtype)
                    baseline = baseline or row
                    if row and "left_out" not in row and "left_out" not in baseline:
                        row["ratio"] = row["step_bytes"] / baseline["step_bytes"]
                    if row:
                        yield row


def compression(run: Run) -> Iterator[dict]:
    valid = [n for n in (2, 4, 8) if run.c.dim % (2 * run.c.n_head * n) == 0]
    what = {"A": ("attention", replace(run.c, pattern="A"))}
    what |= {f"C {n}x": ("attention", replace(run.c, pattern="C", compression=n)) for n in valid}
    for dtype in DTYPES:
        for row in compare(run, what, 1, 1024, dtype):
            if "left_out" not in row:
                c = what[row["mix"]][1]
                letter, latent = c.pattern, c.dim // c.compression if c.pattern == "C" else c.dim
                extra = memory_row(run, "attention", c, row["mix"], 1, 1024, dtype) or {}
                row |= {"latent": latent, "params": attention_params(c, letter), "kv_bytes": 2 * state_values(c, letter)}
                row |= {k: v for k, v in extra.items() if k.endswith("_bytes")}
            yield row
    for n in {2, 4, 8} - set(valid):
        yield {"mix": f"C {n}x", "left_out": f"dim={run.c.dim} is no multiple of 2*n_head*{n}"}


# ---- flops


def counted_flops(c: HydraConfig, T: int) -> float:
    """FLOPs of one forward of the attention of `c`'s first layer over T tokens as torch counts them from the module,
    brought to the formula's terms: without the upper half of the T*T pairs, with the depthwise convolution."""

    def core(q, k, v, *args, out_val=None, **kwargs):
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    core._get_raw = True
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    _, (attn,), forward = make("attention", c, 1, T, torch.device("cpu"))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={kernel: core}) as counter:
        forward()
    width = attn.out.in_features
    depthwise = 2 * c.conv_kernel * (width + attn.kappa) if isinstance(attn, CCQA) else 0
    return counter.get_total_flops() - T * 2 * T * width + T * depthwise


CLAIMS = {"C": "FLOPs 62%, KV cache -25%, parameters -75%", "L": "KV cache -100%",
          "hybrid": "FLOPs 37.5% (with an average depth of 0.5)"}  # fmt: skip


def flops(run: Run) -> Iterator[dict]:
    c = replace(run.c, window=0)  # the pairs that a window hides are counted by no counter
    mlp = 6 * c.dim * c.mlp_hidden
    for name in (*LETTERS, "hybrid"):
        layers = c.layers if name == "hybrid" else name
        row = {"subject": "flops", "mix": name}
        for T in (512, 1024, 8192):
            attn = {a: attention_flops(c, a, T) for a in {*layers, "A"}}
            mean = statistics.fmean(attn[a] for a in layers)
            row |= {f"attention_{T}": mean / attn["A"], f"layer_{T}": (mean + mlp) / (attn["A"] + mlp)}
        if name != "hybrid":
            T = 1024
            counted = counted_flops(replace(c, pattern=name), T)
            row |= {"mflops": attention_flops(c, name, T) / 1e6, "counted_mflops": counted / T / 1e6}
        values = statistics.fmean(state_values(c, a) for a in layers)
        row |= {"kv_bytes": 2 * values, "kv_ratio": values / state_values(c, "A"),
                "params": statistics.fmean(attention_params(c, a) for a in layers), "claims": CLAIMS.get(name, "")}
        yield row


# ---- decode


def decoder(model: Hydra, B: int, past: int) -> Callable[[], None]:
    """One decode step of B rows at `past` tokens, in place. The state is random: its values do not change the time."""
    state = model.new_state(B, past + 1)
    for layer in state.layers:
        for tensor in layer.values():
            tensor.normal_()
    token = torch.zeros(B, dtype=torch.int64, device=state.pos_B.device)

    def step() -> None:
        state.pos_B.fill_(past)
        state.visible = None if token.is_cuda else past
        model.decode(token, state)

    return step


def prefill_once(model: Hydra, prompts_BT: torch.Tensor, lengths_B: torch.Tensor) -> None:
    model.prefill(prompts_BT, lengths_B, model.new_state(*prompts_BT.shape))


def llama_like(c: HydraConfig, dtype: torch.dtype):
    """transformers' Llama of the same width, depth, heads and vocabulary, its MLP chosen for the same parameters."""
    transformers = import_or_say("transformers", "--peers")
    attention = c.vocab_size * c.dim + c.n_layer * (4 * c.dim**2 + 2 * c.dim)
    hidden = round((count_params(c) - attention) / (3 * c.dim * c.n_layer))
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=hidden, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_head, tie_word_embeddings=True,
        max_position_embeddings=8192, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def generation(model, prompts: torch.Tensor, new: int) -> Callable[[], None]:
    """A whole greedy generation of `new` tokens, ours or transformers'."""

    def ours() -> None:
        for _ in model.generate(prompts, new, temperature=0.0):
            pass

    def theirs() -> None:
        model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
                       do_sample=False)  # fmt: skip

    return ours if isinstance(model, Hydra) else theirs


@torch.no_grad()
def decode_rows(run: Run, dtype: torch.dtype, batches: list[int], copy: float) -> Iterator[dict]:
    c, b, device = run.c, run.b, run.device
    torch.manual_seed(b.seed)
    model, baseline = (Hydra(x).to(device, dtype).eval() for x in (c, replace(c, pattern="A")))
    model.pack()
    baseline.pack()
    peer = llama_like(c, dtype).to(device) if b.peers else None
    for B in batches:
        prompts = torch.randint(0, c.vocab_size, (B, b.prompt_tokens), device=device)
        middle = torch.randint(0, c.vocab_size, (B, b.prompt_tokens + b.new_tokens // 2), device=device)
        lengths = torch.full((B,), b.prompt_tokens, device=device)
        step = decoder(model, B, middle.size(1))
        t = in_turns({"step": step}, b.rounds, device)["step"]
        ms = statistics.median(t)
        size = count_params(c) * dtype.itemsize + B * kv_bytes(c, middle.size(1), dtype.itemsize)
        row = {"subject": "decode", "B": B, "dtype": short_name(dtype), "ms": ms * 1e3, "spread": spread(t),
               "tokens_per_s": B / ms, "gb_per_s": size / ms / 1e9, "of_copy": size / ms / copy}  # fmt: skip
        # all tokens with states, prefill included, against a full forward at the mean length for each
        once = {"prefill": partial(prefill_once, model, prompts, lengths), "uncached": partial(model, middle)}
        t = in_turns(once, 3 if B == 1 else 1, device)
        prefill, uncached = statistics.median(t["prefill"]), statistics.median(t["uncached"])
        row["states_gain"] = b.new_tokens * uncached / (prefill + (b.new_tokens - 1) * ms)
        steps = {"hybrid": decoder(model, B, b.context), "MHA": decoder(baseline, B, b.context)}
        t = in_turns(steps, b.rounds, device)
        row["mha_over_hybrid"] = ratio(t["MHA"], t["hybrid"])
        if peer:
            both = {"ours": model, "peer": peer}
            both = {name: generation(m, prompts, b.new_tokens) for name, m in both.items()}
            t = in_turns(both, 2 if B == 1 else 1, device)
            row["llama_over_ours"] = ratio(t["peer"], t["ours"])
            row["peer_tokens_per_s"] = B * b.new_tokens / statistics.median(t["peer"])
        yield row


def decode(run: Run) -> Iterator[dict]:
    copy = copy_bandwidth(run.device)
    c = replace(run.c, block_size=max(run.c.block_size, run.b.prompt_tokens + run.b.new_tokens))
    for dtype in DTYPES:
        label = {"subject": "decode", "dtype": short_name(dtype)}
        if not run.wants(label):
            continue
        size = 6 * count_params(c) * dtype.itemsize + 8 * 2 * c.n_layer * c.dim * run.b.context * dtype.itemsize
        reason = run.refuse(size, 0 if run.full else 12)
        if reason:
            yield label | {"left_out": reason}
        else:
            yield from decode_rows(replace(run, c=c), dtype, [1, 8] if run.full else [1], copy)
    if not run.full:
        yield {"subject": "B=8", "left_out": "no time in the short run: python bench.py decode"}


# ---------------------------------------------------------------------------------------------------------------------
# printing, storing, drawing


TABLES = {f.__name__: f for f in (speed, memory, compression, flops, length, train, decode)}
COLUMNS = {  # key of a row -> (header, width, format of the value, factor); other keys are only in the JSON
    "subject": ("", -10, "", 1), "mix": ("mix", -9, "", 1), "B": ("B", 3, "d", 1), "T": ("T", 6, "d", 1),
    "dtype": ("dtype", -9, "", 1), "mode": ("mode", -9, "", 1), "rounds": ("n", 3, "d", 1),
    "from": ("from", 6, "d", 1), "to": ("to", 6, "d", 1), "exponent": ("exponent", 9, ".2f", 1),
    "forward_ms": ("forward ms", 11, ".2f", 1), "ms": ("ms", 9, ".2f", 1), "spread": ("spread", 7, ".0%", 1),
    "tokens_per_s": ("tokens/s", 10, ",.1f", 1), "tflops": ("TFLOP/s", 8, ".3f", 1), "of_peak": ("of peak", 8, ".1%", 1),
    "forward_ratio": ("fwd/MHA", 8, ".2f", 1), "ratio": ("/MHA", 6, ".2f", 1), "to_eager": ("/eager", 7, ".2f", 1),
    "to_peer": ("/Zaya", 6, ".2f", 1), "compile_s": ("compile s", 10, ".1f", 1), "warm_s": ("warm s", 7, ".1f", 1),
    "latent": ("latent", 7, "d", 1), "params": ("params", 10, ",.0f", 1),
    "attention_512": ("attn 512", 9, ".1%", 1), "attention_1024": ("1024", 6, ".1%", 1),
    "attention_8192": ("8192", 6, ".1%", 1), "layer_512": ("layer 512", 10, ".1%", 1),
    "layer_1024": ("1024", 6, ".1%", 1), "layer_8192": ("8192", 6, ".1%", 1),
    "mflops": ("MFLOP/token", 12, ".4f", 1), "counted_mflops": ("counted", 9, ".4f", 1),
    "kv_bytes": ("KV bytes", 9, ".0f", 1), "kv_ratio": ("of MHA", 7, ".1%", 1),
    "base_bytes": ("base MB", 9, ",.1f", 1e-6), "peak_bytes": ("peak MB", 9, ",.1f", 1e-6),
    "step_bytes": ("step MB", 9, ",.1f", 1e-6), "saved_bytes": ("saved MB", 9, ",.1f", 1e-6),
    "to_naive": ("step/naive", 11, ".2f", 1), "peak_to_naive": ("peak/naive", 11, ".2f", 1),
    "gb_per_s": ("GB/s", 7, ".1f", 1), "of_copy": ("of copy", 8, ".0%", 1), "states_gain": ("states x", 9, ".1f", 1),
    "mha_over_hybrid": ("MHA/ours", 9, ".2f", 1), "llama_over_ours": ("Llama/ours", 11, ".2f", 1),
    "claims": ("a report claims", 0, "", 1),
}  # fmt: skip


def aligned(text: str, width: int) -> str:
    return f"{text:<{-width}}" if width < 0 else f"{text:>{width}}"


def show(row: dict, above: list) -> list:
    """Print a row, under a header where its columns are not those of the row `above`; returns its columns."""
    columns = [k for k in COLUMNS if k in row]
    progress("")
    if columns != above:
        print("\n" + " ".join(aligned(COLUMNS[k][0], COLUMNS[k][1]) for k in columns))
    cells = [aligned(format(row[k] * COLUMNS[k][3] if COLUMNS[k][2] else row[k], COLUMNS[k][2]), COLUMNS[k][1])
             for k in columns]  # fmt: skip
    print(" ".join(cells), flush=True)
    return columns


def draw(tables: dict[str, list[dict]], folder: Path) -> None:
    """One chart a table: times against T for length, else a bar for every row's first figure."""
    from matplotlib.figure import Figure

    for table, rows in tables.items():
        rows = [r for r in rows if "left_out" not in r]
        fig = Figure(figsize=(9, 6), layout="constrained")
        ax = fig.subplots()
        if table == "length":
            lines: dict[str, list] = {}
            for r in rows:
                if r["subject"] == "attention":
                    lines.setdefault(f"{r['mix']} {r['dtype']} {r['mode']}", []).append((r["T"], r["ms"]))
            for name, points in lines.items():
                ax.loglog(*zip(*points, strict=True), marker="o", label=name)
            ax.set(xlabel="T", ylabel="forward+backward, ms")
            ax.legend(fontsize="small")
        else:
            key = next((k for k in ("tokens_per_s", "step_bytes", "layer_1024") if rows and k in rows[0]), None)
            names = [" ".join(str(r[k]) for k in ("subject", "mix", "B", "T", "dtype", "mode") if k in r) for r in rows]
            ax.barh(names, [r.get(key, 0) for r in rows])
            ax.invert_yaxis()
            ax.set_xlabel(key)
        fig.savefig(folder / f"{table}.png", dpi=120)


def main(argv: list[str]) -> int:
    table = argv[0] if argv and not argv[0].startswith("-") and not argv[0].endswith(".toml") else ""
    if table and table not in TABLES:
        raise UserError(f"unknown table {table!r}: use {', '.join(TABLES)}")
    rest = argv[bool(table) :]
    shape = parse([str(CONFIGS / "small.toml"), *(a for a in rest if a.endswith(".toml"))], HydraConfig, TrainConfig)
    base = {name: value for name, value in shape.items() if name in asdict(HydraConfig())}
    given = parse([a for a in rest if not a.endswith(".toml")], HydraConfig, BenchConfig, doc=__doc__)
    c, b = build(given, HydraConfig, BenchConfig, base=base)
    device = pick_device(b.device)
    if b.plot:
        import_or_say("matplotlib", "--plot")
        Path(b.plot).mkdir(parents=True, exist_ok=True)
    if b.peers:
        import_or_say("transformers", "--peers")
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    cpu = Path("/proc/cpuinfo")
    where = cpu.read_text().partition("model name")[2].partition("\n")[0].strip("\t :") if cpu.exists() else ""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else where or platform.machine()
    peaks = {dtype: matmul_peak(device, dtype) for dtype in DTYPES}
    print(f"{device}: {where}, {torch.get_num_threads()} threads, torch {torch.__version__}; matrix-multiply peak "
          + ", ".join(f"{p / 1e9:,.0f} GFLOP/s in {short_name(dtype)}" for dtype, p in peaks.items())
          + f"; {count_params(c):,} parameters, seed {b.seed}")  # fmt: skip
    result = {"device": str(device), "where": where, "threads": torch.get_num_threads(), "torch": torch.__version__,
              "python": platform.python_version(), "system": platform.platform(), "git": git_hash(), "seed": b.seed,
              "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "config": to_toml(c, b),
              "short": not table, "tables": {}}  # fmt: skip
    for name in [table] if table else TABLES:
        start, above, left = time.perf_counter(), [], {}
        until = math.inf if table else start + SHORT[name]
        rows = result["tables"][name] = []
        print(f"\n{name}", flush=True)
        for row in TABLES[name](Run(name, c, b, device, bool(table), peaks, until)):
            rows.append(row)
            if "left_out" in row:
                words = [str(row[k]) for k in ("subject", "mix", "B", "T", "dtype", "mode") if k in row]
                left.setdefault(row["left_out"], []).append(" ".join(words))
            else:
                above = show(row, above)
        progress("")
        for reason, names in left.items():
            print(f"left out ({reason}): {'; '.join(names)}")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    if b.json:
        write_atomically(Path(b.json), lambda temporary: temporary.write_text(json.dumps(result, indent=1)))
    if b.plot:
        draw(result["tables"], Path(b.plot))
    return 0


if __name__ == "__main__":
    cli(main)
