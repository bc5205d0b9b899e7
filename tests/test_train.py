"""The training script as a user meets it: exact resume after a kill, Ctrl-C, divergence, logs, errors, samples."""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from configurator import UserError, build, field_comments, parse
from data import get_batch, prepare
from model import Hydra, HydraConfig, PackedLinear, count_params, kv_bytes, tail_bytes
from train import TrainConfig, learning_rate_at

ROOT = Path(train.__file__).parent
# eight layers of every letter, a millisecond each, on the text of this test
TINY = ["--dim=32", "--n_head=2", "--n_kv_head=1", "--compression=2", "--latent_head_dim=0",
        "--mlp_ratio=1", "--block_size=32",
        "--vocab_size=257", "--tokenizer=bytes", f"--data={__file__}", "--batch_size=2", "--eval_iters=2",
        "--final_eval_iters=4", "--warmup_iters=5", "--log_interval=1", "--sample_tokens=4"]  # fmt: skip


def options(tmp: Path, name: str, **keys) -> list[str]:
    return [*TINY, f"--out_dir={tmp / name}", f"--cache_dir={tmp / 'cache'}", *(f"--{k}={v}" for k, v in keys.items())]


def start(args: list[str], script="train.py") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / script), *args], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, out[-2000:] + err[-2000:]
    return out, err


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple]:
    """All that a run measured, in order, without times."""
    keys = ("step", "loss", "lr", "grad_norm", "clipped", "val_loss", "val_bpb", "best")
    return [tuple(r.get(k) for k in keys) for r in records(out) if "step" in r]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "last.pt", weights_only=True)["model"]


def wait_for_step(out: Path, step: int, process: subprocess.Popen, header: str = "started") -> None:
    """Until the log has step `step` of the run that began with `header`."""
    for _ in range(20000):
        text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
        if header in text and f'"step": {step}, "loss"' in text[text.index(header) :]:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came")


# ---- resume


@pytest.mark.slow
def test_kill_interrupt_and_resume_equal_one_straight_run(tmp_path):
    """120 steps straight == kill -9 after the checkpoint of step 40, resume, Ctrl-C, resume: losses and weights."""
    keys = dict(max_iters=120, eval_interval=20)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train.main(options(tmp_path, "straight", **keys))  # in this process, which must make no difference
    run = start(options(tmp_path, "broken", **keys))
    wait_for_step(broken, 45, run)
    run.kill()
    run.communicate()
    reached = torch.load(broken / "last.pt", weights_only=True)["step"]
    assert 40 <= reached < 120 and reached % 20 == 0

    run = start(options(tmp_path, "broken", resume="true"))  # all else comes from the checkpoint
    wait_for_step(broken, reached + 5, run, "resumed_at")
    run.send_signal(signal.SIGINT)
    out, err = finish(run, 130)
    stopped = torch.load(broken / "last.pt", weights_only=True)["step"]
    assert f"stopped at step {stopped}, saved" in out and "Traceback" not in err and reached + 5 <= stopped < 120
    train.main([f"--out_dir={broken}", "--resume"])

    assert losses(broken) == losses(straight)
    assert [r["resumed_at"] for r in records(broken) if "resumed_at" in r] == [reached, stopped]
    ours, theirs = weights(broken), weights(straight)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_resumed_run_in_this_process_with_accumulation_and_bf16(tmp_path, capsys):
    keys = dict(eval_interval=3, gradient_accumulation_steps=2, dtype="bfloat16")
    train.main(options(tmp_path, "straight", max_iters=6, min_lr_ratio=1.0, **keys))
    train.main(options(tmp_path, "two", max_iters=3, min_lr_ratio=1.0, **keys))
    train.main([f"--out_dir={tmp_path / 'two'}", "--resume", "--max_iters=6"])
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "two")
    assert all(torch.equal(a[k], b[k]) for k in a)
    trained = [r for r in losses(tmp_path / "two") if r[1] is not None]
    assert trained == [r for r in losses(tmp_path / "straight") if r[1] is not None]


def test_resume_refuses_another_model_and_a_changed_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abc def\n" * 200)
    args = options(tmp_path, "run", max_iters=2, data=text)
    train.main(args)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for key, was in (("dim=64", "32"), ("tokenizer=python4096", "'bytes'")):
        with pytest.raises(UserError, match=f"the run in .* has {was}, which --resume cannot change"):
            train.main([*args, "--resume", f"--{key}"])
    with pytest.raises(UserError, match="max_iters=1: the run in .* is at step 2"):
        train.main([*args, "--resume", "--max_iters=1"])
    text.write_text("other text\n" * 200)
    with pytest.raises(UserError, match="the text has changed since the run"):
        train.main([*args, "--resume"])
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


# ---- the loop


def test_one_step_equals_adamw_by_hand(tmp_path):
    """Two accumulated batches, clipping at 0.1, decay by group, warmup: the step as its parts define it."""
    keys = dict(max_iters=1, gradient_accumulation_steps=2, grad_clip=0.1, warmup_iters=2, learning_rate=0.02)
    train.main(options(tmp_path, "run", dtype="float32", **keys))
    config, c = build(parse(options(tmp_path, "run", **keys), HydraConfig, TrainConfig), HydraConfig, TrainConfig)
    torch.manual_seed(c.seed)
    net = Hydra(config)
    tokens = prepare(c.data, c.tokenizer, c.cache_dir).train
    for micro in range(2):
        (net(*get_batch(tokens, 2, 32, c.seed, micro))[1] / 2).backward()
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in net.parameters()))
    assert norm > 0.1
    assert records(tmp_path / "run")[-3]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    decayed = {id(p) for p in net.optimizer_groups(0.1)[0]["params"]}
    got = weights(tmp_path / "run")
    for name, p in net.named_parameters():
        g = p.grad * (0.1 / (norm + 1e-6))
        expected = p.detach() * (1 - 0.01 * (0.1 if id(p) in decayed else 0.0)) - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-5)


def test_the_log_has_what_the_line_says(tmp_path, capsys):
    train.main(options(tmp_path, "run", max_iters=4, eval_interval=2))
    printed, log = capsys.readouterr().out, records(tmp_path / "run")
    assert {"config", "git", "torch", "fingerprint", "parameters", "dtype"} <= log[0].keys()
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    for key in ("loss", "lr", "grad_norm", "clipped", "ms", "tokens_per_s", "mfu", "skipped"):
        assert all(math.isfinite(r[key]) for r in steps), key
    assert all(0 <= r["clipped"] <= 1 for r in steps)
    evaluations = [r for r in log if "val_bpb" in r]
    assert [r["step"] for r in evaluations] == [0, 2, 4, 4] and evaluations[-1]["final"]
    for words in ("step     4 | 100% | loss", "| norm", "| clipped", "tokens/s | MFU", "ETA 0:00", "bits/byte",
                  "sample at step 2", "compile off", "attention C: sdpa", "dim = 32"):  # fmt: skip
        assert words in printed, words
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert stored["dim"] == 32 and stored["max_iters"] == 4


def test_evaluation_is_nats_per_token_and_bits_per_byte(tmp_path):
    """A model without knowledge: uniform logits cost log(V) a token, and log2(V) a byte where a token is a byte."""
    config = HydraConfig(**dict(vocab_size=257, block_size=32, dim=32, n_head=2, n_kv_head=1, compression=2,
                                latent_head_dim=0))  # fmt: skip
    net = Hydra(config)
    net.norm.weight.data.zero_()
    tokens = np.arange(1000, dtype=np.uint16) % 256
    sizes = torch.ones(257, dtype=torch.long)
    nats, bits = train.evaluate(net, tokens, sizes, 3, 0, torch.device("cpu"))
    assert nats == pytest.approx(math.log(257), abs=1e-5) and bits == pytest.approx(math.log2(257), abs=1e-5)
    assert train.evaluate(net, tokens, 2 * sizes, 3, 2, torch.device("cpu"))[1] == pytest.approx(math.log2(257) / 2)
    assert net.training


def test_best_is_the_lowest_validation_and_last_is_the_last(tmp_path):
    """After 4 good steps the rate explodes: the last checkpoint is worse than the best one, and both are kept apart."""
    train.main(options(tmp_path, "run", max_iters=4, eval_interval=4, learning_rate=0.01))
    train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=6", "--learning_rate=3", "--min_lr_ratio=1"])
    best, last = (torch.load(tmp_path / "run" / f"{n}.pt", weights_only=True) for n in ("best", "last"))
    assert (best["step"], last["step"]) == (4, 6)
    assert best["best"] == last["best"] == min(r["val_loss"] for r in records(tmp_path / "run") if "best" in r)


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


def test_a_gradient_that_is_not_finite_is_named_and_skipped(tmp_path, capsys, monkeypatch):
    """One poisoned gradient: that update is skipped, the parameter is named, the run goes on."""
    real, calls = Hydra.forward, []

    def poisoned(self, idx, targets=None):
        logits, loss = real(self, idx, targets)
        if targets is not None and torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 2:
                p = self.blocks[3].mlp.down.weight
                loss = loss + (p * 0).sum().sqrt()  # value 0, gradient inf * 0
        return logits, loss

    monkeypatch.setattr(Hydra, "forward", poisoned)
    assert train.main(options(tmp_path, "run", max_iters=5)) == 0
    printed = capsys.readouterr().out
    assert "step     2 | gradient of blocks.3.mlp.down.weight is not finite: update skipped (1 so far)" in printed
    assert all(p.isfinite().all() for p in weights(tmp_path / "run").values())
    assert [r["skipped"] for r in records(tmp_path / "run") if "loss" in r][-1] == 1


def test_resume_applies_what_was_changed_and_keeps_the_best(tmp_path):
    out = tmp_path / "run"
    train.main(options(tmp_path, "run", max_iters=5, eval_interval=3, learning_rate=0.01))
    best = torch.load(out / "best.pt", weights_only=True)
    assert best["step"] == 5
    train.main([f"--out_dir={out}", "--resume", "--max_iters=6", "--learning_rate=3", "--beta1=0.5",
                "--weight_decay=0.7", "--min_lr_ratio=1"])  # fmt: skip
    assert torch.load(out / "best.pt", weights_only=True)["best"] == best["best"]  # the extension was worse
    groups = torch.load(out / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.7, 0.0] and {g["betas"] for g in groups} == {(0.5, 0.95)}
    assert [r["step"] for r in records(out) if "best" in r] == [0, 3, 5, 6]
    assert "resume = false" in (out / "config.toml").read_text()


def test_the_clipped_fraction_is_of_the_steps_since_the_last_line(tmp_path):
    train.main(options(tmp_path, "run", max_iters=7, log_interval=3, grad_clip=1e-6))
    assert [(r["step"], r["clipped"]) for r in records(tmp_path / "run") if "loss" in r] == [(1, 1), (3, 1), (6, 1)]


def test_a_folder_of_data_may_hold_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("abc def\n" * 200)
    args = [*TINY, "--data=.", "--out_dir=out", "--cache_dir=cache", "--max_iters=1"]
    train.main(args)
    train.main(["--resume", "--max_iters=2"])


def test_sampling_works_where_the_training_backend_would_not(tmp_path):
    """attn_backend=flex is for the compiled training; its samples are eager."""
    config = HydraConfig(vocab_size=257, block_size=32, dim=32, n_head=2, n_kv_head=1, compression=2, latent_head_dim=0,
                         attn_backend="flex")  # fmt: skip
    enc = prepare(__file__, "bytes", str(tmp_path)).enc
    assert train.sample_text(Hydra(config), enc, "ab", 3, 0, torch.device("cpu")).startswith("ab")


def test_a_new_run_overwrites_nothing(tmp_path, capsys):
    train.main(options(tmp_path, "run", max_iters=2))
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    train.main(options(tmp_path, "run", max_iters=1))
    assert {p.name: p.read_bytes() for p in (tmp_path / "run" / "run-1").iterdir()} == before
    assert "its files are in" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 1


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(UserError, match="No space left on device.*free some space"):
        train.write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["last.pt"]


def test_the_schedule():
    c = TrainConfig(learning_rate=1.0, warmup_iters=10, max_iters=110, min_lr_ratio=0.1)
    rates = [learning_rate_at(step, c) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0) and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_precision_device_and_compilation_say_why(tmp_path, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert train.pick_dtype("auto", cpu, 768)[0] == torch.bfloat16
    assert train.pick_dtype("auto", cpu, 128)[0] == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    dtype, reason = train.pick_dtype("auto", cpu, 768)
    assert dtype == torch.float32 and "no bf16" in reason
    assert train.pick_dtype("bfloat16", cpu, 64) == (torch.bfloat16, "asked for")
    monkeypatch.setattr(train.shutil, "which", lambda name: "/bin/g++")
    monkeypatch.setattr(train.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    assert train.pick_compile("auto", cuda, 10)[0] and not train.pick_compile("auto", cpu, 3e13)[0]
    assert train.pick_compile("on", cpu, 1)[0] and not train.pick_compile("off", cuda, 1)[0]
    assert train.pick_compile("auto", cpu, 1e14)[0]
    monkeypatch.setattr(train.shutil, "which", lambda name: None)
    compiled, reason = train.pick_compile("auto", cpu, 1e14)
    assert not compiled and "no g++" in reason
    with pytest.raises(UserError, match="compile='on': there is no g"):
        train.pick_compile("on", cpu, 1)
    for name in ("tpu", "cpu:1", "cuda:x", "cuda:99", "cuda99"):
        with pytest.raises(UserError, match=f"device='{name}'"):
            train.pick_device(name)


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


# ---- errors


@pytest.mark.parametrize("changes, words", [
    (["--vocab_size=200"], "vocab_size 200 is smaller than the 257 tokens of 'bytes'"),
    (["--data=/nowhere/at/all"], "no such file or folder"),
    (["--tokenizer=gpt3"], "unknown tokenizer 'gpt3': did you mean"),
    (["--block_size=100000"], "block_size 100000 needs 100001 tokens"),
    (["--resume"], "last.pt does not exist: train first"),
    (["--device=cuda:77"], "sees no such GPU"),
    (["--attn_backend=flex"], "attn_backend=flex cannot work here"),
    (["--dtype=float16"], "use auto, float32 or bfloat16"),
    (["--batch_size=0"], "batch_size=0: it must be at least 1"),
    (["--max_iters=-1"], "max_iters=-1"), (["--beta2=1"], "beta2=1.0"), (["--compile=maybe"], "compile='maybe'"),
    (["--eval_interval=0"], "eval_interval=0"), (["--out_dir="], "out_dir=''"), (["--seed=-5"], "seed=-5"),
])  # fmt: skip
def test_bad_input_is_one_clear_line_and_writes_nothing(tmp_path, changes, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as error:
        train.main([*options(tmp_path, "run"), *changes])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_and_a_damaged_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out_dir=.*file/run"):
        train.main(options(tmp_path, "file/run"))
    (tmp_path / "bad").mkdir()
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 half a zip"):
        (tmp_path / "bad" / "last.pt").write_bytes(content)
        with pytest.raises(UserError, match="is no checkpoint of this project"):
            train.main([*options(tmp_path, "bad"), "--resume"])
        assert (tmp_path / "bad" / "last.pt").read_bytes() == content
    for content in ({}, {"model": 1}, [1], torch.zeros(2)):
        torch.save(content, tmp_path / "bad" / "last.pt")
        with pytest.raises(UserError, match="parts are missing"):
            train.main([*options(tmp_path, "bad"), "--resume"])
    train.main(options(tmp_path, "run", max_iters=1))
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    checkpoint["model_config"]["heads"] = 3
    torch.save(checkpoint, tmp_path / "bad" / "best.pt")
    with pytest.raises(UserError, match="another version of this project"):
        sample.main([f"--out_dir={tmp_path / 'bad'}"])


def test_the_command_line_ends_with_2_and_one_line(capsys):
    process, other = start(["--help"]), start(["--learning_rat=1"])
    process.stdout.close()  # a reader that leaves early is no error to shout about
    assert "Traceback" not in process.stderr.read()
    process.wait(60)
    out, err = finish(other, 2)
    assert out == "" and err.count("\n") == 1 and "did you mean learning_rate" in err and "Traceback" not in err
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = capsys.readouterr().out
    assert "--learning_rate" in out and "peak learning rate" in out and "--pattern" in out


# ---- sampling from a checkpoint


def test_sample_continues_a_prompt_repeatably(tmp_path, capsys):
    train.main(options(tmp_path, "run", max_iters=2, vocab_size=300))  # ids 257..299 have no text
    args = [f"--out_dir={tmp_path / 'run'}", "--prompt=import é", "--max_new_tokens=12", "--temperature=2"]

    def run(*more: str) -> str:
        capsys.readouterr()
        assert sample.main([*args, *more]) == 0
        return capsys.readouterr().out

    first = run()
    assert first.startswith("import é") and first == run() and first != run("--seed=3")
    assert run("--temperature=0") == run("--temperature=0", "--seed=9") == run("--top_k=1") == run("--top_p=1e-9")
    assert run("--checkpoint=last", "--max_new_tokens=0") == "import é\n"
    assert len(run("--prompt=")) > 1
    with pytest.raises(UserError, match="max_new_tokens=60: with a prompt of 9 tokens .* block_size=32"):
        run("--max_new_tokens=60")


def test_sample_takes_several_prompts_and_reports_its_speed(tmp_path, capsys):
    """Every text in its place, greedy ones as each gives alone; the report goes to stderr."""
    train.main(options(tmp_path, "run", max_iters=2))
    (tmp_path / "prompts.txt").write_text("\ufeffab\n \nimport é\n")
    args = [f"--out_dir={tmp_path / 'run'}", "--max_new_tokens=9", "--temperature=0", "--dtype=float32"]

    def run(*more: str) -> tuple[str, str]:
        capsys.readouterr()
        assert sample.main([*args, *more]) == 0
        return capsys.readouterr()

    one, two = run("--prompt=ab")[0], run("--prompt=import é")[0]
    both = one + "-" * 30 + "\n" + two
    prompts = f"--prompt_file={tmp_path / 'prompts.txt'}"
    assert run("--prompt=ab", "--prompt", "import é")[0] == both == run(prompts)[0]
    assert run("--prompt=ab", "--num_samples=3")[0] == ("-" * 30 + "\n").join([one] * 3)
    assert "24 tokens" in run("--prompt=ab", "--num_samples=3", "--max_new_tokens=8")[1]
    assert "2 tokens, too few to time" in run(prompts, "--max_new_tokens=1")[1]
    with pytest.raises(UserError, match="prompt_file='/no/such': .*one prompt a line"):
        run("--prompt_file=/no/such")
    with pytest.raises(UserError, match="compile='on': on a CPU 2 texts"):
        run(prompts, "--compile=on")


def test_sample_prints_each_token_as_it_comes_up_to_the_end_of_text(tmp_path, capsys, monkeypatch):
    """In UTF-8 that is cut between tokens; what cannot be generated raises before anything is printed."""
    train.main(options(tmp_path, "run", max_iters=2))
    args = [f"--out_dir={tmp_path / 'run'}", "--prompt=a", "--prompt=b"]
    capsys.readouterr()
    with pytest.raises(UserError, match="block_size"):
        sample.main([*args, "--max_new_tokens=99"])
    assert capsys.readouterr().out == ""
    seen = []

    def tokens(self, *_, state):
        assert isinstance(self.blocks[0].attn.out, PackedLinear)
        for pair in zip([*"é".encode(), *b"x", 256, *b"z"], [*b"yyy", 256, *b"z"], strict=True):
            yield torch.tensor(pair)
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(Hydra, "generate", tokens)
    sample.main([*args, "--max_new_tokens=9"])
    assert seen == ["a", "é", "x", "", ""] and capsys.readouterr().out == "\n" + "-" * 30 + "\nbyyy\n"


def test_the_report_of_a_generation():
    """Rates of what happened after the first tokens; the state at its end, without the last token of each row."""
    config = HydraConfig(vocab_size=257, block_size=32, dim=32, n_head=2, n_kv_head=1, compression=2, latent_head_dim=0)
    net = Hydra(config)
    state = net.new_state(2, 20)
    state.pos_B += torch.tensor([13, 15])
    line = sample.report(net, state, [3, 5], made=17, steps=11, seconds=2.0, copy=1e9)
    rate = 10 * (4 * count_params(config) + sum(kv_bytes(config, n + 5, 4) for n in (3, 5))) / 2.0
    assert f"17 tokens, {15 / 2:.1f} tokens/s, {rate / 1e9:.3g} GB/s" in line and f" {rate / 1e9:.0%} of" in line
    holds = sum(kv_bytes(config, n, 4) + tail_bytes(config, 4) for n in (13, 15))
    assert f"holds {holds:,} of {2 * (kv_bytes(config, 20, 4) + tail_bytes(config, 4)):,} bytes" in line
    routed = Hydra(replace(config, mod_capacity=0.5))
    assert "GB/s" not in sample.report(routed, routed.new_state(2, 20), [3, 5], 17, 11, 2.0, 1e9)


@pytest.mark.parametrize("changes, words", [
    ([], "best.pt does not exist: train first"), (["--checkpoint=first"], "checkpoint='first': use best or last"),
    (["--top_p=0"], "top_p=0.0"), (["--temperature=-1"], "temperature=-1.0"), (["--promt=x"], "did you mean prompt"),
])  # fmt: skip
def test_sample_refuses_in_one_line(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        sample.main([f"--out_dir={tmp_path}", *changes])


# ---- the shipped configurations


def shipped(name: str) -> tuple[HydraConfig, TrainConfig]:
    return build(parse([str(ROOT / "config" / f"{name}.toml")], HydraConfig, TrainConfig), HydraConfig, TrainConfig)


def test_tiny_is_the_default_run_written_out():
    text = tomllib.loads((ROOT / "config" / "tiny.toml").read_text())
    assert shipped("tiny") == (HydraConfig(), TrainConfig())
    assert {"dim", "pattern", "n_layer", "learning_rate", "max_iters", "batch_size"} <= text.keys()
    assert set(HydraConfig().layers) == set("MCL") and HydraConfig().n_layer >= 8


def test_the_baselines_have_the_size_of_the_default_run():
    config, c = shipped("tiny")
    for name, letter in (("tiny_mha", "A"), ("tiny_gqa", "G")):
        other, run = shipped(name)
        assert set(other.layers) == {letter} and other.vocab_size == config.vocab_size
        assert abs(count_params(other) / count_params(config) - 1) < 0.03
        tokens = [r.max_iters * r.batch_size * r.gradient_accumulation_steps for r in (run, c)]
        assert tokens[0] * other.block_size == tokens[1] * config.block_size


def test_small_medium_and_large_are_the_architectures():
    for name, dim, heads, groups, ratio in (("small", 768, 12, 3, 3.0), ("medium", 896, 14, 2, 3.5),
                                            ("large", 1024, 16, 4, 4.0)):  # fmt: skip
        c, _ = shipped(name)
        assert (c.dim, c.n_head, c.n_kv_head, c.mlp_ratio, c.n_layer) == (dim, heads, groups, ratio, 24)
        assert c.vocab_size == 50257 and c.pattern == "MMCCCLML"


@pytest.mark.parametrize("cls, files", [(HydraConfig, ("model", "attention")), (TrainConfig, ("train",)),
                                        (sample.SampleConfig, ("sample",))])  # fmt: skip
def test_every_key_has_its_comment_and_is_read(cls, files):
    assert all(field_comments(cls).values())
    code = "".join((ROOT / f"{n}.py").read_text() for n in files)
    code = re.sub(r"def (__post_init__|_check_heads).*?(?=\n    @|\n\n\n)", "", code, flags=re.S)
    for name in field_comments(cls):
        assert re.search(rf"\b(c|config|self|probe)\.{name}\b", code), name
