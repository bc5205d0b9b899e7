"""What this machine is and does best: every decision about a device, a precision, a backend or a compilation is made
here, with its reason; the other files ask (parallel.py joins several processes). Left out: float16."""

import ctypes
import functools
import math
import multiprocessing
import os
import platform
import re
import resource
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from configurator import UserError

EARNS_COMPILATION = 5e13  # FLOPs of a run on a CPU: some minutes, of which a compilation saves more than it takes
EMULATED = 0.3  # bf16 products at less than this part of fp32's rate are emulated
MAX_COPIES = 256  # of an input, see `cold_copies`
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(requested: str) -> torch.device:
    """The device for "auto", "cpu", "cuda", "cuda:N" or "mps"; UserError where there is no such device."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "auto":
        return torch.device("cuda" if gpus else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", requested):
        raise UserError(f"device={requested!r}: use auto, cpu, cuda, cuda:N or mps")
    if requested == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device='mps': torch {torch.__version__} sees no Apple GPU: use device=auto or cpu")
    if requested.startswith("cuda") and int(requested[5:] or 0) >= gpus:
        raise UserError(f"device={requested!r}: torch {torch.__version__} sees no such GPU: use device=auto or cpu")
    return torch.device(requested)


def choose_dtype(requested: str, device: torch.device, dim: int) -> tuple[torch.dtype, str]:
    """(dtype, reason) for "auto" or a dtype's name. A small product tells whether a CPU emulates bf16, whatever the
    list of its features says."""
    if requested != "auto":
        return DTYPES[requested], "asked for"
    if device.type == "cuda":
        with torch.cuda.device(device):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if has_bf16:
            return torch.bfloat16, "this GPU has bf16 instructions"
        return torch.float32, "this GPU has no bf16 instructions"
    if device.type == "mps":
        return torch.float32, "nothing else is tried on an Apple GPU"
    features = torch.cpu.get_capabilities()
    if not features.get("amx_bf16") and not features.get("avx512_bf16"):
        return torch.float32, "this CPU has no bf16 instructions"
    if dim < (256 if features.get("amx_bf16") else 128):  # AVX-512's are a third faster at 192, AMX's were not
        return torch.float32, "a model this narrow does not earn the casts back on a CPU"
    if matmul_peak(device, torch.bfloat16, 256) < EMULATED * matmul_peak(device, torch.float32, 256):
        return torch.float32, "bf16 products are slower than fp32 ones on this CPU, whatever its features say"
    return torch.bfloat16, "this CPU has bf16 instructions"


def choose_compile(requested: str, device: torch.device, flops: float) -> tuple[bool, str]:
    """(whether to compile the blocks, reason) for "auto", "on" or "off" and a run of `flops` FLOPs; UserError where
    "on" cannot be. On a CPU it gains 10-30% a step, costs 15-40 s once, and calls g++."""
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if device.type == "mps" and requested == "on":
        raise UserError("compile='on': an Apple GPU runs eager here, and untested: use compile=off")
    can = device.type == "cuda" or (headers and shutil.which("g++") is not None)
    if requested == "on" and not can:
        raise UserError("compile='on': there is no g++ or no Python.h here: install a C++ compiler and Python's "
                        "headers, or use compile=off")  # fmt: skip
    if requested != "auto":
        return requested == "on", "asked for"
    if device.type == "mps":
        return False, "an Apple GPU runs eager here, and untested"
    if device.type == "cuda":
        return True, "fuses the attention and the pointwise work on a GPU"
    if flops < EARNS_COMPILATION:
        return False, f"on a CPU a run of {flops:.0e} FLOPs, below {EARNS_COMPILATION:.0e}, does not earn it back"
    if not can:
        return False, "there is no g++ or no Python.h here: slower than it could be"
    return True, "a long run on a CPU earns the compilation back"


class Machine(NamedTuple):
    """What a run runs on."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool
    peak: float  # FLOP/s, see `matmul_peak`
    listed_peak: float | None  # the same by the data sheet
    facts: dict[str, str]  # the same in words, with the reasons

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def choose_machine(device: str, dtype: str, compile: str, dim: int, flops: float) -> Machine:
    """For a run of a model `dim` wide and of `flops` FLOPs; UserError where something cannot be as asked for."""
    chosen = choose_device(device)
    precision, precision_reason = choose_dtype(dtype, chosen, dim)
    compiled, compile_reason = choose_compile(compile, chosen, flops)
    torch.set_float32_matmul_precision("high" if chosen.type == "cuda" else "highest")
    peak = matmul_peak(chosen, precision)
    listed = datasheet_peak(chosen, precision)
    sheet = f"{listed / 1e9:,.0f}" if listed else "not known"
    facts = {"device": f"{chosen}, matrix-multiply peak measured now: {peak / 1e9:,.0f} GFLOP/s; data sheet: {sheet}",
             "dtype": f"{precision} ({precision_reason})",
             "compile": f"{'on, block by block' if compiled else 'off'} ({compile_reason})"}  # fmt: skip
    return Machine(chosen, precision, compiled, peak, listed, facts)


class Prefetch:
    """`make(step)`, the batches of a step, on the device. On CUDA those of the next step are made, put into pinned
    memory and copied by a stream of their own while this one runs."""

    def __init__(self, make: Callable[[int], list[tuple[Tensor, ...]]], device: torch.device):
        self.make = make
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: dict[int, list[tuple[Tensor, ...]]] = {}

    def copy(self, step: int) -> list[tuple[Tensor, ...]]:
        with torch.cuda.stream(self.stream):  # of None it does nothing
            if self.stream:
                return [tuple(t.pin_memory().to(self.device, non_blocking=True) for t in b) for b in self.make(step)]
            return [tuple(t.to(self.device) for t in batch) for batch in self.make(step)]

    def __call__(self, step: int) -> list[tuple[Tensor, ...]]:
        if step not in self.ahead:
            self.ahead = {step: self.copy(step)}
        batches = self.ahead[step]
        if self.stream:
            present = torch.cuda.current_stream(self.device)
            present.wait_stream(self.stream)
            for t in chain(*batches):
                t.record_stream(present)  # its memory is not free before this stream is done with it
            if step + 1 not in self.ahead:
                self.ahead = {step: batches, step + 1: self.copy(step + 1)}
        return batches


def compile_blocks(blocks: Iterable[nn.Module], graphs: int = 64, backend: str = "inductor") -> None:
    """torch.compile in place, module by module. `graphs`: letters x shapes x modes, since all share Block.forward."""
    torch._dynamo.config.recompile_limit = graphs
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)


def compiling() -> bool:
    """Whether this thread is within a compilation."""
    return torch._guards.CompileContext.try_get() is not None


def flex_problem(device: str, width: int, compiled: bool, grad: bool) -> str:
    """Why FlexAttention cannot do this ("" where it can)."""
    if not compiled:
        return "FlexAttention needs torch.compile, uncompiled it is 14-50x slower: set compile=on"
    if device == "cpu" and grad:
        return "FlexAttention has no backward on a CPU: set attn_backend=auto or sdpa"
    if device == "cuda" and width < 16:
        return f"FlexAttention on CUDA needs heads of at least 16 channels, these have {width}: set attn_backend=auto"
    return ""


def choose_backend(requested: str, device: str, width: int, compiled: bool, grad: bool) -> tuple[str, str]:
    """(backend, reason) for "auto", "flex" or "sdpa"; UserError where "flex" cannot be. "auto" takes FlexAttention on
    CUDA inside torch.compile (one fused kernel forward, two backward; a window costs only the tiles it touches), else
    scaled_dot_product_attention, whose CPU kernel reads strided views and shares the key/value heads."""
    if requested == "sdpa":
        return "sdpa", "asked for"
    problem = flex_problem(device, width, compiled, grad)
    if requested == "flex":
        if not compiled and not grad:
            return "sdpa", "generation is not compiled, whatever trains"
        if problem:
            raise UserError(f"attn_backend=flex cannot work here: {problem}")
        return "flex", "asked for"
    if device != "cuda":
        return "sdpa", f"the fused kernel that trains on {device}"
    return ("sdpa", problem) if problem else ("flex", "compiled on CUDA")


@functools.lru_cache(maxsize=32)
def causal_block_mask(T: int, window: int, device: torch.device) -> BlockMask:
    """The causal BlockMask of T tokens, cut to the last `window` keys (0 = all): all T*T pairs, once for a shape."""
    reach = window or T

    def visible(b, h, q, k):
        return (q >= k) & (q - k < reach)

    return create_block_mask(visible, None, None, T, T, device)


def document_block_mask(doc_BT: Tensor, window: int) -> BlockMask:
    """The same for texts of several documents, doc [B, T] numbers them: made anew for every batch."""
    B, T = doc_BT.shape
    reach = window or T

    def visible(b, h, q, k):
        return (q >= k) & (q - k < reach) & (doc_BT[b, q] == doc_BT[b, k])

    return create_block_mask(visible, B, None, T, T, doc_BT.device)


def document_mask(doc_BT: Tensor, window: int) -> Tensor:
    """What SDPA is to see, bool [B, 1, T, T]: the tokens before in the same document, the last `window` (0 = all)."""
    t = torch.arange(doc_BT.size(1), device=doc_BT.device)
    behind = t[:, None] - t
    seen = behind >= 0
    if window:
        seen = seen & (behind < window)
    return (seen & (doc_BT[:, :, None] == doc_BT[:, None, :])).unsqueeze(1)


def document_masks(doc_BT: Tensor, windows: set[int], flex: bool) -> dict[tuple[int, int], BlockMask | Tensor]:
    """The masks of a `Context` for all tokens of doc [B, T]."""
    make = document_block_mask if flex else document_mask
    return {(doc_BT.size(1), window): make(doc_BT, window) for window in sorted(windows)}


class PackedLinear(nn.Module):
    """A linear map for inference on a CPU, its weights in the block order of oneDNN, which a product of few rows reads
    at 1.3-2 times the rate of plain ones. The operators are torch's own, but private to the pinned version."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.packed.dtype), self.packed, None, "none", [], "")


def packing_problem(device: torch.device, dtype: torch.dtype) -> str:
    """Why `PackedLinear` cannot be used here ("" where it can): found out by trying it."""
    if device.type != "cpu":
        return "packed weights are for a CPU"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    try:
        PackedLinear(torch.zeros(16, 16, dtype=dtype))(torch.zeros(1, 16, dtype=dtype))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        return f"oneDNN cannot pack {str(dtype).removeprefix('torch.')} weights on this CPU ({reason})"
    return ""


def sync(device: torch.device) -> None:
    """Wait until the device has done all that it was given, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(call, device: torch.device) -> float:
    """Seconds of `call()`, all its work on the device included; on CUDA between two events of the device's stream, so
    that what the host needs to notice the end is left out."""
    sync(device)
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)  # the current device may be another one
        begun = torch.cuda.Event(enable_timing=True)
        ended = torch.cuda.Event(enable_timing=True)
        begun.record(stream)
        call()
        ended.record(stream)
        ended.synchronize()
        return begun.elapsed_time(ended) / 1e3  # it is in milliseconds
    start = time.perf_counter()
    call()
    sync(device)
    return time.perf_counter() - start


def cache_bytes(device: torch.device) -> int:
    """Bytes of a GPU's L2 cache; 0 for a CPU, whose times are those of inputs that may be in its caches."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 0


def cold_copies(x: Tensor, cache: int) -> list[Tensor]:
    """x and so many copies of it (at most MAX_COPIES in all) that those between two uses of one are twice as large as a
    `cache` of so many bytes: a call that takes the next one each time finds none of it there."""
    n = min(MAX_COPIES, math.ceil(2 * cache / x.nbytes) + 1)
    return [x, *(x.clone() for _ in range(n - 1))]


def best_of_seven(call, device: torch.device) -> float:
    """The shortest of seven times; of fewer, where those take more than two seconds."""
    times = []
    while len(times) < 7 and sum(times) < 2:
        times.append(seconds_of(call, device))
    return min(times)


def matmul_peak(device: torch.device, dtype: torch.dtype, n: int = 0) -> float:
    """FLOP/s of a large square matrix product (of `n` rows), measured now: the peak that MFU is a part of."""
    n = n or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / best_of_seven(lambda: a @ a, device)


def attention_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of SDPA's forward over 2,048 tokens in 4 heads of 64, measured now: in bf16 a small part of the other
    peak, since a CPU's kernel does not use its matrix unit as well."""
    q = torch.randn(1, 4, 2048, 64, device=device, dtype=dtype)
    flops = 4 * q.size(1) * q.size(3) * q.size(2) ** 2 / 2
    return flops / best_of_seven(lambda: nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True), device)


# bf16 FLOP/s of tensor cores without sparsity, by the makers' data sheets; the first name that the device's contains
DATASHEET = {
    "B200": 2250e12, "GB200": 2500e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12}  # fmt: skip


def datasheet_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a matrix product by the data sheet (fp32: in TF32, half of bf16's), None where it is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for model, peak in DATASHEET.items():
        if re.search(rf"\b{model}\b", name) and "MIG" not in name:  # a MIG slice is a part of a card
            return peak if dtype == torch.bfloat16 else peak / 2
    return None


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a large copy, read and written, measured now: what decoding at batch 1 is bound by."""
    a = torch.zeros(2**26 if device.type == "cpu" else 2**28, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / best_of_seven(lambda: b.copy_(a), device)


def in_turns(calls: dict, rounds: int, device: torch.device, limit: float = math.inf) -> dict:
    """Seconds of every call in every round; one round of warm-up is not counted. After `limit` seconds no further round
    begins once there are three, after three times as many once there is one."""
    seconds: dict[object, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > 1 and time.perf_counter() - began > (limit if turn > 3 else 3 * limit):
            break
        for name, call in calls.items():
            taken = seconds_of(call, device)
            if turn:
                seconds[name].append(taken)
    return seconds


def ratio(times: list[float], others: list[float]) -> float:
    """Median of the ratios of each round, whose both times a slow phase of the machine is in."""
    return median(a / b for a, b in zip(times, others, strict=True))


def spread(times: list[float]) -> float:
    """Interquartile range over median."""
    low, middle, high = quantiles(times * 2 if len(times) == 1 else times, method="inclusive")
    return (high - low) / middle


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return 1024 * int(meminfo.read_text().partition("MemAvailable:")[2].split()[0])
    return total_memory(device)


def total_memory(device: torch.device) -> int:
    """Bytes of all of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_of(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Megabytes before `call`, at most during it, and the difference, by the device's own counter; UserError on a CPU
    without Linux's."""
    status = Path("/proc/self/status")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        if not Path("/proc/self/clear_refs").exists():
            raise UserError("memory on a CPU is read from Linux's /proc, which is not here: leave that table out")
        ctypes.CDLL(None).malloc_trim(0)  # else the call finds room that was freed before
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = int(re.search(r"VmRSS:\s*(\d+)", status.read_text())[1]) * 1024
    call()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    return {"base_mb": before / 1e6, "peak_mb": peak / 1e6, "step_mb": (peak - before) / 1e6}


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has had on the device so far; on a CPU its resident set, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_of(make: Callable, *case) -> dict[str, float]:
    """`memory_of` a step of what is made, which has a `step` and a `batch`; an earlier one sets up what torch needs."""
    it = make(*case)
    it.step()
    return memory_of(it.step, it.batch.device)


def in_child(call: Callable, *args):
    """`call(*args)` in a process of its own, whose peak is nobody else's; None where the system killed it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(call, *args).result()
        except BrokenProcessPool:
            return None


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_hash() -> str:
    """The commit of this code, "unknown" outside of a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def describe(device: torch.device) -> dict[str, str | int | None]:
    """What a measurement must name."""
    cpu = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        cpu = cpuinfo.read_text().partition("model name")[2].partition("\n")[0].strip("\t :") or cpu
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"device": str(device), "gpu": gpu, "cpu": cpu, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
            "git": git_hash(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}  # fmt: skip
