"""Routing: how tokens skip layers, and how layers run more than once.

- Mixture-of-Depths (arXiv:2404.02258): in every other block a router selects the tokens that go through it.
- Mixture-of-Recursions (arXiv:2507.10524): the blocks are run several times, from the second time on for the tokens
  that a router of that time selects among those of the time before. Both nest: a block has the same router each time.

A router is one vector w: the score of a token is r = x . w, and a selected token gets
    x + sigmoid(r) * (layers(x) - x)                                                                            (1)
so that the loss reaches w; the others keep x. Among the selected tokens everything is as in a text of their own: order,
attention, convolutions, shift, state; only RoPE sees the positions that they have in the whole text.
- Training, expert choice: the k highest scores of each sequence, a static shape, put in the order of the text: in the
  order of scores the causal mask would leak the future.
- Evaluation and generation, the causal rule: r > 0. An auxiliary loss, BCE(r, is in the top k), makes the two agree.
  The selected tokens come first, the causal mask hides the others behind them. All are computed, except in a prefill on
  a CPU: with fewer rows a product may round differently, and a token's last digits would depend on later tokens. A
  generating state counts the selected tokens of each row: the count is the row's next slot.
- A control (router = random): who is selected follows from its position alone, by noise, with the same capacity. What a
  learned router gains over it is what its choices are worth.
Left out: token choice, keys and values shared between recursions, z-losses, routers with hidden layers.

Shapes: B batch, T tokens, D width, k selected tokens; see attention.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import Context, LayerState
from machine import document_masks

ROWS = 64  # a prefill rounds its counts up to this, so that few shapes occur
SURE = 1e4  # scale of random scores: a selected token's gate is 1


def depth_tokens(capacity: float, T: int) -> int:
    """k of a routed block, in training, for texts of T tokens."""
    return max(1, int(capacity * T))


def recursion_tokens(recursions: int, T: int) -> list[int]:
    """Tokens of each recursion in training: T times 1, 2/3, 1/3 where there are three."""
    return [max(1, T * (recursions - i) // recursions) for i in range(recursions)]


def recursion_capacities(recursions: int) -> list[float]:
    """Part of the tokens of one recursion that the next one has in training: 2/3, 1/2 where there are three."""
    return [(recursions - i) / (recursions - i + 1) for i in range(1, recursions)]


def is_routed(config, layer: int) -> bool:
    """Whether a block has a router: every other one, where there is a capacity."""
    return config.mod_capacity > 0 and layer % 2 == 1


def layer_tokens(config, T: int) -> list[int]:
    """Tokens of every layer of every recursion, for texts of T tokens, in training."""
    result = []
    for tokens in recursion_tokens(config.mor_recursions, T):
        for layer in range(config.n_layer):
            result.append(depth_tokens(config.mod_capacity, tokens) if is_routed(config, layer) else tokens)
    return result


class Router(nn.Module):
    """Scores of tokens."""

    def __init__(self, dim: int, aux_weight: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.aux_weight = aux_weight

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> r [B, T], fp32 under autocast too: scores in bf16 tie."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            return x_BTD.float() @ self.weight.float()


class RandomRouter(nn.Module):
    """The control: no parameter, no auxiliary loss, and scores that hang on the position alone. Training selects the
    best of a window, as many as of a learned one; by the sign it is as many on average. All that is selected passes
    with a gate of 1."""

    aux_weight = 0.0

    def __init__(self, capacity: float, number: int):
        super().__init__()
        self.capacity = capacity  # part of the tokens that it selects
        self.number = number  # no two routers of a model choose alike

    def forward(self, place: Tensor) -> Tensor:
        """Positions in the text [(B,) T] -> r of that shape: uniform noise, a hash of the position, against the
        capacity."""
        h = (place * 2654435761 + self.number * 40503 + 1) & 0xFFFFFFFF
        h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
        h = ((h ^ (h >> 12)) * 0x297A2D39) & 0xFFFFFFFF
        return (self.capacity - (h ^ (h >> 15)).float() / 2**32) * SURE


def make_router(config, capacity: float, aux_weight: float, number: int) -> Router | RandomRouter:
    if config.router == "random":
        return RandomRouter(capacity, number)
    return Router(config.dim, aux_weight)


def recursion_routers(config) -> list[Router | RandomRouter]:
    """Of all recursions but the first."""
    parts = recursion_capacities(config.mor_recursions)
    return [make_router(config, part, config.mor_aux, -i) for i, part in enumerate(parts, 1)]


class Selection(NamedTuple):
    """The tokens that a router selected."""

    index: Tensor | None  # [B, k, 1], ascending; None in a decoding step, whose rows have one token each
    gate: Tensor  # [B, k, 1]: sigmoid(r), 0 for tokens that only fill the shape
    ctx: Context  # theirs

    def apply(self, x_BTD: Tensor, layers: Callable[[Tensor, Context], Tensor]) -> Tensor:
        """Equation (1) for the selected tokens of x -> [B, k, D]."""
        x_BkD = x_BTD
        if self.index is not None:
            x_BkD = x_BTD.gather(1, self.index.expand(-1, -1, x_BTD.size(-1)))
        return torch.lerp(x_BkD, layers(x_BkD, self.ctx), self.gate)

    def put_back(self, x_BTD: Tensor, selected_BkD: Tensor) -> Tensor:
        """x with the selected tokens in their places."""
        if self.index is None:
            return selected_BkD
        return x_BTD.scatter(1, self.index.expand_as(selected_BkD), selected_BkD)


# What a router did in one call, fp32 [3]: its weighted auxiliary loss; part of the tokens on which r > 0 and top-k
# agree (NaN outside of training); part that has r > 0. None in a decoding step.
Record = Tensor | None
Selected = tuple[Selection | None, Record]  # None where no token is selected


def selection_at(index_Bk: Tensor, gate_Bk: Tensor, ctx: Context, lengths_B: Tensor | None) -> Selection:
    """The tokens at `index_Bk`, with their true positions and rotations."""
    B = len(index_Bk)
    row_B1 = torch.arange(B, device=index_Bk.device)[:, None]
    rope = {}
    for width, tables in ctx.rope.items():
        rope[width] = tuple(table.expand(B, *table.shape[-3:])[row_B1, index_Bk] for table in tables)
    if ctx.doc is not None:
        doc_Bk = ctx.doc.gather(1, index_Bk)
        flex = not any(isinstance(mask, Tensor) for mask in ctx.masks.values())
        ctx = ctx._replace(doc=doc_Bk, masks=document_masks(doc_Bk, {window for _, window in ctx.masks}, flex))
    if ctx.place is not None:
        ctx = ctx._replace(place=ctx.place.expand(B, -1).gather(1, index_Bk))
    ctx = ctx._replace(pos=ctx.pos.expand(B, -1).gather(1, index_Bk), rope=rope, lengths=lengths_B)
    return Selection(index_Bk[..., None], gate_Bk[..., None], ctx)


def select_now(r_B1: Tensor, x_B1D: Tensor, ctx: Context, state: LayerState) -> Selection | None:
    """A decoding step: the next slot of these layers is each row's count, and rows that bypass keep their state. In a
    static step all rows run, without a sync; else nothing runs where no row is selected."""
    keep_B, count_B = r_B1[:, 0] > 0, state["count"]
    if ctx.keep is not None:
        keep_B = keep_B & ctx.keep
    visible, alone = ctx.visible, False
    if not ctx.static:
        if not keep_B.any():
            return None
        visible = int(count_B[keep_B].max()) + 1
        alone = len(keep_B) == 1
    gate_B11 = (r_B1.sigmoid() * keep_B[:, None])[..., None].to(x_B1D.dtype)
    ctx = ctx._replace(pos=count_B[:, None].clone(), visible=visible, uniform=alone, keep=None if alone else keep_B)
    count_B += keep_B
    return Selection(None, gate_B11, ctx)


def select_positive(r_BT: Tensor, x_BTD: Tensor, ctx: Context, state: LayerState | None) -> Selected:
    """Evaluation and prefill: the tokens with r > 0, in front of the others."""
    k = T = r_BT.size(1)
    real_BT = torch.ones_like(r_BT, dtype=torch.bool)
    if ctx.lengths is not None:
        real_BT = torch.arange(T, device=r_BT.device) < ctx.lengths[:, None]
    keep_BT = real_BT & (r_BT > 0)
    lengths_B = keep_BT.sum(1)
    fraction = lengths_B.sum() / real_BT.sum().clamp(min=1)
    record = torch.stack((torch.zeros_like(fraction), torch.full_like(fraction, torch.nan), fraction))
    if state is not None:
        state["count"].copy_(lengths_B)
        if x_BTD.device.type == "cpu" and not torch.compiler.is_compiling():
            most = int(lengths_B.max())
            if most == 0:
                return None, record
            k = min(T, (most + ROWS - 1) // ROWS * ROWS)
    index_Bk = (~keep_BT).sort(dim=1, stable=True).indices[:, :k]
    gate_Bk = (r_BT.gather(1, index_Bk).sigmoid() * keep_BT.gather(1, index_Bk)).to(x_BTD.dtype)
    return selection_at(index_Bk, gate_Bk, ctx, lengths_B), record


def select(router: Router | RandomRouter, k: int, x_BTD: Tensor, ctx: Context, state: LayerState | None) -> Selected:
    """What `router` selects of x; `k` is the training's capacity, `state` the one that counts for these layers."""
    r_BT = router(x_BTD) if ctx.place is None else router(ctx.place).expand(x_BTD.shape[:2])
    if ctx.decoding:
        return select_now(r_BT, x_BTD, ctx, state), None
    if state is not None or not router.training:
        return select_positive(r_BT, x_BTD, ctx, state)
    index_Bk = r_BT.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    inside = torch.zeros_like(r_BT).scatter(1, index_Bk, 1.0)
    aux = router.aux_weight * F.binary_cross_entropy_with_logits(r_BT, inside)
    agreement = ((r_BT > 0) == (inside > 0)).float().mean()
    record = torch.stack((aux, agreement.detach(), (r_BT > 0).float().mean()))
    gate_Bk = r_BT.gather(1, index_Bk).sigmoid().to(x_BTD.dtype)
    return selection_at(index_Bk, gate_Bk, ctx, None), record


class Routed:
    """Makes a block one that a part of the tokens goes through: `class MoD(Routed, Block)`."""

    routed = True

    def __init__(self, letter: str, config, number: int):
        super().__init__(letter, config)
        self.capacity = config.mod_capacity
        self.router = make_router(config, config.mod_capacity, config.mod_aux, number)

    def forward(self, x_BTD: Tensor, ctx: Context, state: LayerState | None = None) -> tuple[Tensor, Record]:
        k = depth_tokens(self.capacity, x_BTD.size(1))
        selection, record = select(self.router, k, x_BTD, ctx, state)
        if selection is None:
            return x_BTD, record
        block = super().forward
        selected_BkD = selection.apply(x_BTD, lambda x, ctx: block(x, ctx, state))
        return selection.put_back(x_BTD, selected_BkD), record


def run_blocks(blocks: Sequence[nn.Module], x_BTD: Tensor, ctx: Context, states: list | None, records: list) -> Tensor:
    """All blocks one after the other; what the routed ones did is added to `records`. With ctx.recompute the backward
    finds only their inputs kept, and computes each block once more (arXiv:1604.06174)."""
    for i, block in enumerate(blocks):
        state = states[i] if states else None
        call = block
        if ctx.recompute:
            call = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
        if block.routed:
            x_BTD, record = call(x_BTD, ctx, state)
            records.append((block.router, record))
        else:
            x_BTD = call(x_BTD, ctx, state)
    return x_BTD


def recurse(blocks: Sequence[nn.Module], routers: Sequence[Router], x_BTD: Tensor, ctx: Context,
            states: list | None) -> tuple[Tensor, list[tuple[Router, Record]]]:
    """All blocks for all tokens, then once more for each router, for the tokens that it selects of those before it
    -> [B, T, D], and what every router did. States: one for each block of the first recursion, of the second, .."""
    records: list[tuple[Router, Record]] = []
    B, T = x_BTD.shape[:2]
    tokens = recursion_tokens(len(routers) + 1, T)
    if routers and states is None and not routers[0].training:  # evaluation: all recursions share graphs
        every_BT = torch.arange(T, device=x_BTD.device).expand(B, T)
        ctx = selection_at(every_BT, every_BT, ctx, torch.full_like(every_BT[:, 0], T)).ctx
    x = run_blocks(blocks, x_BTD, ctx, states and states[: len(blocks)], records)
    outer = []
    for i, router in enumerate(routers, 1):
        part = states and states[i * len(blocks) : (i + 1) * len(blocks)]
        selection, record = select(router, tokens[i], x, ctx, part and part[0])
        records.append((router, record))
        if selection is None:
            break  # out once, out for good
        outer.append((selection, x))
        x = selection.apply(x, lambda x, ctx, part=part: run_blocks(blocks, x, ctx, part, records))
        ctx = selection.ctx
    for selection, before in reversed(outer):
        x = selection.put_back(before, x)
    return x, records


def statistics(depths: Sequence[Router], recursions: Sequence[Router], records: list) -> dict[str, Tensor]:
    """What the routers of the blocks and of the recursions did in one forward, without a sync; empty without routers:
    - aux_loss: what training adds to its loss, with its gradient.
    - router_agreement: part of the tokens on which r > 0 agrees with top-k, mean over the routers; NaN in evaluation.
    - routed_fraction: part of the tokens with r > 0, mean over the routed blocks.
    - mean_depth: recursions of a token under r > 0; in training as if top-k were independent of the next score."""
    if not records:
        return {}
    means, aux_loss = [], 0.0
    for router in [*depths, *recursions]:
        calls = [record for owner, record in records if owner is router]  # one a recursion
        total = sum(calls) if calls else torch.zeros(3, device=records[0][1].device)
        aux_loss = aux_loss + total[0]
        means.append(total.detach() / max(1, len(calls)))
    means = torch.stack(means)
    result = {"aux_loss": aux_loss, "router_agreement": means[:, 1].mean()}
    if depths:
        result["routed_fraction"] = means[: len(depths), 2].mean()
    if recursions:
        result["mean_depth"] = 1 + means[len(depths) :, 2].cumprod(0).sum()
    return result
