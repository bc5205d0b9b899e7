"""The folder of a run: its log, what becomes of an earlier run, profiles; and what a run borrows of its process:
signals, streams, the folder's lock. Its checkpoints: checkpoints.py.

log.jsonl has a header for every start, then a JSON object a line, each with its `kind`: header, step, layers, skipped,
unsaved, evaluation, final, stopped.
"""

import contextlib
import filecmp
import json
import math
import os
import platform
import shlex
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd import DeviceType

from checkpoints import Progress
from configurator import UserError, command, say
from files import (
    RUN_FILES,
    Lock,
    check_regular,
    reason,
    remedy,
    remove_leftovers,
    saved_file,
    second_name,
    write_text,
)
from generate import longest_text
from machine import compiling, git_hash, sync
from model import Hydra
from parallel import Ranks, is_first, launched

WARM_UP = 3  # steps before a profile begins
LONGEST_SAMPLE = 200  # tokens, of the command that a run ends with
MAX_BAD = 10  # steps in a row without a finite loss and gradient, after which a run ends
LONGEST = 1 << 20  # bytes of a log's line
NUMBERS = ("loss", "val_loss", "val_bpb", "lr")  # of records, or null


# ---- what a run borrows of its process

class Stopped(KeyboardInterrupt):
    """The run is to leave, and there is nothing to wait for: what it has saved is whole."""


class Session:
    """What a run borrows of its process and gives back, however it ends: signals and its folder's lock. In another
    thread than the main one it goes without signals.

    SIGINT, SIGTERM, SIGHUP and a reader of its output that has gone away ask it to save and leave behind the step; a
    signal for the second time does not wait. SIGUSR1 asks it to save and go on. Where nothing is to be saved, in
    preparation and evaluations, a signal is obeyed at once. Of several processes: between batches of an evaluation; and
    before the first step the signals do what they do to every process, which may wait for the others there."""

    def __init__(self):
        self.stop: list[int] = []  # the signals that ask it to leave
        self.save: list[int] = []  # the signals that ask it to save
        self.lock = Lock()
        self.farewell = "stopped before the first step: no file of a run was changed"
        self.at_once = False  # a signal raises Stopped
        self.earlier: dict[int, object] = {}  # signal handlers

    def __enter__(self) -> "Session":
        if not launched():
            self.listen()
            self.at_once = True
        return self

    def __exit__(self, *error: object) -> None:
        self.at_once = False
        for signum, handler in self.earlier.items():
            signal.signal(signum, handler)
        self.lock.release()

    @property
    def code(self) -> int:
        """Of a run that was stopped, by the signals' convention."""
        return 128 + (self.stop or [signal.SIGINT])[0]

    def take(self, out: Path) -> None:
        """Have the run's folder for oneself, which rank 0 has for all; UserError where another process has it."""
        if is_first():
            self.lock.take(out)

    def listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            handler = signal.getsignal(signum)
            if handler is None or (signum == signal.SIGHUP and handler == signal.SIG_IGN):
                continue  # one that Python could not give back; nohup's
            self.earlier[signum] = handler
            signal.signal(signum, self.hear)

    def hear(self, signum: int, frame: object) -> None:
        """The signal handler."""
        if signum == signal.SIGUSR1:
            self.save.append(signum)
            tell("saving after this step")
            return
        if signum in self.stop:
            raise KeyboardInterrupt
        self.stop.append(signum)
        if compiling():
            tell("stopping when this compilation is done (once more: at once, unsaved)")
        elif self.at_once:
            self.at_once = False  # another signal must not disturb what is cleaned up now
            raise Stopped
        else:
            tell("stopping after this step (once more: at once, unsaved)")

    def begin(self) -> None:
        """From here on there are files of a run."""
        self.at_once = False
        if launched():
            self.listen()
        elif self.stop:
            raise Stopped

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """Around what a signal may break off, in a single process."""
        if not launched():
            if self.stop:
                raise Stopped
            self.at_once = True
        try:
            yield
        finally:
            self.at_once = False

    def say(self, text: str, error: bool = False) -> None:
        """Print a line of the run."""
        if not say(text, error):
            self.stop.append(signal.SIGPIPE)


def tell(text: str) -> None:
    """A line for people, from a signal handler, where print is not safe."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode() + b"\n")


# ---- an earlier run in the folder

def run_files(out: Path) -> list[Path]:
    """The files and folders of the run in a folder, last.pt first."""
    return [path for pattern in RUN_FILES for path in sorted(out.glob(pattern))]


def numbered(out: Path) -> list[Path]:
    """The folders of runs that were set aside, the latest first."""
    found = [path for path in out.glob("run-*") if path.name[4:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[4:]), reverse=True)


def link(path: Path, other: Path) -> None:
    """`second_name` for a file, or for each file below a folder; a symbolic link is made again."""
    if path.is_symlink():
        os.symlink(os.readlink(path), other)
    elif path.is_dir():
        os.mkdir(other)
        for below in path.iterdir():
            link(below, other / below.name)
    else:
        second_name(path, other)


def is_same(path: Path, other: Path) -> bool:
    """Whether `link` has made `other` of `path`, and nobody has changed one of them."""
    if path.is_dir() and not path.is_symlink():
        return other.is_dir() and all(is_same(below, other / below.name) for below in path.iterdir())
    if not path.is_file() or not other.is_file():
        return False
    return path.samefile(other) or filecmp.cmp(path, other, shallow=False)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)


def kept_aside(out: Path) -> Path | None:
    """The folder that has all of the run in `out`, or of what is left of it: setting it aside was interrupted."""
    old = run_files(out)
    return next((folder for folder in numbered(out) if all(is_same(path, folder / path.name) for path in old)), None)


def set_aside(out: Path) -> str:
    """Move an earlier run's files into a numbered folder of OUT_DIR, so that a new run overwrites nothing. Whenever it
    is interrupted, the whole run is in OUT_DIR or in that folder: the files get a second name in a hidden folder, which
    is renamed, and lose the first one, last.pt before the others."""
    for leftover in out.glob(".hydra-*.aside"):
        shutil.rmtree(leftover, ignore_errors=True)
    old = run_files(out)
    if not old:
        return ""
    folder = kept_aside(out)
    if folder is None:
        latest = numbered(out)
        folder = out / f"run-{int(latest[0].name[4:]) + 1 if latest else 1}"
        hidden = out / f".hydra-{uuid.uuid4().hex}.aside"
        os.mkdir(hidden)
        try:
            for path in old:
                link(path, hidden / path.name)
            os.rename(hidden, folder)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    for path in old:
        remove(path)
    return f"{out} held a run: its files are in {folder} now (--resume would have continued it)"


def check_resumable(out: Path, path: Path) -> None:
    """UserError where a file of the run in `out`, which is to go on from the checkpoint `path`, is a folder, a pipe or
    a device, or where there is nothing to go on from, but in a folder that a run was set aside to."""
    if path.parent.resolve() == out.resolve():  # else what is in `out` is set aside
        for file in run_files(out):
            if not file.match("shards-*") and os.path.exists(file):
                check_regular(file)
    if path != out / "last.pt" or path.exists() or (any(out.glob("*.pt")) and not kept_aside(out)):
        return
    for folder in numbered(out):
        if (folder / "last.pt").is_file():
            raise UserError(f"{out / 'last.pt'} does not exist, the latest run of this folder was set aside: go on "
                            f"with it: {command('train.py', '--resume', out_dir=folder)}")  # fmt: skip


# ---- the next command

def resume_command(run, ranks: Ranks) -> str:
    """How the run goes on from its last.pt; or that it cannot."""
    if not Path(run.out_dir, "last.pt").exists():
        return "begin it again"
    if ranks.size > 1:
        return f"go on with the same torchrun line and --resume {shlex.quote(f'--out_dir={run.out_dir}')}"
    return f"go on with: {command('train.py', '--resume', out_dir=run.out_dir)}"


def sample_command(model: Hydra, enc, out_dir: str) -> str:
    """What samples the run's best checkpoint, or its last one; empty where there is none, or no text of its ids, or
    where its block has no room for a token behind a prompt."""
    saved = [name for name in ("best", "last") if Path(out_dir, f"{name}.pt").exists()]
    if not saved or not enc:
        return ""
    given: dict[str, int | str] = {"out_dir": out_dir}
    if saved[0] != "best":
        given["checkpoint"] = saved[0]
    room = longest_text(model)
    for prompt in ("import", ""):  # an empty one is an end of text
        free = room - max(1, len(enc.encode_ordinary(prompt)))
        if free > 0:
            return command("sample.py", **given, prompt=prompt, max_new_tokens=min(LONGEST_SAMPLE, free))
    return ""


# ---- the log

def log_lines(path: Path) -> Iterator[bytes]:
    """Its lines; one that is far too long is cut."""
    with path.open("rb") as file:
        while line := file.readline(LONGEST):
            rest = line
            while len(rest) == LONGEST and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST)
            yield line


def read_record(line: bytes) -> dict | None:
    """A record of a log; None where the line is none."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):  # it was cut, is no UTF-8, no JSON, or nothing but brackets
        return None
    if not isinstance(record, dict) or type(record.get("step", 0)) is not int:
        return None
    numbers = [record[name] for name in NUMBERS if record.get(name) is not None]
    if not all(type(number) in (int, float) and abs(number) < math.inf for number in numbers):
        return None
    return None if record.get("best") and not (record.get("val_loss") or 0) > 0 else record


def truncate_log(path: Path, step: int, evaluates: bool) -> tuple[float, int]:
    """Drop the records that a run resumed at `step` writes again: later steps and, if it `evaluates` at once, that
    step's evaluations. Returns the lowest validation loss of the others, which no checkpoint needs to have seen, and
    how many lines were dropped since they cannot be read."""
    best, unreadable = math.inf, 0
    with saved_file(path) as file:
        for line in log_lines(path) if path.exists() else ():
            record = read_record(line)
            if record is None:
                unreadable += bool(line.strip())
                continue
            first = step if evaluates and "val_loss" in record else step + 1
            if record.get("step", 0) < first:
                file.write(line.strip() + b"\n")
                if record.get("best"):
                    best = record["val_loss"]  # those only fall
    return best, unreadable


def losses(found: dict) -> str:
    """An evaluation in words: without bits per byte where the tokens' bytes are not known."""
    text = f"{found['val_loss']:.4f} nats/token"
    return f"{text}, {found['val_bpb']:.4f} bits/byte" if "val_bpb" in found else text


def for_json(value: object) -> object:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {name: for_json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [for_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def layer_of(parameter: str) -> str:
    """The layer that a parameter of this name is in: blocks.0, blocks.1, .., embed, norm, recursion_routers."""
    return ".".join(parameter.split(".")[: 2 if parameter.startswith("blocks.") else 1])


class RunLog:
    """log.jsonl, line by line; lines for people are said too. Without a path, of another rank, it goes nowhere."""

    def __init__(self, path: Path | None, say: Callable[..., object] = say):
        self.path, self.say = path, say
        self.file = open(path or os.devnull, "ab", buffering=0)
        self.warned = False

    def start(self, step: int, resumed: bool, facts: dict) -> None:
        """The header: what was run, and with what."""
        versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
        self.write("header", {"resumed_at" if resumed else "started": step, **facts, "git": git_hash(), **versions})

    def write(self, kind: str, record: dict) -> None:
        """A record. One that cannot be written, on a full disk, is lost as a whole, and the first such one is said."""
        line = json.dumps({"kind": kind, **for_json(record)}, allow_nan=False).encode() + b"\n"
        size = os.fstat(self.file.fileno()).st_size
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(size)
            if not self.warned:
                self.say(f"WARNING: cannot write to {self.path} ({reason(error)}): the run goes on without these lines")
            self.warned = True

    def skipped(self, step: int, skipped: int, problem: str) -> None:
        """A step without an update, `skipped` of them so far."""
        self.write("skipped", {"step": step, "skipped": problem})
        text = problem if problem.startswith("spike") else f"{problem} is not finite"
        self.say(f"step {step:5d} | {text}: update skipped ({skipped} so far)")

    def unsaved(self, step: int, problem: str, kept: str) -> None:
        """A step that is not fit to be saved."""
        self.write("unsaved", {"step": step, "unsaved": problem})
        self.say(f"step {step:5d} | {problem} is not finite: not saved, {kept}")

    def layers(self, step: int, norms: dict[str, float]) -> None:
        """The norm of each layer's gradient in a step, before the clip, by the `norms` of the parameters'. Their
        squares add up to that of its grad_norm."""
        squares: dict[str, float] = {}
        for name, norm in norms.items():
            squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + norm * norm
        layers = {name: math.sqrt(square) for name, square in squares.items()}
        self.write("layers", {"step": step, "layers": layers})

    def evaluation(self, record: dict) -> None:
        self.write("evaluation", record)
        best = " (best)" if record["best"] else ""
        self.say(f"step {record['step']:5d} | validation {losses(record)}{best}")

    def give_up(self, step: int, message: str, kept: str) -> int:
        """The run's last record; its exit code."""
        self.write("stopped", {"step": step, "stopped": message})
        if self.path:
            self.say(f"error: {message}; {kept}: lower --learning_rate", error=True)
        return 1

    def final(self, record: dict, batches: int, seconds: float, sampling: str) -> None:
        """The number to compare, of so many `batches`, 0 = all; and the command that samples the run, if there is.
        Behind them the record itself, one JSON object, for programs."""
        self.write("final", record | {"final": True})
        part = f"{batches} batches of the" if batches else "whole"
        text = f"{part} validation split: {losses(record)}; "
        text += f"{seconds:.0f} s in all, at most {record['peak_memory'] / 1e6:,.0f} MB of memory"
        if sampling:
            text += f"; sample it with: {sampling}"
        self.say(text)
        self.say(json.dumps(for_json(record), allow_nan=False))

    def step(self, steps: float, record: dict, routing: dict[str, float]) -> None:
        """A step of `steps` in all, which seconds make an expectation."""
        self.write("step", record | routing)
        text = ("step {step:5d} | {done:4.0%} | loss {loss:.4f} | lr {lr:.2e} | norm {grad_norm:.2f} | "
                "clipped {clipped:4.0%} | {ms:.0f} ms | {tokens_per_s:,.0f} tokens/s | "
                "MFU {shares[0]}, by 6N {shares[1]}")  # fmt: skip
        shares = ["n/a" if record[name] is None else f"{record[name]:.0%}" for name in ("mfu", "mfu_6n")]
        text = text.format(done=record["step"] / steps, shares=shares, **record)
        for name, value in routing.items():
            text += f" | {name} {value:.3f}"
        self.say(f"{text} | ETA {clock(record['eta_s'])}")


def settle(steps: list[NamedTuple], run, progress: Progress, log: RunLog) -> tuple[dict, dict]:
    """Read what the latest steps (`train.Step`) of a run (a TrainConfig) did, which waits for them; count them in
    `progress`, log the skipped ones and, where that was asked for, the layers' norms. Returns the last one's loss and
    grad_norm, and its routing."""
    names, routing = list(steps[-1].norms), steps[-1].routing
    width = 3 + len(names)
    values = [v for step in steps for v in (step.loss, step.grad_norm, step.updated, *step.norms.values())]
    numbers = torch.stack([*values, *routing.values()]).tolist()  # the only sync point of a run's steps
    for i in range(len(steps)):
        loss, grad_norm, updated, *norms = numbers[i * width : (i + 1) * width]
        step = progress.step - len(steps) + i + 1
        if run.log_layers and step % run.log_layers == 0:
            log.layers(step, dict(zip(names, norms, strict=True)))
        if updated:
            if progress.streak < MAX_BAD:  # else the run ends, whatever came behind them
                progress.streak = 0
            progress.counted += 1
            if 0 < run.grad_clip < grad_norm:
                progress.clipped += 1
            continue
        progress.skipped += 1
        progress.streak += 1
        problem = "loss"
        if math.isfinite(loss) and math.isfinite(grad_norm):
            problem = f"spike of the loss to {loss:.4f}"
        elif math.isfinite(loss):
            bad = [name for name, norm in zip(names, norms, strict=True) if not math.isfinite(norm)]
            problem = f"gradient of {bad[0] if bad else 'all parameters together'}"
        log.skipped(step, progress.skipped, problem)
    routing = dict(zip(routing, numbers[len(steps) * width :], strict=True))
    steps.clear()
    return {"loss": loss, "grad_norm": grad_norm}, routing


class Profile:
    """What `steps` training steps spend their time on, behind some of warm-up: a chrome trace (trace.json, for
    ui.perfetto.dev), on CUDA the allocations too (memory.pickle, for pytorch.org/memory_viz), in the run's folder; and
    a table of the ten operations that take most. Of 0 steps: nothing."""

    def __init__(self, steps: int, out: Path, device: torch.device, say: Callable[..., object] = say):
        self.say = say
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
        """Behind the last step, of the profile or of the run: write and say what there is. That it cannot be written is
        no reason to end the run."""
        profiler, self.profiler, self.left = self.profiler, None, 0
        if profiler is None:
            return
        sync(self.device)
        profiler.stop()
        try:
            with saved_file(self.out / "trace.json") as file:
                profiler.export_chrome_trace(str(file.name))
            if self.device.type == "cuda":
                with saved_file(self.out / "memory.pickle") as file:
                    torch.cuda.memory._dump_snapshot(str(file.name))
        except UserError as error:
            self.say(f"WARNING: {error}")
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)
        found, kind = profiler.key_averages(), "self_cpu_time_total"
        if self.device.type == "cuda":  # kernels alone: an operator's entry repeats the time of its kernels
            found, kind = [it for it in found if it.device_type == DeviceType.CUDA], "self_device_time_total"
        found = sorted(found, key=lambda it: getattr(it, kind), reverse=True)
        total = max(1, sum(getattr(it, kind) for it in found))  # of nothing, where a container hides the device's times
        self.say(f"{self.taken} steps profiled, see {self.out / 'trace.json'}; what took most time of its own on "
                 f"{self.device}, a step:")  # fmt: skip
        for it in found[:10]:
            own, calls = getattr(it, kind), it.count / self.taken
            self.say(f"{own / total:7.1%} {own / self.taken / 1e3:10.2f} ms {calls:8.0f} calls  {it.key}")


def open_folder(out: Path, toml: str, resumed_at: int | None, evaluates: bool, ranks: Ranks,
                session: Session) -> tuple[RunLog, str, float]:  # fmt: skip
    """The run's log, what became of an earlier run, and the lowest validation loss so far; UserError where the folder
    cannot be written, or another process has it. Rank 0 does it, the others get a log that goes nowhere."""
    if ranks.rank > 0:
        return RunLog(None, session.say), "", ranks.first(None)
    said = ""
    best = math.inf
    try:
        out.mkdir(parents=True, exist_ok=True)
        session.take(out)
        remove_leftovers(out)
        if resumed_at is None:
            said = set_aside(out)
        else:
            best, unreadable = truncate_log(out / "log.jsonl", resumed_at, evaluates)
            if unreadable:
                said = f"WARNING: {out / 'log.jsonl'}: {unreadable} lines could not be read and were dropped"
        write_text(out / "config.toml", toml)
        log = RunLog(out / "log.jsonl", session.say)
    except OSError as error:
        raise UserError(f"out_dir={str(out)!r}: {reason(error)}: {remedy(error)}") from error
    return log, said, ranks.first(best)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def aligned(lines: list[list[str]]) -> Iterator[str]:
    """Cells in columns, to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
