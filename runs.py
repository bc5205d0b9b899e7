"""The folder of a run: its log, what becomes of an earlier run, signals, profiles. Its checkpoints: checkpoints.py.

log.jsonl has a header for every start, then a JSON object a line.
"""

import json
import math
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd import DeviceType

from checkpoints import Progress
from configurator import UserError
from files import saved_file, write_text
from machine import sync
from parallel import Ranks

FILES = ("last.pt", "best.pt", "log.jsonl", "config.toml", "trace.json", "memory.pickle")  # the last two: profiles
WARM_UP = 3  # steps before a profile begins
MAX_BAD = 10  # steps in a row without a finite loss and gradient, after which a run ends


def set_aside(out: Path) -> str:
    """Move an earlier run's files into a numbered folder of OUT_DIR, so that a new run overwrites nothing."""
    old = [out / name for name in FILES if (out / name).exists()] + [*out.glob("shards-*")]
    if not old:
        return ""
    number = 1
    while (out / f"run-{number}").exists():
        number += 1
    folder = out / f"run-{number}"
    folder.mkdir()
    for path in old:
        path.rename(folder / path.name)
    return f"{out} held a run: its files are in {folder} now (--resume would have continued it)"


def truncate_log(path: Path, step: int, evaluates: bool) -> float:
    """Drop the records that a run resumed at `step` writes again: later steps and, if it `evaluates` at once, that
    step's evaluations. Returns the lowest validation loss of the others, which no checkpoint needs to have seen."""
    kept = ""
    best = math.inf
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            record = dict(json.loads(line))
        except (ValueError, TypeError):  # it was cut
            continue
        first = step if evaluates and "val_loss" in record else step + 1
        if record.get("step", 0) < first:
            kept += line + "\n"
            if record.get("best"):
                best = record["val_loss"]  # those only fall
    write_text(path, kept)
    return best


def losses(found: dict) -> str:
    """An evaluation in words: without bits per byte where the tokens' bytes are not known."""
    text = f"{found['val_loss']:.4f} nats/token"
    return f"{text}, {found['val_bpb']:.4f} bits/byte" if "val_bpb" in found else text


class RunLog:
    """log.jsonl, line by line; lines for people are printed too. Without a path, of another rank, it goes nowhere."""

    def __init__(self, path: Path | None):
        self.file = open(path or os.devnull, "a", encoding="utf-8", buffering=1)
        self.errors = sys.stderr if path else self.file

    def start(self, step: int, resumed: bool, facts: dict) -> None:
        """The header: what was run, and with what."""
        versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
        self.write({"resumed_at" if resumed else "started": step, **facts, "git": git_hash(), **versions})

    def write(self, record: dict) -> None:
        """A record; JSON has no NaN, so numbers that are not finite become null."""
        entry = dict(record)
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                entry[name] = None
        self.file.write(json.dumps(entry, allow_nan=False) + "\n")

    def skipped(self, step: int, skipped: int, problem: str) -> None:
        """A step without an update, `skipped` of them so far."""
        self.write({"step": step, "skipped": problem})
        print(f"step {step:5d} | {problem} is not finite: update skipped ({skipped} so far)", flush=True)

    def evaluation(self, record: dict) -> None:
        self.write(record)
        best = " (best)" if record["best"] else ""
        print(f"step {record['step']:5d} | validation {losses(record)}{best}", flush=True)

    def give_up(self, step: int, message: str, kept: str) -> int:
        """The run's last record; its exit code."""
        self.write({"step": step, "stopped": message})
        print(f"error: {message}; {kept}: lower --learning_rate", file=self.errors, flush=True)
        return 1

    def final(self, record: dict, batches: int, seconds: float, out_dir: str) -> None:
        """The number to compare, of so many `batches`, 0 = all."""
        self.write(record | {"final": True})
        part = f"{batches} batches of the" if batches else "whole"
        text = f"{part} validation split: {losses(record)}; "
        text += f"{seconds:.0f} s in all, at most {record['peak_memory'] / 1e6:,.0f} MB of memory"
        if record["step"] and "val_bpb" in record:  # else its ids have no text
            text += f"; sample it with: python sample.py --out_dir={out_dir} --prompt=import"
        print(text, flush=True)

    def step(self, steps: float, record: dict, routing: dict[str, float]) -> None:
        """A step of `steps` in all, which seconds make an expectation."""
        self.write(record | routing)
        text = ("step {step:5d} | {done:4.0%} | loss {loss:.4f} | lr {lr:.2e} | norm {grad_norm:.2f} | "
                "clipped {clipped:4.0%} | {ms:.0f} ms | {tokens_per_s:,.0f} tokens/s | "
                "MFU {mfu:.0%}, by 6N {mfu_6n:.0%}")  # fmt: skip
        text = text.format(done=record["step"] / steps, **record)
        for name, value in routing.items():
            text += f" | {name} {value:.3f}"
        minutes, seconds = divmod(int(record["eta_s"]), 60)
        print(f"{text} | ETA {minutes}:{seconds:02d}", flush=True)


def settle(steps: list[NamedTuple], grad_clip: float, progress: Progress, log: RunLog) -> tuple[dict, dict]:
    """Read what the latest steps (`train.Step`) did, which waits for them; count them in `progress` and log the skipped
    ones. Returns the last one's loss and grad_norm, and its routing."""
    names, routing = list(steps[-1].norms), steps[-1].routing
    width = 2 + len(names)
    values = [v for step in steps for v in (step.loss, step.grad_norm, *step.norms.values())]
    numbers = torch.stack([*values, *routing.values()]).tolist()  # the only sync point of a run's steps
    for i in range(len(steps)):
        loss, grad_norm, *norms = numbers[i * width : (i + 1) * width]
        if math.isfinite(loss) and math.isfinite(grad_norm):
            if progress.streak < MAX_BAD:  # else the run ends, whatever came behind them
                progress.streak = 0
            progress.counted += 1
            if 0 < grad_clip < grad_norm:
                progress.clipped += 1
            continue
        progress.skipped += 1
        progress.streak += 1
        problem = "loss"
        if math.isfinite(loss):
            bad = [name for name, norm in zip(names, norms, strict=True) if not math.isfinite(norm)]
            problem = f"gradient of {bad[0] if bad else 'all parameters together'}"
        log.skipped(progress.step - len(steps) + i + 1, progress.skipped, problem)
    routing = dict(zip(routing, numbers[len(steps) * width :], strict=True))
    steps.clear()
    return {"loss": loss, "grad_norm": grad_norm}, routing


class Profile:
    """What `steps` training steps spend their time on, behind some of warm-up: a chrome trace (trace.json, for
    ui.perfetto.dev), on CUDA the allocations too (memory.pickle, for pytorch.org/memory_viz), in the run's folder; and
    a table of the ten operations that take most. Of 0 steps: nothing."""

    def __init__(self, steps: int, out: Path, device: torch.device):
        self.left, self.warm_up = steps, WARM_UP
        self.out, self.device = out, device
        self.profiler: torch.profiler.profile | None = None
        self.taken = 0

    def step(self) -> None:
        """Before a training step."""
        if self.left and self.warm_up:
            self.warm_up -= 1
        elif self.left:
            if self.profiler is None:
                sync(self.device)
                if self.device.type == "cuda":
                    torch.cuda.memory._record_memory_history(max_entries=10**6)
                self.profiler = torch.profiler.profile()  # of the CPU and of what else there is
                self.profiler.start()
            self.left -= 1
            self.taken += 1
        elif self.profiler:
            self.finish()

    def finish(self) -> None:
        """Behind the last step, of the profile or of the run: write and print what there is."""
        profiler, self.profiler, self.left = self.profiler, None, 0
        if profiler is None:
            return
        sync(self.device)
        profiler.stop()
        with saved_file(self.out / "trace.json") as file:
            profiler.export_chrome_trace(str(file.name))
        if self.device.type == "cuda":
            with saved_file(self.out / "memory.pickle") as file:
                torch.cuda.memory._dump_snapshot(str(file.name))
            torch.cuda.memory._record_memory_history(enabled=None)
        found, kind = profiler.key_averages(), "self_cpu_time_total"
        if self.device.type == "cuda":  # kernels alone: an operator's entry repeats the time of its kernels
            found, kind = [it for it in found if it.device_type == DeviceType.CUDA], "self_device_time_total"
        found = sorted(found, key=lambda it: getattr(it, kind), reverse=True)
        total = max(1, sum(getattr(it, kind) for it in found))  # of nothing, where a container hides the device's times
        print(f"{self.taken} steps profiled, see {self.out / 'trace.json'}; what took most time of its own on "
              f"{self.device}, a step:")  # fmt: skip
        for it in found[:10]:
            own, calls = getattr(it, kind), it.count / self.taken
            print(f"{own / total:7.1%} {own / self.taken / 1e3:10.2f} ms {calls:8.0f} calls  {it.key}", flush=True)


def open_folder(out: Path, toml: str, resumed_at: int | None, evaluates: bool,
                ranks: Ranks) -> tuple[RunLog, str, float]:  # fmt: skip
    """The run's log, what became of an earlier run, and the lowest validation loss so far; UserError where the folder
    cannot be written. Rank 0 does it, the others get a log that goes nowhere."""
    if ranks.rank > 0:
        return RunLog(None), "", ranks.first(None)
    aside = ""
    best = math.inf
    try:
        out.mkdir(parents=True, exist_ok=True)
        if resumed_at is None:
            aside = set_aside(out)
        else:
            best = truncate_log(out / "log.jsonl", resumed_at, evaluates)
        write_text(out / "config.toml", toml)
        log = RunLog(out / "log.jsonl")
    except OSError as error:
        raise UserError(f"out_dir={str(out)!r}: {error.strerror}: choose a folder that can be written") from error
    return log, aside, ranks.first(best)


def stop_on_signals() -> list[int]:
    """A list that SIGINT and SIGTERM add themselves to; a second one does not wait for the step to end."""
    stop: list[int] = []

    def ask_to_stop(signum: int, frame: object) -> None:
        signal.signal(signum, signal.default_int_handler)
        stop.append(signum)
        os.write(2, b"stopping after this step (once more: at once, unsaved)\n")  # print is not safe in a handler

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, ask_to_stop)
    return stop


def git_hash() -> str:
    """The commit of this code, "unknown" outside of a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
