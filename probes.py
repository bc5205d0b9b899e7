"""What attention recalls: `python diagnose.py recall [config/x.toml] [--key=value ...]`, on a CPU.

Fresh texts of two kinds at every step, an evaluation with a seed of its own, controls that must fail.
- mqar, multi-query associative recall (arXiv:2312.04927): keys and their values, then every key once more, where its
  value is asked for. Numbers of pairs are mixed in training and tested apart (as in arXiv:2402.18668).
- induction (arXiv:2209.11895): random tokens, a marker once inside and once at the end, which asks for the token that
  followed it.
- Every letter plain and with what makes it a fair opponent (CCQA has that), mixes of two layers, the 8-layer pattern,
  and any other pattern by --variants.
  Each has the best of the same few learning rates, by one seed (more of them where none reaches 99% and the best is at
  an edge), and then its other seeds. All have one width, so that their parameters differ: the table has them.
- Controls: one layer, a window that is too short, no attention at all: at the same rates, with one seed. A probe that
  one of these passes measures nothing, and the table says so.
The published protocol has two layers, width 64 .. 512, no MLP, texts of 64 .. 512 tokens with 4 .. 64 pairs, 8192 words
and 100,000 texts 64 times over. Here: two layers, width 64, no MLP (a block's is taken out), texts of 32 tokens with
2 .. 8 pairs, 64 words, new texts at every step: some eight minutes of two CPU cores. RoPE turns faster, since texts
are short (rope_theta), and matrices start as large for their width as those of a model 768 wide, the embedding larger:
with the 0.02 of large models this width learns no more than which values there are, in a thousand steps.
Left out: copying, the published sizes (give --vocab_size, --block_size, --pairs and --dim on a larger machine).
"""

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from attention import KINDS
from configurator import HOW_READ, AnyPath, UserError, build, command, need, need_file, parse
from files import remedy, write_text
from layers import IGNORE
from machine import cores, describe, total_memory
from model import Hydra, HydraConfig
from runs import clock
from schedule import learning_rate_at
from train import TrainConfig, make_optimizer, train_step
from trials import forkserver_of, interrupts_later

# Shapes and runs, which files and options change
SHAPE = {"dim": 64, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "compression": 2, "rope_theta": 100.0}
TASKS = {"mqar": {"vocab_size": 64, "block_size": 32}, "induction": {"vocab_size": 16, "block_size": 32}}
# The rate is constant: steps to 99% should not depend on when a run would have ended
RUN = {"batch_size": 32, "max_iters": 1000, "warmup_iters": 50, "learning_rate": 2e-3, "min_lr_ratio": 1.0,
       "out_dir": "out_recall"}
FAIR = {"qk_norm": True, "short_conv": 3}
MIXES = ("MC", "CL")
PATTERN = "MMCCCLML"
READ = {"batch_size", "max_iters", "warmup_iters", "learning_rate", "min_lr_ratio", "weight_decay", "beta1", "beta2",
        "grad_clip", "schedule", "decay_ratio", "seed", "out_dir"}  # of TrainConfig, by recall
UNREAD = {option.name for option in fields(TrainConfig)} - READ | {"pattern"}  # variants have their own
EMBEDDING = 0.4  # standard deviation of the embedding at its start
LARGE = 768  # width of the model whose matrices start as large for their width
GAP_POWER = 0.01  # a of mqar's gaps, p(gap) ~ gap^(a - 1)
TESTED = 256  # texts of an evaluation, for each number of pairs
EVALUATION = 2**63  # a seed that no run can have
FURTHEST = 6  # learning rates of a variant at most, with those that an edge has added
SOLVED, ENOUGH = 0.99, 0.995  # accuracy: steps are counted to the one, a run ends at the other
PUBLISHED = "published (arXiv:2312.04927): width 64 .. 512, texts of 64 .. 512 tokens, 4 .. 64 pairs, 8192 words"
FAILED = 0.5  # a control is above this: the probe measures nothing


@dataclass(frozen=True)
class RecallConfig:
    """A measurement of recall; raises UserError, in one line, for values that cannot be."""

    tasks: str = "mqar,induction"  # which texts: mqar, induction, or both with a comma between
    variants: str = ""  # names, or other patterns of letters, with commas between, empty: all that have a name
    pairs: str = "2,4,8"  # mqar: numbers of pairs in a text, with commas between
    noise: bool = False  # mqar: slots without a key have random tokens, not token 0
    rates: int = 3  # learning rates that are tried, a factor of 2 apart, learning_rate in their middle
    seeds: int = 3  # runs of each variant at its best rate, with the seeds `seed`, `seed` + 1, ..
    check_every: int = 50  # steps between two looks at the accuracy
    jobs: int = 2  # runs at a time, at most one for each core
    json: AnyPath = ""  # file of the result, empty: recall.json in out_dir

    def __post_init__(self):
        for name in ("rates", "seeds", "check_every", "jobs"):
            need(self, name, getattr(self, name) >= 1, "it must be at least 1")
        need(self, "tasks", set(self.tasks.split(",")) <= set(TASKS), f"use {', '.join(TASKS)}, with a comma between")
        numbers = [part.isascii() and part.isdigit() and 0 < int(part) < 2**31 for part in self.pairs.split(",")]
        need(self, "pairs", all(numbers), "give whole numbers above 0 with commas between, such as 2,4,8")
        need_file(self, "json")

    @property
    def numbers(self) -> list[int]:
        return sorted({int(part) for part in self.pairs.split(",")})

    def check(self, task: str, config: HydraConfig) -> None:
        """UserError where texts of this shape cannot be, or have too many words for the memory."""
        most = self.numbers[-1]
        asked, what = f"pairs={self.pairs!r}, ", f"{most} pairs need"
        least = {"block_size": 4 * most, "vocab_size": 2 * most + 2}
        if task == "induction":
            asked, what, least = "", "induction needs", {"block_size": 4, "vocab_size": 4}
        for name, number in least.items():
            value = getattr(config, name)
            if value < number:
                raise UserError(f"{asked}{name}={value}: {what} {name} to be {number} or more: change one")
        scores = 4 * TESTED * config.block_size * config.vocab_size  # bytes of the logits of an evaluation
        room = total_memory(torch.device("cpu"))
        if scores > room:
            raise UserError(f"vocab_size={config.vocab_size}, block_size={config.block_size}: an evaluation needs "
                            f"{scores / 1e9:,.1f} GB, of which there are {room / 1e9:,.1f}: lower one")  # fmt: skip


# ---- texts

Texts = tuple[Tensor, Tensor]  # tokens and, where something is asked, the answer, else IGNORE: int64 [B, T] both


def mqar_texts(rows: int, pairs: int, vocab: int, tokens: int, noise: bool, draw: torch.Generator) -> Texts:
    """Keys from 1 .. vocab/2-1 and values from vocab/2 .. vocab-1, without replacement, as k1 v1 k2 v2 ..; then every
    key once more at 2*pairs + 2*gap, gaps without replacement, the near ones by far the likeliest."""
    half = vocab // 2
    keys = 1 + torch.rand(rows, half - 1, generator=draw).topk(pairs).indices
    values = half + torch.rand(rows, vocab - half, generator=draw).topk(pairs).indices
    slots = (tokens - 2 * pairs) // 2
    likely = (GAP_POWER - 1) * torch.arange(1, slots + 1).log()
    gumbel = -torch.empty(rows, slots).exponential_(generator=draw).log()
    places = 2 * pairs + 2 * (likely + gumbel).topk(pairs).indices  # the largest are drawn without replacement
    text = torch.zeros(rows, tokens, dtype=torch.int64)
    if noise:
        text = torch.randint(vocab, (rows, tokens), generator=draw)
    text[:, 0 : 2 * pairs : 2] = keys
    text[:, 1 : 2 * pairs : 2] = values
    text.scatter_(1, places, keys)
    return text, torch.full_like(text, IGNORE).scatter_(1, places, values)


def induction_texts(rows: int, vocab: int, tokens: int, draw: torch.Generator) -> Texts:
    """Random tokens; the marker, vocab - 1, stands once inside and once at the end, where the token that followed it is
    asked for."""
    marker = vocab - 1
    text = torch.randint(marker, (rows, tokens), generator=draw)
    place = torch.randint(tokens - 2, (rows, 1), generator=draw)
    text.scatter_(1, place, marker)
    text[:, -1] = marker
    answers = torch.full_like(text, IGNORE)
    answers[:, -1:] = text.gather(1, place + 1)
    return text, answers


def texts(task: str, config: HydraConfig, noise: bool, rows: int, pairs: int, seed: int, step: int) -> Texts:
    """Those of a step: no two steps or seeds have the same."""
    mixed = np.random.SeedSequence([seed, step, pairs]).generate_state(1, np.uint64)
    draw = torch.Generator().manual_seed(int(mixed[0]))
    if task == "induction":
        return induction_texts(rows, config.vocab_size, config.block_size, draw)
    return mqar_texts(rows, pairs, config.vocab_size, config.block_size, noise, draw)


# ---- models and runs

class Variant(NamedTuple):
    """A model that is probed."""

    name: str
    changes: dict  # of HydraConfig
    control: bool = False  # it must fail
    blind: bool = False  # nothing of what attention finds reaches the residual line


def variant_of(pattern: str) -> Variant:
    """A model of just these layers."""
    return Variant(pattern, {"pattern": pattern, "n_layer": len(pattern)})


def variants_of(task: str) -> list[Variant]:
    window = {"mqar": 4, "induction": 8}[task]
    found = []
    for letter in KINDS:
        found.append(Variant(letter, {"pattern": letter}))
        if letter != "C":  # which has its own
            found.append(Variant(f"{letter} fair", {"pattern": letter, **FAIR}))
    found += [variant_of(mix) for mix in MIXES if task == "mqar"]
    found.append(variant_of(PATTERN))
    found.append(Variant("one layer", {"pattern": "A", "n_layer": 1}, control=True))
    found.append(Variant(f"window {window}", {"pattern": "M", "window": window}, control=True))
    return [*found, Variant("no attention", {"pattern": "A", "alpha": "fixed"}, control=True, blind=True)]


class NoMLP(nn.Module):
    """In the place of a block's MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@torch.no_grad()
def probe_model(config: HydraConfig, blind: bool, seed: int) -> Hydra:
    """A model without MLPs, whose matrices start as large for their width as those of a larger one."""
    torch.manual_seed(seed)
    model = Hydra(config)
    for block in model.blocks:
        block.mlp = NoMLP()
        if blind:
            block.alpha = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(math.sqrt(LARGE / config.dim))
    nn.init.normal_(model.embed.weight, std=EMBEDDING)
    return model


@torch.no_grad()
def accuracy(model: Hydra, batch: Texts) -> float:
    """Part of the answers that are the likeliest token."""
    idx, answers = batch
    model.eval()
    logits = model.head(model.trunk(idx, model.context(torch.arange(idx.size(1))))[0])
    model.train()
    asked = answers != IGNORE
    return (logits.argmax(-1)[asked] == answers[asked]).float().mean().item()


def is_poor(model: Hydra, batch: Texts) -> bool:
    """Its accuracy is below 99%, which a quarter of the texts can show: when more answers of those are wrong than may
    be of all."""
    idx, answers = batch
    few = math.ceil(len(idx) / 4)
    wrong = (1 - accuracy(model, (idx[:few], answers[:few]))) * few / len(idx)
    return wrong > 1 - SOLVED or accuracy(model, batch) < SOLVED


class Probe(NamedTuple):
    """A run of recall."""

    task: str
    variant: Variant
    config: HydraConfig
    run: TrainConfig  # its rate and seed among them
    options: RecallConfig

    @property
    def name(self) -> str:
        return f"{self.task} | {self.variant.name}"

    @property
    def key(self) -> str:
        return f"{self.name} | rate {self.run.learning_rate:g} | seed {self.run.seed}"

    def at(self, rate: float, seed: int) -> "Probe":
        return self._replace(run=replace(self.run, learning_rate=rate, seed=seed))

    @property
    def numbers(self) -> list[int]:
        """Of pairs, which are mixed in a batch and tested apart."""
        return self.options.numbers if self.task == "mqar" else [1]

    def texts(self, rows: int, pairs: int, seed: int, step: int) -> Texts:
        return texts(self.task, self.config, self.options.noise, rows, pairs, seed, step)

    def batch(self, step: int) -> Texts:
        """As equally many texts of each number of pairs as batch_size allows."""
        rows = [part.size for part in np.array_split(np.arange(self.run.batch_size), len(self.numbers))]
        parts = [self.texts(n, pairs, self.run.seed, step) for n, pairs in zip(rows, self.numbers, strict=True)]
        idx, answers = zip(*parts, strict=True)
        return torch.cat(idx), torch.cat(answers)


def steps_of(probe: Probe) -> Iterator[Hydra]:
    """Its model after every step of a run."""
    run = probe.run
    model = probe_model(probe.config, probe.variant.blind, run.seed)
    optimizer = make_optimizer(model, run)
    autocast = torch.autocast("cpu", enabled=False)
    for step in range(1, run.max_iters + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step - 1, run, run.max_iters)
        train_step(model, optimizer, [probe.batch(step)], run.grad_clip, autocast)
        yield model


def seconds_of_run(probe: Probe) -> float:
    """At most, as a step takes that is not the first."""
    steps = steps_of(probe._replace(run=replace(probe.run, max_iters=5)))
    next(steps)
    began = time.perf_counter()
    for _ in steps:
        pass
    return (time.perf_counter() - began) / 4 * probe.run.max_iters


def train_probe(probe: Probe, until: int = 0) -> dict:
    """A run; one that has not reached 99% by the step `until`, if there is one, has lost."""
    run = probe.run
    tests = {pairs: probe.texts(TESTED, pairs, EVALUATION, 0) for pairs in probe.numbers}
    solved = None
    began = time.perf_counter()
    for step, model in enumerate(steps_of(probe), 1):
        last = step in (until, run.max_iters)
        if not last and (step % probe.options.check_every or is_poor(model, tests[probe.numbers[-1]])):
            continue  # the most pairs are enough to know
        found = {str(pairs): accuracy(model, test) for pairs, test in tests.items()}
        worst = min(found.values())
        if solved is None and worst >= SOLVED:
            solved = step
        if worst >= ENOUGH or last and not solved:
            break
    return {"task": probe.task, "variant": probe.variant.name, "rate": run.learning_rate, "seed": run.seed,
            "accuracy": found, "steps_to_99": solved, "steps": step,
            "seconds": time.perf_counter() - began}  # fmt: skip


# ---- many runs: each in a process of its own, what they found in one file

class Results:
    """The file of a subject: what is measured (`settings`), with what, and the runs that have ended, by their keys.
    Where it goes on, it keeps saying when and with what it began. UserError where the file that is there is of other
    settings."""

    def __init__(self, path: Path, subject: str, settings: dict, head: dict):
        self.path = path
        self.content: dict = {"subject": subject, "settings": settings, **head, "runs": {}}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                return
            earlier = json.loads(path.read_text(encoding="utf-8"))
            self.content["runs"] = dict(earlier["runs"])
            self.content |= {name: earlier[name] for name in head if name in earlier}
        except OSError as error:
            raise UserError(f"json={str(path)!r}: {error.strerror}: {remedy(error)}") from error
        except (ValueError, TypeError, KeyError):
            raise UserError(f"json={str(path)!r}: this file is no result of {subject}: name another") from None
        before = earlier.get("settings")
        if before != json.loads(json.dumps(settings)):
            before = before if isinstance(before, dict) else {}
            other = [name for name, value in settings.items() if before.get(name) != json.loads(json.dumps(value))]
            raise UserError(f"json={str(path)!r} has results with other values of {', '.join(other) or 'options'}: "
                            "name another file with --json, or delete it")  # fmt: skip

    def add(self, key: str, found: dict) -> None:
        self.content["runs"][key] = found
        self.write()

    def write(self) -> None:
        write_text(self.path, json.dumps(self.content, indent=1, allow_nan=False))


def described(*words: str) -> dict:
    """What a result of `diagnose.py words` must name."""
    return describe(torch.device("cpu")) | {"command": command("diagnose.py", *words)}


class Order(NamedTuple):
    """A run that is wanted."""

    key: str
    make: Callable[[], dict]
    seconds: float  # at most, about


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def begin_process() -> None:
    """A process that makes runs: one thread, and a Ctrl-C of the terminal is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def made(orders: list[Order], jobs: int) -> Iterator[tuple[Order, dict]]:
    """What the runs have found, in the order in which they end, `jobs` at a time; a single one in this process."""
    if jobs == 1:
        for order in orders:
            yield order, order.make()
        return
    context = forkserver_of(["torch._dynamo", "probes"])  # which the optimizer imports; seconds for each process
    with ProcessPoolExecutor(jobs, context, begin_process) as pool:
        try:
            with interrupts_later():  # else those that begin meanwhile miss what the pool has for them
                asked = {pool.submit(order.make): order for order in orders}
            for run in as_completed(asked):
                yield asked[run], run.result()
        except BrokenProcessPool:
            problem = f"{asked[run].key}: its process was killed or failed: the same command goes on"
            raise UserError(problem) from None
        finally:
            for process in multiprocessing.active_children():  # else the pool would wait for what they are in
                process.kill()


class Runner:
    """Makes the runs, and says how far they have come with what is expected of them."""

    def __init__(self, results: Results, jobs: int, expected: int, ahead: float):
        self.results, self.jobs = results, jobs
        self.expected, self.ended = expected, 0  # runs
        self.ahead = ahead  # seconds of those that are missing, at most
        self.done = self.taken = 0.0  # of those that were made: expected and true seconds

    def expect(self, seconds: float) -> None:
        """One run more."""
        self.expected += 1
        self.ahead += seconds

    def make(self, orders: list[Order], text: Callable[[dict], str]) -> list[dict]:
        """What all of these have found, made where they have not ended."""
        runs = self.results.content["runs"]
        missing = [order for order in orders if order.key not in runs]
        self.ended += len(orders) - len(missing)
        for order, found in made(missing, self.jobs):
            self.results.add(order.key, found)
            self.ended += 1
            self.ahead -= order.seconds
            self.done += order.seconds
            self.taken += found["seconds"]
            pace = self.taken / self.done if self.done else 0.0  # not known of what seemed to be no more
            left = clock(max(0.0, self.ahead) * pace / self.jobs)
            print(f"{self.ended:3d} of {self.expected} | {order.key} | {text(found)} | {found['seconds']:.0f} s | "
                  f"ETA {left}", flush=True)  # fmt: skip
        return [runs[order.key] for order in orders]


# ---- recall

def split_options(argv: list[str], kind: type, base: dict, unread: set[str], subject: str,
                  doc: str) -> tuple[dict, dict]:  # fmt: skip
    """What files and options give of models and runs, and of the subject's own options, a `kind`; `base` and `unread`
    as `configurator.parse` has them."""
    usage = f"usage: python diagnose.py {subject} [config/x.toml ...] [--key=value ...]\n{HOW_READ}"
    doc = f"{usage}\n\n{doc.strip()}"
    given = parse(argv, HydraConfig, TrainConfig, kind, doc=doc, base=base, unread=unread)
    own = {field.name: given.pop(field.name) for field in fields(kind) if field.name in given}
    return given, own


def chosen_probes(given: dict, options: RecallConfig) -> list[Probe]:
    """The variants that were asked for, at learning_rate and with the first seed."""
    names = {field.name for field in fields(HydraConfig)}
    shape = {name: value for name, value in given.items() if name in names}
    (run,) = build({name: value for name, value in given.items() if name not in names}, TrainConfig, base=RUN)
    need(run, "max_iters", run.max_iters >= 1, "nothing would be trained: ask for more")
    asked = dict.fromkeys(filter(None, options.variants.split(",")))
    found = []
    for task in options.tasks.split(","):
        named = {variant.name: variant for variant in variants_of(task)}
        others = [variant_of(word) for word in asked if word not in named and set(word) <= KINDS.keys()]
        for variant in [*named.values(), *others]:
            if not asked or variant.name in asked:
                (config,) = build(SHAPE | TASKS[task] | shape | variant.changes, HydraConfig)
                options.check(task, config)
                found.append(Probe(task, variant, config, run, options))
    unknown = asked.keys() - {probe.variant.name for probe in found}
    if unknown:
        known = dict.fromkeys(variant.name for task in options.tasks.split(",") for variant in variants_of(task))
        raise UserError(f"variants: {min(unknown)!r} is none of {options.tasks}: use {', '.join(known)}, or a pattern "
                        f"of the letters {''.join(KINDS)}")  # fmt: skip
    return found


def further(probes: list[Probe], found: dict[str, dict]) -> float | None:
    """Another rate to try of a variant that reaches 99% at none of these, where the best one is at their edge."""
    rates = sorted(probe.run.learning_rate for probe in probes)
    best = best_of(probes, found).run.learning_rate
    solved = any(found[probe.key]["steps_to_99"] for probe in probes)
    if solved or probes[0].variant.control or not 1 < len(rates) < FURTHEST or rates[0] < best < rates[-1]:
        return None
    return best / 2 if best == rates[0] else 2 * best


def best_of(probes: list[Probe], found: dict[str, dict]) -> Probe:
    """The one with the fewest steps to 99%, or, where none gets there, with the highest accuracy."""
    def merit(probe: Probe) -> tuple:
        steps = found[probe.key]["steps_to_99"]
        return steps is not None, -(steps or 0), fmean(found[probe.key]["accuracy"].values())

    return max(probes, key=merit)


def row_of(probe: Probe, found: list[dict]) -> dict:
    """What the seeds' runs of a variant say."""
    accuracies = {pairs: [run["accuracy"][pairs] for run in found] for pairs in found[0]["accuracy"]}
    model = probe_model(probe.config, probe.variant.blind, 0)
    solved = [run["steps_to_99"] for run in found]
    hardest = str(probe.numbers[-1])  # of two values one can be guessed
    if probe.variant.control:
        verdict = "fails, as it must"
        if any(run["accuracy"][hardest] > FAILED for run in found):
            verdict = "PASSES: this probe measures nothing"
    else:
        verdict = f"{sum(steps is not None for steps in solved)} of {len(solved)} seeds reach 99%"
    return {"task": probe.task, "variant": probe.variant.name, "control": probe.variant.control,
            "parameters": sum(p.numel() for p in model.parameters()), "rate": probe.run.learning_rate,
            "accuracy": {pairs: fmean(seeds) for pairs, seeds in accuracies.items()},
            "lowest": {pairs: min(seeds) for pairs, seeds in accuracies.items()}, "steps_to_99": solved,
            "verdict": verdict}  # fmt: skip


def recall_table(rows: list[dict]) -> Iterator[str]:
    """Its lines: mean accuracy of the seeds in percent, the lowest in brackets."""
    yield f"{'variant':>13} {'parameters':>10} {'rate':>7}  " + " ".join(
        f"{f'{pairs} pairs' if len(rows[0]['accuracy']) > 1 else 'accuracy':>12}" for pairs in rows[0]["accuracy"]
    ) + "  steps to 99%"
    for row in rows:
        cells = [f"{100 * mean:.1f} ({100 * row['lowest'][pairs]:.1f})" for pairs, mean in row["accuracy"].items()]
        steps = " ".join("-" if steps is None else str(steps) for steps in row["steps_to_99"])
        yield (f"{row['variant']:>13} {row['parameters']:>10,} {row['rate']:>7g}  "
               + " ".join(f"{cell:>12}" for cell in cells) + f"  {steps}; {row['verdict']}")  # fmt: skip


def measure_recall(probes: list[Probe], options: RecallConfig, results: Results) -> list[dict]:
    """All runs that are missing, then a row for every variant."""
    first = probes[0].run
    middle = (options.rates - 1) // 2
    rates = [float(f"{first.learning_rate * 2.0 ** (i - middle):.3g}") for i in range(options.rates)]
    seeds = {it.name: [first.seed + i for i in range(1 if it.variant.control else options.seeds)] for it in probes}
    wanted = {name: options.rates + len(own) - 1 for name, own in seeds.items()}
    jobs = min(options.jobs, cores())
    seconds, ahead = {}, 0.0
    for probe in probes:
        missing = wanted[probe.name] - sum(key.startswith(f"{probe.name} |") for key in results.content["runs"])
        seconds[probe.name] = seconds_of_run(probe) if missing > 0 else 0.0
        ahead += max(0, missing) * seconds[probe.name]
    runner = Runner(results, jobs, sum(wanted.values()), ahead)
    print(f"{runner.expected} runs of up to {first.max_iters} steps, {jobs} at a time: {ahead / jobs / 60:.1f} min "
          f"at most, as a step takes here; a run ends at {100 * ENOUGH:g}%", flush=True)  # fmt: skip

    def make(wanted: list[Probe], until: dict[str, int]) -> dict[str, dict]:
        orders = [Order(it.key, partial(train_probe, it, until.get(it.name, 0)), seconds[it.name]) for it in wanted]
        return dict(zip((it.key for it in wanted), runner.make(orders, said), strict=True))

    tried = {it.name: [it.at(rate, first.seed) for rate in rates] for it in probes}
    found = make([several[middle] for several in tried.values()], {})
    # any other rate has to be as fast
    until = {name: found[several[middle].key]["steps_to_99"] or 0 for name, several in tried.items()}
    found |= make([it for several in tried.values() for it in several if it != several[middle]], until)
    while edges := [(several, rate) for several in tried.values() if (rate := further(several, found))]:
        for several, rate in edges:
            several.append(several[0].at(rate, first.seed))
            runner.expect(seconds[several[0].name])
        found |= make([several[-1] for several, _ in edges], {})
    best = {name: best_of(several, found).run.learning_rate for name, several in tried.items()}
    final = [[it.at(best[it.name], seed) for seed in seeds[it.name]] for it in probes]
    runner.ended -= len(final)  # their first seeds have been counted
    found |= make([it for several in final for it in several], {})
    return [row_of(several[0], [found[it.key] for it in several]) for several in final]


def said(found: dict) -> str:
    """A run's accuracy, in a line."""
    text = ", ".join(f"{100 * value:.1f}%" for value in found["accuracy"].values())
    return f"{text} after {found['steps']} steps"


def main(argv: list[str]) -> int:
    """`diagnose.py recall` -> its exit code."""
    given, own = split_options(argv, RecallConfig, SHAPE | TASKS["mqar"] | RUN, UNREAD, "recall", __doc__)
    (options,) = build(own, RecallConfig)
    probes = chosen_probes(given, options)
    run = probes[0].run
    torch.set_num_threads(1)  # as the runs have it
    path = Path(options.json or Path(run.out_dir, "recall.json"))
    settings = SHAPE | TASKS | given | {name: getattr(run, name) for name in sorted(READ)}
    settings |= {name: getattr(options, name) for name in ("pairs", "noise", "check_every")} | {"tested": TESTED}
    del settings["out_dir"]
    head = described("recall", *argv)
    results = Results(path, "recall", settings, head)
    try:
        rows = measure_recall(probes, options, results)
    except KeyboardInterrupt:
        print(f"stopped: {len(results.content['runs'])} runs are in {path}; to go on: {head['command']}")
        return 130
    notes = [f"{row['task']}, {row['variant']}: {row['verdict']}" for row in rows
             if row["control"] and row["verdict"].startswith("PASSES")]  # fmt: skip
    results.content |= {"rows": rows, "notes": notes}
    results.write()
    for task in dict.fromkeys(row["task"] for row in rows):
        config = next(probe.config for probe in probes if probe.task == task)
        print(f"\n{task}: texts of {config.block_size} tokens, {config.vocab_size} words, width {config.dim}, no MLP; "
              "mean of the seeds in percent, the lowest in brackets")  # fmt: skip
        print("\n".join(recall_table([row for row in rows if row["task"] == task])))
    print("\n".join([*notes, PUBLISHED]))
    print(json.dumps({"json": str(path), "rows": rows, "notes": notes}, allow_nan=False))
    return 0
