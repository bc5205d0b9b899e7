"""Draw stored numbers: `python plot.py FILE_OR_RUN [...] [--out=PATH.png] [--x=steps|tokens|flops|seconds]`.

- Runs, any number: folders with a log.jsonl, or the log files: training loss and validation bits per byte, over --x.
- A JSON of bench.py or scaling.py: a chart for every table, in PATH_table.png where there are several.
- compare.py's JSON, or its folder: validation over tokens, FLOPs and seconds, or over --x alone; a band from the best
  to the worst seed. The points are the evaluations of the curve, on less text than the table's.
- A checkpoint's health (diagnose.py checkpoint --json): the span of every head, and the convolutions' taps.
- diagnose.py's JSON: of recall the accuracy by pairs and the steps to 99%, of stability every layer's gradient norm.
It reads files and nothing else. matplotlib is not in requirements.txt: pip install matplotlib.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean

from configurator import AnyPath, UserError, build, cli, need, need_file, parse, usable_path

AXES = ("steps", "tokens", "flops", "seconds")
COMPARED = AXES[1:]  # those of a comparison
SCALING = ("ms_per_token", "routed_fraction", "recursing")
NAMES = {"steps": "steps", "tokens": "training tokens", "flops": "training FLOPs", "seconds": "seconds of training"}
MARKERS = "osD^v"  # of letters, of contestants
# Told apart by those who see no red or no green, too (Okabe and Ito); first those of the letters
COLOURS = {"A": "#000000", "G": "#56B4E9", "M": "#0072B2", "C": "#D55E00", "L": "#009E73"}
MANY = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
BARS = ("of_layer_1024", "ms", "step_mb")  # a bar's length: the first of these that a row has


@dataclass(frozen=True)
class PlotConfig:
    out: AnyPath = "plot.png"  # the picture's file
    x: str = ""  # steps, tokens, flops or seconds; empty: steps of runs, the other three of a comparison

    def __post_init__(self):
        need(self, "x", self.x in ("", *AXES), f"use {', '.join(AXES)}")
        need(self, "out", self.out.endswith(".png"), "name a .png file")
        need_file(self, "out")


def read(path: Path) -> str:
    """A file's text; UserError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror}: give a readable file") from None


def read_run(path: Path, x: str) -> dict[str, tuple[list[float], list[float]]]:
    """A log.jsonl's curves: places and values. A line that was cut is skipped."""
    curves: dict[str, tuple] = {"loss": ([], []), "val_bpb": ([], []), "final": ([], [])}
    at = logged = dict.fromkeys(AXES, 0.0)
    pace = tokens = flops = math.nan
    for line in read(path).splitlines():
        try:
            record = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):  # cut, or of another kind of file
            continue
        if "started" in record or "resumed_at" in record:
            sizes = ("batch_size", "block_size", "gradient_accumulation_steps")
            tokens = math.prod(record.get("config", {}).get(name, math.nan) for name in sizes)
            flops = tokens * record.get("flops_per_token", math.nan)
        if "step" not in record:
            continue
        pace = record.get("ms", 1e3 * pace) / 1e3  # mean of the steps since the last line that has one
        done, since = record["step"] - at["steps"], record["step"] - logged["steps"]
        at = {"steps": record["step"], "tokens": at["tokens"] + done * tokens, "flops": at["flops"] + done * flops,
              "seconds": logged["seconds"] + (since * pace if since else 0)}  # fmt: skip
        if "ms" in record:
            logged = at
        for name in ("loss", "val_bpb"):
            if record.get(name) is not None:
                places, values = curves["final" if record.get("final") else name]
                places.append(at[x])
                values.append(record[name])
    found = [place for places, _ in curves.values() for place in places]
    if not found:
        raise UserError(f"{str(path)!r} has no step of a run: give a log.jsonl of train.py")
    if any(map(math.isnan, found)):
        raise UserError(f"{str(path)!r} does not say its {x}: use --x=steps")
    return curves


@contextlib.contextmanager
def expected(path: Path) -> Iterator[None]:
    """UserError where something in the file is not what is read from it."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{str(path)!r} has something of another form ({type(error).__name__}): give a file as the "
                        "programs write it") from error  # fmt: skip


def look(i: int) -> tuple[str, str]:
    """Colour and line of the i-th of many."""
    return MANY[i % len(MANY)], ("-", "--", ":")[i // len(MANY) % 3]


def draw_runs(runs: dict[str, dict], x: str, figure) -> None:
    upper, lower = figure.subplots(2, sharex=True)
    for i, (name, curves) in enumerate(runs.items()):
        colour, line = look(i)
        upper.plot(*curves["loss"], line, color=colour, label=name)
        lower.plot(*curves["val_bpb"], line, color=colour, marker="o")
        lower.plot(*curves["final"], "*", color=colour, markersize=12)
    upper.set(ylabel="training loss, nats per token")
    lower.set(xlabel=NAMES[x or "steps"], ylabel="validation, bits per byte (star: the end's)")


def name_of(row: dict, keys: str) -> str:
    return " ".join(str(row[key]) for key in keys.split() if key in row)


def draw_length(rows: list[dict], _: str, figure) -> None:
    """Time over the text's length, a line for every contestant."""
    axes = figure.subplots()
    for name in dict.fromkeys(name_of(row, "level mix dtype mode") for row in rows):
        points = [(row["T"], row["ms"]) for row in rows if name_of(row, "level mix dtype mode") == name]
        axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="T, tokens", ylabel="forward and backward, ms")


def draw_scaling(rows: list[dict], _: str, figure) -> None:
    """Over the parameters what was measured, the fit with its interval, and what it predicts."""
    for axes, key in zip(figure.subplots(len(SCALING), sharex=True), SCALING, strict=True):
        for row in rows:
            if row["level"] == "fit" and row["mix"] == key:
                x, y, low, high = zip(*row["curve"], strict=True)
                axes.plot(x, y, label="fit")
                axes.fill_between(x, low, high, alpha=0.2, label="95% prediction interval")
        for level, marker in (("scaling", "o"), ("predicted", "D")):
            found = [row for row in rows if row["level"] == level and key in row]
            axes.plot([row["params"] for row in found], [row[key] for row in found], marker, label=level)
        axes.set(xscale="log", yscale="log" if key == "ms_per_token" else "linear", ylabel=key, xlabel="parameters")


def draw_bars(rows: list[dict], _: str, figure) -> None:
    """A bar for every row, coloured by dtype and mode."""
    axes = figure.subplots()
    key = next(key for key in BARS if key in rows[0])
    rows = [row for row in rows if key in row]
    for kind in dict.fromkeys(name_of(row, "dtype mode") for row in rows):
        places = [i for i, row in enumerate(rows) if name_of(row, "dtype mode") == kind]
        axes.barh(places, [rows[i][key] for i in places], label=kind or None)
    axes.set_yticks(range(len(rows)), [name_of(row, "level mix B T") for row in rows], fontsize="small")
    axes.set(xlabel=key, ylim=(len(rows) - 0.5, -0.5))


def draw_compare(found: dict, x: str, figure) -> None:
    """A row of axes for each thing that is equal, a line for each contestant: the seeds' mean."""
    places = (x,) if x else COMPARED
    rows = figure.subplots(len(found["bases"]), len(places), squeeze=False, sharey="row")
    for row, (basis, result) in zip(rows, found["bases"].items(), strict=True):
        row[0].set(ylabel=f"{found['measure']}, equal {basis}")
        for axes, place in zip(row, places, strict=True):
            axes.set(xlabel=NAMES[place])
            for i, (name, curve) in enumerate(result["curves"].items()):
                (colour, line), marker = look(i), MARKERS[i % len(MARKERS)]
                means = list(map(fmean, curve["losses"]))
                axes.plot(curve[place], means, line, color=colour, marker=marker, label=name)
                if len(result["curves"]) > len(MANY):  # bands would hide the lines
                    continue
                axes.fill_between(curve[place], list(map(min, curve["losses"])), list(map(max, curve["losses"])),
                                  color=colour, alpha=0.15, linewidth=0)  # fmt: skip


def draw_spans(rows: list[dict], _: str, figure) -> None:
    """A dot for every head at the mean distance of what it looks at, a line up to where 90% of the weight lies."""
    axes = figure.subplots()
    letters = sorted({row["letter"] for row in rows})
    for i, letter in enumerate(letters):
        places, spans, ends = [], [], []
        for x, row in enumerate(rows):
            if row["letter"] == letter:
                heads = len(row["span"])
                places += [x + 0.8 * ((head + 0.5) / heads - 0.5) for head in range(heads)]
                spans += row["span"]
                ends += row["span90"]
        colour = COLOURS.get(letter, MANY[i % len(MANY)])  # a letter of the user has none
        axes.vlines(places, spans, ends, color=colour, alpha=0.4)
        axes.plot(places, spans, MARKERS[i % len(MARKERS)], color=colour, label=letter)
    axes.set_xticks(range(len(rows)), [row["layer"].removeprefix("blocks.") for row in rows])
    axes.set(xlabel="layer, a mark for each head", ylim=0,
             ylabel="attention span, tokens: mean distance,\nand (line) 90% of the weight")  # fmt: skip


def draw_taps(rows: list[dict], _: str, figure) -> None:
    """The root mean square of every convolution's taps, in a column for each token back."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        found = [row for row in rows if row["kind"] == kind]
        axes.imshow([row["rms"] for row in found], aspect="auto", cmap="Blues", vmin=0)
        largest = max(max(row["rms"]) for row in found)
        for y, row in enumerate(found):
            for x, value in enumerate(row["rms"]):
                colour = "white" if value > largest / 2 else "black"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", color=colour)
        axes.set_yticks(range(len(found)), [row["layer"] for row in found])
        axes.set_xticks(range(len(found[0]["rms"])))
        axes.set(title=kind, xlabel="tokens back")
    figure.suptitle("root mean square of the convolutions' taps")


def health_charts(found: dict) -> dict[str, tuple]:
    """Those of a checkpoint, of what is finite."""
    spans = [row for row in found["layers"] if row.get("span") and None not in row["span"]]
    taps = [row for row in found["taps"] if None not in row["rms"]]
    charts = {"spans": (draw_spans, spans, 5)} if spans else {}
    return charts | ({"taps": (draw_taps, taps, 2 + 0.35 * len(taps))} if taps else {})


def draw_recall(found: dict, _: str, figure) -> None:
    """A row of axes for each kind of text, a row in them for each variant: accuracy by number of pairs, and every
    seed's steps. Controls are grey."""
    tasks = dict.fromkeys(row["task"] for row in found["rows"])
    for (accuracy, steps), task in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks, strict=True):
        rows = [row for row in found["rows"] if row["task"] == task]
        numbers = list(rows[0]["accuracy"])
        for y, row in enumerate(rows):
            for i, number in enumerate(numbers):
                colour, marker = "0.6" if row["control"] else MANY[i % len(MANY)], MARKERS[i % len(MARKERS)]
                label = f"{number} pairs" if y == 0 and len(numbers) > 1 else None
                accuracy.plot(row["accuracy"][number], y, marker, color=colour, label=label)
            for i, reached in enumerate(row["steps_to_99"]):
                if reached is not None:
                    place = y + 0.5 * ((i + 0.5) / len(row["steps_to_99"]) - 0.5)  # seeds beside one another
                    steps.plot(reached, place, ".", color=MANY[0])
            if row["steps_to_99"].count(None) == len(row["steps_to_99"]):
                steps.text(0, y, " none", va="center", color="0.4", fontsize="small")
        for axes in (accuracy, steps):
            axes.set_yticks(range(len(rows)), [row["variant"] for row in rows], fontsize="small")
            axes.set(ylim=(len(rows) - 0.5, -0.5))
            axes.grid(axis="x", color="0.9")
        accuracy.set(xlabel=f"{task}: accuracy, mean of the seeds (grey: must fail)", xlim=(-0.03, 1.03))
        steps.set(xlabel=f"{task}: steps to 99%, a dot for each seed that gets there", xlim=(0, None))


def draw_stability(found: dict, _: str, figure) -> None:
    """Columns are variants, rows are rates, lines are layers, from the first, dark, to the last, light."""
    shades = import_module("matplotlib").colormaps["cividis"]
    pattern = found["config"]["pattern"]
    letters = [f", {pattern[i % len(pattern)]}" for i in range(found["config"]["n_layer"])]
    variants = dict.fromkeys(it["variant"] for it in found["runs"])
    rates = dict.fromkeys(it["rate"] for it in found["runs"])
    grid = figure.subplots(len(rates), len(variants), squeeze=False, sharex=True, sharey=True)
    for row, rate in zip(grid, rates, strict=True):
        row[0].set(ylabel=f"gradient norm, rate {rate:g}")
        for axes, variant in zip(row, variants, strict=True):
            run = next(it["runs"][0] for it in found["runs"] if (it["variant"], it["rate"]) == (variant, rate))
            layers = [name for name in run["norms"] if name.startswith("blocks.")]
            for i, name in enumerate(layers):
                colour = shades(0.9 * i / max(1, len(layers) - 1))
                norms = [math.nan if norm is None else norm for norm in run["norms"][name]]
                axes.semilogy(run["steps"], norms, color=colour, label=f"layer {i}{letters[i]}")
            axes.set(title=variant + (", diverged" if run["diverged"] else ""))
    for axes in grid[-1]:
        axes.set(xlabel="steps")


def charts_of(path: Path) -> dict[str, tuple]:
    """The charts of a JSON, (function, what to draw, inches of height) by table."""
    try:
        found = json.loads(read(path))
        if found.get("subject") == "recall" and found["rows"]:
            return {"": (draw_recall, found, 1 + 4 * len({row["task"] for row in found["rows"]}))}
        if found.get("subject") == "stability" and found["config"]["pattern"]:
            if all(it["runs"][0]["norms"] for it in found["runs"]):
                return {"": (draw_stability, found, 6)}
        if "bases" in found:
            return {"": (draw_compare, found, 1 + 3 * len(found["bases"]))}
        charts, tables = {}, {}
        if found.get("subject") == "checkpoint":
            charts = health_charts(found)
        else:
            tables = found["tables"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{str(path)!r} is no JSON of bench.py, scaling.py, compare.py or diagnose.py with rows: give "
                        "one, or runs") from None  # fmt: skip
    for table, rows in tables.items():
        rows = [row for row in rows if {*BARS, "ms_per_token", "curve"} & row.keys()]
        if rows:
            draw = {"length": draw_length, "scaling": draw_scaling}.get(table, draw_bars)
            charts[table] = draw, rows, 1.5 + len(rows) / 5 if draw == draw_bars else 7
    if not charts:
        raise UserError(f"{str(path)!r} has no rows to draw: every one was left out")
    return charts


def main(argv: list[str]) -> int:
    words = [word for word in argv if word.startswith("-")]
    if "" in argv:  # such as that of a variable which is not set
        raise UserError("'' is an empty path: name a run's folder, its log.jsonl or a JSON of tables")
    paths = [Path(usable_path(word, "")) for word in argv if word not in words]
    usage = "usage: python plot.py FILE_OR_RUN [...] [--key=value ...]"
    (options,) = build(parse(words, PlotConfig, doc=f"{usage}\n\n{__doc__.strip()}"), PlotConfig)
    if not paths:
        raise UserError("nothing to draw: name runs, or a JSON of bench.py, scaling.py, compare.py or diagnose.py")
    paths = [path / "compare.json" if os.path.exists(path / "compare.json") else path for path in paths]
    paths = [path / "log.jsonl" if path.is_dir() else path for path in paths]
    for path in paths:
        if not os.path.isfile(path):
            what = "is no file" if os.path.lexists(path) else "does not exist"
            raise UserError(f"{str(path)!r} {what}: name a run's folder, its log.jsonl or a JSON of tables")
    tables = [path for path in paths if path.suffix == ".json"]
    if tables and len(paths) > 1:
        raise UserError(f"{str(paths[1])!r}: tables are drawn from one JSON at a time: leave it out")
    if tables:
        charts = charts_of(paths[0])
        axes = COMPARED if [draw for draw, _, _ in charts.values()] == [draw_compare] else ()
        if options.x and options.x not in axes:
            remedy = f"use {', '.join(axes)}" if axes else "leave it out"
            raise UserError(f"x={options.x!r}: {str(paths[0])!r} is not drawn over that: {remedy}")
    else:
        names = [path.parent.name for path in paths]
        runs = {}
        for path, name in zip(paths, names, strict=True):
            if not name or names.count(name) > 1:
                name = str(path.parent if path.name == "log.jsonl" else path)
            with expected(path):
                runs[name] = read_run(path, options.x or "steps")
        charts = {"": (draw_runs, runs, 7)}
    try:
        Figure = import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise UserError("plot.py needs matplotlib, which is not installed: pip install matplotlib") from error
    for name, (draw, what, height) in charts.items():
        figure = Figure((11, height), layout="constrained")
        with expected(paths[0]):
            draw(what, options.x, figure)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside right upper")
        out = options.out if len(charts) == 1 else f"{options.out.removesuffix('.png')}_{name}.png"
        try:
            figure.savefig(out)
        except OSError as error:
            raise UserError(f"out={out!r}: {error.strerror}: name another file") from None
        print(out)
    return 0


if __name__ == "__main__":
    cli(main)
