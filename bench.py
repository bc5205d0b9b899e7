"""What HYDRA costs. `python bench.py`: every table, cut to three minutes on two CPU cores;
`python bench.py TABLE [config/x.toml] [--key=value ...]`: one table in full. Shape: config/small.toml, random weights.

- speed: forward and forward+backward of each attention, of a block with it, of the macro-block and of the transformer.
- memory: bytes of a training step of the same, and of the whole step against the naive path (see `naive`).
- compression: CCQA at 2x, 4x and 8x. - train: a whole optimiser step of config/tiny.toml and of the shape.
- flops: attention and layer (with its MLP) as a part of MHA's, the modules' counted FLOPs, and what a report claims.
- length: time against T for each letter, with the exponent fitted; --peers: CCQA against transformers' ZayaAttention.
- decode: generation with states against without, the hybrid against MHA; --peers: against a Llama of equal size.
- routing: a training step, an evaluation and decoding with MoD, MoR and both against the dense shape of as many layers;
  eager, or with --only=compiled a compiled training step. For a shape with routing: that one. Routers pick just their
  training capacity, evenly; on CUDA evaluation and decoding compute all tokens (routing.py) and save nothing.
- scaling: config/scale_*.toml, those that fit are trained for `rounds` steps on the default corpus, at their own
  learning rate; their time per token and the causal rule's routing predict those of the others (see `fit`).

What is compared runs in one process, in turns; the median counts, spread is the interquartile range over it. `x_...`
is the median of the round-by-round ratios of the times (of forward+backward), x_first to the first of the comparison,
MHA or the dense shape; in memory x_first compares the bytes that a step adds, x_peak all; in decode `..._x` says how
many times slower the other one is, and uncached_x is put together from the times of a prefill, a step and a full
forward of the mean length. Compilation, with empty caches, and warm-up are not in the times. bf16 is autocast over
fp32 weights (decode: bf16 weights). FLOPs are those of model.py's formulas, a backward has twice its forward's; table
train: 6 a parameter and token. of_peak is the part of a large matrix product's rate in that dtype.
Absolute times of a shared CPU mean little, ratios more. A row that does not fit in memory, or in the time of the short
run, is listed as left out with the reason.
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
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from importlib import import_module, metadata
from itertools import chain, pairwise, product
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import model as accounting
from attention import CCQA, GQA, MLA, RMSNorm
from configurator import UserError, build, cli, need, parse, to_toml
from data import Corpus, eval_batches, get_batch, prepare
from model import (
    MAX_LOGITS,
    Hydra,
    HydraConfig,
    SwiGLU,
    attention_flops,
    attention_params,
    count_params,
    flops_per_token,
    kv_bytes,
    layer_tokens,
    state_values,
)
from routing import recursion_tokens
from train import (
    BY_RULE,
    TrainConfig,
    copy_bandwidth,
    git_hash,
    gradient_norm,
    make_optimizer,
    matmul_peak,
    pick_device,
    pick_dtype,
    sync,
    update,
    write_atomically,
)

CONFIGS = Path(__file__).parent / "config"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("eager", "compiled")
SHAPES = ((1, 256), (4, 512), (8, 1024))  # (B, T) of speed and memory
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
MACRO_LENGTHS = (1024, 4096)
SHORT = {"speed": 35, "memory": 25, "compression": 10, "flops": 3, "length": 25, "train": 35, "decode": 25,
         "routing": 5, "scaling": 5}  # seconds
TRAINED = ("train", "naive", "step")  # levels with an optimiser
WHOLE = ("model", "eval", "decode", *TRAINED)  # levels with embedding and head
EAGER = ("peer", "eval", "decode")  # levels that are not compiled
CYCLE = 24  # decode: tokens of a step, after which routers of 1 in 2, 3 or 8 have picked just that
ROUTED_T, SHORT_ROUTED_T = 1024, 256  # routing: tokens of a text, in the short run
SCALING_T = 256  # scaling: tokens of a step
EVALUATIONS = 16  # scaling: texts of the evaluation
SCALING_SECONDS = 240  # scaling: a shape that takes longer than this on a CPU is not measured
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
    given: dict = field(default_factory=dict)  # what options say of the shape

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
        if time.perf_counter() + seconds > self.until:
            return self.late
        gc.collect()  # models are in cycles with their hooks and closures
        if size > available(self.device):
            return f"more than the {available(self.device) / 1e9:.1f} GB of memory that are free"
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


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of `call`."""
    sync(device)
    start = time.perf_counter()
    call()
    sync(device)
    return time.perf_counter() - start


def in_turns(contestants: dict, rounds: int, device: torch.device, limit: float = math.inf) -> dict:
    """Seconds of every contestant in every round; one round of warm-up is not counted. After `limit` seconds no further
    round begins once there are three, after three times as many once there is one."""
    seconds: dict[object, list[float]] = {name: [] for name in contestants}
    began = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > 1 and time.perf_counter() - began > (limit if turn > 3 else 3 * limit):
            break
        for name, call in contestants.items():
            taken = timed(call, device)
            if turn:
                seconds[name].append(taken)
    return seconds


def ratios(times: list[float], others: list[float]) -> list[float]:
    """Round by round: a slow phase of the machine is in both."""
    return [a / b for a, b in zip(times, others, strict=True)]


def ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(ratios(times, others))


def spread(t: list[float]) -> float:
    low, middle, high = statistics.quantiles(t * 2 if len(t) == 1 else t, method="inclusive")
    return (high - low) / middle


def exponent(lengths: list[int], times: list[float]) -> float:
    """p of the least-squares fit times = a * lengths**p, on logarithms."""
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(t) for t in times]).slope


# ---------------------------------------------------------------------------------------------------------------------
# the contestants


def force_routers(net: Hydra) -> None:
    """Routers that pick their training capacity's part of the tokens, evenly: those of random weights pick half."""
    each = pairwise(recursion_tokens(net.config.mor_recursions, 10**6))
    shares = [net.config.mod_capacity] * len(net.depth_routers) + [k / n for n, k in each]
    seen = [*range(len(shares))]  # tokens, by router; in decoding they do not all pick the same ones

    def scores(x: Tensor, router: int, k: int, of: int) -> Tensor:
        n = torch.arange(seen[router], seen[router] + x.size(1), device=x.device)
        seen[router] += x.size(1)
        return (((n + 1) * k // of) - (n * k // of) - 0.5).expand(x.size(0), -1)

    for i, (router, share) in enumerate(zip([*net.depth_routers, *net.recursion_routers], shares, strict=True)):
        k, of = Fraction(share).limit_denominator(1000).as_integer_ratio()
        router.forward = partial(scores, router=i, k=k, of=of)


def decoder(model: Hydra, B: int, past: int) -> Callable[[], None]:
    """One decode step of B rows at `past` tokens, in place. The state is random: its values do not change the time."""
    static = bool(model.decoders) or model.embed.weight.is_cuda  # as `generate` has it
    state = model.new_state(B, 1 << past.bit_length() if static else past + 1)
    for layer in state.layers:
        for tensor in (t for t in layer.values() if t.is_floating_point()):
            tensor.normal_()
    token = torch.zeros(B, dtype=torch.int64, device=state.pos_B.device)
    counts = [(layer["count"], k) for layer, (_, k) in zip(state.layers, layer_tokens(model.config, past), strict=True)
              if "count" in layer]  # fmt: skip

    def step() -> None:
        state.pos_B.fill_(past)
        for tokens, k in counts:
            tokens.fill_(k)
        state.visible, state.uniform = (None, False) if static else (past, True)
        model.decode(token, state)

    return step


class Contestant:
    """Something with a step of `step_tokens` tokens, on random input, under autocast where `dtype` is bf16. Levels:
    attention and block (of the pattern's first letter), macro (the pattern once, no embedding), model (with embedding,
    head and loss), peer (ZayaAttention): the step is forward+backward. train, naive, step: a model's optimiser step.
    eval: its loss in evaluation. decode: CYCLE tokens one by one behind T others, weights in `dtype`."""

    def __init__(self, level: str, c: HydraConfig, B: int, T: int, device: torch.device, dtype: str,
                 t: TrainConfig | None = None):  # fmt: skip
        mixed = dtype == "bfloat16" and level != "decode"
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=mixed)
        whole = level in WHOLE
        depth = c.n_layer if whole else len(c.pattern) if level == "macro" else 1
        c = replace(c, n_layer=depth, vocab_size=c.vocab_size if whole else 1, block_size=max(T, c.block_size))
        self.net = net = Hydra(c)
        if level == "naive":
            naive(net)
        net.to(device)
        self.parts = list(net.blocks)  # what is compiled
        if whole:
            self.batch = torch.randint(0, c.vocab_size, (2, B, T), device=device)
            self.leaves, self.call = list(net.parameters()), lambda: net(*self.batch)[1] + net.aux_loss()
        else:  # the input needs a gradient, as it does behind other layers
            x = torch.randn(B, T, c.dim, device=device, requires_grad=True)
            ctx = net.context(torch.arange(T, device=device))
            if level == "attention":
                self.parts = [net.blocks[0].attn]
            if level == "peer":
                self.parts = [zaya(c, ctx, B).to(device)]
            self.leaves = [x, *(p for part in self.parts for p in part.parameters())]
            self.call = lambda: self.through(x, ctx)
        if level in ("eval", "decode"):
            force_routers(net.eval())
            self.step = self.decoding(B, T, DTYPES[dtype]) if level == "decode" else torch.no_grad()(self.forward)
        elif level in TRAINED:
            self.step = self.training(t or TrainConfig())
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

    def training(self, t: TrainConfig) -> Callable[[], None]:
        """As train.py does it; the optimiser's state exists already."""
        net, optimizer = self.net, make_optimizer(self.net, t)

        def finish() -> None:
            update(net, optimizer, gradient_norm(net), t.grad_clip)
            optimizer.zero_grad(set_to_none=True)

        def step() -> None:
            self.forward().backward()
            finish()

        for leaf in self.leaves:
            leaf.grad = torch.zeros_like(leaf)
        finish()
        return step

    def decoding(self, B: int, T: int, dtype: torch.dtype) -> Callable[[], None]:
        self.net.to(dtype).pack()
        step = decoder(self.net, B, T)

        def steps() -> None:
            for _ in range(CYCLE):
                step()

        return torch.no_grad()(steps)


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


def step_tokens(level: str, B: int, T: int) -> int:
    return B * (CYCLE if level == "decode" else T)


def step_flops(level: str, c: HydraConfig, B: int, T: int) -> float:
    if level in ("train", "naive"):
        return 6 * count_params(c) * B * T
    if level == "decode":  # the formula is a mean over the text, which has T / 2 tokens before each one
        return flops_per_token(c, 2 * T) * step_tokens(level, B, T)
    if level in WHOLE:
        return (1 if level == "eval" else 3) * flops_per_token(c, T) * B * T
    mlp = 6 * c.dim * c.mlp_hidden if level in ("block", "macro") else 0
    return 3 * B * T * sum(attention_flops(c, a, T) + mlp for a in (c.pattern if level == "macro" else c.pattern[0]))


def step_bytes(level: str, c: HydraConfig, B: int, T: int) -> tuple[float, float]:
    """Roughly what is kept (weights, gradients, optimiser) and what a step needs: to leave out what cannot fit."""
    whole = level in WHOLE
    layers = c.n_layer if whole else len(c.pattern) if level == "macro" else 1
    weights = count_params(c) if whole else layers * (4 * c.dim**2 + 3 * c.dim * c.mlp_hidden)
    tokens = sum(k for _, k in layer_tokens(c, T)) if whole else layers * T
    activations = B * tokens * (16 * c.dim + 5 * c.mlp_hidden)
    logits = 3 * B * T * c.vocab_size * whole
    copies = 5 if level in TRAINED else 2  # with gradients; the optimiser's two, and what bf16 has of its own
    return 4 * weights * copies, 4 * (activations + logits)


def first_step(it: Contestant, compiled: bool, device: torch.device) -> float:
    """Seconds of the first step, compilation included."""
    if compiled:
        it.net.static = True
        for part in it.parts:
            part.compile(fullgraph=True, dynamic=False)
    return timed(it.step, device)


def start_of(level: str, c: HydraConfig, B: int, T: int, device: torch.device, dtype: str) -> float:
    return first_step(Contestant(level, c, B, T, device, dtype), True, device)


def compare(run: Run, what: dict[str, tuple], B: int, T: int, dtype: str) -> Iterator[dict]:
    """Rows of all in `what`, name -> (level, shape), timed in turns and in every mode; the others relate to the first.
    A train step's start, with empty and with filled caches, is timed in new processes."""
    first, modes, flops = next(iter(what)), run.modes, {name: step_flops(*w, B, T) for name, w in what.items()}
    label = {"level": what[first][0], "mix": " ".join(what), "B": B, "T": T, "dtype": dtype}
    if label["level"] in EAGER or (label["level"] == "step" and "compiled" not in run.b.only.split()):
        modes = tuple(mode for mode in modes if mode == "eager")
    kept, needed = zip(*(step_bytes(*w, B, T) for w in what.values()), strict=True)
    size = len(modes) * sum(kept) + max(needed)
    seconds = len(modes) * 4 * 1.4 * sum(flops.values()) / run.peaks[dtype] / 0.5
    reason = run.refuse(label, size, seconds) if modes else UNASKED
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
                if hasattr(it, "grad"):  # its step is forward+backward
                    calls[name, mode, "forward"] = it.forward
                calls[name, mode, "step"] = it.step
        before = matmul_peak(run.device, DTYPES[dtype])
        times = in_turns(calls, run.b.rounds, run.device, 1.5 if run.short else 60)
        peak = max(before, matmul_peak(run.device, DTYPES[dtype]))
    for (name, mode), start in starts.items():
        tokens = step_tokens(what[name][0], B, T)
        row = label | {"level": what[name][0], "mix": name, "mode": mode} | figures(times, name, mode, first, tokens)
        if len(what) > 1:
            row["flops_x_first"] = flops[name] / flops[first]
        rate = flops[name] / row["ms"] * 1e3
        row |= {"tflops": rate / 1e12, "peak_tflops": peak / 1e12, "of_peak": rate / peak}
        # a child that the system killed has no seconds
        yield row | {key: seconds - row["ms"] / 1e3 for key, seconds in start.items() if seconds is not None}


def figures(times: dict, name: str, mode: str, first: str, tokens: int) -> dict:
    """What the times of `compare` say of one contestant."""
    step, forward = times[name, mode, "step"], times.get((name, mode, "forward"))
    row: dict = {"rounds": len(step)}
    if forward:
        row |= {"forward_ms": statistics.median(forward) * 1e3, "forward_spread": spread(forward)}
        row["forward_x_first"] = ratio(forward, times[first, mode, "forward"])
    seconds = statistics.median(step)
    row |= {"ms": seconds * 1e3, "spread": spread(step), "tokens_per_s": tokens / seconds}
    others = {"x_first": (first, mode), "x_eager": (name, "eager"), "x_zaya": ("Zaya", "eager")}
    wanted = {"x_first": len({who for who, *_ in times}) > 1, "x_eager": mode == "compiled", "x_zaya": name == "C"}
    for key, other in others.items():
        if wanted[key] and (*other, "step") in times:
            x = ratios(step, times[*other, "step"])
            row |= {key: statistics.median(x), f"{key}_spread": spread(x)}
    return row


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
        compute = tokens * flops_per_token(c, b.prompt_tokens) / run.peaks[name]
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


# ---- routing


def routing(run: Run) -> Iterator[dict]:
    c = run.c
    if c.mod_capacity or c.mor_recursions > 1:
        shapes = {"routed": c}
        c = replace(c, mod_capacity=0.0, mor_recursions=1, n_layer=c.n_layer * c.mor_recursions)
    elif run.short:
        shapes = {"mod0.125": replace(c, mod_capacity=0.125)}
    else:
        shapes = {f"mod{capacity}": replace(c, mod_capacity=capacity) for capacity in (0.125, 0.5)}
        if c.n_layer % 3 == 0 and c.n_layer > 3:  # as many layers for a token that takes all recursions
            shapes["mor3"] = replace(c, n_layer=c.n_layer // 3, mor_recursions=3)
            shapes["mod0.125+mor3"] = replace(shapes["mor3"], mod_capacity=0.125)
    for level, dtype in product(("step", "eval", "decode"), reversed(DTYPES)):
        what = {name: (level, shape) for name, shape in ({"dense": c} | shapes).items()}
        yield from compare(run, what, 1, SHORT_ROUTED_T if run.short else ROUTED_T, dtype)


# ---- scaling

# Student's t for a two-sided 95% interval, at 1, 2, 3 .. degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Trend(NamedTuple):
    """`fit`'s finding about y over x, x a logarithm of parameters, y as it was transformed."""

    sloped: bool  # the line is used, else the constant
    slope: float
    error: float  # standard error of the slope
    predict: Callable[[float], tuple[float, float, float]]  # x -> y with its 95% prediction interval


def fit(x: list[float], y: list[float]) -> Trend:
    """Constant or line, at least three points. The line is used where it leaves one out better and its slope is
    significant at 95%. A slope that is not significant is not known to be 0: the interval is the line's either way, so
    that it widens with the distance from what was measured."""
    n, mean_x, mean_y = len(x), statistics.fmean(x), statistics.fmean(y)
    slope, intercept = statistics.linear_regression(x, y)
    spread_x = sum((a - mean_x) ** 2 for a in x)
    variance = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / (n - 2)
    error, quantile = math.sqrt(variance / spread_x), T95[n - 3]
    missed = {"line": 0.0, "constant": 0.0}  # squared errors at each point, of a fit to the others
    for i in range(n):
        others = x[:i] + x[i + 1 :], y[:i] + y[i + 1 :]
        line = statistics.linear_regression(*others)
        missed["line"] += (y[i] - line.intercept - line.slope * x[i]) ** 2
        missed["constant"] += (y[i] - statistics.fmean(others[1])) ** 2
    sloped = missed["line"] < missed["constant"] and abs(slope) > quantile * error

    def predict(at: float) -> tuple[float, float, float]:
        half = quantile * math.sqrt(variance * (1 + 1 / n + (at - mean_x) ** 2 / spread_x))
        middle = intercept + slope * at
        best = middle if sloped else mean_y
        return best, min(best, middle - half), max(best, middle + half)

    return Trend(sloped, slope, error, predict)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def logistic(y: float) -> float:
    return (1 + math.tanh(y / 2)) / 2


# what is fitted and how: times by their logarithms, parts of a whole, which stay within it, by their logits.
# recursing is the part of the recursions after the first that a token takes, (mean_depth - 1) / (recursions - 1)
SCALES = {"ms_per_token": (math.log, math.exp), "routed_fraction": (logit, logistic), "recursing": (logit, logistic)}


def grow(run: Run, c: HydraConfig, t: TrainConfig, dtype: str, corpus: Corpus) -> dict:
    """Trains a shape for run.b.rounds steps, after one that is not timed, then evaluates it."""
    need(c, "vocab_size", c.vocab_size >= corpus.enc.n_vocab, f"the default corpus has {corpus.enc.n_vocab} tokens")
    torch.manual_seed(run.b.seed)
    it, seconds, losses = Contestant("step", c, 1, SCALING_T, run.device, dtype, t), [], []
    for step in range(run.b.rounds + 1):
        it.batch = [x.to(run.device) for x in get_batch(corpus.train, 1, SCALING_T, run.b.seed, step)]
        seconds.append(timed(it.step, run.device))
    it.net.eval()
    seen: dict[str, list[float]] = {name: [] for name in BY_RULE if name in it.net.routing()}
    with torch.no_grad():
        for x, y in eval_batches(corpus.val, 1, SCALING_T, EVALUATIONS):
            it.batch = x.to(run.device), y.to(run.device)
            losses.append(it.forward().item())
            for name, values in seen.items():
                values.append(it.net.routing()[name].item())
    if not math.isfinite(sum(losses)):
        return {"left_out": "its loss is not finite"}
    ms = statistics.median(seconds[1:]) / SCALING_T * 1e3
    row = {"steps": len(seconds), "ms_per_token": ms, "spread": spread(seconds[1:])}
    row |= {name: statistics.fmean(values) for name, values in seen.items()}
    if "mean_depth" in row:
        row["recursing"] = (row["mean_depth"] - 1) / (c.mor_recursions - 1)
    return row


def to_fit(key: str, value: float) -> float:
    """`value` as `fit` is given it; a part of 0 or 1 counts as half a token of a text away from it."""
    least = 0.5 / SCALING_T
    return SCALES[key][0](value if key == "ms_per_token" else min(max(value, least), 1 - least))


def predicted(c: HydraConfig, params: int, trends: dict[str, Trend], largest: int) -> dict:
    """A row of what the trends say of a shape."""
    row = {"params": params}
    for key, trend in trends.items():
        values = [SCALES[key][1](y) for y in trend.predict(math.log(params))]
        row |= dict(zip((key, f"{key}_low", f"{key}_high"), values, strict=True))
        if key == "recursing":
            depths = [1 + (c.mor_recursions - 1) * part for part in values]
            row |= dict(zip(("mean_depth", "mean_depth_low", "mean_depth_high"), depths, strict=True))
    times = params / largest
    return row | {"note": f"{times:.1f}x the largest measured" + ": beyond 3x, a guess" * (times > 3)}


def scaling(run: Run) -> Iterator[dict]:
    kinds, shapes = (HydraConfig, TrainConfig), []
    for path in CONFIGS.glob("scale_*.toml"):
        c, t = build(parse([str(path)], *kinds) | run.given, *kinds)
        with torch.device("meta"):
            shapes.append((sum(p.numel() for p in Hydra(c).parameters()), path.stem, c, t))
    dtype = str(pick_dtype("auto", run.device, run.c.dim)[0]).removeprefix("torch.")
    corpus, found, others = None, [], []
    for params, name, c, t in sorted(shapes, key=itemgetter(0, 1)):
        label = {"level": "scaling", "mix": name, "B": 1, "T": SCALING_T, "dtype": dtype, "params": params}
        steps = run.b.rounds + 2 + EVALUATIONS / 3
        seconds = steps * step_flops("step", c, 1, SCALING_T) / run.peaks[dtype] / 0.3
        reason = run.refuse(label, sum(step_bytes("step", c, 1, SCALING_T)), seconds)
        if not reason and run.device.type == "cpu" and seconds > SCALING_SECONDS:
            reason = f"more than {SCALING_SECONDS} s on a CPU"
        if not reason:
            corpus = corpus or prepare(t.data, t.tokenizer, t.cache_dir)
        row = label | ({"left_out": reason} if reason else grow(run, c, t, dtype, corpus))
        yield row
        if "left_out" not in row:
            found.append(row)
        elif reason != UNASKED:
            others.append((name, c, params))
    sizes = sorted({row["params"] for row in found})
    if len(sizes) < 3:
        if others and not run.short:
            names = " ".join(name for name, *_ in others)
            yield {"level": "predicted", "mix": names, "left_out": "a fit needs three measured shapes"}
        return
    trends = {}
    for key, (_, unscale) in SCALES.items():
        points = [(math.log(row["params"]), to_fit(key, row[key])) for row in found if key in row]
        if len({y for _, y in points}) < 2:  # all at one bound, or not routed: nothing to fit
            continue
        trends[key] = trend = fit(*map(list, zip(*points, strict=True)))
        ends = math.log(sizes[0]), math.log(max(sizes + [params for *_, params in others]))
        curve = [ends[0] + (ends[1] - ends[0]) * i / 30 for i in range(31)]
        yield {"level": "fit", "mix": key, "form": "line" if trend.sloped else "constant", "slope": trend.slope,
               "slope_error": trend.error, "measured": len(points),
               "curve": [(math.exp(x), *map(unscale, trend.predict(x))) for x in curve]}  # fmt: skip
    for name, c, params in others:
        yield {"level": "predicted", "mix": name} | predicted(c, params, trends, sizes[-1])


# ---------------------------------------------------------------------------------------------------------------------
# printing, storing, drawing


TABLES = {f.__name__: f for f in (speed, memory, compression, flops, length, train, decode, routing, scaling)}
ONLY_JSON = {"peak_tflops", "forward_spread", "x_first_spread", "x_eager_spread", "x_zaya_spread", "curve", "recursing",
             "recursing_low", "recursing_high"}  # fmt: skip
LABEL = ("level", "mix", "B", "T", "dtype", "mode")


def text(key: str, value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
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


def draw_scaling(rows: list[dict], figure) -> None:
    """Over the parameters what was measured, and the fit with its interval."""
    for axes, key in zip(figure.subplots(len(SCALES), sharex=True), SCALES, strict=True):
        for curve in (row["curve"] for row in rows if row["level"] == "fit" and row["mix"] == key):
            x, y, low, high = zip(*curve, strict=True)
            axes.plot(x, y, label="fit")
            axes.fill_between(x, low, high, alpha=0.2, label="95% prediction interval")
        found = [(row["params"], row[key]) for row in rows if row["level"] == "scaling" and key in row]
        axes.plot([params for params, _ in found], [value for _, value in found], "o", label="measured")
        axes.set(xscale="log", yscale="log" if key == "ms_per_token" else "linear", ylabel=key)
    axes.set(xlabel="parameters")
    axes.legend()


def draw(tables: dict[str, list[dict]], folder: Path) -> None:
    """One chart a table: lines over T for length, curves over the parameters for scaling, else bars of one figure."""
    for table, rows in tables.items():
        figure = import_module("matplotlib.figure").Figure(figsize=(9, 7), layout="constrained")
        if table == "scaling":
            if any(row["level"] == "fit" for row in rows):
                draw_scaling(rows, figure)
                figure.savefig(folder / f"{table}.png", dpi=100)
            continue
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


def machine(device: torch.device, peers: bool) -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    cpu = cpuinfo.read_text().partition("model name")[2].partition("\n")[0].strip("\t :") if cpuinfo.exists() else ""
    return {"device": str(device), "cpu": cpu or platform.machine(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "torch": torch.__version__, "transformers": metadata.version("transformers") if peers else None,
            "python": platform.python_version(), "system": platform.platform(),
            "git": git_hash(), "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}  # fmt: skip


def fill(run: Run, rows: list[dict]) -> None:
    """Measure a table into `rows`, and print it."""
    print(f"\n== {run.table}", flush=True)
    start, above, left = time.perf_counter(), [], {}
    both = run.table in ("speed", "compression", "length", "train")
    compiled = [{"mode": "compiled", "left_out": run.late}] if run.short and both and not run.b.only else []
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
    if table == "scaling" and files:
        raise UserError(f"{files[0]!r}: table scaling has its own files, config/scale_*: give it --key=value only")
    if table not in ("routing", "scaling"):
        need(c, "mod_capacity", not c.mod_capacity, "only table routing measures routed models: use that, or 0")
        need(c, "mor_recursions", c.mor_recursions == 1, "only table routing measures routed models: use that, or 1")
    device = pick_device(b.device)
    if b.plot:
        package("matplotlib", "--plot")
        need(b, "plot", Path(b.plot).is_dir(), "there is no such folder: make it first")
    if b.peers:
        package("transformers", "--peers")
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    peaks = {dtype: matmul_peak(device, DTYPES[dtype]) for dtype in DTYPES}
    result = machine(device, b.peers) | {"seed": b.seed, "short": not table, "config": to_toml(c, b), "peaks": peaks}
    print(f"{result['gpu'] or result['cpu']}, {result['threads']} threads, torch {result['torch']}; matrix products "
          + ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
          + f"; {count_params(c):,} parameters")  # fmt: skip
    result["tables"] = {name: [] for name in ([table] if table else TABLES)}
    overrides = {key: value for key, value in given.items() if key in asdict(c)}
    until = time.perf_counter()
    latest = until + 1.1 * sum(SHORT.values())
    for name, rows in result["tables"].items():
        until = min(latest, max(until, time.perf_counter()) + SHORT[name])  # what one leaves, the next ones have
        fill(Run(name, c, b, device, peaks, math.inf if table else until, overrides), rows)
    if b.json:
        write_atomically(Path(b.json), lambda temporary: temporary.write_text(json.dumps(result, indent=1)))
    if b.plot:
        draw(result["tables"], Path(b.plot))
    return 0


if __name__ == "__main__":
    cli(main)
