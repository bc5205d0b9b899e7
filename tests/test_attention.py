"""The variants against plain-loop fp64 references written from the equations of the papers, the core's backends
against each other, and the FlexAttention road, which is traced (not run) as CUDA would compile it."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from conftest import FAIR
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.nn.attention import flex_attention as flex_module

import attention
import machine
from attention import CCQA, GQA, KINDS, MLA, attend, ccqa_heads, letters_help, make_context, sdpa_window
from configurator import UserError
from machine import causal_block_mask, choose_backend
from model import Hydra, HydraConfig

SHAPE = dict(vocab_size=61, block_size=64, dim=64, n_head=4, n_kv_head=2, n_layer=1, compression=2, latent_head_dim=0,
             mlp_ratio=1.0)  # fmt: skip


def build(pattern: str, **changes):
    """A layer in fp64 with every parameter away from its start, and a text of 11 vectors."""
    torch.manual_seed(0)
    config = HydraConfig(**SHAPE | {"pattern": pattern} | changes)
    net = Hydra(config).double()
    layer = net.blocks[0].attn
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    x = torch.randn(2, 11, config.dim, dtype=torch.float64)
    return layer, x, net.context(torch.arange(11)), config


def rms(v, gain=None, *, eps):
    v = v / torch.sqrt((v * v).mean() + eps)
    return v if gain is None else v * gain


def rotate(v, t, c):
    """RoPE of one vector at position t, pair by pair (channel i with i + n/2) of its first n channels."""
    out = v.clone()
    turning = round(len(v) * c.rope_fraction)
    half = turning // 2
    for i in range(half):
        angle = t * c.rope_theta ** (-2 * i / turning)
        out[i] = v[i] * math.cos(angle) - v[i + half] * math.sin(angle)
        out[i + half] = v[i + half] * math.cos(angle) + v[i] * math.sin(angle)
    return out


def short_convolved(layer, rows, c):
    """Of projected rows, a list of vectors: channel by channel each row's taps back, the last tap at the row."""
    if not c.short_conv:
        return rows
    filters = layer.short_conv.weight
    assert filters.shape == (len(rows[0]), c.short_conv)
    out = []
    for t in range(len(rows)):
        total = torch.zeros_like(rows[t])
        for i in range(c.short_conv):
            if t - i >= 0:
                total = total + filters[:, c.short_conv - 1 - i] * rows[t - i]
        out.append(total)
    return out


def query_and_key(layer, q, k, g, normed, c):
    """With and without QK-norm and the temperature of key g."""
    if normed:
        q, k = rms(q, eps=c.norm_eps), rms(k, eps=c.norm_eps)
    if c.k_temperature and (normed or c.pattern == "C"):
        k = k * layer.k_temperature[g]
    return q, k


def merged(layer, heads, c):
    y = torch.cat(heads)
    return layer.out.weight @ (rms(y, layer.norm.weight, eps=c.norm_eps) if c.pre_out_norm else y)


def softmax_read(q, keys, values):
    scores = torch.stack([q @ k for k in keys]) / math.sqrt(len(q))
    return (scores.softmax(0)[:, None] * torch.stack(values)).sum(0)


def reference_gqa(layer, x, c, window):
    H, G, K = layer.n_head, layer.n_kv_head, layer.head_width
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        projected = short_convolved(layer, [layer.qkv.weight @ row for row in x[b]], c)
        q = [row[: H * K].view(H, K) for row in projected]
        k = [row[H * K : (H + G) * K].view(G, K) for row in projected]
        v = [row[(H + G) * K :].view(G, K) for row in projected]
        for t in range(x.size(1)):
            first = max(0, t - window + 1) if window else 0
            heads = []
            for h in range(H):
                g = h * G // H
                keys = []
                for s in range(first, t + 1):
                    query, key = query_and_key(layer, q[t][h], k[s][g], g, c.qk_norm, c)
                    keys.append(rotate(key, s, c))
                heads.append(softmax_read(rotate(query, t, c), keys, [v[s][g] for s in range(first, t + 1)]))
            out[b, t] = merged(layer, heads, c)
    return out


def reference_ccqa(layer, x, c):
    H, G, K = ccqa_heads(c)
    L = c.dim // c.compression
    kappa = G * K
    taps = c.conv_kernel
    W = layer.down.weight
    Wq, Wk, Wv = W[:L], W[L : L + kappa], W[L + kappa :]
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        T = x.size(1)
        q0 = [Wq @ x[b, t] for t in range(T)]
        k0 = [Wk @ x[b, t] for t in range(T)]
        zero = torch.zeros(L + kappa, dtype=x.dtype)
        u = [torch.cat((q0[t], k0[t])) for t in range(T)]
        if taps:
            one = []
            for t in range(T):  # depthwise: channel by channel, tap taps-1 is the present
                past = [u[t - taps + 1 + i] if t - taps + 1 + i >= 0 else zero for i in range(taps)]
                one.append(sum(layer.conv_depthwise[:, i] * past[i] for i in range(taps)))
            u = []
            for t in range(T):  # grouped: each head mixes its own K channels
                past = [one[t - taps + 1 + i] if t - taps + 1 + i >= 0 else zero for i in range(taps)]
                rows = [layer.conv_grouped[n * K : (n + 1) * K, :, i] @ past[i][n * K : (n + 1) * K]
                        for n in range(H + G) for i in range(taps)]
                u.append(torch.cat([sum(rows[n * taps : (n + 1) * taps]) for n in range(H + G)]))
        values, keys, queries = [], [], []
        for t in range(T):
            v = Wv @ x[b, t]
            if c.value_shift:
                before = (Wv @ x[b, t - 1])[kappa // 2 :] if t else torch.zeros(kappa // 2, dtype=x.dtype)
                v = torch.cat((v[: kappa // 2], before))
            values.append(v.view(G, K))
            qh, kg = q0[t].view(H, K), k0[t].view(G, K)
            m_q = [c.qk_gain * (qh[h] + kg[h * G // H]) for h in range(H)]
            m_k = [sum(m_q[h] for h in range(H) if h * G // H == g) / (H // G) for g in range(G)]
            uq, uk = u[t][:L].view(H, K), u[t][L:].view(G, K)
            pairs = [query_and_key(layer, uq[h] + m_q[h], uk[h * G // H] + m_k[h * G // H], h * G // H, c.ccqa_norm, c)
                     for h in range(H)]
            queries.append([rotate(query, t, c) for query, _ in pairs])
            keys.append([rotate(pairs[g * H // G][1], t, c) for g in range(G)])
        for t in range(T):
            heads = [softmax_read(queries[t][h], [keys[s][h * G // H] for s in range(t + 1)],
                                  [values[s][h * G // H] for s in range(t + 1)]) for h in range(H)]
            out[b, t] = merged(layer, heads, c)
    return out


def reference_mla(layer, x, c):
    H = c.n_head
    R = int(c.dim * c.latent_ratio)
    K = R // H
    Wq, Wkr, Wuk, Wuv = layer.up.weight.split((R, K // 2, R // 2, R))
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        down = short_convolved(layer, [layer.down.weight @ row for row in x[b]], c)
        latent = [rms(row, layer.latent_norm.weight, eps=c.norm_eps) for row in down]
        for t in range(x.size(1)):
            heads = []
            for h in range(H):
                keys = []
                for s in range(t + 1):  # normed as a whole, then rotated
                    k = torch.cat((Wuk[h * K // 2 : (h + 1) * K // 2] @ latent[s], Wkr @ latent[s]))
                    q, k = query_and_key(layer, Wq[h * K : (h + 1) * K] @ latent[t], k, h, c.qk_norm, c)
                    keys.append(torch.cat((k[: K // 2], rotate(k[K // 2 :], s, c))))
                q = torch.cat((q[: K // 2], rotate(q[K // 2 :], t, c)))
                heads.append(softmax_read(q, keys, [Wuv[h * K : (h + 1) * K] @ latent[s] for s in range(t + 1)]))
            out[b, t] = merged(layer, heads, c)
    return out


@torch.no_grad()
@pytest.mark.parametrize("letter, window", [("A", 0), ("G", 0), ("M", 0), ("M", 1), ("M", 3), ("M", 20)])
@pytest.mark.parametrize("changes", [
    {}, {"rope_theta": 50.0, "norm_eps": 0.3}, {"qk_norm": True, "norm_eps": 0.1}, {"short_conv": 4},
    {"qk_norm": True, "k_temperature": False}, {"rope_fraction": 0.5, "pre_out_norm": False}, {"rope_fraction": 0.0},
    {"qk_norm": True, "short_conv": 2, "rope_fraction": 0.25},
], ids=str)  # fmt: skip
def test_mha_gqa_mqa_equal_the_reference(letter, window, changes):
    layer, x, ctx, config = build(letter, window=window, **changes)
    torch.testing.assert_close(layer(x, ctx), reference_gqa(layer, x, config, window), rtol=1e-5, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {}, {"compression": 4}, {"compression": 8, "n_kv_head": 4}, {"conv_kernel": 0}, {"conv_kernel": 1},
    {"conv_kernel": 2}, {"qk_gain": 0.0}, {"qk_gain": 0.5}, {"value_shift": False}, {"n_kv_head": 1},
    {"latent_head_dim": 16}, {"latent_head_dim": 4}, {"conv_kernel": 0, "qk_gain": 0.0, "value_shift": False},
    {"rope_theta": 50.0, "norm_eps": 0.3}, {"latent_head_dim": -1}, {"ccqa_norm": False}, {"k_temperature": False},
    {"rope_fraction": 0.5, "pre_out_norm": False}, {"rope_fraction": 0.0},
    {"ccqa_norm": False, "k_temperature": False, "conv_kernel": 0, "qk_gain": 0.0, "value_shift": False},
], ids=str)  # fmt: skip
def test_ccqa_equals_the_reference(changes):
    layer, x, ctx, config = build("C", **changes)
    torch.testing.assert_close(layer(x, ctx), reference_ccqa(layer, x, config), rtol=1e-5, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"latent_ratio": 0.25}, {"latent_ratio": 0.5}, {"latent_ratio": 1.0},
                                     {"rope_theta": 50.0, "norm_eps": 0.3}, {"qk_norm": True, "norm_eps": 0.1},
                                     {"qk_norm": True, "k_temperature": False}, {"short_conv": 4},
                                     {"rope_fraction": 0.5, "pre_out_norm": False}, {"rope_fraction": 0.0},
                                     {"qk_norm": True, "short_conv": 2, "rope_fraction": 0.5}], ids=str)  # fmt: skip
def test_mla_equals_the_reference(changes):
    layer, x, ctx, config = build("L", **changes)
    torch.testing.assert_close(layer(x, ctx), reference_mla(layer, x, config), rtol=1e-5, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("letter", KINDS)
def test_true_positions_are_used(letter):
    """Positions shifted as a whole change nothing (RoPE is relative), a gap changes the output, rows may differ."""
    layer, x, ctx, config = build(letter)
    widths = {layer.rope_width}
    assert ctx.rope.keys() == widths

    def run(pos):
        return layer(x, make_context(pos, widths, config.rope_theta))

    base = layer(x, ctx)
    torch.testing.assert_close(run(torch.arange(11) + 5), base, rtol=1e-4, atol=1e-5)  # tables are fp32
    gap = torch.arange(11) + 30 * (torch.arange(11) > 5)
    assert (run(gap) - base).abs().max() > 1e-3
    rows = run(torch.stack((torch.arange(11), gap)))
    torch.testing.assert_close(rows[0], base[0])
    torch.testing.assert_close(rows[1], run(gap)[1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, window", [(64, 16), (65, 16), (300, 33), (200, 1), (513, 64), (40, 39), (900, 200)])
def test_windowed_sdpa_equals_a_masked_reference(T, window, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 16, dtype=dtype) for heads in (4, 1, 1))
    scores = (q.float() @ k.float().transpose(-1, -2) / 4).masked_fill(~visible_pairs(T, window), -math.inf)
    tol = 1e-5 if dtype == torch.float32 else 2e-2
    expected = scores.softmax(-1) @ v.float()
    torch.testing.assert_close(sdpa_window(q, k, v, window, True).float(), expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [*({"pattern": letter} for letter in KINDS), *FAIR[:-1]], ids=str)
def test_every_variant_runs_on_the_fused_kernel(changes, dtype, grad):
    """SDPA falls back to its slow math silently, for unequal widths or heads that are not dense: here it raises."""
    layer, x, ctx, _ = build(**changes)
    fused = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16), fused:
        y = layer.float()(x.float().requires_grad_(grad), ctx)
        if grad:
            y.sum().backward()


def dense(mask, T):
    """What a BlockMask lets the compiled kernel see: mask_mod in partial tiles, everything in full ones."""
    size = mask.BLOCK_SIZE[0]
    n = math.ceil(T / size)
    seen = torch.zeros(n * size, n * size, dtype=torch.bool)
    pos = torch.arange(n * size)
    allowed = mask.mask_mod(0, 0, pos[:, None], pos)
    for row in range(n):
        rows = slice(row * size, row * size + size)
        for tile in mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist():
            columns = slice(tile * size, tile * size + size)
            seen[rows, columns] = allowed[rows, columns]
        for tile in mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist():
            seen[rows, tile * size : tile * size + size] = True
    return seen[:T, :T]


def visible_pairs(T, window):
    i = torch.arange(T)[:, None]
    j = torch.arange(T)
    return (j <= i) & (j > i - (window or T))


@pytest.mark.parametrize("T, window", [(128, 0), (200, 0), (513, 0), (640, 1), (640, 128), (640, 129), (640, 300),
                                       (1000, 127), (100, 30)])  # fmt: skip
def test_the_block_mask_lists_exactly_the_visible_tiles(T, window):
    mask = causal_block_mask(T, window, torch.device("cpu"))
    assert torch.equal(dense(mask, T), visible_pairs(T, window))
    tiles = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    size = mask.BLOCK_SIZE[0]
    touched = visible_pairs(math.ceil(T / size) * size, window).view(math.ceil(T / size), size, -1, size).any(3).any(1)
    assert tiles == touched.sum()  # a window costs only the tiles that it touches
    assert causal_block_mask(T, window, torch.device("cpu")) is mask  # made once


@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_equals_sdpa_on_a_cpu():
    """Compiled, FlexAttention reads the BlockMask's indices (eager it does not): a wrong mask fails here. Of this
    window's tiles some are full, some cut by the diagonal, some by the window, some empty."""
    window = 260
    torch.manual_seed(0)
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 400, heads, 16) for heads in (4, 2, 2))
    ctx = make_context(torch.arange(400), {16}, 1e4, {(400, window)})
    expected = attend(q, k, v, ctx, window, "sdpa")
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, ctx, window, "flex"), fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [
    {"pattern": "M", "window": 8}, {"pattern": "C"},
    *(pytest.param(it, marks=pytest.mark.slow) for it in ({"pattern": "L"}, FAIR[2], FAIR[3], FAIR[-2])),
], ids=str)  # fmt: skip
def test_the_flex_road_is_one_graph_with_gradients_equal_to_sdpa(changes, monkeypatch):
    """The road that CUDA takes, traced forward and backward on a CPU with FlexAttention's device check patched away."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(machine, "flex_problem", lambda *_: "")
    config = HydraConfig(**SHAPE | changes)
    torch.manual_seed(0)
    reference = Hydra(config)
    torch._dynamo.reset()
    flex = Hydra(replace(config, attn_backend="flex"))
    flex.load_state_dict(reference.state_dict())
    idx = torch.randint(0, 61, (2, 24))
    targets = torch.randint(0, 61, (2, 24))
    recorder = AotEagerAndRecordGraphs()
    loss = torch.compile(flex, backend=recorder, fullgraph=True)(idx, targets).loss
    loss.backward()
    assert len(recorder.graphs) == 1
    assert "higher_order.flex_attention(" in recorder.fw_graphs[0].code
    assert "higher_order.flex_attention_backward(" in recorder.bw_graphs[0].code
    expected = reference(idx, targets).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(flex.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_auto_never_picks_an_uncompiled_flex_and_says_why():
    assert choose_backend("auto", "cuda", 16, True, True) == ("flex", "compiled on CUDA")
    backend, reason = choose_backend("auto", "cuda", 16, False, True)
    assert backend == "sdpa" and "14-50x slower" in reason
    backend, reason = choose_backend("auto", "cuda", 8, True, True)
    assert backend == "sdpa" and "at least 16 channels" in reason
    assert choose_backend("auto", "cpu", 64, True, True)[0] == "sdpa"
    assert choose_backend("sdpa", "cuda", 64, True, True)[0] == "sdpa"
    assert choose_backend("flex", "cpu", 64, True, False)[0] == "flex"
    assert choose_backend("flex", "cuda", 64, False, False)[0] == "sdpa"  # samples of a run that trains with flex


@pytest.mark.parametrize("case, words", [
    (("flex", "cpu", 64, True, True), "no backward on a CPU"),
    (("flex", "cuda", 64, False, True), "needs torch.compile"),
    (("flex", "cuda", 8, True, True), "these have 8"),
])  # fmt: skip
def test_flex_where_it_cannot_work_is_a_clear_error(case, words):
    with pytest.raises(UserError, match=f"attn_backend=flex cannot work here: .*{words}"):
        choose_backend(*case)
    assert "\n" not in str(pytest.raises(UserError, choose_backend, *case).value)


def test_the_model_refuses_flex_on_a_cpu_before_it_trains():
    model = Hydra(HydraConfig(**SHAPE | {"attn_backend": "flex"}))
    with pytest.raises(UserError, match="compile"):
        model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(UserError, match="no backward on a CPU"):
        model.backends(compiled=True, grad=True)


def test_every_letter_in_use_has_its_backend_by_its_own_heads(monkeypatch):
    """As on CUDA: CCQA's heads of 8 channels are too narrow for FlexAttention, the others' are not."""
    net = Hydra(HydraConfig(**SHAPE | {"pattern": "MCL", "n_layer": 3, "latent_ratio": 1.0}))
    found = net.backends(compiled=True, grad=True)
    assert found == dict.fromkeys("MCL", ("sdpa", "the fused kernel that trains on cpu"))
    asked = []
    monkeypatch.setattr("model.choose_backend", lambda *case: asked.append(case) or ("sdpa", ""))
    net.backends(compiled=True, grad=False)
    assert asked == [("auto", "cpu", width, True, False) for width in (16, 8, 16)]


def test_letters_name_the_variants():
    config = HydraConfig(**SHAPE)
    made = {letter: KINDS[letter].make(config) for letter in "AGMCL"}
    assert {letter: type(attn) for letter, attn in made.items()} == {"A": GQA, "G": GQA, "M": GQA, "C": CCQA, "L": MLA}
    assert [made[letter].n_kv_head for letter in "AGM"] == [4, 2, 1]
    windowed = HydraConfig(**SHAPE | {"window": 5})
    assert [letter for letter in "AGMCL" if KINDS[letter].make(windowed).window] == ["M"]


def test_help_has_a_line_for_each_letter():
    lines = letters_help().splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(KINDS)
    for line, kind in zip(lines, KINDS.values(), strict=True):
        assert line.endswith(kind.text) and len(kind.text) > 3


@pytest.mark.parametrize("changes", [*({"pattern": letter} for letter in KINDS), *FAIR[:-1]], ids=str)
def test_every_letter_offers_what_the_interface_says(changes):
    config = HydraConfig(**SHAPE | changes)
    attn = KINDS[config.pattern].make(config)
    assert isinstance(attn, attention.Attention)
    for name in ("head_width", "score_width"):
        assert getattr(attn, name) > 0, name
    assert attn.rope_width % 2 == 0 and 0 <= attn.rope_width <= attn.head_width
    assert (attn.rope_width == 0) == (config.rope_fraction == 0)
    assert attn.out.out_features == config.dim
    for name in attn.vectors:
        assert isinstance(getattr(attn, name), torch.nn.Parameter)
    for name in attn.plain:
        assert isinstance(getattr(attn, name), torch.nn.Linear)
    for B, S in ((1, 1), (3, 9)):
        for name, t in attn.new_state(B, S, torch.zeros((), dtype=torch.bfloat16)).items():
            assert t.size(0) == B and t.dtype == torch.bfloat16 and not t.any(), name
            assert name.endswith("tail") or t.size(1) == min(S, attn.window or S), name


def test_the_interface_leaves_nothing_out_silently():
    bare = attention.Attention()
    with pytest.raises(NotImplementedError):
        bare.new_state(1, 2, torch.zeros(()))
    with pytest.raises(NotImplementedError):
        bare(torch.zeros(1, 1, 4), make_context(torch.arange(1), {4}, 1e4))


@torch.no_grad()
@pytest.mark.parametrize("letter", "AGML")
def test_a_short_convolution_starts_as_none_and_qk_norm_bounds_the_scores(letter):
    config = HydraConfig(**SHAPE | {"pattern": letter})
    plain = Hydra(config)
    x = torch.randn(2, 11, 64) * 10
    ctx = plain.context(torch.arange(11))
    short = Hydra(replace(config, short_conv=4))
    assert not short.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert torch.equal(short.blocks[0].attn(x, ctx), plain.blocks[0].attn(x, ctx))
    normed = Hydra(replace(config, qk_norm=True)).blocks[0].attn
    for p in (normed.down if letter == "L" else normed.qkv).parameters():
        p.mul_(1000)
    seen = []

    def spy(q, k, v, *args, **keys):
        seen.append((q.norm(dim=-1), k.norm(dim=-1)))
        return attend(q, k, v, *args, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attend", spy)
        normed.k_temperature.copy_(torch.arange(1, len(normed.k_temperature) + 1))
        normed(x, ctx)
    ((q, k),) = seen  # norms of sqrt(K), keys times their temperature
    root = math.sqrt(normed.head_width)
    torch.testing.assert_close(q, torch.full_like(q, root), rtol=1e-3, atol=0)
    torch.testing.assert_close(k, (root * normed.k_temperature).expand_as(k), rtol=1e-3, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 2, 11])
@pytest.mark.parametrize("taps", [1, 3, 5])
def test_both_forms_of_the_short_convolution(taps, T):
    """The slices of one padded text, and the moved ones that a GPU and documents take."""
    conv = attention.ShortConv(6, taps)
    conv.weight.normal_()
    x = torch.randn(2, T, 6)
    ctx = make_context(torch.arange(T), {4}, 1e4)
    one = ctx._replace(doc=torch.zeros(2, T, dtype=torch.long))
    torch.testing.assert_close(conv(x, one, None), conv(x, ctx, None))


@pytest.mark.parametrize("T", [1, 2, 11])
@pytest.mark.parametrize("taps", [1, 2, 3])
def test_the_gpu_form_of_the_convolutions(taps, T):
    """One product for both of them, against one after the other, with all gradients, for shorter texts too."""
    layer, _, ctx, _ = build("C", conv_kernel=taps)
    filters = layer.conv_depthwise, layer.conv_grouped
    x = torch.randn(2, T, layer.latent + layer.kappa, dtype=torch.float64, requires_grad=True)
    expected = layer.convolve(x, ctx, None)
    got = attention.convolve_at_once(x, *filters)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    pairs = zip(*(torch.autograd.grad(y, (x, *filters), grad) for y in (got, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_rotation_tables_have_the_dtype_of_the_products():
    net = Hydra(HydraConfig(**SHAPE | {"pattern": "MCL", "n_layer": 3}))
    plain = net.context(torch.arange(9)).rope
    with torch.autocast("cpu", torch.bfloat16):
        cast = net.context(torch.arange(9)).rope
    for width, tables in plain.items():
        for table, rounded in zip(tables, cast[width], strict=True):
            assert table.dtype == torch.float32 and rounded.dtype == torch.bfloat16
            assert torch.equal(table.to(torch.bfloat16), rounded)  # as apply_rope would round them


def test_no_argument_switches_causality_off():
    for function in (attend, sdpa_window, Hydra.forward, *(type(kind.make(HydraConfig(**SHAPE))).forward
                                                           for kind in KINDS.values())):  # fmt: skip
        names = " ".join(inspect.signature(function).parameters)
        assert "causal" not in names and "mask" not in names


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("T, window", [(8, 0), (8, 1), (8, 3), (8, 8), (300, 0), (300, 33), (300, 400)])
def test_the_core_is_causal(T, window, heads, dtype):
    """Keys, values and queries after t change nothing up to t; nor, with a window, do those that have left it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, n, 16, dtype=dtype) for n in (4, heads, heads))
    ctx = make_context(torch.arange(T), {16}, 1e4)
    expected = attend(q, k, v, ctx, window)
    for t in (0, T // 2, T - 2):
        later = [torch.cat((x[:, : t + 1], x[:, t + 1 :] + 1), dim=1) for x in (q, k, v)]
        got = attend(*later, ctx, window)
        assert torch.equal(got[:, : t + 1], expected[:, : t + 1])
        assert not torch.equal(got[:, t + 1 :], expected[:, t + 1 :])
        left = [torch.cat((x[:, : t + 1] + 1, x[:, t + 1 :]), dim=1) for x in (k, v)]
        got = attend(q, *left, ctx, window)
        assert not torch.equal(got[:, t], expected[:, t])
        if window:
            torch.testing.assert_close(got[:, t + window :], expected[:, t + window :])


@torch.no_grad()
@pytest.mark.parametrize("changes", [*({"pattern": letter, "window": window} for letter in KINDS for window in (0, 3)),
                                     *FAIR[:-1]], ids=str)  # fmt: skip
def test_every_letter_is_causal(changes):
    layer, x, ctx, _ = build(**changes)
    layer.float()
    x = x.float()
    expected = layer(x, ctx)
    for t in (0, 1, 5, 9):
        later = torch.cat((x[:, : t + 1], x[:, t + 1 :] + 1), dim=1)
        got = layer(later, ctx)
        assert torch.equal(got[:, : t + 1], expected[:, : t + 1])
        assert not torch.equal(got[:, t + 1], expected[:, t + 1])


def test_scale_is_one_over_sqrt_k():
    q, k, v = (torch.randn(1, 6, 2, 16) for _ in range(3))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / 4
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf).softmax(-1)
    expected = torch.einsum("bhts,bshk->bthk", scores, v).flatten(2)
    ctx = make_context(torch.arange(6), {16}, 1e4)
    torch.testing.assert_close(attend(q, k, v, ctx), expected, rtol=1e-5, atol=1e-5)
