"""What cannot be done is refused before anything is made of it, in one line with the estimate: sizes that no memory
holds, and work that would be silent for minutes. What is doubtful is a warning. `run` is a train.TrainConfig
everywhere."""

import math

import torch

from accounting import least_memory, memory_plan, pair_flops_per_token
from configurator import UserError
from data import Corpus, as_tokens, short_shards, too_short
from machine import Machine, attention_peak, total_memory
from model import HydraConfig
from parallel import Ranks
from routing import layer_tokens
from schedule import step_work
from sources import split_warning

CALL = 1e-4  # seconds that a layer's forward takes at least, however small it is; a backward takes two of them
COUNTABLE = 2**56  # bytes, of a plan: torch counts with 64 bits, and working memory comes on top
SILENT = 3  # minutes that a step or an evaluation may take at the peak; really it is several times that


def check_sizes(config: HydraConfig, run, ranks: Ranks, device: torch.device | None) -> None:
    """UserError for what the device could not hold, or would be at for hours: before anything is made. Without a device
    for what cannot even be counted."""
    accumulated = run.gradient_accumulation_steps
    room = total_memory(device) if device else COUNTABLE
    masked = device is not None and device.type != "cuda"
    needed = least_memory(config, run.batch_size, accumulated, masked, ranks.size, ranks.mode)
    names = ["vocab_size", "dim", "n_layer", "mlp_ratio", "block_size"]
    sizes = [f"{name}={getattr(config, name)}" for name in names]
    sizes += [f"batch_size={run.batch_size}", f"gradient_accumulation_steps={accumulated}"]
    if needed > room:
        raise UserError(f"{', '.join(sizes)}: a step needs {needed / 1e9:,.1f} GB or more, of which "
                        f"{device or 'a plan'} has {room / 1e9:,.1f}: lower the largest of them")  # fmt: skip
    check_calls(config, 3 * accumulated, f"gradient_accumulation_steps={accumulated}: a step", "lower it, or n_layer")


def check_calls(config: HydraConfig, forwards: int, what: str, remedy: str) -> None:
    """UserError where even so many forwards of nothing would be silent for too long."""
    minutes = forwards * config.n_layer * config.mor_recursions * CALL / 60
    if minutes > SILENT:
        raise UserError(f"{what} has {forwards:,} forwards, which take {minutes:,.0f} minutes or more: {remedy}")


def evaluation_batches(config: HydraConfig, run, val_tokens: int) -> int:
    batches = math.ceil(math.ceil(val_tokens / config.block_size) / run.batch_size)
    return min(batches, run.eval_iters or batches)


def check_evaluation(config: HydraConfig, run, val_tokens: int) -> None:
    """UserError where one would be silent for too long by the number of its batches alone."""
    batches = evaluation_batches(config, run, val_tokens)
    check_calls(config, batches, f"eval_iters={run.eval_iters}: an evaluation", "lower it, or raise --batch_size")


def minutes_of(flops: float, pairs: float, peak: float, attention: float) -> float:
    """Of so many FLOPs, of which `pairs` are attention's, at these rates."""
    return ((flops - pairs) / peak + pairs / attention) / 60


def check_work(config: HydraConfig, run, machine: Machine, ranks: Ranks, corpus: Corpus) -> None:
    """UserError where a step cannot fit into the device, or where step or evaluation would be silent for too long."""
    B, T = run.batch_size, config.block_size
    room = total_memory(machine.device)
    needed = 32 * (B // ranks.size) * config.dim * sum(layer_tokens(config, T))  # about what the blocks keep
    if room / 8 < needed < 8 * room:  # else the count is not worth its seconds
        plan = memory_plan(config, B, T, machine.dtype, "", run.recompute == "block", ranks.size, ranks.mode)
        needed = sum(plan.values())
    step_tokens, flops = step_work(config, run)
    tokens = evaluation_batches(config, run, len(corpus.val)) * B * T
    work = flops / step_tokens / 3, pair_flops_per_token(config, T)  # of a token's forward
    attention = machine.peak
    if max(3 * step_tokens, tokens) * sum(work) > SILENT * 60 * machine.peak / 100:  # else it need not be measured
        attention = ranks.size * ranks.first(attention_peak(machine.device, machine.dtype))
    step, evaluation = (n * minutes_of(*work, machine.peak, attention) for n in (3 * step_tokens, tokens))
    if needed <= room and max(step, evaluation) <= SILENT:
        return
    train_tokens = as_tokens(corpus.train)
    short = f"{too_short(train_tokens, T)}; " if train_tokens.lengths.max() <= T else ""
    raise UserError(f"{short}batch_size={B} and block_size={T}: a step needs about {needed / 1e9:.1f} of the "
                    f"{room / 1e9:.1f} GB of {machine.device} and takes {step:.1f} minutes or more, an evaluation of "
                    f"{tokens:,} tokens {evaluation:.1f}: lower one of them, or --eval_iters; --recompute=block needs "
                    "less memory, see --plan")  # fmt: skip


def warnings_of(corpus: Corpus, config: HydraConfig) -> list[str]:
    """What is doubtful about the text, for a run's log."""
    texts = [*corpus.warnings,
             split_warning(len(corpus.train), len(corpus.val), config.block_size, corpus.remedy),
             short_shards(corpus.train, config.block_size)]  # fmt: skip
    return [f"WARNING: {text}" for text in texts if text]
