"""Train HYDRA on text: `python train.py [config/x.toml ...] [--key=value ...]`. No argument: the default run.

- One flat story: configuration, device, data, model, resume, compile, loop (save, evaluate, sample, step).
- AdamW (fused), linear warmup and cosine, clipping by the global norm, gradient accumulation, bf16 autocast.
- OUT_DIR gets config.toml, log.jsonl (a header, then a JSON object a line), last.pt and best.pt, each whole or absent.
- Ctrl-C saves and leaves; --resume goes on from last.pt, bit for bit on a CPU.
- Routed models (routing.py) train with their auxiliary losses added; `loss` in the log is the language model's alone.
- A step whose loss or gradient is not finite is skipped, counted and named; ten in a row end the run.
Left out: float16 and its loss scaling, several processes, other optimisers.
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
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from configurator import UserError, build, cli, need, parse, to_toml
from data import decode, eval_batches, get_batch, prepare, token_bytes, tokenizer_hash
from model import IGNORE, Hydra, HydraConfig, count_params, flops_per_token

BY_RULE = ("routed_fraction", "mean_depth")  # routing statistics that an evaluation has too
MAX_BAD = 10  # steps in a row without a finite loss and gradient, after which a run ends
EARNS_COMPILATION = 5e13  # FLOPs of a run on a CPU: some minutes, of which a compilation saves more than it takes


@dataclass(frozen=True)
class TrainConfig:
    """A run: data, schedule, optimiser, outputs; raises UserError, in one line, for values that cannot be."""

    out_dir: str = "out"  # folder of the run: checkpoints, log, configuration
    resume: bool = False  # go on from OUT_DIR/last.pt with its configuration
    data: str = ""  # a text file or folder to train on; empty: the Python standard library on this machine
    tokenizer: str = "python4096"  # python4096, bytes, or an encoding of tiktoken such as gpt2 (downloaded once)
    cache_dir: str = "cache"  # folder of the token files
    batch_size: int = 4  # sequences in one forward
    gradient_accumulation_steps: int = 1  # forwards and backwards in one step
    max_iters: int = 800  # steps of the run
    learning_rate: float = 1.4e-3  # peak learning rate
    warmup_iters: int = 80  # steps of linear warmup
    min_lr_ratio: float = 0.1  # the cosine ends at this part of learning_rate
    weight_decay: float = 0.1  # on matrices and embeddings
    beta1: float = 0.9  # AdamW, decay of the gradient's mean
    beta2: float = 0.95  # AdamW, decay of the gradient's square
    grad_clip: float = 1.0  # largest norm of the gradient, 0 = no clipping
    eval_interval: int = 200  # steps between evaluations, which also save
    eval_iters: int = 20  # batches of one evaluation, evenly spread over the validation split, 0 = all
    final_eval_iters: int = 0  # the same for the one at the end, 0 = all: the number to compare
    log_interval: int = 10  # steps between log lines
    sample_tokens: int = 80  # tokens of the sample at each evaluation, 0 = none
    sample_prompt: str = "def"  # text that the samples go on from; tokens begin with their space, so end it without
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: str = "auto"  # auto, float32 or bfloat16 (autocast over fp32 weights)
    compile: str = "auto"  # torch.compile of the blocks: auto, on or off
    seed: int = 1337  # of the weights, the batches and the samples

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval"):
            need(self, name, getattr(self, name) >= 1, "it must be at least 1")
        for name in ("max_iters", "warmup_iters", "min_lr_ratio", "weight_decay", "grad_clip", "eval_iters",
                     "final_eval_iters", "sample_tokens", "seed", "learning_rate"):  # fmt: skip
            need(self, name, getattr(self, name) >= 0, "it must not be negative")
        for name in ("beta1", "beta2"):
            need(self, name, 0 <= getattr(self, name) < 1, "it must be at least 0 and below 1")
        need(self, "dtype", self.dtype in ("auto", "float32", "bfloat16"), "use auto, float32 or bfloat16")
        need(self, "compile", self.compile in ("auto", "on", "off"), "use auto, on or off")
        need(self, "out_dir", len(self.out_dir) > 0, "name a folder")
        need(self, "seed", self.seed < 2**63, "choose one below 2**63")


# ---------------------------------------------------------------------------------------------------------------------
# what this machine is and does best


def pick_device(asked: str) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:N"; UserError where there is no such device."""
    cuda = torch.cuda.is_available()
    name = ("cuda" if cuda else "cpu") if asked == "auto" else asked
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise UserError(f"device={asked!r}: use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= (torch.cuda.device_count() if cuda else 0):
        raise UserError(f"device={asked!r}: torch {torch.__version__} sees no such GPU: use device=auto or cpu")
    return torch.device(name)


def pick_dtype(asked: str, device: torch.device, dim: int) -> tuple[torch.dtype, str]:
    """(dtype, reason). A CPU without bf16 instructions emulates them, and narrow models do not earn the casts back."""
    if asked != "auto":
        return getattr(torch, asked), "asked for"
    if device.type == "cuda":
        able, what = torch.cuda.is_bf16_supported(), "this GPU"
    else:
        able = any(torch.cpu.get_capabilities().get(k, False) for k in ("amx_bf16", "avx512_bf16"))
        what = "this CPU"
    if not able:
        return torch.float32, f"{what} has no bf16 instructions"
    if device.type == "cpu" and dim < 256:
        return torch.float32, "a model this narrow does not earn the casts back on a CPU"
    return torch.bfloat16, f"{what} has bf16 instructions"


def pick_compile(asked: str, device: torch.device, flops: float) -> tuple[bool, str]:
    """(whether to compile the blocks, reason), for a run of `flops` FLOPs. On a CPU it gains 10-30% a step, costs
    15-40 s once, and calls g++. UserError where "on" was asked for and cannot be."""
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    missing = "" if shutil.which("g++") and headers else "there is no g++ or no Python.h here"
    if asked == "on" and device.type == "cpu" and missing:
        raise UserError(f"compile='on': {missing}: install a C++ compiler and Python's headers, or use compile=off")
    if asked != "auto":
        return asked == "on", "asked for"
    if device.type == "cuda":
        return True, "fuses the attention and the pointwise work on a GPU"
    if flops < EARNS_COMPILATION:
        return False, f"on a CPU a run of {flops:.0e} FLOPs, below {EARNS_COMPILATION:.0e}, does not earn it back"
    if missing:
        return False, f"{missing}: slower than it could be"
    return True, "a long run on a CPU earns the compilation back"


def sync(device: torch.device) -> None:
    """Wait until the device has done all that it was given, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product here and now, best of seven: the peak that MFU is a part of."""
    n = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(7):
        sync(device)
        start = time.perf_counter()
        a @ a
        sync(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a large copy here and now, read and written, best of seven: what decoding at batch 1 is bound by."""
    a = torch.zeros(2**26 if device.type == "cpu" else 2**28, device=device)
    b, best = torch.empty_like(a), math.inf
    for _ in range(7):
        sync(device)
        start = time.perf_counter()
        b.copy_(a)
        sync(device)
        best = min(best, time.perf_counter() - start)
    return 2 * a.numel() * a.element_size() / best


# ---------------------------------------------------------------------------------------------------------------------
# files of a run


CHECKPOINT = ("model", "model_config", "train_config", "fingerprint", "tokenizer", "step", "best")


def write_atomically(path: Path, write) -> None:
    """`write(temporary path)`, then rename: `path` is the old file or the whole new one, never a part of it.
    UserError where it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with none of the bytes
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path} ({error}): free some space or choose another out_dir") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """A checkpoint as a dict of plain values and tensors; UserError if it is missing, damaged or foreign."""
    try:
        if not path.is_file():
            raise UserError(f"{path} does not exist: train first, or name the run's folder with --out_dir=PATH")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except UserError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = f"it is damaged or foreign ({type(error).__name__})"
        raise UserError(f"{path} is no checkpoint of this project, {reason}: restore or delete it") from error
    if not isinstance(checkpoint, dict) or not set(CHECKPOINT) <= checkpoint.keys():
        raise UserError(f"{path} is no checkpoint of this project, parts are missing: restore or delete it")
    for name, cls in (("model_config", HydraConfig), ("train_config", TrainConfig)):
        if checkpoint[name].keys() != asdict(cls()).keys():
            raise UserError(f"{path} was made by another version of this project: use that one, or train anew")
    return checkpoint


def set_aside(out: Path) -> str:
    """Move an earlier run's files into a numbered folder of OUT_DIR, so that a new run overwrites nothing."""
    old = [out / name for name in ("last.pt", "best.pt", "log.jsonl", "config.toml") if (out / name).exists()]
    if not old:
        return ""
    folder = next(f for n in range(1, 10**6) if not (f := out / f"run-{n}").exists())
    folder.mkdir()
    for path in old:
        path.rename(folder / path.name)
    return f"{out} held a run: its files are in {folder} now (--resume would have continued it)"


def truncate_log(path: Path, step: int, evaluates: bool) -> None:
    """Drop the records that a run resumed at `step` writes again: later steps and, if it `evaluates` at once, that
    step's evaluations."""
    if not path.exists():
        return
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [r for r in records if r.get("step", 0) <= step - (evaluates and "val_bpb" in r)]
    write_atomically(path, lambda temporary: temporary.write_text("".join(json.dumps(r) + "\n" for r in kept)))


def git_hash() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# pieces of the loop


def make_optimizer(model: Hydra, c: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.optimizer_groups(c.weight_decay), lr=c.learning_rate, betas=(c.beta1, c.beta2),
                             fused=True)  # fmt: skip


def gradient_norm(model: nn.Module) -> torch.Tensor:
    return nn.utils.get_total_norm([p.grad for p in model.parameters()])


def update(model: nn.Module, optimizer: torch.optim.Optimizer, norm: torch.Tensor, grad_clip: float) -> None:
    """A step of the optimiser with the gradients of global norm `norm`, clipped to `grad_clip` (0 = not)."""
    if grad_clip:
        nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    optimizer.step()


def learning_rate_at(step: int, c: TrainConfig) -> float:
    """Linear warmup over warmup_iters, then a cosine that reaches min_lr_ratio * learning_rate at max_iters."""
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / c.warmup_iters
    done = (step - c.warmup_iters) / max(1, c.max_iters - c.warmup_iters)
    return c.learning_rate * (c.min_lr_ratio + (1 - c.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@torch.no_grad()
def evaluate(model: Hydra, tokens: np.ndarray, bytes_V: torch.Tensor, batch_size: int, batches: int,
             device: torch.device) -> tuple[float, float]:  # fmt: skip
    """(mean nats per token, bits per byte) over `batches` batches of `tokens`, 0 = over all of it."""
    model.eval()
    nats, count, size = 0.0, 0, 0
    for x, y in eval_batches(tokens, batch_size, model.config.block_size, batches):
        seen = y[y != IGNORE]
        _, loss = model(x.to(device), y.to(device))
        nats, count, size = nats + loss.item() * len(seen), count + len(seen), size + int(bytes_V[seen].sum())
    model.train()
    return nats / count, nats / math.log(2) / max(1, size)


def sample_text(model: Hydra, enc, prompt: str, tokens: int, seed: int, device: torch.device) -> str:
    """`prompt` and its continuation, up to the end of the block. Eager: it is too short to earn a compilation back."""
    ids = (enc.encode_ordinary(prompt) or [enc.eot_token])[: model.config.block_size]
    generator = torch.Generator(device).manual_seed(seed)
    tokens = min(tokens, model.config.block_size - len(ids))
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        steps = model.generate(torch.tensor([ids]), tokens, temperature=0.8, top_p=0.95, generator=generator)
        new = [int(t) for t in steps]
    model.train()
    return prompt + decode(enc, new)


def worst_gradient(model: nn.Module) -> str:
    """Name of the first parameter whose gradient is not finite."""
    bad = (n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
    return next(bad, "the norm itself")


def main(argv: list[str]) -> int:
    # ---- configuration: defaults < the checkpoint's (--resume) < files and options
    given = parse(argv, HydraConfig, TrainConfig, doc=__doc__)
    (probe,) = build({k: given[k] for k in ("out_dir", "resume") if k in given}, TrainConfig)
    out, checkpoint = Path(probe.out_dir), None
    if probe.resume:
        checkpoint = load_checkpoint(out / "last.pt")
        fixed = checkpoint["model_config"] | {"tokenizer": checkpoint["train_config"]["tokenizer"]}
        for name, value in fixed.items():
            if name != "attn_backend" and given.get(name, value) != value:
                raise UserError(f"{name}={given[name]!r}: the run in {out} has {value!r}, which --resume cannot "
                                f"change: leave it out, or start another run with --out_dir=PATH")  # fmt: skip
    stored = {**checkpoint["model_config"], **checkpoint["train_config"]} if checkpoint else {}
    config, c = build(given | {"resume": False}, HydraConfig, TrainConfig, base=stored | {"out_dir": probe.out_dir})
    if checkpoint and c.max_iters < checkpoint["step"]:
        raise UserError(f"max_iters={c.max_iters}: the run in {out} is at step {checkpoint['step']}: ask for more")

    # ---- device, precision
    device = pick_device(c.device)
    dtype, dtype_reason = pick_dtype(c.dtype, device, config.dim)
    tokens_per_step = c.batch_size * c.gradient_accumulation_steps * config.block_size
    flops_per_step = 3 * flops_per_token(config, config.block_size) * tokens_per_step
    compiled, compile_reason = pick_compile(c.compile, device, c.max_iters * flops_per_step)
    torch.manual_seed(c.seed)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")

    # ---- data
    corpus = prepare(c.data, c.tokenizer, c.cache_dir, c.out_dir)
    bytes_V = torch.from_numpy(token_bytes(corpus.enc, config.vocab_size))
    ids = {"fingerprint": corpus.fingerprint, "tokenizer": tokenizer_hash(corpus.enc)}
    for name, what in (("fingerprint", "text"), ("tokenizer", "tokenizer")):
        if checkpoint and checkpoint[name] != ids[name]:
            raise UserError(f"data={c.data!r}: the {what} has changed since the run in {out} began ({ids[name][:12]}, "
                            f"not {checkpoint[name][:12]}): restore it, or start another run with --out_dir=PATH")
    get_batch(corpus.train, 1, config.block_size, 0, 0)  # too short a text is refused before anything is written

    # ---- model, optimiser, resume
    model = Hydra(config).to(device)
    backends = model.backend(compiled, grad=True)
    optimizer = make_optimizer(model, c)
    # what a checkpoint carries besides the weights: everything that the next step depends on
    state = {"step": 0, "best": math.inf, "skipped": 0, "streak": 0, "clipped": 0, "counted": 0}
    evaluates = True  # at the first step of this run
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, fresh in zip(optimizer.param_groups, model.optimizer_groups(c.weight_decay), strict=True):
            group |= {"weight_decay": fresh["weight_decay"], "betas": (c.beta1, c.beta2)}  # they may have been changed
        state = {name: checkpoint[name] for name in state}
        evaluates = state["step"] % c.eval_interval == 0 or state["step"] >= c.max_iters
        if (out / "best.pt").exists():  # last.pt was written before its own evaluation
            best = load_checkpoint(out / "best.pt")
            if best["step"] < state["step"] + (not evaluates):
                state["best"] = min(state["best"], best["best"])

    # ---- the run's folder
    toml = to_toml(config, c)
    try:
        aside = "" if checkpoint else set_aside(out)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "config.toml", lambda temporary: temporary.write_text(toml, encoding="utf-8"))
        if checkpoint:
            truncate_log(out / "log.jsonl", state["step"], evaluates)
        log = open(out / "log.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 line by line, until the end
    except OSError as error:
        raise UserError(f"out_dir={c.out_dir!r}: {error.strerror}: choose a folder that can be written") from error

    # ---- say what was chosen and why
    peak = matmul_peak(device, dtype)
    peak_text = f"{peak / 1e9:,.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}"
    lines = [toml, aside, corpus.description, f"corpus fingerprint {corpus.fingerprint[:12]}",
             f"{count_params(config):,} parameters, layers {config.layers}, vocabulary {config.vocab_size} "
             f"(the tokenizer's: {corpus.enc.n_vocab})",
             f"device {device}, dtype {dtype} ({dtype_reason}), matrix-multiply peak measured now: {peak_text}",
             f"compile {'on, block by block' if compiled else 'off'} ({compile_reason})",
             *(f"attention {letter}: {backend} ({why})" for letter, (backend, why) in backends.items())]  # fmt: skip
    print("\n".join(line for line in lines if line), flush=True)

    def record(entry: dict) -> None:  # JSON has no NaN
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        log.write(json.dumps(entry, allow_nan=False) + "\n")

    record({"resumed_at" if checkpoint else "started": state["step"], "config": asdict(config) | asdict(c),
            "git": git_hash(), "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
            "device": str(device), "dtype": f"{dtype} ({dtype_reason})", "compile": f"{compiled} ({compile_reason})",
            "attention": backends, "parameters": count_params(config), "matmul_peak": peak, **ids})  # fmt: skip

    def save(name: str, with_optimizer: bool) -> None:
        content = {"model": model.state_dict(), "model_config": asdict(config), "train_config": asdict(c)} | ids | state
        if with_optimizer:
            content["optimizer"] = optimizer.state_dict()
        write_atomically(out / name, lambda temporary: torch.save(content, temporary))

    if compiled:
        # letters x (training, evaluation) x recursions' lengths, and all share Block.forward
        torch._dynamo.config.recompile_limit = 64 * config.mor_recursions
        model.static = True
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    # ---- the loop: save, evaluate, sample, step
    stop = []

    def ask_to_stop(signum, frame) -> None:
        signal.signal(signum, signal.default_int_handler)  # a second one does not wait for the step to end
        stop.append(signum)
        os.write(2, b"stopping after this step (once more: at once, unsaved)\n")  # print is not safe in a handler

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, ask_to_stop)
    first_step, began, spent, timed = state["step"], time.perf_counter(), 0.0, 0

    def batch(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
        n = step * c.gradient_accumulation_steps + micro
        x, y = get_batch(corpus.train, c.batch_size, config.block_size, c.seed, n)
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    while True:
        step = state["step"]
        final = step >= c.max_iters
        if step % c.eval_interval == 0 or final or stop:
            kept = f"the last checkpoint in {out} is kept" if (out / "last.pt").exists() else "no checkpoint is left"
            if step > first_step:
                x, y = batch(step, 0)
                with torch.no_grad(), autocast:
                    sound = bool(model(x, y)[1].isfinite())  # weights can be finite and still be lost
                if sound:
                    save("last.pt", with_optimizer=True)
                    kept = f"saved in {out}"
            if stop:
                print(f"stopped at step {step}, {kept}: go on with --resume --out_dir={c.out_dir}", flush=True)
                return 130
        if step % c.eval_interval == 0 or final:
            with autocast:
                val_loss, val_bpb = evaluate(model, corpus.val, bytes_V, c.batch_size, c.eval_iters, device)
            best = val_loss < state["best"]
            # of the evaluation's last batch
            routed = {f"val_{name}": value.item() for name, value in model.routing().items() if name in BY_RULE}
            record({"step": step, "val_loss": val_loss, "val_bpb": val_bpb, "best": best} | routed)
            print(f"step {step:5d} | validation {val_loss:.4f} nats/token, {val_bpb:.4f} bits/byte{' (best)' * best}")
            if best:
                state["best"] = val_loss
                if step > 0:
                    save("best.pt", with_optimizer=False)
            if c.sample_tokens and math.isfinite(val_loss):
                with autocast:
                    text = sample_text(model, corpus.enc, c.sample_prompt, c.sample_tokens, c.seed + step, device)
                print("-" * 30 + f" sample at step {step}\n{text}\n" + "-" * 30, flush=True)
        if final:
            break

        # -- one step
        sync(device)
        start = time.perf_counter()
        lr, losses = learning_rate_at(step, c), []
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro in range(c.gradient_accumulation_steps):
            x, y = batch(step, micro)
            with autocast:
                _, loss = model(x, y)
            ((loss + model.aux_loss()) / c.gradient_accumulation_steps).backward()
            losses.append(loss.detach())
        norm_tensor = gradient_norm(model)
        loss, norm = torch.stack([torch.stack(losses).mean(), norm_tensor]).tolist()  # the step's one sync point
        state["step"] = step + 1
        if math.isfinite(loss) and math.isfinite(norm):
            update(model, optimizer, norm_tensor, c.grad_clip)
            state["streak"] = 0
            state["clipped"] += bool(c.grad_clip and norm > c.grad_clip)
            state["counted"] += 1
        else:
            what = "loss" if not math.isfinite(loss) else f"gradient of {worst_gradient(model)}"
            state["skipped"], state["streak"] = state["skipped"] + 1, state["streak"] + 1
            record({"step": step + 1, "skipped": what})
            print(f"step {step + 1:5d} | {what} is not finite: update skipped ({state['skipped']} so far)", flush=True)
        optimizer.zero_grad(set_to_none=True)
        sync(device)
        spent, timed = spent + time.perf_counter() - start, timed + 1
        if state["streak"] >= MAX_BAD:
            kept = f"the checkpoint in {out} is kept" if (out / "last.pt").exists() else "no checkpoint was written yet"
            message = f"{MAX_BAD} steps in a row were not finite, the last one in its {what}"
            record({"step": step + 1, "stopped": message})
            print(f"error: {message}; {kept}: lower --learning_rate", file=sys.stderr, flush=True)
            return 1
        if (step + 1) % c.log_interval == 0 or step == 0:
            seconds, clipped = spent / timed, state["clipped"] / max(1, state["counted"])
            mfu = flops_per_step / seconds / peak
            eta = (c.max_iters - step - 1) * (time.perf_counter() - began) / (step + 1 - first_step)
            routed = {name: value.item() for name, value in model.routing().items()}  # of this step's last batch
            record({"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm, "clipped": clipped,
                    "ms": seconds * 1e3, "tokens_per_s": tokens_per_step / seconds, "mfu": mfu, "eta_s": eta,
                    "skipped": state["skipped"]} | routed)  # fmt: skip
            print(f"step {step + 1:5d} | {(step + 1) / c.max_iters:4.0%} | loss {loss:.4f} | lr {lr:.2e} | "
                  f"norm {norm:.2f} | clipped {clipped:4.0%} | {seconds * 1e3:.0f} ms | "
                  f"{tokens_per_step / seconds:,.0f} tokens/s | MFU {mfu:.0%} | "
                  + "".join(f"{name} {value:.3f} | " for name, value in routed.items()) +
                  f"ETA {int(eta) // 60}:{int(eta) % 60:02d}", flush=True)  # fmt: skip
            spent, timed, state["clipped"], state["counted"] = 0.0, 0, 0, 0

    # ---- the number to compare
    with autocast:
        val_loss, val_bpb = evaluate(model, corpus.val, bytes_V, c.batch_size, c.final_eval_iters, device)
    record({"step": state["step"], "val_loss": val_loss, "val_bpb": val_bpb, "final": True})
    log.close()
    part = f"{c.final_eval_iters} batches of the validation split" if c.final_eval_iters else "whole validation split"
    print(f"{part}: {val_loss:.4f} nats/token, {val_bpb:.4f} bits/byte; {time.perf_counter() - began:.0f} s in all; "
          f"sample it with: python sample.py --out_dir={c.out_dir} --prompt=import")  # fmt: skip
    return 0


if __name__ == "__main__":
    cli(main)
