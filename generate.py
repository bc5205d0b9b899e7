"""Generation from preallocated states, one per layer, batched over prompts of different lengths.

`generate` is `new_state`, `prefill`, and `sample_token` and `decode` in a loop. A step promises the layers what a CPU
is faster with: views up to the longest text, plain writes where all are equally long. Where shapes must not follow the
text (`static`: CUDA, compiled steps) slots are read under a mask, up to the power of two that the text has reached; on
CUDA such steps are captured (`Replayed`). Faster on a CPU: `pack`, `compile_decoding`.
Left out: beam search, speculative decoding, continuing a state with a second prompt.

Shapes: B texts, T tokens of the longest prompt, S slots of a state, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import LayerState
from configurator import UserError
from data import text_of
from layers import compute_dtype
from machine import PackedLinear, compile_blocks, packing_problem
from model import Hydra

LEAST = 128  # slots that a static step reads at least; each power of two above is one more graph
LOOK = 8  # captured steps between two looks for the end of all rows


@dataclass
class DecodingState:
    """What generation keeps between two tokens, see `new_state`."""

    layers: list[LayerState]  # of every block, of the first recursion, of the second, and so on
    pos_B: Tensor  # int64 [B], tokens of each row so far: the position of its next one
    slots: int  # S, tokens that a row may have
    static: bool  # no shape follows the text
    least: int  # slots that a static step reads at least
    tokens: int = 0  # of the longest row
    uniform: bool = True  # all rows have as many

    def bytes(self, filled: bool = False) -> int:
        """What is allocated, counters aside, or the part that is `filled`: the tails, and of the slots those of the
        tokens that went through the layer. A routed layer has a slot for every token: a router may select them all."""
        total = 0
        for layer in self.layers:
            used_B = layer.get("count", self.pos_B)
            for name, t in layer.items():
                if filled and not name.endswith("tail") and name != "count":
                    total += used_B.clamp(max=t.size(1)).sum().item() * t[0, 0].nbytes
                elif name != "count":
                    total += t.nbytes
        return total


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()


def new_state(model: Hydra, B: int, S: int, static: bool = False, least: int = LEAST) -> DecodingState:
    """An empty state for B texts of up to S tokens each, in the dtype that the model computes in; a `static` one has a
    power of two of slots, so that few shapes are ever compiled: with least=S a single one of the steps. For its size
    see `accounting.state_bytes`."""
    if static:
        S = power_of_two(S)
    weight = model.embed.weight
    like = weight.new_empty((), dtype=compute_dtype(weight))
    pos_B = torch.zeros(B, dtype=torch.int64, device=weight.device)
    layers = []
    for recursion in range(model.config.mor_recursions):
        count_B = torch.zeros_like(pos_B)  # tokens of each row in this recursion
        for block in model.blocks:
            layer = block.attn.new_state(B, S, like)
            if block.routed:
                layer["count"] = torch.zeros_like(pos_B)
            elif recursion:
                layer["count"] = count_B
            layers.append(layer)
    return DecodingState(layers, pos_B, S, static, least)


def last_document(model: Hydra, row: Tensor) -> Tensor:
    """What a model sees of a prompt [T] when it goes on from it."""
    if not model.config.doc_mask:
        return row
    ends = (row[:-1] == model.end_token).nonzero()
    return row[int(ends[-1]) + 1 :] if len(ends) else row


def begin_documents(model: Hydra, token_B: Tensor, state: DecodingState) -> None:
    """Behind their last tokens: rows that ended a document are empty again. Masks hide what their slots hold."""
    if not model.config.doc_mask:
        return
    ended_B = token_B == model.end_token
    state.pos_B.masked_fill_(ended_B, 0)
    for layer in state.layers:
        for name, t in layer.items():
            if name == "count" or name.endswith("tail"):
                t.masked_fill_(ended_B.view(-1, *[1] * (t.dim() - 1)), 0)


def longest_text(model: Hydra) -> float:
    """Tokens of the longest text that the model can continue: endless where no layer keeps more than its window."""
    endless = all(block.attn.window for block in model.blocks)
    return math.inf if endless else model.config.block_size


def check_room(model: Hydra, state: DecodingState, tokens: int) -> None:
    """UserError where texts of so many tokens do not fit into the state: a ring of slots must hold a window."""
    kept = max(min(tokens, block.attn.window or tokens) for block in model.blocks)
    if kept > state.slots:
        raise UserError(f"{kept} tokens do not fit into a state of {state.slots}: ask new_state for more")


def prefill(model: Hydra, prompts: Tensor | list[Tensor], state: DecodingState) -> Tensor:
    """Token ids [B, T], or a list of B tensors [T_b] of at least one token, into an empty state -> logits [B, V] behind
    each text; with doc_mask behind the last document of each. UserError where the state is in use, or too small."""
    rows = [last_document(model, row) for row in prompts]
    if state.tokens:
        raise UserError(f"this state holds texts of up to {state.tokens} tokens: a prefill needs one from new_state")
    if len(rows) != len(state.pos_B):
        raise UserError(f"{len(rows)} prompts for a state of {len(state.pos_B)} texts: ask new_state for as many")
    lengths = [len(row) for row in rows]
    if min(lengths, default=0) < 1:
        raise UserError("prompt='': it has no token: give at least one, such as the tokenizer's end of text")
    longest = max(lengths)
    check_room(model, state, longest)
    device = state.pos_B.device
    idx_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    if state.static:
        idx_BT = F.pad(idx_BT, (0, power_of_two(longest) - longest))
    state.tokens = longest
    state.uniform = min(lengths) == longest and not model.config.doc_mask  # rows begin again one by one
    return prefill_step(model, idx_BT, torch.tensor(lengths, device=device), state)


def prefill_step(model: Hydra, idx_BT: Tensor, lengths_B: Tensor, state: DecodingState) -> Tensor:
    """The tensors' part of `prefill`: one graph. Row b's first lengths_B[b] tokens are its text. Padding on the right
    is never seen: the model is causal, and decoding overwrites it."""
    ctx = model.context(torch.arange(idx_BT.size(1), device=idx_BT.device), lengths=lengths_B)
    x_BTD, _ = model.trunk(idx_BT, ctx, state.layers)
    state.pos_B.copy_(lengths_B)
    row_B = torch.arange(len(x_BTD), device=x_BTD.device)
    last_BD = x_BTD[row_B, lengths_B - 1]
    begin_documents(model, idx_BT[row_B, lengths_B - 1], state)
    return model.head(last_BD)


def take_slot(model: Hydra, state: DecodingState) -> int:
    """Count one more token -> the slots that its step reads. UserError where the state is full."""
    check_room(model, state, state.tokens + 1)
    state.tokens += 1
    if not state.static:
        return state.tokens
    return min(state.slots, power_of_two(max(state.least, state.tokens)))


def decode(model: Hydra, token_B: Tensor, state: DecodingState) -> Tensor:
    """One more token for every row -> logits [B, V]. UserError where the state is full. With doc_mask a row begins
    again behind an end of text; what it holds no more still counts as full."""
    visible = take_slot(model, state)
    return decode_step(model, token_B, state, visible, state.uniform and not state.static)


def decode_step(model: Hydra, token_B: Tensor, state: DecodingState, visible: int, uniform: bool) -> Tensor:
    """The tensors' part of `decode`: one graph for each `visible`, and in a static state no sync, so that it can be
    captured."""
    ctx = model.context(state.pos_B[:, None], None, True, visible, uniform, state.static)
    x_B1D, _ = model.trunk(token_B[:, None], ctx, state.layers)
    state.pos_B += 1
    begin_documents(model, token_B, state)
    return model.head(x_B1D[:, 0])


def check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """UserError for values of `generate` that cannot be."""
    if max_new_tokens < 0:
        raise UserError(f"{max_new_tokens=}: it must not be negative")
    if temperature != 0 and not 1e-3 <= temperature <= 1e6:
        raise UserError(f"{temperature=}: use 0 (the likeliest token) or a value from 0.001 to a million")
    if top_k < 0:
        raise UserError(f"{top_k=}: use 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"{top_p=}: choose a value above 0 and at most 1")


def sample_token(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, noise_BV: Tensor | None) -> Tensor:
    """Next token ids [B] from fp32 logits: softmax at `temperature` over the `top_k` likeliest tokens (0 = all), of
    those the fewest whose probability reaches `top_p`; temperature 0 takes the likeliest. noise_BV: from Exp(1), since
    the largest of probability / noise is a sample: as torch.multinomial does it, which besides waits for the device."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV, order_BV = (logits_BV / temperature).sort(dim=-1, descending=True)
    if top_k:
        logits_BV[:, top_k:].fill_(-math.inf)
    probs_BV = logits_BV.softmax(-1)
    beyond = probs_BV.cumsum(-1) - probs_BV >= top_p  # the token that crosses top_p stays, and always the likeliest
    probs_BV[:, 1:].masked_fill_(beyond[:, 1:], 0.0)
    return order_BV.gather(1, (probs_BV / noise_BV).argmax(-1, keepdim=True)).squeeze(1)


class Replayed:
    """`step(visible)` on a GPU, replayed from CUDA graphs, one for each number: one launch instead of about a thousand.
    The step works in place on tensors that stay. Graphs run one after the other and share what memory they need."""

    def __init__(self, step: Callable[[int], None], device: torch.device):
        self.step = step
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.replays: dict[int, Callable[[], None]] = {}

    @staticmethod
    def possible(weight: Tensor) -> bool:
        """For a model of such weights: not under autocast, which keeps casts of them that a graph would read later."""
        return weight.is_cuda and compute_dtype(weight) == weight.dtype

    def __call__(self, visible: int) -> None:
        if visible in self.replays:
            self.replays[visible]()
        else:
            self.replays[visible] = self.capture(partial(self.step, visible))

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run `step`, and record what it launches -> a call that launches it again."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):  # the warm-up, after which libraries have their workspaces there
            step()
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):  # nothing runs
            step()
        return graph.replay


def sampled_tokens(
    model: Hydra, state: DecodingState, logits_BV: Tensor, sampling: tuple[float, int, float], stop: int | None,
    generator: torch.Generator | None, capture: bool,
) -> Iterator[Tensor]:  # fmt: skip
    """The tokens behind a prefill that gave `logits_BV`, for ever, each computed when it is asked for; `sampling`:
    temperature, top_k, top_p. The noise is drawn outside of a graph: captured or not, a seed gives the same numbers."""
    token_B = torch.zeros_like(state.pos_B)  # the last tokens
    ended_B = torch.zeros_like(token_B, dtype=torch.bool)
    noise_BV = torch.empty_like(logits_BV, dtype=torch.float32)

    def choose(logits_BV: Tensor) -> None:
        next_B = sample_token(logits_BV.float(), *sampling, noise_BV)
        if stop is not None:
            next_B = next_B.masked_fill(ended_B, stop)
            ended_B.logical_or_(next_B == stop)
        token_B.copy_(next_B)

    def step(visible: int) -> None:
        choose(decode_step(model, token_B, state, visible, state.uniform and not state.static))

    run = Replayed(step, token_B.device) if capture else step
    for made in count():
        if sampling[0]:
            noise_BV.exponential_(generator=generator)
        if made:
            run(take_slot(model, state))
        else:
            choose(logits_BV)
        yield token_B.clone()


def until_all_end(tokens: Iterator[Tensor], stop: int, every: int) -> Iterator[Tensor]:
    """The tokens up to the last row's end. A look at them waits for the device, so that they come in groups: the first
    one, then `every` at a time, of which the last group may be computed in part for nothing."""
    group = list(islice(tokens, 1))
    while group:
        ended = (torch.stack(group) == stop).all(1).tolist()
        for token_B, last in zip(group, ended, strict=True):
            yield token_B
            if last:
                return
        group = list(islice(tokens, every))


@torch.no_grad()
def generate(
    model: Hydra, prompts: Tensor | list[Tensor], max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 1.0, stop: int | None = None, generator: torch.Generator | None = None,
    static: bool | None = None, state: DecodingState | None = None, capture: bool = True,
) -> Iterator[Tensor]:  # fmt: skip
    """Yields the next token ids [B] as they come, at most max_new_tokens times.

    prompts: see `prefill`; no row sees another or its padding. temperature, top_k, top_p: see `sample_token`. stop: a
    token id that ends its row, which then yields only that id; the last row's end ends the generation. static: shapes
    that do not follow the text, for compiled or captured steps; None = on CUDA. state: an empty one to use, for a
    caller that looks at it afterwards. capture: static steps on CUDA are captured, the same text; with a `stop` they
    come in groups, and the state may hold tokens behind the last. UserError for values that cannot be, and for a text
    longer than `longest_text`.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    rows = list(prompts)
    longest = max(map(len, rows), default=0)
    tokens = longest + max_new_tokens
    if tokens > longest_text(model):
        raise UserError(f"max_new_tokens={max_new_tokens}: with a prompt of {longest} tokens that is more than "
                        f"block_size={model.config.block_size}: ask for fewer, or shorten the prompt")  # fmt: skip
    if static is None:
        static = model.embed.weight.is_cuda
    if state is None:
        state = new_state(model, len(rows), tokens, static)
    check_room(model, state, tokens)
    with torch.compiler.set_stance("force_eager"):  # of the prompts' length a graph would be used once
        logits_BV = prefill(model, rows, state)
    capture = capture and state.static and Replayed.possible(model.embed.weight)
    steps = sampled_tokens(model, state, logits_BV, (temperature, top_k, top_p), stop, generator, capture)
    steps = islice(steps, max_new_tokens)
    if stop is not None:
        steps = until_all_end(steps, stop, LOOK if capture else 1)
    yield from steps


def continue_text(model: Hydra, enc, prompt: str, tokens: int, seed: int) -> str:
    """`prompt` and its continuation, at most to the end of the block; eager, too short to earn a compilation back."""
    ids = (enc.encode_ordinary(prompt) or [enc.eot_token])[: model.config.block_size]
    tokens = min(tokens, model.config.block_size - len(ids))
    generator = torch.Generator(model.embed.weight.device).manual_seed(seed)
    with torch.compiler.set_stance("force_eager"):
        steps = generate(model, [torch.tensor(ids)], tokens, 0.8, top_p=0.95, generator=generator, capture=False)
        return prompt + text_of(enc, (int(token_B) for token_B in steps))


@torch.no_grad()
def pack(model: Hydra) -> str:
    """Store the matrices for decoding on a CPU, see `machine.PackedLinear`; the model cannot be trained or saved any
    more. Returns why nothing was done, "" where it was."""
    weight = model.embed.weight
    problem = packing_problem(weight.device, weight.dtype)
    if problem:
        return problem
    for module in list(model.modules()):
        plain = getattr(module, "plain", ())
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name not in plain:
                setattr(module, name, PackedLinear(child.weight))
    packed_head = PackedLinear(weight)  # a second copy: the embedding looks up plain rows
    model.head = lambda x: packed_head(model.norm(x))
    return ""


def compile_decoding(model: Hydra) -> None:
    """Compile the blocks and the head for decoding from a static state: 10-20 s once. On a CPU this is for one long
    text, for several rows `pack` is better."""
    compile_blocks(model.blocks)
    model.head = torch.compile(model.head, fullgraph=True, dynamic=False)
