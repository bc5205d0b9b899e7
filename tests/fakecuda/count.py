"""Counts of HYDRA's parts on a pretended device (fake_device.py): `count.py CAPABILITY JOBS` prints JSON.
JOBS is JSON, name -> [function of this file, its arguments]; the output has what each returned, by the same names."""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from layers import IGNORE, cross_entropy
from model import Hydra, HydraConfig
from tests.fakecuda.fake_device import Kernel, Launch, Recorder, install, resources
from train import TrainConfig, evaluate, make_optimizer, train_step


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


def count_block(config: dict, layer: int, B: int) -> dict:
    """One block as training compiles and runs it, forward and backward."""
    model, ids = make_model(config)
    model.compile_training()
    block = model.blocks[layer]
    inputs = {t.data for t in model.parameters()}
    saved = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage()._cdata] = t
        return t

    def run(forward, backward) -> None:
        model.zero_grad()
        x = model.embed(idx).detach().requires_grad_()
        with forward, autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = block(x, ctx)
        if block.routed:
            y = y[0] + y[1].sum() * 0
        grad = torch.ones_like(y)
        with backward:
            y.backward(grad)

    idx = ids(B)
    with autocast():
        ctx = model.context(torch.arange(idx.size(1), device=idx.device))
    run(nullcontext(), nullcontext())  # compiles
    forward, backward = Recorder(), Recorder()
    saved.clear()
    run(forward, backward)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in parameters)
    return {"forward": figures(forward.launches), "backward": figures(backward.launches),
            "waits": forward.waits + backward.waits, "saved": kept,
            "graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}  # fmt: skip


def count_step(config: dict, B: int) -> dict:
    """A training step of two batches, and the graphs that training and an evaluation make."""
    model, ids = make_model(config)
    model.compile_training()
    optimizer = make_optimizer(model, TrainConfig())
    batches = [(ids(B), ids(B))] * 2
    train_step(model, optimizer, batches, 1.0, autocast())  # compiles
    training = counters["stats"]["unique_graphs"]
    with Recorder() as recorder:
        train_step(model, optimizer, batches, 1.0, autocast())
    again = counters["stats"]["unique_graphs"]
    model.eval()
    with torch.no_grad(), autocast():
        model(*batches[0])
    launches = recorder.launches
    return {"all": figures(launches), "eager": figures([launch for launch in launches if launch.graph is None]),
            "waits": recorder.waits, "training_graphs": training, "recompiled": again - training,
            "graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}  # fmt: skip


JOBS = {"block": count_block, "step": count_step}

if __name__ == "__main__":
    install(tuple(int(number) for number in sys.argv[1].split(".")))
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(.., device="cuda") fails among fake tensors
    results = {}
    with FakeTensorMode():
        for name, (job, arguments) in json.loads(sys.argv[2]).items():
            results[name] = JOBS[job](**arguments)
    print(json.dumps(results))
