"""The health of a model, by its run's folder or a checkpoint: `python diagnose.py checkpoint PATH [--key=value ...]`

- Every layer: the norm of its weights, how much of it AdamW's last step changed (by the moments, thus not of best.pt),
  what attention and MLP add, in parts of the residual line's norm, temperatures, and the span of attention: the mean
  distance of what each head looks at, in tokens, and the distance within which 90% of its weight lies.
- CCQA's two convolutions and short_conv, tap by tap; what every router selects.
- What the routers did with a text, token by token: coloured in a terminal, digits below the text elsewhere.
- Findings, a line each: what is not finite; dead layers (a weight of zeros, or less than 0.001 of the residual line's
  norm added); saturated routers (of enough tokens less than a tenth of what training takes selected, or of what it
  leaves left); temperatures gone wild (beyond 10, or below 0.1). The exit code is 0 whatever they are.
All is measured on the run's validation text, or on --text or --text_file. The probabilities of attention are computed
beside the core, from the queries and keys that it is given: the model runs as it is. Eager, fp32, on the CPU.
The last line is one JSON object; --json stores it for plot.py.
"""

import codecs
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import checkpoints
from attention import ShortConv
from configurator import AnyPath, UserError, breaks, build, need, need_file, parse, usable_path
from data import eval_batches, stored_tokenizer, token_text
from files import read_text, write_text
from layers import IGNORE
from model import Block, Hydra, HydraConfig
from parallel import contents, read_parts
from routing import recursion_capacities
from runs import aligned, for_json, layer_of
from schedule import learning_rate_at, steps_of
from train import TrainConfig, make_optimizer, read_corpus

LONGEST = 1024  # tokens of a window: the probabilities of a layer are as many as its square, for each head
SHOWN = 160  # tokens of the validation text of which it is shown what the routers did
WIDTH = 100  # characters of a line of it
DEAD = 1e-3  # part of the residual line's norm, below which a layer adds nothing
ZERO = 1e-7  # root mean square of a parameter, below which it is none
WILD = 10.0  # a temperature begins at 1: beyond this, or below one over it, it has gone wild
FEW = 0.1  # of what it selects in training, below which a router is saturated; or of what it leaves
COLUMNS = ["layer", "letter", "parameters", "norm", "update_ratio", "attention", "mlp", "temperature", "span", "span90"]
LEAST = 10  # tokens that it should select, and leave, of a text that tells whether it does
BIASES = ("line_bias", "layer_bias")  # parameters that may be zero
COLOURS = (90, 34, 36, 32, 33, 31)  # of a terminal, from a token that no router selects to one that all do


@dataclass(frozen=True)
class HealthConfig:
    """What a checkpoint is looked at with; raises UserError, in one line, for values that cannot be."""

    text: str = ""  # the text that all is measured on, empty: the run's validation text
    text_file: AnyPath = ""  # or a file with it
    windows: int = 8  # pieces of a text that are looked at, each as long as the model's block, at most 1024 tokens
    json: AnyPath = ""  # file of the whole result, for plot.py

    def __post_init__(self):
        need(self, "windows", self.windows >= 1, "it must be at least 1")
        need(self, "text text_file", not (self.text and self.text_file), "give one of them")
        need_file(self, "json")


# ---- the checkpoint

class Patient(NamedTuple):
    """A checkpoint's model."""

    path: Path
    parts: dict
    model: Hydra
    run: TrainConfig
    optimizer: torch.optim.Optimizer | None  # None where there are no moments
    notes: list[str]


def find_checkpoint(word: str) -> Path:
    """A file, or the one of a run's folder that has most in it; UserError where there is none."""
    path = Path(usable_path(word, ""))
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{word!r} does not exist: name a run's folder, or a checkpoint such as out/last.pt")
        return path
    found = [path / name for name in ("last.pt", "best.pt") if os.path.exists(path / name)]
    if not found:
        raise UserError(f"{word!r} has neither a last.pt nor a best.pt: name the folder of a run that has saved")
    return found[0]


def read_patient(path: Path) -> Patient:
    """Damaged where the file is no checkpoint, or does not fit its configuration. Unlike a run it is not refused for
    values that are not finite."""
    kinds = {"model_config": HydraConfig, "train_config": TrainConfig}
    parts, notes = checkpoints.load_checkpoint(path, kinds, option="PATH")
    core = {"attn_backend": "auto"}  # the one that trained may not run here
    config, run = build(parts["train_config"] | parts["model_config"] | core, HydraConfig, TrainConfig)
    model = Hydra(config).eval()
    optimizer = None
    with checkpoints.unwarned():
        if "shards" in parts:
            optimizer = make_optimizer(model, run)
            read_parts(path.with_name(parts["shards"]), contents(model, optimizer))
        else:
            checkpoints.check_weights(path, parts["model"], model)
            model.load_state_dict(parts["model"])
        if "optimizer" in parts:
            optimizer = make_optimizer(model, run)
            checkpoints.check_moments(path, parts | {"skipped": parts.get("skipped", 0)}, model, optimizer)
            checkpoints.restore_optimizer(optimizer, parts["optimizer"])
    return Patient(path, parts, model, run, optimizer, notes)


class Windows(NamedTuple):
    """What all is measured on."""

    name: str
    batches: list[tuple[Tensor, Tensor]]  # ids and targets, both [1, T]
    enc: tiktoken.Encoding | None
    shown: int  # tokens whose routing is shown


def given_text(options: HealthConfig) -> str:
    """That of the options, if they have one."""
    return read_text("text_file", options.text_file) if options.text_file else options.text


def read_windows(it: Patient, options: HealthConfig) -> Windows:
    """UserError where the run has no text or no tokenizer any more."""
    T = min(it.model.config.block_size, LONGEST)
    text = given_text(options)
    if text:
        enc = stored_tokenizer(it.run.tokenizer, it.parts["tokenizer"])
        it.model.end_token = enc.eot_token
        ids = torch.tensor(enc.encode_ordinary(text))
        if len(ids) < 2:
            raise UserError(f"text={text!r}: {len(ids)} tokens have nothing to look back at: give a longer text")
        ends = torch.cat((ids[1:], torch.tensor([IGNORE])))
        batches = [(x[None], y[None]) for x, y in zip(ids.split(T), ends.split(T), strict=True)][: options.windows]
        return Windows("the given text", batches, enc, len(ids))
    try:
        corpus = read_corpus(it.model.config, it.run)
    except UserError as error:
        raise UserError(f"{error}; or look at another text, with --text or --text_file") from error
    if corpus.fingerprint != it.parts["fingerprint"]:
        it.notes.append(f"data={it.run.data!r}: the text has changed since the run began")
    if corpus.enc:
        it.model.end_token = corpus.enc.eot_token
    batches = []
    for x, y in eval_batches(corpus.val, 1, T, options.windows):
        n = int((y != IGNORE).sum())  # the last window is padded
        batches.append((x[:, :n], y[:, :n]))
    return Windows("the validation text", batches, corpus.enc, SHOWN)


# ---- what a forward does, watched

def probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K)) of [1, H, T, K] and [1, G, S, K] -> [H, T, S], fp32; without a mask it is causal."""
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    scores = (q.float() @ k.float().mT)[0] / math.sqrt(q.size(-1))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask.reshape(-1, *mask.shape[-2:])[-1], -math.inf).softmax(-1)


@dataclass
class Seen:
    """What one layer did over all windows."""

    mass: Tensor | None = None  # [H, LONGEST]: attention's weight by distance
    queries: int = 0
    squares: dict[str, float] = field(default_factory=dict)  # of the residual line and of what is added to it


class Choice(NamedTuple):
    """What a router did in one call."""

    name: str
    candidates: list[int]  # tokens of the window
    selected: list[int]


class Watcher(TorchFunctionMode):
    """Around forwards of one text at a time: looks at what the layers compute, and changes nothing."""

    def __init__(self, model: Hydra):
        super().__init__()
        self.layers = [Seen() for _ in model.blocks]
        self.choices: list[Choice] = []  # of the present window
        self.order = torch.arange(0)  # the tokens of the present recursion, those that are kept first
        self.alive = 0  # how many are kept
        self.layer, self.pos, self.real, self.start = -1, self.order, 0, 0
        self.hooks = []
        for i, block in enumerate(model.blocks):
            self.watch_block(i, block)
        for i, router in enumerate(model.recursion_routers, 1):
            self.watch_router(f"recursion {i + 1}", router, True)

    def watch_block(self, i: int, block: Block) -> None:
        seen = self.layers[i]
        scales = (block.alpha, 1.0)
        if block.learned:
            scales = (block.attn_scale.layer_scale, block.mlp_scale.layer_scale)

        def add(name: str, x: Tensor) -> None:
            seen.squares[name] = seen.squares.get(name, 0.0) + x[0, : self.real].double().square().sum().item()

        def begin(module: nn.Module, args: tuple) -> None:
            _, ctx, _ = args
            self.layer, self.start = i, 0
            self.pos = ctx.pos.reshape(-1)
            self.real = args[0].size(1) if ctx.lengths is None else int(ctx.lengths[0])

        hooks = [block.attn.register_forward_pre_hook(begin)]
        hooks += [block.attn.register_forward_hook(lambda module, args, y: add("attention", scales[0] * y))]
        hooks += [block.mlp_norm.register_forward_pre_hook(lambda module, args: add("line", args[0]))]
        hooks += [block.mlp.register_forward_hook(lambda module, args, y: add("mlp", scales[1] * y))]
        self.hooks += hooks
        if block.routed:
            self.watch_router(f"block {i}", block.router, False)

    def watch_router(self, name: str, router: nn.Module, recurs: bool) -> None:
        def choose(module: nn.Module, args: tuple, r: Tensor) -> None:
            keep = (r.reshape(-1) > 0) & (torch.arange(r.numel()) < self.alive)
            self.choices.append(Choice(name, self.order[: self.alive].tolist(), self.order[keep].tolist()))
            if recurs:  # the tokens that are kept come first, as in routing.select_positive
                self.order = self.order[(~keep).sort(stable=True).indices]
                self.alive = int(keep.sum())

        self.hooks.append(router.register_forward_hook(choose))

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def begin(self, tokens: int) -> None:
        """A window."""
        self.choices = []
        self.order, self.alive = torch.arange(tokens), tokens

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.look(*args[:2], kwargs.get("attn_mask"))
        return func(*args, **kwargs)

    def look(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """Add up the distances of a call of the core: queries that follow those of the layer's last call, and keys up
        to the last of them."""
        seen = self.layers[self.layer]
        stop = self.start + q.size(2)
        rows = self.pos[self.start : min(stop, self.real)]  # those behind are no tokens of this layer
        columns = self.pos[stop - k.size(2) : stop]
        self.start = stop
        if not len(rows):
            return
        weights = probabilities(q, k, mask)[:, : len(rows)]
        distance = (rows[:, None] - columns).clamp(min=0)  # the others have no weight
        if seen.mass is None:
            seen.mass = torch.zeros(q.size(1), LONGEST, dtype=torch.float64)
        seen.mass.index_add_(1, distance.flatten(), weights.flatten(1).double())
        seen.queries += len(rows)


@torch.no_grad()
def observe(it: Patient, windows: Windows) -> tuple[Watcher, list[list[Choice]], float]:
    """Every window through the model -> what was seen, the routers' choices by window, and the loss in nats a token."""
    choices, nats, count = [], 0.0, 0
    with Watcher(it.model) as seen:
        for x, y in windows.batches:
            seen.begin(x.size(1))
            targets = int((y != IGNORE).sum())
            loss = it.model(x, y).cross_entropy.item()
            if targets:  # else it is of nothing
                nats += loss * targets
            count += targets
            choices.append(seen.choices)
    return seen, choices, nats / max(1, count)


# ---- numbers

def update_of(p: Tensor, state: dict[str, Tensor], group: dict, rate: float) -> Tensor:
    """What an AdamW step at this rate takes off a parameter by its moments, without weight decay."""
    (beta1, beta2), t = group["betas"], state["step"].item()
    mean, square = state["exp_avg"] / (1 - beta1**t), state["exp_avg_sq"] / (1 - beta2**t)
    return rate * mean / (square.sqrt() + group["eps"])


def weights_of(it: Patient) -> dict[str, dict]:
    """Parameters, their norm and the update-to-weight ratio of each layer, None where there are no moments."""
    step = it.parts["step"]
    rate = learning_rate_at(max(0, step - 1), it.run,
                            steps_of(it.model.config, it.run, step, it.parts.get("seconds", 0.0)))  # fmt: skip
    names = {p: name for name, p in it.model.named_parameters()}
    found: dict[str, dict] = {}
    for name, p in it.model.named_parameters():
        row = found.setdefault(layer_of(name), {"parameters": 0, "weights": 0.0, "updates": None})
        row["parameters"] += p.numel()
        row["weights"] += p.double().square().sum().item()
    for group in it.optimizer.param_groups if it.optimizer else ():
        for p in group["params"]:
            state = it.optimizer.state.get(p)
            if state and state["step"] > 0:
                row, update = found[layer_of(names[p])], update_of(p, state, group, rate)
                row["updates"] = (row["updates"] or 0.0) + update.double().square().sum().item()
    for row in found.values():
        weights, updates = math.sqrt(row.pop("weights")), row.pop("updates")
        row["norm"] = weights
        row["update_ratio"] = math.sqrt(updates) / weights if updates is not None and weights else None
    return found


def spans_of(seen: Seen) -> dict[str, list[float] | None]:
    """Of every head: the mean distance of what it looks at, and the distance within which 90% of the weight lies."""
    if seen.mass is None:
        return {"span": None, "span90": None}
    share = seen.mass / seen.queries
    distance = torch.arange(share.size(1), dtype=torch.float64)
    within = (share.cumsum(1) >= 0.9 - 1e-9).double()
    return {"span": (share @ distance).tolist(), "span90": within.argmax(1).tolist()}


def layer_rows(it: Patient, seen: Watcher) -> list[dict]:
    """Numbers of each block, and of what is outside of the blocks."""
    rows = []
    for name, weights in weights_of(it).items():
        row = {"layer": name, **weights}
        rows.append(row)
        if not name.startswith("blocks."):
            continue
        i = int(name.removeprefix("blocks."))
        layer, temperatures = seen.layers[i], getattr(it.model.blocks[i].attn, "k_temperature", None)
        line = layer.squares.get("line", 0.0)
        row["letter"] = it.model.config.layers[i]
        for part in ("attention", "mlp"):
            row[part] = math.sqrt(layer.squares[part] / line) if line else None
        row["temperature"] = None if temperatures is None else temperatures.tolist()
        row |= spans_of(layer)
    return rows


def letter_spans(rows: list[dict]) -> dict[str, dict[str, float]]:
    """The mean over all heads of a letter."""
    found: dict[str, dict[str, float]] = {}
    for letter in dict.fromkeys(row["letter"] for row in rows if row.get("span")):
        for name in ("span", "span90"):
            heads = [head for row in rows if row.get("letter") == letter for head in row[name] or ()]
            found.setdefault(letter, {})[name] = fmean(heads)
    return found


def taps_of(model: Hydra) -> list[dict]:
    """The convolutions' taps: a row for each, from the present token's on into the past. A depthwise tap has its mean
    over the channels and its root mean square, a grouped one, which mixes the channels of a head, the latter alone."""
    rows = []
    for name, module in model.named_modules():
        found = {"depthwise": getattr(module, "conv_depthwise", None), "grouped": getattr(module, "conv_grouped", None)}
        if isinstance(module, ShortConv):
            found = {"short_conv": module.weight}
        for kind, filters in found.items():
            if filters is None:
                continue
            taps = filters.detach().double().flatten(0, -2).flip(-1)  # the last one is the present token's
            row = {"layer": layer_of(name), "kind": kind, "rms": taps.square().mean(0).sqrt().tolist()}
            rows.append(row if kind == "grouped" else row | {"mean": taps.mean(0).tolist()})
    return rows


def capacities(model: Hydra) -> dict[str, float]:
    """The part of its candidates that every router selects in training."""
    config = model.config
    found = {f"block {i}": config.mod_capacity for i, block in enumerate(model.blocks) if block.routed}
    return found | {f"recursion {i}": part for i, part in enumerate(recursion_capacities(config.mor_recursions), 2)}


def router_rows(model: Hydra, choices: list[list[Choice]]) -> list[dict]:
    rows = []
    for name, capacity in capacities(model).items():
        calls = [choice for window in choices for choice in window if choice.name == name]
        candidates, selected = (sum(len(call[i]) for call in calls) for i in (1, 2))
        part = selected / candidates if candidates else None
        rows.append({"router": name, "capacity": capacity, "candidates": candidates, "selected": part})
    return rows


# ---- findings

class Finding(NamedTuple):
    """What is wrong with a part of the model."""

    what: str
    where: str
    value: float | None  # none of what is not finite
    reason: str


def not_finite(it: Patient, loss: float) -> Iterator[Finding]:
    """Weights and moments, else the loss."""
    sound = True
    for name, p in it.model.named_parameters():
        state = it.optimizer.state.get(p, {}) if it.optimizer else {}
        for where, tensor in {name: p, **{f"{moment} of {name}": state[moment] for moment in state}}.items():
            bad = int((~tensor.isfinite()).sum())
            if bad:
                sound = False
                yield Finding("not finite", where, None, f"{bad:,} of its {tensor.numel():,} numbers")
            elif where.startswith("exp_avg_sq") and (tensor < 0).any():
                yield Finding("not possible", where, tensor.min().item(), "a mean of squares is not negative")
    if sound and not math.isfinite(loss):
        yield Finding("not finite", "the loss", None, "though every weight is")


def findings_of(it: Patient, rows: list[dict], routers: list[dict], loss: float) -> list[Finding]:
    """All that is wrong. What was measured with numbers that are not finite says nothing of its own."""
    found = list(not_finite(it, loss))
    if not math.isfinite(loss):
        return found
    dead: dict[str, dict[str, float]] = {}
    for name, p in it.model.named_parameters():
        rms = p.detach().double().square().mean().sqrt().item()
        if rms < ZERO and not name.endswith(BIASES):
            dead.setdefault(layer_of(name), {})[name] = rms
    for of_layer in dead.values():
        found.append(Finding("dead layer", f"root mean square of {', '.join(of_layer)}", max(of_layer.values()),
                             f"below {ZERO:g} it is no weight"))  # fmt: skip
    for row in rows:
        for name in ("attention", "mlp"):
            part = row.get(name)
            if part is not None and part < DEAD:
                found.append(Finding("dead layer", f"{name} of {row['layer']} ({row['letter']}), in parts of the "
                                     "residual line", part, f"below {DEAD:g} it contributes nothing"))  # fmt: skip
        for head, value in enumerate(row.get("temperature") or ()):
            if math.isfinite(value) and not 1 / WILD <= value <= WILD:
                found.append(Finding("temperature gone wild", f"key head {head} of {row['layer']} ({row['letter']})",
                                     value, f"it began at 1 and is not within {1 / WILD:g} and {WILD:g}"))  # fmt: skip
    for row in routers:
        part, capacity = row["selected"], row["capacity"]
        if part is None or min(capacity, 1 - capacity) * row["candidates"] < LEAST:
            continue
        if part <= FEW * capacity or 1 - part <= FEW * (1 - capacity):
            why = f"of its tokens it selects so many, training takes {capacity:.3g}: it hardly chooses"
            found.append(Finding("saturated router", row["router"], part, why))
    return found


# ---- in words

def shown(value: object) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, list):
        return "/".join(map(shown, value))
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def table(rows: list[dict], names: list[str]) -> list[str]:
    return list(aligned([names, *([shown(row.get(name)) for name in names] for row in rows)]))


def characters(enc: tiktoken.Encoding, ids: list[int], counts: list[int]) -> list[tuple[str, int]]:
    """The text of `ids`, each character with the count of its token. What would steer a terminal becomes a dot."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be cut between two tokens
    found = []
    for token, count in zip(ids, counts, strict=True):
        text = utf8.decode(token_text(enc, token))
        found += [("·" if breaks(c) and c != "\n" else c, count) for c in text]
    return found


def routing_lines(windows: Windows, choices: list[list[Choice]], coloured: bool) -> Iterator[str]:
    """How many of the routers select each token: in colours, or in digits below the text."""
    found, left, most = [], windows.shown, 0
    for (x, _), window in zip(windows.batches, choices, strict=True):
        ids = x[0].tolist()
        counts = [0] * len(ids)
        for choice in window:
            for token in choice.selected:
                counts[token] += 1
        found += characters(windows.enc, ids[:left], counts[:left])
        most = max(most, len(window))
        left = max(0, left - len(ids))
    lines = [[]]
    for c, count in found:
        if c == "\n" or len(lines[-1]) == WIDTH:
            lines.append([])
        if c != "\n":
            lines[-1].append((c, count))
    yield f"how many of {most} routers select a token of {windows.name}:"
    if coloured:
        yield " ".join(f"\033[{COLOURS[round(n / most * (len(COLOURS) - 1))]}m{n}\033[0m" for n in range(most + 1))
    for line in lines:
        if coloured:
            yield "".join(f"\033[{COLOURS[round(n / most * (len(COLOURS) - 1))]}m{c}\033[0m" for c, n in line)
        else:
            yield "".join(c for c, _ in line)
            yield "".join(str(n) if n < 10 else "+" for _, n in line)


def main(argv: list[str]) -> int:
    words = [word for word in argv if not word.startswith("-")]
    usage = "usage: python diagnose.py checkpoint PATH [--key=value ...]"
    given = parse([word for word in argv if word not in words], HealthConfig, doc=f"{usage}\n\n{__doc__.strip()}")
    (options,) = build(given, HealthConfig)
    if len(words) != 1:
        what = f"{words[1]!r} is one too many" if words else "nothing to look at"
        raise UserError(f"{what}: name a run's folder or a checkpoint, as in: python diagnose.py checkpoint out")
    it = read_patient(find_checkpoint(words[0]))
    windows = read_windows(it, options)
    seen, choices, loss = observe(it, windows)
    layers, taps, routers = layer_rows(it, seen), taps_of(it.model), router_rows(it.model, choices)
    findings = findings_of(it, layers, routers, loss)
    tokens = sum(x.size(1) for x, _ in windows.batches)
    coloured = sys.stdout.isatty()
    print(f"{it.path}, step {it.parts['step']:,}: {loss:.4f} nats a token on {tokens:,} tokens of {windows.name}")
    print("\n".join(it.notes + table(layers, COLUMNS)))
    letters = letter_spans(layers)
    means = [f"{letter} span {shown(it['span'])}, 90% {shown(it['span90'])}" for letter, it in letters.items()]
    print(f"of a letter's heads: {'; '.join(means)}")
    if it.optimizer is None:
        print("update_ratio is n/a: this checkpoint has no moments, last.pt has")
    if taps:
        print("\n".join(table(taps, ["layer", "kind", "mean", "rms"])) + "   (taps, from the present token on)")
    if routers:
        print("\n".join(table(routers, ["router", "capacity", "candidates", "selected"])))
    if routers and windows.enc:
        print("\n".join(routing_lines(windows, choices, coloured)))
    for what, where, value, why in findings:
        line = f"{what}: {where}{'' if value is None else f' = {value:.4g}'}: {why}"
        print(f"\033[31m{line}\033[0m" if coloured else line)
    if not findings:
        print("no findings: all is finite, and nothing is beyond the limits that --help names")
    result = for_json({
        "subject": "checkpoint", "path": str(it.path), "step": it.parts["step"], "text": windows.name, "tokens": tokens,
        "loss": loss, "layers": layers, "letters": letters, "taps": taps, "routers": routers,
        "findings": [finding._asdict() for finding in findings]})  # fmt: skip
    if options.json:
        write_text(Path(options.json), json.dumps(result, indent=1, allow_nan=False))
    print(json.dumps(result, allow_nan=False))
    return 0
