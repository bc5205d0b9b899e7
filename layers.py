"""The parts of a trunk that are not attention: linear maps, RMSNorm, filters over time, SwiGLU, the residual line's
scales, and the loss over a large vocabulary.

Backwards are written by hand where that keeps less than autograd would; a second derivative is refused. Modules take
widths, never a configuration, and fill the parameters of their own in `init_weights`.

Letters in shapes: N rows (tokens of all texts), D model width, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE = -1  # targets that the loss skips
# A loss makes at most this many logits at a time, and returns them only if that is all of them (128 MiB in fp32).
MAX_LOGITS = 2**25
COMPILED_ROWS = 8  # a compiled loss makes this many times as many: they stay in bf16, and launches are fewer


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T. Compiled for a single row on a CPU it is written as a sum, of which Inductor makes a loop over the rows of
    the weight: that reads it at twice the rate of the library's product, and nothing else bounds such a step."""
    single_row = x.numel() == weight.size(1)
    if single_row and x.device.type == "cpu" and torch.compiler.is_compiling():
        return (x.float().unsqueeze(-2) * weight.float()).sum(-1).to(x.dtype)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """A linear map without bias, see `linear`."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm on a CPU, where torch's keeps the normed input too. This keeps its input, as the residual line does, and
    one number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, rstd = ctx.saved_tensors
        grad = grad.to(rstd.dtype)
        normed = x * rstd
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        grad_x = rstd * (grad - normed * (grad * normed).mean(-1, keepdim=True))
        return grad_x.to(x.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """RMSNorm with a learned gain over the last axis (arXiv:1910.07467, eq. 4)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)  # the fused kernel wants one dtype; under autocast the input may be bf16
        if x.requires_grad and not x.is_cuda:
            return RMSNormFunction.apply(x, weight, self.eps)
        return F.rms_norm(x, self.weight.shape, weight, self.eps)


class ResidualScale(nn.Module):
    """(x + b) * s + (y + c) * a of a residual line x and a layer's output y, four learned vectors (arXiv:2511.17127,
    the model of CCA's authors). It starts as x + alpha * y."""

    def __init__(self, width: int, alpha: float):
        super().__init__()
        self.alpha = alpha
        self.line_scale, self.line_bias, self.layer_scale, self.layer_bias = (
            nn.Parameter(torch.empty(width)) for _ in range(4)
        )

    def init_weights(self) -> None:
        nn.init.ones_(self.line_scale)
        nn.init.constant_(self.layer_scale, self.alpha)
        nn.init.zeros_(self.line_bias)
        nn.init.zeros_(self.layer_bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + self.line_bias) * self.line_scale + (y + self.layer_bias) * self.layer_scale


def moved(x_BTC: Tensor, tokens: int, doc_BT: Tensor | None) -> Tensor:
    """x moved on by so many tokens: zeros before the first one, and at those whose document begins in between."""
    T = x_BTC.size(1)
    x_BTC = F.pad(x_BTC, (0, 0, tokens, 0))[:, :T]
    if doc_BT is None:
        return x_BTC
    foreign_BT = F.pad(doc_BT, (tokens, 0), value=-1)[:, :T] != doc_BT
    return x_BTC.masked_fill(foreign_BT[..., None], 0)


def depthwise(x: Tensor, filters: Tensor) -> Tensor:
    """Filters [channels, taps] over time, the last tap at the present token, of x [B, taps - 1 + T, channels]."""
    taps = filters.size(1)
    T = x.size(1) - taps + 1
    y = x[:, :T] * filters[:, 0]
    for i in range(1, taps):
        y = y + x[:, i : i + T] * filters[:, i]
    return y


@torch.no_grad()
def fill_identity(filters: Tensor) -> None:
    nn.init.zeros_(filters)
    filters[:, -1] = 1.0


def convolve_at_once(x: Tensor, depthwise: Tensor, grouped: Tensor, doc_BT: Tensor | None = None) -> Tensor:
    """Both convolutions of texts [B, T, heads*K] as a GPU wants them: in turn one filter, whose tap s sums what
    tap i of `grouped` does to tap s-i of `depthwise`. One product makes the parts of all taps; the kernel that follows
    moves them to their tokens. (They are sliced, not unbound: the gradient of an unbind is a kernel for each.) Where
    both ends of a tap lie in one document, so do the tokens between that the two convolutions met in."""
    K, taps = grouped.shape[1:]
    pairs = grouped.unflatten(0, (-1, K)).unsqueeze(-1) * depthwise.unflatten(0, (-1, 1, K)).unsqueeze(-2)
    filters = F.pad(pairs, (0, taps)).flatten(-2)[..., :-taps].unflatten(-1, (taps, -1)).sum(-2)  # row i moved by i
    parts = torch.einsum("btni,nois->btnso", x.unflatten(-1, (-1, K)), filters.to(x.dtype))
    last = 2 * taps - 2
    return sum(moved(parts[:, :, :, last - i].flatten(2), i, doc_BT) for i in range(last + 1))


class GatedDown(torch.autograd.Function):
    """(silu(gate) * up) W^T of gate and up side by side. It keeps those two alone for the backward, which makes the
    product again: one pass over it, for half of what a SwiGLU would keep and a quarter of what a layer keeps."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_product = grad @ weight
        if torch.compiler.is_compiling():  # as the forward writes the product, a compiler would keep it after all
            sigmoid = gate.sigmoid()
            grad_gate = torch.ops.aten.silu_backward(grad_product * up, gate)
            made = torch.cat((grad_gate, grad_product * gate * sigmoid, up * gate * sigmoid), dim=-1)  # in one kernel
            grad_gate_up, product = made.split((gate_up.size(-1), gate.size(-1)), dim=-1)
            return grad_gate_up, grad.flatten(0, -2).t() @ product.flatten(0, -2)
        silu = F.silu(gate)
        grad_weight = grad.flatten(0, -2).t() @ (silu * up).flatten(0, -2)
        grad_gate = torch.ops.aten.silu_backward(grad_product * up, gate)
        return torch.cat((grad_gate, grad_product * silu), dim=-1), grad_weight


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), gate and up as one projection (arXiv:2002.05202, eq. 6)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if gate_up.requires_grad:
            return GatedDown.apply(gate_up, self.down.weight.to(gate_up.dtype))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with x is computed in: autocast's dtype where that is on, else x's own."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # "meta" has none
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def loss_chunk(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, grad_x_ND: Tensor | None,
               grad_weight_VD: Tensor | None) -> Tensor:  # fmt: skip
    """Cross-entropy [N] of x W^T, 0 at an ignored target, fp32. The gradient of its sum is written to `grad_x` and
    added to `grad_weight`, where they are given. Another target outside of the vocabulary fails at the gather;
    compiled, where that check is no sure one, its loss is NaN, which no step learns from."""
    V = weight_VD.size(0)
    kept = (targets_N != IGNORE)[:, None]
    index = targets_N[:, None] * kept
    logits = (x_ND @ weight_VD.t()).float()
    norm = logits.logsumexp(-1, keepdim=True)
    if torch.compiler.is_compiling():
        norm = torch.where((index >= 0) & (index < V), norm, math.nan)
        index = index.clamp(0, V - 1)
    nats = (norm - logits.gather(1, index)) * kept
    if grad_x_ND is None:
        return nats
    if torch.compiler.is_compiling():  # d nats / d logits = softmax - onehot, in one pass over the logits
        onehot = torch.arange(V, device=x_ND.device) == index
        grad = ((logits - norm).exp() - onehot.float()) * kept
    else:  # the same, written over the logits
        grad = logits.sub_(norm).exp_()
        grad.scatter_add_(1, index, torch.full_like(norm, -1.0)).mul_(kept)
    grad = grad.to(x_ND.dtype)
    grad_x_ND.copy_(grad @ weight_VD)
    if x_ND.dtype == grad_weight_VD.dtype:
        grad_weight_VD.addmm_(grad.t(), x_ND)
    else:
        grad_weight_VD += grad.t() @ x_ND
    return nats


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of x W^T against targets, `rows` rows of logits at a time by `chunk` (`loss_chunk`, or that
    compiled). The gradients are made in the forward, where the logits of a chunk are at hand: three products, none
    twice. `grads`: whether there will be a backward (needs_input_grad is true for a weight in evaluation too)."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: int, dtype: torch.dtype, grads: bool,
                chunk: Callable[..., Tensor]) -> Tensor:  # fmt: skip
        x, weight = x_ND.to(dtype), weight_VD.to(dtype)
        grad_x = torch.empty_like(x_ND) if grads else None
        grad_weight = torch.zeros_like(weight_VD) if grads else None
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, x.size(0), rows):
            part = slice(start, start + rows)
            grad_part = grad_x[part] if grads else None
            loss += chunk(x[part], weight, targets_N[part], grad_part, grad_weight).sum()
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss, grad_weight * grad_loss, None, None, None, None, None


def chunk_rows(N: int, most: int) -> int:
    """Rows of a compiled chunk: the largest divisor of N up to `most`, so that there is one shape; `most` itself where
    the divisors are much smaller."""
    rows = next(n for n in range(min(N, most), 0, -1) if N % n == 0)
    return rows if 4 * rows > min(N, most) else most


def cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor,
                  compiled: Callable[..., Tensor] | None = None) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(logits [N, V] or None, mean cross-entropy in nats, fp32) of x W^T against targets; IGNORE is skipped, any other
    target outside of the vocabulary is an error. In one piece where the logits are at most MAX_LOGITS numbers, else
    in chunks of rows, so that they never are in memory all at once. `compiled`: `loss_chunk` compiled, which never has
    a chunk in fp32 and takes larger ones."""
    rows = max(1, MAX_LOGITS // weight_VD.size(0))
    if x_ND.size(0) <= rows:
        logits = F.linear(x_ND, weight_VD)
        return logits, F.cross_entropy(logits.float(), targets_N, ignore_index=IGNORE)
    if compiled:
        rows = chunk_rows(x_ND.size(0), COMPILED_ROWS * rows)
    grads = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    total = ChunkedCrossEntropy.apply(
        x_ND, weight_VD, targets_N, rows, compute_dtype(x_ND), grads, compiled or loss_chunk)
    return None, total / (targets_N != IGNORE).sum()
