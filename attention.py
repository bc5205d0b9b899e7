"""The attention variants of HYDRA, one class a variant, and the one core that they share.

    letter  class  variant                                                       source
    A       GQA    MHA, multi-head attention (G = H)                             arXiv:1706.03762
    G       GQA    GQA, grouped-query attention                                  arXiv:2305.13245
    M       GQA    MQA, multi-query attention (G = 1), optional sliding window   arXiv:1911.02150
    C       CCQA   compressed convolutional grouped-query attention              arXiv:2510.04476
    L       MLA    multi-head latent attention, decoupled RoPE, shared latent    arXiv:2405.04434

Every variant is causal by construction (no argument switches that off), takes the tokens' true positions through
`Context`, and ends with an RMSNorm over the merged heads before its output projection ("pre-out norm").
Every variant decodes from a state of its own, preallocated tensors that are written in place: keys and values (a ring
where MQA has a window), for CCQA the compressed ones and a constant tail, for MLA the latent and the shared rope key.
Left out: biases, dropout, non-causal and cross attention, q/k widths that differ from the v width.

Letters in shapes (a suffix names its tensor's axes, `q_BTHK`):
    B batch        D model width            K head width, D/H (A, G, M), L/H or latent_head_dim (C), R/H (L)
    T tokens       H query heads            L latent width of CCQA, D / compression
    N H + G        G key/value heads        R latent width of MLA, D * latent_ratio
    W window       kappa G * K, the width of all keys
    S slots of a decoding state
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from configurator import UserError

FLEX_BLOCK = 128  # rows and columns of a BlockMask's tile, FlexAttention's own default


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm on a CPU, where torch's is a chain of operators that keeps its input and the normed input for the
    backward. This keeps the input, which the residual line keeps anyway, and one number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, rstd = ctx.saved_tensors
        normed, grad = x * rstd, grad.to(rstd.dtype)
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

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)  # the fused kernel wants one dtype; under autocast the input may be bf16
        if x.requires_grad and not x.is_cuda:
            return RMSNormFunction.apply(x, weight, self.eps)
        return F.rms_norm(x, self.weight.shape, weight, self.eps)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T. Compiled for a single row on a CPU it is written as a sum, of which Inductor makes a loop over the rows of
    the weight: that reads it at twice the rate of the library's product, and nothing else bounds such a step."""
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == weight.size(1):
        return (x.float().unsqueeze(-2) * weight.float()).sum(-1).to(x.dtype)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """A linear map without bias, see `linear`."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


# ---------------------------------------------------------------------------------------------------------------------
# what all layers of one forward share: positions, rotation tables, block masks


class Context(NamedTuple):
    """Made once per forward by `make_context`, read by every layer."""

    pos: Tensor  # int64 [T], or [B, T] where rows hold different tokens: the true positions
    rope: dict[int, tuple[Tensor, Tensor]]  # rotated width -> [cos cos], [-sin sin], fp32 [(B,) T, 1, width]
    masks: dict[tuple[int, int], BlockMask]  # (tokens, window) -> mask; empty where FlexAttention is not used
    static: bool = False  # no shape may follow the data, see routing.py
    # only with a decoding state, whose rows may hold texts of different lengths, or behind a router in evaluation:
    decode: bool = False  # one new token a row, at pos [B, 1]; else a prefill, texts padded on the right
    lengths: Tensor | None = None  # not decode: int64 [B], tokens of each row, None = all
    visible: int | None = None  # decode: no row has more tokens than this, the new one included; None = read all slots
    uniform: bool = False  # decode: every row has `visible` tokens, so that no mask is needed
    keep: Tensor | None = None  # decode: bool [B], the rows that may change the state, None = all


def make_context(pos: Tensor, widths: set[int], theta: float, masks: set[tuple[int, int]] = frozenset()) -> Context:
    """Rotation tables at positions `pos` for every width, and a BlockMask for every (tokens, window) of `masks`
    (window 0 = full causal)."""
    rope = {}
    for width in sorted(widths):
        freq = theta ** (-torch.arange(0, width, 2, device=pos.device, dtype=torch.float32) / width)
        angle = pos[..., None, None].float() * freq
        cos, sin = angle.cos(), angle.sin()
        rope[width] = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return Context(pos, rope, {shape: causal_block_mask(*shape, pos.device) for shape in sorted(masks)})


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate-half RoPE (arXiv:2104.09864, eq. 34) of x [B, T, heads, width] by a table of `make_context`: channel i
    turns with channel i + width/2, which a roll by half the width puts in its place."""
    cos, sin = (t.to(x.dtype) for t in table)
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


@functools.lru_cache(maxsize=32)
def causal_block_mask(T: int, window: int, device: torch.device) -> BlockMask:
    """The causal BlockMask of T tokens, cut to the last `window` keys (0 = all), written down analytically:
    `create_block_mask` evaluates all T*T pairs, which takes 50-100 ms at T = 4096 where this takes half of one."""

    def mask_mod(b, h, q, k):
        return (q >= k) & (q - k < (window or T))

    n = -(-T // FLEX_BLOCK)
    row, col = (torch.arange(n, device=device).view(s) for s in ((n, 1), (1, n)))
    lowest = (row * FLEX_BLOCK - ((window or T) - 1)).clamp(min=0)  # the first key that the tile's first row sees
    listed = (col <= row) & (col >= lowest // FLEX_BLOCK)
    last_row = (row + 1) * FLEX_BLOCK - 1
    full = (col < row) & (last_row - col * FLEX_BLOCK < (window or T))  # its last row sees its first key

    def ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:  # [1, 1, n] counts and [1, 1, n, n] indices, chosen first
        index = torch.argsort(~chosen, dim=-1, stable=True).to(torch.int32)
        return chosen.sum(-1, dtype=torch.int32)[None, None], index[None, None]

    return BlockMask.from_kv_blocks(
        *ordered(listed & ~full), *ordered(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod, seq_lengths=(T, T)
    )


# ---------------------------------------------------------------------------------------------------------------------
# the core: softmax(q k^T / sqrt(K)) v under the causal mask, on the backend that is right for the device


def flex_problem(device: str, width: int, compiled: bool, grad: bool) -> str:
    """Why FlexAttention cannot do this ("" where it can)."""
    if not compiled:
        return "FlexAttention needs torch.compile, uncompiled it is 14-50x slower: set compile=on"
    if device == "cpu" and grad:
        return "FlexAttention has no backward on a CPU: set attn_backend=auto or sdpa"
    if device == "cuda" and width < 16:
        return f"FlexAttention on CUDA needs heads of at least 16 channels, these have {width}: set attn_backend=auto"
    return ""


def choose_backend(asked: str, device: str, width: int, compiled: bool, grad: bool) -> tuple[str, str]:
    """(backend, reason) for `asked` = "auto" | "flex" | "sdpa"; UserError where "flex" was asked for and cannot be."""
    if asked == "sdpa":
        return "sdpa", "asked for"
    problem = flex_problem(device, width, compiled, grad)
    if asked == "flex" and not compiled and not grad:
        return "sdpa", "generation is not compiled, whatever trains"
    if asked == "flex":
        if problem:
            raise UserError(f"attn_backend=flex cannot work here: {problem}")
        return "flex", "asked for"
    if device != "cuda":
        return "sdpa", f"the fused kernel that trains on {device}"
    return ("sdpa", problem) if problem else ("flex", "compiled on CUDA")


State = dict[str, Tensor]  # what one layer keeps of the past, by name


def attend(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, ctx: Context, window: int = 0, asked: str = "auto",
    state: State | None = None,
) -> Tensor:  # fmt: skip
    """Causal grouped-query attention -> [B, T, H*K]; token t sees tokens max(0, t-window+1) .. t of its row.

    Which backend, where `asked` is "auto":
    - FlexAttention on CUDA inside torch.compile, heads of at least 16 channels: one fused kernel forward, two
      backward, and a window costs only the tiles it touches.
    - scaled_dot_product_attention everywhere else. On a CPU its flash kernel reads strided views and shares the
      key/value heads (enable_gqa) without repeating them, as long as they keep the cores busy (`share_heads`);
      FlexAttention cannot train there at all, and uncompiled it is 14-50x slower, so "auto" never picks that. A window
      is cut into query chunks (`sdpa_window`).
    Raises UserError where FlexAttention was asked for and cannot train.

    With a `state` the new keys and values are stored in it; a decode step then reads the stored ones (`read`).
    """
    T, H, K = q_BTHK.shape[1:]
    if state is not None:
        store(state["k"], k_BTGK, ctx)
        store(state["v"], v_BTGK, ctx)
        if ctx.decode:
            return read(q_BTHK, state["k"], state["v"], ctx).flatten(2)
    q, k, v = (t.transpose(1, 2) for t in (q_BTHK, k_BTGK, v_BTGK))
    grad = torch.is_grad_enabled() and q.requires_grad
    backend, _ = choose_backend(asked, q.device.type, K, torch.compiler.is_compiling(), grad)
    gqa = k.size(1) != H
    if gqa and grad and backend == "sdpa" and not share_heads(q, k):
        k, v = (t.unsqueeze(2).expand(-1, -1, H // t.size(1), -1, -1).flatten(1, 2) for t in (k, v))
        gqa = False
    if backend == "flex":
        mask = ctx.masks[T, window] if (T, window) in ctx.masks else causal_block_mask(T, window, q.device)
        y = flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
    elif 0 < window < T:
        y = sdpa_window(q, k, v, window, gqa)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return y.transpose(1, 2).flatten(2)


@torch.compiler.assume_constant_result
def cpu_threads() -> int:
    return torch.get_num_threads()


def share_heads(q_BHTK: Tensor, k_BGTK: Tensor) -> bool:
    """Whether training should share key/value heads. On a CPU the backward's threads divide the B*G of them, and 3 of
    one text leave one of 2 cores idle for a quarter of the time: repeated to H they cost a copy and divide better."""

    def busy(heads: int) -> float:
        work, threads = heads * q_BHTK.size(0), cpu_threads()
        return work / (-(-work // threads) * threads)

    return q_BHTK.is_cuda or busy(k_BGTK.size(1)) > 0.9 * busy(q_BHTK.size(1))


def store(slots_BSGK: Tensor, new_BTGK: Tensor, ctx: Context) -> None:
    """Put a decode step's token, or a prefill's, at the slot of its position. A window's slots are a ring: position p
    lies at p modulo S, and a prefill leaves the last S tokens of every row there."""
    S, T = slots_BSGK.size(1), new_BTGK.size(1)
    if ctx.decode and ctx.uniform:
        slots_BSGK[:, (ctx.visible - 1) % S] = new_BTGK[:, 0]
        return
    row_B1 = torch.arange(len(new_BTGK), device=new_BTGK.device)[:, None]
    if ctx.decode:
        slot_B1, new_BTGK = ctx.pos % S, new_BTGK.to(slots_BSGK.dtype)
        if ctx.keep is not None:
            new_BTGK = torch.where(ctx.keep[:, None, None, None], new_BTGK, slots_BSGK[row_B1, slot_B1])
        slots_BSGK[row_B1, slot_B1] = new_BTGK
    elif T <= S:
        slots_BSGK[:, :T] = new_BTGK
    else:  # slot s gets the row's last position that is s modulo S
        last_B1, slot_S = ctx.lengths[:, None] - 1, torch.arange(S, device=new_BTGK.device)
        slots_BSGK.copy_(new_BTGK[row_B1, (last_B1 - (last_B1 - slot_S) % S).clamp(min=0)])


def read(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, ctx: Context, scale: float | None = None) -> Tensor:
    """One query a row over its stored keys and values -> [B, 1, H, K]. `ctx.visible` cuts the slots to a view, which
    a CPU reads faster than a mask; without it all slots are read under a mask: one shape, one graph."""
    S = k_BSGK.size(1)
    n = S if ctx.visible is None else min(ctx.visible, S)
    mask = None
    if not ctx.uniform:  # a ring is full once the row is as long as it, and holds positions 0.. before
        mask = (torch.arange(n, device=q_BTHK.device) <= ctx.pos)[:, None, None]
    q_BGhK = q_BTHK.squeeze(1).unflatten(1, (k_BSGK.size(2), -1))  # the heads of a group are its queries: one product
    k_BGSK, v_BGSK = (t[:, :n].transpose(1, 2) for t in (k_BSGK, v_BSGK))
    y_BGhK = F.scaled_dot_product_attention(q_BGhK, k_BGSK, v_BGSK, attn_mask=mask, scale=scale)
    return y_BGhK.flatten(1, 2).unsqueeze(1)


def sdpa_window(q: Tensor, k: Tensor, v: Tensor, window: int, gqa: bool) -> Tensor:
    """Sliding-window attention, all [B, heads, T, K]: SDPA over chunks of queries and the keys that those can see.
    Short texts take one chunk: below 4 windows the calls cost more than the masked-out work that they save."""
    T = q.size(2)
    rows = max(window // 2, 256 if q.dtype == torch.bfloat16 else 64) if T >= 4 * window else T
    chunks = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        first = max(0, start - window + 1) // 16 * 16  # aligned: the CPU kernel is slower on ragged key ranges
        i, j = torch.arange(start, stop, device=q.device)[:, None], torch.arange(first, stop, device=q.device)
        seen = (j <= i) & (j > i - window)
        chunks.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], attn_mask=seen, enable_gqa=gqa
            )
        )
    return torch.cat(chunks, dim=2)


# ---------------------------------------------------------------------------------------------------------------------
# the variants; `c` is the model's HydraConfig
#
# forward(x_BTD, ctx, state=None): without a state the whole text; with one (`new_state`) a prefill of an empty state,
# or a decode step where ctx.decode says so.


class GQA(nn.Module):
    """MHA, GQA and MQA: H query heads share `n_kv_head` key/value heads of width K = D/H; RoPE on all K channels."""

    def __init__(self, c, n_kv_head: int, window: int = 0):
        super().__init__()
        self.n_head, self.n_kv_head, self.window, self.asked = c.n_head, n_kv_head, window, c.attn_backend
        self.head_width = self.rope_width = c.dim // c.n_head
        self.qkv = Linear(c.dim, c.dim + 2 * n_kv_head * self.head_width)
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.out = Linear(c.dim, c.dim)

    def new_state(self, B: int, S: int, like: Tensor) -> State:
        """For texts of up to S tokens; with a window its last tokens are enough."""
        shape = (B, min(S, self.window or S), self.n_kv_head, self.head_width)
        return {name: like.new_zeros(shape) for name in ("k", "v")}

    def forward(self, x_BTD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        H, G = self.n_head, self.n_kv_head
        qk_BTNK, v_BTGK = self.qkv(x_BTD).unflatten(-1, (-1, self.head_width)).split((H + G, G), dim=2)
        q_BTHK, k_BTGK = apply_rope(qk_BTNK, ctx.rope[self.rope_width]).split((H, G), dim=2)
        return self.out(self.norm(attend(q_BTHK, k_BTGK, v_BTGK, ctx, self.window, self.asked, state)))


class CCQA(nn.Module):
    """Compressed convolutional grouped-query attention, CCGQA of arXiv:2510.04476, sections 3.1-3.3: the whole
    attention runs in a latent of width L = D/C, with queries and keys mixed over time by two short causal
    convolutions and with each other by their means. Ablation: conv_kernel = 0, qk_gain = 0, value_shift = false."""

    def __init__(self, c):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_width = H, G, K = c.ccqa_heads
        self.rope_width, self.asked = K, c.attn_backend
        self.latent, self.kappa = H * K, G * K
        self.conv_kernel, self.qk_gain, self.value_shift, self.eps = c.conv_kernel, c.qk_gain, c.value_shift, c.norm_eps
        self.reach = 2 * max(0, c.conv_kernel - 1)  # tokens that the convolutions see behind the present one
        channels = self.latent + self.kappa
        self.down = Linear(c.dim, channels + self.kappa)  # q, k and both halves of v at once
        if c.conv_kernel:
            self.conv_depthwise = nn.Parameter(torch.empty(channels, c.conv_kernel))
            self.conv_grouped = nn.Parameter(torch.empty(channels, K, c.conv_kernel))  # one group a head, K x K inside
        self.k_temperature = nn.Parameter(torch.empty(G))
        self.norm = RMSNorm(self.latent, c.norm_eps)
        self.out = Linear(self.latent, c.dim)

    def new_state(self, B: int, S: int, like: Tensor) -> State:
        """Compressed keys and values for up to S tokens, and the constant tail that convolutions and shift look at."""
        state = {name: like.new_zeros(B, S, self.n_kv_head, self.head_width) for name in ("k", "v")}
        state["qk_tail"] = like.new_zeros(B, self.reach, self.latent + self.kappa)
        if self.value_shift:
            state["v_tail"] = like.new_zeros(B, 1, self.kappa // 2)
        return state

    def forward(self, x_BTD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        H, G = self.n_head, self.n_kv_head
        qk, v = self.down(x_BTD).split((self.latent + self.kappa, self.kappa), dim=-1)
        if self.value_shift:  # half of the values are the previous token's, zero before the first
            now, before = v.chunk(2, dim=-1)
            v = torch.cat((now, with_past(before, 1, "v_tail", ctx, state)[:, :-1]), dim=-1)
        mixed = self.convolve(with_past(qk, self.reach, "qk_tail", ctx, state)) if self.conv_kernel else qk
        mixed_BTNK = mixed.unflatten(-1, (H + G, -1))
        if self.qk_gain:
            mixed_BTNK = mixed_BTNK + self.couple(qk.unflatten(-1, (H + G, -1)))
        # post-mix norm: without a gain this is the paper's L2 norm times sqrt(K), so a logit is at most sqrt(K) * temp
        mixed_BTNK = F.rms_norm(mixed_BTNK, (self.head_width,), eps=self.eps)
        q_BTHK, k_BTGK = apply_rope(mixed_BTNK, ctx.rope[self.rope_width]).split((H, G), dim=2)
        k_BTGK = k_BTGK * self.k_temperature.to(k_BTGK.dtype)[:, None]
        y = attend(q_BTHK, k_BTGK, v.unflatten(-1, (G, -1)), ctx, asked=self.asked, state=state)
        return self.out(self.norm(y))

    def couple(self, qk_BTNK: Tensor) -> Tensor:
        """QK-mean coupling of the pre-convolution queries and keys -> what to add to each, [B, T, H+G, K]."""
        q_BTHK, k_BTGK = qk_BTNK.split((self.n_head, self.n_kv_head), dim=2)
        m_BTGhK = self.qk_gain * (q_BTHK.unflatten(2, (self.n_kv_head, -1)) + k_BTGK.unsqueeze(3))
        return torch.cat((m_BTGhK.flatten(2, 3), m_BTGhK.mean(3)), dim=2)

    def convolve(self, u: Tensor) -> Tensor:
        """Depthwise, then per-head convolution over time, [B, reach + T, H*K + G*K] -> [B, T, the same]: the first
        `reach` = 2*(conv_kernel-1) rows are the past (zeros before the first token), so both are causal."""
        taps = self.conv_kernel
        depthwise, grouped = self.conv_depthwise.to(u.dtype), self.conv_grouped.to(u.dtype)
        T = u.size(1) - taps + 1
        u = sum((u[:, i : i + T] * depthwise[:, i] for i in range(1, taps)), u[:, :T] * depthwise[:, 0])
        return per_head_einsum(u, grouped) if u.is_cuda or T == taps else per_head_conv1d(u, grouped)


def per_head_conv1d(u: Tensor, grouped: Tensor) -> Tensor:
    """[B, T + taps - 1, N*K] and filters [N*K, K, taps] -> [B, T, N*K], each head by its own filters."""
    y = F.conv1d(u.transpose(1, 2), grouped, groups=u.size(-1) // grouped.size(1))
    return y.transpose(1, 2).contiguous()  # heads must be dense in memory: SDPA has no fused kernel for others


def per_head_einsum(u: Tensor, grouped: Tensor) -> Tensor:
    """The same as one batched matrix product over the stacked taps: a GPU's compiler fuses it with its neighbours, and
    for the one row of a decode step a convolution's set-up costs more than its work."""
    K, taps = grouped.shape[1:]
    T = u.size(1) - taps + 1
    seen = torch.stack([u[:, i : i + T].unflatten(-1, (-1, K)) for i in range(taps)], dim=-1)
    return torch.einsum("btnij,noij->btno", seen, grouped.unflatten(0, (-1, K))).flatten(2)


def with_past(x: Tensor, rows: int, name: str, ctx: Context, state: State | None) -> Tensor:
    """x [B, T, channels] behind the `rows` rows before it, zeros before the first token. A decoding state's tail
    `name` gives those rows, and keeps each text's last ones."""
    if state is None or not ctx.decode:
        x = F.pad(x, (0, 0, rows, 0))
    else:
        x = torch.cat((state[name].to(x.dtype), x), dim=1)
    if state is not None and ctx.decode:
        state[name].copy_(x[:, 1:] if ctx.keep is None else torch.where(ctx.keep[:, None, None], x[:, 1:], x[:, :-1]))
    elif state is not None:  # row b's text ends at lengths[b], in front of its padding
        row_B1 = torch.arange(len(x), device=x.device)[:, None]
        state[name].copy_(x[row_B1, ctx.lengths[:, None] + torch.arange(rows, device=x.device)])
    return x


class MLA(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434, section 2.1) with decoupled RoPE; q, k and v all come from one
    normed latent of width R. Half of a head's K channels carry no position, half are rotated, and the rotated key
    is one K/2 vector shared by all heads. q/k and v are equally wide so that the fused kernels take them."""

    def __init__(self, c):
        super().__init__()
        self.n_head, self.asked = c.n_head, c.attn_backend
        self.latent = R = c.latent
        self.head_width = R // c.n_head
        self.rope_width = self.head_width // 2
        self.down = Linear(c.dim, R)
        self.latent_norm = RMSNorm(R, c.norm_eps)
        # W_q, W_kr, W_uk, W_uv in this order: a decode step makes a product with the first two, and absorbs the others
        self.up = Linear(R, 2 * R + R // 2 + self.rope_width)
        self.up_query: nn.Module | None = None  # W_q and W_kr once more, packed: see `Hydra.pack`
        self.norm = RMSNorm(R, c.norm_eps)
        self.out = Linear(R, c.dim)

    def new_state(self, B: int, S: int, like: Tensor) -> State:
        """For up to S tokens the normed latent and the shared rope key, side by side: R + K/2 values a token."""
        return {"latent": like.new_zeros(B, S, 1, self.latent + self.rope_width)}

    def forward(self, x_BTD: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        H, R, table = self.n_head, self.latent, ctx.rope[self.rope_width]
        latent = self.latent_norm(self.down(x_BTD))
        if ctx.decode:
            return self.out(self.norm(self.absorbed(latent, ctx, state)))
        q, k_rope, k_nope, v = self.up(latent).split((R, self.rope_width, R // 2, R), dim=-1)
        q_nope, q_rope = q.unflatten(-1, (H, -1)).chunk(2, dim=-1)
        k_rope = apply_rope(k_rope.unsqueeze(2), table)
        if state is not None:
            store(state["latent"], torch.cat((latent.unsqueeze(2), k_rope), dim=-1), ctx)
        q_BTHK = torch.cat((q_nope, apply_rope(q_rope, table)), dim=-1)
        k_BTHK = torch.cat((k_nope.unflatten(-1, (H, -1)), k_rope.expand(-1, -1, H, -1)), dim=-1)
        return self.out(self.norm(attend(q_BTHK, k_BTHK, v.unflatten(-1, (H, -1)), ctx, asked=self.asked)))

    def absorbed(self, latent: Tensor, ctx: Context, state: State) -> Tensor:
        """A decode step -> [B, 1, R]. W_uk goes into the query and W_uv behind the read, so that the attention runs
        over the latents themselves (one key/value head, R + K/2 wide) and the past is never expanded."""
        H, R, table = self.n_head, self.latent, ctx.rope[self.rope_width]
        W_query, W_uk, W_uv = self.up.weight.to(latent.dtype).split((R + self.rope_width, R // 2, R))
        q, k_rope = (self.up_query(latent) if self.up_query else linear(latent, W_query)).tensor_split((R,), dim=-1)
        q_nope, q_rope = q.unflatten(-1, (H, -1)).chunk(2, dim=-1)
        k_rope = apply_rope(k_rope.unsqueeze(2), table)
        store(state["latent"], torch.cat((latent.unsqueeze(2), k_rope), dim=-1), ctx)
        q_latent = torch.einsum("bthk,hkr->bthr", q_nope, W_uk.unflatten(0, (H, -1)))
        q = torch.cat((q_latent, apply_rope(q_rope, table)), dim=-1)
        past = state["latent"]  # also the values: equal widths keep the fused kernel, the rope part is cut off
        y = read(q, past, past, ctx, scale=self.head_width**-0.5)[..., :R]
        return torch.einsum("bthr,hkr->bthk", y, W_uv.unflatten(0, (H, -1))).flatten(2)


def make_attention(letter: str, c) -> nn.Module:
    """The attention of one layer-mix letter."""
    match letter:
        case "A":
            return GQA(c, c.n_head)
        case "G":
            return GQA(c, c.n_kv_head)
        case "M":
            return GQA(c, 1, c.window)
        case "C":
            return CCQA(c)
        case "L":
            return MLA(c)
    raise UserError(f"pattern: unknown letter {letter!r}: use A (MHA), G (GQA), M (MQA), C (CCQA) or L (MLA)")
