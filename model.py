"""HYDRA: a hybrid-attention transformer, a pre-norm trunk whose attention differs from layer to layer.

- The layer mix is a string tiled over the depth. "MMCCCLML" (M = MQA, C = CCQA, L = MLA; see attention.py) is the
  8-layer macro-block, three of them make the 24-layer transformer; "A" (MHA) and "G" (GQA) are the baselines.
- Block: x = x + alpha * attn(norm(x)), x = x + mlp(norm(x)); SwiGLU (arXiv:2002.05202), RMSNorm (1910.07467).
- Routing (routing.py): blocks that a part of the tokens skips, blocks that are run several times, or both.
- Tied embedding and head; a loss that never holds the logits of a large vocabulary as a whole.
- Generation from preallocated states, one per layer, batched over prompts of different lengths.
- Closed formulas for parameters, FLOPs and the bytes of a decoding state, which the tests hold against the modules.
Left out: dropout, biases, learned positions, loading of other projects' weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import CCQA, MLA, Context, Linear, RMSNorm, State, choose_backend, linear, make_attention, make_context
from configurator import UserError, need
from routing import AUX_DEPTHS, AUX_RECURSIONS, Router, depth_tokens, recurse, recursion_tokens, select, summary

ALPHA = {"A": 1.0, "G": 1.0, "M": 1.0, "C": 0.5, "L": 0.5}  # scale of the attention's residual line
# A loss makes at most this many logits at a time, and returns them only if that is all of them (128 MiB in fp32).
MAX_LOGITS = 2**25
IGNORE = -1  # targets that the loss skips


@dataclass(frozen=True)
class HydraConfig:
    """The shape of a model; raises UserError, in one line, where the numbers do not fit together."""

    vocab_size: int = 4096  # size of the vocabulary, at least the tokenizer's
    block_size: int = 256  # T, the longest text that the model is trained on, in tokens
    dim: int = 256  # D, model width
    n_head: int = 4  # H, query heads of every layer
    n_kv_head: int = 4  # G, key/value heads of CCQA and GQA layers
    n_layer: int = 8  # blocks; the pattern is tiled over them
    pattern: str = "MMCCCLML"  # attention of each layer: A MHA, G GQA, M MQA, C CCQA, L MLA
    mlp_ratio: float = 2.0  # SwiGLU's hidden width over D, rounded up to a multiple of 256
    compression: int = 4  # C, CCQA's latent is D/C wide
    latent_head_dim: int = 32  # width of CCQA's heads, 0 = D/C/n_head; wider ones are fewer, at the same latent
    conv_kernel: int = 3  # taps of each of CCQA's two causal convolutions, 0 = no convolution
    qk_gain: float = 0.25  # gain of CCQA's QK-mean coupling, 0 to 0.5, 0 = no coupling
    value_shift: bool = True  # half of CCQA's values come from the previous token
    latent_ratio: float = 0.5  # MLA's latent is D times this wide
    window: int = 0  # MQA layers see this many last tokens, 0 = all
    rope_theta: float = 10000.0  # base of the rotary frequencies
    norm_eps: float = 1e-6  # epsilon of every RMSNorm
    mod_capacity: float = 0.0  # part of the tokens that goes through every other block, 0 = all through all (no MoD)
    mor_recursions: int = 1  # the blocks are run this many times, from the second on for fewer tokens, 1 = no MoR
    attn_backend: str = "auto"  # attention core: auto, flex (FlexAttention, compiled) or sdpa

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "dim", "n_head", "n_kv_head", "n_layer", "compression",
                     "mor_recursions"):  # fmt: skip
            need(self, name, getattr(self, name) >= 1, "it must be at least 1")
        for name in ("conv_kernel", "window", "latent_head_dim"):
            need(self, name, getattr(self, name) >= 0, "it must be 0 or positive")
        for name in ("mlp_ratio", "rope_theta", "norm_eps"):
            need(self, name, getattr(self, name) > 0, "it must be positive")
        need(self, "pattern", len(self.pattern) > 0, "name at least one layer, such as MMCCCLML")
        for letter in self.pattern:
            need(self, "pattern", letter in ALPHA, f"unknown letter {letter!r}: use {', '.join(ALPHA)}")
        need(self, "attn_backend", self.attn_backend in ("auto", "flex", "sdpa"), "use auto, flex or sdpa")
        need(self, "mod_capacity", 0 <= self.mod_capacity <= 1, "choose a value from 0 (off) to 1")
        remedy = f"every other block is routed, so that n_layer={self.n_layer} has none: use two or more"
        need(self, "mod_capacity", self.mod_capacity == 0 or self.n_layer > 1, remedy)
        need(self, "qk_gain", 0 <= self.qk_gain <= 0.5, "choose a value from 0 to 0.5")
        self._check_heads()

    def _check_heads(self) -> None:
        """Heads must divide their widths, and rotated widths must be even; only the letters in use are asked."""
        D, H, letters = self.dim, self.n_head, set(self.layers)
        if letters & set("CG"):
            need(self, "n_kv_head", H % self.n_kv_head == 0, f"it must divide n_head={H}")
        if letters & set("AGM"):
            need(self, "dim", D % (2 * H) == 0, f"heads need an even width: use a multiple of 2*n_head={2 * H}")
        if "C" in letters and self.latent_head_dim:
            fits = D % self.compression == 0 and D // self.compression % self.latent_head_dim == 0
            remedy = f"CCQA's heads need an even width that divides dim/compression={D / self.compression:g}"
            need(self, "latent_head_dim", fits and self.latent_head_dim % 2 == 0, remedy)
        elif "C" in letters:
            unit = 2 * H * self.compression
            remedy = f"CCQA's heads need an even width: use a multiple of 2*n_head*compression={unit}"
            need(self, "dim", D % unit == 0, f"{remedy}, or another compression")
        if "L" in letters:
            R = D * self.latent_ratio
            need(self, "latent_ratio", 0 < self.latent_ratio <= 1, "choose a value above 0 and at most 1")
            remedy = f"MLA's latent, dim*latent_ratio={R:g}, must be a multiple of 4*n_head={4 * H}"
            whole = abs(R - self.latent) < 1e-6 and self.latent > 0 and self.latent % (4 * H) == 0
            need(self, "latent_ratio", whole, f"{remedy}: change dim, n_head or latent_ratio")

    @property
    def layers(self) -> str:
        """The letter of every layer, pattern tiled over the depth."""
        return (self.pattern * -(-self.n_layer // len(self.pattern)))[: self.n_layer]

    @property
    def mlp_hidden(self) -> int:
        return math.ceil(self.mlp_ratio * self.dim / 256) * 256

    @property
    def ccqa_heads(self) -> tuple[int, int, int]:
        """(H, G, K) of CCQA. Heads of another width than the default's keep the group ratio as far as it divides: G is
        the divisor of H that is nearest to it, by its logarithm."""
        L, ratio = self.dim // self.compression, self.n_head / self.n_kv_head
        K = self.latent_head_dim or L // self.n_head
        H = L // K
        G = min((g for g in range(1, H + 1) if H % g == 0), key=lambda g: abs(math.log(H / g / ratio)))
        return H, G, K

    @property
    def latent(self) -> int:
        """R, the width of MLA's latent."""
        return round(self.dim * self.latent_ratio)


class GatedDown(torch.autograd.Function):
    """(silu(gate) * up) W^T of gate and up side by side. It keeps those two alone for the backward, which makes the
    product again: one pass over it, for half of what a SwiGLU would keep and a quarter of what a layer keeps."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weight: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        ctx.save_for_backward(gate_up, weight)
        return F.linear(F.silu(gate) * up, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        silu, grad_product = F.silu(gate), grad @ weight
        grad_weight = grad.flatten(0, -2).t() @ (silu * up).flatten(0, -2)
        grad_gate = torch.ops.aten.silu_backward(grad_product * up, gate)
        return torch.cat((grad_gate, grad_product * silu), dim=-1), grad_weight


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), gate and up as one projection (arXiv:2002.05202, eq. 6)."""

    def __init__(self, c: HydraConfig):
        super().__init__()
        self.gate_up = Linear(c.dim, 2 * c.mlp_hidden)
        self.down = Linear(c.mlp_hidden, c.dim)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if gate_up.requires_grad:
            return GatedDown.apply(gate_up, self.down.weight.to(gate_up.dtype))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class PackedLinear(nn.Module):
    """A linear map for inference on a CPU, its weights in the block order of oneDNN, which a product of few rows reads
    at 1.3-2 times the rate of plain ones. The operators are torch's own, those that its compiler uses when it freezes
    weights, but private: they belong to the pinned version."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.packed.dtype), self.packed, None, "none", [], "")


class Block(nn.Module):
    """One layer: attention, then SwiGLU, each on its own residual line."""

    def __init__(self, letter: str, c: HydraConfig):
        super().__init__()
        self.alpha = ALPHA[letter]
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.attn = make_attention(letter, c)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = SwiGLU(c)

    def forward(self, x_BTD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        x_BTD = x_BTD + self.alpha * self.attn(self.attn_norm(x_BTD), ctx, state)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class MoD(Block):
    """A block that a part of the tokens goes through, see routing.py."""

    def __init__(self, letter: str, c: HydraConfig):
        super().__init__(letter, c)
        self.capacity, self.router = c.mod_capacity, Router(c.dim, AUX_DEPTHS)

    def forward(self, x_BTD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        pick = select(self.router, depth_tokens(self.capacity, x_BTD.size(1)), x_BTD, ctx, state)
        if pick is None:
            return x_BTD
        block = super().forward
        return pick.put_back(x_BTD, pick.apply(x_BTD, lambda x, ctx: block(x, ctx, state)))


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with x is computed in: autocast's dtype where that is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of x W^T against targets, `rows` rows of logits at a time. The gradients are made in the
    forward, where the logits of a chunk are at hand: the products are the plain loss's three, none is done twice,
    and no more than one chunk of fp32 logits exists at any time. `grads`: whether there will be a backward, which
    autograd does not tell a forward (needs_input_grad is true for a weight in evaluation too)."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: int, dtype: torch.dtype, grads: bool):
        x, weight = x_ND.to(dtype), weight_VD.to(dtype)
        grad_x = torch.empty_like(x_ND) if grads else None
        grad_weight = torch.zeros_like(weight_VD) if grads else None
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for part in range(0, x.size(0), rows):
            s = slice(part, part + rows)
            logits = (x[s] @ weight.t()).float()
            keep = (targets_N[s] != IGNORE)[:, None]
            index = targets_N[s].clamp(min=0)[:, None]
            norm = logits.logsumexp(-1, keepdim=True)
            loss += ((norm - logits.gather(1, index)) * keep).sum()
            if grads:  # d loss / d logits = softmax - onehot, written over the logits
                grad = logits.sub_(norm).exp_()
                grad.scatter_add_(1, index, torch.full_like(norm, -1.0)).mul_(keep)
                grad = grad.to(dtype)
                grad_x[s] = grad @ weight
                if dtype == grad_weight.dtype:
                    grad_weight.addmm_(grad.t(), x[s])
                else:
                    grad_weight += grad.t() @ x[s]
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss, grad_weight * grad_loss, None, None, None, None


@dataclass
class Decoding:
    """What generation keeps between two tokens, see `Hydra.new_state`."""

    layers: list[State]  # of every block, of the first recursion, of the second, and so on
    pos_B: Tensor  # int64 [B], tokens of each row so far: the position of its next one
    slots: int  # tokens that a row may have
    # what the caller may say without asking the device, for views and plain writes, which a CPU is faster with:
    visible: int | None = None  # the longest row's tokens; None = all slots are read, masked
    uniform: bool = False  # all rows have `visible` tokens

    def bytes(self, filled: bool = False) -> int:
        """What is allocated, counters aside; a router may pick every token, so a routed layer has a slot for each. Or
        the part that is `filled`: of the slots, those of the tokens that went through the layer."""
        total = 0
        for layer in self.layers:
            for name, t in ((name, t) for name, t in layer.items() if name != "count"):
                size = t.numel() * t.element_size()
                if filled and not name.endswith("tail"):
                    used = layer.get("count", self.pos_B).clamp(max=t.size(1)).sum().item()
                    size = size // (t.size(0) * t.size(1)) * used
                total += size
        return total


class Hydra(nn.Module):
    """The model: `logits, loss = model(idx, targets)`."""

    def __init__(self, config: HydraConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        routed = [bool(config.mod_capacity) and i % 2 == 1 for i in range(config.n_layer)]
        kinds = zip(config.layers, routed, strict=True)
        self.blocks = nn.ModuleList((MoD if skips else Block)(letter, config) for letter, skips in kinds)
        self.recursion_routers = nn.ModuleList(
            Router(config.dim, AUX_RECURSIONS) for _ in range(config.mor_recursions - 1)
        )
        self.static = False  # to set where blocks are compiled one by one: no shape follows the data, see routing.py
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.rope_widths = {block.attn.rope_width for block in self.blocks}
        self.endless = config.window > 0 and set(config.layers) == {"M"}  # no layer keeps more than its window
        self.packed_head: PackedLinear | None = None  # see `pack`
        self.decoders: list[nn.Module] = []  # see `compile_decoding`
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every parameter once, by its module's role. Residual projections are smaller, so that the trunk's variance
        does not grow with the depth (GPT-2); CCQA's depthwise taps start as the identity and its grouped ones at
        1/sqrt(fan in): with 0.02 for both, CCQA loses most of what it gains."""
        std, done = 0.02, []
        residual = {m for block in self.blocks for m in (block.attn.out, block.mlp.down)}
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                depth = self.config.n_layer * self.config.mor_recursions
                scale = std / math.sqrt(2 * depth) if module in residual else std
                done.append(nn.init.normal_(module.weight, std=scale))
            elif isinstance(module, Router):
                done.append(nn.init.normal_(module.weight, std=std))
            elif isinstance(module, RMSNorm):
                done.append(nn.init.ones_(module.weight))
            elif isinstance(module, CCQA):
                done.append(nn.init.ones_(module.k_temperature))
                if module.conv_kernel:
                    done.append(nn.init.zeros_(module.conv_depthwise))
                    module.conv_depthwise[:, -1] = 1.0  # the last tap is the present token
                    fan_in = module.head_width * module.conv_kernel
                    done.append(nn.init.normal_(module.conv_grouped, std=fan_in**-0.5))
        assert sorted(map(id, done)) == sorted(map(id, self.parameters())), "a parameter is not initialised once"

    def backend(self, compiled: bool, grad: bool) -> dict[str, tuple[str, str]]:
        """Attention core of each letter in use, letter -> (backend, reason); UserError if the one asked for cannot."""
        device = self.embed.weight.device.type
        attns = {letter: block.attn for letter, block in zip(self.config.layers, self.blocks, strict=True)}
        return {
            letter: choose_backend(self.config.attn_backend, device, attn.head_width, compiled, grad)
            for letter, attn in attns.items()
        }

    def context(self, pos: Tensor) -> Context:
        """Rotation tables at positions `pos` [T] or [B, T] and, where FlexAttention may run, its block masks."""
        flex = self.config.attn_backend != "sdpa" and (pos.is_cuda or self.config.attn_backend == "flex")
        c, T, masks = self.config, pos.shape[-1], set()
        if flex:  # in evaluation every layer is given room for all tokens
            shapes = layer_tokens(c, T) if self.training else [(letter, T) for letter in c.layers]
            masks = {(tokens, c.window if letter == "M" else 0) for letter, tokens in shapes}
        return make_context(pos, self.rope_widths, c.rope_theta, masks)._replace(static=self.static)

    def forward(self, idx_BT: Tensor, targets_BT: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Token ids [B, T] -> (logits, loss). Without targets: the last position's logits [B, 1, V], and None. With
        targets [B, T] (-1 = ignored): the mean cross-entropy in nats, fp32, and the logits [B, T, V] where they are
        at most MAX_LOGITS numbers, None where they are more. Raises UserError for more than block_size tokens."""
        B, T = idx_BT.shape
        if T > self.config.block_size:
            raise UserError(f"{T} tokens do not fit: crop the text to block_size={self.config.block_size}")
        x_BTD = self.trunk(idx_BT, self.context(torch.arange(T, device=idx_BT.device)))
        if targets_BT is None:
            return self.head(x_BTD[:, -1:]), None
        return self.loss(self.norm(x_BTD), targets_BT)

    def head(self, x: Tensor) -> Tensor:
        """Logits of the trunk's output: the embedding's rows are the head's."""
        x = self.norm(x)
        return self.packed_head(x) if self.packed_head else linear(x, self.embed.weight)

    def trunk(self, idx_BT: Tensor, ctx: Context, states: list[State] | None = None) -> Tensor:
        """Token ids [B, T] -> [B, T, D], before the final norm."""
        if not ctx.decode:
            for router in self.depth_routers + [*self.recursion_routers]:
                router.record = None
        blocks = self.decoders if ctx.decode and self.decoders else self.blocks
        return recurse(blocks, self.recursion_routers, self.embed(idx_BT), ctx, states)

    @property
    def depth_routers(self) -> list[Router]:
        return [block.router for block in self.blocks if isinstance(block, MoD)]

    def aux_loss(self) -> Tensor | float:
        """What training adds to its last forward's loss, so that the routers' causal rule learns; 0 without any."""
        records = [r.record for r in self.depth_routers + [*self.recursion_routers]]
        return sum((record[0] for record in records if record is not None), start=0.0)

    def routing(self) -> dict[str, Tensor]:
        """Statistics of the last forward, see `routing.summary`; empty without routers."""
        depths = self.depth_routers
        return summary(depths, self.recursion_routers) if depths or len(self.recursion_routers) else {}

    def loss(self, x_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor | None, Tensor]:
        """(logits or None, mean cross-entropy in nats) of the trunk's normed output: in one piece where the logits are
        few, else in chunks, so that they never are in memory all at once."""
        x, weight, targets = x_BTD.flatten(0, 1), self.embed.weight, targets_BT.flatten()
        rows = max(1, MAX_LOGITS // weight.size(0))
        if x.size(0) <= rows:
            logits = F.linear(x, weight)
            loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE)
            return logits.unflatten(0, targets_BT.shape), loss
        grads = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        loss = ChunkedCrossEntropy.apply(x, weight, targets, rows, compute_dtype(x), grads)
        return None, loss / (targets != IGNORE).sum()

    # ---- decoding

    @torch.no_grad()
    def pack(self) -> None:
        """Store the matrices for decoding on a CPU, see `PackedLinear`; the model cannot be trained or saved any more.
        The head is stored once more, since the embedding looks up plain rows. Nothing happens where oneDNN is missing
        or on another device."""
        if self.embed.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return
        for module in list(self.modules()):
            if isinstance(module, MLA):  # a decode step absorbs the rest of `up`, which stays for the prefill
                module.up_query = PackedLinear(module.up.weight[: module.latent + module.rope_width])
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and not (isinstance(module, MLA) and name == "up"):
                    setattr(module, name, PackedLinear(child.weight))
        self.packed_head = PackedLinear(self.embed.weight)

    def compile_decoding(self) -> None:
        """Compile the decode step block by block, and the head. `generate` then uses static shapes. On a CPU this is
        for one long text: it takes 10-20 s once, and for several rows the product of `pack` is better."""
        torch._dynamo.config.recompile_limit = 64  # letters x lengths of the state, and all share Block.forward
        self.decoders = [torch.compile(block, fullgraph=True, dynamic=False) for block in self.blocks]
        self.head = torch.compile(self.head, fullgraph=True, dynamic=False)

    def new_state(self, B: int, S: int) -> "Decoding":
        """An empty state for B texts of up to S tokens each, in the dtype that the model computes in. Its size is
        kv_bytes(config, S, itemsize, allocated=True) + tail_bytes(config, itemsize) for each of them."""
        weight = self.embed.weight
        like = weight.new_empty((), dtype=compute_dtype(weight))
        layers, zeros = [], partial(torch.zeros, B, dtype=torch.int64, device=weight.device)
        for recursion in range(self.config.mor_recursions):
            count = zeros()  # tokens of each row in this recursion; a routed block has its own
            for block in self.blocks:
                layers.append(block.attn.new_state(B, S, like))
                if recursion or isinstance(block, MoD):
                    layers[-1]["count"] = zeros() if isinstance(block, MoD) else count
        return Decoding(layers, zeros(), S)

    def _check_room(self, tokens: int, state: "Decoding") -> None:
        if tokens > state.slots and not self.endless:
            raise UserError(f"{tokens} tokens do not fit into a state of {state.slots}: ask new_state for more")

    def prefill(self, idx_BT: Tensor, lengths_B: Tensor, state: "Decoding") -> Tensor:
        """Token ids [B, T], row b's first lengths_B[b] >= 1 are its text, into an empty state -> logits [B, V] behind
        each text. Padding on the right is never seen: the model is causal, and decoding overwrites it."""
        self._check_room(idx_BT.size(1), state)
        ctx = self.context(torch.arange(idx_BT.size(1), device=idx_BT.device))._replace(lengths=lengths_B)
        x_BTD = self.trunk(idx_BT, ctx, state.layers)
        state.pos_B.copy_(lengths_B)
        last = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), lengths_B - 1]
        return self.head(last)

    def decode(self, token_B: Tensor, state: "Decoding") -> Tensor:
        """One more token for every row -> logits [B, V]. No sync and no shape that grows where state.visible is None,
        so that it compiles to one graph and can be captured; on a CPU the views up to `visible` are faster."""
        visible = None if state.visible is None else state.visible + 1
        self._check_room(visible or 0, state)
        ctx = make_context(state.pos_B[:, None], self.rope_widths, self.config.rope_theta)
        ctx = ctx._replace(decode=True, visible=visible, uniform=state.uniform and visible is not None)
        x_BTD = self.trunk(token_B[:, None], ctx, state.layers)
        state.pos_B += 1
        state.visible = visible
        return self.head(x_BTD[:, -1])

    @torch.no_grad()
    def generate(
        self, prompts: Tensor | list[Tensor], max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
        top_p: float = 1.0, stop: int | None = None, generator: torch.Generator | None = None,
        static: bool | None = None, state: Decoding | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yields the next token ids [B] as they come, at most max_new_tokens times.

        prompts: token ids [B, T], or a list of B tensors [T_b] of different lengths, at least one token each; no row
        sees another or its padding. temperature, top_k, top_p: see `pick`. stop: a token id that ends its row, which
        then yields only that id; the last row's end ends the generation. static: shapes that do not follow the text,
        for compiled or graph-captured steps; None = on CUDA and after `compile_decoding`. state: an empty one to use,
        for a caller that looks at it afterwards. Raises UserError for values that cannot be, and where the text would
        outgrow block_size, unless every layer has a window.
        """
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        rows = list(prompts)
        longest, shortest = max(map(len, rows), default=0), min(map(len, rows), default=0)
        slots, limit = longest + max_new_tokens, self.config.block_size
        if shortest < 1:
            raise UserError("prompt='': it has no token: give at least one, such as the tokenizer's end of text")
        if slots > limit and not self.endless:
            raise UserError(f"max_new_tokens={max_new_tokens}: with a prompt of {longest} tokens that is more than "
                            f"block_size={limit}: ask for fewer, or shorten the prompt")  # fmt: skip
        if state and (len(state.pos_B) != len(rows) or (state.slots < slots and not self.endless)):
            raise UserError(f"a state of {len(state.pos_B)} texts of up to {state.slots} tokens: make one by "
                            f"new_state({len(rows)}, {slots})")  # fmt: skip
        device = self.embed.weight.device
        idx_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        static = device.type == "cuda" or bool(self.decoders) if static is None else static
        # static lengths are powers of two, so that few shapes are ever compiled
        state = state or self.new_state(len(rows), 1 << (slots - 1).bit_length() if static else slots)
        if static:
            idx_BT = F.pad(idx_BT, (0, min(1 << (longest - 1).bit_length(), state.slots) - longest))
        lengths_B = torch.tensor([len(row) for row in rows], device=device)
        logits_BV = self.prefill(idx_BT, lengths_B, state)
        state.visible, state.uniform = (None, False) if static else (longest, shortest == longest)
        ended_B = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for left in range(max_new_tokens, 0, -1):
            token_B = pick(logits_BV.float(), temperature, top_k, top_p, generator)
            if stop is not None:
                token_B = token_B.masked_fill(ended_B, stop)
                ended_B |= token_B == stop
            yield token_B
            if left == 1 or (stop is not None and ended_B.all()):
                return
            logits_BV = self.decode(token_B, state)

    def optimizer_groups(self, weight_decay: float) -> list[dict]:
        """Decay on matrices and embeddings, none on gains, temperatures and depthwise filters, which are vectors."""
        filters = {id(m.conv_depthwise) for m in self.modules() if isinstance(m, CCQA) and m.conv_kernel}
        vectors = [p for p in self.parameters() if p.dim() < 2 or id(p) in filters]
        chosen = set(map(id, vectors))
        matrices = [p for p in self.parameters() if id(p) not in chosen]
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """UserError for values of `Hydra.generate` that cannot be."""
    for name, value, good, remedy in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "it must not be negative"),
        ("temperature", temperature, temperature == 0 or temperature >= 1e-3, "use 0 (the likeliest token) or more"),
        ("top_k", top_k, top_k >= 0, "use 0 (all tokens) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "choose a value above 0 and at most 1"),
    ):
        if not good:
            raise UserError(f"{name}={value!r}: {remedy}")


def pick(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Next token ids [B] from fp32 logits: softmax at `temperature` over the `top_k` likeliest tokens (0 = all), of
    those the fewest whose probability reaches `top_p` (arXiv:1904.09751); temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV, order_BV = (logits_BV / temperature).sort(dim=-1, descending=True)
    if top_k:
        logits_BV[:, top_k:] = -math.inf
    probs_BV = logits_BV.softmax(-1)
    probs_BV[probs_BV.cumsum(-1) - probs_BV >= top_p] = 0.0  # the token that crosses top_p stays
    return order_BV.gather(1, torch.multinomial(probs_BV, 1, generator=generator)).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# accounting by closed formula, per layer letter


def layer_tokens(c: HydraConfig, T: int) -> list[tuple[str, int]]:
    """(letter, tokens) of every layer of every recursion for texts of T tokens, at the routers' training capacities."""
    return [
        (letter, depth_tokens(c.mod_capacity, tokens) if c.mod_capacity and i % 2 else tokens)
        for tokens in recursion_tokens(c.mor_recursions, T)
        for i, letter in enumerate(c.layers)
    ]


def kv_heads(c: HydraConfig, letter: str) -> int:
    """Key/value heads of the uncompressed letters."""
    return {"A": c.n_head, "G": c.n_kv_head, "M": 1}[letter]


def attention_params(c: HydraConfig, letter: str) -> int:
    """Parameters of one attention, its pre-out norm included, the block's norms not."""
    D, H, R = c.dim, c.n_head, c.latent
    if letter in "AGM":
        G = kv_heads(c, letter)
        return 2 * D * D + 2 * D * G * (D // H) + D
    if letter == "C":
        H, G, K = c.ccqa_heads
        L, kappa = H * K, G * K
        convolutions = c.conv_kernel * (L + kappa) * (1 + K)
        return 2 * D * L + 2 * D * kappa + convolutions + G + L
    return 2 * D * R + R * (2 * R + R // 2 + R // H // 2) + 2 * R


def count_params(c: HydraConfig) -> int:
    """All parameters; the head is the embedding."""
    mlp = 3 * c.dim * c.mlp_hidden
    routers = c.mor_recursions - 1 + (c.n_layer // 2 if c.mod_capacity else 0)
    return (c.vocab_size + 1 + routers) * c.dim + sum(attention_params(c, a) + mlp + 2 * c.dim for a in c.layers)


def attention_flops(c: HydraConfig, letter: str, T: int) -> float:
    """Forward FLOPs of one attention per token, two a multiply-add, over the causal mean of T/2 keys."""
    D, H, R, W = c.dim, c.n_head, c.latent, c.window
    if letter in "AGM":
        G = kv_heads(c, letter)
        keys = W * (1 - W / (2 * T)) if letter == "M" and 0 < W < T else T / 2
        return 4 * D * D + 4 * D * G * (D // H) + 4 * keys * D
    if letter == "C":
        H, G, K = c.ccqa_heads
        L, kappa = H * K, G * K
        return 4 * D * L + 4 * D * kappa + 2 * c.conv_kernel * (L + kappa) * (1 + K) + 2 * T * L
    return 4 * D * R + 2 * R * (2 * R + R // 2 + R // H // 2) + 2 * T * R


def flops_per_token(c: HydraConfig, T: int) -> float:
    """Forward FLOPs per token at T tokens, head included, at the routers' training capacities; training takes three
    times as many."""
    mlp, candidates = 6 * c.dim * c.mlp_hidden, recursion_tokens(c.mor_recursions, T)
    routers = sum(candidates[:-1]) + (c.n_layer // 2 * sum(candidates) if c.mod_capacity else 0)
    layers = sum(tokens * (attention_flops(c, a, tokens) + mlp) for a, tokens in layer_tokens(c, T))
    return 2 * c.dim * c.vocab_size + (layers + 2 * c.dim * routers) / T


def state_values(c: HydraConfig, letter: str) -> int:
    """Values that decoding keeps per past token in one layer: keys and values, or MLA's latent and shared rope key."""
    D, H = c.dim, c.n_head
    if letter in "AGM":
        return 2 * kv_heads(c, letter) * (D // H)
    if letter == "C":
        return 2 * math.prod(c.ccqa_heads[1:])
    return c.latent + c.latent // H // 2


def kv_bytes(c: HydraConfig, T: int, itemsize: int = 2, allocated: bool = False) -> int:
    """Bytes that the decoding state of one sequence of T tokens fills over all layers (windowed MQA keeps `window`
    tokens), see `tail_bytes` for the constant part. Routed layers hold the tokens that went through them: as many as
    the training capacity if the causal rule keeps to it, up to T if not, which is what is `allocated`."""
    layers = [(a, T) for a in c.layers * c.mor_recursions] if allocated else layer_tokens(c, T)
    kept = [(a, min(tokens, c.window) if a == "M" and c.window else tokens) for a, tokens in layers]
    return itemsize * sum(tokens * state_values(c, a) for a, tokens in kept)


def tail_bytes(c: HydraConfig, itemsize: int = 2) -> int:
    """Bytes of CCQA's constant tails of one sequence: 2*(conv_kernel-1) rows of q and k, one row of shifted values."""
    if "C" not in c.layers:
        return 0
    H, G, K = c.ccqa_heads
    L, kappa = H * K, G * K
    rows = 2 * max(0, c.conv_kernel - 1)
    return itemsize * c.mor_recursions * c.layers.count("C") * (rows * (L + kappa) + c.value_shift * kappa // 2)
