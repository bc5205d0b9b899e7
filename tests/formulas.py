"""The closed formulas of a model's costs, written from the equations of its parts: what accounting.py, which counts
modules, is held against. None of it is read from the modules or from accounting.

Letters: D model width, H query heads, G key/value heads, K head width, L and kappa CCQA's widths, R MLA's latent.
"""

from attention import ccqa_heads
from model import HydraConfig

LETTERS = "AGMCL"  # those that have formulas here


def kv_heads(c: HydraConfig, letter: str) -> int:
    """Key/value heads of the uncompressed letters."""
    return {"A": c.n_head, "G": c.n_kv_head, "M": 1}[letter]


def latent(c: HydraConfig) -> int:
    """R, the width of MLA's latent."""
    return round(c.dim * c.latent_ratio)


def score_width(c: HydraConfig, letter: str) -> int:
    """Width of all queries together."""
    widths = {"C": c.dim // c.compression, "L": latent(c)}
    return widths.get(letter, c.dim)


def window(c: HydraConfig, letter: str) -> int:
    """Last tokens that a layer sees, 0 = all."""
    return c.window if letter == "M" else 0


def recursion_tokens(c: HydraConfig, T: int) -> list[int]:
    """Tokens of each recursion: T, then less by a part of it each time."""
    n = c.mor_recursions
    return [max(1, T * (n - i) // n) for i in range(n)]


def layer_tokens(c: HydraConfig, T: int) -> list[tuple[str, int]]:
    """(letter, tokens) of every layer of every recursion, at the routers' training capacities."""
    found = []
    for tokens in recursion_tokens(c, T):
        for i, letter in enumerate(c.layers):
            routed = c.mod_capacity > 0 and i % 2 == 1
            found.append((letter, max(1, int(c.mod_capacity * tokens)) if routed else tokens))
    return found


def router_count(c: HydraConfig) -> tuple[int, int]:
    """Routers with a vector, of blocks and of recursions."""
    if c.router == "random":
        return 0, 0
    return (c.n_layer // 2 if c.mod_capacity else 0), c.mor_recursions - 1


def short_channels(c: HydraConfig, letter: str) -> int:
    """Channels of the short convolution: all queries, keys and values, or MLA's latent; CCQA has none."""
    if letter in "AGM":
        return c.dim + 2 * kv_heads(c, letter) * (c.dim // c.n_head)
    return latent(c) if letter == "L" else 0


def attention_params(c: HydraConfig, letter: str) -> int:
    """Parameters of one attention, its pre-out norm included, the block's norms not."""
    D = c.dim
    options = short_channels(c, letter) * c.short_conv  # its filters, temperatures, less the norm that is left out
    if letter != "C" and c.qk_norm and c.k_temperature:
        options += c.n_head if letter == "L" else kv_heads(c, letter)
    if not c.pre_out_norm:
        options -= score_width(c, letter)
    if letter in "AGM":
        return 2 * D * D + 2 * D * kv_heads(c, letter) * (D // c.n_head) + D + options
    if letter == "C":
        H, G, K = ccqa_heads(c)
        L = H * K
        kappa = G * K
        convolutions = c.conv_kernel * (L + kappa) * (1 + K)
        return 2 * D * L + 2 * D * kappa + convolutions + G * c.k_temperature + L + options
    assert letter == "L"
    R = latent(c)
    return 2 * D * R + R * (2 * R + R // 2 + R // c.n_head // 2) + 2 * R + options


def count_params(c: HydraConfig) -> int:
    """All parameters; the head is the embedding."""
    total = (c.vocab_size + 1 + sum(router_count(c))) * c.dim
    for letter in c.layers:
        total += attention_params(c, letter) + 3 * c.dim * c.mlp_hidden + 2 * c.dim
        if c.alpha == "learned":  # scales and biases of both lines and of what is added to them
            total += 8 * c.dim
    return total


def attention_flops(c: HydraConfig, letter: str, T: int) -> float:
    """Forward FLOPs of one attention per token, two a multiply-add, over the causal mean of T/2 keys."""
    D = c.dim
    short = 2 * short_channels(c, letter) * c.short_conv
    if letter in "AGM":
        W = window(c, letter)
        keys = W * (1 - W / (2 * T)) if 0 < W < T else T / 2
        return 4 * D * D + 4 * D * kv_heads(c, letter) * (D // c.n_head) + 4 * keys * D + short
    if letter == "C":
        H, G, K = ccqa_heads(c)
        L = H * K
        kappa = G * K
        return 4 * D * L + 4 * D * kappa + 2 * c.conv_kernel * (L + kappa) * (1 + K) + 2 * T * L
    assert letter == "L"
    R = latent(c)
    return 4 * D * R + 2 * R * (2 * R + R // 2 + R // c.n_head // 2) + 2 * T * R + short


def router_flops(c: HydraConfig, T: int) -> int:
    """Of all routers' scores for one text: two a number of each vector and token."""
    candidates = recursion_tokens(c, T)
    return 2 * c.dim * (sum(candidates[:-1]) * bool(router_count(c)[1]) + router_count(c)[0] * sum(candidates))


def flops_per_token(c: HydraConfig, T: int) -> float:
    """Forward FLOPs per token at T tokens, head included, at the routers' training capacities."""
    total = router_flops(c, T)
    for letter, tokens in layer_tokens(c, T):
        total += tokens * (attention_flops(c, letter, tokens) + 6 * c.dim * c.mlp_hidden)
    return 2 * c.dim * c.vocab_size + total / T


def torch_flops(c: HydraConfig, T: int) -> float:
    """What torch's FlopCounterMode counts of a training forward of one text: all pairs of the attention, not their
    causal half, but neither depthwise convolutions nor a matrix times a vector, as a router's scores are."""
    total = T * flops_per_token(c, T) - router_flops(c, T)
    for letter, tokens in layer_tokens(c, T):
        total += tokens * 2 * tokens * score_width(c, letter)
        total -= tokens * 2 * short_channels(c, letter) * c.short_conv
        if letter == "C":
            H, G, K = ccqa_heads(c)
            total -= tokens * 2 * c.conv_kernel * (H + G) * K
    return total


def state_values(c: HydraConfig, letter: str) -> int:
    """Values that decoding keeps per past token in one layer: keys and values, or MLA's latent and shared rope key, and
    with qk_norm a factor for the key of each head."""
    if letter in "AGM":
        return 2 * kv_heads(c, letter) * (c.dim // c.n_head)
    if letter == "C":
        _, G, K = ccqa_heads(c)
        return 2 * G * K
    assert letter == "L"
    return latent(c) + latent(c) // c.n_head // 2 + c.qk_norm * c.n_head


def kv_bytes(c: HydraConfig, T: int, itemsize: int = 2, allocated: bool = False) -> int:
    """Bytes of the slots of one text of T tokens over all layers, at the training capacities of the routers, or for as
    many tokens as a router may select."""
    values = 0
    for letter, tokens in layer_tokens(c, T):
        slots = T if allocated else tokens
        values += min(slots, window(c, letter) or slots) * state_values(c, letter)
    return itemsize * values


def tail_bytes(c: HydraConfig, itemsize: int = 2) -> int:
    """Bytes of the constant tails of one text: CCQA's 2*(conv_kernel-1) rows of q and k and one row of shifted values,
    the others' short_conv-1 projected rows."""
    values = 0
    for letter in c.mor_recursions * c.layers:
        values += max(0, c.short_conv - 1) * short_channels(c, letter)
        if letter == "C":
            H, G, K = ccqa_heads(c)
            values += 2 * max(0, c.conv_kernel - 1) * (H + G) * K + c.value_shift * G * K // 2
    return itemsize * values
