"""Launches, bytes and waits of HYDRA's parts on a pretended device: `count.py JOB ARGUMENTS`, in JSON, prints JSON."""
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from model import Hydra, HydraConfig
from tests.fakecuda.fake_device import Kernel, Recorder, install


def autocast():
    return torch.autocast("cuda", dtype=torch.bfloat16)


def figures(launches):
    return dict({kind: sum(l.kind == kind for l in launches) for kind in ('triton', 'product', 'other')},
                written=sum(l.written for l in launches), moved=sum(l.moved for l in launches),
                names=[l.name for l in launches])


def count_block(config, layer=0, B=8):
    torch._dynamo.reset()
    counters.clear()
    config = HydraConfig(**config)
    T = config.block_size
    with torch.device("cuda"):
        model = Hydra(config)
        idx = torch.zeros(B, T, dtype=torch.int64)
    block = model.blocks[layer]
    block.compile(fullgraph=True, dynamic=False)
    with autocast():
        ctx = model.context(torch.arange(T, device=idx.device))
    def run(forward, backward):
        x = model.embed(idx).detach().requires_grad_()
        with forward, autocast():
            y = block(x, ctx)
        if block.routed:
            y = y[0]
        g = torch.ones_like(y)
        with backward:
            y.backward(g)
    run(nullcontext(), nullcontext())
    model.zero_grad()
    forward, backward = Recorder(), Recorder()
    run(forward, backward)
    return dict(forward=figures(forward.launches), backward=figures(backward.launches), waits=forward.waits+backward.waits,
                graphs=counters["stats"]["unique_graphs"], breaks=sum(counters["graph_break"].values()))

if __name__ == "__main__":
    install((9, 0))
    with FakeTensorMode():
        base = dict(vocab_size=50257, block_size=1024, dim=768, n_head=12, n_kv_head=3, latent_head_dim=0, n_layer=1, mlp_ratio=3.0)
        import time
        for letter in sys.argv[2]:
            t = time.time()
            r = count_block({**base, 'pattern': letter})
            print(letter, f"{time.time()-t:.1f}s")
            print(json.dumps(r, indent=1) if len(sys.argv)>3 else {k: (v if not isinstance(v, dict) else {a: b for a, b in v.items() if a != 'names'}) for k, v in r.items()}, flush=True)
