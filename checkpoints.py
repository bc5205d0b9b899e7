"""Checkpoints: last.pt, with which a run goes on, and best.pt, each whole or absent.

A checkpoint that lacks an option of today loads with its default and says so; one with an option that is unknown today
is refused.
"""

import math
import pickle
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from configurator import UserError
from files import saved_file
from parallel import Ranks, contents, gathered, launch_id, placed, read_parts, write_parts

PARTS = ("model_config", "train_config", "fingerprint", "tokenizer", "step", "best")  # of a checkpoint


@dataclass
class Progress:
    """What the next step depends on besides the weights and the optimiser."""

    step: int = 0
    best: float = math.inf  # lowest validation loss
    skipped: int = 0  # steps without an update
    streak: int = 0  # of them in a row
    clipped: int = 0  # updates whose gradient was clipped, since the last log line
    counted: int = 0  # updates since the last log line
    seconds: float = 0.0  # of training, as max_seconds counts them

    @classmethod
    def of(cls, checkpoint: dict) -> "Progress":
        return cls(**{field.name: checkpoint[field.name] for field in fields(cls)})


def load_checkpoint(path: Path, kinds: dict[str, type], device: torch.device | str = "cpu") -> tuple[dict, list[str]]:
    """(a checkpoint, what was missing in it). Its parts `kinds` are dictionaries of the fields of those dataclasses.
    UserError if it is missing, damaged, foreign, or has a field that its dataclass lacks."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: train first, or name the run's folder with --out_dir=PATH")
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
    if "seconds" not in checkpoint:
        checkpoint["seconds"] = 0.0
        notes.append(f"{out / 'last.pt'} is older than max_seconds, which counts from here on")
    missing = {moments, *(field.name for field in fields(Progress))} - checkpoint.keys()
    if missing:
        raise UserError(f"{out / 'last.pt'} lacks {', '.join(sorted(missing))}, without which nothing goes on exactly: "
                        "restore it; a best.pt cannot stand for it")  # fmt: skip
    trained = checkpoint["train_config"]
    fixed = checkpoint["model_config"] | {"tokenizer": trained["tokenizer"]}
    for name, value in fixed.items():
        if name != "attn_backend" and given.get(name, value) != value:
            raise UserError(f"{name}={given[name]!r}: the run in {out} has {value!r}, which --resume cannot change: "
                            "leave it out, or start another run with --out_dir=PATH")  # fmt: skip
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
    path = Path(run).expanduser()
    if path.is_dir():
        best = path / "best.pt"
        return best if best.exists() else path / "last.pt"
    return path


def start_from(model: nn.Module, run: str, tokenizer: str) -> None:
    """The weights of another run; UserError where its tokens are not `tokenizer`'s."""
    path = weights_path(run)
    checkpoint, _ = load_checkpoint(path, {})
    if checkpoint["tokenizer"] != tokenizer:
        raise UserError(f"init_from={run!r}: it was trained on the tokens of another tokenizer: use its own, "
                        f"--tokenizer={checkpoint['train_config']['tokenizer']}")  # fmt: skip
    load_weights(model, checkpoint, path)


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
    with saved_file(path) as file:
        torch.save(content, file)


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


def check_text(checkpoint: dict, ids: dict[str, str], out: Path, data: str) -> None:
    """UserError where a resumed run would not see the text and the tokens that it began with."""
    for name, what in (("fingerprint", "text"), ("tokenizer", "tokenizer")):
        if checkpoint[name] != ids[name]:
            change = f"({ids[name][:12]}, not {checkpoint[name][:12]})"
            raise UserError(f"data={data!r}: the {what} has changed since the run in {out} began {change}: restore it, "
                            f"or start a new run from its weights: --init_from={out} --out_dir=PATH")  # fmt: skip
