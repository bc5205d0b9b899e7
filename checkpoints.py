"""Checkpoints: last.pt, with which a run goes on, best.pt, and those that are kept (step-N.pt), each whole or absent.

- Read: every record of the archive has the sum that is stored with it (torch's reader does not look), sharded files
  have their hashes in last.pt; then parts, types, shapes and values are checked, before anything on disk is touched.
  Where the checkpoint is lost, the error offers the newest whole one.
- Written: only what is finite, weights and moments.
A checkpoint that lacks an option of today loads with its default and says so; one with an option that is unknown today
is refused.
"""

import contextlib
import errno
import math
import os
import pickle
import re
import shlex
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from accounting import skeleton
from configurator import UserError, build, command, key_types, typed
from files import Damaged, check_regular, saved_file, saving, second_name
from model import HydraConfig
from parallel import (
    ALONE,
    Ranks,
    check_shards,
    contents,
    gathered,
    launch_id,
    local,
    part_hashes,
    placed,
    read_parts,
    write_parts,
)

PARTS = {"model_config": dict, "train_config": dict, "fingerprint": str, "tokenizer": str, "step": int, "best": float}
OPTIONAL = {"launch": str, "eval_windows": int, "optimizer": dict}
# what --init_from may change: the weights are for every value of it
FREE = ("block_size", "window", "rope_theta", "rope_fraction", "norm_eps", "qk_gain", "ccqa_norm", "value_shift",
        "doc_mask", "mod_aux", "mor_aux", "attn_backend")  # fmt: skip
YOUNGER = ("running", "seconds")  # counters that older checkpoints lack
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, in the shape of the parameter
CHUNK = 1 << 22  # bytes that are read at once
MOST_ROWS = 1 << 24  # sequences of a batch, of which an evaluation is made
FOLDER = 0x10  # the attribute of an archive's entry for which torch's reader gives memory that nothing was read into
# what reading a foreign file can raise
BROKEN = (EOFError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, AssertionError, ArithmeticError,
          MemoryError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError)  # fmt: skip


@dataclass
class Progress:
    """What the next step depends on besides the weights and the optimiser."""

    step: int = 0
    best: float = math.inf  # lowest validation loss
    skipped: int = 0  # steps without an update
    streak: int = 0  # of them in a row
    clipped: int = 0  # updates whose gradient was clipped, since the last log line
    counted: int = 0  # updates since the last log line
    running: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # losses: how many, mean, variance
    seconds: float = 0.0  # of training, as max_seconds counts them

    @classmethod
    def of(cls, checkpoint: dict) -> "Progress":
        """UserError where a number is none that a run counts."""
        progress = cls(**{field.name: checkpoint[field.name] for field in fields(cls)})
        for name in ("step", "skipped", "streak", "clipped", "counted"):
            value = getattr(progress, name)
            if type(value) is not int or value < 0:
                raise UserError(f"{name} is no count of steps")
        if type(progress.seconds) is not float or not 0 <= progress.seconds < math.inf:
            raise UserError("seconds is no time")
        if type(progress.best) is not float or not progress.best > 0:
            raise UserError("best is no loss")
        if progress.streak > progress.skipped or progress.clipped > progress.counted:
            raise UserError("a part of its steps is more than all of them")
        if progress.skipped + progress.counted > progress.step:
            raise UserError(f"skipped={progress.skipped} and counted={progress.counted} are more than its steps")
        numbers = progress.running
        if type(numbers) is not list or [type(number) for number in numbers] != [float] * 3:
            raise UserError("running is no three numbers")
        if not all(map(math.isfinite, numbers)) or not 0 <= numbers[0] <= progress.step or numbers[2] < 0:
            raise UserError("running has a number that cannot be")
        batches = checkpoint["train_config"].get("eval_iters", 0)
        windows = checkpoint.get("eval_windows", batches)
        if not batches <= windows <= batches * MOST_ROWS or windows % max(1, batches):
            raise UserError(f"eval_windows={windows} are not those of eval_iters={batches} batches")
        return progress


class Origin(NamedTuple):
    """The checkpoint that a run goes on from."""

    path: Path
    parts: dict

    def is_in(self, folder: str) -> bool:
        return self.path.parent.resolve() == Path(folder).resolve()


# ---- reading

@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Around what reads a foreign file: without what torch has to say of strange tensors beside the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def mending(path: Path) -> str:
    """What to do about a damaged checkpoint: under the name of a run's own one it may be deleted."""
    if path.name in ("last.pt", "best.pt") or step_of(path) >= 0:
        return "restore or delete it"
    return "name the checkpoint of a run instead, such as out/last.pt"


def check_sums(file: BinaryIO) -> None:
    """ValueError where a record's bytes, at the place where torch reads them, have another sum than the archive's
    directory has for them, or where torch does not see the records of that directory."""
    entries = zipfile.ZipFile(file).infolist()
    file.seek(0)  # torch takes the place where the file stands for its begin
    reader = torch._C.PyTorchFileReader(file)
    names = [entry.filename.partition("/")[2] for entry in entries]
    if sorted(reader.get_all_records()) != sorted(set(names)):
        raise ValueError("not one archive")
    for name, entry in zip(names, entries, strict=True):
        plain = entry.compress_type == zipfile.ZIP_STORED and not entry.external_attr & FOLDER
        if not plain or reader.get_record_size(name) != entry.file_size:
            raise ValueError("not as torch writes them")
        file.seek(reader.get_record_offset(name))
        left, crc = entry.file_size, 0
        while left > 0:
            some = file.read(min(left, CHUNK))
            if not some:
                raise EOFError("it was cut")
            crc = zlib.crc32(some, crc)
            left -= len(some)
        if crc != entry.CRC:
            raise ValueError("a sum is wrong")


def read_archive(path: Path, device: torch.device | str, option: str) -> object:
    """What torch.save wrote, its sums checked first. Damaged, or UserError where the system cannot read it."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            check_sums(file)
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True)
    except UserError:  # which is a ValueError too
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{path} does not exist: train first, or name the run's folder with --{option}=PATH") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # which is a place before the file's begin, from a directory that is damaged
            raise UserError(f"{path} cannot be read ({error.strerror}): make it readable, or name another "
                            "checkpoint") from error  # fmt: skip
        raise foreign(path, error) from error
    except BROKEN as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            raise UserError(f"{path} cannot be read (there is not enough memory for it): free some") from error
        raise foreign(path, error) from error


def foreign(path: Path, error: Exception) -> Damaged:
    reason = f"it is damaged or foreign ({type(error).__name__})"
    return Damaged(f"{path} is no checkpoint of this project, {reason}: {mending(path)}")


def load_checkpoint(path: Path, kinds: dict[str, type], device: torch.device | str = "cpu",
                    option: str = "out_dir") -> tuple[dict, list[str]]:  # fmt: skip
    """(a checkpoint, what was missing in it). Its parts `kinds` are dictionaries of the fields of those dataclasses.
    Damaged if it is missing (`option` names it), damaged or foreign; UserError if it cannot be read, or has a field
    that its dataclass lacks."""
    with unwarned():
        checkpoint = read_archive(path, device, option)
    instead = "restore it, or name another checkpoint"  # it is whole, and may be of another project
    if not isinstance(checkpoint, dict) or not set(PARTS) <= checkpoint.keys():
        raise Damaged(f"{path} is no checkpoint of this project, parts are missing: {instead}")
    wholes = PARTS | ({"shards": str} if "shards" in checkpoint else {"model": dict})
    wholes |= {part: kind for part, kind in OPTIONAL.items() if part in checkpoint}
    for part, kind in wholes.items():
        value = checkpoint.get(part)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Damaged(f"{path} is no checkpoint of this project, parts are missing or not it ({part}): {instead}")
    if type(checkpoint["train_config"].get("tokenizer")) is not str:
        raise Damaged(f"{path} is no checkpoint of this project, it names no tokenizer: {instead}")
    notes = []
    if "shards" in checkpoint:
        notes += check_shards(path, checkpoint)
    for part, kind in kinds.items():
        stored, types = checkpoint[part], key_types((kind,))
        unknown = sorted(str(name) for name in stored.keys() - types.keys())
        if unknown:
            raise UserError(f"{path} has the option {unknown[0]!r}, which this version of the project does not know: "
                            "use the version that wrote it, or train anew")  # fmt: skip
        for option in fields(kind):
            if option.name not in stored:
                stored[option.name] = option.default
                notes.append(f"{path} is older than the option {option.name}, which is {option.default!r} for it")
            try:
                stored[option.name] = typed(stored[option.name], types[option.name], "")
            except UserError as error:
                raise Damaged(f"{path} is damaged, {option.name} is of another kind: {mending(path)}") from error
        try:
            build(stored, kind)
        except UserError as error:
            raise Damaged(f"{path} is damaged, with options that cannot be ({error}): {mending(path)}") from error
    return checkpoint, notes


def load_run(path: Path, kinds: dict[str, type], option: str = "out_dir") -> tuple[dict, list[str]]:
    """`load_checkpoint` of one that a run can go on from: with counters and, but for a best.pt, moments."""
    checkpoint, notes = load_checkpoint(path, kinds, option=option)
    for name in YOUNGER:
        checkpoint.setdefault(name, getattr(Progress(), name))
    missing = {counter.name for counter in fields(Progress)} - checkpoint.keys()
    moments = "shards" if "shards" in checkpoint else "optimizer"
    if path.name == "best.pt" and moments not in checkpoint:
        notes.append(f"{path} has no state of the optimiser: its moments begin at zero")
    elif moments not in checkpoint:
        missing.add(moments)
    if missing:
        raise Damaged(f"{path} lacks {', '.join(sorted(missing))}, without which nothing goes on exactly: restore it")
    try:
        Progress.of(checkpoint)
    except UserError as error:
        raise Damaged(f"{path} is damaged or foreign, {error}: {mending(path)}") from error
    return checkpoint, notes


def step_of(path: Path) -> int:
    """Of a kept checkpoint, by its name; -1 of another file."""
    found = re.fullmatch(r"step-(\d+)\.pt", path.name)
    return int(found[1]) if found else -1


def kept_steps(folder: Path) -> list[int]:
    """Of the checkpoints beside last.pt, newest first."""
    return sorted((step_of(path) for path in folder.glob("step-*.pt") if step_of(path) >= 0), reverse=True)


def newest_whole(folder: Path, lost: Path, kinds: dict[str, type]) -> tuple[Path, int] | None:
    """The checkpoint with which a run can go on where `lost` cannot be read, and its step."""
    for path in [folder / "last.pt", *(folder / f"step-{n}.pt" for n in kept_steps(folder)), folder / "best.pt"]:
        if path == lost:
            continue
        try:
            return path, load_run(path, kinds)[0]["step"]
        except UserError:
            continue
    return None


@contextlib.contextmanager
def offers_another(lost: Path, kinds: dict[str, type] | None = None) -> Iterator[None]:
    """Where the checkpoint `lost` is Damaged, the error says how to go on from the newest whole one beside it."""
    try:
        yield
    except Damaged as error:
        found = newest_whole(lost.parent, lost, kinds or {})
        if found is None:
            raise
        path, step = found
        what = f"step {step}"
        if path.name == "best.pt":
            what = f"the weights of step {step} (the optimiser's state is lost)"
        raise UserError(f"{error}; or go on from {what}: {command('train.py', resume=path)}") from error


def from_weights(folder: Path, **options: int | float | str) -> str:
    """The command that starts another run from the weights of the one in `folder`."""
    return command("train.py", **{name: value for name, value in options.items() if value != ""}, init_from=folder,
                   out_dir="PATH")  # fmt: skip


def resumable(path: Path, given: dict, model_config: type, train_config: type) -> tuple[dict, list[str]]:
    """`load_run` with its configurations; UserError where an option of `given` would make it another run."""
    kinds = {"model_config": model_config, "train_config": train_config}
    with offers_another(path, kinds):
        checkpoint, notes = load_run(path, kinds, "resume" if isinstance(given.get("resume"), str) else "out_dir")
    trained = checkpoint["train_config"]
    fixed = checkpoint["model_config"] | {name: trained[name] for name in ("tokenizer", "init_from")}
    for name, value in fixed.items():
        if name != "attn_backend" and given.get(name, value) != value:
            way = "with --out_dir=PATH"
            if name in FREE:
                new = {"data": trained["data"]} | {name: given[name]}
                way = f"from its weights: {from_weights(path.parent, **new)}"
            raise UserError(f"{name}={given[name]!r}: the run in {path.parent} has {value!r}, which --resume cannot "
                            f"change: leave it out, or start another run {way}")  # fmt: skip
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


def best_loss(folder: Path) -> float:
    """The one of a folder's best.pt; infinite where none can be read."""
    try:
        return load_run(folder / "best.pt", {})[0]["best"]
    except UserError:
        return math.inf


def check_source(config: HydraConfig, source: dict, run, tokenizer: str) -> None:
    """UserError where the weights of the run `source` are for another tokenizer or another model."""
    if source["tokenizer"] != tokenizer:
        raise UserError(f"init_from={run.init_from!r}: it was trained on the tokens of another tokenizer: use its own, "
                        + shlex.quote(f"--tokenizer={source['train_config']['tokenizer']}"))  # fmt: skip
    (other,) = build(source["model_config"], HydraConfig)
    changed = [name for name in asdict(config) if getattr(config, name) != getattr(other, name) and name not in FREE]
    one, two = ({name: p.shape for name, p in skeleton(c).named_parameters()} for c in (config, other))
    if one == two:  # the routers are there already
        changed = [name for name in changed if name not in ("mod_capacity", "mor_recursions")]
    if changed:
        values = ", ".join(f"{name}={getattr(config, name)!r} (not {getattr(other, name)!r})" for name in changed)
        raise UserError(f"{values}: --init_from takes the shape of the run in {run.init_from}: leave out "
                        f"{', '.join('--' + name for name in changed)}")  # fmt: skip


# ---- into a model and its optimiser

def no_fit(path: Path, reason: str) -> Damaged:
    return Damaged(f"{path} does not fit its configuration ({reason}): use the version of this project that wrote "
                   "it, or train anew")  # fmt: skip


def check_tensor(path: Path, name: str, tensor: object, like: Tensor) -> None:
    """Damaged where it has not the shape and dtype of `like`."""
    found, wanted = type(tensor).__name__, f"{like.dtype} {list(like.shape)}"
    if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta:
        found = f"{tensor.dtype} {list(tensor.shape)}"
    if found != wanted:
        raise no_fit(path, f"{name} is {found}, not {wanted}")


def check_weights(path: Path, weights: dict, model: nn.Module) -> None:
    """Damaged where they are not the model's."""
    own = model.state_dict()
    for name, like in own.items():
        if name not in weights:
            raise no_fit(path, f"it lacks {name}")
        check_tensor(path, name, weights[name], like)
    for name in weights:
        if name not in own:
            raise no_fit(path, f"{name!r} is no weight of it")


def check_moments(path: Path, checkpoint: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Damaged where they are not those of the optimiser's parameters: of all of them, once a step has updated them."""
    moments = checkpoint["optimizer"]
    try:
        numbers = [group["params"] for group in moments["param_groups"]]
        states = {number: dict(state) for number, state in moments["state"].items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise no_fit(path, "its optimiser's state is none") from error
    if numbers != [group["params"] for group in optimizer.state_dict()["param_groups"]]:
        raise no_fit(path, "its optimiser has other parameters")
    if not states and checkpoint["step"] == checkpoint["skipped"]:
        return
    names = {p: name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not states.keys() <= set(range(len(params))):
        raise no_fit(path, "its optimiser has more parameters")
    for number, p in enumerate(params):
        state = states.get(number)
        if state is None and not p.requires_grad:
            continue
        if state is None or state.keys() != {"step", *MOMENTS}:
            raise no_fit(path, f"the moments of {names[p]} are missing")
        check_tensor(path, f"the step of {names[p]}", state["step"], torch.zeros(()))
        for moment in MOMENTS:
            check_tensor(path, f"{moment} of {names[p]}", state[moment], p)
    check_updates(path, checkpoint, [state["step"] for state in states.values()])


def check_updates(path: Path, checkpoint: dict, counts: list[Tensor]) -> None:
    """Damaged where the parameters' moments have not seen one number of updates, or have seen more than there were."""
    found = sorted({count.item() for count in counts})
    most = checkpoint["step"] - checkpoint["skipped"]
    if found and (len(found) > 1 or not 0 <= found[0] <= most or found[0] % 1):
        updates = ", ".join(f"{count:g}" for count in found[:3])
        raise Damaged(f"{path} is damaged, its optimiser has seen {updates} updates, not up to {most}: {mending(path)}")


def not_finite(model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks) -> str:
    """The first weight, or moment, with a value that is not finite, or that is negative in a mean of squares; empty
    where there is none. All ranks ask for it, and are told the same."""
    names, bad = [], []
    for name, tensor in model.state_dict().items():
        names.append(name)
        bad.append(not local(tensor).isfinite().all())
    for name, p in model.named_parameters() if optimizer else ():
        for moment, tensor in optimizer.state.get(p, {}).items():
            names.append(f"{moment} of {name}")
            part = local(tensor)
            bad.append(not part.isfinite().all() or (moment in ("step", "exp_avg_sq") and bool((part < 0).any())))
    found = ranks.total(bad)
    return next((name for name, count in zip(names, found, strict=True) if count > 0), "")


@unwarned()
def load_weights(model: nn.Module, checkpoint: dict, path: Path, ranks: Ranks = ALONE) -> None:
    """Damaged where the checkpoint's weights are not the model's, or are not finite."""
    if "shards" in checkpoint:
        read_parts(path.with_name(checkpoint["shards"]), contents(model, None))
    else:
        check_weights(path, checkpoint["model"], model)
        own = model.state_dict()
        model.load_state_dict({name: placed(t, own[name]) for name, t in checkpoint["model"].items()})
    check_values(path, model, None, ranks)


def check_values(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks) -> None:
    """Damaged where what was read from `path` is not finite."""
    name = not_finite(model, optimizer, ranks)
    if name:
        raise Damaged(f"{path}: {name} has values that are not finite, or that cannot be: {mending(path)}")


def restore_optimizer(optimizer: torch.optim.Optimizer, moments: dict) -> None:
    """Its moments from a checkpoint; its options stay as they were made, group by group: they may have been changed."""
    made = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, state in moments["state"].items():
        for name in MOMENTS:
            state[name] = placed(state[name], params[i])
    optimizer.load_state_dict(moments)
    for group, options in zip(optimizer.param_groups, made, strict=True):
        group.update(options)


@unwarned()
def restore(path: Path, checkpoint: dict, model: nn.Module, optimizer: torch.optim.Optimizer,
            ranks: Ranks = ALONE) -> None:  # fmt: skip
    """A checkpoint of any number of ranks into the model and optimiser of this one; Damaged where it does not fit
    them. Without moments the optimiser is left as it is."""
    if "shards" in checkpoint:
        read_parts(path.with_name(checkpoint["shards"]), contents(model, optimizer))
        check_values(path, model, optimizer, ranks)
        check_updates(path, checkpoint, [moments["step"] for moments in optimizer.state.values()])
        return
    load_weights(model, checkpoint, path, ranks)
    if "optimizer" in checkpoint:
        check_moments(path, checkpoint, model, optimizer)
        restore_optimizer(optimizer, checkpoint["optimizer"])
        check_values(path, model, optimizer, ranks)


# ---- writing

def save_checkpoint(path: Path, content: dict) -> None:
    with saved_file(path) as file:
        torch.save(content, file)


class Kept(NamedTuple):
    """Which checkpoints stay beside last.pt: those of every so many steps (0 = none), and the newest, with last.pt."""

    every: int = 0
    last: int = 1

    def keep(self, path: Path, step: int | None) -> None:
        """Before `path`, last.pt, of this step, is replaced: give it a second name, if it may stay."""
        if step is None or (self.last == 1 and not self.stays(step)):
            return
        kept = path.with_name(f"step-{step}.pt")  # there may be one, of a run that went on from an earlier step
        with saving(kept):
            second_name(path, kept)

    def stays(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def drop(self, path: Path, step: int) -> None:
        """Behind a new last.pt, of this step: delete the one that is no longer among the newest. What is older stays as
        it is, whoever kept it."""
        older = [kept for kept in kept_steps(path.parent) if kept < step]
        for fallen in older[self.last - 1 : self.last]:
            if self.last > 1 and not self.stays(fallen):
                path.with_name(f"step-{fallen}.pt").unlink()


ONLY_LAST = Kept()


def save_run(path: Path, content: dict, model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks,
             kept: Kept = ONLY_LAST, replaced: int | None = None) -> None:  # fmt: skip
    """A checkpoint, by rank 0; with an `optimizer` one to go on from, which is last.pt: the `replaced` one was of that
    step. Under fsdp it names a folder beside it, in which every rank has written its part by then."""
    content["launch"] = launch_id()
    if optimizer and ranks.mode == "fsdp":
        content["shards"] = f"shards-{content['step']}"
        write_parts(path.with_name(content["shards"]), contents(model, optimizer))
        content["hashes"] = part_hashes(path.with_name(content["shards"])) if ranks.rank == 0 else {}
    else:
        content["model"] = gathered(model, ranks)
        if optimizer:
            content["optimizer"] = optimizer.state_dict()
    if ranks.rank > 0:
        return
    if not optimizer:
        save_checkpoint(path, content)
        return
    kept.keep(path, replaced)
    save_checkpoint(path, content)
    kept.drop(path, content["step"])
    named = {content.get("shards"), *(f"shards-{step}" for step in kept_steps(path.parent))}
    for folder in path.parent.glob("shards-*"):
        if folder.name not in named:
            shutil.rmtree(folder)


def check_text(checkpoint: dict, ids: dict[str, str], out: Path, data: str) -> None:
    """UserError where a resumed run would not see the text and the tokens that it began with."""
    ways = {"tokenizer": "", "text": f", or start another run from its weights: {from_weights(out, data=data)}"}
    for name, what in (("fingerprint", "text"), ("tokenizer", "tokenizer")):
        if checkpoint[name] != ids[name]:
            change = f"({ids[name][:12]}, not {checkpoint[name][:12]})"
            raise UserError(f"data={data!r}: the {what} has changed since the run in {out} began {change}: restore it"
                            + ways[what])  # fmt: skip
