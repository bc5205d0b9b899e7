"""What larger shapes would cost: `python scaling.py [--key=value ...]`. Keys of the shape hold for all presets.

config/scale_*.toml: those that fit are trained for `rounds` steps of one text on the default corpus, at their own
learning rate, then evaluated. Their time per token (by its logarithm) and what the causal rule routes there (by its
logit; `recursing`: the part of the recursions behind the first that a token takes) predict the others, over the
logarithm of the parameters, with 95% intervals. Beyond three times the largest measured shape it is a guess.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from operator import itemgetter
from pathlib import Path
from statistics import fmean, linear_regression, median
from typing import NamedTuple

import torch

from accounting import count_params
from bench import UNASKED, Bench, BenchConfig, begin, labelled
from configurator import UserError, build, cli, command, need, parse, to_toml
from contestants import Contestant, step_flops
from data import Corpus, eval_batches, get_batch, prepare
from machine import choose_dtype, seconds_of, spread
from model import HydraConfig
from student import t_quantile
from train import BY_RULE, TrainConfig

CONFIGS = Path(__file__).parent / "config"
UNREAD = ("peers", "prompt_tokens", "new_tokens", "context")  # nothing is generated
STEP_TOKENS = 256
EVALUATIONS = 16  # texts of the evaluation
LONGEST = 240  # seconds: on a CPU a shape that takes longer is not measured


class Preset(NamedTuple):
    params: int
    name: str
    config: HydraConfig
    run: TrainConfig


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
    n, mean_x, mean_y = len(x), fmean(x), fmean(y)
    slope, intercept = linear_regression(x, y)
    spread_x = sum((a - mean_x) ** 2 for a in x)
    variance = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / (n - 2)
    error, quantile = math.sqrt(variance / spread_x), t_quantile(n - 2)
    missed_line, missed_constant = 0.0, 0.0  # squared errors at each point, of a fit to the others
    for i in range(n):
        other_x, other_y = x[:i] + x[i + 1 :], y[:i] + y[i + 1 :]
        line = linear_regression(other_x, other_y)
        missed_line += (y[i] - line.intercept - line.slope * x[i]) ** 2
        missed_constant += (y[i] - fmean(other_y)) ** 2
    sloped = missed_line < missed_constant and abs(slope) > quantile * error

    def predict(at: float) -> tuple[float, float, float]:
        half = quantile * math.sqrt(variance * (1 + 1 / n + (at - mean_x) ** 2 / spread_x))
        middle = intercept + slope * at
        best = middle if sloped else mean_y
        return best, min(best, middle - half), max(best, middle + half)

    return Trend(sloped, slope, error, predict)


def logit(p: float) -> float:
    """A part of 0 or 1 counts as half a token of a text away from it."""
    least = 0.5 / STEP_TOKENS
    p = min(max(p, least), 1 - least)
    return math.log(p / (1 - p))


def logistic(y: float) -> float:
    return (1 + math.tanh(y / 2)) / 2


SCALES = {"ms_per_token": (math.log, math.exp), "routed_fraction": (logit, logistic), "recursing": (logit, logistic)}


def train_shortly(bench: Bench, preset: Preset, dtype: str, corpus: Corpus) -> dict:
    """Trains a shape for `rounds` steps, after one that is not timed, then evaluates it."""
    config, seed, words = preset.config, bench.options.seed, corpus.enc.n_vocab
    need(config, "vocab_size", config.vocab_size >= words, f"the default corpus has {words} tokens")
    torch.manual_seed(seed)
    it = Contestant("train", config, 1, STEP_TOKENS, bench.device, dtype, run=preset.run)
    seconds = []
    for step in range(bench.options.rounds + 1):
        it.batch = [t.to(bench.device) for t in get_batch(corpus.train, 1, STEP_TOKENS, seed, step)]
        seconds.append(seconds_of(it.step, bench.device))
    it.net.eval()
    seen: dict[str, list[float]] = {"loss": []}
    for x, y in eval_batches(corpus.val, 1, STEP_TOKENS, EVALUATIONS):
        with torch.no_grad(), it.autocast:
            output = it.net(x.to(bench.device), y.to(bench.device))
        seen["loss"].append(output.loss.item())
        for name in output.routing.keys() & set(BY_RULE):
            seen.setdefault(name, []).append(output.routing[name].item())
    if not math.isfinite(sum(seen["loss"])):
        return {"left_out": "its loss is not finite"}
    ms = median(seconds[1:]) / STEP_TOKENS * 1e3
    row = {"steps": len(seconds), "ms_per_token": ms, "spread": spread(seconds[1:])}
    row |= {name: fmean(seen[name]) for name in BY_RULE if name in seen}
    if "mean_depth" in row:
        row["recursing"] = (row["mean_depth"] - 1) / (config.mor_recursions - 1)
    return row


def predicted(preset: Preset, trends: dict[str, Trend], largest: int) -> dict:
    """A row of what the trends say of a shape."""
    row: dict = {"level": "predicted", "mix": preset.name, "params": preset.params}
    for key, trend in trends.items():
        for end, y in zip(("", "_low", "_high"), trend.predict(math.log(preset.params)), strict=True):
            row[key + end] = SCALES[key][1](y)
            if key == "recursing":
                row["mean_depth" + end] = 1 + (preset.config.mor_recursions - 1) * row[key + end]
    times = preset.params / largest
    return row | {"note": f"{times:.1f}x the largest measured" + (": beyond 3x, a guess" if times > 3 else "")}


def scaling_table(bench: Bench, presets: list[Preset]) -> Iterator[dict]:
    dtype = str(choose_dtype("auto", bench.device, presets[0].config.dim)[0]).removeprefix("torch.")
    corpus, found, others = None, [], []
    for preset in presets:
        case = "train", preset.config
        row = labelled(bench, {preset.name: case}, 1, STEP_TOKENS, dtype)
        row |= {"level": "scaling", "params": preset.params}
        rounds = bench.options.rounds + 2 + EVALUATIONS / 3
        seconds = rounds * step_flops(*case, 1, STEP_TOKENS) / bench.peaks[dtype] / 0.3
        if "left_out" not in row and bench.device.type == "cpu" and seconds > LONGEST:
            row["left_out"] = f"more than {LONGEST} s on a CPU"
        unasked = row.get("left_out") == UNASKED
        if "left_out" in row and not unasked:
            others.append(preset)
        elif not unasked:
            corpus = corpus or prepare(preset.run.data, preset.run.tokenizer, preset.run.cache_dir)
            row |= train_shortly(bench, preset, dtype, corpus)
            if "left_out" not in row:
                found.append(row)
        yield row
    sizes = sorted({row["params"] for row in found})
    if len(sizes) < 3:
        if others:
            names = " ".join(preset.name for preset in others)
            yield {"level": "predicted", "mix": names, "left_out": "a fit needs three measured shapes"}
        return
    trends = {}
    largest = max([sizes[-1], *(preset.params for preset in others)])
    for key, (scale, unscale) in SCALES.items():
        x = [math.log(row["params"]) for row in found if key in row]
        y = [scale(row[key]) for row in found if key in row]
        if len(set(y)) < 2:  # all at one bound, or not routed: nothing to fit
            continue
        trends[key] = trend = fit(x, y)
        points = [sizes[0] * (largest / sizes[0]) ** (i / 30) for i in range(31)]
        curve = [(params, *map(unscale, trend.predict(math.log(params)))) for params in points]
        yield {"level": "fit", "mix": key, "form": "line" if trend.sloped else "constant", "slope": trend.slope,
               "slope_error": trend.error, "measured": len(x), "curve": curve}  # fmt: skip
    for preset in others:
        yield predicted(preset, trends, sizes[-1])


def main(argv: list[str]) -> int:
    for word in argv:
        if word.endswith(".toml") and not word.startswith("-"):
            raise UserError(f"{word!r}: scaling has its own files, config/scale_*.toml: give it --key=value only")
    given = parse(argv, HydraConfig, BenchConfig, doc=__doc__, unread=UNREAD)
    own = {option.name: given.pop(option.name) for option in fields(BenchConfig) if option.name in given}
    (options,) = build(own, BenchConfig)
    presets = []
    for path in CONFIGS.glob("scale_*.toml"):
        config, run = build(given, HydraConfig, TrainConfig, base=parse([str(path)], HydraConfig, TrainConfig))
        presets.append(Preset(count_params(config), path.stem, config, run))
    about = f"{len(presets)} presets of config/scale_*.toml"
    facts = {"config": to_toml(options), "overrides": given, "command": command("scaling.py", *argv)}
    bench = begin(options, None, about, False, facts)
    bench.take("scaling", scaling_table(bench, sorted(presets, key=itemgetter(0, 1))))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    cli(main)
