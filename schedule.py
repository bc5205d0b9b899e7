"""How long a run is, in steps, tokens, training FLOPs or seconds, and the learning rate of each of its steps.

- Learning rate: linear warmup, then a cosine, or wsd: constant and, for the last part, linear (arXiv:2404.06395).
- A resumed run: what it does differently from then on.
`run` is a train.TrainConfig everywhere.
"""

import functools
import math
from dataclasses import replace

from accounting import count_params, flops_per_token
from configurator import UserError
from model import HydraConfig

STOPS = ("max_tokens", "max_flops", "max_seconds")  # what can end a run instead of max_iters
CPU_RATE = 2e11  # FLOP/s, about: of a CPU for whose seconds a compilation has to be worth its time
UNSAID = ("out_dir", "resume", "parallel", "plan", "profile")  # options that change nothing of what a run computes


# ---- the learning rate

def learning_rate_at(step: int, run, steps: float) -> float:
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


# ---- the length

def step_work(config: HydraConfig, run) -> tuple[int, float]:
    """Tokens and FLOPs of a step."""
    tokens = run.batch_size * run.gradient_accumulation_steps * config.block_size
    return tokens, 3 * flops_per_token(config, config.block_size) * tokens


def rates_of(config: HydraConfig, run, seconds: float, peak: float) -> dict[str, float | None]:
    """What a step that takes so many seconds comes to; its FLOPs, counted and by 6N, in parts of the `peak`."""
    tokens, flops = step_work(config, run)
    mfu, mfu_6n = flops / seconds / peak, 6 * count_params(config) * tokens / seconds / peak
    if mfu > 1:  # what was measured is no peak, such as that of emulated bf16
        mfu = mfu_6n = None
    return {"ms": seconds * 1e3, "tokens_per_s": tokens / seconds, "mfu": mfu, "mfu_6n": mfu_6n}


@functools.lru_cache(maxsize=8)  # it is asked for before every step
def planned_steps(config: HydraConfig, run) -> int:
    """Steps of a run that is not ended by seconds: the first at which it has its max_iters, tokens or FLOPs."""
    tokens, flops = step_work(config, run)
    if run.max_tokens:
        return (run.max_tokens + tokens - 1) // tokens
    if run.max_flops:
        steps = run.max_flops / flops * (1 - 1e-12)  # a whole number of steps is no step more by rounding
        return max(1, math.ceil(steps))
    return run.max_iters


def expected_steps(step: int, seconds: float, max_seconds: float) -> float:
    """Steps of a run that seconds end, if it goes on at its pace so far; `step` itself where they are over."""
    done = min(1.0, max(1e-6, seconds / max_seconds))
    return max(1, step) / done


def steps_of(config: HydraConfig, run, step: int, seconds: float) -> float:
    """Of the whole run, as far as it is known at `step`, so many seconds of training behind its begin."""
    if run.max_seconds:
        return expected_steps(step, seconds, run.max_seconds)
    return planned_steps(config, run)


def expected_flops(config: HydraConfig, run) -> float:
    """Of the whole run; about, where seconds end it."""
    if run.max_seconds:
        return run.max_seconds * CPU_RATE
    return planned_steps(config, run) * step_work(config, run)[1]


def end_of(run) -> str:
    """The option that ends the run."""
    return next((name for name in STOPS if getattr(run, name)), "max_iters")


def describe_end(config: HydraConfig, run) -> str:
    """When the run ends, in words."""
    reason = f"{end_of(run)}={getattr(run, end_of(run))!r}"
    if run.max_seconds:
        return reason
    steps = planned_steps(config, run)
    tokens, flops = step_work(config, run)
    return f"{reason}: {steps:,} steps, {steps * tokens:,} tokens, {steps * flops:.3e} training FLOPs"


# ---- a resumed run

def eval_windows(run, checkpoint: dict | None) -> int:
    """Windows of an evaluation, 0 = all: as many as the run began with, so that `best` compares equals."""
    if checkpoint is None:
        return run.batch_size * run.eval_iters
    began = checkpoint["train_config"]
    if run.eval_iters != began["eval_iters"]:
        raise UserError(f"eval_iters={run.eval_iters}: the run in {run.out_dir} evaluates with {began['eval_iters']}, "
                        "which --resume cannot change: leave it out, or change --final_eval_iters")  # fmt: skip
    return checkpoint.get("eval_windows", began["batch_size"] * began["eval_iters"])


def resumed_with(config: HydraConfig, run, checkpoint: dict) -> list[str]:
    """In one line, what a run does differently from its checkpoint on; nothing where it goes on as it was. UserError
    for what cannot change."""
    began, step, windows = checkpoint["train_config"], checkpoint["step"], eval_windows(run, checkpoint)
    changed = [name for name, value in began.items() if name not in UNSAID and getattr(run, name) != value]
    if not changed:
        return []
    stop = end_of(run)
    for name in changed:
        if stop in ("max_tokens", "max_flops") and name in ("batch_size", "gradient_accumulation_steps"):
            raise UserError(f"{name}={getattr(run, name)}: the run ends by {stop}, and its steps so far had "
                            f"{began[name]}: leave it out, or set --{stop}=0 and --max_iters")  # fmt: skip
    text = ", ".join(f"{name}={getattr(run, name)!r} (before: {began[name]!r})" for name in changed)
    first = replace(run, **began)
    before, after = (learning_rate_at(n, it, steps_of(config, it, step, checkpoint["seconds"]))
                     for n, it in ((max(0, step - 1), first), (step, run)))  # fmt: skip
    text += f"; the learning rate was {before:.2e} at step {step}, and is {after:.2e} at the next"
    if {"batch_size", "gradient_accumulation_steps"} & set(changed) and run.sampling == "epochs":
        text += "; the epoch goes on at another place: it may leave windows out or take them again"
    if windows and "batch_size" in changed:
        text += f"; evaluations stay on the {windows} windows that the run began with"
    return [f"resumed at step {step} with {text}"]
