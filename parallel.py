"""Several processes, each with a device of its own: `torchrun --nproc_per_node=N train.py`.

- ddp: every rank has the whole model, and gradients are averaged while the backward runs.
- fsdp: FSDP2, every rank keeps a part of each parameter, gradient and moment (arXiv:2304.11277).
- gloo between CPUs, NCCL between GPUs. What the hosts tell each other goes through gloo on both, which notices at once
  that a process has gone.
- Sharded checkpoints by torch.distributed.checkpoint: any number of ranks reads them, a single process too.
Of the environment it reads torchrun's variables only. torch's sharding, which takes two seconds to import, is imported
where it is asked for. Left out: tensor, pipeline and context parallelism, replicas of shards.
"""

import contextlib
import os
import pickle
import re
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError, say
from files import Damaged, file_hash, reason
from machine import Machine, choose_device

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCH = "start the processes with torchrun --nproc_per_node=N train.py"


# ---- the processes

class Ranks(NamedTuple):
    """The processes of a run, and which of them this is; without torchrun a single one."""

    mode: str = "none"  # none, ddp or fsdp
    rank: int = 0
    local_rank: int = 0  # among those of this machine
    size: int = 1

    @property
    def samples(self) -> bool:
        """Whether this process is to generate, which it does alone."""
        return self.rank == 0 and self.mode != "fsdp"

    def rows(self, batch_size: int) -> slice:
        """This rank's sequences of a batch; UserError where they do not divide."""
        if batch_size % self.size:
            near = self.size * max(1, round(batch_size / self.size))
            raise UserError(f"batch_size={batch_size}: it is of all {self.size} processes together, and does not "
                            f"divide by them: use --batch_size={near}")  # fmt: skip
        part = batch_size // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def total(self, values: list[float]) -> list[float]:
        """The sum of each value over the ranks, which wait for each other."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def any(self, holds: object) -> bool:
        """Whether it holds on some rank."""
        return self.total([bool(holds)]) > [0]

    def first(self, value):
        """Rank 0's value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def one_first(self, make: Callable):
        """`make()` by one rank of each machine, then by the others, which find the files that it left."""
        if self.local_rank > 0:
            self.any(False)
            return make()
        made = make()
        self.any(False)
        return made

    def check_same(self, what: str, value: object) -> None:
        """UserError on a rank whose value is not rank 0's."""
        if self.first(value) != value:
            raise UserError(f"{what}: rank {self.rank} has another than rank 0: give every machine the same")

    def agree(self, means: list[Tensor], norms: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(the mean of each of `means` over the ranks, the norm of each gradient, of whose part here are `norms`), on
        the device: nobody waits for it."""
        if self.size == 1:
            return means, norms
        values = torch.stack(means).detach() / self.size
        if self.mode == "fsdp":
            values = torch.cat((values, torch.stack(norms).square()))
        dist.all_reduce(values)
        if self.mode == "fsdp":
            norms = list(values[len(means) :].sqrt())
        return list(values[: len(means)]), norms


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is rank 0, by itself or as torchrun started it."""
    return os.environ.get("RANK", "0") == "0"


def restarted() -> bool:
    """Whether torchrun --max-restarts has started this process anew; not every machine's ranks need to know."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch_id() -> str:
    """Of this call of torchrun, its restarts included; empty without it."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def choose_local_device(requested: str, local_rank: int) -> torch.device:
    """`choose_device` for one of several processes of a machine, each of which has a GPU of its own."""
    device = choose_device(requested)
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise UserError(f"device={requested!r}: with torchrun each process takes its own: use auto, cpu or cuda")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(f"LOCAL_RANK={local_rank}: {gpus} GPUs are here: use --nproc_per_node={gpus} or --device=cpu")
    return torch.device("cuda", local_rank)


def fresh_store(rank: int, size: int) -> dist.Store:
    """The store by which the ranks find each other, under a prefix of this start. torchrun's store outlives a restart,
    and a rank that reads there where another one was before waits in vain (pytorch issue 135712): so rank 0 answers
    the others' greetings with the prefix, until all have heard it."""
    store, _, _ = next(rendezvous("env://", rank, size))
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"greeting {rank}", own)
        prefix = store.get(f"answer {own}").decode()  # waits for it
        store.add(f"heard {prefix}", 1)
        return dist.PrefixStore(prefix, store)
    while store.add(f"heard {own}", 0) < size - 1:
        for other in range(1, size):
            greeting = store.get(f"greeting {other}").decode()
            store.set(f"answer {greeting}", own)
        time.sleep(0.02)
    return dist.PrefixStore(own, store)


def join(parallel: str, device: str) -> tuple[Ranks, str]:
    """(the processes that torchrun started, this one's device); UserError where they cannot meet. From here on ranks
    other than 0 print nothing but errors."""
    if not launched():
        if parallel != "auto":
            raise UserError(f"parallel={parallel!r}: this is a single process: {LAUNCH} --parallel={parallel}")
        return ALONE, device
    for name in VARIABLES:
        text = os.environ.get(name, "")
        if not text or (name != "MASTER_ADDR" and not text.isdecimal()):
            raise UserError(f"{name}={text!r} in the environment: {LAUNCH}")
    rank, local_rank, size = (int(os.environ[name]) for name in VARIABLES[:3])
    own = choose_local_device(device, local_rank)
    backend = "gloo"
    if own.type == "cuda":
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, store=fresh_store(rank, size), rank=rank, world_size=size)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"rank {rank} of {size} does not meet the others at {os.environ['MASTER_ADDR']}:"
                        f"{os.environ['MASTER_PORT']} ({reason}): {LAUNCH}") from error  # fmt: skip
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return Ranks("ddp" if parallel == "auto" else parallel, rank, local_rank, size), str(own)


def pooled(machine: Machine, ranks: Ranks) -> Machine:
    """What all ranks run on: as rank 0 chose, each on its own device, with the peaks of all together."""
    if ranks.mode == "none":
        return machine
    first = ranks.first(machine)
    facts = first.facts | {"processes": f"{ranks.size}, {ranks.mode}"}
    if ranks.mode == "fsdp":
        facts["samples"] = "none, since no rank has the whole model: sample.py reads best.pt and last.pt"
    listed = first.listed_peak * ranks.size if first.listed_peak else None
    return first._replace(device=machine.device, peak=first.peak * ranks.size, listed_peak=listed, facts=facts)


@contextlib.contextmanager
def ends_together() -> Iterator[None]:
    """Around a main function: its process group ends with it, and for a process that has gone there is one line."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not lost or not dist.is_initialized():
            raise
        say(f"error: rank {dist.get_rank()} has lost another process of this run, which ended (its own line says "
            "why) or cannot be reached: --resume goes on from the last checkpoint", error=True)  # fmt: skip
        os._exit(1)  # what is left of the group can neither be closed nor taken down in order
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- the model

def shard(model: nn.Module, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> None:
    """FSDP2, block by block. With bf16 the blocks gather their parameters in it, and gradients are summed in fp32; what
    is outside of the blocks stays fp32, and so does the residual line."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of changes of an output in place: there are none
    mesh = init_device_mesh(device.type, (ranks.size,))
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def distribute(model: nn.Module, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`model` (with `blocks`) over the ranks -> the module that training calls. Under fsdp its parameters are replaced:
    an optimiser comes later."""
    if ranks.mode == "fsdp":
        shard(model, ranks, device, dtype)  # which moves it block by block: it need not fit there as a whole
        return model
    model.to(device)
    if ranks.mode == "none":
        return model
    torch._dynamo.config.optimize_ddp = False  # it would cut a graph into buckets; a compiled block is small enough
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def accumulates(module: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Around a forward and backward: only in the `last` one of a step do the ranks exchange gradients."""
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2's
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor the part that this rank has of `like`."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The whole weights, on rank 0 alone; all ranks ask for them."""
    weights = model.state_dict()
    if ranks.mode == "fsdp":
        for name, tensor in weights.items():
            whole = tensor.full_tensor()
            weights[name] = whole.cpu() if ranks.rank == 0 else None
    return weights


# ---- sharded files

def contents(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Weights and moments by name, moments made where there are none yet: what a sharded checkpoint holds."""
    found = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, p in model.named_parameters() if optimizer else ():
        moments = optimizer.state[p]
        if not moments:
            step = torch.zeros((), device=p.device)
            moments |= {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        found |= {f"optimizer.{name}.{key}": tensor for key, tensor in moments.items()}
    return found


def write_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Every rank writes its part; UserError where one cannot."""
    import torch.distributed.checkpoint as dcp

    class Writer(dcp.FileSystemWriter):
        def write_data(self, *args):
            try:
                return super().write_data(*args)
            except (OSError, RuntimeError) as error:
                raise RuntimeError(reason(error)) from None  # on its way to the other ranks it loses its cause

    try:
        dcp.save(tensors, storage_writer=Writer(folder))
    except dcp.CheckpointException as error:
        why = reason(next(iter(error.failures.values()))[0])
        raise UserError(f"cannot write {folder} ({why}): free some space or choose another folder") from error


def part_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a sharded checkpoint, by its name."""
    try:
        return {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): make the folder readable") from error


def check_parts(folder: Path, hashes: dict[str, str]) -> None:
    """Damaged where a file of a sharded checkpoint is missing or has other bytes than were written."""
    for name, expected in hashes.items():
        try:
            found = file_hash(folder / name)
        except FileNotFoundError as error:
            raise Damaged(f"{folder / name} does not exist: restore it") from error
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read ({error.strerror}): make it readable") from error
        if found != expected:
            raise Damaged(f"{folder / name} is damaged, its bytes are not those that were written: restore it")


def check_shards(path: Path, checkpoint: dict) -> list[str]:
    """What is to be said of its sharded files. Damaged where they are not those that it was written with."""
    name, hashes = checkpoint["shards"], checkpoint.get("hashes")
    if not re.fullmatch(r"shards-\d+", name):
        raise Damaged(f"{path} is no checkpoint of this project, it names {name!r} as its folder: restore it")
    if hashes is None:
        return [f"{path} is older than the hashes of sharded files: those in {name} are not checked for damage"]
    texts = [*hashes.keys(), *hashes.values()] if type(hashes) is dict else [None]
    if not all(type(text) is str and "/" not in text for text in texts):
        raise Damaged(f"{path} is no checkpoint of this project, its hashes are none: restore it")
    check_parts(path.with_name(name), hashes)
    return []


def read_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors, whole ones or parts; Damaged where the files are not theirs."""
    import torch.distributed.checkpoint as dcp

    try:
        stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            if name not in stored:
                raise Damaged(f"{folder} does not fit this run, it lacks {name}: restore it")
            size, dtype = list(stored[name].size), stored[name].properties.dtype
            if size != list(tensor.shape) or dtype != tensor.dtype:
                raise Damaged(f"{folder} does not fit this run, {name} is {dtype} {size}, not {tensor.dtype} "
                              f"{list(tensor.shape)}: restore it")  # fmt: skip
        unknown = [name for name in stored if name.startswith("model.") and name not in tensors]
        if unknown:
            raise Damaged(f"{folder} does not fit this run, {unknown[0]!r} is no weight of it: restore it")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process reads them too
            dcp.load(tensors, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        why = reason(next(iter(error.failures.values()))[0])
        raise Damaged(f"{folder} does not fit this run, or is damaged ({why}): restore it") from error
    except (OSError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise Damaged(f"{folder} is damaged or foreign ({type(error).__name__}): restore it") from error
