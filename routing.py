"""Routing: how tokens skip layers, and how layers run more than once.

- Mixture-of-Depths (arXiv:2404.02258): in every other block a router picks the tokens that go through it.
- Mixture-of-Recursions (arXiv:2507.10524): the blocks are run several times, from the second time on for fewer and
  fewer tokens, each time picked by a router of its own among those that the time before had.
- Both at once: the recursions meet a routed block like any other, its router is shared as its weights are.

A router is one vector w: the score of a token is r = x . w, and a picked token gets
    x + sigmoid(r) * (layers(x) - x)                                                                            (1)
so that the loss reaches w; the others keep x. Among the picked tokens everything is as in a text of their own: order,
attention, convolutions, shift, state; only RoPE sees the positions that they have in the whole text.
- Training, expert choice: the k highest scores of each sequence, k a number of Python's, so every shape is static. The
  picked tokens are put in the order of the text: in top-k's order of scores the causal mask would leak the future.
- Evaluation and generation, the causal rule: r > 0. An auxiliary loss, BCE(r, is in the top k), makes the two agree.
  Top-k would look at the future, so nothing but training uses it.
In evaluation the picked tokens come first in their order, the others behind them, where the causal mask hides them, up
to the largest count of the batch. Where shapes must not follow the data (CUDA, compiled, `Context.static`), up to all:
the same to the last digits, but nothing is saved. A generating state counts the picked tokens of each row: the count
is the row's next slot.
Left out: token choice, keys and values shared between recursions, z-losses, routers with hidden layers.

Shapes: B batch, T tokens, D width, k picked tokens; see attention.py.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Context, State

# Evaluation rounds its counts up to this: few shapes, and a product's rows are bit for bit the same with more of them.
ROWS = 64
AUX_DEPTHS, AUX_RECURSIONS = 0.01, 1e-3  # weights of the auxiliary losses of the two papers


def depth_tokens(capacity: float, T: int) -> int:
    """k of a routed block, in training, for texts of T tokens."""
    return max(1, int(capacity * T))


def recursion_tokens(recursions: int, T: int) -> list[int]:
    """Tokens of each recursion in training: T times 1, 2/3, 1/3 where there are three."""
    return [max(1, T * (recursions - i) // recursions) for i in range(recursions)]


class Router(nn.Module):
    """Scores of tokens, and the record of what they did since `record` was last set to None."""

    def __init__(self, dim: int, aux_weight: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.aux_weight = aux_weight
        self.record: Tensor | None = None  # [4]: sums over calls of `note`'s numbers, and their number

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> r [B, T], fp32 under autocast too: scores in bf16 tie."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            return x_BTD.float() @ self.weight.float()

    def note(self, aux: Tensor, agreement: Tensor, fraction: Tensor) -> None:
        """Weighted auxiliary loss; part of the tokens on which r > 0 and top-k agree; part that has r > 0."""
        new = torch.stack((aux, agreement, fraction, torch.ones_like(fraction)))
        self.record = new if self.record is None else self.record + new


class Pick(NamedTuple):
    """The tokens that a router picked."""

    index: Tensor | None  # [B, k, 1], ascending; None in a decode step, whose rows have one token each
    gate: Tensor  # [B, k, 1]: sigmoid(r), 0 for tokens that only fill the shape
    ctx: Context  # theirs

    def apply(self, x_BTD: Tensor, layers: Callable[[Tensor, Context], Tensor]) -> Tensor:
        """Equation (1) for the picked tokens of x -> [B, k, D]."""
        x = x_BTD if self.index is None else x_BTD.gather(1, self.index.expand(-1, -1, x_BTD.size(-1)))
        return torch.lerp(x, layers(x, self.ctx), self.gate)

    def put_back(self, x_BTD: Tensor, picked_BkD: Tensor) -> Tensor:
        """x with the picked tokens in their places."""
        if self.index is None:
            return picked_BkD
        return x_BTD.scatter(1, self.index.expand_as(picked_BkD), picked_BkD)


def select(router: Router, k: int, x_BTD: Tensor, ctx: Context, state: State | None) -> Pick | None:
    """What `router` picks of x; None where that is nothing. `state` is the one that counts for these layers."""
    r_BT = router(x_BTD)
    if ctx.decode:
        return select_now(r_BT, x_BTD, ctx, state)
    if router.training and state is None:
        index_Bk = r_BT.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
        inside = torch.zeros_like(r_BT).scatter(1, index_Bk, 1.0)
        aux = router.aux_weight * F.binary_cross_entropy_with_logits(r_BT, inside)
        agreement = ((r_BT > 0) == (inside > 0)).float().mean()
        router.note(aux, agreement.detach(), (r_BT > 0).float().mean())
        gate_Bk, lengths_B = r_BT.gather(1, index_Bk).sigmoid(), None
    else:
        B, T = r_BT.shape
        keep_BT, total = r_BT > 0, torch.full((), B * T, device=r_BT.device)
        if ctx.lengths is not None:
            keep_BT = keep_BT & (torch.arange(T, device=r_BT.device) < ctx.lengths[:, None])
            total = ctx.lengths.sum()
        lengths_B = keep_BT.sum(1)
        fraction = lengths_B.sum() / total.clamp(min=1)
        router.note(torch.zeros_like(fraction), torch.full_like(fraction, torch.nan), fraction)
        if state is not None:
            state["count"].copy_(lengths_B)
        static = ctx.static or x_BTD.is_cuda or torch.compiler.is_compiling()
        most = T if static else int(lengths_B.max())  # a sync, which costs a CPU nothing
        if most == 0:
            return None
        k = min(T, -(-most // ROWS) * ROWS)
        index_Bk = (~keep_BT).sort(dim=1, stable=True).indices[:, :k]
        gate_Bk = r_BT.gather(1, index_Bk).sigmoid() * keep_BT.gather(1, index_Bk)
    return Pick(index_Bk[..., None], gate_Bk[..., None].to(x_BTD.dtype), context_at(index_Bk, ctx, lengths_B))


def context_at(index_Bk: Tensor, ctx: Context, lengths_B: Tensor | None) -> Context:
    """The context of the tokens at `index_Bk`: their true positions and rotations."""
    B, row_B1 = len(index_Bk), torch.arange(len(index_Bk), device=index_Bk.device)[:, None]
    rope = {
        width: tuple(t.expand(B, *t.shape[-3:])[row_B1, index_Bk] for t in tables) for width, tables in ctx.rope.items()
    }
    return ctx._replace(pos=ctx.pos.expand(B, -1).gather(1, index_Bk), rope=rope, lengths=lengths_B)


def select_now(r_B1: Tensor, x_B1D: Tensor, ctx: Context, state: State) -> Pick | None:
    """A decode step: the next slot of these layers is each row's count, and rows that bypass keep their state. Eager on
    a CPU (`ctx.visible` is known) nothing runs where no row is picked; else all rows run, without a sync."""
    keep_B, count_B = r_B1[:, 0] > 0, state["count"]
    if ctx.keep is not None:
        keep_B = keep_B & ctx.keep
    visible, alone = None, False
    if ctx.visible is not None:
        if not keep_B.any():
            return None
        visible, alone = int(count_B[keep_B].max()) + 1, len(keep_B) == 1
    gate_B11 = (r_B1.sigmoid() * keep_B[:, None])[..., None].to(x_B1D.dtype)
    ctx = ctx._replace(pos=count_B[:, None].clone(), visible=visible, uniform=alone, keep=None if alone else keep_B)
    count_B += keep_B
    return Pick(None, gate_B11, ctx)


def recurse(
    blocks: Sequence[nn.Module], routers: Sequence[Router], x_BTD: Tensor, ctx: Context, states: list[State] | None
) -> Tensor:
    """All blocks for all tokens, then once more for each router, for the tokens that it picks of those before it
    -> [B, T, D]. States: one for each block of the first recursion, of the second, and so on."""
    part = states and states[: len(blocks)]  # of the recursion at hand

    def run(x: Tensor, ctx: Context) -> Tensor:
        for i, block in enumerate(blocks):
            x = block(x, ctx, part[i] if part else None)
        return x

    x, outer = run(x_BTD, ctx), []
    tokens = recursion_tokens(len(routers) + 1, x_BTD.size(1))
    for i, router in enumerate(routers, 1):
        part = states and states[i * len(blocks) : (i + 1) * len(blocks)]
        pick = select(router, tokens[i], x, ctx, part and part[0])
        if pick is None:
            break  # out once, out for good
        outer.append((pick, x))
        x, ctx = pick.apply(x, run), pick.ctx
    for pick, before in reversed(outer):
        x = pick.put_back(before, x)
    return x


def summary(depths: Sequence[Router], recursions: Sequence[Router]) -> dict[str, Tensor]:
    """What the routers of the blocks and of the recursions noted in the last forward, without a sync:
    - aux_loss: as it is added to the training loss.
    - router_agreement: part of the tokens on which r > 0 agrees with top-k, mean over the routers; NaN in evaluation.
    - routed_fraction: part of the tokens with r > 0, mean over the routed blocks.
    - mean_depth: recursions of a token under the rule; in training, where top-k decides who goes on, as if that were
      independent of the next score.
    """
    zero = depths[0].weight if depths else recursions[0].weight
    zero = torch.zeros(4, device=zero.device)
    rows = [[zero if r.record is None else r.record.detach() for r in routers] for routers in (depths, recursions)]
    sums = torch.stack(rows[0] + rows[1])
    means = sums / sums[:, 3:].clamp(min=1)
    result = {"aux_loss": sums[:, 0].sum(), "router_agreement": means[:, 1].mean()}
    if depths:
        result["routed_fraction"] = means[: len(depths), 2].mean()
    if recursions:
        result["mean_depth"] = 1 + means[len(depths) :, 2].cumprod(0).sum()
    return result
