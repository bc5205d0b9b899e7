"""What HYDRA costs. `python bench.py`: every table, cut to three minutes on two CPU cores;
`python bench.py TABLE [config/x.toml] [--key=value ...]`: one table in full. Shape: config/small.toml, random weights.

- speed: forward and forward+backward of each attention, of a block with it, of the macro-block and of the transformer.
- memory: bytes of a training step of the same, and of the whole step against the naive path (see `naive`).
- compression: CCQA at 2x, 4x and 8x. - train: a whole optimiser step of config/tiny.toml and of the shape.
- flops: attention and layer (with its MLP) as a part of MHA's, the modules' counted FLOPs, and what a report claims.
- length: time against T for each letter, with the exponent fitted; --peers: CCQA against transformers' ZayaAttention.
- decode: generation with states against without, the hybrid against MHA; --peers: against a Llama of equal size.

What is compared runs in one process, in turns; the median counts, spread is the interquartile range over it. `x_...`
is the median of the round-by-round ratios of the times (of forward+backward); in memory x_first compares the bytes
that a step adds, x_peak all; in decode `..._x` says how many times slower the other one is, and uncached_x is put
together from the times of a prefill, a step and a full forward of the mean length. Compilation, with empty caches,
and warm-up are not in the times. bf16 is autocast over fp32 weights (decode: bf16 weights). FLOPs are those of
model.py's formulas, a backward has twice its forward's; train: 6 a parameter and token. of_peak is the part of a
large matrix product's rate in that dtype. Absolute times of a shared CPU mean little, ratios more. A row that does
not fit in memory, or in the time of the short run, is listed as left out with the reason. Dense models only.
"""

import ctypes
import datetime
import gc
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from itertools import chain, product
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import model as accounting
from attention import CCQA, GQA, MLA, RMSNorm
from configurator import UserError, build, cli, need, parse, to_toml
from model import (
    MAX_LOGITS,
    Hydra,
    HydraConfig,
    SwiGLU,
    attention_flops,
    attention_params,
    count_params,
    kv_bytes,
    state_values,
)
from train import TrainConfig, copy_bandwidth, git_hash, matmul_peak, pick_device, sync, write_atomically

CONFIGS = Path(__file__).parent / "config"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("eager", "compiled")
SHAPES = ((1, 256), (4, 512), (8, 1024))  # (B, T) of speed and memory
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
MACRO_LENGTHS = (1024, 4096)
SHORT = {"speed": 35, "memory": 25, "compression": 10, "flops": 3, "length": 25, "train": 35, "decode": 25}  # seconds
CLAIMS = {"C": "FLOPs 62%, KV cache -25%, parameters -75%", "L": "KV cache -100%",
          "hybrid": "FLOPs 37.5%, with a mean depth of 0.5"}  # fmt: skip
UNASKED = "--only does not ask for it"


@dataclass(frozen=True)
class BenchConfig:
    """What to measure; raises UserError, in one line, for values that cannot be."""

    rounds: int = 12  # timed turns of every contestant, after one that is not counted; slow ones take fewer
    only: str = ""  # just the comparisons that have all these words, such as "attention 1024 float32 eager"
    peers: bool = False  # length and decode: compare with transformers too
    prompt_tokens: int = 512  # decode: length of the prompts
    new_tokens: int = 128  # decode: tokens generated behind them
    context: int = 4096  # decode: length of the past in the comparison of hybrid and MHA
    json: str = ""  # also write everything to this file
    plot: str = ""  # also draw a chart of every table into this folder
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    seed: int = 1337  # of the weights and inputs

    def __post_init__(self):
        for name in ("prompt_tokens", "new_tokens", "context", "rounds"):
            need(self, name, getattr(self, name) >= 1, "it must be at least 1")
        need(self, "seed", 0 <= self.seed < 2**63, "choose one from 0 to 2**63 - 1")
        need(self, "json", (Path(self.json).parent).is_dir(), "its folder does not exist: make it first")


@dataclass
class Run:
    """One table's run: what is measured, where, and until when."""

    table: str
    c: HydraConfig
    b: BenchConfig
    device: torch.device
    peaks: dict[str, float]  # FLOP/s of a matrix product, by dtype
    until: float = math.inf  # time.perf_counter() at which the short run's time for the table is over

    @property
    def short(self) -> bool:
        return self.until < math.inf

    @property
    def late(self) -> str:
        return f"no time in the short run, python bench.py {self.table} has it"

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(m for m in MODES if m in self.b.only.split()) or MODES[: 1 if self.short else 2]

    def refuse(self, label: dict, size: float, seconds: float) -> str:
        """Why the rows of this label are not measured ("" if they are), at about `size` bytes and `seconds`."""
        if not set(self.b.only.split()) - set(MODES) <= set(" ".join(map(str, label.values())).split()):
            return UNASKED
        gc.collect()  # models are in cycles with their hooks and closures
        if size > available(self.device):
            return f"more than the {available(self.device) / 1e9:.1f} GB of memory that are free"
        if time.perf_counter() + seconds > self.until:
            return self.late
        progress(f"{self.table}: {' '.join(map(str, label.values()))}, about {seconds:.0f} s")
        return ""


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def package(name: str, option: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{option} needs {name}, which is not installed: pip install {name}") from error


def available(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return 1024 * int(meminfo.read_text().partition("MemAvailable:")[2].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------------------------------------------
# times


def in_turns(contestants: dict, rounds: int, device: torch.device, limit: float = math.inf) -> dict:
    """Seconds of every contestant in every round; one round of warm-up is not counted. After `limit` seconds no further
    round begins once there are three, after three times as many once there is one."""
    seconds: dict[object, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > 1 and time.perf_counter() - began > (limit if turn > 3 else 3 * limit):
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
    low, middle, high = statistics.quantiles(t * 2 if len(t) == 1 else t, method="inclusive")
    return (high - low) / middle


def exponent(lengths: list[int], times: list[float]) -> float:
    """p of the least-squares fit times = a * lengths**p, on logarithms."""
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(t) for t in times]).slope


# ---------------------------------------------------------------------------------------------------------------------
# the contestants


class Contestant:
    """Something with a forward and a step, on fixed random input, under autocast where `dtype` is bf16. Levels:
    attention and block (of the pattern's first letter), macro (the pattern once, no embedding), model (with embedding,
    head and loss), peer (ZayaAttention); their step is forward+backward. train and naive: a model's optimiser step."""

    def __init__(self, level: str, c: HydraConfig, B: int, T: int, device: torch.device, dtype: str):
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        whole = level in ("model", "train", "naive")
        depth = c.n_layer if whole else len(c.pattern) if level == "macro" else 1
        c = replace(c, n_layer=depth, vocab_size=c.vocab_size if whole else 1, block_size=max(T, c.block_size))
        net = Hydra(c)
        if level == "naive":
            naive(net)
        net.to(device)
        self.parts = list(net.blocks)  # what is compiled
        if whole:
            idx, targets = torch.randint(0, c.vocab_size, (2, B, T), device=device)
            self.leaves, self.call = list(net.parameters()), lambda: net(idx, targets)[1]
        else:  # the input needs a gradient, as it does behind other layers
            x = torch.randn(B, T, c.dim, device=device, requires_grad=True)
            ctx = net.context(torch.arange(T, device=device))
            if level == "attention":
                self.parts = [net.blocks[0].attn]
            if level == "peer":
                self.parts = [zaya(c, ctx, B).to(device)]
            self.leaves = [x, *(p for part in self.parts for p in part.parameters())]
            self.call = lambda: self.through(x, ctx)
        if level in ("train", "naive"):
            self.step = self.optimiser_step(net)
        else:
            self.grad = torch.randn_like(self.forward())

    def through(self, x: Tensor, ctx) -> Tensor:
        for part in self.parts:
            x = part(x, ctx)
        return x

    def forward(self) -> Tensor:
        with self.autocast():
            return self.call()

    def step(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.forward().backward(self.grad)

    def optimiser_step(self, net: Hydra) -> Callable[[], None]:
        """As train.py does it; the optimiser's state exists already."""
        t = TrainConfig()
        optimizer = torch.optim.AdamW(net.optimizer_groups(t.weight_decay), lr=t.learning_rate,
                                      betas=(t.beta1, t.beta2), fused=True)  # fmt: skip
        for leaf in self.leaves:
            leaf.grad = torch.zeros_like(leaf)

        def update() -> None:
            norm = nn.utils.get_total_norm([p.grad for p in self.leaves])
            nn.utils.clip_grads_with_norm_(self.leaves, t.grad_clip, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def step() -> None:
            self.forward().backward()
            update()

        update()
        return step


def zaya(c: HydraConfig, ctx, B: int) -> nn.Module:
    """transformers' CCQA of the same widths and taps, random weights (the tests hold the two equal), called as ours."""
    H, G, K = c.ccqa_heads
    config = package("transformers", "--peers").ZayaConfig(
        hidden_size=c.dim, num_attention_heads=H, num_key_value_heads=G, head_dim=K, vocab_size=1,
        cca_time0=c.conv_kernel, cca_time1=c.conv_kernel, num_hidden_layers=1, attn_implementation="sdpa")  # fmt: skip
    attn = import_module("transformers.models.zaya.modeling_zaya").ZayaAttention(config, 0)
    for p in attn.parameters():
        nn.init.normal_(p, std=0.02)
    cos, (minus, sin) = ctx.rope[K][0], ctx.rope[K][1].chunk(2, dim=-1)  # ours carries the half's sign
    rope = [t.squeeze(1).expand(B, -1, -1) for t in (cos, torch.cat((-minus, sin), dim=-1))]
    plain = attn.forward
    attn.forward = lambda x, _: plain(x, position_embeddings=rope)[0]
    return attn


class Separate(nn.Module):
    """A fused projection as the separate ones that it stands for."""

    def __init__(self, fused: nn.Linear, *widths: int):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(fused.in_features, width, bias=False) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def naive(net: Hydra) -> None:
    """The naive path, in place: separate projections of q, k, v and of gate and up, rotation tables made anew in every
    layer, norms and SwiGLU as autograd keeps them, and (see `measure`) the fp32 logits of all tokens, kept for the
    backward. Its attention is SDPA too."""

    def swiglu(m: SwiGLU, x: Tensor) -> Tensor:
        gate, up = m.gate_up(x).chunk(2, dim=-1)
        return m.down(F.silu(gate) * up)

    for m in list(net.modules()):
        if isinstance(m, GQA):
            kv = m.n_kv_head * m.head_width
            m.qkv = Separate(m.qkv, m.qkv.in_features, kv, kv)
        elif isinstance(m, CCQA):
            m.down = Separate(m.down, m.latent, m.kappa, m.kappa // 2, m.kappa - m.kappa // 2)
        elif isinstance(m, MLA):
            m.up = Separate(m.up, m.latent, m.rope_width, m.latent // 2, m.latent)
        elif isinstance(m, SwiGLU):
            m.gate_up = Separate(m.gate_up, *[m.gate_up.out_features // 2] * 2)
            m.forward = partial(swiglu, m)
        elif isinstance(m, RMSNorm):
            m.forward = lambda x, m=m: F.rms_norm(x, m.weight.shape, m.weight.to(x.dtype), m.eps)
    for block in net.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: (args[0], net.context(args[1].pos), *args[2:]))


def step_flops(level: str, c: HydraConfig, B: int, T: int) -> float:
    if level in ("train", "naive"):
        return 6 * count_params(c) * B * T
    if level == "model":
        return 3 * accounting.flops_per_token(c, T) * B * T
    mlp = 6 * c.dim * c.mlp_hidden if level in ("block", "macro") else 0
    return 3 * B * T * sum(attention_flops(c, a, T) + mlp for a in (c.pattern if level == "macro" else c.pattern[0]))


def step_bytes(level: str, c: HydraConfig, B: int, T: int) -> tuple[float, float]:
    """Roughly what is kept (weights, gradients, optimiser) and what a step needs: to leave out what cannot fit."""
    whole = level in ("model", "train", "naive")
    layers = c.n_layer if whole else len(c.pattern) if level == "macro" else 1
    weights = count_params(c) if whole else layers * (4 * c.dim**2 + 3 * c.dim * c.mlp_hidden)
    activations = layers * B * T * (16 * c.dim + 5 * c.mlp_hidden)
    logits = 3 * B * T * c.vocab_size * whole
    return 4 * weights * (4 if level in ("train", "naive") else 2), 4 * (activations + logits)


def first_step(it: Contestant, compiled: bool, device: torch.device) -> float:
    """Seconds of the first step, compilation included."""
    if compiled:
        for part in it.parts:
            part.compile(fullgraph=True)
    start = time.perf_counter()
    it.step()
    sync(device)
    return time.perf_counter() - start


def start_of(level: str, c: HydraConfig, B: int, T: int, device: torch.device, dtype: str) -> float:
    return first_step(Contestant(level, c, B, T, device, dtype), True, device)


def compare(run: Run, what: dict[str, tuple], B: int, T: int, dtype: str) -> Iterator[dict]:
    """Rows of all in `what`, name -> (level, shape), timed in turns and in every mode; the others relate to the first.
    A train step's start, with empty and with filled caches, is timed in new processes."""
    first, modes, flops = next(iter(what)), run.modes, sum(step_flops(*w, B, T) for w in what.values())
    label = {"level": what[first][0], "mix": " ".join(what), "B": B, "T": T, "dtype": dtype}
    kept, needed = zip(*(step_bytes(*w, B, T) for w in what.values()), strict=True)
    size, seconds = len(modes) * sum(kept) + max(needed), len(modes) * 4 * 1.4 * flops / run.peaks[dtype] / 0.5
    reason = run.refuse(label, size, seconds)
    if reason:
        yield label | {"left_out": reason}
        return
    torch.manual_seed(run.b.seed)
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    calls, starts = {}, {}
    with import_module("torch._inductor.utils").fresh_cache() if "compiled" in modes else nullcontext():
        for name, (level, c) in what.items():
            for mode in modes if level != "peer" else MODES[:1]:
                it = Contestant(level, c, B, T, run.device, dtype)
                start = {}
                if mode == "compiled" and level == "train":  # two runs one after the other, before this one fills them
                    args = level, c, B, T, run.device, dtype
                    start = {key: in_child(start_of, *args, method="spawn") for key in ("compile_s", "warm_s")}
                seconds = first_step(it, mode == "compiled", run.device)
                start = start or {"compile_s": seconds}
                starts[name, mode] = start if mode == "compiled" else {}
                calls |= {(name, mode, "forward"): it.forward, (name, mode, "step"): it.step}
                if level == "train":
                    del calls[name, mode, "forward"]
        before = matmul_peak(run.device, DTYPES[dtype])
        times = in_turns(calls, run.b.rounds, run.device, 1.5 if run.short else 60)
        peak = max(before, matmul_peak(run.device, DTYPES[dtype]))
    for (name, mode), start in starts.items():
        row = label | {"level": what[name][0], "mix": name, "mode": mode} | figures(times, name, mode, first, B * T)
        rate = step_flops(*what[name], B, T) / row["ms"] * 1e3
        row |= {"tflops": rate / 1e12, "peak_tflops": peak / 1e12, "of_peak": rate / peak}
        # a child that the system killed has no seconds
        yield row | {key: seconds - row["ms"] / 1e3 for key, seconds in start.items() if seconds is not None}


def figures(times: dict, name: str, mode: str, first: str, tokens: int) -> dict:
    """What the times of `compare` say of one contestant."""
    step, forward = times[name, mode, "step"], times.get((name, mode, "forward"))
    row: dict = {"rounds": len(step)}
    if forward:
        row |= {"forward_ms": statistics.median(forward) * 1e3, "forward_spread": spread(forward)}
        row["forward_x_mha"] = ratio(forward, times[first, mode, "forward"])
    seconds = statistics.median(step)
    row |= {"ms": seconds * 1e3, "spread": spread(step), "tokens_per_s": tokens / seconds}
    if forward:
        row["x_mha"] = ratio(step, times[first, mode, "step"])
    others = {"x_eager": (name, "eager", "step"), "x_zaya": ("Zaya", "eager", "step")}
    wanted = {"x_eager": mode == "compiled", "x_zaya": name == "C"}
    return row | {key: ratio(step, times[o]) for key, o in others.items() if wanted[key] and o in times}


def of_letters(level: str, c: HydraConfig) -> dict[str, tuple]:
    return {letter: (level, replace(c, pattern=letter)) for letter in "AGMCL"}


def of_mixes(level: str, c: HydraConfig) -> dict[str, tuple]:
    return {mix: (level, replace(c, pattern=mix)) for mix in ("A" * len(c.pattern), c.pattern)}


def of_all(c: HydraConfig) -> Iterator[tuple[dict[str, tuple], int, int, str]]:
    """The comparisons of speed and memory."""
    for (B, T), level, dtype in product(SHAPES, ("attention", "block", "macro", "model"), DTYPES):
        yield (of_letters if level in ("attention", "block") else of_mixes)(level, c), B, T, dtype


# ---------------------------------------------------------------------------------------------------------------------
# the tables: generators of rows


def speed(run: Run) -> Iterator[dict]:
    for what, B, T, dtype in of_all(run.c):
        yield from compare(run, what, B, T, dtype)


def length(run: Run) -> Iterator[dict]:
    what = of_letters("attention", run.c) | ({"Zaya": ("peer", replace(run.c, pattern="C"))} if run.b.peers else {})
    points: dict[tuple, list] = {}
    for T, dtype in product(LENGTHS, DTYPES):
        for row in compare(run, what, 1, T, dtype):
            yield row
            if "ms" in row:
                points.setdefault((row["mix"], dtype, row["mode"]), []).append((T, row["ms"]))
    for T, dtype in product(MACRO_LENGTHS, DTYPES):
        yield from compare(run, of_mixes("macro", run.c), 1, T, dtype)
    for (mix, dtype, mode), found in points.items():
        if len(found) > 1:
            yield {"level": "fit", "dtype": dtype, "mix": mix, "mode": mode, "from_T": found[0][0],
                   "to_T": found[-1][0], "exponent": exponent(*zip(*found, strict=True))}  # fmt: skip


def train(run: Run) -> Iterator[dict]:
    tiny, t = build(parse([str(CONFIGS / "tiny.toml")], HydraConfig, TrainConfig), HydraConfig, TrainConfig)
    for (name, c, B, T), dtype in product((("tiny", tiny, t.batch_size, tiny.block_size), ("shape", run.c, 4, 256)),
                                          reversed(DTYPES)):  # fmt: skip
        yield from compare(run, {name: ("train", c)}, B, T, dtype)


def compression(run: Run) -> Iterator[dict]:
    what = {"A": ("attention", replace(run.c, pattern="A"))}
    for n in (2, 4, 8):
        try:
            what[f"C{n}x"] = "attention", replace(run.c, pattern="C", compression=n)
        except UserError as error:
            yield {"mix": f"C{n}x", "left_out": str(error)}
    for dtype in DTYPES:
        sizes = {row["mix"]: row for row in weigh(run, what, 1, 1024, dtype)}
        for row in compare(run, what, 1, 1024, dtype):
            if "ms" in row:
                _, c = what[row["mix"]]
                row |= {"latent": c.dim // c.compression if c.pattern == "C" else c.dim,
                        "params": attention_params(c, c.pattern), "kv_bytes": 2 * state_values(c, c.pattern)}
                row |= {k: v for k, v in sizes.pop(row["mix"], {}).items() if k.endswith("_mb")}
            yield row
        yield from sizes.values()  # left out


# ---- memory


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def peak_of(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Megabytes before `call`, at most during it, and the difference, by the device's own counter."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # else `call` finds room that the construction has freed
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = resident("VmRSS")
    call()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")
    return {"base_mb": before / 1e6, "peak_mb": peak / 1e6, "step_mb": (peak - before) / 1e6}


def saved_bytes(forward: Callable[[], Tensor], weights: list) -> int:
    """Bytes that autograd keeps for the backward: distinct storages, the weights themselves apart."""
    known, kept = {p.untyped_storage().data_ptr() for p in weights}, {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _result = forward()  # alive, so that no address is used twice
    return sum(size for address, size in kept.items() if address not in known)


def measure(level: str, c: HydraConfig, B: int, T: int, device: torch.device, dtype: str) -> dict[str, float]:
    accounting.MAX_LOGITS = sys.maxsize if level == "naive" else MAX_LOGITS
    it = Contestant(level, c, B, T, device, dtype)
    if level not in ("train", "naive"):  # what a first step sets up in torch counts there, but not beside a whole model
        it.step()
    for leaf in it.leaves:
        leaf.grad = None
    sizes = peak_of(it.step, device)
    return sizes | {"saved_mb": saved_bytes(it.forward, it.leaves) / 1e6}


def in_child(call: Callable, *args, method: str = "forkserver"):
    """`call(*args)` in a process of its own, whose peak is nobody else's; None where the system killed it."""
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(call, *args).result()
        except BrokenProcessPool:
            return None


def weigh(run: Run, what: dict[str, tuple], B: int, T: int, dtype: str) -> Iterator[dict]:
    """Rows of memory, eager; a ratio is of what the step adds to the weights (and the optimiser's state)."""
    label = {"level": what[next(iter(what))][0], "mix": " ".join(what), "B": B, "T": T, "dtype": dtype}
    seconds = len(what) + 3 * sum(step_flops(*w, B, T) for w in what.values()) / run.peaks[dtype]
    reason = run.refuse(label, max(sum(step_bytes(*w, B, T)) for w in what.values()), seconds)
    if run.device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        reason = reason or "the peak of a CPU's process is read from Linux's /proc"
    if reason:
        yield label | {"left_out": reason}
        return
    first, base = next(iter(what)), None
    for name, (level, c) in what.items():
        args = level, c, B, T, run.device, dtype
        cuda = run.device.type == "cuda"  # its counter can be set back, a process takes its memory to its end
        row = measure(*args) if cuda else in_child(measure, *args)
        base = row if name == first else base
        if row and base:
            row |= {"x_first": row["step_mb"] / base["step_mb"], "x_peak": row["peak_mb"] / base["peak_mb"]}
        yield label | {"level": level, "mix": name} | (row or {"left_out": "the system killed it: too little memory"})


def memory(run: Run) -> Iterator[dict]:
    for dtype in reversed(DTYPES):
        yield from weigh(run, {"naive": ("naive", run.c), "ours": ("train", run.c)}, 4, 256, dtype)
    for what, B, T, dtype in of_all(run.c):
        yield from weigh(run, what, B, T, dtype)


# ---- flops


def counted_flops(c: HydraConfig, T: int) -> float:
    """FLOPs a token of the attention of `c`'s first letter over T tokens, as torch counts them in the module, brought
    to the formula's terms: without the upper half of the T*T pairs, with the depthwise convolution."""

    def core(q, k, v, *args, out_val=None, **kwargs):
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    core._get_raw = True  # torch does not know the CPU's fused kernel
    kernels = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: core}
    it = Contestant("attention", c, 1, T, torch.device("cpu"), "float32")
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        it.forward()
    (attn,) = it.parts
    width = attn.out.in_features
    depthwise = 2 * c.conv_kernel * (width + attn.kappa) if isinstance(attn, CCQA) else 0
    return counter.get_total_flops() / T - 2 * T * width + depthwise


def flops(run: Run) -> Iterator[dict]:
    c = replace(run.c, window=0)  # no counter sees what a window hides
    mlp = 6 * c.dim * c.mlp_hidden
    for name in (*"AGMCL", "hybrid"):
        layers, row = c.layers if name == "hybrid" else name, {"mix": name}
        for T in (512, 1024, 8192):
            mha, mean = attention_flops(c, "A", T), statistics.fmean(attention_flops(c, a, T) for a in layers)
            row |= {f"of_attn_{T}": mean / mha, f"of_layer_{T}": (mean + mlp) / (mha + mlp)}
        T = 512
        each = {a: counted_flops(replace(c, pattern=a), T) for a in set(layers)}
        row |= {"formula": statistics.fmean(attention_flops(c, a, T) for a in layers),
                "counted": statistics.fmean(each[a] for a in layers)}  # fmt: skip
        values = statistics.fmean(state_values(c, a) for a in layers)
        params = statistics.fmean(attention_params(c, a) for a in layers)
        row |= {"params": round(params), "kv_bytes": round(2 * values),
                "of_kv": values / state_values(c, "A"), "report_claims": CLAIMS.get(name, "-")}  # fmt: skip
        yield row


# ---- decode


def decoder(model: Hydra, B: int, past: int) -> Callable[[], None]:
    """One decode step of B rows at `past` tokens, in place. The state is random: its values do not change the time."""
    static = bool(model.decoders) or model.embed.weight.is_cuda  # as `generate` has it
    state = model.new_state(B, 1 << past.bit_length() if static else past + 1)
    for layer in state.layers:
        for tensor in (t for t in layer.values() if t.is_floating_point()):
            tensor.normal_()
    token = torch.zeros(B, dtype=torch.int64, device=state.pos_B.device)

    def step() -> None:
        state.pos_B.fill_(past)
        state.visible, state.uniform = (None, False) if static else (past, True)
        model.decode(token, state)

    return step


def prefill_once(model: Hydra, prompts_BT: torch.Tensor, lengths_B: torch.Tensor) -> None:
    model.prefill(prompts_BT, lengths_B, model.new_state(*prompts_BT.shape))


def llama_like(c: HydraConfig, dtype: torch.dtype):
    """transformers' Llama of the same width, depth, heads and vocabulary, its MLP chosen for the same parameters."""
    transformers = package("transformers", "--peers")
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
def decode(run: Run) -> Iterator[dict]:
    c, b, device = run.c, run.b, run.device
    c = replace(c, block_size=max(c.block_size, b.prompt_tokens + b.new_tokens))
    copy, batches = copy_bandwidth(device), (1,) if run.short else (1, 8)
    tokens = 4 * (2 * b.prompt_tokens + b.new_tokens // 2) * sum(batches)  # what `once` below computes
    for name, dtype in DTYPES.items():
        label = {"level": "model", "mix": c.pattern, "dtype": name}
        size = dtype.itemsize * (5 * count_params(c) + 2 * max(batches) * c.n_layer * c.dim * b.context)
        compute = tokens * accounting.flops_per_token(c, b.prompt_tokens) / run.peaks[name]
        reason = run.refuse(label, size, 6 + 40 * len(batches) * size / 5 / copy + 2 * compute)
        if reason:
            yield label | {"left_out": reason}
            continue
        torch.manual_seed(b.seed)
        ours = {"ours": Hydra(c)} | ({} if run.short else {"compiled": Hydra(c)})  # no time to compile in a short run
        baseline = Hydra(replace(c, pattern="A"))
        for who, model in (ours | {"MHA": baseline}).items():
            model.to(device, dtype).eval()
            model.compile_decoding() if who == "compiled" else model.pack()
        peer = llama_like(c, dtype).to(device) if b.peers else None
        for B in batches:
            chosen = {n: m for n, m in ours.items() if n == "ours" or B == 1 or device.type == "cuda"}
            yield label | decode_row(chosen, baseline, peer, B, b, copy)
    if run.short:
        yield {"level": "model", "B": 8, "left_out": run.late}


def decode_row(ours: dict[str, Hydra], baseline: Hydra, peer, B: int, b: BenchConfig, copy: float) -> dict:
    model = ours["ours"]
    weight, c = model.embed.weight, model.config
    device = weight.device
    prompts = torch.randint(0, c.vocab_size, (B, b.prompt_tokens), device=device)
    middle = torch.randint(0, c.vocab_size, (B, b.prompt_tokens + b.new_tokens // 2), device=device)
    lengths = torch.full((B,), b.prompt_tokens, device=device)
    t = in_turns({name: decoder(m, B, middle.size(1)) for name, m in ours.items()}, b.rounds, device)
    ms = statistics.median(t["ours"])
    size = count_params(c) * weight.itemsize + B * kv_bytes(c, middle.size(1), weight.itemsize)
    row = {"B": B, "ms": ms * 1e3, "spread": spread(t["ours"]), "tokens_per_s": B / ms, "gb_per_s": size / ms / 1e9,
           "of_copy": size / ms / copy}  # fmt: skip
    if "compiled" in t:
        seconds = statistics.median(t["compiled"])
        row |= {"compiled_ms": seconds * 1e3, "compiled_of_copy": size / seconds / copy}
    # all tokens with states, prefill included, against a full forward at the mean length for each
    once = {"prefill": partial(prefill_once, model, prompts, lengths), "uncached": partial(model, middle)}
    t = in_turns(once, 3 if B == 1 else 1, device)
    prefill, uncached = statistics.median(t["prefill"]), statistics.median(t["uncached"])
    row["uncached_x"] = b.new_tokens * uncached / (prefill + (b.new_tokens - 1) * ms)
    steps = {"hybrid": decoder(model, B, b.context), "MHA": decoder(baseline, B, b.context)}
    t = in_turns(steps, b.rounds, device)
    row["mha_x"] = ratio(t["MHA"], t["hybrid"])
    if peer:
        all_ = {name: generation(m, prompts, b.new_tokens) for name, m in (ours | {"peer": peer}).items()}
        t = in_turns(all_, 3 if B == 1 else 1, device)
        row |= {f"llama_x_{name}": ratio(t["peer"], t[name]) for name in ours}
        row["peer_tokens_per_s"] = B * b.new_tokens / statistics.median(t["peer"])
    return row


# ---------------------------------------------------------------------------------------------------------------------
# printing, storing, drawing


TABLES = {f.__name__: f for f in (speed, memory, compression, flops, length, train, decode)}
ONLY_JSON = {"peak_tflops", "forward_spread"}
LABEL = ("level", "mix", "B", "T", "dtype", "mode")


def text(key: str, value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if key.startswith("of_") or key == "spread":
        return f"{value:.1%}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"


def show(row: dict, above: list[str]) -> list[str]:
    """Print a row, below a header if it has columns that are not `above`; returns those it is under."""
    progress("")
    columns = [key for key in row if key not in ONLY_JSON]
    if set(columns) <= set(above):
        columns = above
    else:
        print("\n" + " ".join(f"{key:>9}" for key in columns))
    print(" ".join(f"{text(key, row.get(key, '-')):>{max(9, len(key))}}" for key in columns), flush=True)
    return columns


def draw(tables: dict[str, list[dict]], folder: Path) -> None:
    """One chart a table: lines over T for length, else bars of one figure."""
    for table, rows in tables.items():
        figure = import_module("matplotlib.figure").Figure(figsize=(9, 7), layout="constrained")
        axes, lines = figure.subplots(), {}
        key = next(k for k in ("of_layer_1024", "ms", "step_mb", "left_out") if any(k in row for row in rows))
        for row in (row for row in rows if key in row and key != "left_out" and row.get("level") != "fit"):
            names = [str(row[k]) for k in LABEL if k in row and not (table == "length" and k in "BT")]
            lines.setdefault(" ".join(names), []).append((row.get("T", 0), row[key]))
        if not lines:
            continue
        if table == "length":
            for name, points in lines.items():
                axes.loglog(*zip(*points, strict=True), marker="o", label=name)
            axes.set(xlabel="T", ylabel="forward+backward, ms", title=table)
            axes.legend(fontsize="x-small")
        else:
            axes.barh(list(lines), [points[0][1] for points in lines.values()])
            axes.invert_yaxis()
            axes.set(xlabel=key, title=table)
        figure.savefig(folder / f"{table}.png", dpi=100)


def machine(device: torch.device) -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    cpu = cpuinfo.read_text().partition("model name")[2].partition("\n")[0].strip("\t :") if cpuinfo.exists() else ""
    return {"device": str(device), "cpu": cpu or platform.machine(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
            "git": git_hash(), "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}  # fmt: skip


def fill(run: Run, rows: list[dict]) -> None:
    """Measure a table into `rows`, and print it."""
    print(f"\n== {run.table}", flush=True)
    start, above, left = time.perf_counter(), [], {}
    timed = run.table in ("speed", "compression", "length", "train")
    compiled = [{"mode": "compiled", "left_out": run.late}] if run.short and timed and not run.b.only else []
    for row in chain(TABLES[run.table](run), compiled):
        rows.append(row)
        if "left_out" in row:
            left.setdefault(row["left_out"], []).append(" ".join(str(row[k]) for k in LABEL if k in row))
        else:
            above = show(row, above)
    progress("")
    for reason, names in left.items():
        if reason != UNASKED:
            print(f"left out, {reason}: {'; '.join(names)}")
    if not run.short and set(left) == {UNASKED} and not above:
        raise UserError(f"only={run.b.only!r}: no row of {run.table} has all these words")
    print(f"{time.perf_counter() - start:.0f} s", flush=True)


def main(argv: list[str]) -> int:
    files = [a for a in argv if a.endswith(".toml") and not a.startswith("-")]
    options = [a for a in argv if a not in files]
    table = options.pop(0) if options and not options[0].startswith("-") else ""
    if table and table not in TABLES:
        raise UserError(f"unknown table {table!r}: use {', '.join(TABLES)}")
    given = parse(options, HydraConfig, BenchConfig, doc=__doc__)
    shape = parse([str(CONFIGS / "small.toml"), *files], HydraConfig, TrainConfig)
    base = {name: value for name, value in shape.items() if name in asdict(HydraConfig())}
    c, b = build(given, HydraConfig, BenchConfig, base=base)
    need(c, "mod_capacity", not c.mod_capacity, "the bench measures dense models: use 0")
    need(c, "mor_recursions", c.mor_recursions == 1, "the bench measures dense models: use 1")
    device = pick_device(b.device)
    if b.plot:
        package("matplotlib", "--plot")
        need(b, "plot", Path(b.plot).is_dir(), "there is no such folder: make it first")
    if b.peers:
        package("transformers", "--peers")
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    peaks = {dtype: matmul_peak(device, DTYPES[dtype]) for dtype in DTYPES}
    result = machine(device) | {"seed": b.seed, "short": not table, "config": to_toml(c, b), "peaks": peaks}
    print(f"{result['gpu'] or result['cpu']}, {result['threads']} threads, torch {result['torch']}; matrix products "
          + ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
          + f"; {count_params(c):,} parameters")  # fmt: skip
    result["tables"] = {name: [] for name in ([table] if table else TABLES)}
    until = time.perf_counter()
    latest = until + 1.1 * sum(SHORT.values())
    for name, rows in result["tables"].items():
        until = min(latest, max(until, time.perf_counter()) + SHORT[name])  # what one leaves, the next ones have
        fill(Run(name, c, b, device, peaks, math.inf if table else until), rows)
    if b.json:
        write_atomically(Path(b.json), lambda temporary: temporary.write_text(json.dumps(result, indent=1)))
    if b.plot:
        draw(result["tables"], Path(b.plot))
    return 0


if __name__ == "__main__":
    cli(main)
