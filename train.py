"""Train HYDRA on text: `python train.py [config/x.toml ...] [--key=value ...]`. No argument: the default run.

- AdamW (fused), clipping by the global norm, gradient accumulation, bf16 autocast.
- Steps, tokens, training FLOPs or seconds end a run; the learning rate follows how much of it is done: linear warmup,
  then a cosine, or wsd: constant and, for the last part, linear (arXiv:2404.06395).
- OUT_DIR gets config.toml, log.jsonl (a header, then a JSON object a line), last.pt and best.pt, each whole or absent.
- Ctrl-C saves and leaves; --resume goes on from last.pt, bit for bit on a CPU.
- Routed models (routing.py) train with their auxiliary losses added; `loss` in the log is the language model's alone.
- A step whose loss or gradient is not finite updates nothing, is counted and named; ten in a row end the run. The
  device sees to it alone: the host waits for it once a log line.
- Several processes, each with its device: torchrun --nproc_per_node=N train.py, see parallel.py.
Left out: float16 and its loss scaling, other optimisers.
"""

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import checkpoints
import runs
from accounting import count_params, flops_per_token, memory_plan, plan_lines
from attention import KINDS, letters_help
from checkpoints import Progress
from configurator import UserError, build, cli, need, parse, to_toml
from data import Batch, Corpus, Tokens, epoch_batch, eval_batches, get_batch, prepare, token_bytes, tokenizer_hash
from generate import continue_text
from layers import IGNORE
from machine import DTYPES, Machine, Prefetch, choose_machine, peak_memory, total_memory
from model import Hydra, HydraConfig
from parallel import ALONE, Ranks, accumulates, distribute, ends_together, join, launched, local, pooled, restarted
from sources import split_warning

SILENT = 3  # minutes that a step or an evaluation may take at the peak; really it is several times that
BY_RULE = ("routed_fraction", "mean_depth")  # routing statistics that an evaluation has too
STOPS = ("max_tokens", "max_flops", "max_seconds")  # what can end a run instead of max_iters
CPU_RATE = 2e11  # FLOP/s, about: of a CPU for whose seconds a compilation has to be worth its time


@dataclass(frozen=True)
class TrainConfig:
    """A run: data, schedule, optimiser, outputs; raises UserError, in one line, for values that cannot be."""

    out_dir: str = "out"  # folder of the run: checkpoints, log, configuration
    resume: bool = False  # go on from OUT_DIR/last.pt with its configuration
    data: str = ""  # a text file or folder, or token shards (folder or glob); empty: this machine's standard library
    tokenizer: str = "auto"  # auto (texts: python4096, shards: none), bytes, gpt2 or another of tiktoken, a rank file
    sampling: str = "random"  # of windows: random, with replacement; or epochs, each once in an order of its own
    val_fraction: float = 0.1  # part of a text that validates
    val_data: str = ""  # or a text, or shards, of its own
    text_field: str = "text"  # of JSON lines: where a record has its text
    init_from: str = ""  # start from the weights of a run (its folder, or a checkpoint): fine-tuning, a longer block
    cache_dir: str = "cache"  # folder of the token files
    batch_size: int = 4  # sequences in one forward, over all processes
    gradient_accumulation_steps: int = 1  # forwards and backwards in one step
    max_iters: int = 800  # steps of the run; where one of the next three is set, that one ends it instead
    max_tokens: int = 0  # tokens, rounded up to a step; 0 = not set
    max_flops: float = 0.0  # training FLOPs, rounded up to a step; 0 = not set
    max_seconds: float = 0.0  # seconds of training: evaluations and compilation do not count; 0 = not set
    schedule: str = "cosine"  # behind the warmup: cosine, or wsd (constant, then linear)
    decay_ratio: float = 0.2  # wsd: part of the run, its last, in which the rate falls
    learning_rate: float = 1.4e-3  # peak learning rate
    warmup_iters: int = 80  # steps of linear warmup
    min_lr_ratio: float = 0.1  # the schedule ends at this part of learning_rate
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
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps (eager, and untested)
    dtype: str = "auto"  # auto, float32 or bfloat16 (autocast over fp32 weights)
    recompute: str = "none"  # block: keep the blocks' inputs alone and run blocks again in the backward; or none
    compile: str = "auto"  # torch.compile of the blocks: auto, on or off
    parallel: str = "auto"  # several processes (torchrun): ddp, fsdp (parameters in parts), auto = ddp
    plan: bool = False  # print the memory that a step takes on 1, 2, 4 .. devices, and do nothing else
    profile: int = 0  # steps to profile, behind three others, into the run's folder
    seed: int = 1337  # of the weights, the batches and the samples

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval"):
            need(self, name, getattr(self, name) >= 1, "it must be at least 1")
        for name in ("max_iters", "warmup_iters", "weight_decay", "grad_clip", "eval_iters", "final_eval_iters",
                     "sample_tokens", "seed", "learning_rate", "profile", *STOPS):  # fmt: skip
            need(self, name, getattr(self, name) >= 0, "it must not be negative")
        stops = [name for name in STOPS if getattr(self, name)]
        need(self, " ".join(stops), len(stops) <= 1, "one of them can end a run: set the others to 0")
        for name in ("min_lr_ratio", "decay_ratio"):
            need(self, name, 0 <= getattr(self, name) <= 1, "choose a value from 0 to 1")
        need(self, "schedule", self.schedule in ("cosine", "wsd"), "use cosine or wsd")
        for name in ("beta1", "beta2"):
            need(self, name, 0 <= getattr(self, name) < 1, "it must be at least 0 and below 1")
        remedy = "it needs its loss scaled, which is left out here: use bfloat16"
        need(self, "dtype", self.dtype != "float16", remedy)
        need(self, "dtype", self.dtype in ("auto", *DTYPES), "use auto, float32 or bfloat16")
        need(self, "val_fraction", 0 < self.val_fraction < 1, "choose a value above 0 and below 1")
        need(self, "sampling", self.sampling in ("random", "epochs"), "use random or epochs")
        need(self, "recompute", self.recompute in ("none", "block"), "use none or block")
        need(self, "compile", self.compile in ("auto", "on", "off"), "use auto, on or off")
        need(self, "parallel", self.parallel in ("auto", "ddp", "fsdp"), "use auto, ddp or fsdp")
        need(self, "out_dir", len(self.out_dir) > 0, "name a folder")
        need(self, "seed", self.seed < 2**63, "choose one below 2**63")


def make_optimizer(model: nn.Module, run: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; decay on matrices and embeddings, none on gains, temperatures, routers and what a module calls vectors."""
    vectors = set()
    for module in model.modules():
        vectors |= {getattr(module, name, None) for name in getattr(module, "vectors", ())}
    decayed = [p for p in model.parameters() if p.dim() > 1 and p not in vectors]
    others = [p for p in model.parameters() if p.dim() < 2 or p in vectors]
    groups = [{"params": decayed, "weight_decay": run.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = decayed[0].device.type != "mps"  # whose kernel does not look at found_inf, see train_step
    return torch.optim.AdamW(groups, lr=run.learning_rate, betas=(run.beta1, run.beta2), fused=fused)


def learning_rate_at(step: int, run: TrainConfig, steps: float) -> float:
    """Of a run of `steps` steps in all: linear warmup over warmup_iters, then what reaches min_lr_ratio * learning_rate
    at its end: a cosine, or (wsd) a line over the last decay_ratio of the run, behind a constant rate."""
    if step < run.warmup_iters:
        return run.learning_rate * (step + 1) / run.warmup_iters
    behind = steps - run.warmup_iters  # the warmup
    if run.schedule == "wsd":
        decay = min(run.decay_ratio * steps, behind)
        part = min(1.0, max(0.0, steps - step) / max(1, decay))
    else:
        done = (step - run.warmup_iters) / max(1, behind)
        part = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return run.learning_rate * (run.min_lr_ratio + (1 - run.min_lr_ratio) * part)


class Step(NamedTuple):
    """What a training step did, on its device: to read it is to wait for it, see `settle`."""

    loss: Tensor  # the language model's, mean over the step's batches
    grad_norm: Tensor  # before clipping
    norms: dict[str, Tensor]  # of each parameter's gradient
    routing: dict[str, Tensor]  # of the last batch


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]],
               grad_clip: float, autocast: torch.autocast, ranks: Ranks = ALONE) -> Step:  # fmt: skip
    """Forward and backward of every batch, one update with the mean of their gradients, clipped to `grad_clip`; none
    where the loss or the norm is not finite. The host does not wait for any of it."""
    losses = []
    for i, (idx, targets) in enumerate(batches, 1):
        with accumulates(model, last=i == len(batches)):
            with autocast:
                output = model(idx, targets)
            (output.loss / len(batches)).backward()
        losses.append(output.cross_entropy.detach())
    named = ((name.removeprefix("module."), p) for name, p in model.named_parameters())  # DDP's prefix
    grads = {name: local(p.grad) for name, p in named if p.grad is not None}
    means = [torch.stack(losses).mean(), *(value.detach() for value in output.routing.values())]
    (loss, *routing), norms = ranks.agree(means, torch._foreach_norm(list(grads.values())))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if grad_clip:
        nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    sound = loss.isfinite() & norm.isfinite()
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = 1.0 - sound.float()  # a fused kernel updates nothing where this is 1, and nobody waits
        optimizer.step()
    elif sound:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(loss, norm, dict(zip(grads, norms, strict=True)), dict(zip(output.routing, routing, strict=True)))


@torch.no_grad()
def evaluate(model: Hydra, tokens: np.ndarray | Tokens, bytes_V: Tensor, batch_size: int, batches: int,
             device: torch.device, ranks: Ranks = ALONE) -> dict[str, float]:  # fmt: skip
    """val_loss (mean nats per token) and, where bytes are known, val_bpb (bits per byte) over `batches` batches of
    `tokens`, 0 = over all of it; with routers what they did by the causal rule in the last one."""
    model.eval()
    nats, count, size = 0.0, 0, 0
    rows = ranks.rows(batch_size)
    for x, y in eval_batches(tokens, batch_size, model.config.block_size, batches):
        targets = y[rows][y[rows] != IGNORE]
        output = model(x[rows].to(device), y[rows].to(device))
        if len(targets) > 0:  # else these rows are behind the last window
            nats += output.loss.item() * len(targets)
        count += len(targets)
        size += int(bytes_V[targets].sum())
    model.train()
    routing = {f"val_{name}": output.routing[name].item() for name in BY_RULE if name in output.routing}
    nats, count, size, *sums = ranks.total([nats, count, size, *routing.values()])
    found = {"val_loss": nats / count}
    if bytes_V.any():
        found["val_bpb"] = nats / math.log(2) / max(1, size)
    return found | {name: value / ranks.size for name, value in zip(routing, sums, strict=True)}


@torch.no_grad()
def is_sound(model: Hydra, batch: tuple[Tensor, Tensor], autocast: torch.autocast, ranks: Ranks) -> bool:
    """Whether the loss is finite: weights can be finite and still be lost."""
    model.eval()  # has its graphs already
    with autocast:
        sound = model(*batch).loss.isfinite()
    model.train()
    return not ranks.any(not sound)


def configure(argv: list[str]) -> tuple[HydraConfig, TrainConfig, dict | None, list[str]]:
    """Defaults < the checkpoint's (--resume) < files and options -> the two configurations, the checkpoint to go on
    from, and what is to be said about it."""
    kinds = HydraConfig, TrainConfig
    given = parse(argv, *kinds, doc=f"{__doc__}\n{letters_help()}")
    (where,) = build({name: given[name] for name in ("out_dir", "resume", "init_from") if name in given}, TrainConfig)
    if where.init_from and not where.resume:
        path = checkpoints.weights_path(where.init_from)
        source, notes = checkpoints.load_checkpoint(path, {"model_config": HydraConfig, "train_config": TrainConfig})
        base = source["model_config"] | {"tokenizer": source["train_config"]["tokenizer"]}
        return *build(given, *kinds, base=base), None, notes
    if not where.resume:
        return *build(given, *kinds), None, []
    checkpoint, notes = checkpoints.resumable(Path(where.out_dir), given, *kinds)
    stored = checkpoint["model_config"] | checkpoint["train_config"] | {"out_dir": where.out_dir, "profile": 0}
    if not launched():
        stored["parallel"] = "auto"  # a run of several processes goes on in a single one
    config, run = build(given | {"resume": False}, *kinds, base=stored)
    if not run.max_seconds and planned_steps(config, run) < checkpoint["step"]:
        asked = f"{end_of(run)}={getattr(run, end_of(run))!r}"
        raise UserError(f"{asked}: the run in {run.out_dir} is at step {checkpoint['step']}: ask for more")
    return config, run, checkpoint, notes


def step_work(config: HydraConfig, run: TrainConfig) -> tuple[int, float]:
    """Tokens and FLOPs of a step."""
    tokens = run.batch_size * run.gradient_accumulation_steps * config.block_size
    return tokens, 3 * flops_per_token(config, config.block_size) * tokens


def planned_steps(config: HydraConfig, run: TrainConfig) -> int:
    """Steps of a run that is not ended by seconds: the first at which it has its max_iters, tokens or FLOPs."""
    tokens, flops = step_work(config, run)
    if run.max_tokens:
        return (run.max_tokens + tokens - 1) // tokens
    if run.max_flops:
        return math.ceil(run.max_flops / flops * (1 - 1e-12))  # a whole number of steps is no step more by rounding
    return run.max_iters


def expected_steps(step: int, seconds: float, max_seconds: float) -> float:
    """Steps of a run that seconds end, if it goes on at its pace so far; `step` itself where they are over."""
    done = min(1.0, max(1e-6, seconds / max_seconds))
    return max(1, step) / done


def expected_flops(config: HydraConfig, run: TrainConfig) -> float:
    """Of the whole run; about, where seconds end it."""
    if run.max_seconds:
        return run.max_seconds * CPU_RATE
    return planned_steps(config, run) * step_work(config, run)[1]


def end_of(run: TrainConfig) -> str:
    """The option that ends the run."""
    return next((name for name in STOPS if getattr(run, name)), "max_iters")


def describe_end(config: HydraConfig, run: TrainConfig) -> str:
    """When the run ends, in words."""
    reason = f"{end_of(run)}={getattr(run, end_of(run))!r}"
    if run.max_seconds:
        return reason
    steps = planned_steps(config, run)
    tokens, flops = step_work(config, run)
    return f"{reason}: {steps:,} steps, {steps * tokens:,} tokens, {steps * flops:.3e} training FLOPs"


def step_batches(tokens: np.ndarray | Tokens, config: HydraConfig, run: TrainConfig, rows: slice,
                 step: int) -> list[Batch]:  # fmt: skip
    """The batches of a step, or of each batch these rows."""
    first = step * run.gradient_accumulation_steps
    numbers = range(first, first + run.gradient_accumulation_steps)
    draw = epoch_batch if run.sampling == "epochs" else get_batch
    return [draw(tokens, run.batch_size, config.block_size, run.seed, n, rows) for n in numbers]


def read_corpus(config: HydraConfig, run: TrainConfig) -> Corpus:
    """What a run trains on; UserError where its tokens do not tell what the run must know of them."""
    corpus = prepare(run.data, run.tokenizer, run.cache_dir, run.out_dir, run.val_fraction, run.val_data,
                     run.text_field, config.vocab_size)  # fmt: skip
    if config.doc_mask and not corpus.enc:
        raise UserError("doc_mask=True: these tokens name no end of text: name their vocabulary by --tokenizer")
    return corpus


def warnings_of(corpus: Corpus, config: HydraConfig) -> list[str]:
    texts = [*corpus.warnings, split_warning(len(corpus.train), len(corpus.val), config.block_size)]
    return [f"WARNING: {text}" for text in texts if text]


def begin(model: Hydra, optimizer: torch.optim.Optimizer, checkpoint: dict | None, run: TrainConfig,
          ids: dict[str, str]) -> Progress:  # fmt: skip
    """What a run goes on from: its own checkpoint, the weights of another run, or nothing."""
    if checkpoint:
        path = Path(run.out_dir, "last.pt")
        checkpoints.check_text(checkpoint, ids, path.parent, run.data)
        checkpoints.restore(path, checkpoint, model, optimizer)
        return Progress.of(checkpoint)
    if run.init_from:
        checkpoints.start_from(model, run.init_from, ids["tokenizer"])
    return Progress()


def check_work(config: HydraConfig, run: TrainConfig, machine: Machine, ranks: Ranks, val_tokens: int) -> None:
    """UserError where a step cannot fit into the device, or where step or evaluation would be silent for too long."""
    B, T = run.batch_size, config.block_size
    sizes = f"batch_size={B} and block_size={T}"
    room = total_memory(machine.device)
    if 32 * B * T * config.dim * config.n_layer > room / 8:  # else the count is not worth its seconds
        plan = memory_plan(config, B, T, machine.dtype, "", run.recompute == "block", ranks.size, ranks.mode)
        needed = sum(plan.values())
        if needed > room:
            raise UserError(f"{sizes}: a step needs about {needed / 1e9:.1f} GB, of which {machine.device} has "
                            f"{room / 1e9:.1f}: lower one, or use --recompute=block; see --plan")  # fmt: skip
    tokens, flops = step_work(config, run)
    evaluation = (run.eval_iters or math.ceil(val_tokens / (B * T))) * B * T
    minutes = max(flops, flops / tokens / 3 * evaluation) / machine.peak / 60
    if minutes > SILENT:
        raise UserError(f"{sizes}: at this device's peak a step or an evaluation of {evaluation:,} tokens takes "
                        f"{minutes:.0f} minutes or more: lower one of them, or --eval_iters")  # fmt: skip


def print_plan(config: HydraConfig, run: TrainConfig) -> int:
    for line in plan_lines(config, run, expected_flops(config, run)):
        print(line, flush=True)
    return 0


def model_facts(config: HydraConfig, backends: dict[str, tuple[str, str]]) -> dict[str, str]:
    """What a log says of the model."""
    facts = {"model": f"{count_params(config):,} parameters, layers {config.layers}, vocabulary {config.vocab_size}"}
    for letter, (backend, reason) in backends.items():
        facts[f"attention {letter}"] = f"{backend} ({reason}); {KINDS[letter].text}"
    return facts


def print_sample(model: Hydra, enc, run: TrainConfig, step: int, autocast: torch.autocast) -> None:
    with autocast:
        text = continue_text(model, enc, run.sample_prompt, run.sample_tokens, run.seed + step)
    print("-" * 30 + f" sample at step {step}\n{text}\n" + "-" * 30, flush=True)


@ends_together()
def main(argv: list[str]) -> int:
    config, run, checkpoint, notes = configure(argv)
    ranks, device = join(run.parallel, run.device)
    if run.plan:
        return print_plan(config, run)
    if ranks.any(restarted()) and ranks.first(checkpoints.has_begun(config, run)):
        config, run, checkpoint, notes = configure([*argv, "--resume"])
    out = Path(run.out_dir)
    rows = ranks.rows(run.batch_size)

    # ---- machine
    tokens_per_step, flops_per_step = step_work(config, run)
    total = expected_flops(config, run)
    machine = pooled(choose_machine(device, run.dtype, run.compile, config.dim, total), ranks)

    # ---- data
    corpus = ranks.one_first(partial(read_corpus, config, run))
    check_work(config, run, machine, ranks, len(corpus.val))
    bytes_V = torch.from_numpy(token_bytes(corpus.enc, config.vocab_size))
    ids = {"fingerprint": corpus.fingerprint, "tokenizer": tokenizer_hash(corpus.enc)}
    ranks.check_same(f"data={run.data!r}, fingerprint and tokenizer", ids)
    batches = Prefetch(partial(step_batches, corpus.train, config, run, rows), machine.device)
    batches(0)  # too short a text is refused before anything is written

    # ---- model, optimiser, resume
    torch.manual_seed(run.seed)
    model = Hydra(config)
    model.recompute = run.recompute == "block"
    if config.doc_mask:
        model.end_token = corpus.enc.eot_token
    trained = distribute(model, ranks, machine.device, machine.dtype)
    backends = model.backends(machine.compiled, grad=True)
    optimizer = make_optimizer(model, run)
    progress = begin(model, optimizer, checkpoint, run, ids)
    first_step = progress.step
    planned = planned_steps(config, run)
    steps: list[Step] = []  # that are not read yet
    start = 0.0  # when the first of them began

    def steps_in_all() -> float:
        """Of the run, as far as it is known."""
        if not run.max_seconds:
            return planned
        unread = time.perf_counter() - start if steps else 0.0
        return expected_steps(progress.step, ranks.first(progress.seconds + unread), run.max_seconds)

    # at the first step of this run
    evaluates = not checkpoint or first_step % run.eval_interval == 0 or first_step >= steps_in_all()

    def save(name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        configs = {"model_config": asdict(config), "train_config": asdict(run)}
        checkpoints.save_run(out / name, configs | ids | asdict(progress), model, optimizer, ranks)

    # ---- the run's folder; say what was chosen and why
    begins = first_step if checkpoint else None
    log, aside, best = runs.open_folder(out, to_toml(config, run), begins, evaluates, ranks)
    progress.best = min(progress.best, best)  # last.pt was written before its own evaluation
    facts = {"corpus": corpus.description, **ids, **machine.facts, **model_facts(config, backends)}
    facts["ends"] = describe_end(config, run)
    notes += warnings_of(corpus, config)
    said = [to_toml(config, run), aside, *notes, *(f"{name}: {fact}" for name, fact in facts.items())]
    print("\n".join(said), flush=True)
    log.start(first_step, bool(checkpoint), facts | {
        "config": asdict(config) | asdict(run), "parameters": count_params(config), "matmul_peak": machine.peak,
        "datasheet_peak": machine.listed_peak, "flops_per_token": flops_per_step / tokens_per_step})  # fmt: skip

    # ---- the loop: save, evaluate, sample, step
    if machine.compiled:
        model.compile_training()
    signals = runs.stop_on_signals()
    began = time.perf_counter()
    profile = runs.Profile(run.profile if ranks.rank == 0 else 0, out, machine.device)
    while True:
        step = progress.step
        in_all = steps_in_all()
        final = step >= in_all
        due = final or step % run.eval_interval == 0
        stop = ranks.any(signals)
        if steps and (due or stop):
            runs.settle(steps, run.grad_clip, progress, log)
            progress.seconds += time.perf_counter() - start
        if final or stop or progress.streak >= runs.MAX_BAD:
            profile.finish()
        kept = f"the checkpoint in {out} is kept" if (out / "last.pt").exists() else "no checkpoint was written yet"
        if progress.streak >= runs.MAX_BAD:
            return log.give_up(step, f"{progress.streak} steps in a row were not finite", kept)
        if (due or stop) and step > first_step:
            if is_sound(model, batches(step)[0], machine.autocast(), ranks):
                save("last.pt", optimizer)
                kept = f"saved in {out}"
        if stop:
            print(f"stopped at step {step}, {kept}: go on with --resume --out_dir={run.out_dir}", flush=True)
            return 130
        if due:
            with machine.autocast():
                found = evaluate(model, corpus.val, bytes_V, run.batch_size, run.eval_iters, machine.device, ranks)
            best = found["val_loss"] < progress.best
            log.evaluation({"step": step, **found, "best": best, "seconds": progress.seconds})
            progress.best = min(progress.best, found["val_loss"])
            if best and step > 0:
                save("best.pt")
            if run.sample_tokens and corpus.enc and ranks.samples and math.isfinite(found["val_loss"]):
                print_sample(model, corpus.enc, run, step, machine.autocast())
        if final:
            break

        profile.step()
        if not steps:
            start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, run, in_all)
        steps.append(train_step(trained, optimizer, batches(step), run.grad_clip, machine.autocast(), ranks))
        progress.step += 1
        if machine.compiled and step == first_step:
            progress.seconds -= time.perf_counter() - start  # of compilation, which are added with this line's steps
        if step > 0 and progress.step % run.log_interval > 0:
            continue
        taken = len(steps)
        numbers, routing = runs.settle(steps, run.grad_clip, progress, log)
        seconds = time.perf_counter() - start
        progress.seconds += seconds
        mean = seconds / taken
        pace = (time.perf_counter() - began) / (progress.step - first_step)
        eta = run.max_seconds - progress.seconds if run.max_seconds else (planned - progress.step) * pace
        log.step(steps_in_all(), {
            "step": progress.step, **numbers, "lr": group["lr"], "clipped": progress.clipped / max(1, progress.counted),
            "ms": mean * 1e3, "tokens_per_s": tokens_per_step / mean, "mfu": flops_per_step / mean / machine.peak,
            "mfu_6n": 6 * count_params(config) * tokens_per_step / mean / machine.peak,
            "eta_s": max(0.0, eta), "skipped": progress.skipped}, routing)  # fmt: skip
        progress.clipped = progress.counted = 0

    # ---- the number to compare
    with machine.autocast():
        found = evaluate(model, corpus.val, bytes_V, run.batch_size, run.final_eval_iters, machine.device, ranks)
    found = {"step": progress.step, **found, "seconds": progress.seconds, "peak_memory": peak_memory(machine.device)}
    log.final(found, run.final_eval_iters, time.perf_counter() - began, run.out_dir)
    return 0


if __name__ == "__main__":
    cli(main)
