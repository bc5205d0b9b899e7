"""What HYDRA costs. `python bench.py`: every table, cut to about three minutes on two CPU cores, eager;
`python bench.py TABLE [config/x.toml] [--key=value ...]`: one in full. Shape: config/small.toml, random weights.

- speed: forward and forward+backward of each attention, of a block with it, of the macro-block and of the transformer.
- memory: bytes of a step of attentions and of a training step. - compression: CCQA at 2x, 4x and 8x.
- flops: attention and layer (with its MLP) as a part of MHA's. - train: a step of config/tiny.toml, the same with
  doc_mask (documents), and one of the shape.
- length: time against T for each letter; --peers: CCQA against transformers' ZayaAttention.
- decode: steps behind T tokens; mha_x and uncached_x: how many times slower MHA and forwards without states are.
- routing: a training step, a prefill and decoding with MoD, MoR and both (or as the shape has it) against the dense
  shape of as many layers. Routers select just their training capacity, evenly; a prefill on CUDA computes all tokens.

What is compared runs in turns; the median counts, spread is the interquartile range over it, `x_...` the median of the
round-by-round ratios (of forward+backward), x_first to the first of the comparison; a backward is what forward+backward
takes more than forward. Compilation and warm-up are not in the times. bf16 is autocast over fp32 weights, in prefill
and decode bf16 weights. of_peak is the part of a large matrix product's rate, of_sheet of the data sheet's. On CUDA the
clock is the device's, and attentions and blocks find their input out of its L2 cache: each call has another copy of it.
A table that fails is a line, and exit code 1. Left out: fits (scaling.py), charts (plot.py).
"""

import gc
import importlib.util
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import product
from operator import sub
from pathlib import Path
from statistics import fmean, median

import torch

import machine
from accounting import attention_flops, count_params, matrix_flops, skeleton, state_bytes, step_bound, step_bytes
from attention import KINDS, letters_help
from configurator import AnyPath, UserError, build, cli, command, need, need_file, parse, to_toml
from contestants import CYCLE, GENERATING, Contestant, step_flops, subject
from files import write_text
from machine import DTYPES, copy_bandwidth, free_memory, in_child, in_turns, matmul_peak, peak_of, ratio, spread
from model import MOST_POSITIONS, HydraConfig
from train import TrainConfig

CONFIGS = Path(__file__).parent / "config"
BASELINE = next(iter(KINDS))  # the letter that the others are compared with
SHAPES = ((1, 256), (4, 512), (8, 1024))  # (B, T) of speed and memory
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
LONGEST = 16384, "bfloat16"  # length: on CUDA this one too, where arXiv:2510.04476 has CCQA against MHA
MACRO_LENGTHS = (1024, 4096)
ROUTED_T = 1024  # routing: tokens of a text, in the short run a quarter
SHORT_SECONDS = 25  # in which a table of the short run may begin, and likely end, comparisons
MODES = ("eager", "compiled")
ONLY_JSON = {"curve", "recursing", "recursing_low", "recursing_high"}
UNASKED = "--only does not ask for it"
# What ends a table but not the others, mistakes in its code too: the rows of hours are worth more than a traceback.
FAILURES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError,
            RuntimeError, TypeError, ValueError)  # fmt: skip


@dataclass(frozen=True)
class BenchConfig:
    """What to measure; raises UserError, in one line, for values that cannot be."""

    rounds: int = 12  # timed turns of every contestant, after one that is not counted; slow ones take fewer
    only: str = ""  # just the comparisons that have all these words, such as "attention 1024 float32 eager"
    peers: bool = False  # length: compare with transformers too
    prompt_tokens: int = 512  # decode: length of the prompts
    new_tokens: int = 128  # decode: tokens generated behind them
    context: int = 4096  # decode: length of the past in the comparison of hybrid and MHA
    json: AnyPath = ""  # also write everything to this file
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    seed: int = 1337  # of the weights and inputs

    def __post_init__(self):
        need(self, "seed", 0 <= self.seed < 2**63, "choose one from 0 to 2**63 - 1")
        need_file(self, "json")
        for name in ("rounds", "prompt_tokens", "new_tokens", "context"):
            need(self, name, getattr(self, name) >= 1, "it must be at least 1")
        for name in ("prompt_tokens", "new_tokens", "context"):
            remedy = f"positions beyond {MOST_POSITIONS:,} are not exact: lower it"
            need(self, name, getattr(self, name) <= MOST_POSITIONS, remedy)


def show(row: dict, above: list[str]) -> list[str]:
    """Print a row, below a header if it has columns that are not `above`; returns those it is under."""
    columns = [key for key in row if key not in ONLY_JSON]
    if set(columns) <= set(above):
        columns = above
    else:
        print("\n" + " ".join(f"{key:>9}" for key in columns))
    cells = []
    for key in columns:
        value = row.get(key, "-")
        if isinstance(value, float):
            percent = key.startswith("of_") or key == "spread"
            value = f"{value:.1%}" if percent else f"{value:.4g}"
        cells.append(f"{value:>{max(9, len(key))}}")
    print(" ".join(cells), flush=True)
    return columns


@dataclass
class Bench:
    """A run of bench.py or scaling.py: how it measures, and what it has found so far."""

    options: BenchConfig
    config: HydraConfig | None
    device: torch.device
    peaks: dict[str, float]  # FLOP/s of a matrix product, by dtype
    short: bool = False  # every table, cut
    dtypes: tuple[str, ...] = tuple(DTYPES)
    result: dict = field(default_factory=lambda: {"notes": [], "tables": {}})  # what is stored
    table: str = ""  # the present one
    until: float = math.inf  # time.perf_counter() at which the present table's time is over
    failed: bool = False

    def store(self) -> None:
        if self.options.json:
            write_text(Path(self.options.json), json.dumps(self.result, indent=1))

    def say(self, note: str) -> None:
        """Print and store what holds for many rows, once."""
        if note and note not in self.result["notes"]:
            print(note, flush=True)
            self.result["notes"].append(note)
            self.store()

    def take(self, table: str, rows: Iterator[dict]) -> None:
        """Print and store rows as they come. What fails is the last one; a UserError of the only table is raised."""
        print(f"\n== {table}", flush=True)
        self.table = table
        self.until = time.perf_counter() + (SHORT_SECONDS if self.short else math.inf)
        found = self.result["tables"].setdefault(table, [])
        columns: list[str] = []
        while True:
            try:
                row = next(rows, None)
            except FAILURES as error:
                if isinstance(error, UserError) and not self.short:
                    raise
                self.failed = True
                row = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            if row is None:  # also behind a failure, which ends a generator
                break
            found.append(row)
            self.store()
            if "failed" in row:
                print(f"failed: {row['failed']}", flush=True)
            elif "left_out" not in row:
                columns = show(row, columns)
            elif row["left_out"] != UNASKED:
                words = [value for key, value in row.items() if key != "left_out"]
                print(f"left out, {row['left_out']}:", *words, flush=True)
        if not self.short and all(row.get("left_out") == UNASKED for row in found):
            raise UserError(f"only={self.options.only!r}: no row of {table} has all these words")


def begin(options: BenchConfig, config: HydraConfig | None, about: str, short: bool, facts: dict) -> Bench:
    """Look at the machine, and say what it is and what is measured."""
    device = machine.choose_device(options.device)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    peaks = {name: matmul_peak(device, dtype) for name, dtype in DTYPES.items()}
    bench = Bench(options, config, device, peaks, short)
    sheet = {name: machine.datasheet_peak(device, dtype) for name, dtype in DTYPES.items()}
    head = machine.describe(device) | {"seed": options.seed, "short": short, **facts, "peaks": peaks}
    head["datasheet_peaks"] = sheet
    bench.result = head | bench.result
    bench.store()
    rates = ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
    print(f"{head['gpu'] or head['cpu']}, {head['threads']} threads, torch {head['torch']}; {about}; {rates}")
    if peaks["bfloat16"] < machine.EMULATED * peaks["float32"]:
        remedy = "what is measured in it is slow"
        if config and "bfloat16" not in options.only.split():
            bench.dtypes = ("float32",)
            remedy = "its rows are left out; ask for them with --only=bfloat16"
        bench.say(f"bfloat16 is emulated on this {device.type.upper()} ({rates}): {remedy}")
    return bench


def labelled(bench: Bench, what: dict[str, tuple], B: int, T: int, dtype: str, runs: int = 1) -> dict:
    """The columns of a comparison, with the reason in left_out where it is not to be; `runs`: copies of all of it."""
    label = {"level": next(iter(what.values()))[0], "mix": " ".join(what), "B": B, "T": T, "dtype": dtype}
    words = set(bench.options.only.split()) - set(MODES)
    if not words <= set(" ".join(map(str, label.values())).split()):
        return label | {"left_out": UNASKED}
    seconds = 11 * runs * sum(step_flops(*case, B, T) for case in what.values()) / bench.peaks[dtype]
    if time.perf_counter() + seconds > bench.until:  # some four rounds at a third of the peak
        return label | {"left_out": f"no time in the short run ({command('bench.py', bench.table)} has it)"}
    gc.collect()  # models are in cycles with their hooks and closures
    free = free_memory(bench.device)
    kept, needed = 0, 0
    if runs * sum(step_bound(subject(level, config, T), B, T) for level, config in what.values()) < free:
        return label
    for level, config in what.values():
        copies = 3 if level == "train" else 2  # of the weights: with the optimiser's, or packed
        weights, step = step_bytes(subject(level, config, T), B, T, copies)
        step += 2 * weights / copies  # gradients, and what bf16 has of its own
        if level in GENERATING:  # a state, and one layer at a time
            weights += B * state_bytes(config, T, 4, allocated=True)
            step /= config.n_layer
        kept += runs * weights
        needed = max(needed, step)
    if kept + needed > free:
        return label | {"left_out": f"more than the {free / 1e9:.1f} GB of memory that are free"}
    return label


def compare(bench: Bench, what: dict[str, tuple], B: int, T: int, dtype: str, modes=MODES) -> Iterator[dict]:
    """Rows of all in `what`, name -> (level, shape), timed in turns, in every mode; the others relate to the first."""
    named = set(bench.options.only.split()) & set(MODES)
    modes = [mode for mode in modes if mode in named or (not named and (mode == "eager" or not bench.short))]
    label = labelled(bench, what, B, T, dtype, len(modes))
    if "left_out" in label:
        yield label
        return
    torch.manual_seed(bench.options.seed)
    torch._dynamo.reset()
    calls, compile_s = {}, {}
    for name, mode in product(what, modes):
        if mode == "compiled" and what[name][0] in ("peer", "prefill", "uncached"):
            continue
        it = Contestant(*what[name], B, T, bench.device, dtype, mode == "compiled")
        bench.say(it.note)
        if mode == "compiled":
            with importlib.import_module("torch._inductor.utils").fresh_cache():
                compile_s[name] = machine.seconds_of(it.step, bench.device)
        if hasattr(it, "grad"):  # its step is forward+backward
            calls[name, mode, "forward"] = it.forward
        calls[name, mode, "step"] = it.step
    times = in_turns(calls, bench.options.rounds, bench.device, 1.5 if bench.short else 60)
    for key in [key for key in times if what[key[0]][0] == "decode"]:
        times[key] = [seconds / CYCLE for seconds in times[key]]  # of one token
    rates = {"of_peak": max(bench.peaks[dtype], matmul_peak(bench.device, DTYPES[dtype])),
             "of_sheet": machine.datasheet_peak(bench.device, DTYPES[dtype])}  # fmt: skip
    for name, mode, call in times:
        if call == "step":
            row = label | {"level": what[name][0], "mix": name, "mode": mode} | figures(times, name, mode)
            seconds = row["ms"] / 1e3
            flops = step_flops(*what[name], B, T)
            row["tokens_per_s"] = B * (1 if what[name][0] == "decode" else T) / seconds
            row["flops_x_first"] = flops / step_flops(*next(iter(what.values())), B, T)
            row |= {"tflops": flops / seconds / 1e12}
            row |= {of: flops / seconds / rate for of, rate in rates.items() if rate}  # no data sheet: no share
            yield row | ({"compile_s": compile_s[name]} if mode == "compiled" else {})


def figures(times: dict, name: str, mode: str) -> dict:
    """What the times of `compare` say of one contestant; those it is compared with are not there for all."""
    first = next(iter(times))[0]
    step = times[name, mode, "step"]
    row = {"rounds": len(step), "ms": median(step) * 1e3, "spread": spread(step)}
    row["x_first"] = ratio(step, times[first, mode, "step"])
    if mode == "compiled" and (name, "eager", "step") in times:
        row["x_eager"] = ratio(step, times[name, "eager", "step"])
    if ("Zaya", mode, "step") in times:
        row["x_zaya"] = ratio(step, times["Zaya", mode, "step"])
    if (name, mode, "forward") in times:
        ahead = [times[each, mode, "forward"] for each in (name, first)]
        behind = [list(map(sub, times[each, mode, "step"], times[each, mode, "forward"])) for each in (name, first)]
        row |= {"forward_ms": median(ahead[0]) * 1e3, "forward_x_first": ratio(*ahead)}
        row["backward_x_first"] = ratio(*behind)
    return row


def subjects(bench: Bench, level: str) -> dict[str, tuple]:
    """Every letter that the shape allows; of a macro-block and a model the baseline's pattern and the shape's own."""
    names = list(KINDS)
    if level in ("macro", "model"):
        names = [BASELINE * len(bench.config.pattern), bench.config.pattern]
    what = {}
    for name in names:
        try:
            what[name] = level, replace(bench.config, pattern=name)
        except UserError as error:
            if name.startswith(BASELINE):
                raise
            bench.say(f"{name} is left out: {error}")
    return what


def speed_table(bench: Bench) -> Iterator[dict]:
    for (B, T), level, dtype in product(SHAPES, ("attention", "block", "macro", "model"), bench.dtypes):
        yield from compare(bench, subjects(bench, level), B, T, dtype)


def memory_table(bench: Bench) -> Iterator[dict]:
    """Bytes of eager steps; x_first is of what a step adds to weights and optimiser's state."""
    cases = [(4, 256, {"shape": ("train", bench.config)}), *((B, T, subjects(bench, "attention")) for B, T in SHAPES)]
    for (B, T, what), dtype in product(cases, bench.dtypes):
        label = labelled(bench, what, B, T, dtype)
        if "left_out" in label:
            yield label
            continue
        found = {}
        for name, case in what.items():
            row = found[name] = in_child(peak_of, Contestant, *case, B, T, bench.device, dtype)
            first = found[next(iter(what))]
            if row and first:
                row["x_first"] = row["step_mb"] / first["step_mb"]
            yield label | {"mix": name} | (row or {"left_out": "the system killed it: too little memory"})


def size_of(config: HydraConfig) -> dict[str, int]:
    """Parameters and state of one attention, mean over the layers; kv_bytes is what a further token adds, in bf16."""
    config = replace(config, window=0)
    added = state_bytes(config, 2) - state_bytes(config, 1)
    params = fmean(count_params(block.attn) for block in skeleton(config).blocks)
    return {"params": round(params), "kv_bytes": round(added / config.n_layer)}


def compression_table(bench: Bench) -> Iterator[dict]:
    what = {BASELINE: ("attention", replace(bench.config, pattern=BASELINE))}
    what |= {f"C{n}x": ("attention", replace(bench.config, pattern="C", compression=n)) for n in (2, 4, 8)}
    for dtype in bench.dtypes:
        for row in compare(bench, what, 1, 1024, dtype):
            yield row | (size_of(what[row["mix"]][1]) if "ms" in row else {})


def flops_table(bench: Bench) -> Iterator[dict]:
    what = subjects(bench, "attention") | {"hybrid": ("attention", bench.config)}
    blocks = {name: skeleton(replace(config, window=0)).blocks for name, (_, config) in what.items()}
    first = blocks[BASELINE][0]
    mlp = matrix_flops(first.mlp)
    for name, layers in blocks.items():
        row: dict = {"mix": name}
        for T in (512, 1024, 8192):
            base = attention_flops(first.attn, T)
            mean = fmean(attention_flops(layer.attn, T) for layer in layers)
            row |= {f"of_attn_{T}": mean / base, f"of_layer_{T}": (mean + mlp) / (base + mlp)}
        row |= size_of(what[name][1])
        yield row | {"of_kv": row["kv_bytes"] / size_of(what[BASELINE][1])["kv_bytes"]}


def length_table(bench: Bench) -> Iterator[dict]:
    what = subjects(bench, "attention")
    if bench.options.peers:
        what["Zaya"] = "peer", replace(bench.config, pattern="C")
    cases = [*product(LENGTHS, bench.dtypes)]
    if bench.device.type == "cuda":
        cases.append(LONGEST)
    for T, dtype in cases:
        yield from compare(bench, what, 1, T, dtype)
    for T, dtype in product(MACRO_LENGTHS, bench.dtypes):
        yield from compare(bench, subjects(bench, "macro"), 1, T, dtype)


def train_table(bench: Bench) -> Iterator[dict]:
    tiny, run = build(parse([str(CONFIGS / "tiny.toml")], HydraConfig, TrainConfig), HydraConfig, TrainConfig)
    cases = (("tiny", tiny, run.batch_size, tiny.block_size), ("shape", bench.config, 4, 256))
    for (name, config, B, T), dtype in product(cases, reversed(bench.dtypes)):
        what = {name: ("train", config)}
        if name == "tiny":
            what["documents"] = "train", replace(config, doc_mask=True)
        yield from compare(bench, what, B, T, dtype)


def decode_table(bench: Bench) -> Iterator[dict]:
    options, ours, copy = bench.options, bench.config, copy_bandwidth(bench.device)
    middle = options.prompt_tokens + options.new_tokens // 2
    for dtype, B in product(bench.dtypes, (1,) if bench.short else (1, 8)):
        itemsize = DTYPES[dtype].itemsize
        size = itemsize * count_params(ours) + B * state_bytes(ours, middle, itemsize)
        modes = MODES if B == 1 or bench.device.type == "cuda" else MODES[:1]  # a CPU's is for a single text
        ms = {}
        for row in compare(bench, {way: (way, ours) for way in GENERATING}, B, middle, dtype, modes):
            if "ms" in row and row["level"] == "decode":
                rate = size / row["ms"] * 1e3
                row |= {"gb_per_s": rate / 1e9, "of_copy": rate / copy}
            ms[row["mix"], row.get("mode")] = row.get("ms")
            if row["mix"] == "uncached":  # the whole text by forwards of its mean length, or by a prefill and steps
                cached = ms["prefill", "eager"] + (options.new_tokens - 1) * ms["decode", "eager"]
                row["uncached_x"] = options.new_tokens * row["ms"] / cached
            yield row
        what = {"ours": ("decode", ours), "MHA": ("decode", replace(ours, pattern=BASELINE))}
        for row in compare(bench, what, B, options.context, dtype, MODES[:1]):
            yield row | ({"mha_x": row["x_first"]} if row["mix"] == "MHA" else {})


def routing_table(bench: Bench) -> Iterator[dict]:
    dense = config = bench.config
    if config.mod_capacity or config.mor_recursions > 1:
        layers = config.n_layer * config.mor_recursions  # as many as a token that takes all recursions meets
        dense = replace(config, mod_capacity=0.0, mor_recursions=1, n_layer=layers)
        shapes = {"routed": config}
    else:
        shapes = {f"mod{capacity}": replace(config, mod_capacity=capacity) for capacity in (0.125, 0.5)}
        if config.n_layer % 3 == 0 and config.n_layer > 3 and not bench.short:
            shapes["mor3"] = replace(config, n_layer=config.n_layer // 3, mor_recursions=3)
            shapes["mod0.125+mor3"] = replace(shapes["mor3"], mod_capacity=0.125)
    T = ROUTED_T // 4 if bench.short else ROUTED_T
    compiled = "compiled" in bench.options.only.split()
    modes, levels = (MODES, ("train",)) if compiled else (MODES[:1], ("train", "prefill", "decode"))
    for level, dtype in product(levels, reversed(bench.dtypes)):
        what = {name: (level, shape) for name, shape in ({"dense": dense} | shapes).items()}
        yield from compare(bench, what, 1, T, dtype, modes)


TABLES = {"speed": speed_table, "memory": memory_table, "compression": compression_table, "flops": flops_table,
          "length": length_table, "train": train_table, "decode": decode_table, "routing": routing_table}  # fmt: skip


def main(argv: list[str]) -> int:
    files = [word for word in argv if word.endswith(".toml") and not word.startswith("-")]
    words = [word for word in argv if word not in files]
    table = words.pop(0) if words and not words[0].startswith("-") else ""
    if table and table not in TABLES:
        raise UserError(f"unknown table {table!r}: use {', '.join(TABLES)}")
    base = parse([str(CONFIGS / "small.toml"), *files], HydraConfig, TrainConfig)
    given = parse(words, HydraConfig, BenchConfig, doc=f"{__doc__}\n{letters_help()}", base=base)
    for option in fields(TrainConfig):
        base.pop(option.name, None)
    config, options = build(given, HydraConfig, BenchConfig, base=base)
    dense = not config.mod_capacity and config.mor_recursions == 1
    need(config, "mod_capacity mor_recursions", dense or table == "routing", "only table routing measures these")
    can = not options.peers or importlib.util.find_spec("transformers")
    need(options, "peers", can, "it needs transformers, which is not installed: pip install transformers")
    facts = {"config": to_toml(config, options), "command": command("bench.py", *argv)}
    bench = begin(options, config, f"{count_params(config):,} parameters", not table, facts)
    for name in [table] if table else TABLES:
        bench.take(name, TABLES[name](bench))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    cli(main)
