"""The training script as a user meets it: the step and the loop, evaluation, divergence, exact resume, errors.

What is about the files of a run is in test_runs.py, sampling in test_sample.py, the machine in test_machine.py; they
use the tiny run of this file.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoints
import limits
import sample
import schedule
import train
from accounting import count_params, flops_per_token
from configurator import UserError, build, cli, field_comments, parse
from data import eval_batches, get_batch, prepare, token_bytes
from layers import IGNORE
from machine import Machine, attention_peak
from model import Hydra, HydraConfig
from schedule import learning_rate_at
from shards import write_shards
from train import TrainConfig

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
TEXT = str(ROOT / "config" / "python4096.tiktoken")  # any text that stays as it is
SHAPE = {"vocab_size": 257, "block_size": 32, "dim": 32, "n_head": 2, "n_kv_head": 1, "compression": 2,
         "latent_head_dim": 0, "mlp_ratio": 1.0}  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick")
# eight layers of every letter, some milliseconds a step
TINY = [*(f"--{key}={value}" for key, value in SHAPE.items()), "--tokenizer=bytes", f"--data={TEXT}",
        "--batch_size=2", "--eval_iters=2", "--final_eval_iters=4", "--warmup_iters=5", "--log_interval=1",
        "--sample_tokens=4"]  # fmt: skip


def options(tmp: Path, name: str, **keys) -> list[str]:
    return [*TINY, f"--out_dir={tmp / name}", f"--cache_dir={tmp / 'cache'}", *(f"--{k}={v}" for k, v in keys.items())]


def configurations(tmp: Path, **keys) -> tuple[HydraConfig, TrainConfig]:
    return build(parse(options(tmp, "run", **keys), HydraConfig, TrainConfig), HydraConfig, TrainConfig)


def shape(**keys) -> HydraConfig:
    return HydraConfig(**(SHAPE | keys))


def text_tokens(tmp: Path):
    """The tokens that the tiny run trains and evaluates on."""
    return prepare(TEXT, "bytes", str(tmp / "cache"))


def start(args: list[str], script="train.py") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / script), *args], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, out[-2000:] + err[-2000:]
    return out, err


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def step_records(out: Path) -> list[dict]:
    return [record for record in records(out) if "loss" in record]


def losses(out: Path) -> list[tuple]:
    """All that a run measured, in order, without times."""
    keys = ("step", "loss", "lr", "grad_norm", "clipped", "val_loss", "val_bpb", "best", "skipped", "aux_loss")
    return [tuple(r.get(k) for k in keys) for r in records(out) if "step" in r]


def layer_norms(out: Path) -> list[tuple[int, dict[str, float]]]:
    return [(record["step"], record["layers"]) for record in records(out) if record["kind"] == "layers"]


def checkpoint(out: Path, name: str = "last") -> dict:
    return torch.load(out / f"{name}.pt", weights_only=True)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint(out)["model"]


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def wait_for_step(out: Path, step: int, process: subprocess.Popen, header: str = "started") -> None:
    """Until the log has step `step` of the run that began with `header`."""
    for _ in range(20000):
        text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
        if header in text and f'"step": {step}, "loss"' in text[text.index(header) :]:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came")


def interrupt_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """A Ctrl-C within the step that comes after `step` others."""
    real = train.train_step
    calls = []

    def train_step(*args):
        calls.append(1)
        if len(calls) == step + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    patch.setattr(train, "train_step", train_step)


def poison(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """Some gradients from the fourth block on are not finite in these steps (from 1, of one batch each), the loss is as
    it was."""
    real = Hydra.forward
    calls = []

    def forward(self, idx, targets=None):
        output = real(self, idx, targets)
        if targets is not None and torch.is_grad_enabled():
            calls.append(1)
            if len(calls) in steps:
                for block in self.blocks[3:]:
                    zero = (block.mlp.down.weight * 0).sum().sqrt()  # its gradient is inf * 0
                    output = output._replace(loss=output.loss + zero)
        return output

    patch.setattr(Hydra, "forward", forward)


@pytest.fixture(autouse=True)
def signals():
    """The signal handlers of pytest, which a run in this process replaces."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


FINISHED = {"max_iters": 5, "eval_interval": 2, "eval_iters": 1, "final_eval_iters": 0, "dtype": "float32",
            "gradient_accumulation_steps": 2, "grad_clip": 2.0, "warmup_iters": 2}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SimpleNamespace:
    """A run of five steps with two batches each, that several tests look at: its folder and what it printed."""
    tmp = tmp_path_factory.mktemp("finished")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert train.main(options(tmp, "run", **FINISHED)) == 0
    config, run = configurations(tmp, **FINISHED)
    return SimpleNamespace(tmp=tmp, out=tmp / "run", printed=printed.getvalue(), config=config, run=run)


# ---- one step


def gradients(model: Hydra, batches: list) -> list[torch.Tensor]:
    """Of the mean over the batches of the language model's loss and of the routers' auxiliary one."""
    total = 0.0
    for idx, targets in batches:
        output = model(idx, targets)
        total = total + F.cross_entropy(output.logits.flatten(0, 1), targets.flatten()) + output.routing["aux_loss"]
    return torch.autograd.grad(total / len(batches), list(model.parameters()))


@pytest.mark.parametrize("clip", [0.0, 0.25, 4.0])
def test_a_step_takes_the_mean_gradient_of_its_batches_once(clip):
    """Plain descent at rate 1, so that the change of the weights is the gradient; `clip` in parts of its norm. The
    auxiliary losses weigh as much as the language model's."""
    torch.manual_seed(0)
    model = Hydra(shape(pattern="MC", n_layer=2, mod_capacity=0.3, mor_recursions=2))
    for router in [*model.depth_routers, *model.recursion_routers]:
        router.aux_weight = 5.0
    batches = [tuple(torch.randint(257, (2, 3, 32)).unbind()) for _ in range(3)]
    expected = gradients(model, batches)
    norm = math.sqrt(sum(g.square().sum().item() for g in expected))
    with torch.no_grad():
        mean = sum(model(*batch).cross_entropy.item() for batch in batches) / 3
        last = model(*batches[-1]).routing
    before = [p.detach().clone() for p in model.parameters()]
    modes = []

    def note(module, args):
        modes.append((module.training, torch.is_autocast_enabled("cpu")))

    model.register_forward_pre_hook(note)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    autocast = torch.autocast("cpu", enabled=False)
    done = train.train_step(model, optimizer, batches, clip * norm, autocast)
    assert done.loss == pytest.approx(mean, rel=1e-5) and done.grad_norm == pytest.approx(norm, rel=1e-4)
    assert done.routing["aux_loss"].item() == pytest.approx(last["aux_loss"].item())
    assert modes == [(True, False)] * 3
    factor = clip if 0 < clip < 1 else 1.0
    for p, old, gradient in zip(model.parameters(), before, expected, strict=True):
        assert p.grad is None
        torch.testing.assert_close(old - p, factor * gradient, rtol=1e-3, atol=1e-5)


def test_one_step_of_a_run_equals_adamw_by_hand(tmp_path):
    """Two accumulated batches, clipping at 0.1, warmup, and a decay that no rounding hides."""
    keys = dict(max_iters=1, gradient_accumulation_steps=2, grad_clip=0.1, warmup_iters=2, learning_rate=0.02,
                weight_decay=30.0)  # fmt: skip
    train.main(options(tmp_path, "run", dtype="float32", **keys))
    config, run = configurations(tmp_path, **keys)
    torch.manual_seed(run.seed)
    model = Hydra(config)
    tokens = text_tokens(tmp_path).train
    mean = 0.0
    for micro in range(2):
        loss = model(*get_batch(tokens, 2, 32, run.seed, micro)).cross_entropy / 2
        loss.backward()
        mean += loss.item()
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
    assert norm > 0.1
    (record,) = step_records(tmp_path / "run")
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4) and record["loss"] == pytest.approx(mean, rel=1e-5)
    assert record["lr"] == pytest.approx(0.01) and record["clipped"] == 1
    got = weights(tmp_path / "run")
    for name, p in model.named_parameters():
        vector = p.dim() < 2 or "conv_depthwise" in name
        kept = 1.0 if vector else 1 - 0.01 * 30
        g = p.grad * (0.1 / (norm + 1e-6))
        expected = p.detach() * kept - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-5)


def test_matrices_and_embeddings_decay_and_nothing_else():
    model = Hydra(shape(pattern="MCL", n_layer=3, mod_capacity=0.5, mor_recursions=2))
    run = TrainConfig(weight_decay=0.3, beta1=0.8, beta2=0.7, learning_rate=0.5)
    names = {p: name for name, p in model.named_parameters()}
    decayed, plain = train.make_optimizer(model, run).param_groups
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0
    assert decayed["betas"] == plain["betas"] == (0.8, 0.7) and decayed["lr"] == plain["lr"] == 0.5
    matrices = {names[p] for p in decayed["params"]}
    vectors = {names[p] for p in plain["params"]}
    assert matrices | vectors == set(names.values()) and not matrices & vectors
    for name in vectors:
        assert name.endswith(("norm.weight", "k_temperature", "conv_depthwise", "router.weight")) or "routers" in name
    assert {"embed.weight", "blocks.0.attn.qkv.weight", "blocks.1.attn.conv_grouped"} <= matrices
    assert {"recursion_routers.0.weight", "blocks.1.router.weight", "blocks.1.attn.conv_depthwise"} <= vectors


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_a_run_clips_to_the_norm_that_was_asked_for(tmp_path, monkeypatch, clip):
    """With plain descent at a known rate the weights move by rate times the clipped norm."""
    rate = 0.01
    monkeypatch.setattr(train, "make_optimizer", lambda model, run: torch.optim.SGD(model.parameters(), lr=1.0))
    keys = dict(max_iters=1, dtype="float32", warmup_iters=0, learning_rate=rate, grad_clip=clip)
    train.main(options(tmp_path, "run", **keys))
    config, run = configurations(tmp_path, **keys)
    torch.manual_seed(run.seed)
    moved = 0.0
    got = weights(tmp_path / "run")
    for name, p in Hydra(config).named_parameters():
        moved += (got[name] - p.detach()).square().sum().item()
    (record,) = step_records(tmp_path / "run")
    assert record["grad_norm"] > 1 and record["clipped"] == (clip > 0)
    assert math.sqrt(moved) == pytest.approx(rate * (clip or record["grad_norm"]), rel=1e-3)


# ---- the loop


@pytest.mark.parametrize("first, accumulation", [(0, 2), (2, 1)])
def test_every_step_takes_the_next_batches_of_the_seed(tmp_path, monkeypatch, first, accumulation):
    """Also from the step at which a run is resumed."""
    keys = dict(eval_interval=10, seed=5, gradient_accumulation_steps=accumulation)
    if first:
        train.main(options(tmp_path, "run", max_iters=first, **keys))
    real = Hydra.forward
    seen = []

    def forward(self, idx, targets=None):
        if torch.is_grad_enabled():
            seen.append((idx, targets))
        return real(self, idx, targets)

    monkeypatch.setattr(Hydra, "forward", forward)
    resume = ["--resume"] if first else []
    train.main([*options(tmp_path, "run", max_iters=first + 3, **keys), *resume])
    tokens = text_tokens(tmp_path).train
    assert len(seen) == 3 * accumulation
    for number, (idx, targets) in enumerate(seen, first * accumulation):
        x, y = get_batch(tokens, 2, 32, 5, number)
        assert torch.equal(idx, x) and torch.equal(targets, y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_computes_in_its_dtype_everywhere(tmp_path, monkeypatch, dtype):
    """Training, evaluation, samples and the check before a checkpoint."""
    real = Hydra.trunk
    seen = []

    def trunk(self, *args):
        seen.append((self.training, torch.is_autocast_enabled("cpu")))
        return real(self, *args)

    monkeypatch.setattr(Hydra, "trunk", trunk)
    train.main(options(tmp_path, "run", max_iters=1, dtype=dtype))
    autocast = dtype == "bfloat16"
    assert set(seen) == {(True, autocast), (False, autocast)}
    assert f"torch.{dtype} (asked for)" in records(tmp_path / "run")[0]["dtype"]


def test_the_log_has_what_the_line_says(finished):
    log = records(finished.out)
    assert {"started", "config", "git", "torch", "fingerprint", "parameters"} <= log[0].keys()
    assert {"device", "dtype", "compile", "attention M", "attention C", "attention L"} <= log[0].keys()
    assert log[0]["parameters"] == count_params(finished.config) and log[0]["started"] == 0
    steps = step_records(finished.out)
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    for key in ("loss", "lr", "grad_norm", "clipped", "ms", "tokens_per_s", "mfu", "eta_s", "skipped"):
        for record in steps:
            assert math.isfinite(record[key]), key
    evaluations = [r for r in log if "val_bpb" in r]
    assert [r["step"] for r in evaluations] == [0, 2, 4, 5, 5]
    assert [r.get("final", False) for r in evaluations] == [False] * 4 + [True]
    for words in ("step     4 |  80% | loss", "| norm", "| clipped", "tokens/s | MFU", "ETA 0:00", "bits/byte",
                  "sample at step 2", "compile: off (", "device: cpu", "dtype: torch.float32 (asked for)",
                  "attention C: sdpa (", "); CCQA, ", "dim = 32", "whole validation split: ",
                  f"step     5 | validation {evaluations[-2]['val_loss']:.4f} nats/token"):  # fmt: skip
        assert words in finished.printed, words
    assert json.loads(finished.printed.splitlines()[-1]) | {"kind": "final", "final": True} == evaluations[-1]
    stored = tomllib.loads((finished.out / "config.toml").read_text())
    assert stored["dim"] == 32 and stored["max_iters"] == 5


def test_rates_count_every_batch_and_three_forwards(finished):
    header = records(finished.out)[0]
    training_flops = 3 * flops_per_token(finished.config, 32)
    assert header["flops_per_token"] == pytest.approx(training_flops)
    for record in step_records(finished.out):
        assert record["tokens_per_s"] * record["ms"] / 1e3 == pytest.approx(2 * 2 * 32)
        mfu = training_flops * record["tokens_per_s"] / header["matmul_peak"]
        assert record["mfu"] == pytest.approx(mfu)
        assert record["mfu_6n"] == pytest.approx(mfu * 6 * header["parameters"] / training_flops)


def test_the_machine_is_chosen_for_this_run(tmp_path, monkeypatch):
    """By what was asked for, the model's width, and the operations of all its steps."""
    asked = []
    real = train.choose_machine

    def choose_machine(*args):
        asked.append(args)
        return real("cpu", "float32", "off", *args[3:])

    monkeypatch.setattr(train, "choose_machine", choose_machine)
    keys = dict(max_iters=2, gradient_accumulation_steps=3, device="cpu", dtype="bfloat16", compile="auto")
    train.main(options(tmp_path, "run", **keys))
    config, _ = configurations(tmp_path)
    flops = 2 * 3 * flops_per_token(config, 32) * (3 * 2 * 32)
    assert asked == [("cpu", "bfloat16", "auto", 32, pytest.approx(flops))]


def test_the_rate_of_the_schedule_is_the_rate_of_the_step(finished):
    for record in step_records(finished.out):
        assert record["lr"] == pytest.approx(learning_rate_at(record["step"] - 1, finished.run, 5))
    assert len({record["lr"] for record in step_records(finished.out)}) > 3


def test_times_are_means_since_the_last_line_and_of_this_run(tmp_path, monkeypatch):
    """With a clock whose n-th reading is n*n: it is read at the start, before the first step of a line,
    behind the last one, and at the line."""
    ticks = (n * n for n in range(10**6))
    keys = dict(log_interval=2, eval_interval=50)
    train.main(options(tmp_path, "run", max_iters=4, **keys))
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    train.main([*options(tmp_path, "run", max_iters=10, **keys), "--resume"])
    steps = step_records(tmp_path / "run")
    assert [r["step"] for r in steps] == [1, 2, 4, 6, 8, 10]
    # steps of this run, seconds of each of the two before, such as (2*2 - 1*1) / 2, and seconds by then
    expected = [(2, 1.5, 9), (4, 4.5, 36), (6, 7.5, 81)]
    for record, (count, mean, seconds) in zip(steps[-3:], expected, strict=True):
        assert record["ms"] == 1000 * mean
        assert record["eta_s"] == pytest.approx((10 - record["step"]) * seconds / count)


def test_the_clipped_fraction_is_of_the_steps_since_the_last_line(tmp_path):
    train.main(options(tmp_path, "run", max_iters=7, log_interval=3, grad_clip=1e-6))
    steps = step_records(tmp_path / "run")
    assert [(r["step"], r["clipped"]) for r in steps] == [(1, 1), (3, 1), (6, 1), (7, 1)]  # the last one, too


def test_a_part_of_the_steps_is_clipped(tmp_path, monkeypatch):
    """Six steps, of which the bound clips some: the fraction counts those, also over an interruption."""
    keys = dict(max_iters=6, eval_interval=10, dtype="float32", warmup_iters=0, n_layer=2)
    train.main(options(tmp_path, "every", grad_clip=1e9, **keys))
    # the first bound that clips is between the largest norm and the next, so that no update changes before it
    norms = [r["grad_norm"] for r in step_records(tmp_path / "every")]
    bound = sorted(norms[1:])[-1] * 0.999
    train.main(options(tmp_path, "fine", grad_clip=bound, **keys))
    train.main(options(tmp_path, "coarse", grad_clip=bound, log_interval=5, **keys))
    clipped = [r["clipped"] for r in step_records(tmp_path / "fine")]
    assert set(clipped) == {0, 1}
    assert clipped[1:5] != [1] * 4 and sum(clipped[1:5]) > 0, norms
    assert [r["clipped"] for r in step_records(tmp_path / "coarse")] == [clipped[0], sum(clipped[1:5]) / 4, clipped[5]]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert train.main(options(tmp_path, "broken", grad_clip=bound, log_interval=5, **keys)) == 130
    train.main([f"--out_dir={tmp_path / 'broken'}", "--resume"])
    assert losses(tmp_path / "broken") == losses(tmp_path / "coarse")


@pytest.mark.parametrize("keys", [
    dict(n_layer=2, pattern="MC", log_layers=1, grad_clip=0.01, gradient_accumulation_steps=2, mod_capacity=0.5),
    dict(n_layer=1, pattern="L", log_layers=2, mor_recursions=2, log_interval=3, eval_interval=5),
])  # fmt: skip
def test_the_norms_of_the_layers_are_logged_every_so_many_steps(tmp_path, keys):
    """Before the clip: their squares add up to that of the whole gradient, whenever they are read."""
    train.main(options(tmp_path, "run", max_iters=7, dtype="float32", **keys))
    train.main(options(tmp_path, "every", max_iters=7, dtype="float32", **keys | {"log_interval": 1, "log_layers": 0}))
    every = {record["step"]: record["grad_norm"] for record in step_records(tmp_path / "every")}
    found = layer_norms(tmp_path / "run")
    assert [step for step, _ in found] == [step for step in range(1, 8) if step % keys["log_layers"] == 0]
    names = {"embed", "norm", *(f"blocks.{i}" for i in range(keys["n_layer"]))}
    names |= {"recursion_routers"} if "mor_recursions" in keys else set()
    for step, norms in found:
        assert norms.keys() == names and all(norm > 0 for norm in norms.values())
        assert math.hypot(*norms.values()) == pytest.approx(every[step], rel=1e-5)
    assert layer_norms(tmp_path / "every") == []


def test_the_norm_of_a_layer_is_that_of_its_parameters(tmp_path):
    """Of the batch that the seed draws, by autograd, for the weights that the run begins with."""
    keys = dict(n_layer=2, pattern="MC", dtype="float32", max_iters=1)
    train.main(options(tmp_path, "run", log_layers=1, **keys))
    config, run = configurations(tmp_path, **keys)
    torch.manual_seed(run.seed)
    model = Hydra(config)
    model(*get_batch(text_tokens(tmp_path).train, 2, 32, run.seed, 0)).loss.backward()
    ((_, norms),) = layer_norms(tmp_path / "run")
    for i, block in enumerate(model.blocks):
        gradient = torch.cat([p.grad.flatten() for p in block.parameters()])
        assert norms[f"blocks.{i}"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert norms["embed"] == pytest.approx(model.embed.weight.grad.norm().item(), rel=1e-5)


def test_every_record_of_a_log_names_its_kind(tmp_path, monkeypatch):
    """A norm that is not finite is null there."""
    poison(monkeypatch, 2, *range(4, 14))
    assert train.main(options(tmp_path, "run", max_iters=20, log_layers=1, eval_interval=3, log_interval=1)) == 1
    found = records(tmp_path / "run")
    for record in found:
        expected = {"header": "config", "step": "loss", "layers": "layers", "skipped": "skipped", "stopped": "stopped",
                    "evaluation": "best"}[record["kind"]]  # fmt: skip
        assert expected in record
    assert {record["kind"] for record in found} == {"header", "step", "layers", "skipped", "evaluation", "stopped"}
    bad = dict(layer_norms(tmp_path / "run"))[2]
    assert bad["blocks.3"] is None and bad["norm"] > 0
    train.main(options(tmp_path, "whole", max_iters=0))
    assert [record["kind"] for record in records(tmp_path / "whole")] == ["header", "evaluation", "final"]


def test_samples_have_their_seed_and_are_left_out_where_they_say_nothing(tmp_path, monkeypatch, capsys):
    calls = []

    def continue_text(model, enc, prompt, tokens, seed):
        calls.append((prompt, tokens, seed))
        return "TEXT"

    monkeypatch.setattr(train, "continue_text", continue_text)
    keys = dict(max_iters=3, eval_interval=2, seed=100, sample_prompt="ab")
    train.main(options(tmp_path, "run", **keys))
    assert calls == [("ab", 4, 100), ("ab", 4, 102), ("ab", 4, 103)]
    assert capsys.readouterr().out.count("\nTEXT\n") == 3
    train.main([*options(tmp_path, "run", **keys), "--sample_tokens=0"])
    monkeypatch.setattr(train, "evaluate", lambda *args: {"val_loss": math.nan, "val_bpb": math.nan})
    train.main(options(tmp_path, "run", **keys))
    assert len(calls) == 3


def test_blocks_are_compiled_where_that_was_chosen(tmp_path, monkeypatch):
    """With a stand-in for the compiler: how many graphs there may be follows the recursions."""
    compiled = []
    monkeypatch.setattr("model.compile_blocks", lambda blocks, graphs: compiled.append((len(blocks), graphs)))
    monkeypatch.setattr("machine.shutil.which", lambda name: "/bin/g++")
    monkeypatch.setattr("machine.sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    keys = dict(max_iters=0, mor_recursions=2)
    train.main(options(tmp_path, "off", compile="off", **keys))
    train.main(options(tmp_path, "auto", **keys))
    assert compiled == []
    train.main(options(tmp_path, "on", compile="on", **keys))
    assert compiled == [(8, 128)]
    assert records(tmp_path / "on")[0]["compile"] == "on, block by block (asked for)"
    assert records(tmp_path / "off")[0]["compile"] == "off (asked for)"


def test_the_schedule():
    run = TrainConfig(learning_rate=1.0, warmup_iters=10, max_iters=110, min_lr_ratio=0.1)
    rates = [learning_rate_at(step, run, 110) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0) and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert learning_rate_at(500, run, 110) == pytest.approx(0.1)
    assert learning_rate_at(0, replace(run, warmup_iters=0), 110) == 1.0
    assert learning_rate_at(35, run, 110) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    constant = replace(run, min_lr_ratio=1.0)
    assert [learning_rate_at(step, constant, 110) for step in (10, 60, 110)] == [1.0] * 3
    assert learning_rate_at(4, run, 5) == pytest.approx(0.5)  # ends within its warmup


def test_wsd_is_constant_and_then_a_line():
    run = TrainConfig(learning_rate=1.0, warmup_iters=10, min_lr_ratio=0.1, schedule="wsd", decay_ratio=0.25)
    rates = [learning_rate_at(step, run, 120) for step in range(121)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:91] == [1.0] * 81  # to the joint, from which it falls evenly
    assert [a - b for a, b in zip(rates[90:], rates[91:], strict=False)] == pytest.approx([0.9 / 30] * 30)
    assert rates[120] == pytest.approx(0.1) and learning_rate_at(130, run, 120) == pytest.approx(0.1)
    assert [learning_rate_at(step, replace(run, decay_ratio=0.0), 120) for step in (10, 119)] == [1.0, 1.0]
    whole = replace(run, decay_ratio=1.0)  # a decay that would begin within the warmup begins behind it
    assert [learning_rate_at(step, whole, 120) for step in (9, 10, 65, 120)] == pytest.approx([1, 1, 0.55, 0.1])


# ---- what ends a run


def test_the_step_at_which_tokens_or_flops_are_reached(tmp_path):
    config, run = configurations(tmp_path, gradient_accumulation_steps=3, max_iters=7)
    tokens, flops = 2 * 3 * 32, 3 * flops_per_token(config, 32) * (2 * 3 * 32)
    assert schedule.planned_steps(config, run) == 7
    for asked, steps in ((1, 1), (tokens, 1), (tokens + 1, 2), (50 * tokens - 1, 50), (50 * tokens, 50)):
        assert schedule.planned_steps(config, replace(run, max_tokens=asked)) == steps
    for n in range(1, 200):  # whatever the rounding of the product
        assert schedule.planned_steps(config, replace(run, max_flops=n * flops)) == n
    assert schedule.planned_steps(config, replace(run, max_flops=7.01 * flops)) == 8
    assert schedule.planned_steps(config, replace(run, max_flops=1e-320)) == 1


@pytest.mark.parametrize("stop", ["max_tokens", "max_flops"])
def test_tokens_and_flops_are_steps_in_disguise(tmp_path, monkeypatch, capsys, stop):
    """The very losses and rates of a run of so many steps, also when it was stopped: max_iters does not count."""
    keys = dict(eval_interval=2, n_layer=1, pattern="M")
    config, _ = configurations(tmp_path, **keys)
    asked = {"max_tokens": 5 * 64, "max_flops": 5 * 3 * flops_per_token(config, 32) * 64}[stop]
    train.main(options(tmp_path, "straight", max_iters=5, **keys))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert train.main(options(tmp_path, "run", max_iters=1, **keys, **{stop: asked})) == 130
    assert train.main([f"--out_dir={tmp_path / 'run'}", "--resume"]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert f"ends: {stop}={asked}: 5 steps, 320 tokens, " in capsys.readouterr().out
    with pytest.raises(UserError, match=f"{stop}=64.*: the run in .* is at step 5: ask for more"):
        train.main([f"--out_dir={tmp_path / 'run'}", "--resume", f"--{stop}=64"])
    for given, words in ((["--max_iters=7"], f"max_iters=7: {stop}={asked} ends the run in .*: set --{stop}=0 too"),
                         (["--batch_size=1"], f"batch_size=1: the run ends by {stop}, and its steps so far had"),
                         (["--gradient_accumulation_steps=3", f"--{stop}={asked * 4}"], "so far had 1: leave it out")):
        with pytest.raises(UserError, match=words):
            train.main([f"--out_dir={tmp_path / 'run'}", "--resume", *given])
    assert train.main([f"--out_dir={tmp_path / 'run'}", "--resume", f"--{stop}=0", "--max_iters=7"]) == 0


def fake_seconds(patch: pytest.MonkeyPatch, first: float = 1.0) -> None:
    """A clock on which a step takes one second, the first one of a process `first`, and an evaluation a hundred."""
    now = [1000.0]
    seconds = iter([first] + [1.0] * 100)
    step, evaluation = train.train_step, train.evaluate

    def train_step(*args):
        now[0] += next(seconds)
        return step(*args)

    def evaluate(*args):
        now[0] += 100
        return evaluation(*args)

    patch.setattr(train, "train_step", train_step)
    patch.setattr(train, "evaluate", evaluate)
    patch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0]))


SECONDS = {"n_layer": 1, "pattern": "M", "max_seconds": 9, "warmup_iters": 2, "eval_interval": 4, "log_interval": 3}


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_seconds_of_training_end_a_run_and_the_rate_follows_them(tmp_path, monkeypatch, capsys, schedule):
    """Evaluations do not count, and the rate is that of a run of as many steps as its pace promises; it goes on from
    the seconds that it had when it was stopped."""
    keys = SECONDS | {"schedule": schedule}
    with monkeypatch.context() as patch:
        fake_seconds(patch)
        assert train.main(options(tmp_path, "straight", **keys)) == 0
    with monkeypatch.context() as patch:
        fake_seconds(patch)
        interrupt_after(patch, 4)
        assert train.main(options(tmp_path, "run", **keys)) == 130
    assert checkpoint(tmp_path / "run")["seconds"] == 5
    with monkeypatch.context() as patch:
        fake_seconds(patch)
        assert train.main([f"--out_dir={tmp_path / 'run'}", "--resume"]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    _, run = configurations(tmp_path, **keys)
    with pytest.raises(UserError, match="max_seconds=7.0: the run in .* has trained for 9.0 seconds: ask for more"):
        train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_seconds=7"])
    steps = step_records(tmp_path / "straight")
    assert [r["step"] for r in steps] == [1, 3, 6, 9]
    assert [r["lr"] for r in steps] == pytest.approx([learning_rate_at(n, run, 9) for n in (0, 2, 5, 8)])
    assert [r["eta_s"] for r in steps] == [8, 6, 3, 0]
    assert [r["seconds"] for r in records(tmp_path / "straight") if "val_loss" in r] == [0, 4, 8, 9, 9]
    out = capsys.readouterr().out
    assert "step     6 |  67% |" in out and "ends: max_seconds=9.0" in out


def test_compilation_is_no_second_of_training(tmp_path, monkeypatch):
    monkeypatch.setattr("model.compile_blocks", lambda blocks, graphs: None)
    monkeypatch.setattr("machine.choose_compile", lambda *args: (True, "a stand-in"))
    fake_seconds(monkeypatch, first=50.0)
    train.main(options(tmp_path, "run", **SECONDS))
    assert step_records(tmp_path / "run")[-1]["step"] == 9 and checkpoint(tmp_path / "run")["step"] == 10
    assert checkpoint(tmp_path / "run")["seconds"] == 9 and step_records(tmp_path / "run")[0]["ms"] == 50000


def test_the_rate_never_rises_again_whatever_the_pace():
    run = TrainConfig(learning_rate=1.0, warmup_iters=3, min_lr_ratio=0.0)
    seconds, rates = 0.0, []
    for step, taken in enumerate([1, 1, 1, 1, 9, 1, 1, 30, 1, 1, 5, 5, 5, 50]):
        in_all = schedule.expected_steps(step, seconds, 100.0)
        assert in_all > step
        rates.append(learning_rate_at(step, run, in_all))
        seconds += taken
    assert rates[3] == 1.0 and rates[3:] == sorted(rates[3:], reverse=True)
    assert schedule.expected_steps(14, seconds, 100.0) == 14


def test_a_folder_of_data_may_hold_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("abc def\n" * 200)
    args = [*TINY, "--data=.", "--out_dir=out", "--cache_dir=cache", "--max_iters=1"]
    train.main(args)
    train.main(["--resume", "--max_iters=2"])


@pytest.mark.slow
def test_a_compiled_run_trains_to_the_same_losses(tmp_path):
    torch._dynamo.reset()
    keys = dict(max_iters=3, dtype="float32", n_layer=1, pattern="C")
    train.main(options(tmp_path, "eager", **keys))
    train.main(options(tmp_path, "compiled", compile="on", **keys))
    pairs = zip(records(tmp_path / "eager"), records(tmp_path / "compiled"), strict=True)
    for a, b in list(pairs)[1:]:
        for key in {"loss", "grad_norm", "val_loss"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


@pytest.mark.slow
def test_a_short_training_beats_a_unigram_model(tmp_path):
    """On a package of the standard library, in bits per byte over the whole validation split, byte tokens."""
    package = str(Path(json.__file__).parents[1] / "asyncio")
    args = ["--n_layer=4", "--pattern=MCCL", "--dim=64", "--n_head=4", "--compression=2", "--latent_head_dim=0",
            "--mlp_ratio=2", "--block_size=128", "--vocab_size=257",
            "--tokenizer=bytes", "--batch_size=8", "--max_iters=120", "--warmup_iters=10", "--learning_rate=4e-3",
            "--eval_interval=120", "--sample_tokens=0", "--eval_iters=2", f"--data={package}",
            f"--cache_dir={tmp_path}", f"--out_dir={tmp_path / 'run'}"]  # fmt: skip
    train.main(args)
    corpus = prepare(package, "bytes", str(tmp_path))
    p = np.bincount(corpus.train, minlength=257) / len(corpus.train)
    counts = np.bincount(corpus.val, minlength=257)
    unigram = -(counts[p > 0] * np.log2(p[p > 0])).sum() / counts[:256].sum()
    bpb = records(tmp_path / "run")[-1]["val_bpb"]
    assert 4.3 < unigram < 4.8 and bpb < 0.9 * unigram, (bpb, unigram)


# ---- evaluation


def evaluation_by_hand(model: Hydra, tokens: np.ndarray, batches: int, sizes: torch.Tensor) -> tuple[float, float]:
    """(nats per token, bits per byte), window by window."""
    model.eval()
    nats, count, size = 0.0, 0, 0
    for x, y in eval_batches(tokens, 2, 32, 2 * batches):
        for row, targets in zip(x, y, strict=True):
            kept = int((targets != IGNORE).sum())
            if not kept:
                continue
            with torch.no_grad():
                logits = model(row[None], targets[None]).logits[0, :kept]
            nats += F.cross_entropy(logits, targets[:kept], reduction="sum").item()
            count += kept
            size += sizes[targets[:kept]].sum().item()
    model.train()
    return nats / count, nats / math.log(2) / size


def test_evaluation_is_nats_per_token_and_bits_per_byte():
    """A model without knowledge: uniform logits cost log(V) a token, and log2(V) a byte where a token is a byte."""
    model = Hydra(shape())
    model.norm.weight.data.zero_()
    tokens = np.arange(1000, dtype=np.uint16) % 256
    sizes = torch.ones(257, dtype=torch.long)
    found = train.evaluate(model, tokens, sizes, 3, 0, CPU)
    assert found["val_loss"] == pytest.approx(math.log(257), abs=1e-5)
    assert found["val_bpb"] == pytest.approx(math.log2(257), abs=1e-5)
    half = train.evaluate(model, tokens, 2 * sizes, 3, 6, CPU)
    assert half["val_bpb"] == pytest.approx(math.log2(257) / 2, abs=1e-5)
    assert found.keys() == {"val_loss", "val_bpb"}


@pytest.mark.parametrize("batches", [0, 2])
@pytest.mark.parametrize("routing", [{}, {"mod_capacity": 0.25}, {"mor_recursions": 2}])
def test_evaluation_follows_the_causal_rule_and_weighs_by_targets(routing, batches):
    """Windows and a batch that are not full, tokens of 0 to 6 bytes, a router that would take a fixed part of them in
    training; the model is in training mode before and after, never within."""
    torch.manual_seed(0)
    model = Hydra(shape(pattern="MC", n_layer=2, **routing))
    for p in model.parameters():
        p.data.mul_(3)
    tokens = np.random.default_rng(0).integers(0, 257, 150).astype(np.uint16)
    sizes = torch.arange(257) % 7
    modes = []

    def note(module, args):
        modes.append((module.training, torch.is_grad_enabled()))

    hook = model.register_forward_pre_hook(note)
    found = train.evaluate(model, tokens, sizes, 2, 2 * batches, CPU)
    hook.remove()
    assert set(modes) == {(False, False)} and len(modes) == (batches or 3)
    assert all(module.training for module in model.modules())
    nats, bits = evaluation_by_hand(model, tokens, batches, sizes)
    assert found["val_loss"] == pytest.approx(nats, rel=1e-5) and found["val_bpb"] == pytest.approx(bits, rel=1e-5)
    x, y = list(eval_batches(tokens, 2, 32, 2 * batches))[-1]
    model.eval()
    last = model(x, y).routing
    names = {"mod_capacity": "routed_fraction", "mor_recursions": "mean_depth"}
    expected = {f"val_{names[key]}": last[names[key]].item() for key in routing}
    assert {key: value for key, value in found.items() if key not in ("val_loss", "val_bpb")} == expected


def test_a_run_evaluates_on_the_validation_text(finished):
    """At the interval on eval_iters batches, at the end on final_eval_iters, by the weights of that step."""
    corpus = text_tokens(finished.tmp)
    sizes = torch.from_numpy(token_bytes(corpus.enc, 257))
    model = Hydra(finished.config)
    model.load_state_dict(weights(finished.out))
    some, whole = [r for r in records(finished.out) if "val_bpb" in r and r["step"] == 5]
    for record, batches in ((some, 1), (whole, 0)):
        nats, bits = evaluation_by_hand(model, corpus.val, batches, sizes)
        assert record["val_loss"] == pytest.approx(nats, rel=1e-5)
        assert record["val_bpb"] == pytest.approx(bits, rel=1e-5)
    assert some["val_loss"] != pytest.approx(whole["val_loss"], rel=1e-4)


def test_checkpoints_come_before_evaluations_and_best_after_a_better_one(tmp_path, monkeypatch):
    """The validation loss as it is given here: what is saved when, and what is in it."""
    given = iter([9.0, 5.0, 7.0, 5.0, 4.0, 1.0])
    events = []

    def evaluate(*args):
        loss = next(given)
        events.append(loss)
        return {"val_loss": loss, "val_bpb": loss}

    real = train.checkpoints.save_checkpoint

    def save_checkpoint(path, content):
        events.append((path.name, content["step"], content["best"], "optimizer" in content))
        real(path, content)

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train.checkpoints, "save_checkpoint", save_checkpoint)
    train.main(options(tmp_path, "run", max_iters=7, eval_interval=2, sample_tokens=0))
    assert events == [
        9.0,  # before the first step: nothing to save
        ("last.pt", 2, 9.0, True), 5.0, ("best.pt", 2, 5.0, False),
        ("last.pt", 4, 5.0, True), 7.0,
        ("last.pt", 6, 5.0, True), 5.0,  # as good is not better
        ("last.pt", 7, 5.0, True), 4.0, ("best.pt", 7, 4.0, False), 1.0,
    ]  # fmt: skip
    assert [r["best"] for r in records(tmp_path / "run") if "best" in r] == [True, True, False, False, True]


# ---- divergence


def test_divergence_skips_names_stops_and_keeps_the_checkpoint(tmp_path, capsys):
    train.main(options(tmp_path, "run", max_iters=4, eval_interval=2))
    last = tmp_path / "run" / "last.pt"
    before = hashlib.sha256(last.read_bytes()).digest()
    args = [f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=400", "--learning_rate=1e30"]
    assert train.main([*args, "--eval_interval=100"]) == 1
    printed, err = capsys.readouterr()
    assert "is not finite: update skipped (10 so far)" in printed
    assert "10 steps in a row were not finite" in err and "is kept: lower --learning_rate" in err
    assert "10 steps in a row" in records(tmp_path / "run")[-1]["stopped"]
    assert hashlib.sha256(last.read_bytes()).digest() == before
    assert sum("not finite" in line and "skipped" in line for line in printed.splitlines()) == 10
    assert train.main([*args[:2], "--max_iters=6", "--learning_rate=1e-3"]) == 0


@pytest.mark.parametrize("interval", [1, 3])
def test_divergence_across_evaluations_keeps_the_last_good_checkpoint(tmp_path, capsys, interval):
    """Weights that are finite but give no finite loss are not saved over good ones, and nothing is sampled of them."""
    args = options(tmp_path, "run", max_iters=60, eval_interval=interval, warmup_iters=0, learning_rate=1e-3)
    train.main([*args, "--max_iters=3"])
    good = (tmp_path / "run" / "last.pt").read_bytes()
    assert train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=140", "--learning_rate=1e15"]) == 1
    assert (tmp_path / "run" / "last.pt").read_bytes() == good
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        assert "NaN" not in line and "Infinity" not in line and json.loads(line)


def test_a_gradient_that_is_not_finite_is_named_skipped_and_leaves_no_trace(tmp_path, capsys, monkeypatch):
    """One poisoned gradient: that update is skipped, the parameter is named, the run goes on as if it had not been."""
    keys = dict(max_iters=5, grad_clip=1e-6, log_interval=5, dtype="float32")
    poison(monkeypatch, 2)
    assert train.main(options(tmp_path, "run", **keys)) == 0
    printed = capsys.readouterr().out
    assert "step     2 | gradient of blocks.3.mlp.down.weight is not finite: update skipped (1 so far)" in printed
    assert all(p.isfinite().all() for p in weights(tmp_path / "run").values())
    assert [(r["step"], r["skipped"], r["clipped"]) for r in step_records(tmp_path / "run")] == [(1, 0, 1), (5, 1, 1)]
    skipped = [r for r in records(tmp_path / "run") if "skipped" in r and "loss" not in r]
    assert skipped == [{"kind": "skipped", "step": 2, "skipped": "gradient of blocks.3.mlp.down.weight"}]
    moments = checkpoint(tmp_path / "run")["optimizer"]["state"]
    assert {int(moment["step"]) for moment in moments.values()} == {4}


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_that_is_not_finite_updates_nothing_whatever_its_gradient(fused):
    """One bad batch of two; the host decides for SGD, the kernel for the fused AdamW."""
    model = Hydra(shape(pattern="M", n_layer=1))
    before = [p.detach().clone() for p in model.parameters()]
    real = model.forward

    def forward(idx, targets):
        return real(idx, targets)._replace(cross_entropy=torch.tensor(math.inf if idx[0, 0] == 0 else 1.0))

    model.forward = forward
    batches = [(torch.full((1, 8), token), torch.ones(1, 8, dtype=torch.int64)) for token in (0, 1)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if fused:
        optimizer = train.make_optimizer(model, TrainConfig(weight_decay=1.0))
    done = train.train_step(model, optimizer, batches, 1.0, torch.autocast("cpu", enabled=False))
    assert done.loss == math.inf and done.grad_norm.isfinite()
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.grad is None and torch.equal(p, old)


def test_weights_of_another_run_start_a_new_one(tmp_path, capsys):
    """On another text and a longer block: the shape is the other run's, steps and optimiser are new."""
    train.main(options(tmp_path, "first", max_iters=3, eval_interval=3, dim=64, learning_rate=1e-2))
    other = tmp_path / "other.txt"
    other.write_text("some other text\n" * 400)
    args = [f"--out_dir={tmp_path / 'tuned'}", f"--cache_dir={tmp_path / 'cache'}", f"--data={other}",
            "--block_size=48", f"--init_from={tmp_path / 'first'}", "--max_iters=0", "--eval_iters=2"]  # fmt: skip
    assert train.main([*args, "--sample_tokens=0", "--final_eval_iters=1"]) == 0
    record = records(tmp_path / "tuned")[0]
    assert record["started"] == 0 and record["config"]["dim"] == 64 and record["config"]["block_size"] == 48
    config = HydraConfig(**{k: v for k, v in record["config"].items() if k in HydraConfig.__dataclass_fields__})
    model = Hydra(config).eval()
    model.load_state_dict(checkpoint(tmp_path / "first", "best")["model"])
    corpus = prepare(str(other), "bytes", str(tmp_path / "cache"))
    x, y = next(eval_batches(corpus.val, 4, 48, 8))
    with torch.no_grad():
        expected = model(x, y).cross_entropy.item()
    found = [r for r in records(tmp_path / "tuned") if "best" in r][0]["val_loss"]
    assert found == pytest.approx(expected, rel=0.05)
    with pytest.raises(UserError, match="trained on the tokens of another tokenizer: use its own, --tokenizer=bytes"):
        train.main([*args, "--tokenizer=python4096", "--vocab_size=4096"])
    with pytest.raises(UserError, match=r"dim=32 .not 64.: --init_from takes the shape of .*: leave out --dim$"):
        train.main([*args, "--dim=32"])
    with pytest.raises(UserError, match=r"init_from='x': the run in .* has '', which --resume cannot change: leave"):
        train.main([f"--out_dir={tmp_path / 'first'}", "--resume", "--init_from=x", "--max_iters=5"])
    with pytest.raises(UserError, match=r"nowhere does not exist: .* with --init_from=PATH$"):
        train.main([*args, f"--init_from={tmp_path / 'nowhere'}"])
    with pytest.raises(UserError, match="the text has changed since .*: restore it, or start another run from its we"):
        train.main([f"--out_dir={tmp_path / 'first'}", "--resume", f"--data={other}", "--max_iters=5"])


@pytest.mark.parametrize("changes, words", [
    ({"block_size": 10**6, "batch_size": 10**4}, "needs 1000001 tokens, .*; batch_size=10000 and block_size=1000000: "),
    ({"block_size": 40_000, "batch_size": 10**5}, "^batch_size=100000 and block_size=40000: "),
    ({"gradient_accumulation_steps": 10**8}, "^batch_size=2 and block_size=32: "),
])  # fmt: skip
def test_what_cannot_fit_or_end_is_refused_before_it_begins(tmp_path, monkeypatch, changes, words):
    """With memory and time, whichever of them it is, where the first look at the sizes lets it through."""
    monkeypatch.setattr(train, "check_sizes", lambda *_: None)
    words += (r"a step needs about [\d.]+ of the [\d.]+ GB of cpu and takes [\d.]+ minutes or more, an evaluation of "
              r"[\d,]+ tokens [\d.]+: lower one of them, or --eval_iters; --recompute=block ")  # fmt: skip
    with pytest.raises(UserError, match=words):
        train.main(options(tmp_path, "run", **changes))
    assert not (tmp_path / "run").exists()


def test_attention_counts_at_its_own_rate_and_an_evaluation_by_what_there_is(monkeypatch):
    """A CPU with a matrix unit, of which attention has little: by the peak alone such a block would be let through."""
    T = 100_000
    config, run = HydraConfig(block_size=T, dim=256), TrainConfig(batch_size=1)
    machine = Machine(CPU, torch.bfloat16, False, 2e12, None, {})
    monkeypatch.setattr(limits, "total_memory", lambda device: 10**12)

    def check(val_tokens: int, config: HydraConfig = config, run: TrainConfig = run) -> None:
        corpus = SimpleNamespace(train=np.zeros(2 * T), val=range(val_tokens))
        limits.check_work(config, run, machine, train.ALONE, corpus)

    rates = []
    monkeypatch.setattr(limits, "attention_peak", lambda device, dtype: rates.append(dtype) or 1.6e11)
    with pytest.raises(UserError) as error:
        check(250_000)
    widths = 2 * 256 + 3 * 64 + 128 + 256 + 128  # MMCCCLML
    pairs, rest = 4 * T / 2 * widths * T, 2 * count_params(config) * T  # a forward's
    minutes = (pairs / 1.6e11 + rest / 2e12) / 60
    found = re.search(r"takes ([\d.]+) minutes or more, an evaluation of 300,000 tokens ([\d.]+):", str(error.value))
    assert [float(part) for part in found.groups()] == pytest.approx([3 * minutes, 3 * minutes], abs=0.06)
    assert rates == [torch.bfloat16] and "memory" in str(error.value)
    monkeypatch.setattr(limits, "attention_peak", lambda device, dtype: 2e12)
    check(250_000)
    with pytest.raises(UserError, match="takes 0.6 minutes or more, an evaluation of 2,000,000 tokens 4.2:"):
        check(10**12)  # eval_iters of it
    check(250_000, HydraConfig(), TrainConfig())  # nothing to measure
    assert len(rates) == 1


def test_attention_has_a_rate():
    assert 1e7 < attention_peak(CPU, torch.float32) < 1e14


def test_a_run_that_began_from_another_goes_on_from_itself(tmp_path):
    """A resume may repeat the option, as torchrun does when it starts a run again."""
    train.main(options(tmp_path, "first", max_iters=1, eval_interval=1))
    keys = options(tmp_path, "tuned", max_iters=2, eval_interval=1, init_from=tmp_path / "first")
    train.main(keys)
    assert train.main([*keys, "--resume", "--max_iters=3"]) == 0
    assert [r["resumed_at"] for r in records(tmp_path / "tuned") if "resumed_at" in r] == [2]


def test_the_tokenizer_of_weights_can_be_pasted():
    source = {"tokenizer": "its", "train_config": {"tokenizer": "/my folder/it's.tiktoken"}}
    with pytest.raises(UserError) as caught:
        checkpoints.check_source(shape(), source, TrainConfig(init_from="it"), "another")
    assert shlex.split(str(caught.value).partition(": use its own, ")[2]) == ["--tokenizer=/my folder/it's.tiktoken"]


def test_what_init_from_may_change_and_what_not():
    def check(config: HydraConfig, other: HydraConfig) -> None:
        source = {"tokenizer": "it", "model_config": asdict(other), "train_config": {}}
        checkpoints.check_source(config, source, TrainConfig(init_from="it"), "it")

    other = dict(dim=64, n_layer=2, pattern="CL", mod_capacity=0.5)
    changes = dict(vocab_size=258, block_size=64, dim=32, n_head=1, n_kv_head=2, n_layer=4, pattern="CM", mlp_ratio=5.0,
                   compression=1, latent_head_dim=16, conv_kernel=2, qk_gain=0.0, value_shift=False, latent_ratio=1.0,
                   window=4, rope_theta=5e5, norm_eps=1e-5, mod_capacity=0.25, mor_recursions=2, doc_mask=True,
                   attn_backend="sdpa", ccqa_norm=False, qk_norm=True, k_temperature=False, short_conv=2,
                   rope_fraction=0.5, pre_out_norm=False, alpha="learned", mod_aux=0.1, mor_aux=0.1,
                   router="random", mlp_multiple=128)  # fmt: skip
    assert changes.keys() == HydraConfig.__dataclass_fields__.keys()
    for name, value in changes.items():
        if name in (*checkpoints.FREE, "mod_capacity"):
            check(shape(**other | {name: value}), shape(**other))
            Hydra(shape(**other | {name: value})).load_state_dict(Hydra(shape(**other)).state_dict())
        else:
            with pytest.raises(UserError, match=rf"^{name}=.*: leave out --{name}$"):
                check(shape(**other | {name: value}), shape(**other))
    with pytest.raises(UserError, match=r"^mod_capacity=0.0 \(not 0.5\): .*: leave out --mod_capacity$"):
        check(shape(**other | {"mod_capacity": 0.0, "block_size": 64}), shape(**other))
    with pytest.raises(UserError, match="dim=32 .not 64., pattern='L' .not 'CL'.: .*: leave out --dim, --pattern$"):
        check(shape(**other | {"dim": 32, "pattern": "L"}), shape(**other))


@pytest.mark.parametrize("path", ["loop", "loop/below", "x" * 300, "~nobody_of_this_name/x"])
def test_a_path_that_cannot_be_is_one_line_whatever_it_is_for(tmp_path, path, monkeypatch):
    """A link to itself, a name that is too long, a home that is none."""
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    for option in ("data", "val_data", "init_from", "tokenizer", "cache_dir", "out_dir"):
        if path.startswith("~") and option.endswith("dir"):
            continue  # a folder of that name
        with pytest.raises(UserError) as error:
            train.main([*options(tmp_path, "run"), "--max_iters=0", f"--{option}={path}"])
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    for args in ([f"--out_dir={path}"], [f"--out_dir={path}", "--resume"]):
        with pytest.raises(UserError) as error:
            sample.main(args[:1]) if len(args) == 1 else train.main(args)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        sample.main([f"--prompt_file={path}"])
HUGE = 2**63 - 1


@pytest.mark.faults
@pytest.mark.parametrize("changes, words", [
    ({"dim": 10**7}, "dim=10000000: one matrix of dim x dim is 400,000 GB: lower it"),
    ({"dim": HUGE}, "one matrix of dim x dim is"),
    ({"dim": 10**6}, "dim=1000000, .*: a step needs [0-9,.]* GB or more, of which cpu has"),
    ({"vocab_size": HUGE}, "vocab_size=.*: ids have 32 bits"),
    ({"vocab_size": 10**9}, "vocab_size=1000000000, .* GB or more, of which cpu has"),
    ({"block_size": HUGE}, "block_size=.*: positions beyond 16,777,216 are not exact"),
    ({"block_size": 10**6, "batch_size": 10**4}, "block_size=1000000, batch_size=10000, .* GB or more"),
    ({"block_size": 10**6, "doc_mask": "true"}, "block_size=1000000, .* GB or more"),
    ({"block_size": 10**6, "window": 5 * 10**5}, "block_size=1000000, .* GB or more"),
    ({"batch_size": HUGE}, "batch_size=.* GB or more"), ({"batch_size": 10**9}, "batch_size=.* GB or more"),
    ({"n_layer": HUGE}, "n_layer=.*, mor_recursions=1: .* layers in a row take a step .* s or more: at most 2,048"),
    ({"n_layer": 10**6}, "1,000,000 layers in a row take a step 1,000 s or more: at most 2,048, lower one"),
    ({"mor_recursions": HUGE}, "layers in a row"), ({"mor_recursions": 10**4}, "80,000 layers in a row"),
    ({"n_head": HUGE}, "n_head=.*heads need an even width"), ({"n_kv_head": HUGE}, "n_kv_head="),
    ({"n_head": HUGE, "n_kv_head": HUGE, "pattern": "C"}, "latent_head_dim"), ({"compression": HUGE}, "compression="),
    ({"latent_head_dim": HUGE}, "latent_head_dim="), ({"mlp_ratio": 1e3, "dim": 2**20}, "mlp_ratio=1000.0, .* GB or m"),
    ({"gradient_accumulation_steps": HUGE}, "gradient_accumulation_steps="),
    ({"gradient_accumulation_steps": 10**7}, "a step has 30,000,000 forwards, which take 400 minutes or more: lower"),
    ({"n_layer": 600, "gradient_accumulation_steps": 10**4}, "a step has 30,000 forwards, which take 30 minutes"),
    ({"vocab_size": 2**63}, "int of 64 bits"), ({"plan": "true", "batch_size": HUGE}, "of which a plan has"),
], ids=str)  # fmt: skip
def test_sizes_that_cannot_be_are_refused_before_anything_is_made(tmp_path, monkeypatch, changes, words):
    """Not even a corpus is looked for, a peak measured or a layer made for it."""
    for name in ("read_corpus", "choose_machine", "print_plan", "step_work", "Hydra"):
        monkeypatch.setattr(train, name, None)
    began = time.perf_counter()
    with pytest.raises(UserError, match=words) as error:
        train.main(options(tmp_path, "run", **changes))
    assert str(error.value).isprintable() and time.perf_counter() - began < 5 and list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_an_evaluation_of_too_many_batches_is_refused_before_the_run_has_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "CALL", 1.0)
    with pytest.raises(UserError, match="eval_iters=40: an evaluation has 40 forwards, which take 5 minutes or more"):
        train.main(options(tmp_path, "run", eval_iters=40))
    with pytest.raises(UserError, match="eval_iters=0: an evaluation has .* forwards"):
        train.main(options(tmp_path, "run", eval_iters=0))
    assert not (tmp_path / "run").exists()


def test_a_split_that_is_none_is_a_warning(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abc def\n" * 40)
    (tmp_path / "val.txt").write_text("xyz\n" * 4)
    args = options(tmp_path, "run", data=tmp_path / "text.txt", val_data=tmp_path / "val.txt", max_iters=0)
    train.main(args)
    said = capsys.readouterr().out
    assert "WARNING: validation has " in said and "--val_data=PATH" in said and "set another part" not in said


def test_warnings_of_shards_name_what_helps_them(tmp_path):
    np.arange(300, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(20, dtype="<u2").tofile(tmp_path / "val.bin")
    write_shards(tmp_path, "train", np.arange(32), 257)
    (tmp_path / "text.txt").write_text("a text")
    config, run = configurations(tmp_path, data=tmp_path, tokenizer="none", vocab_size=300, val_fraction=0.2)
    beside, useless, split, short = train.warnings_of(train.read_corpus(config, run), config)
    assert "WARNING: " in beside and "such as text.txt" in beside and "--val_fraction=0.2 has no effect" in useless
    assert "fewer than one block of 32" in split and "--val_data=PATH" in split and "--val_fraction" not in split
    assert "1 of 2 training shards have fewer than block_size + 1 = 33 ids" in short


@pytest.mark.parametrize("changes", [{}, {"mod_capacity": 0.25}, {"mor_recursions": 3}], ids=str)
def test_a_step_never_waits_for_its_numbers(changes):
    """Nothing is read back to the host, and no shape depends on a value, in a step of the default optimiser."""
    waits = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"}

    class Seen(TorchDispatchMode):
        names: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    model = Hydra(shape(**changes))
    optimizer = train.make_optimizer(model, TrainConfig())
    idx = torch.randint(0, 257, (2, 32))
    with Seen() as seen:
        train.train_step(model, optimizer, [(idx, idx)] * 2, 1.0, torch.autocast("cpu", enabled=False), spike=3.0,
                         running=torch.zeros(3))  # fmt: skip
    assert not seen.names & waits and "_fused_adamw_" in seen.names


@pytest.mark.parametrize("changes, most", [
    ({}, 6), pytest.param({"mod_capacity": 0.25}, 10, marks=pytest.mark.slow),
    pytest.param({"mor_recursions": 2}, 9, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_a_run_needs_few_graphs(tmp_path, monkeypatch, changes, most):
    """Training, evaluations and the checks before a save: no graph more than training and evaluation have."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **keys: real(self, **keys | {"backend": counter}))
    train.main(options(tmp_path, "run", max_iters=4, eval_interval=2, compile="on", **changes))
    assert counter.frame_count <= most


def test_only_ten_bad_steps_in_a_row_end_a_run(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        poison(patch, *range(2, 11), *range(12, 21))  # nine, and nine more behind a good one
        assert train.main(options(tmp_path, "nine", max_iters=21, n_layer=4)) == 0
        assert step_records(tmp_path / "nine")[-1]["skipped"] == 18
    with monkeypatch.context() as patch:
        poison(patch, *range(2, 13))
        assert train.main(options(tmp_path, "ten", max_iters=21, n_layer=4)) == 1
    assert records(tmp_path / "ten")[-1]["step"] == 11
    assert "no checkpoint was written yet: lower --learning_rate" in capsys.readouterr().err


def test_ten_bad_steps_within_one_log_line_end_a_run(tmp_path, monkeypatch):
    """Though good ones come behind them before the host looks."""
    poison(monkeypatch, *range(3, 13))
    assert train.main(options(tmp_path, "run", max_iters=40, n_layer=4, log_interval=30)) == 1
    assert records(tmp_path / "run")[-1]["step"] == 30


def test_bad_steps_are_counted_over_a_resume(tmp_path, monkeypatch):
    """Skipped ones in all, and those in a row."""
    poison(monkeypatch, *range(2, 40))
    train.main(options(tmp_path, "run", max_iters=7, n_layer=4, eval_interval=7))
    assert train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=30"]) == 1
    log = records(tmp_path / "run")
    assert log[-1]["step"] == 11 and [r["skipped"] for r in log if "loss" in r] == [*range(11)]


# ---- resume


@pytest.mark.parametrize("keys", [
    dict(dtype="bfloat16", gradient_accumulation_steps=2, log_layers=2),
    dict(dtype="float32", log_interval=4, log_layers=1, grad_clip=2.0, mod_capacity=0.5, n_layer=4),
])  # fmt: skip
def test_a_run_that_is_interrupted_and_resumed_equals_a_straight_one(tmp_path, monkeypatch, capsys, keys):
    """Ctrl-C within step 5, between two evaluations: losses, rates, counters, weights and moments."""
    args = dict(max_iters=7, eval_interval=3, warmup_iters=2, learning_rate=0.01)
    assert train.main(options(tmp_path, "straight", **args, **keys)) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        assert train.main(options(tmp_path, "broken", **args, **keys)) == 130
    assert "stopped at step 5, saved in" in capsys.readouterr().out
    assert checkpoint(tmp_path / "broken")["step"] == 5
    assert train.main([f"--out_dir={tmp_path / 'broken'}", "--resume"]) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert layer_norms(tmp_path / "broken") == layer_norms(tmp_path / "straight") != []
    ours, theirs = checkpoint(tmp_path / "broken"), checkpoint(tmp_path / "straight")
    assert equal(ours["model"], theirs["model"]) and ours["best"] == theirs["best"]
    moments = [content["optimizer"]["state"] for content in (ours, theirs)]
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) == len(ours["model"])
    for number, moment in moments[0].items():
        assert equal(moment, moments[1][number])
    assert [r["resumed_at"] for r in records(tmp_path / "broken") if "resumed_at" in r] == [5]


def test_a_stop_before_the_first_checkpoint_says_so(tmp_path, monkeypatch, capsys):
    """One that comes before the first step of a run has nothing to save."""
    monkeypatch.setattr(Hydra, "compile_training", lambda self: signal.raise_signal(signal.SIGTERM))
    assert train.main(options(tmp_path, "run", max_iters=3, compile="on")) == 143
    assert "stopped at step 0, no checkpoint was written yet" in capsys.readouterr().out
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.slow
def test_kill_interrupt_and_resume_equal_one_straight_run(tmp_path):
    """60 steps straight == kill -9 after the checkpoint of step 20, resume, Ctrl-C, resume: losses and weights."""
    keys = dict(max_iters=60, eval_interval=10)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train.main(options(tmp_path, "straight", **keys))  # in this process, which must make no difference
    run = start(options(tmp_path, "broken", **keys))
    wait_for_step(broken, 22, run)
    run.kill()
    run.communicate()
    reached = checkpoint(broken)["step"]
    assert 20 <= reached < 60 and reached % 10 == 0

    run = start(options(tmp_path, "broken", resume="true"))  # all else comes from the checkpoint
    wait_for_step(broken, reached + 3, run, "resumed_at")
    run.send_signal(signal.SIGINT)
    out, err = finish(run, 130)
    stopped = checkpoint(broken)["step"]
    assert f"stopped at step {stopped}, saved" in out and "Traceback" not in err and reached + 3 <= stopped < 60
    train.main([f"--out_dir={broken}", "--resume"])

    assert losses(broken) == losses(straight)
    assert [r["resumed_at"] for r in records(broken) if "resumed_at" in r] == [reached, stopped]
    assert equal(weights(broken), weights(straight))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.faults
@pytest.mark.parametrize("keys, expected", [
    ({}, ["--prompt=import", "--max_new_tokens=200"]),
    ({"block_size": 256}, ["--prompt=import", "--max_new_tokens=200"]),
    ({"block_size": 8}, ["--prompt=import", "--max_new_tokens=2"]),
    ({"block_size": 6}, ["--prompt=", "--max_new_tokens=5"]),
    ({"block_size": 2}, ["--prompt=", "--max_new_tokens=1"]),
    ({"block_size": 1}, []),
    ({"max_iters": 0}, []),
    ({"block_size": 8, "pattern": "M", "window": 3}, ["--prompt=import", "--max_new_tokens=200"]),
], ids=str)  # fmt: skip
def test_the_command_that_a_run_ends_with_runs_as_printed(tmp_path, capsys, monkeypatch, keys, expected):
    """For any block, a folder that the shell must not read, a run without a checkpoint; and it fills the block."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sample, "copy_bandwidth", lambda device: 1e9)
    keys = {"block_size": 206, "max_iters": 1, "n_layer": 1, "pattern": "C", "final_eval_iters": 1} | keys
    assert train.main(options(tmp_path, "it's $HOME; a run", **keys)) == 0
    _, found, line = capsys.readouterr().out.strip().rpartition("; sample it with: ")
    assert bool(found) == bool(expected)
    if expected:
        program, script, *args = shlex.split(line.splitlines()[0])
        assert [program, script] == ["python", "sample.py"] and args[-2:] == expected
        assert sample.main([*args, "--top_k=1"]) == 0
        told = capsys.readouterr()
        assert told.out.startswith(expected[0].removeprefix("--prompt=")) and "tokens" in told.err


@pytest.mark.faults
def test_a_run_whose_first_evaluation_was_its_best_is_sampled_from_its_last_checkpoint(tmp_path, capsys, monkeypatch):
    given = iter([1.0, 2.0, 2.0])
    monkeypatch.setattr(train, "evaluate", lambda *args: {"val_loss": next(given), "val_bpb": 1.0})
    monkeypatch.setattr(sample, "copy_bandwidth", lambda device: 1e9)
    assert train.main(options(tmp_path, "run", max_iters=1, sample_tokens=0)) == 0
    assert not (tmp_path / "run" / "best.pt").exists()
    line = capsys.readouterr().out.rpartition("; sample it with: ")[2].splitlines()[0]
    assert "--checkpoint=last" in shlex.split(line)
    assert sample.main(shlex.split(line)[2:]) == 0


@pytest.mark.faults
def test_the_command_of_a_stopped_run_goes_on_with_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert train.main(options(tmp_path, "a run", max_iters=3)) == 130
    line = capsys.readouterr().out.strip().splitlines()[-1]
    program, script, *args = shlex.split(line.rpartition(": go on with: ")[2])
    assert [program, script] == ["python", "train.py"]
    assert train.main(args) == 0
    assert checkpoint(tmp_path / "a run")["step"] == 3


@pytest.mark.faults
def test_a_changed_resume_says_in_one_line_what_changes(tmp_path, capsys):
    """The rate on both sides of the join as the log has it; nothing where nothing changes."""
    out = tmp_path / "run"
    train.main(options(tmp_path, "run", max_iters=3, eval_interval=3, learning_rate=0.01, warmup_iters=1))
    for changes, words in (
        ([], []),
        (["--max_iters=5"], ["max_iters=5 (before: 3)"]),
        (["--max_iters=7", "--learning_rate=0.02", "--batch_size=3", "--gradient_accumulation_steps=2"],
         ["max_iters=7 (before: 5)", "learning_rate=0.02 (before: 0.01)", "batch_size=3 (before: 2)",
          "gradient_accumulation_steps=2 (before: 1)", "evaluations stay on the 4 windows that the run began with"]),
        (["--max_iters=8", "--sampling=epochs", "--batch_size=1"],
         ["sampling='epochs' (before: 'random')", "the epoch goes on at another place"]),
    ):  # fmt: skip
        capsys.readouterr()
        step = checkpoint(out)["step"]
        assert train.main([f"--out_dir={out}", "--resume", *changes]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed at step")]
        assert len(lines) == bool(words)
        rates = {r["step"]: r["lr"] for r in step_records(out)}
        if words:
            assert all(word in lines[0] for word in words), lines
            joined = f"was {rates[step]:.2e} at step {step}, and is {rates[step + 1]:.2e} at the next"
            assert f"the learning rate {joined}" in lines[0]


@pytest.mark.faults
def test_a_run_resumed_with_another_batch_evaluates_on_the_windows_that_it_began_with(tmp_path, monkeypatch):
    """Once, and once more; so many is no multiple of the new batch. Another number of them is refused."""
    out, seen = tmp_path / "run", []
    real = train.eval_batches

    def eval_batches(*args, **one):
        if one:  # whether there is a target at all
            return real(*args, **one)
        batches = list(real(*args))
        rows = torch.cat([y for _, y in batches])
        seen.append(rows[(rows != IGNORE).any(1)])
        return iter(batches)

    monkeypatch.setattr(train, "eval_batches", eval_batches)
    train.main(options(tmp_path, "run", max_iters=1, batch_size=4, eval_iters=2, sample_tokens=0))
    for steps, batch_size in ((2, 3), (3, 3), (4, 5)):
        train.main([f"--out_dir={out}", "--resume", f"--max_iters={steps}", f"--batch_size={batch_size}"])
    evaluations = [rows for rows in seen if len(rows) == 8]
    assert len(evaluations) == 2 + 3 and all(torch.equal(rows, evaluations[0]) for rows in evaluations)
    with pytest.raises(UserError, match="eval_iters=9: the run in .* evaluates with 2, which --resume cannot change"):
        train.main([f"--out_dir={out}", "--resume", "--max_iters=5", "--eval_iters=9"])


@pytest.mark.faults
def test_utilisation_is_not_told_where_the_peak_is_none(tmp_path, capsys, monkeypatch):
    """As with emulated bf16, whose products are slower than the model's."""
    monkeypatch.setattr("machine.matmul_peak", lambda device, dtype, n=0: 1e4)
    monkeypatch.setattr(train, "check_work", lambda *args: None)
    train.main(options(tmp_path, "run", max_iters=1))
    assert "| MFU n/a, by 6N n/a |" in capsys.readouterr().out
    assert [(r["mfu"], r["mfu_6n"]) for r in step_records(tmp_path / "run")] == [(None, None)]


def test_a_longer_run_is_a_resumed_shorter_one(tmp_path):
    keys = dict(eval_interval=3, gradient_accumulation_steps=2, min_lr_ratio=1.0)
    train.main(options(tmp_path, "straight", max_iters=6, **keys))
    train.main(options(tmp_path, "two", max_iters=3, **keys))
    train.main([f"--out_dir={tmp_path / 'two'}", "--resume", "--max_iters=6"])
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "two"))
    trained = [r for r in losses(tmp_path / "two") if r[1] is not None]
    assert trained == [r for r in losses(tmp_path / "straight") if r[1] is not None]


def test_resume_refuses_another_model_and_a_changed_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abc def\n" * 200)
    args = options(tmp_path, "run", max_iters=2, data=text)
    train.main(args)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for key, was in (("dim=64", "32"), ("tokenizer=python4096", "'bytes'"), ("block_size=24", "32")):
        with pytest.raises(UserError, match=f"the run in .* has {was}, which --resume cannot change") as caught:
            train.main([*args, "--resume", f"--{key}"])
        assert ("another run from its weights: " in str(caught.value)) == key.startswith("block")
    with pytest.raises(UserError, match="max_iters=1: the run in .* is at step 2"):
        train.main([*args, "--resume", "--max_iters=1"])
    text.write_text("other text\n" * 200)
    with pytest.raises(UserError, match="the text has changed since the run"):
        train.main([*args, "--resume"])
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_what_starts_another_run_can_be_pasted(tmp_path, monkeypatch):
    """Where a resumed run cannot have another block or another text: with paths that need quotes, from anywhere."""
    text = tmp_path / "it's a $HOME.txt"
    text.write_text("abc def\n" * 200)
    train.main(options(tmp_path, "a run", max_iters=1, n_layer=1, data=text, sample_tokens=0))
    for i, change in enumerate((["--block_size=24"], [])):
        folder = tmp_path / str(i)
        folder.mkdir()
        monkeypatch.chdir(folder)
        with pytest.raises(UserError) as caught:
            train.main([f"--out_dir={tmp_path / 'a run'}", "--resume", *change])
        words = shlex.split(str(caught.value).partition(", or start another run from its weights: ")[2])
        assert words[:2] == ["python", str(ROOT / "train.py")]
        assert train.main([*words[2:], "--max_iters=0", "--sample_tokens=0"]) == 0
        found = records(folder / "PATH")[0]["config"]
        assert (found["data"], found["block_size"]) == (str(text), (24, 32)[i])
        text.write_text("other text\n" * 200)


def test_best_is_the_lowest_validation_and_last_is_the_last(tmp_path):
    """After 4 good steps the rate explodes: the last checkpoint is worse than the best one, and both are kept apart."""
    train.main(options(tmp_path, "run", max_iters=4, eval_interval=4, learning_rate=0.01))
    train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=6", "--learning_rate=3", "--min_lr_ratio=1"])
    best, last = checkpoint(tmp_path / "run", "best"), checkpoint(tmp_path / "run")
    assert (best["step"], last["step"]) == (4, 6)
    assert best["best"] == last["best"] == min(r["val_loss"] for r in records(tmp_path / "run") if "best" in r)


def test_resume_applies_what_was_changed_and_keeps_the_best(tmp_path):
    out = tmp_path / "run"
    train.main(options(tmp_path, "run", max_iters=5, eval_interval=3, learning_rate=0.01))
    best = checkpoint(out, "best")
    assert best["step"] == 5
    train.main([f"--out_dir={out}", "--resume", "--max_iters=6", "--learning_rate=3", "--beta1=0.5",
                "--weight_decay=0.7", "--min_lr_ratio=1"])  # fmt: skip
    assert checkpoint(out, "best")["best"] == best["best"]  # the extension was worse
    groups = checkpoint(out)["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.7, 0.0] and {g["betas"] for g in groups} == {(0.5, 0.95)}
    assert [r["step"] for r in records(out) if "best" in r] == [0, 3, 5, 6]
    assert "resume = false" in (out / "config.toml").read_text()
    (out / "best.pt").unlink()  # the loss to beat is in last.pt too
    train.main([f"--out_dir={out}", "--resume", "--max_iters=7"])
    assert not (out / "best.pt").exists()


def test_the_best_of_the_last_evaluation_is_not_forgotten(tmp_path, monkeypatch):
    """last.pt was written before it, and a run that is extended does not make it again."""
    given = iter([9.0, 7.0, 4.0, 4.0])

    def evaluate(*args):
        loss = next(given)
        return {"val_loss": loss, "val_bpb": loss}

    monkeypatch.setattr(train, "evaluate", evaluate)
    train.main(options(tmp_path, "run", max_iters=5, eval_interval=3, sample_tokens=0))
    assert checkpoint(tmp_path / "run")["best"] == 7.0 and checkpoint(tmp_path / "run", "best")["best"] == 4.0
    given = iter([5.0, 5.0])
    train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=6"])
    evaluations = [(r["step"], r["val_loss"], r["best"]) for r in records(tmp_path / "run") if "best" in r]
    assert evaluations == [(0, 9.0, True), (3, 7.0, True), (5, 4.0, True), (6, 5.0, False)]
    assert checkpoint(tmp_path / "run")["best"] == 4.0 and checkpoint(tmp_path / "run", "best")["step"] == 5


def three_groups(model: Hydra, run: TrainConfig) -> torch.optim.Optimizer:
    """A group of its own for each kind of parameter, every option another one."""
    groups = [{"params": [], "betas": (run.beta1, 0.5), "weight_decay": run.weight_decay, "eps": 1e-6},
              {"params": [], "betas": (0.5, run.beta2), "weight_decay": 0.0, "eps": 1e-7},
              {"params": [], "betas": (0.6, 0.7), "weight_decay": 2 * run.weight_decay}]  # fmt: skip
    for name, p in model.named_parameters():
        kind = 2 if name == "embed.weight" else min(p.dim(), 2) - 1
        groups[kind]["params"].append(p)
    return torch.optim.AdamW(groups, lr=run.learning_rate)


def test_resume_puts_back_the_groups_whatever_they_are(tmp_path, monkeypatch):
    """Today's options, yesterday's moments: those of a run that goes on from step 2 with the same changes."""
    monkeypatch.setattr(train, "make_optimizer", three_groups)
    changed = ["--beta1=0.8", "--beta2=0.75", "--weight_decay=0.4", "--max_iters=3"]
    train.main(options(tmp_path, "run", max_iters=2, dtype="float32", weight_decay=0.1))
    old = checkpoint(tmp_path / "run")
    train.main([f"--out_dir={tmp_path / 'run'}", "--resume", *changed])
    new = checkpoint(tmp_path / "run")
    options_now = [{k: v for k, v in g.items() if k in ("betas", "weight_decay", "eps")}
                   for g in new["optimizer"]["param_groups"]]  # fmt: skip
    assert options_now == [{"betas": (0.8, 0.5), "weight_decay": 0.4, "eps": 1e-6},
                           {"betas": (0.5, 0.75), "weight_decay": 0.0, "eps": 1e-7},
                           {"betas": (0.6, 0.7), "weight_decay": 0.8, "eps": 1e-8}]  # fmt: skip
    config, run = build(old["model_config"] | old["train_config"], HydraConfig, TrainConfig)
    run = replace(run, beta1=0.8, beta2=0.75, weight_decay=0.4, max_iters=3)
    model = Hydra(config)
    model.load_state_dict(old["model"])
    optimizer = three_groups(model, run)
    parameters = []
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(2, run, 3)
        parameters += group["params"]
    for number, p in enumerate(parameters):
        optimizer.state[p] = old["optimizer"]["state"][number]
    batch = get_batch(text_tokens(tmp_path).train, 2, 32, run.seed, 2)
    train.train_step(model, optimizer, [batch], run.grad_clip, torch.autocast("cpu", enabled=False))
    assert equal(model.state_dict(), new["model"])


def test_moments_are_restored_and_options_are_not():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))

    def optimizer(lr: float, decay: float) -> torch.optim.Optimizer:
        groups = [{"params": [p], "weight_decay": decay}, {"params": [q], "eps": lr / 100}]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.5, decay))

    old = optimizer(1.0, 0.1)
    p.grad, q.grad = torch.full((3,), 2.0), torch.full((2,), 3.0)
    old.step()
    new = optimizer(4.0, 0.2)
    made = [{k: v for k, v in group.items() if k != "params"} for group in new.param_groups]
    train.checkpoints.restore_optimizer(new, old.state_dict())
    assert [{k: v for k, v in group.items() if k != "params"} for group in new.param_groups] == made
    for parameter, gradient in ((p, 2.0), (q, 3.0)):
        assert new.state[parameter]["step"] == 1
        assert torch.allclose(new.state[parameter]["exp_avg"], torch.full_like(parameter, gradient / 2))
    third = torch.optim.AdamW([p, q])
    with pytest.raises(ValueError, match="parameter group"):
        train.checkpoints.restore_optimizer(third, old.state_dict())


# ---- errors


@pytest.mark.parametrize("changes, words", [
    (["--vocab_size=200"], "vocab_size 200 is smaller than the 257 tokens of 'bytes'"),
    (["--data=/nowhere/at/all"], "no such file or folder"), (["--data=/dev/zero"], "zero: a pipe or a device; give"),
    (["--tokenizer=gpt3"], "unknown tokenizer 'gpt3': did you mean"),
    (["--block_size=50000", "--batch_size=1"], "block_size 50000 needs 50001 tokens"),
    (["--resume"], "last.pt does not exist: train first"),
    (["--device=cuda:77"], "sees no such GPU"),
    (["--attn_backend=flex"], "attn_backend=flex cannot work here"),
    (["--dtype=float16"], "needs its loss scaled, which is left out here: use bfloat16"),
    (["--dtype=float64"], "use auto, float32 or bfloat16"),
    (["--recompute=blocks"], "use none or block"),
    (["--device=mps"], "sees no Apple GPU: use device=auto or cpu"),
    (["--batch_size=0"], "batch_size=0: it must be at least 1"),
    (["--min_lr_ratio=1.5"], "min_lr_ratio=1.5: choose a value from 0 to 1"),
    (["--text_field="], "text_field='': name a field"),
    (["--max_iters=-1"], "max_iters=-1"), (["--beta2=1"], "beta2=1.0"), (["--compile=maybe"], "compile='maybe'"),
    (["--eval_interval=0"], "eval_interval=0"), (["--out_dir="], "out_dir=''"), (["--seed=-5"], "seed=-5"),
    ([f"--seed={2**63}"], "is not an int of 64 bits"), (["--cache_dir="], "cache_dir='' is an empty path"),
    (["--max_seconds=-1"], "max_seconds=-1.0: it must not be negative"),
    (["--max_tokens=9", "--max_flops=1e9"], "max_tokens=9, max_flops=1000000000.0: one of them can end a run"),
    (["--schedule=linear"], "use cosine or wsd"), (["--decay_ratio=1.1"], "decay_ratio=1.1: choose a value from 0"),
])  # fmt: skip
def test_bad_input_is_one_clear_line_and_writes_nothing(tmp_path, changes, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as error:
        train.main([*options(tmp_path, "run"), *changes])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_line_ends_with_2_and_one_line():
    process, other = start(["--help"]), start(["--learning_rat=1"])
    process.stdout.close()  # a reader that leaves early is no error to shout about
    assert "Traceback" not in process.stderr.read()
    process.wait(60)
    out, err = finish(other, 2)
    assert out == "" and err.count("\n") == 1 and "did you mean learning_rate" in err and "Traceback" not in err


def test_help_has_every_key_and_every_letter(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = capsys.readouterr().out
    assert "--learning_rate" in out and "peak learning rate" in out and "--pattern" in out
    assert "CCQA, compressed convolutional" in out


@pytest.mark.parametrize("code", [0, 1, 130])
def test_the_command_line_ends_with_the_code_of_the_run(monkeypatch, code):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        cli(lambda argv: code)
    assert ended.value.code == code


# ---- the shipped configurations and the keys


def shipped(name: str) -> tuple[HydraConfig, TrainConfig]:
    return build(parse([str(ROOT / "config" / f"{name}.toml")], HydraConfig, TrainConfig), HydraConfig, TrainConfig)


def test_tiny_is_the_default_run_written_out():
    text = tomllib.loads((ROOT / "config" / "tiny.toml").read_text())
    assert shipped("tiny") == (HydraConfig(), TrainConfig())
    assert {"dim", "pattern", "n_layer", "learning_rate", "max_iters", "batch_size"} <= text.keys()
    assert set(HydraConfig().layers) == set("MCL") and HydraConfig().n_layer >= 8


def test_the_baselines_have_the_size_of_the_default_run():
    config, run = shipped("tiny")
    for name, letter in (("tiny_mha", "A"), ("tiny_mha_fair", "A"), ("tiny_gqa", "G")):
        other, its_run = shipped(name)
        assert set(other.layers) == {letter} and (other.vocab_size, other.dim) == (config.vocab_size, config.dim)
        assert abs(count_params(other) / count_params(config) - 1) < 0.01
        tokens = [r.max_iters * r.batch_size * r.gradient_accumulation_steps for r in (its_run, run)]
        assert tokens[0] * other.block_size == tokens[1] * config.block_size


def test_contestants_have_equally_many_parameters():
    """Within 1% of the hybrid, and the same tokens and schedule for all."""
    config, run = shipped("learning/hybrid")
    names = [path.stem for path in (ROOT / "config" / "learning").glob("*.toml")]
    assert len(names) > 30
    for name in names:
        other, its_run = shipped(f"learning/{name}")
        assert abs(count_params(other) / count_params(config) - 1) < 0.01, name
        assert its_run == run and (other.dim, other.block_size) == (config.dim, config.block_size), name


def test_small_medium_and_large_are_the_architectures():
    for name, dim, heads, groups, ratio in (("small", 768, 12, 3, 3.0), ("medium", 896, 14, 2, 3.5),
                                            ("large", 1024, 16, 4, 4.0)):  # fmt: skip
        config, _ = shipped(name)
        assert (config.dim, config.n_head, config.n_kv_head, config.mlp_ratio) == (dim, heads, groups, ratio)
        assert config.n_layer == 24 and config.vocab_size == 50257 and config.pattern == "MMCCCLML"


def watch(patch: pytest.MonkeyPatch, cls: type) -> set[str]:
    """The fields of `cls` that the project's files read from now on: not in the checks of __post_init__, nor where
    configurator.py, dataclasses and a hash read all of them."""
    read: set[str] = set()
    checking: list[int] = []
    names = {field.name for field in fields(cls)}
    check = cls.__post_init__

    def post_init(self) -> None:
        checking.append(1)
        check(self)
        checking.pop()

    def getattribute(self, name: str):
        reader = Path(sys._getframe(1).f_code.co_filename)
        if name in names and not checking and reader.parent == ROOT and reader.name != "configurator.py":
            read.add(name)
        return object.__getattribute__(self, name)

    patch.setattr(cls, "__post_init__", post_init)
    patch.setattr(cls, "__getattribute__", getattribute)
    return read


def test_every_key_has_its_comment_and_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "copy_bandwidth", lambda device: 1e9)
    classes = (HydraConfig, TrainConfig, sample.SampleConfig)
    read = {cls: watch(monkeypatch, cls) for cls in classes}
    keys = dict(pattern="AGMCL", n_layer=5, mod_capacity=0.5, mor_recursions=2, window=8, max_iters=3, warmup_iters=1,
                schedule="wsd")  # fmt: skip
    train.main(options(tmp_path, "run", **keys))
    (tmp_path / "prompts.txt").write_text("ab\n")
    for prompt in ("--prompt=ab", f"--prompt_file={tmp_path / 'prompts.txt'}"):
        sample.main([f"--out_dir={tmp_path / 'run'}", prompt, "--max_new_tokens=3"])
    for cls in classes:
        comments = field_comments(cls)
        assert all(comments.values()) and read[cls] == comments.keys(), comments.keys() - read[cls]


def test_a_parameter_without_a_gradient_does_not_stop_a_step():
    model = Hydra(shape())
    model.blocks[0].mlp.down.weight.requires_grad_(False)
    before = model.embed.weight.detach().clone()
    optimizer = train.make_optimizer(model, TrainConfig())
    idx = torch.zeros(1, 8, dtype=torch.int64)
    done = train.train_step(model, optimizer, [(idx, idx)], 1.0, torch.autocast("cpu", enabled=False))
    assert done.grad_norm > 0 and not torch.equal(model.embed.weight, before)
