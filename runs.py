"""The files of a run: config.toml, log.jsonl, last.pt and best.pt, each whole or absent.

A checkpoint that lacks an option of today loads with its default and says so; one with an option that is unknown today
is refused. log.jsonl has a header for every start, then a JSON object a line.
"""

import json
import math
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd import DeviceType

from configurator import UserError
from machine import sync
from parallel import Ranks, contents, gathered, launch_id, placed, read_parts, write_parts

FILES = ("last.pt", "best.pt", "log.jsonl", "config.toml", "trace.json", "memory.pickle")  # the last two: profiles
PARTS = ("model_config", "train_config", "fingerprint", "tokenizer", "step", "best")  # of a checkpoint
WARM_UP = 3  # steps before a profile begins
MAX_BAD = 10  # steps in a row without a finite loss and gradient, after which a run ends


@dataclass
class Progress:
    """What the next step depends on besides the weights and the optimiser."""

    step: int = 0
    best: float = math.inf  # lowest validation loss
    skipped: int = 0  # steps without an update
    streak: int = 0  # of them in a row
    clipped: int = 0  # updates whose gradient was clipped, since the last log line
    counted: int = 0  # updates since the last log line

    @classmethod
    def of(cls, checkpoint: dict) -> "Progress":
        return cls(**{field.name: checkpoint[field.name] for field in fields(cls)})


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary path)`, then rename; UserError where that fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with none of the bytes
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path} ({error}): free some space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_checkpoint(path: Path, kinds: dict[str, type], device: torch.device | str = "cpu",
                    option: str = "out_dir") -> tuple[dict, list[str]]:  # fmt: skip
    """(a checkpoint, what was missing in it). Its parts `kinds` are dictionaries of the fields of those dataclasses.
    UserError if it is missing, which is by `option`, damaged, foreign, or has a field that its dataclass lacks."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist: train first, or name the run's folder with --{option}=PATH")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = f"it is damaged or foreign ({type(error).__name__})"
        raise UserError(f"{path} is no checkpoint of this project, {reason}: restore or delete it") from error
    whole_or_sharded = isinstance(checkpoint, dict) and checkpoint.keys() & {"model", "shards"}
    if not whole_or_sharded or not set(PARTS) <= checkpoint.keys():
        raise UserError(f"{path} is no checkpoint of this project, parts are missing: restore or delete it")
    notes = []
    for part, kind in kinds.items():
        stored = checkpoint[part]
        unknown = stored.keys() - {field.name for field in fields(kind)}
        if unknown:
            raise UserError(f"{path} has the option {min(unknown)!r}, which this version of the project does not know: "
                            "use the version that wrote it, or train anew")  # fmt: skip
        for field in fields(kind):
            if field.name not in stored:
                stored[field.name] = field.default
                notes.append(f"{path} is older than the option {field.name}, which is {field.default!r} for it")
    return checkpoint, notes


def resumable(out: Path, given: dict, model_config: type, train_config: type) -> tuple[dict, list[str]]:
    """`load_checkpoint` of a run to go on with; UserError where an option of `given` would make it another run."""
    checkpoint, notes = load_checkpoint(out / "last.pt", {"model_config": model_config, "train_config": train_config})
    moments = "shards" if "shards" in checkpoint else "optimizer"
    missing = {moments, *(field.name for field in fields(Progress))} - checkpoint.keys()
    if missing:
        raise UserError(f"{out / 'last.pt'} lacks {', '.join(sorted(missing))}, without which nothing goes on exactly: "
                        "restore it; a best.pt cannot stand for it")  # fmt: skip
    trained = checkpoint["train_config"]
    fixed = checkpoint["model_config"] | {name: trained[name] for name in ("tokenizer", "init_from")}
    for name, value in fixed.items():
        if name != "attn_backend" and given.get(name, value) != value:
            raise UserError(f"{name}={given[name]!r}: the run in {out} has {value!r}, which --resume cannot change: "
                            "leave it out, or start another run with --out_dir=PATH")  # fmt: skip
    steps = given.get("max_iters", trained["max_iters"])
    if steps < checkpoint["step"]:
        raise UserError(f"max_iters={steps}: the run in {out} is at step {checkpoint['step']}: ask for more")
    return checkpoint, notes


def has_begun(config: object, run: object) -> bool:
    """Whether last.pt is of a run of just these configurations, which this very torchrun has started."""
    path = Path(run.out_dir) / "last.pt"
    if not path.exists():
        return False
    checkpoint, _ = load_checkpoint(path, {"model_config": type(config), "train_config": type(run)})
    same = checkpoint["model_config"] == asdict(config) and checkpoint["train_config"] == asdict(run)
    return same and checkpoint.get("launch", "") == launch_id()


def weights_path(run: str) -> Path:
    """The checkpoint to take weights from: a file, or a run's best one, else its last."""
    path = Path(os.path.expanduser(run))
    if os.path.isdir(path):
        best = path / "best.pt"
        return best if best.exists() else path / "last.pt"
    return path


def load_weights(model: nn.Module, checkpoint: dict, path: Path) -> None:
    """UserError where the checkpoint's weights are not the model's."""
    if "shards" in checkpoint:
        read_parts(path.with_name(checkpoint["shards"]), contents(model, None))
        return
    own = model.state_dict()
    try:
        model.load_state_dict({name: placed(t, own.get(name)) for name, t in checkpoint["model"].items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: its weights do not fit its configuration ({reason}): use the version of this project "
                        "that wrote it, or train anew") from error  # fmt: skip


def restore_optimizer(optimizer: torch.optim.Optimizer, moments: dict) -> None:
    """Its moments from a checkpoint; its options stay as they were made, group by group: they may have been changed."""
    made = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, state in moments["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = placed(state[name], params[i])
    optimizer.load_state_dict(moments)
    for group, options in zip(optimizer.param_groups, made, strict=True):
        group.update(options)


def restore(path: Path, checkpoint: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint of any number of ranks into the model and optimiser of this one."""
    if "shards" in checkpoint:
        read_parts(path.with_name(checkpoint["shards"]), contents(model, optimizer))
        return
    load_weights(model, checkpoint, path)
    restore_optimizer(optimizer, checkpoint["optimizer"])


def save_checkpoint(path: Path, content: dict) -> None:
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def save_run(path: Path, content: dict, model: nn.Module, optimizer: torch.optim.Optimizer | None,
             ranks: Ranks) -> None:  # fmt: skip
    """A checkpoint, by rank 0; with an `optimizer` one to go on from. Under fsdp it names a folder beside it, in which
    every rank has written its part by then."""
    content["launch"] = launch_id()
    if optimizer and ranks.mode == "fsdp":
        content["shards"] = f"shards-{content['step']}"
        write_parts(path.with_name(content["shards"]), contents(model, optimizer))
    else:
        content["model"] = gathered(model, ranks)
        if optimizer:
            content["optimizer"] = optimizer.state_dict()
    if ranks.rank > 0:
        return
    save_checkpoint(path, content)
    for folder in path.parent.glob("shards-*") if optimizer else ():
        if folder.name != content.get("shards"):
            shutil.rmtree(folder)


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

    def step(self, steps: int, record: dict, routing: dict[str, float]) -> None:
        """A step of `steps` in all."""
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
        write_atomically(self.out / "trace.json", lambda path: profiler.export_chrome_trace(str(path)))
        if self.device.type == "cuda":
            write_atomically(self.out / "memory.pickle", lambda path: torch.cuda.memory._dump_snapshot(str(path)))
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


def check_text(checkpoint: dict, ids: dict[str, str], out: Path, data: str) -> None:
    """UserError where a resumed run would not see the text and the tokens that it began with."""
    for name, what in (("fingerprint", "text"), ("tokenizer", "tokenizer")):
        if checkpoint[name] != ids[name]:
            change = f"({ids[name][:12]}, not {checkpoint[name][:12]})"
            raise UserError(f"data={data!r}: the {what} has changed since the run in {out} began {change}: restore it, "
                            f"or start a new run from its weights: --init_from={out} --out_dir=PATH")  # fmt: skip


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
