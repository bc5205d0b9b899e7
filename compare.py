"""Which configuration learns best, and is it resolved? `python compare.py config/a.toml config/b.toml [--key=value ..]`

Each file is a contestant, options hold for all of them; the first one is what the others are compared with.
- Each gets its own learning rate: rates a factor sqrt(2) apart around its file's, with one seed, at least `rates` of
  them and more while the lowest loss is at an edge, up to 8 times its file's and down to an eighth; then the minimum of
  a parabola through the losses over log rate.
- Then the seeds at that rate: mean, standard deviation, and of the differences from the first contestant, paired by
  seed (which has the same batches), the 95% t-interval and p. Where the interval holds 0 it is "not resolved".
- `equal`: the first contestant's tokens, training FLOPs or seconds. Its run ends by max_iters, max_tokens or max_flops;
  seconds are max_seconds, else what it took for its tokens, and those runs are made one at a time. Rates are looked for
  at equal tokens alone. A warmup that is no option stays the part of a run that it is in the file; at equal seconds by
  the pace of the search, if there is one. How often is evaluated, and on how much, is no matter of the files.
- The runs are train.py's, in OUT_DIR/CONTESTANT/.. (trials.py): a comparison that was stopped goes on where it was. A
  file that is named twice is two contestants.
The last line is one JSON object; OUT_DIR/compare.json has the learning curves too, for plot.py, and
`python compare.py STORED .. [--against=CONTESTANT]` prints the tables of such files, or folders, in Markdown.
Left out: corrections for many comparisons, contestants on different texts.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

import numpy as np
import torch

from accounting import count_params, flops_per_token, state_bytes
from attention import letters_help
from configurator import AnyPath, UserError, at_home, build, cli, command, need, need_file, parse, to_toml
from data import Corpus, eval_batches, token_bytes, tokenizer_hash
from files import write_text
from layers import IGNORE
from machine import choose_compile, choose_device, choose_dtype, cores, describe
from model import HydraConfig
from parallel import launched
from runs import aligned
from schedule import STOPS, end_of, planned_steps, step_work
from student import t_p, t_quantile
from train import TrainConfig, read_corpus
from trials import UNITS, Outcome, Team, Text, Trial, open_log

BASES = ("tokens", "flops", "seconds")
REACH = 6  # rates are tried up to sqrt(2)**REACH times the file's, and down to that part of it
POINTS = 5  # evaluations of a learning curve
# Validation tokens of a point of a curve, of a rate that is tried, of a seed: at most so many, and at most this part of
# the tokens of the first contestant's run, since evaluations should not cost what the training does.
VALIDATION = {"curve": (2**13, 1 / 50), "rate": (2**14, 1 / 8), "seed": (2**16, 1 / 2)}
FEW = 5  # tokens a parameter, below which a run rewards what learns fastest at first
OWN = {"out_dir": "out_compare"}  # defaults
UNREAD = ("resume", "plan", "profile", "init_from")
SAME = dict.fromkeys(("data", "val_data", "val_fraction", "text_field"), "losses compare on one text only")
SAME |= dict.fromkeys(("device", "dtype", "compile"), "all runs are made alike")
SAME_BATCHES = ("batch_size", "gradient_accumulation_steps", "sampling", "tokenizer", "seed")


@dataclass(frozen=True)
class CompareConfig:
    """A comparison; raises UserError, in one line, for values that cannot be."""

    seeds: int = 5  # runs of each contestant at its rate, with the seeds `seed`, `seed` + 1, ..
    equal: str = "tokens"  # what all have the same of: tokens, flops, seconds; several with commas between
    rates: int = 5  # learning rates that are tried for each contestant, 0 = its file's and no other
    jobs: int = 2  # runs at a time, at most one for each core
    keep: bool = False  # keep the checkpoints of runs that have ended
    json: AnyPath = ""  # file of the whole result, empty: compare.json in out_dir

    def __post_init__(self):
        need(self, "seeds", self.seeds >= 1, "it must be at least 1")
        need(self, "jobs", self.jobs >= 1, "it must be at least 1")
        need(self, "rates", self.rates == 0 or 3 <= self.rates <= 2 * REACH + 1, f"use 0, or 3 to {2 * REACH + 1}")
        need(self, "equal", set(self.bases) <= set(BASES), f"use {', '.join(BASES)}, with commas between")
        need_file(self, "json")

    @property
    def bases(self) -> list[str]:
        return list(dict.fromkeys(self.equal.split(",")))


# ---- what is resolved

def differences_of(ours: list[float | None], theirs: list[float | None]) -> list[float]:
    """Of losses, seed by seed, where neither run diverged (None)."""
    return [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]


def paired(differences: list[float]) -> dict:
    """The mean of paired differences of losses, its 95% t-interval, p, and what they say."""
    found = {"difference": None, "low": None, "high": None, "p": None, "verdict": "not resolved"}
    if differences:
        found["difference"] = fmean(differences)
    if len(differences) < 2:
        return found
    mean, df = fmean(differences), len(differences) - 1
    error = stdev(differences) / math.sqrt(len(differences))
    half = t_quantile(df) * error
    p = 0.0 if mean else 1.0
    if error > 0:
        p = t_p(mean / error, df)
    if mean + half < 0:
        found["verdict"] = "better"
    elif mean - half > 0:
        found["verdict"] = "worse"
    return found | {"low": mean - half, "high": mean + half, "p": p}


# ---- learning rates

def next_powers(losses: dict[int, float], wanted: int) -> list[int]:
    """Which rates to try, by their powers of sqrt(2), behind those that have `losses` (inf: diverged): first as many as
    are wanted, on the side where the lowest loss is; then one more as long as it is at an edge."""
    if not losses:
        return [-1, 0, 1]
    best = min(losses, key=lambda k: (losses[k], k))
    low, high = min(losses), max(losses)
    missing = max(0, wanted - len(losses))
    if best - low == high - best:
        below, above = missing // 2, missing - missing // 2
    elif best - low < high - best:
        below, above = max(missing, int(best == low)), 0
    else:
        below, above = 0, max(missing, int(best == high))
    if missing:  # what there is no room for on one side is tried on the other
        below, above = max(below, missing - (REACH - high)), max(above, missing - (REACH + low))
    return [k for k in (*range(low - below, low), *range(high + 1, high + 1 + above)) if abs(k) <= REACH]


def best_rate(losses: dict[float, float]) -> float:
    """The minimum of a parabola through the losses over log rate, fitted to the best rate and up to two on each side;
    not beyond the best rate's neighbours, and in three digits."""
    rates = sorted(rate for rate, loss in losses.items() if math.isfinite(loss))
    best = min(rates, key=lambda rate: losses[rate])
    at = rates.index(best)
    near = rates[max(0, at - 2) : at + 3]
    if len(near) < 3:
        return best
    square, slope, _ = np.polyfit(np.log(np.array(near) / best), [losses[rate] for rate in near], 2)
    if square <= 0:
        return best
    first, last = rates[max(0, at - 1)], rates[min(at + 1, len(rates) - 1)]
    return rounded(min(max(best * math.exp(-slope / (2 * square)), first), last))


def rounded(number: float) -> float:
    return float(f"{number:.3g}")


# ---- contestants and their runs

class Entrant(NamedTuple):
    """A contestant."""

    name: str
    config: HydraConfig
    run: TrainConfig  # of its file and the options
    warmup: float | None  # part of a run that it warms up; None: an option says in how many steps


def read_entrants(paths: list[str], given: dict) -> Iterator[Entrant]:
    kinds = HydraConfig, TrainConfig
    length = {"max_iters", "warmup_iters", *STOPS}
    others = {name: value for name, value in given.items() if name not in length}
    names: set[str] = set()
    for path in paths:
        stored = parse([path], *kinds)
        plain = build(others, *kinds, base=stored)
        warmup = min(1.0, plain[1].warmup_iters / max(1, planned_steps(*plain)))
        stem = Path(path).stem
        if stem.startswith(".") or Path(stem).suffix in (".toml", ".json", ".jsonl", ".txt"):
            raise UserError(f"{path!r}: a contestant's folder has the name of its file, which {stem!r} cannot be: "
                            "rename it")  # fmt: skip
        name = next(name for name in (stem, *(f"{stem}~{i + 2}" for i in range(len(paths)))) if name not in names)
        names.add(name)
        yield Entrant(name, *build(given, *kinds, base=stored), None if "warmup_iters" in given else warmup)


def configure(argv: list[str]) -> tuple[CompareConfig, dict, list[Entrant]]:
    """-> the comparison, the options that hold for all contestants, the contestants."""
    paths = [word for word in argv if word.endswith(".toml") and not word.startswith("-")]
    words = [word for word in argv if word not in paths]
    if any(word.startswith("--against") for word in words):
        raise UserError("--against: it is for stored comparisons, as in: python compare.py out_compare/compare.json "
                        "--against=NAME; a new one is against its first file")  # fmt: skip
    doc = f"{__doc__}\n{letters_help()}"
    given = parse(words, HydraConfig, TrainConfig, CompareConfig, doc=doc, base=OWN, unread=UNREAD)
    own = {option.name: given.pop(option.name) for option in fields(CompareConfig) if option.name in given}
    (options,) = build(own, CompareConfig)
    if launched():
        raise UserError("compare.py starts its own processes: run it without torchrun")
    if not paths:
        raise UserError("nothing to compare: name configurations, such as config/tiny.toml config/tiny_mha.toml")
    build({"max_seconds": given.get("max_seconds", 0.0)}, TrainConfig)
    entrants = list(read_entrants(paths, {name: value for name, value in given.items() if name != "max_seconds"}))
    if planned_steps(entrants[0].config, entrants[0].run) == 0:
        raise UserError(f"max_iters=0 of {entrants[0].name}: nothing would be trained: ask for more")
    seconds = given.get("max_seconds") or entrants[0].run.max_seconds
    if seconds and "seconds" not in options.bases:
        raise UserError(f"max_seconds={seconds}: give --equal=seconds too, or leave it out")
    stop = end_of(entrants[0].run)
    if "max_iters" in given and stop in ("max_tokens", "max_flops"):
        raise UserError(f"max_iters={given['max_iters']}: {stop}={getattr(entrants[0].run, stop)} ends the run of "
                        f"{entrants[0].name}: leave one out, or set --{stop}=0")  # fmt: skip
    for it in entrants:
        for name in UNREAD:
            if getattr(it.run, name):
                raise UserError(f"{name}={getattr(it.run, name)} of {it.name}: compare.py makes whole runs, and goes "
                                "on where it was stopped: leave it out")  # fmt: skip
        for name, why in SAME.items():
            if getattr(it.run, name) != getattr(entrants[0].run, name):
                raise UserError(f"{name}={getattr(it.run, name)!r} of {it.name}: {why}: give --{name} for all")
        if options.rates and it.run.learning_rate == 0:
            raise UserError(f"learning_rate=0.0 of {it.name}: there is nothing around it to try: set one, or --rates=0")
    return options, given, entrants


def work_of(config: HydraConfig, run: TrainConfig) -> float:
    """FLOPs of steps and evaluations."""
    steps = planned_steps(config, run)
    batches = steps // run.eval_interval * run.eval_iters + run.final_eval_iters
    tokens = batches * run.batch_size * config.block_size
    return steps * step_work(config, run)[1] + tokens * flops_per_token(config, config.block_size)


class Contest(NamedTuple):
    """What runs a comparison is made of."""

    options: CompareConfig
    given: dict  # options that hold for all contestants
    entrants: list[Entrant]
    out: Path
    jobs: int
    validation: dict[str, int] = {}  # tokens on which each one's seeds are evaluated

    @property
    def first(self) -> Entrant:
        return self.entrants[0]

    @property
    def seconds(self) -> float:
        """For which all train at equal seconds, if that was said."""
        return self.given.get("max_seconds") or self.first.run.max_seconds

    def steps(self, it: Entrant, basis: str) -> int:
        """With which a contestant has the first one's FLOPs, or else its tokens."""
        steps = planned_steps(self.first.config, self.first.run)
        tokens, flops = step_work(self.first.config, self.first.run)
        stop = {"max_tokens": steps * tokens, "max_flops": 0.0}
        if basis == "flops":
            stop = {"max_tokens": 0, "max_flops": steps * flops}
        return planned_steps(it.config, replace(it.run, **stop, max_seconds=0.0))

    def shared(self) -> dict[str, str]:
        """Device, dtype and compilation, chosen once for all runs."""
        run, config = self.first.run, self.first.config
        device = choose_device(run.device)
        dtype, _ = choose_dtype(run.dtype, device, config.dim)
        flops = max(self.steps(it, "tokens") * step_work(it.config, it.run)[1] for it in self.entrants)
        compiled, _ = choose_compile(run.compile, device, flops)
        return {"device": str(device), "dtype": str(dtype).removeprefix("torch."),
                "compile": "on" if compiled else "off"}  # fmt: skip

    def batches(self, it: Entrant, purpose: str) -> int:
        """Of an evaluation."""
        most, part = VALIDATION[purpose]
        tokens = self.steps(self.first, "tokens") * step_work(self.first.config, self.first.run)[0]
        return max(1, round(min(most, part * tokens) / (it.run.batch_size * it.config.block_size)))

    def run_of(self, it: Entrant, steps: int, rate: float, where: str, changes: dict) -> TrainConfig:
        warmup = it.run.warmup_iters if it.warmup is None else round(it.warmup * steps)
        settings = {"max_iters": steps, "max_tokens": 0, "max_flops": 0.0, "max_seconds": 0.0, "warmup_iters": warmup,
                    "learning_rate": rate, "sample_tokens": 0, "out_dir": str(self.out / it.name / where)}  # fmt: skip
        return replace(it.run, **settings | changes)

    def rate_trial(self, it: Entrant, power: int) -> Trial:
        """A run at the rate of this power of sqrt(2), evaluated at its end alone."""
        steps, rate = self.steps(it, "tokens"), rate_of(it, power)
        batches = self.batches(it, "rate")
        if self.given.get("final_eval_iters"):
            batches = min(batches, it.run.final_eval_iters)
        evaluations = {"eval_interval": steps, "eval_iters": 1, "final_eval_iters": batches}
        run = self.run_of(it, steps, rate, f"{steps}-steps/rate-{rate:g}", evaluations)
        return Trial(it.config, run, work_of(it.config, run))

    def seed_trials(self, it: Entrant, basis: str, rate: float, seconds: float = 0.0,
                    pace: float = 0.0) -> list[Trial]:  # fmt: skip
        """A run for each seed; at equal seconds it ends after so many, of which a step takes about `pace`, if known.
        Where they are those of the first one's run, its work stands for them, done by all jobs at a time."""
        steps = max(1, round(seconds / pace)) if pace else self.steps(it, basis)
        evaluations = {"eval_interval": math.ceil(steps / POINTS), "eval_iters": self.batches(it, "curve"),
                       "final_eval_iters": self.batches(it, "seed")}  # fmt: skip
        evaluations |= {name: self.given[name] for name in evaluations.keys() & self.given.keys()}
        found, alone = [], basis == "seconds"
        work = self.jobs * self.seed_trials(self.first, "tokens", rate)[0].work if alone and not self.seconds else 0.0
        for seed in range(it.run.seed, it.run.seed + self.options.seeds):
            length = f"{seconds:g}-seconds" if alone else f"{steps}-steps"
            run = self.run_of(it, steps, rate, f"{length}/seed-{seed}-rate-{rate:g}",
                              evaluations | {"seed": seed, "max_seconds": seconds})  # fmt: skip
            found.append(Trial(it.config, run, work if alone else work_of(it.config, run), alone, self.seconds * alone))
        return found

    def expected(self) -> list[Trial]:
        """All runs, as far as they are known, at any rates."""
        found = [self.rate_trial(it, power) for it in self.entrants for power in range(self.options.rates)]
        if "seconds" in self.options.bases and not self.seconds:
            found += self.seed_trials(self.first, "tokens", 1.0)  # whose seconds count
        for basis in self.options.bases:
            for it in self.entrants:
                found += self.seed_trials(it, basis, 1.0, 1.0 if basis == "seconds" else 0.0)
        return found


def rate_of(it: Entrant, power: int) -> float:
    return rounded(it.run.learning_rate * 2 ** (power / 2))


def search(contest: Contest, team: Team) -> dict[str, dict[float, float]]:
    """The losses of each contestant's rates; of what diverged, inf."""
    losses: dict[str, dict[int, float]] = {it.name: {} for it in contest.entrants}
    while True:
        todo = [(it, k) for it in contest.entrants for k in next_powers(losses[it.name], contest.options.rates)]
        if not todo:
            break
        trials = [contest.rate_trial(it, k) for it, k in todo]
        team.expect([trial for (it, _), trial in zip(todo, trials, strict=True)
                     if len(losses[it.name]) >= contest.options.rates])  # fmt: skip
        for (it, k), outcome in zip(todo, team.make(trials), strict=True):
            losses[it.name][k] = math.inf if outcome.loss is None else outcome.loss
    return {it.name: {rate_of(it, k): losses[it.name][k] for k in sorted(losses[it.name])} for it in contest.entrants}


def seconds_of_first(contest: Contest, team: Team, rate: float) -> float:
    """For which all train at equal seconds."""
    if contest.seconds:
        return contest.seconds
    made = team.make(contest.seed_trials(contest.first, "tokens", rate))
    found = [outcome.seconds for outcome in made if outcome.loss is not None]
    if not found:
        raise UserError(f"equal=seconds: every run of {contest.first.name} diverges: say how long, with --max_seconds")
    return rounded(median(found))


def seed_outcomes(contest: Contest, team: Team, basis: str, rates: dict[str, float]) -> dict[str, list[Outcome]]:
    """What the seeds' runs of every contestant have come to. They are made in turns, so that a slow phase of the
    machine meets all contestants."""
    seconds, paces = 0.0, dict.fromkeys(rates, 0.0)
    if basis == "seconds":
        seconds = seconds_of_first(contest, team, rates[contest.first.name])
        if contest.options.rates:
            made = team.make([contest.rate_trial(it, 0) for it in contest.entrants])
            paces = {it.name: one.seconds / one.steps for it, one in zip(contest.entrants, made, strict=True)}
    trials = [contest.seed_trials(it, basis, rates[it.name], seconds, paces[it.name]) for it in contest.entrants]
    made = team.make([trial for of_a_seed in zip(*trials, strict=True) for trial in of_a_seed])
    return {it.name: made[i :: len(trials)] for i, it in enumerate(contest.entrants)}


# ---- results

def row_of(it: Entrant, rate: float, outcomes: list[Outcome], reference: list[Outcome]) -> dict:
    """What a contestant's runs say, beside those of the first."""
    tokens, flops = step_work(it.config, it.run)
    ended = [outcome for outcome in outcomes if outcome.loss is not None]
    losses = [outcome.loss for outcome in ended]
    steps = fmean(outcome.steps for outcome in ended or outcomes)
    params = count_params(it.config)
    row = {"contestant": it.name, "rate": rate, "parameters": params, "tokens": round(steps * tokens),
           "tokens_per_parameter": steps * tokens / params, "flops": steps * flops,
           "seconds": median(outcome.seconds for outcome in ended or outcomes),
           "state_bytes_per_token": state_bytes(it.config, it.config.block_size) / it.config.block_size,
           "runs": len(outcomes), "diverged": len(outcomes) - len(ended), "mean": fmean(losses) if losses else None,
           "sd": stdev(losses) if len(losses) > 1 else None,
           "losses": [outcome.loss for outcome in outcomes]}  # fmt: skip
    if outcomes is reference:
        return row | {"verdict": "reference"}
    return row | paired(differences_of(row["losses"], [outcome.loss for outcome in reference]))


def curves_of(it: Entrant, outcomes: list[Outcome]) -> dict[str, list]:
    """The evaluations of a contestant's runs: where they were made, mean over the seeds, and the losses of each."""
    tokens, flops = step_work(it.config, it.run)
    sound = [outcome.curve for outcome in outcomes if outcome.loss is not None]
    points = [seeds for seeds in zip(*sound, strict=False)  # runs that seconds end have not equally many
              if all(loss is not None for _, _, loss in seeds)]  # fmt: skip
    steps = [fmean(step for step, _, _ in seeds) for seeds in points]
    return {"tokens": [step * tokens for step in steps], "flops": [step * flops for step in steps],
            "seconds": [fmean(seconds for _, seconds, _ in seeds) for seeds in points],
            "losses": [[loss for _, _, loss in seeds] for seeds in points]}  # fmt: skip


COLUMNS = {"rate": "{:.3g}", "parameters": "{:,}", "tokens_per_parameter": "{:.2f}", "flops": "{:.3g}",
           "seconds": "{:,.1f}", "state_bytes_per_token": "{:,.0f}", "runs": "{}", "diverged": "{}", "mean": "{:.4f}",
           "sd": "{:.4f}", "difference": "{:+.4f}", "low": "{:+.4f}", "high": "{:+.4f}", "p": "{:.2g}",
           "verdict": "{}"}  # fmt: skip


def table(rows: list[dict]) -> Iterator[str]:
    """Its lines; what does not exist is a dash."""
    lines = [["contestant", *(name.replace("_per_", "/").replace("_", " ") for name in COLUMNS)]]
    for row in rows:
        cells = ["-" if row.get(name) is None else text.format(row[name]) for name, text in COLUMNS.items()]
        lines.append([row["contestant"], *cells])
    return aligned(lines)


def few(number: float) -> str:
    """In two digits."""
    return f"{number:.2g}" if number < 99.5 else f"{number:,.0f}"


def markdown(found: dict) -> Iterator[str]:
    """The tables of a stored comparison, lines of a README."""
    for basis, result in found["bases"].items():
        lines = [["contestant", "rate", "tokens/parameter", "training FLOPs", "state bytes/token", "mean (sd)",
                  f"against {found['reference']}, 95% interval", "p", "verdict"]]  # fmt: skip
        reference = {row["contestant"]: row["losses"] for row in result["rows"]}[found["reference"]]
        for row in result["rows"]:
            mean = "diverged" if row["mean"] is None else f"{row['mean']:.4f}"
            if row["sd"] is not None:
                mean += f" ({row['sd']:.4f})"
            against, p = "", ""
            if row.get("p") is not None:
                pairs = zip(row["losses"], reference, strict=True)
                part = row["difference"] / fmean(theirs for ours, theirs in pairs if None not in (ours, theirs))
                against = f"{part:+.1%}: {row['difference']:+.4f} "
                against += f"({row['low']:+.4f} to {row['high']:+.4f})"
                p = f"{row['p']:.2g}"
            lines.append([row["contestant"], f"{row['rate']:.3g}", few(row["tokens_per_parameter"]),
                          f"{row['flops']:.3g}", f"{row['state_bytes_per_token']:,.0f}", mean, against, p,
                          row["verdict"]])  # fmt: skip
        seeds = "1 seed" if row["runs"] == 1 else f"{row['runs']} seeds"
        yield f"Equal {basis}, {found['measure']} on {found['validation_tokens']:,} tokens, {seeds}:"
        yield ""
        yield "| " + " | ".join(lines[0]) + " |"
        yield "|---" * len(lines[0]) + "|"
        yield from ("| " + " | ".join(cells) + " |" for cells in lines[1:])
        yield ""


def set_against(found: dict, name: str) -> None:
    """Makes another contestant of a stored comparison the one that the others are paired with."""
    for result in found["bases"].values():
        losses = {row["contestant"]: row["losses"] for row in result["rows"]}
        if name not in losses:
            raise UserError(f"against={name!r}: it is none of the contestants: use {', '.join(losses)}")
        for row in result["rows"]:
            row |= paired(differences_of(row["losses"], losses[name]))
            if row["contestant"] == name:
                row |= {"p": None, "verdict": "reference"}
    found["reference"] = name


def stored(word: str) -> Path | None:
    """The file of a comparison that a word names, itself or by its folder."""
    if word.startswith("-"):
        return None
    word = at_home(word)
    inside = Path(word, "compare.json")
    return Path(word) if word.endswith(".json") else inside if os.path.exists(inside) else None


def print_stored(argv: list[str]) -> int:
    """Markdown of comparisons' JSON files."""
    against, paths = "", []
    for word in argv:
        if word.startswith("--against="):
            against = word.partition("=")[2]
            if not against:
                raise UserError("against='': name the contestant that the others are paired with")
        elif (path := stored(word)) is None:
            raise UserError(f"{word!r}: stored comparisons take nothing but --against=CONTESTANT: leave it out")
        else:
            paths.append(path)
    for path in paths:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if against:
                set_against(found, against)
            lines = [f"`{found['command']}` ({found['date'][:10]})", "", *markdown(found)]
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read: {error.strerror}: give a readable file") from None
        except (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError,
                ValueError) as error:  # fmt: skip
            raise UserError(f"{str(path)!r} is no JSON of a comparison: name a compare.json") from error
        print("\n".join(lines))
    return 0


def remarks(contest: Contest, tried: dict[str, dict[float, float]], rows: dict[str, list[dict]]) -> Iterator[str]:
    """What keeps the rows from meaning what they seem to."""
    first = contest.first
    for it in contest.entrants:
        size = count_params(it.config) / count_params(first.config) - 1
        if abs(size) > 0.01:
            yield f"{it.name} has {size:+.1%} of {first.name}'s parameters: more than 1% apart"
        tokens = [contest.validation.get(other.name) for other in (it, first)]
        if tokens[0] != tokens[1]:
            yield f"{it.name} is evaluated on {tokens[0]:,} tokens, {first.name} on {tokens[1]:,}"
        same = all(getattr(it.run, name) == getattr(first.run, name) for name in SAME_BATCHES)
        if not same or it.config.block_size != first.config.block_size:
            yield f"{it.name} does not see the batches of {first.name}: a seed has nothing but its number in common"
        best = min(tried[it.name], key=tried[it.name].get, default=None)
        if best is not None and best in (min(tried[it.name]), max(tried[it.name])):
            yield (f"{it.name}: the lowest loss is at {best:g}, an edge of the rates that were tried: "
                   "give its file a learning_rate near it")  # fmt: skip
    if contest.options.seeds == 1:
        yield "one seed resolves nothing: give --seeds=5"
    if min(row["tokens_per_parameter"] for found in rows.values() for row in found) < FEW:
        yield f"a run of less than {FEW} tokens a parameter rewards what learns fastest at first"
    for basis, row in [(basis, row) for basis, found in rows.items() for row in found if row["diverged"]]:
        yield (f"equal {basis}: {row['diverged']} of {row['runs']} runs of {row['contestant']} diverged, its figures "
               "are those of the others")  # fmt: skip
    together = [basis for basis in rows if basis != "seconds"]
    if contest.jobs > 1 and together:
        yield f"seconds at equal {' and '.join(together)} are those of runs {contest.jobs} at a time"


def read_corpora(entrants: list[Entrant]) -> tuple[list[Corpus], str]:
    """Of all; and the measure in which losses compare."""
    corpora = [read_corpus(it.config, it.run) for it in entrants]
    known = [token_bytes(corpus.enc, it.config.vocab_size).any() for corpus, it in zip(corpora, entrants, strict=True)]
    if not all(known) and len({it.run.tokenizer for it in entrants}) > 1:
        raise UserError("tokenizer: losses of different tokens compare in bits per byte only, and not all of these "
                        "have known bytes: give --tokenizer for all")  # fmt: skip
    return corpora, "val_bpb" if all(known) else "val_loss"


def validation_tokens(contest: Contest, it: Entrant, corpus: Corpus) -> int:
    """On which a contestant's seeds are evaluated."""
    run, length = contest.seed_trials(it, "tokens", 1.0)[0].run, it.config.block_size
    batches = eval_batches(corpus.val, run.batch_size, length, run.batch_size * run.final_eval_iters)
    return sum(int((y != IGNORE).sum()) for _, y in batches)


def contend(contest: Contest, team: Team) -> dict:
    """The comparison, from the search to the notes."""
    team.expect(contest.expected())
    tried: dict[str, dict[float, float]] = {it.name: {} for it in contest.entrants}
    if contest.options.rates:
        tried = search(contest, team)
    contestants, bases, rows, rates = {}, {}, {}, {}
    for it in contest.entrants:
        losses = {rate: loss if math.isfinite(loss) else None for rate, loss in tried[it.name].items()}
        rates[it.name] = it.run.learning_rate
        if losses and set(losses.values()) == {None}:
            raise UserError(f"{it.name}: it diverges at every rate from {min(losses):g} to {max(losses):g}: give its "
                            "file a lower learning_rate")  # fmt: skip
        if losses:
            rates[it.name] = best_rate(tried[it.name])
        contestants[it.name] = {"rate": rates[it.name], "search": list(losses.items()),
                                "validation_tokens": contest.validation[it.name],
                                "config": asdict(it.config) | asdict(it.run)}  # fmt: skip
    for basis in contest.options.bases:
        found = seed_outcomes(contest, team, basis, rates)
        reference = found[contest.first.name]
        rows[basis] = [row_of(it, rates[it.name], found[it.name], reference) for it in contest.entrants]
        bases[basis] = {"rows": rows[basis], "curves": {it.name: curves_of(it, found[it.name])
                                                        for it in contest.entrants}}  # fmt: skip
    return {"contestants": contestants, "bases": bases, "notes": list(remarks(contest, tried, rows))}


def main(argv: list[str]) -> int:
    new = any(word.endswith(".toml") or word in ("-h", "--help") for word in argv)
    if any(map(stored, argv)) and not new:
        return print_stored(argv)
    options, given, entrants = configure(argv)
    out = Path((OWN | given)["out_dir"])
    contest = Contest(options, given, entrants, out, min(options.jobs, cores()))
    torch.set_num_threads(1)  # as the runs have it: what this machine does best is found out by measuring
    shared = contest.shared()
    contest = contest._replace(entrants=[it._replace(run=replace(it.run, **shared)) for it in entrants])
    corpora, measure = read_corpora(contest.entrants)
    pairs = list(zip(contest.entrants, corpora, strict=True))
    contest = contest._replace(validation={it.name: validation_tokens(contest, it, corpus) for it, corpus in pairs})
    corpus = corpora[0]
    text = Text(corpus.fingerprint, {it.run.tokenizer: tokenizer_hash(its.enc) for it, its in pairs})
    head = describe(torch.device(shared["device"])) | shared | {
        "jobs": contest.jobs, "command": command("compare.py", *argv), "corpus": corpus.description,
        "fingerprint": corpus.fingerprint, "measure": UNITS[measure], "reference": contest.first.name,
        "validation_tokens": contest.validation[contest.first.name]}  # fmt: skip
    with open_log(out) as log:
        write_text(out / "config.toml", to_toml(options))
        log.write(json.dumps(head) + "\n")
        print(f"{corpus.description}\n{contest.jobs} runs at a time, each on one thread of {shared['device']}, in "
              f"{shared['dtype']}, compile={shared['compile']}", flush=True)  # fmt: skip
        team = Team(out, contest.jobs, text, measure, options.keep, log)
        try:
            with team:
                result = head | contend(contest, team)
        except KeyboardInterrupt:
            print(f"stopped: {len(team.ended)} of {team.expected} runs have ended; to go on: {head['command']}")
            return 130
    path = Path(options.json) if options.json else out / "compare.json"
    write_text(path, json.dumps(result, indent=1, allow_nan=False))
    rows = {basis: found["rows"] for basis, found in result["bases"].items()}
    for basis, found in rows.items():
        print(f"\nequal {basis}: {head['measure']} on {head['validation_tokens']:,} validation tokens, lower is better")
        print("\n".join(table(found)))
    print("\n".join(result["notes"]))
    print(json.dumps({"json": str(path), "measure": head["measure"], "validation_tokens": head["validation_tokens"],
                      "reference": head["reference"], **rows, "notes": result["notes"]}, allow_nan=False))  # fmt: skip
    return 0


if __name__ == "__main__":
    cli(main)
