"""Counts of HYDRA's parts on a pretended device (fake_device.py): `count.py CAPABILITY JOBS` prints JSON.
JOBS is JSON, name -> [function of this file, its arguments]; the output has what each returned, by the same names."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from layers import cross_entropy, loss_chunk
from model import Hydra, HydraConfig
from tests.fakecuda.fake_device import Kernel, Launch, Recorder, install, resources
from train import TrainConfig, make_optimizer, train_step


def autocast() -> torch.autocast:
    return torch.autocast("cuda", dtype=torch.bfloat16)


def figures(launches: list[Launch]) -> dict:
    kinds = {kind: sum(launch.kind == kind for launch in launches) for kind in ("triton", "product", "other")}
    total = {key: sum(getattr(launch, key) for launch in launches) for key in ("written", "moved")}
    return kinds | total | {"names": [launch.name for launch in launches]}


def make_model(config: dict) -> tuple[Hydra, Callable[[int], Tensor]]:
    """A model that nothing is compiled of yet, and a function that makes token ids for it."""
    torch._dynamo.reset()
    counters.clear()
    with torch.device("cuda"):  # not while Dynamo traces: such a context breaks Tensor.unflatten there
        model = Hydra(HydraConfig(**config))
    return model, lambda B: torch.zeros(B, model.config.block_size, dtype=torch.int64, device="cuda")


def by_call(launches: list[Launch]) -> list[dict]:
    """The figures of every call of a compiled graph, in their order."""
    calls = sorted({launch.graph for launch in launches if launch.graph is not None})
    return [figures([launch for launch in launches if launch.graph == call]) for call in calls]


def made() -> dict:
    """Graphs that Dynamo made, and breaks."""
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def count_block(config: dict, B: int, layer: int = 0) -> dict:
    """A block as training compiles and runs it, forward and backward; `kept`: bytes for the backward, apart
    from parameters."""
    model, ids = make_model(config)
    model.compile_training()
    idx = ids(B)
    kept: dict[int, Tensor] = {}  # by the storage behind it

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t
        return t

    for recorder in (nullcontext(), Recorder()):  # the first compiles
        model.zero_grad()
        kept.clear()
        x = model.embed(idx).detach().requires_grad_()
        with autocast():
            ctx = model.context(torch.arange(idx.size(1), device=idx.device))
        grad = torch.ones_like(x)
        with recorder, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            with autocast():
                y = model.blocks[layer](x, ctx)
            if model.blocks[layer].routed:
                y, _ = y
            y.backward(grad)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    size = sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in parameters)
    return {"calls": by_call(recorder.launches), "kept": size, "waits": recorder.waits} | made()


def count_step(config: dict, B: int) -> dict:
    """A training step of two batches."""
    model, ids = make_model(config)
    model.compile_training()
    optimizer = make_optimizer(model, TrainConfig())
    batches = [(ids(B), ids(B))] * 2
    train_step(model, optimizer, batches, 1.0, autocast())  # compiles
    before = made()
    with Recorder() as recorder:
        train_step(model, optimizer, batches, 1.0, autocast())
    assert made() == before, "a second step compiled again"
    launches = recorder.launches
    eager = [launch for launch in launches if launch.graph is None]
    return {"all": figures(launches), "eager": figures(eager), "calls": by_call(launches),
            "waits": recorder.waits} | before  # fmt: skip


def count_loss(N: int, V: int, D: int) -> dict:
    """The compiled loss of N tokens, forward and backward; a chunk is a call of its graph."""
    compiled = torch.compile(loss_chunk, fullgraph=True, dynamic=False)
    targets = torch.zeros(N, dtype=torch.int64, device="cuda")
    for recorder in (nullcontext(), Recorder()):
        x, weight = (torch.zeros(rows, D, device="cuda", requires_grad=True) for rows in (N, V))
        with recorder:
            with autocast():
                _, loss = cross_entropy(x, weight, targets, compiled)
            loss.backward()
    launches = recorder.launches
    return {"all": figures(launches), "calls": by_call(launches), "waits": recorder.waits} | made()


def assemble_attention(configs: dict[str, dict]) -> dict:
    """What FlexAttention's kernels need, forward and backward, as an attention of each configuration has them."""
    found = {}
    for name, config in configs.items():
        model, ids = make_model(config)
        attn = model.blocks[0].attn
        attn.compile(fullgraph=True, dynamic=False)
        Kernel.sources.clear()
        x = model.embed(ids(1)).detach().requires_grad_()
        with autocast():
            ctx = model.context(torch.arange(x.size(1), device=x.device))
            y = attn(x, ctx)
        y.backward(torch.ones_like(y))
        for kernel, source in Kernel.sources.items():
            if kernel.startswith("triton_tem"):
                side = "backward" if "arg_DO" in source else "forward"
                found[f"{name} {side}"] = resources(kernel, source)
    return found


JOBS = {"block": count_block, "step": count_step, "loss": count_loss, "assemble": assemble_attention}

if __name__ == "__main__":
    install(tuple(int(number) for number in sys.argv[1].split(".")))
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(.., device="cuda") fails among fake tensors
    results = {}
    with FakeTensorMode():
        for name, (job, arguments) in json.loads(sys.argv[2]).items():
            results[name] = JOBS[job](**arguments)
    print(json.dumps(results), flush=True)
    os._exit(0)  # a thread that torch keeps for a real device would abort a process that ends in order
