"""What keeps training stable: `python diagnose.py stability [config/x.toml] [--key=value ...]`, real runs of train.py.

An older report says that this trunk trains only after four fixes. Its model before them, after them, and with each of
them alone, at a usual learning rate and at one that is `high` times as large: loss, the gradient's norm before the clip
by layer, the fraction of steps that are clipped, divergences. Nothing is asserted: the table shows what happens.
- gain: CCQA's QK-mean coupling at 0.25, before at 0.5 (the paper's).
- norm: the norms behind the mixing of CCQA's queries and keys and behind the merged heads; before none of both
  (pre_out_norm is one switch for all letters, the report had the second one in MLA).
- alpha: attention's residual line scaled by letter, 0.5 for CCQA and MLA; before 1 for all.
- clip: the gradient clipped to a norm; before not at all.
The runs are in OUT_DIR/VARIANT/rate-R/seed-S (trials.py): a measurement that was stopped goes on where it was. The
default shape is a small one of all letters; files and options change it for all variants alike.
Left out: the report's own sizes, precision and initialisation.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median

import torch

from configurator import AnyPath, build, need, need_file, to_toml
from data import token_bytes, tokenizer_hash
from files import write_text
from machine import cores
from model import Hydra, HydraConfig
from probes import described, split_options
from schedule import planned_steps, step_work
from train import TrainConfig, make_optimizer, read_corpus, train_step
from trials import UNITS, Outcome, Team, Text, Trial, open_log, outcome_of, records_of

SHAPE = {"dim": 128, "n_head": 4, "n_kv_head": 2, "n_layer": 8, "block_size": 128, "mlp_ratio": 2.0}
RUN = {"batch_size": 4, "max_iters": 300, "warmup_iters": 30, "learning_rate": 1.4e-3, "eval_iters": 1,
       "final_eval_iters": 32, "log_interval": 10, "log_layers": 10, "dtype": "float32", "compile": "off",
       "out_dir": "out_stability"}  # fmt: skip
BEFORE = {"qk_gain": 0.5, "ccqa_norm": False, "pre_out_norm": False, "alpha": "one", "grad_clip": 0.0}
FIXES = {"gain": ("qk_gain",), "norm": ("ccqa_norm", "pre_out_norm"), "alpha": ("alpha",), "clip": ("grad_clip",)}
UNREAD = {"resume", "plan", "profile", "eval_interval", "sample_tokens", "keep_every", "keep_last"}


@dataclass(frozen=True)
class StabilityConfig:
    """A measurement of stability; raises UserError, in one line, for values that cannot be."""

    high: float = 30.0  # the high learning rate is so many times learning_rate
    seeds: int = 1  # runs of each variant at each rate, with the seeds `seed`, `seed` + 1, ..
    jobs: int = 2  # runs at a time, at most one for each core
    json: AnyPath = ""  # file of the result, empty: stability.json in out_dir

    def __post_init__(self):
        for name in ("seeds", "jobs"):
            need(self, name, getattr(self, name) >= 1, "it must be at least 1")
        need(self, "high", 1 < self.high <= 1e6, "choose a factor above 1 and at most a million")
        need_file(self, "json")


def variants() -> dict[str, dict]:
    """What each one changes: before has none of the fixes, after has all."""
    found = {"before": BEFORE}
    for fix, names in FIXES.items():
        found[f"{fix} alone"] = {name: value for name, value in BEFORE.items() if name not in names}
    return found | {"after": {}}


def trials_of(given: dict, options: StabilityConfig) -> dict[tuple[str, float], list[Trial]]:
    """The runs of every variant at every rate."""
    found = {}
    for name, changes in variants().items():
        config, run = build(SHAPE | RUN | given | changes, HydraConfig, TrainConfig)
        usual = run.learning_rate
        for rate in (usual, float(f"{usual * options.high:.3g}")):
            found[name, rate] = []
            for seed in range(run.seed, run.seed + options.seeds):
                folder = Path(run.out_dir, name.replace(" ", "-"), f"rate-{rate:g}", f"seed-{seed}")
                changed = {"learning_rate": rate, "seed": seed, "out_dir": str(folder), "sample_tokens": 0,
                           "eval_interval": max(1, planned_steps(config, run))}  # fmt: skip
                work = planned_steps(config, run) * step_work(config, run)[1]
                found[name, rate].append(Trial(config, replace(run, **changed), work))
    return found


# ---- what the runs did

def seconds_of_step(trial: Trial) -> float:
    """Of one that is not the first, on random tokens."""
    torch.manual_seed(0)
    model = Hydra(trial.config)
    optimizer = make_optimizer(model, trial.run)
    shape = trial.run.batch_size, trial.config.block_size + 1
    text = torch.randint(trial.config.vocab_size, shape)
    batches = [(text[:, :-1], text[:, 1:])] * trial.run.gradient_accumulation_steps
    for _ in range(2):
        began = time.perf_counter()
        train_step(model, optimizer, batches, trial.run.grad_clip, torch.autocast("cpu", enabled=False))
    return time.perf_counter() - began


def found_in(records: list[dict], measure: str, outcome: Outcome) -> dict:
    """A run by its log. It has diverged where its loss is not finite in the end, or not below that of its start."""
    layers = [record for record in records if record["kind"] == "layers"]
    lines = [record for record in records if record["kind"] == "step"]
    start = next(record[measure] for record in records if record["kind"] == "evaluation")
    names = layers[0]["layers"] if layers else {}
    since = [after["step"] - before["step"] for before, after in zip([{"step": 0}, *lines], lines, strict=False)]
    clipped = [record["clipped"] * steps for record, steps in zip(lines, since, strict=True)]  # steps of each line
    return {"loss": outcome.loss, "start": start,
            "diverged": outcome.loss is None or start is None or outcome.loss >= start,
            "skipped": sum(record["kind"] == "skipped" for record in records),
            "clipped": sum(clipped) / max(1, sum(since)),
            "losses": [[record["step"], record["loss"]] for record in lines],
            "steps": [record["step"] for record in layers],
            "norms": {name: [record["layers"][name] for record in layers] for name in names}}  # fmt: skip


def norms_of(run: dict) -> list[float]:
    """The norm of the whole gradient, where those of all layers are finite."""
    steps = zip(*run["norms"].values(), strict=True)
    return [math.hypot(*layers) for layers in steps if None not in layers]


def row_of(name: str, rate: float, runs: list[dict]) -> dict:
    """What the seeds' runs of a variant at a rate say together."""
    ended = [run["loss"] for run in runs if run["loss"] is not None]
    norms = [norm for run in runs for norm in norms_of(run)]
    largest = {layer: max((norm for run in runs for norm in run["norms"][layer] if norm is not None), default=None)
               for layer in runs[0]["norms"]}  # fmt: skip
    return {"variant": name, "rate": rate, "runs": len(runs), "diverged": sum(run["diverged"] for run in runs),
            "loss": fmean(ended) if ended else None, "skipped": sum(run["skipped"] for run in runs),
            "clipped": fmean(run["clipped"] for run in runs), "median_norm": median(norms) if norms else None,
            "largest_norm": max(norms, default=None), "largest_of_layers": largest}  # fmt: skip


COLUMNS = {"rate": "{:g}", "loss": "{:.4f}", "diverged": "{}", "skipped": "{}", "clipped": "{:.0%}",
           "median_norm": "{:.2f}", "largest_norm": "{:.2f}"}  # fmt: skip


def stability_table(rows: list[dict]) -> Iterator[str]:
    """Its lines, then the largest norms by layer; what does not exist is a dash."""
    yield f"{'variant':>12}" + "".join(f"{name.replace('_', ' '):>14}" for name in COLUMNS)
    for row in rows:
        cells = ["-" if row[name] is None else text.format(row[name]) for name, text in COLUMNS.items()]
        yield f"{row['variant']:>12}" + "".join(f"{cell:>14}" for cell in cells)
    yield "largest norm by layer, before the clip"
    layers = list(rows[0]["largest_of_layers"])
    yield f"{'variant':>12}{'rate':>8}" + "".join(f"{layer.removeprefix('blocks.'):>8}" for layer in layers)
    for row in rows:
        cells = ["-" if norm is None else f"{norm:.3g}" for norm in row["largest_of_layers"].values()]
        yield f"{row['variant']:>12}{row['rate']:>8g}" + "".join(f"{cell:>8}" for cell in cells)


def main(argv: list[str]) -> int:
    """`diagnose.py stability` -> its exit code."""
    given, own = split_options(argv, StabilityConfig, SHAPE | RUN, UNREAD, "stability", __doc__)
    (options,) = build(own, StabilityConfig)
    trials = trials_of(given, options)
    every = [trial for seeds in trials.values() for trial in seeds]
    usual = every[0].run
    need(usual, "learning_rate", usual.learning_rate > 0, "there is nothing to be high beside: set one")
    need(usual, "max_iters", planned_steps(every[0].config, usual) > 0, "nothing would be trained: ask for more")
    out = Path((RUN | given)["out_dir"])
    jobs = min(options.jobs, cores())
    torch.set_num_threads(1)  # as the runs have it
    corpus = read_corpus(every[0].config, every[0].run)
    text = Text(corpus.fingerprint, {every[0].run.tokenizer: tokenizer_hash(corpus.enc)})
    measure = "val_bpb" if token_bytes(corpus.enc, every[0].config.vocab_size).any() else "val_loss"
    head = described("stability", *argv) | {
        "corpus": corpus.description, "fingerprint": corpus.fingerprint, "measure": UNITS[measure],
        "config": asdict(every[0].config) | asdict(every[0].run), "variants": variants()}  # fmt: skip
    with open_log(out) as log:
        write_text(out / "config.toml", to_toml(options))
        missing = [trial for trial in every
                   if not outcome_of(records_of(trial, text), measure)]  # fmt: skip
        if missing:
            seconds = seconds_of_step(missing[0]) * planned_steps(missing[0].config, missing[0].run) * len(missing)
            print(f"{corpus.description}\n{len(missing)} of {len(every)} runs of train.py, {jobs} at a time: "
                  f"{seconds / jobs / 60:.1f} min, about, as a step takes here", flush=True)  # fmt: skip
        team = Team(out, jobs, text, measure, False, log)
        try:
            with team:
                team.expect(every)
                outcomes = team.make(every)
        except KeyboardInterrupt:
            print(f"stopped: {len(team.ended)} of {team.expected} runs have ended; to go on: {head['command']}")
            return 130
    runs: dict[tuple, list[dict]] = {}
    for (name, rate), seeds in trials.items():
        found = [found_in(records_of(trial, text), measure, outcomes.pop(0)) for trial in seeds]
        runs[name, rate] = found
    rows = [row_of(name, rate, found) for (name, rate), found in runs.items()]
    path = Path(options.json or out / "stability.json")
    of_runs = [{"variant": name, "rate": rate, "runs": found} for (name, rate), found in runs.items()]
    write_text(path, json.dumps({"subject": "stability", **head, "rows": rows, "runs": of_runs}, allow_nan=False))
    print(f"\nloss in {UNITS[measure]} on a part of the validation split, at the end; norms every "
          f"{every[0].run.log_layers} steps")  # fmt: skip
    print("\n".join(stability_table(rows)))
    print(json.dumps({"json": str(path), "rows": rows}, allow_nan=False))
    return 0
