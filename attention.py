"""The attentions of HYDRA: one class and one line of KINDS each, over one core that they share.

Every variant is causal by construction (no argument switches that off), takes the tokens' true positions through
`Context`, norms the merged heads before its output projection (an RMSNorm, unless pre_out_norm is off), and decodes
from a state of its own: preallocated tensors that are written in place.
A new attention: a subclass of `Attention`, which says what it must offer, and its line in KINDS. Training, generation,
accounting, help, log and bench follow from those two.
Left out: biases, dropout, non-causal and cross attention, q/k widths that differ from the v width.

Letters in shapes (a suffix names its tensor's axes, `q_BTHK`):
    B batch        D model width            K head width, D/H (A, G, M), L/H (C), R/H (L)
    T tokens       H query heads            L latent width of CCQA, D / compression
    N H + G        G key/value heads        R latent width of MLA, D * latent_ratio
    W window       S slots of a state      kappa G * K, the width of all keys
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from configurator import need
from layers import Linear, RMSNorm, convolve_at_once, depthwise, fill_identity, linear, moved
from machine import causal_block_mask, choose_backend, document_mask


class Context(NamedTuple):
    """What all layers of one forward share: made once by `Hydra.context`."""

    pos: Tensor  # int64 [T], or [B, T] where rows hold different tokens: the true positions, in their documents
    rope: dict[int, tuple[Tensor, Tensor]]  # rotated width -> [cos cos], [-sin sin], [(B,) T, 1, width]
    # (tokens, window) -> mask: of FlexAttention where it may run, else of documents (`document_mask`), else empty
    masks: dict[tuple[int, int], BlockMask | Tensor]
    doc: Tensor | None = None  # doc_mask: int64 [B, T], a number for each token's document; None with a state
    recompute: bool = False  # training: the blocks are computed again in the backward
    # only with a state, whose rows may hold texts of different lengths, or behind a router in evaluation:
    decoding: bool = False  # one new token a row, at pos [B, 1]; else a prefill, texts padded on the right
    lengths: Tensor | None = None  # prefill: int64 [B], tokens of each row, None = all
    visible: int = 0  # decoding: no row has more tokens, the new one included
    uniform: bool = False  # decoding: every row has `visible` tokens, so that no mask is needed
    static: bool = False  # decoding: no shape, address or choice follows the text, so that the step may be captured
    keep: Tensor | None = None  # decoding: bool [B], the rows that may change the state, None = all
    place: Tensor | None = None  # what `pos` was at first, where routers are random


LayerState = dict[str, Tensor]  # what one layer keeps of the past, by name: see `Attention.new_state`


def documents(idx_BT: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """(position in its document, the document's number) of every token, both [B, T]; a document's number is the place
    of its first token. An `end` token belongs to the document that it closes."""
    t = torch.arange(idx_BT.size(1), device=idx_BT.device)
    begins_BT = F.pad(idx_BT[:, :-1] == end, (1, 0))
    doc_BT = (begins_BT * t).cummax(dim=1).values
    return t - doc_BT, doc_BT


def make_context(pos: Tensor, widths: set[int], theta: float, masks: set[tuple[int, int]] = frozenset(),
                 dtype: torch.dtype = torch.float32) -> Context:  # fmt: skip
    """Rotation tables at positions `pos` for every width, in the dtype of the layers' products, and a BlockMask for
    every (tokens, window) of `masks` (window 0 = full causal)."""
    rope = {}
    for width in sorted(widths):
        freq = theta ** (-torch.arange(0, width, 2, device=pos.device, dtype=torch.float32) / width)
        angle = pos[..., None, None].float() * freq
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        rope[width] = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return Context(pos, rope, {shape: causal_block_mask(*shape, pos.device) for shape in sorted(masks)})


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate-half RoPE (arXiv:2104.09864, eq. 34) of x [B, T, heads, width] by a table of `make_context`: channel i
    turns with channel i + width/2, which a roll by half the width puts in its place. Of a wider x the first channels
    turn, the others have no position."""
    cos, sin = table
    if cos.size(-1) < x.size(-1):
        turning, still = x.tensor_split((cos.size(-1),), dim=-1)
        return torch.cat((apply_rope(turning, table), still), dim=-1)
    partner = x.roll(x.size(-1) // 2, dims=-1)
    return torch.addcmul(x * cos.to(x.dtype), partner, sin.to(x.dtype))


# ---- the core: softmax(q k^T / sqrt(K)) v under the causal mask, on the backend that is right for the device


def attend(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, ctx: Context, window: int = 0, requested: str = "auto",
    state: LayerState | None = None,
) -> Tensor:  # fmt: skip
    """Causal grouped-query attention -> [B, T, H*K]; token t sees tokens max(0, t-window+1) .. t of its row, and where
    ctx.doc names documents, those of its own. With a `state` the new keys and values are stored in it; a decoding step
    then reads the stored ones (`read`). UserError where FlexAttention was requested and cannot train, see
    `machine.choose_backend`."""
    if state is not None:
        store(state["k"], k_BTGK, ctx)
        store(state["v"], v_BTGK, ctx)
        if ctx.decoding:
            return read(q_BTHK, state["k"], state["v"], ctx).flatten(2)
    T = q_BTHK.size(1)
    q, k, v = (t.transpose(1, 2) for t in (q_BTHK, k_BTGK, v_BTGK))
    grad = torch.is_grad_enabled() and q.requires_grad
    backend, _ = choose_backend(requested, q.device.type, q.size(-1), torch.compiler.is_compiling(), grad)
    gqa = k.size(1) != q.size(1)
    mask = ctx.masks.get((T, window))
    if backend == "flex":
        if mask is None:
            assert ctx.doc is None, "documents have their masks: see Hydra.context and routing.selection_at"
            mask = causal_block_mask(T, window, q.device)
        y = flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
    elif ctx.doc is not None:
        if not isinstance(mask, Tensor):  # the device has FlexAttention, this layer has not
            mask = document_mask(ctx.doc, window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    elif 0 < window < T:
        y = sdpa_window(q, k, v, window, gqa)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return y.transpose(1, 2).flatten(2)


def sdpa_window(q: Tensor, k: Tensor, v: Tensor, window: int, gqa: bool) -> Tensor:
    """Sliding-window attention, all [B, heads, T, K]: SDPA over chunks of queries and the keys that those can see.
    Short texts take one chunk: below 4 windows the calls cost more than the masked-out work that they save."""
    T = q.size(2)
    rows = T
    if T >= 4 * window:
        rows = max(window // 2, 256 if q.dtype == torch.bfloat16 else 64)
    chunks = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        first = max(0, start - window + 1) // 16 * 16  # aligned: the CPU kernel is slower on ragged key ranges
        i = torch.arange(start, stop, device=q.device)[:, None]
        j = torch.arange(first, stop, device=q.device)
        seen = (j <= i) & (j > i - window)
        rows_q, seen_k, seen_v = q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop]
        chunks.append(F.scaled_dot_product_attention(rows_q, seen_k, seen_v, attn_mask=seen, enable_gqa=gqa))
    return torch.cat(chunks, dim=2)


def store(slots_BSGK: Tensor, new_BTGK: Tensor, ctx: Context) -> None:
    """Put a decoding step's token, or a prefill's, at the slot of its position. A window's slots are a ring: position p
    lies at p modulo S, and a prefill leaves the last S tokens of every row there."""
    S = slots_BSGK.size(1)
    T = new_BTGK.size(1)
    if ctx.decoding and ctx.uniform:
        slots_BSGK[:, (ctx.visible - 1) % S] = new_BTGK[:, 0]
        return
    row_B1 = torch.arange(len(new_BTGK), device=new_BTGK.device)[:, None]
    if ctx.decoding:
        slot_B1 = ctx.pos % S
        new_BTGK = new_BTGK.to(slots_BSGK.dtype)
        if ctx.keep is not None:
            new_BTGK = torch.where(ctx.keep[:, None, None, None], new_BTGK, slots_BSGK[row_B1, slot_B1])
        slots_BSGK[row_B1, slot_B1] = new_BTGK
    elif T <= S:
        slots_BSGK[:, :T] = new_BTGK
    else:  # slot s gets the row's last position that is s modulo S
        last_B1 = ctx.lengths[:, None] - 1
        slot_S = torch.arange(S, device=new_BTGK.device)
        slots_BSGK.copy_(new_BTGK[row_B1, (last_B1 - (last_B1 - slot_S) % S).clamp(min=0)])


def read(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, ctx: Context, scale: float | None = None,
         key_scale_BSH1: Tensor | None = None) -> Tensor:  # fmt: skip
    """One query a row over its stored keys and values -> [B, 1, H, K]. `ctx.visible` cuts the slots to a view; where
    rows may have fewer tokens a mask hides the others' slots, which a CPU reads slower than a view. `key_scale`: heads
    share one key, and each has a factor of its own for it, which no fused kernel takes."""
    visible = min(k_BSGK.size(1), ctx.visible)
    mask = None
    if not ctx.uniform:  # a ring is full once the row is as long as it, and holds positions 0.. before
        mask = (torch.arange(visible, device=q_BTHK.device) <= ctx.pos)[:, None, None]
    q_BGhK = q_BTHK.squeeze(1).unflatten(1, (k_BSGK.size(2), -1))  # the heads of a group are its queries: one product
    k_BGSK, v_BGSK = (t[:, :visible].transpose(1, 2) for t in (k_BSGK, v_BSGK))
    if key_scale_BSH1 is None:
        y_BGhK = F.scaled_dot_product_attention(q_BGhK, k_BGSK, v_BGSK, attn_mask=mask, scale=scale)
    else:
        scores_B1HS = scale * (q_BGhK @ k_BGSK.mT) * key_scale_BSH1[:, :visible].transpose(1, 3)
        if mask is not None:
            scores_B1HS = scores_B1HS.masked_fill(~mask, -math.inf)
        y_BGhK = scores_B1HS.softmax(-1).to(v_BGSK.dtype) @ v_BGSK
    return y_BGhK.flatten(1, 2).unsqueeze(1)


def with_past(x: Tensor, rows: int, name: str, ctx: Context, state: LayerState | None) -> Tensor:
    """x [B, T, channels] behind the `rows` rows before it, zeros before the first token. A decoding state's tail
    `name` gives those rows, and keeps each text's last ones."""
    if state is None:
        return F.pad(x, (0, 0, rows, 0))
    if ctx.decoding:
        x = torch.cat((state[name].to(x.dtype), x), dim=1)
        tail = x[:, 1:]
        if ctx.keep is not None:
            tail = torch.where(ctx.keep[:, None, None], tail, x[:, :-1])
    else:  # row b's text ends at lengths[b], in front of its padding
        x = F.pad(x, (0, 0, rows, 0))
        row_B1 = torch.arange(len(x), device=x.device)[:, None]
        tail = x[row_B1, ctx.lengths[:, None] + torch.arange(rows, device=x.device)]
    state[name].copy_(tail)
    return x


# ---- the variants; `config` is the model's HydraConfig


def turned(config, width: int) -> int:
    """How many of so many channels RoPE turns. UserError where that is no even number."""
    part = width * config.rope_fraction
    whole = abs(part - round(part)) < 1e-6 and round(part) % 2 == 0
    need(config, "rope_fraction", whole, f"of {width} channels {part:g} would turn, which must be an even number")
    return round(part)


class ShortConv(nn.Module):
    """Depthwise causal convolution over time of projected x [B, T, channels]: channel by channel y_t is the sum of
    w_i x_(t-i) for i < taps, with x = 0 before a text or its own document. It starts as the identity, w_0 = 1. Primer
    (arXiv:2109.08668) and Canon-B (arXiv:2512.17351, as x + conv(x)) have it on q, k and v. 0 taps = no convolution."""

    vectors = ("weight",)

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.channels, self.taps = channels, taps
        self.weight = nn.Parameter(torch.empty(channels, taps)) if taps else None

    def init_weights(self) -> None:
        if self.taps:
            fill_identity(self.weight)

    def new_state(self, B: int, like: Tensor) -> LayerState:
        return {"short_tail": like.new_zeros(B, self.taps - 1, self.channels)} if self.taps else {}

    def forward(self, x: Tensor, ctx: Context, state: LayerState | None) -> Tensor:
        if not self.taps:
            return x
        filters = self.weight.to(x.dtype)
        if (x.is_cuda or ctx.doc is not None) and state is None:  # on a GPU one kernel
            return sum(moved(x, self.taps - 1 - i, ctx.doc) * filters[:, i] for i in range(self.taps))
        return depthwise(with_past(x, self.taps - 1, "short_tail", ctx, state), filters)


class Attention(nn.Module):
    """What an attention offers. Besides the methods below every instance has
    - head_width: K, channels of a head in the core, by which a backend is chosen; rope_width: those that RoPE turns;
    - score_width: H * K (the mean of the keys' and the values' widths, where they differ): each key costs a query
      4 * score_width FLOPs. All other FLOPs are two for each number of a matrix;
    - window: the last tokens that it sees, 0 = all; out: the projection onto the residual line, which starts smaller;
    - vectors: names of parameters that are no matrices whatever their shape, such as filters: they get no weight decay;
    - plain: names of Linear modules whose weight decoding reads itself, so that it is not packed (generate.py).
    `add_common`, `unit` and `tempered` are for letters that take the options qk_norm, short_conv and pre_out_norm."""

    head_width: int
    rope_width: int
    score_width: int
    window = 0
    vectors: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    out: Linear

    def add_common(self, config, keys: int, normed: bool, tempered: bool, channels: int = 0) -> None:
        """What stands around the core: QK-norm, temperatures of so many keys, a ShortConv of so many channels, .."""
        self.normed = normed
        self.eps = config.norm_eps
        temperatures = nn.Parameter(torch.empty(keys)) if tempered and config.k_temperature else None
        self.register_parameter("k_temperature", temperatures)
        if channels:
            self.short_conv = ShortConv(channels, config.short_conv)
        self.norm = RMSNorm(self.score_width, config.norm_eps) if config.pre_out_norm else nn.Identity()
        self.out = Linear(self.score_width, config.dim)

    def unit(self, x_BTNK: Tensor) -> Tensor:
        """QK-norm: RMSNorm over a head's channels without a gain, which is the L2 norm of arXiv:2510.04476 times
        sqrt(K), so that a logit is at most sqrt(K) times the key's temperature."""
        if not self.normed:
            return x_BTNK
        return F.rms_norm(x_BTNK, (self.head_width,), eps=self.eps).to(x_BTNK.dtype)  # autocast norms in fp32

    def tempered(self, k: Tensor) -> Tensor:
        """Keys [B, T, G, ..] times their temperatures."""
        return k if self.k_temperature is None else k * self.k_temperature.to(k.dtype)[:, None]

    def init_weights(self) -> None:
        """Fill the parameters of its own; those of its Linear and RMSNorm modules are filled by the model."""
        if getattr(self, "k_temperature", None) is not None:
            nn.init.ones_(self.k_temperature)

    def new_state(self, B: int, S: int, like: Tensor) -> LayerState:
        """Zeros of `like`'s dtype and device for B texts of up to S tokens. An entry [B, S, ...] has a slot a token
        (min(S, window) with a window), one whose name ends with "tail" has a constant size."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, ctx: Context, state: LayerState | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]: the whole text, or with a `state` the prefill of an empty one, or a decoding step
        where ctx.decoding says so."""
        raise NotImplementedError


class GQA(Attention):
    """MHA, GQA and MQA: H query heads share `n_kv_head` key/value heads of width K = D/H; RoPE on all K channels."""

    def __init__(self, config, n_kv_head: int, window: int = 0):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, n_kv_head
        self.window = window
        self.requested = config.attn_backend
        self.head_width = config.dim // config.n_head
        self.rope_width = turned(config, self.head_width)
        self.score_width = config.dim
        self.qkv = Linear(config.dim, config.dim + 2 * n_kv_head * self.head_width)
        self.add_common(config, n_kv_head, config.qk_norm, config.qk_norm, self.qkv.out_features)

    @staticmethod
    def check(config) -> None:
        unit = 2 * config.n_head
        need(config, "dim n_head", config.dim % unit == 0, f"heads need an even width: dim a multiple of {unit}")
        if "G" in config.layers:
            need(config, "n_head n_kv_head", config.n_head % config.n_kv_head == 0, "the second must divide the first")
        turned(config, config.dim // config.n_head)

    def new_state(self, B: int, S: int, like: Tensor) -> LayerState:
        shape = (B, min(S, self.window or S), self.n_kv_head, self.head_width)
        return {"k": like.new_zeros(shape), "v": like.new_zeros(shape), **self.short_conv.new_state(B, like)}

    def forward(self, x_BTD: Tensor, ctx: Context, state: LayerState | None = None) -> Tensor:
        H, G = self.n_head, self.n_kv_head
        qkv = self.short_conv(self.qkv(x_BTD), ctx, state)
        qk_BTNK, v_BTGK = qkv.unflatten(-1, (-1, self.head_width)).split((H + G, G), dim=2)
        q_BTHK, k_BTGK = apply_rope(self.unit(qk_BTNK), ctx.rope[self.rope_width]).split((H, G), dim=2)
        y_BTD = attend(q_BTHK, self.tempered(k_BTGK), v_BTGK, ctx, self.window, self.requested, state)
        return self.out(self.norm(y_BTD))


def ccqa_heads(config) -> tuple[int, int, int]:
    """(H, G, K) of CCQA, H*K = L = D/C. K is latent_head_dim, 0 = L/n_head, -1 = the even divisor of L that is nearest
    to 32 by its logarithm. Wider heads are fewer, and keep the group ratio as far as it divides: G is the divisor of H
    that comes nearest to it."""
    L = config.dim // config.compression
    K = config.latent_head_dim or max(1, L // config.n_head)
    if K == -1:
        K = min((k for k in range(2, L + 1, 2) if L % k == 0), key=lambda k: abs(math.log(k / 32)))
    H = max(1, L // K)
    ratio = config.n_head / config.n_kv_head
    G = min((g for g in range(1, H + 1) if H % g == 0), key=lambda g: abs(math.log(H / g / ratio)))
    return H, G, K


class CCQA(Attention):
    """Compressed convolutional grouped-query attention, CCGQA of arXiv:2510.04476, sections 3.1-3.3: the whole
    attention runs in a latent of width L = D/C, with queries and keys mixed over time by two short causal
    convolutions and with each other by their means. Without a part: conv_kernel = 0, qk_gain = 0, value_shift = false,
    ccqa_norm = false, k_temperature = false. It has a norm and convolutions: qk_norm and short_conv change others."""

    vectors = ("conv_depthwise",)

    def __init__(self, config):
        super().__init__()
        H, G, K = ccqa_heads(config)
        self.n_head, self.n_kv_head = H, G
        self.head_width = K
        self.rope_width = turned(config, K)
        self.latent = self.score_width = H * K
        self.kappa = G * K
        self.requested = config.attn_backend
        self.conv_kernel = config.conv_kernel
        self.qk_gain = config.qk_gain
        self.value_shift = config.value_shift
        self.reach = 2 * max(0, config.conv_kernel - 1)  # tokens that the convolutions see behind the present one
        channels = self.latent + self.kappa
        self.down = Linear(config.dim, channels + self.kappa)  # q, k and both halves of v at once
        if config.conv_kernel:
            self.conv_depthwise = nn.Parameter(torch.empty(channels, config.conv_kernel))
            self.conv_grouped = nn.Parameter(torch.empty(channels, K, config.conv_kernel))  # K x K inside a head
        self.add_common(config, G, config.ccqa_norm, True)

    @staticmethod
    def check(config) -> None:
        need(config, "n_head n_kv_head", config.n_head % config.n_kv_head == 0, "the second must divide the first")
        unit = 2 * config.compression
        need(config, "dim compression", config.dim % unit == 0, f"CCQA's latent must be even: dim a multiple of {unit}")
        L = config.dim // config.compression
        H, _, K = ccqa_heads(config)
        remedy = f"CCQA's heads need an even width that divides dim/compression={L}: latent_head_dim=-1 fits itself"
        fits = H == config.n_head or config.latent_head_dim != 0
        need(config, "dim n_head compression latent_head_dim", fits and K % 2 == 0 and H * K == L, remedy)
        turned(config, K)
        idle = set(config.layers) == {"C"} and (config.qk_norm or config.short_conv)
        remedy = "CCQA has its own norm and convolutions, see ccqa_norm and conv_kernel: leave these off"
        need(config, "pattern qk_norm short_conv", not idle, remedy)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Depthwise taps start as the identity and grouped ones at 1/sqrt(fan in): with the 0.02 of a projection for
        both, CCQA loses most of what it gains."""
        super().init_weights()
        if self.conv_kernel:
            fill_identity(self.conv_depthwise)
            nn.init.normal_(self.conv_grouped, std=(self.head_width * self.conv_kernel) ** -0.5)

    def new_state(self, B: int, S: int, like: Tensor) -> LayerState:
        """Compressed keys and values for up to S tokens, and the constant tail that convolutions and shift look at."""
        shape = (B, S, self.n_kv_head, self.head_width)
        state = {"k": like.new_zeros(shape), "v": like.new_zeros(shape)}
        state["qk_tail"] = like.new_zeros(B, self.reach, self.latent + self.kappa)
        if self.value_shift:
            state["v_tail"] = like.new_zeros(B, 1, self.kappa // 2)
        return state

    def forward(self, x_BTD: Tensor, ctx: Context, state: LayerState | None = None) -> Tensor:
        H, G = self.n_head, self.n_kv_head
        qk, v = self.down(x_BTD).split((self.latent + self.kappa, self.kappa), dim=-1)
        if self.value_shift:  # half of the values are the previous token's, zero before the first
            now, before = v.chunk(2, dim=-1)
            if state is None:
                shifted = moved(before, 1, ctx.doc)
            else:
                shifted = with_past(before, 1, "v_tail", ctx, state)[:, :-1]
            v = torch.cat((now, shifted), dim=-1)
        mixed = self.convolve(qk, ctx, state) if self.conv_kernel else qk
        mixed_BTNK = mixed.unflatten(-1, (H + G, -1))
        if self.qk_gain:
            mixed_BTNK = mixed_BTNK + self.couple(qk.unflatten(-1, (H + G, -1)))
        q_BTHK, k_BTGK = apply_rope(self.unit(mixed_BTNK), ctx.rope[self.rope_width]).split((H, G), dim=2)
        y = attend(q_BTHK, self.tempered(k_BTGK), v.unflatten(-1, (G, -1)), ctx, requested=self.requested, state=state)
        return self.out(self.norm(y))

    def couple(self, qk_BTNK: Tensor) -> Tensor:
        """QK-mean coupling of the pre-convolution queries and keys -> what to add to each, [B, T, H+G, K]."""
        q_BTHK, k_BTGK = qk_BTNK.split((self.n_head, self.n_kv_head), dim=2)
        mean_BTGhK = self.qk_gain * (q_BTHK.unflatten(2, (self.n_kv_head, -1)) + k_BTGK.unsqueeze(3))
        return torch.cat((mean_BTGhK.flatten(2, 3), mean_BTGhK.mean(3)), dim=2)

    def convolve(self, qk: Tensor, ctx: Context, state: LayerState | None) -> Tensor:
        """Depthwise, then per-head convolution over time of [B, T, H*K + G*K], both causal, zeros before a text."""
        if (qk.is_cuda or ctx.doc is not None) and state is None:
            return convolve_at_once(qk, self.conv_depthwise, self.conv_grouped, ctx.doc)
        u = with_past(qk, self.reach, "qk_tail", ctx, state)
        taps, K = self.conv_kernel, self.head_width
        grouped = self.conv_grouped.to(u.dtype)
        mixed = depthwise(u, self.conv_depthwise.to(u.dtype))
        if mixed.size(1) == taps:  # one token: a convolution's set-up would cost more than its work
            seen = torch.stack(mixed.split(1, dim=1), dim=-1).unflatten(2, (-1, K))
            return torch.einsum("btnij,noij->btno", seen, grouped.unflatten(0, (-1, K))).flatten(2)
        y = F.conv1d(mixed.transpose(1, 2), grouped, groups=self.n_head + self.n_kv_head)
        return y.transpose(1, 2).contiguous()  # heads must be dense in memory: SDPA has no fused kernel for others


class MLA(Attention):
    """Multi-head latent attention (arXiv:2405.04434, section 2.1) with decoupled RoPE; q, k and v all come from one
    normed latent of width R. Half of a head's K channels carry no position, half are rotated, and the rotated key
    is one K/2 vector shared by all heads. q/k and v are equally wide so that the fused kernels take them.
    qk_norm norms every head's query and whole key, K channels: to a key that is one factor, which is cached beside the
    latent, so that the past stays compressed. short_conv mixes the latent before its norm, thus q, k and v at once."""

    plain = ("up",)

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.requested = config.attn_backend
        self.latent = self.score_width = R = round(config.dim * config.latent_ratio)
        self.head_width = R // config.n_head
        self.shared_width = self.head_width // 2  # of the key with a position
        self.rope_width = turned(config, self.shared_width)
        self.down = Linear(config.dim, R)
        self.latent_norm = RMSNorm(R, config.norm_eps)
        # W_q, W_kr, W_uk, W_uv in this order: a decoding step makes a product with the first two, absorbs the others
        self.up = Linear(R, 2 * R + R // 2 + self.shared_width)
        self.add_common(config, config.n_head, config.qk_norm, config.qk_norm, R)

    @staticmethod
    def check(config) -> None:
        R = config.dim * config.latent_ratio
        unit = 4 * config.n_head
        whole = abs(R - round(R)) < 1e-6 and round(R) > 0 and round(R) % unit == 0
        remedy = f"MLA's latent, dim*latent_ratio={R:g}, must be a multiple of 4*n_head={unit}: change one"
        need(config, "dim n_head latent_ratio", whole, remedy)
        turned(config, round(R) // config.n_head // 2)

    def new_state(self, B: int, S: int, like: Tensor) -> LayerState:
        """For up to S tokens the normed latent and the shared rope key, side by side: R + K/2 values a token; with
        qk_norm also the factors of the heads' keys, H values."""
        state = self.short_conv.new_state(B, like)
        state["latent"] = like.new_zeros(B, S, 1, self.latent + self.shared_width)
        if self.normed:
            state["key_scale"] = like.new_zeros(B, S, self.n_head, 1)
        return state

    def forward(self, x_BTD: Tensor, ctx: Context, state: LayerState | None = None) -> Tensor:
        H, R = self.n_head, self.latent
        table = ctx.rope[self.rope_width]
        latent = self.latent_norm(self.short_conv(self.down(x_BTD), ctx, state))
        if ctx.decoding:
            return self.out(self.norm(self.absorbed(latent, ctx, state)))
        up = self.up(latent)
        q, _, k_nope, v = up.split((R, self.shared_width, R // 2, R), dim=-1)
        k_rope = up[..., R : R + self.shared_width]  # on its own: a GPU makes the gradient of `up` in one kernel
        q_nope, q_rope = self.unit(q.unflatten(-1, (H, -1))).chunk(2, dim=-1)
        k_nope = k_nope.unflatten(-1, (H, -1))
        k_rope = apply_rope(k_rope.unsqueeze(2), table)
        if state is not None:
            store(state["latent"], torch.cat((latent.unsqueeze(2), k_rope), dim=-1), ctx)
        q_BTHK = torch.cat((q_nope, apply_rope(q_rope, table)), dim=-1)
        k_BTHK = torch.cat((k_nope, k_rope.expand(-1, -1, H, -1)), dim=-1)
        if self.normed:
            k_BTHK = k_BTHK * self.key_scale(k_nope, k_rope, ctx, state)
        v_BTHK = v.unflatten(-1, (H, -1))
        return self.out(self.norm(attend(q_BTHK, k_BTHK, v_BTHK, ctx, requested=self.requested)))

    def key_scale(self, k_nope: Tensor, k_rope: Tensor, ctx: Context, state: LayerState | None) -> Tensor:
        """[B, T, H, 1]: what qk_norm multiplies the whole key of each head with, stored in a state."""
        squares = (k.float().square().sum(-1, keepdim=True) for k in (k_nope, k_rope))
        scale = self.tempered((sum(squares) / self.head_width + self.eps).rsqrt()).to(k_nope.dtype)
        if state is not None:
            store(state["key_scale"], scale, ctx)
        return scale

    def absorbed(self, latent: Tensor, ctx: Context, state: LayerState) -> Tensor:
        """A decoding step -> [B, 1, R]. W_uk goes into the query and W_uv behind the read, so that the attention runs
        over the latents themselves (one key/value head, R + K/2 wide) and the past is never expanded."""
        H, R = self.n_head, self.latent
        table = ctx.rope[self.rope_width]
        W_query, W_uk, W_uv = self.up.weight.to(latent.dtype).split((R + self.shared_width, R // 2, R))
        q, k_rope = linear(latent, W_query).tensor_split((R,), dim=-1)
        q_nope, q_rope = self.unit(q.unflatten(-1, (H, -1))).chunk(2, dim=-1)
        k_rope = apply_rope(k_rope.unsqueeze(2), table)
        store(state["latent"], torch.cat((latent.unsqueeze(2), k_rope), dim=-1), ctx)
        if self.normed:
            self.key_scale(linear(latent, W_uk).unflatten(-1, (H, -1)), k_rope, ctx, state)
        q_latent = torch.einsum("bthk,hkr->bthr", q_nope, W_uk.unflatten(0, (H, -1)))
        q_latent = torch.cat((q_latent, apply_rope(q_rope, table)), dim=-1)
        past = state["latent"]  # also the values: equal widths keep the fused kernel, the rope part is cut off
        y = read(q_latent, past, past, ctx, self.head_width**-0.5, state.get("key_scale"))[..., :R]
        return torch.einsum("bthr,hkr->bthk", y, W_uv.unflatten(0, (H, -1))).flatten(2)


class Kind(NamedTuple):
    """What a letter of the pattern stands for."""

    make: Callable[..., Attention]  # of a configuration
    alpha: float  # scale of the attention's residual line
    check: Callable[..., None]  # of a configuration: UserError where its numbers cannot be
    text: str  # for --help, the log and errors


KINDS: dict[str, Kind] = {
    "A": Kind(lambda c: GQA(c, c.n_head), 1.0, GQA.check, "MHA, multi-head attention (arXiv:1706.03762)"),
    "G": Kind(lambda c: GQA(c, c.n_kv_head), 1.0, GQA.check, "GQA, grouped-query attention (arXiv:2305.13245)"),
    "M": Kind(lambda c: GQA(c, 1, c.window), 1.0, GQA.check, "MQA, multi-query attention (arXiv:1911.02150)"),
    "C": Kind(CCQA, 0.5, CCQA.check, "CCQA, compressed convolutional grouped-query attention (arXiv:2510.04476)"),
    "L": Kind(MLA, 0.5, MLA.check, "MLA, multi-head latent attention (arXiv:2405.04434)"),
}


def letters_help() -> str:
    """A line for each letter of the pattern."""
    return "Letters of the pattern:\n" + "\n".join(f"  {letter}  {kind.text}" for letter, kind in KINDS.items())
