"""HYDRA: a hybrid-attention transformer, a pre-norm trunk whose attention differs from layer to layer.

- The layer mix is a string tiled over the depth. "MMCCCLML" (M = MQA, C = CCQA, L = MLA; see attention.py) is the
  8-layer macro-block, three of them make the 24-layer transformer; "A" (MHA) and "G" (GQA) are the baselines.
- Block: x = x + alpha * attn(norm(x)), x = x + mlp(norm(x)); SwiGLU, RMSNorm (layers.py).
- What makes a comparison fair is an option, off by default: QK-norm and a short convolution for every letter, fewer
  channels that turn, learned scales of the residual lines, CCQA without any of its parts.
- Routing (routing.py): blocks that a part of the tokens skips, blocks that are run several times, or both.
- Packed documents (doc_mask): nothing looks over an end of text, and positions begin again behind it.
- Tied embedding and head; a loss that never holds the logits of a large vocabulary as a whole.
Left out: dropout, biases, learned positions, loading of other projects' weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attention import KINDS, Context, LayerState, documents, make_context
from configurator import UserError, need
from layers import ResidualScale, RMSNorm, SwiGLU, compute_dtype, cross_entropy, linear, loss_chunk
from machine import choose_backend, compile_blocks, document_masks
from routing import Record, Routed, Router, is_routed, layer_tokens, recurse, recursion_routers, statistics

# Beyond these nothing could be trained, and even to count what it costs would take too long.
WIDEST, DEEPEST = 2**20, 2048
MOST_IDS = 2**32
MOST_POSITIONS = 2**24  # float32, in which rotations are computed, has no odd numbers above it


@dataclass(frozen=True)
class HydraConfig:
    """The shape of a model; raises UserError, in one line, where the numbers do not fit together."""

    vocab_size: int = 4096  # size of the vocabulary, at least the tokenizer's
    block_size: int = 256  # T, the longest text that the model is trained on, in tokens
    dim: int = 192  # D, model width
    n_head: int = 4  # H, query heads; CCQA may have fewer and wider ones, see latent_head_dim
    n_kv_head: int = 4  # G, key/value heads of GQA layers; in CCQA n_head over it is how many share one
    n_layer: int = 8  # blocks; the pattern is tiled over them
    pattern: str = "MMCCCLML"  # attention of each layer, by its letter
    mlp_ratio: float = 2.0  # SwiGLU's hidden width over D, rounded up to a multiple of mlp_multiple
    mlp_multiple: int = 256  # a small one lets shapes have equally many parameters
    compression: int = 4  # C, CCQA's latent is D/C wide
    latent_head_dim: int = -1  # width of CCQA's heads, -1 = what fits, nearest to 32, 0 = D/C/n_head; wider are fewer
    conv_kernel: int = 3  # taps of each of CCQA's two causal convolutions, 0 = no convolution
    qk_gain: float = 0.25  # gain of CCQA's QK-mean coupling, 0 to 0.5, 0 = no coupling
    value_shift: bool = True  # half of CCQA's values come from the previous token
    ccqa_norm: bool = True  # CCQA norms the queries and keys of each head
    qk_norm: bool = False  # the other letters do so too, and get CCQA's temperatures
    k_temperature: bool = True  # CCQA's keys, and those of qk_norm, have a learned factor for each head
    short_conv: int = 0  # taps of a causal depthwise convolution of q, k, v (MLA: its latent), not CCQA's, 0 = none
    latent_ratio: float = 0.5  # MLA's latent is D times this wide
    window: int = 0  # MQA layers see this many last tokens, 0 = all
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_fraction: float = 1.0  # part of the channels with a position that RoPE really turns, the first ones
    pre_out_norm: bool = True  # an RMSNorm of the merged heads in front of the output projection
    alpha: str = "fixed"  # scale of the residual lines: fixed (by the letter), one, or learned (layers.ResidualScale)
    norm_eps: float = 1e-6  # epsilon of every RMSNorm
    mod_capacity: float = 0.0  # part of the tokens that goes through every other block, 0 = all through all (no MoD)
    mor_recursions: int = 1  # the blocks are run this many times, from the second on for fewer tokens, 1 = no MoR
    mod_aux: float = 0.01  # weight of the auxiliary loss of MoD's routers
    mor_aux: float = 1e-3  # and of MoR's
    router: str = "learned"  # or random: a control, of the same capacity, that selects by position alone
    doc_mask: bool = False  # a token sees those of its own document alone, as if that were the whole text
    attn_backend: str = "auto"  # attention core: auto, flex (FlexAttention, compiled) or sdpa

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "dim", "n_head", "n_kv_head", "n_layer", "compression",
                     "mlp_multiple", "mor_recursions"):  # fmt: skip
            need(self, name, getattr(self, name) >= 1, "it must be at least 1")
        need(self, "dim", self.dim <= WIDEST, f"one matrix of dim x dim is {4e-9 * self.dim**2:,.0f} GB: lower it")
        need(self, "vocab_size", self.vocab_size <= MOST_IDS, "ids have 32 bits in a token file: lower it")
        remedy = f"positions beyond {MOST_POSITIONS:,} are not exact: lower it"
        need(self, "block_size", self.block_size <= MOST_POSITIONS, remedy)
        depth = self.n_layer * self.mor_recursions
        remedy = f"{depth:,} layers in a row take a step {depth / 1e3:,.0f} s or more: at most {DEEPEST:,}, lower one"
        need(self, "n_layer mor_recursions", depth <= DEEPEST, remedy)
        need(self, "window", self.window >= 0, "it must be 0 or positive")
        need(self, "latent_head_dim", self.latent_head_dim >= -1, "use -1 (what fits), 0 (D/C/n_head) or a width")
        need(self, "conv_kernel", 0 <= self.conv_kernel <= 64, "choose a number from 0 to 64")
        need(self, "short_conv", 0 <= self.short_conv <= 64, "choose a number from 0 to 64")
        need(self, "rope_fraction", 0 <= self.rope_fraction <= 1, "choose a value from 0 to 1")
        need(self, "alpha", self.alpha in ("fixed", "one", "learned"), "use fixed, one or learned")
        need(self, "mlp_multiple", self.mlp_multiple <= 65536, "choose a number such as 256, and at most 65536")
        need(self, "mlp_ratio", 0 < self.mlp_ratio <= 1000, "choose a value above 0, such as 3, and at most 1000")
        need(self, "latent_ratio", 0 < self.latent_ratio <= 1, "choose a value above 0 and at most 1")
        need(self, "rope_theta", 1 <= self.rope_theta <= 1e15, "choose a value from 1 to 1e15, such as 10000")
        need(self, "norm_eps", 1e-12 <= self.norm_eps <= 1, "choose a value from 1e-12 to 1, such as 1e-6")
        need(self, "qk_gain", 0 <= self.qk_gain <= 0.5, "choose a value from 0 to 0.5")
        need(self, "attn_backend", self.attn_backend in ("auto", "flex", "sdpa"), "use auto, flex or sdpa")
        need(self, "mod_capacity", 0 <= self.mod_capacity <= 1, "choose a value from 0 (off) to 1")
        for name in ("mod_aux", "mor_aux"):
            need(self, name, 0 <= getattr(self, name) <= 1e3, "choose a value from 0 to 1000")
        need(self, "router", self.router in ("learned", "random"), "use learned or random")
        remedy = "there is nothing to route: set mod_capacity or mor_recursions"
        need(self, "router", self.router == "learned" or self.mod_capacity or self.mor_recursions > 1, remedy)
        remedy = f"every other block is routed, so that n_layer={self.n_layer} has none: use two or more"
        need(self, "mod_capacity", self.mod_capacity == 0 or self.n_layer > 1, remedy)
        need(self, "pattern", len(self.pattern) > 0, "name at least one layer, such as MMCCCLML")
        for letter in dict.fromkeys(self.pattern):
            need(self, "pattern", letter in KINDS, f"unknown letter {letter!r}: use {', '.join(KINDS)}")
        for letter in sorted(set(self.layers)):
            KINDS[letter].check(self)

    @property
    def layers(self) -> str:
        """The letter of every layer, pattern tiled over the depth."""
        repeats = self.n_layer // len(self.pattern) + 1
        return (self.pattern * repeats)[: self.n_layer]

    @property
    def mlp_hidden(self) -> int:
        return math.ceil(self.mlp_ratio * self.dim / self.mlp_multiple) * self.mlp_multiple


class Block(nn.Module):
    """One layer: attention, then SwiGLU, each on its own residual line."""

    routed = False

    def __init__(self, letter: str, config: HydraConfig):
        super().__init__()
        self.alpha = 1.0 if config.alpha == "one" else KINDS[letter].alpha
        self.learned = config.alpha == "learned"
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = KINDS[letter].make(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.mlp_hidden)
        if self.learned:
            self.attn_scale = ResidualScale(config.dim, self.alpha)
            self.mlp_scale = ResidualScale(config.dim, 1.0)

    def forward(self, x_BTD: Tensor, ctx: Context, state: LayerState | None = None) -> Tensor:
        if self.learned:
            x_BTD = self.attn_scale(x_BTD, self.attn(self.attn_norm(x_BTD), ctx, state))
            return self.mlp_scale(x_BTD, self.mlp(self.mlp_norm(x_BTD)))
        x_BTD = x_BTD + self.alpha * self.attn(self.attn_norm(x_BTD), ctx, state)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class MoD(Routed, Block):
    """A block that a part of the tokens goes through, see routing.py."""


class Output(NamedTuple):
    """What a forward returns."""

    logits: Tensor | None  # [B, T, V], None where more than MAX_LOGITS; without targets the last ones, [B, 1, V]
    loss: Tensor | None  # what to train on: cross_entropy, in training mode with the routers' auxiliary losses
    cross_entropy: Tensor | None  # mean over the targets, nats, fp32
    routing: dict[str, Tensor]  # see `routing.statistics`; empty without routers


class Hydra(nn.Module):
    """The model: `model(idx, targets).loss.backward()`."""

    def __init__(self, config: HydraConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList()
        for i, letter in enumerate(config.layers):
            self.blocks.append(MoD(letter, config, i) if is_routed(config, i) else Block(letter, config))
        self.recursion_routers = nn.ModuleList(recursion_routers(config))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.rope_widths = {block.attn.rope_width for block in self.blocks}
        self.compiled_loss: Callable[..., Tensor] | None = None
        self.recompute = False  # training keeps the input of a block alone, see `routing.run_blocks`
        self.end_token = -1  # doc_mask: the id that ends a document, -1 = none; whoever knows the tokenizer sets it
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every parameter, by its module's role: matrices normal with 0.02, modules with parameters of another kind
        fill them themselves. Residual projections are smaller, so that the trunk's variance does not grow with the
        depth (GPT-2)."""
        before = {name: p._version for name, p in self.named_parameters()}
        residual = set()
        for block in self.blocks:
            residual |= {block.attn.out, block.mlp.down}
        depth = self.config.n_layer * self.config.mor_recursions
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02 / math.sqrt(2 * depth) if module in residual else 0.02
                nn.init.normal_(module.weight, std=std)
            elif hasattr(module, "init_weights") and module is not self:
                module.init_weights()
        forgotten = [name for name, p in self.named_parameters() if p._version == before[name]]
        assert not forgotten, f"not initialised: {', '.join(forgotten)}; fill them in their module's init_weights"

    @property
    def depth_routers(self) -> list[Router]:
        return [block.router for block in self.blocks if block.routed]

    def compile_training(self) -> None:
        """torch.compile of every block, and on CUDA of the loss."""
        compile_blocks(self.blocks, 64 * self.config.mor_recursions)
        if self.embed.weight.is_cuda:
            self.compiled_loss = torch.compile(loss_chunk, fullgraph=True, dynamic=False)

    def backends(self, compiled: bool, grad: bool) -> dict[str, tuple[str, str]]:
        """Attention core of each letter in use, letter -> (backend, reason); UserError if the one asked for cannot."""
        device = self.embed.weight.device.type
        found = {}
        for letter, block in zip(self.config.layers, self.blocks, strict=True):
            width = block.attn.head_width
            found[letter] = choose_backend(self.config.attn_backend, device, width, compiled, grad)
        return found

    def context(
        self, pos: Tensor, lengths: Tensor | None = None, decoding: bool = False, visible: int = 0,
        uniform: bool = False, static: bool = False, doc: Tensor | None = None,
    ) -> Context:  # fmt: skip
        """What the layers share at positions `pos` [T] or [B, T]: rotation tables and, where FlexAttention may run or
        documents `doc` [B, T] are kept apart, masks. The others are for generation, see `Context`."""
        backend = self.config.attn_backend
        T = pos.shape[-1]
        masks = set()
        flex = not decoding and backend != "sdpa" and (pos.is_cuda or backend == "flex")
        if flex and doc is None:
            blocks = [*self.blocks] * self.config.mor_recursions
            tokens = layer_tokens(self.config, T) if self.training else [T] * len(blocks)
            masks = {(n, block.attn.window) for n, block in zip(tokens, blocks, strict=True)}
        ctx = make_context(pos, self.rope_widths, self.config.rope_theta, masks, compute_dtype(self.embed.weight))
        if doc is not None:
            ctx = ctx._replace(doc=doc, masks=document_masks(doc, {block.attn.window for block in self.blocks}, flex))
        place = pos if self.config.router == "random" else None
        return ctx._replace(lengths=lengths, decoding=decoding, visible=visible, uniform=uniform, static=static,
                            recompute=self.recompute, place=place)  # fmt: skip

    def forward(self, idx_BT: Tensor, targets_BT: Tensor | None = None) -> Output:
        """Token ids [B, T], targets [B, T] (-1 = ignored) -> Output. UserError for more than block_size tokens."""
        T = idx_BT.size(1)
        if T > self.config.block_size:
            raise UserError(f"{T} tokens do not fit: crop the text to block_size={self.config.block_size}")
        pos, doc = torch.arange(T, device=idx_BT.device), None
        if self.config.doc_mask:
            pos, doc = documents(idx_BT, self.end_token)
        x_BTD, records = self.trunk(idx_BT, self.context(pos, doc=doc))
        if targets_BT is None:
            return Output(self.head(x_BTD[:, -1:]), None, None, {})
        x_ND = self.norm(x_BTD).flatten(0, 1)
        logits_NV, nats = cross_entropy(x_ND, self.embed.weight, targets_BT.flatten(), self.compiled_loss)
        logits_BTV = None if logits_NV is None else logits_NV.unflatten(0, targets_BT.shape)
        routing = statistics(self.depth_routers, self.recursion_routers, records)
        loss = nats
        if routing and self.training:
            loss = nats + routing["aux_loss"]
        return Output(logits_BTV, loss, nats, routing)

    def trunk(
        self, idx_BT: Tensor, ctx: Context, states: list[LayerState] | None = None
    ) -> tuple[Tensor, list[tuple[Router, Record]]]:
        """Token ids [B, T] -> [B, T, D], before the final norm, and what the routers did."""
        return recurse(self.blocks, self.recursion_routers, self.embed(idx_BT), ctx, states)

    def head(self, x: Tensor) -> Tensor:
        """Logits of the trunk's output: the embedding's rows are the head's."""
        return linear(self.norm(x), self.embed.weight)
