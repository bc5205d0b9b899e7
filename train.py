"""Train HYDRA on text: `python train.py [config/x.toml ...] [--key=value ...]`. No argument: the default run.

- AdamW (fused), clipping by the global norm, gradient accumulation, bf16 autocast.
- Steps, tokens, training FLOPs or seconds end a run; the learning rate follows how much of it is done: linear warmup,
  then a cosine, or wsd: constant and, for the last part, linear (arXiv:2404.06395).
- OUT_DIR gets config.toml, log.jsonl (a header, then a JSON object a line), last.pt and best.pt, each whole or absent.
- The last line of output is one JSON object: the number to compare, over the whole validation split.
- Ctrl-C, SIGTERM, SIGHUP and a reader that goes away save and leave, SIGUSR1 saves and goes on; --resume goes on from
  last.pt, bit for bit on a CPU, --resume=PATH from another checkpoint.
- Routed models (routing.py) train with their auxiliary losses added; `loss` in the log is the language model's alone.
- A step whose loss or gradient is not finite, or whose loss is a spike (--spike), updates nothing, is counted and
  named; ten in a row end the run. The device sees to it alone: the host waits for it once a log line.
- Several processes, each with its device: torchrun --nproc_per_node=N train.py, see parallel.py.
Left out: float16 and its loss scaling, other optimisers.
"""

import math
import os
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
from accounting import count_params, plan_lines
from attention import KINDS, letters_help
from checkpoints import Kept, Origin, Progress
from configurator import AnyPath, UserError, build, cli, need, parse, to_toml
from data import (
    Batch,
    Corpus,
    Tokens,
    epoch_batch,
    eval_batches,
    get_batch,
    prepare,
    token_bytes,
    tokenizer_hash,
)
from files import remove_leftovers
from generate import continue_text
from layers import IGNORE
from limits import check_evaluation, check_sizes, check_work, warnings_of
from machine import DTYPES, Machine, Prefetch, choose_device, choose_machine, peak_memory
from model import Hydra, HydraConfig
from parallel import ALONE, Ranks, accumulates, distribute, ends_together, join, launched, local, pooled, restarted
from schedule import (
    STOPS,
    describe_end,
    end_of,
    eval_windows,
    expected_flops,
    learning_rate_at,
    planned_steps,
    rates_of,
    resumed_with,
    step_work,
    steps_of,
)
from soundness import is_spike, unsound, update_running

BY_RULE = ("routed_fraction", "mean_depth")  # routing statistics that an evaluation has too


@dataclass(frozen=True)
class TrainConfig:
    """A run: data, schedule, optimiser, outputs; raises UserError, in one line, for values that cannot be."""

    out_dir: AnyPath = "out"  # folder of the run: checkpoints, log, configuration
    resume: bool | AnyPath = False  # go on from OUT_DIR/last.pt with its configuration; or from another checkpoint
    data: AnyPath = ""  # a text file or folder, or token shards (folder or glob); empty: the standard library
    tokenizer: AnyPath = "auto"  # auto (texts: python4096, shards: none), bytes, gpt2 or others of tiktoken, rank file
    sampling: str = "random"  # of windows: random, with replacement; or epochs, each once in an order of its own
    val_fraction: float = 0.1  # part of a text that validates
    val_data: AnyPath = ""  # or a text, or shards, of its own
    text_field: str = "text"  # of JSON lines: where a record has its text
    init_from: AnyPath = ""  # start from a run's weights (its folder, or a checkpoint): fine-tuning, a longer block
    cache_dir: AnyPath = "cache"  # folder of the token files
    batch_size: int = 4  # sequences in one forward, over all processes
    gradient_accumulation_steps: int = 1  # forwards and backwards in one step
    max_iters: int = 750  # steps of the run; where one of the next three is set, that one ends it instead
    max_tokens: int = 0  # tokens, rounded up to a step; 0 = not set
    max_flops: float = 0.0  # training FLOPs, rounded up to a step; 0 = not set
    max_seconds: float = 0.0  # seconds of training: evaluations and compilation do not count; 0 = not set
    schedule: str = "cosine"  # behind the warmup: cosine, or wsd (constant, then linear)
    decay_ratio: float = 0.2  # wsd: part of the run, its last, in which the rate falls
    learning_rate: float = 2e-3  # peak learning rate
    warmup_iters: int = 75  # steps of linear warmup
    min_lr_ratio: float = 0.1  # the schedule ends at this part of learning_rate
    weight_decay: float = 0.1  # on matrices and embeddings
    beta1: float = 0.9  # AdamW, decay of the gradient's mean
    beta2: float = 0.95  # AdamW, decay of the gradient's square
    grad_clip: float = 1.0  # largest norm of the gradient, 0 = no clipping
    spike: float = 0.0  # skip updates whose loss is so many standard deviations above its running mean, 0 = none
    eval_interval: int = 200  # steps between evaluations, which also save
    keep_every: int = 0  # a checkpoint of every so many steps stays, 0 = none
    keep_last: int = 1  # and the newest ones, as many as that, last.pt with them
    eval_iters: int = 20  # batches of one evaluation, evenly spread over the validation split, 0 = all
    final_eval_iters: int = 0  # the same for the one at the end, 0 = all: the number to compare
    log_interval: int = 10  # steps between log lines
    log_layers: int = 0  # steps between records of every layer's gradient norm, before the clip, in log.jsonl, 0 = none
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
        for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval", "keep_last"):
            need(self, name, getattr(self, name) >= 1, "it must be at least 1")
        for name in ("max_iters", "warmup_iters", "weight_decay", "grad_clip", "eval_iters", "final_eval_iters",
                     "sample_tokens", "seed", "learning_rate", "profile", "spike", "keep_every", "log_layers",
                     *STOPS):  # fmt: skip
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
        need(self, "text_field", len(self.text_field) > 0, "name a field")
        need(self, "sampling", self.sampling in ("random", "epochs"), "use random or epochs")
        need(self, "recompute", self.recompute in ("none", "block"), "use none or block")
        need(self, "compile", self.compile in ("auto", "on", "off"), "use auto, on or off")
        need(self, "parallel", self.parallel in ("auto", "ddp", "fsdp"), "use auto, ddp or fsdp")
        need(self, "resume", self.resume != "", "name a checkpoint, or leave the value out to go on from last.pt")
        for name in ("out_dir", "cache_dir"):
            need(self, name, len(getattr(self, name)) > 0, "name a folder")
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


class Step(NamedTuple):
    """What a training step did, on its device: to read it is to wait for it, see `settle`."""

    loss: Tensor  # the language model's, mean over the step's batches
    grad_norm: Tensor  # before clipping
    updated: Tensor  # 1, or 0 where the step was skipped
    norms: dict[str, Tensor]  # of each parameter's gradient
    routing: dict[str, Tensor]  # of the last batch


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]],
               grad_clip: float, autocast: torch.autocast, ranks: Ranks = ALONE, spike: float = 0.0,
               running: Tensor | None = None) -> Step:  # fmt: skip
    """Forward and backward of every batch, one update with the mean of their gradients, clipped to `grad_clip`; none
    where the loss or the norm is not finite, or where with a `spike` the loss is one beside those of `running`, see
    `is_spike`. The host does not wait for any of it."""
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
    updated = loss.isfinite() & norm.isfinite()
    if spike:
        updated = updated & ~is_spike(loss, running, spike)
        update_running(running, loss, updated)
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = 1.0 - updated.float()  # a fused kernel updates nothing where this is 1, and nobody waits
        optimizer.step()
    elif updated:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    named_norms, named_routing = dict(zip(grads, norms, strict=True)), dict(zip(output.routing, routing, strict=True))
    return Step(loss, norm, updated.float(), named_norms, named_routing)


@torch.no_grad()
def evaluate(model: Hydra, tokens: np.ndarray | Tokens, bytes_V: Tensor, batch_size: int, windows: int,
             device: torch.device, ranks: Ranks = ALONE,
             stop: list[int] | None = None) -> dict[str, float]:  # fmt: skip
    """val_loss (mean nats per token) and, where bytes are known, val_bpb (bits per byte) over so many `windows` of
    `tokens`, 0 = over all of it; with routers what they did by the causal rule in the last one. Raises runs.Stopped
    before a batch where `stop` has something on some rank."""
    model.eval()
    nats, count, size = 0.0, 0, 0
    rows = ranks.rows(batch_size)
    for x, y in eval_batches(tokens, batch_size, model.config.block_size, windows):
        if stop is not None and ranks.any(stop):
            raise runs.Stopped
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


def configure(argv: list[str], session: runs.Session,
              ) -> tuple[HydraConfig, TrainConfig, Origin | None, Origin | None, list[str]]:  # fmt: skip
    """Defaults < a checkpoint's (--resume, --init_from) < files and options -> the two configurations, the checkpoint
    to go on from, the one to take the weights from, and what is to be said about it."""
    kinds = HydraConfig, TrainConfig
    given = parse(argv, *kinds, doc=f"{__doc__}\n{letters_help()}")
    (where,) = build({name: given[name] for name in ("out_dir", "resume", "init_from") if name in given}, TrainConfig)
    if where.init_from and not where.resume:
        path = checkpoints.weights_path(where.init_from)
        parts = {"model_config": HydraConfig, "train_config": TrainConfig}
        other, notes = checkpoints.load_checkpoint(path, parts, option="init_from")
        base = other["model_config"] | {"tokenizer": other["train_config"]["tokenizer"]}
        return *build(given, *kinds, base=base), None, Origin(path, other), notes
    if not where.resume:
        return *build(given, *kinds), None, None, []
    path = Path(where.out_dir, "last.pt")
    if isinstance(where.resume, str):
        path = Path(where.resume)
        path = path / "last.pt" if os.path.isdir(path) else path
    out_dir = given.get("out_dir", str(path.parent))
    if not given.get("plan") and Path(out_dir).is_dir():
        session.take(Path(out_dir))
        runs.check_resumable(Path(out_dir), path)
    checkpoint, notes = checkpoints.resumable(path, given, *kinds)
    if path != Path(out_dir, "last.pt"):
        notes.append(f"going on from {path}, step {checkpoint['step']}: what {out_dir} has of later steps is replaced "
                     "by and by")  # fmt: skip
    stored = checkpoint["model_config"] | checkpoint["train_config"] | {"out_dir": out_dir, "profile": 0}
    if not launched():
        stored["parallel"] = "auto"  # a run of several processes goes on in a single one
    try:
        config, run = build(given | {"resume": False}, *kinds, base=stored)
    except UserError as error:
        raise UserError(f"going on from {path}: {error}") from error
    stop = end_of(run)
    asked = f"{stop}={getattr(run, stop)!r}"
    if stop != "max_iters" and run.max_iters != stored.get("max_iters", run.max_iters):
        raise UserError(f"max_iters={run.max_iters}: {asked} ends the run in {run.out_dir}: set --{stop}=0 too")
    if not run.max_seconds and planned_steps(config, run) < checkpoint["step"]:
        raise UserError(f"{asked}: the run in {run.out_dir} is at step {checkpoint['step']}: ask for more")
    if run.max_seconds != stored.get("max_seconds", 0.0) and 0 < run.max_seconds < checkpoint["seconds"]:
        seconds = f"{checkpoint['seconds']:.1f}"
        raise UserError(f"{asked}: the run in {run.out_dir} has trained for {seconds} seconds: ask for more")
    return config, run, Origin(path, checkpoint), None, notes + resumed_with(config, run, checkpoint)


def step_batches(tokens: np.ndarray | Tokens, config: HydraConfig, run: TrainConfig, rows: slice,
                 step: int) -> list[Batch]:  # fmt: skip
    """The batches of a step, or of each batch these rows."""
    first = step * run.gradient_accumulation_steps
    numbers = range(first, first + run.gradient_accumulation_steps)
    draw = epoch_batch if run.sampling == "epochs" else get_batch
    return [draw(tokens, run.batch_size, config.block_size, run.seed, n, rows) for n in numbers]


def read_corpus(config: HydraConfig, run: TrainConfig) -> Corpus:
    """What a run trains on; UserError where its tokens do not tell what the run must know of them."""
    remove_leftovers(Path(run.cache_dir))
    corpus = prepare(run.data, run.tokenizer, run.cache_dir, run.out_dir, run.val_fraction, run.val_data,
                     run.text_field, config.vocab_size)  # fmt: skip
    if config.doc_mask and not corpus.enc:
        raise UserError("doc_mask=True: these tokens name no end of text: name their vocabulary by --tokenizer")
    return corpus


def begin(model: Hydra, optimizer: torch.optim.Optimizer, source: Origin | None, initial: Origin | None,
          run: TrainConfig, ids: dict[str, str], ranks: Ranks) -> Progress:  # fmt: skip
    """What a run goes on from: its own checkpoint, the weights of another run, or nothing."""
    if source:
        checkpoints.check_text(source.parts, ids, source.path.parent, run.data)
        kinds = {"model_config": HydraConfig, "train_config": TrainConfig}
        with checkpoints.offers_another(source.path, kinds):
            checkpoints.restore(source.path, source.parts, model, optimizer, ranks)
        progress = Progress.of(source.parts)
        if source.path.name != "last.pt" and source.is_in(run.out_dir):
            progress.best = min(progress.best, checkpoints.best_loss(Path(run.out_dir)))  # may be of a later step
        return progress
    if initial:
        checkpoints.check_source(model.config, initial.parts, run, ids["tokenizer"])
        checkpoints.load_weights(model, initial.parts, initial.path, ranks)
    return Progress()


def print_plan(config: HydraConfig, run: TrainConfig) -> int:
    for line in plan_lines(config, run, expected_flops(config, run)):
        print(line, flush=True)
    return 0


class Setup(NamedTuple):
    """What a run has before it has a model."""

    config: HydraConfig
    run: TrainConfig
    ranks: Ranks
    machine: Machine
    session: runs.Session
    corpus: Corpus
    bytes_V: Tensor  # of each token
    ids: dict[str, str]  # of the text and of the tokenizer
    windows: int  # of an evaluation
    batches: Prefetch


def set_up(config: HydraConfig, run: TrainConfig, source: Origin | None, ranks: Ranks, device: str,
           session: runs.Session) -> Setup:  # fmt: skip
    """The machine and the text; UserError where they are not fit for each other, before anything is written."""
    rows = ranks.rows(run.batch_size)
    machine = pooled(choose_machine(device, run.dtype, run.compile, config.dim, expected_flops(config, run)), ranks)
    corpus = ranks.one_first(partial(read_corpus, config, run))
    check_work(config, run, machine, ranks, corpus)
    check_evaluation(config, run, len(corpus.val))
    bytes_V = torch.from_numpy(token_bytes(corpus.enc, config.vocab_size))
    windows = eval_windows(run, source.parts if source else None)
    ids = {"fingerprint": corpus.fingerprint, "tokenizer": tokenizer_hash(corpus.enc)}
    ranks.check_same(f"data={run.data!r}, fingerprint and tokenizer", ids)
    batches = Prefetch(partial(step_batches, corpus.train, config, run, rows), machine.device)
    batches(0)  # too short a text is refused
    next(eval_batches(corpus.val, 1, config.block_size, max_windows=1))  # and too short a side to evaluate on
    return Setup(config, run, ranks, machine, session, corpus, bytes_V, ids, windows, batches)


def make_model(it: Setup) -> tuple[Hydra, nn.Module, dict[str, tuple[str, str]]]:
    """The model, what of it training calls, and the attention core of each letter with its reason."""
    torch.manual_seed(it.run.seed)
    model = Hydra(it.config)
    model.recompute = it.run.recompute == "block"
    if it.config.doc_mask:
        model.end_token = it.corpus.enc.eot_token
    trained = distribute(model, it.ranks, it.machine.device, it.machine.dtype)
    return model, trained, model.backends(it.machine.compiled, grad=True)


def open_run(it: Setup, backends: dict[str, tuple[str, str]], notes: list[str], step: int, source: Origin | None,
             evaluates: bool) -> tuple[runs.RunLog, float]:  # fmt: skip
    """The run's folder, in which it begins at `step`, and what was chosen and why, said and logged -> the log, and the
    lowest validation loss that it has."""
    config, run, corpus = it.config, it.run, it.corpus
    out, toml = Path(run.out_dir), to_toml(config, run)
    resumed_at = step if source and source.is_in(run.out_dir) else None
    it.session.begin()
    log, aside, best = runs.open_folder(out, toml, resumed_at, evaluates, it.ranks, it.session)
    parameters, (tokens, flops) = count_params(config), step_work(config, run)
    facts = {"corpus": corpus.description, **it.ids, **it.machine.facts,
             "model": f"{parameters:,} parameters, layers {config.layers}, vocabulary {config.vocab_size}"}  # fmt: skip
    for letter, (backend, reason) in backends.items():
        facts[f"attention {letter}"] = f"{backend} ({reason}); {KINDS[letter].text}"
    facts["ends"] = describe_end(config, run)
    said = [toml, aside, *notes, *warnings_of(corpus, config)]
    it.session.say("\n".join([*said, *(f"{name}: {fact}" for name, fact in facts.items())]))
    log.start(step, bool(source), facts | {
        "config": asdict(config) | asdict(run), "parameters": parameters, "matmul_peak": it.machine.peak,
        "datasheet_peak": it.machine.listed_peak, "flops_per_token": flops / tokens})  # fmt: skip
    return log, best


def validate(it: Setup, model: Hydra, windows: int) -> dict[str, float]:
    """`evaluate` on the run's text, which a signal may break off."""
    with it.session.saved(), it.machine.autocast():
        return evaluate(model, it.corpus.val, it.bytes_V, it.run.batch_size, windows, it.machine.device, it.ranks,
                        it.session.stop)  # fmt: skip


def say_sample(it: Setup, model: Hydra, step: int) -> None:
    """Where samples were asked for and have a text."""
    run, enc = it.run, it.corpus.enc
    if not (run.sample_tokens and enc and it.ranks.samples):
        return
    with it.session.saved():
        with it.machine.autocast():
            text = continue_text(model, enc, run.sample_prompt, run.sample_tokens, run.seed + step)
        it.session.say("-" * 30 + f" sample at step {step}\n{text}\n" + "-" * 30)


def take_step(it: Setup, trained: nn.Module, optimizer: torch.optim.Optimizer, step: int, steps: float,
              running: Tensor) -> Step:  # fmt: skip
    """Step `step` of so many, at its rate, on its batches."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, it.run, steps)
    return train_step(trained, optimizer, it.batches(step), it.run.grad_clip, it.machine.autocast(), it.ranks,
                      it.run.spike, running)  # fmt: skip


def conclude(it: Setup, model: Hydra, log: runs.RunLog, progress: Progress, loss: float, began: float, lost: str,
             kept: str) -> int:  # fmt: skip
    """The number to compare, behind the last step, which had this `loss` -> the run's exit code. `lost`: what is not
    finite."""
    run = it.run
    found = validate(it, model, run.batch_size * run.final_eval_iters)
    peak = peak_memory(it.machine.device)
    found = {"step": progress.step, **found, "seconds": progress.seconds, "peak_memory": peak}
    if not math.isfinite(found["val_loss"]) or not math.isfinite(loss):
        lost = lost or "the loss"
    sampling = "" if lost else runs.sample_command(model, it.corpus.enc, run.out_dir)
    log.final(found, run.final_eval_iters, time.perf_counter() - began, sampling)
    if lost:
        return log.give_up(progress.step, f"the run ended and {lost} is not finite", kept)
    return 0


def run_training(argv: list[str], session: runs.Session) -> int:
    """A run from its beginning to its end -> its exit code."""
    config, run, source, initial, notes = configure(argv, session)
    ranks, device = join(run.parallel, run.device)
    if run.plan:
        check_sizes(config, run, ranks, None)
        return print_plan(config, run)
    check_sizes(config, run, ranks, choose_device(device))
    if ranks.any(restarted()) and ranks.first(checkpoints.has_begun(config, run)):
        again = [*argv, "--resume", f"--out_dir={run.out_dir}"]
        config, run, source, initial, notes = configure(again, session)
    out = Path(run.out_dir)
    if out.is_dir():
        session.take(out)  # before the work of preparing it, in which nothing of it is touched
    it = set_up(config, run, source, ranks, device, session)
    machine = it.machine

    # ---- model, optimiser, resume
    model, trained, backends = make_model(it)
    optimizer = make_optimizer(model, run)
    progress = begin(model, optimizer, source, initial, run, it.ids, ranks)
    del initial  # as large as the model
    running = torch.tensor(progress.running, device=machine.device)  # losses, for --spike
    goes_on = source and source.path.name == "last.pt" and source.is_in(run.out_dir)
    replaced = progress.step if goes_on else None  # the step of OUT_DIR's last.pt
    kept_ones = Kept(run.keep_every, run.keep_last)
    first_step = progress.step
    steps: list[Step] = []  # that are not read yet
    start = 0.0  # when the first of them began

    def steps_in_all() -> float:
        seconds = progress.seconds
        if run.max_seconds:  # else nobody needs the clock
            seconds = ranks.first(seconds + (time.perf_counter() - start if steps else 0.0))
        return steps_of(config, run, progress.step, seconds)

    # at the first step of this run
    evaluates = not source or first_step % run.eval_interval == 0 or first_step >= steps_in_all()

    def save(name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        progress.running = running.tolist()
        configs = {"model_config": asdict(config), "train_config": asdict(run)}
        content = configs | it.ids | asdict(progress) | {"eval_windows": it.windows}
        checkpoints.save_run(out / name, content, model, optimizer, ranks, kept_ones, replaced)

    log, best = open_run(it, backends, notes, first_step, source, evaluates)
    progress.best = min(progress.best, best)  # last.pt was written before its own evaluation

    # ---- the loop: save, evaluate, sample, step
    if machine.compiled:
        model.compile_training()
    began = time.perf_counter()
    numbers = {"loss": 0.0}  # of the latest one that was read
    lost = ""  # what is not finite
    profile = runs.Profile(run.profile if ranks.rank == 0 else 0, out, machine.device, session.say)
    while True:
        step = progress.step
        in_all = steps_in_all()
        final = step >= in_all
        due = final or step % run.eval_interval == 0
        stop, asked = ranks.total([len(session.stop), len(session.save)])  # asked: to save
        saves = due or stop or asked or kept_ones.stays(step)
        if steps and saves:
            numbers, _ = runs.settle(steps, run, progress, log)
            progress.seconds += time.perf_counter() - start
        if final or stop or progress.streak >= runs.MAX_BAD:
            profile.finish()
        kept = f"the checkpoint in {out} is kept" if (out / "last.pt").exists() else "no checkpoint was written yet"
        if progress.streak >= runs.MAX_BAD:
            return log.give_up(step, f"{progress.streak} steps in a row were not finite, or spikes", kept)
        if saves and step > first_step:
            session.save.clear()
            lost = unsound(model, optimizer, it.batches(step)[0], machine.autocast(), ranks)
            if lost:
                log.unsaved(step, lost, kept)
            else:
                save("last.pt", optimizer)
                replaced = step
                kept = f"saved in {out}"
            if asked:
                session.say(f"step {step:5d} | {kept}")
        session.farewell = f"stopped at step {step}, {kept}: {runs.resume_command(run, ranks)}"
        if stop:
            raise runs.Stopped
        if due:
            found = validate(it, model, it.windows)
            best = not lost and 0 < found["val_loss"] < progress.best  # 0 could never be reached again
            log.evaluation({"step": step, **found, "best": best, "seconds": progress.seconds})
            if best:
                progress.best = found["val_loss"]
            if best and step > 0:
                save("best.pt")
            if math.isfinite(found["val_loss"]):
                say_sample(it, model, step)
        if final:
            break

        profile.step()
        if not steps:
            start = time.perf_counter()
        steps.append(take_step(it, trained, optimizer, step, in_all, running))
        progress.step += 1
        if machine.compiled and step == first_step:
            progress.seconds -= time.perf_counter() - start  # of compilation, which are added with this line's steps
        if step > 0 and progress.step % run.log_interval > 0 and progress.step < in_all:
            continue
        taken = len(steps)
        numbers, routing = runs.settle(steps, run, progress, log)
        seconds = time.perf_counter() - start
        progress.seconds += seconds
        pace = (time.perf_counter() - began) / (progress.step - first_step)
        eta = run.max_seconds - progress.seconds if run.max_seconds else (in_all - progress.step) * pace
        rates = rates_of(config, run, seconds / taken, machine.peak)
        log.step(steps_in_all(), {
            "step": progress.step, **numbers, "lr": optimizer.param_groups[0]["lr"],
            "clipped": progress.clipped / max(1, progress.counted), **rates, "eta_s": max(0.0, eta),
            "skipped": progress.skipped}, routing)  # fmt: skip
        progress.clipped = progress.counted = 0

    return conclude(it, model, log, progress, numbers["loss"], began, lost, kept)


@ends_together()
def main(argv: list[str]) -> int:
    """A run by its command line -> its exit code. From any thread; it gives back what it has of the process."""
    session = runs.Session()
    try:
        with session:
            return run_training(argv, session)
    except runs.Stopped:
        session.say(session.farewell)
        return session.code


if __name__ == "__main__":
    cli(main)
