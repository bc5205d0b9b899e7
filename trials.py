"""Runs of train.py in processes of their own, each on one thread; and what they have left in their folders.

Everything is read from the folders: a run that has ended is not trained again, one that was stopped goes on.
"""

import contextlib
import gc
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, fields
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

import train
from configurator import UserError, say
from files import locks, remedy
from model import HydraConfig
from runs import clock, log_lines, read_record
from train import TrainConfig

WHEREABOUTS = {"out_dir", "cache_dir"}  # options that make no difference to a run's numbers
UNITS = {"val_bpb": "bits/byte", "val_loss": "nats/token"}


class Trial(NamedTuple):
    """A run that is to be made."""

    config: HydraConfig
    run: TrainConfig
    work: float  # FLOPs, about; of a run alone, those of all workers in its time
    alone: bool = False  # no other beside it, since its seconds count
    seconds: float = 0.0  # of training, where they are known before; then there is no work

    @property
    def folder(self) -> Path:
        return Path(self.run.out_dir)


class Text(NamedTuple):
    """What a log says of the text that a run was trained on, besides its options."""

    fingerprint: str
    tokenizers: dict[str, str]  # hash of what --tokenizer names


class Outcome(NamedTuple):
    """What a run has come to. A loss that is not finite is None."""

    loss: float | None
    seconds: float  # of training
    steps: int
    curve: list[tuple[int, float, float | None]]  # (step, seconds, loss) of its evaluations


# ---- folders

def is_sound(record: dict) -> bool:
    """Whether what is read of a record is of its kind; a damaged one may be anything."""
    seconds = record.get("seconds", 0.0)
    return isinstance(record.get("config", {}), dict) and type(seconds) in (int, float) and 0 <= seconds < math.inf


def records_of(trial: Trial, text: Text) -> list[dict]:
    """The log in the run's folder, if it is of just this run on this text."""
    path = trial.folder / "log.jsonl"
    lines = log_lines(path) if path.is_file() else ()
    records = [record for record in map(read_record, lines) if record and is_sound(record)]
    wanted = asdict(trial.config) | asdict(trial.run)
    headers = [record for record in records if "config" in record]
    older = asdict(HydraConfig()) | asdict(TrainConfig())  # the options that a log does not have yet
    for header in headers:
        there = older | header["config"]
        differs = {name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)}
        tokenizer = text.tokenizers[trial.run.tokenizer]
        known = header.get("fingerprint"), header.get("tokenizer")
        if differs - WHEREABOUTS or known != (text.fingerprint, tokenizer):
            return []
    return records if headers else []


def outcome_of(records: list[dict], measure: str) -> Outcome | None:
    """By a run's log; None where it has not ended. `measure`: val_bpb or val_loss."""
    timed = [record for record in records if {"step", "seconds"} <= record.keys()]
    curve = [(r["step"], r["seconds"], r.get(measure)) for r in timed if "best" in r and r["step"] > 0]
    for record in reversed(records):
        if record.get("final") and record in timed:
            return Outcome(record.get(measure), record["seconds"], record["step"], curve)
        if "stopped" in record and "step" in record:
            return Outcome(None, curve[-1][1] if curve else 0.0, record["step"], curve)
    return None


def command_of(trial: Trial, begun: bool) -> list[str]:
    """The command line with which train.py makes the run, or goes on with what has begun."""
    if begun and (trial.folder / "last.pt").exists():
        return ["--resume", f"--out_dir={trial.folder}", f"--compile={trial.run.compile}"]
    options = [(part, option) for part in (trial.config, trial.run) for option in fields(part)]
    given = {option.name: getattr(part, option.name) for part, option in options}
    return [f"--{option.name}={given[option.name]}" for _, option in options if given[option.name] != option.default]


def is_foreign(out: Path) -> bool:
    """Whether a folder has a file of a run, or of somebody else, under a name that a command with many runs writes."""
    log = out / "log.jsonl"
    if (out / "last.pt").exists() or (out / "best.pt").exists():
        return True
    if not log.exists():
        return (out / "config.toml").exists()
    record = read_record(next(log_lines(log), b"{}"))
    return record is None or "kind" in record


def open_log(out: Path) -> TextIO:
    """The log of a command with many runs, its own alone; with config.toml it is what a folder of them is known by."""
    try:
        if is_foreign(out):
            raise UserError(f"out_dir={str(out)!r} holds a run of train.py, or other files: choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        log = (out / "log.jsonl").open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise UserError(f"out_dir={str(out)!r}: {error.strerror}: {remedy(error)}") from error
    if not locks(log, wait=False):
        raise UserError(f"out_dir={str(out)!r}: another command is at work there: wait, or choose another folder")
    return log


# ---- processes

@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """A Ctrl-C of the terminal reaches this process behind it; those that it starts, once they unblock the signal."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def forkserver_of(modules: list[str]) -> multiprocessing.context.ForkServerContext:
    """What starts processes that have the modules. They begin with Ctrl-C blocked: in their imports it would be a
    traceback of each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules)
    resource_tracker.ensure_running()  # else the next one would, which unblocks the signal
    with interrupts_later():
        forkserver.ensure_running()
    return context


def follow_parent() -> None:
    """Where the parent is gone, stop as by Ctrl-C."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGINT)


def train_one(argv: list[str]) -> tuple[int, str]:
    """-> the exit code of train.py, and what is wrong with its input."""
    if "--compile=on" in argv:
        torch._dynamo.reset()  # all models share the code that is compiled, and a limit of how often
    try:
        return train.main(argv), ""
    except UserError as error:
        return 2, str(error)


def serve(orders: Connection, output: Path) -> None:
    """Trains for every command line that comes; answers with exit code, error and seconds. All that is printed goes to
    the file `output`."""
    os.setpgid(0, 0)  # a Ctrl-C of the terminal is the parent's to pass on: the second signal would not let a run save
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    with output.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    threading.Thread(target=follow_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while True:
            argv = orders.recv()
            began = time.perf_counter()
            answer = train_one(argv)
            gc.collect()  # models are in cycles with their hooks and closures
            orders.send((*answer, time.perf_counter() - began))


class Team:
    """`jobs` processes that train, from `with` to its end, where they save the runs that they are in; and how far they
    have come with what is expected of them."""

    def __init__(self, out: Path, jobs: int, text: Text, measure: str, keep: bool, log: TextIO):
        self.out, self.jobs, self.text, self.measure = out, jobs, text, measure
        self.keep = keep  # the checkpoints of runs that it makes to their end
        self.log = log  # gets a JSON object for each of them
        self.workers: dict[Connection, multiprocessing.Process] = {}
        self.idle: list[Connection] = []
        self.busy: dict[Connection, Trial] = {}
        self.ended: set[Path] = set()
        self.expected = 0  # runs
        self.ahead = self.seconds = 0.0  # work of those that have not ended; seconds of those whose time is known
        self.done = self.taken = 0.0  # work of those that this team has made, and the time of all workers for it

    def __enter__(self) -> "Team":
        self.earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *error: object) -> None:
        for orders in self.busy:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.workers[orders].pid, signal.SIGINT)
        if self.busy:
            say("stopping: the runs save (once more: at once, unsaved)")
        try:
            for orders, process in self.workers.items():
                orders.close()
                process.join()
        except KeyboardInterrupt:
            for process in self.workers.values():
                process.kill()
            raise
        signal.signal(signal.SIGTERM, self.earlier)

    def expect(self, trials: list[Trial]) -> None:
        """Runs to come, whatever their rates."""
        runs = {trial.folder: trial for trial in trials}
        self.expected += len(runs)
        self.ahead += sum(trial.work for trial in runs.values())
        self.seconds += sum(trial.seconds for trial in runs.values())

    def hire(self) -> Connection:
        context = forkserver_of(["torch"])
        ours, theirs = context.Pipe()
        output = self.out / f"worker-{len(self.workers) + 1}.txt"
        process = context.Process(target=serve, args=(theirs, output))
        process.start()
        theirs.close()
        self.workers[ours] = process
        return ours

    def train(self, orders: list[tuple[Trial, list[str]]], jobs: int) -> Iterator[tuple[Trial, float]]:
        """Runs and the seconds that they took, in the order in which they end, `jobs` of them at a time. UserError
        where one could not be made."""
        waiting = deque(orders)
        while waiting or self.busy:
            while waiting and len(self.busy) < jobs:
                trial, argv = waiting.popleft()
                chosen = self.idle.pop() if self.idle else self.hire()
                self.busy[chosen] = trial
                chosen.send(argv)
            for chosen in wait(list(self.busy)):
                trial = self.busy.pop(chosen)
                try:
                    code, problem, seconds = chosen.recv()
                except EOFError:
                    raise UserError(f"{trial.folder}: its process was killed or failed, see {self.out}/worker-*.txt; "
                                    "the same command goes on") from None  # fmt: skip
                if problem:
                    raise UserError(f"{trial.folder}: {problem}")
                if code not in (0, 1):  # somebody stopped it
                    raise KeyboardInterrupt
                self.idle.append(chosen)
                yield trial, seconds

    def make(self, trials: list[Trial]) -> list[Outcome]:
        """What all of these, alone or not, have come to, trained where they have not ended."""
        orders = []
        for trial in trials:
            records = records_of(trial, self.text)
            if outcome_of(records, self.measure):
                self.count(trial)
            else:
                orders.append((trial, command_of(trial, bool(records))))
        jobs = 1 if trials[0].alone else self.jobs
        for trial, seconds in self.train(orders, jobs):
            if trial.work:
                self.done += trial.work
                self.taken += seconds * self.jobs / jobs
            self.count(trial, seconds)
        return [outcome_of(records_of(trial, self.text), self.measure) for trial in trials]

    def count(self, trial: Trial, seconds: float = 0.0) -> None:
        """A run has ended, in this team after so many seconds, or before: say so, once."""
        outcome = outcome_of(records_of(trial, self.text), self.measure)
        if outcome is None:
            raise UserError(f"{trial.folder}: the log of its run has no end: delete the folder, then the same command "
                            "goes on")  # fmt: skip
        for name in ("last.pt", "best.pt") if seconds and not self.keep else ():
            (trial.folder / name).unlink(missing_ok=True)  # they have served
        if trial.folder in self.ended:
            return
        self.ended.add(trial.folder)
        self.ahead = max(0.0, self.ahead - trial.work)
        self.seconds = max(0.0, self.seconds - trial.seconds)
        name = str(trial.folder.relative_to(self.out))
        loss = "diverged" if outcome.loss is None else f"{outcome.loss:.4f} {UNITS[self.measure]}"
        text = f"{len(self.ended):3d} of {self.expected} | {name} | {loss}"
        if seconds:
            pace = self.taken / self.done / self.jobs if self.done else 0.0
            text += f" | {seconds:.0f} s | ETA {clock(self.ahead * pace + self.seconds)}"
            self.log.write(json.dumps({"run": name, "loss": outcome.loss, "seconds": seconds}) + "\n")
        print(text, flush=True)
