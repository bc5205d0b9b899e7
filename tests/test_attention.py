"""The variants against plain-loop fp64 references written from the equations of the papers, the core's backends
against each other, and the FlexAttention road, which is traced (not run) as CUDA would compile it."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention as flex_module

import attention
from attention import (
    CCQA,
    GQA,
    MLA,
    attend,
    causal_block_mask,
    choose_backend,
    make_attention,
    make_context,
    sdpa_window,
)
from configurator import UserError
from model import Hydra, HydraConfig

SHAPE = dict(vocab_size=61, block_size=64, dim=64, n_head=4, n_kv_head=2, n_layer=1, compression=2, latent_head_dim=0,
             mlp_ratio=1.0)  # fmt: skip


def build(letter: str, **changes):
    """A layer in fp64 with every parameter away from its start, and a text of 11 vectors."""
    torch.manual_seed(0)
    config = HydraConfig(**SHAPE | {"pattern": letter} | changes)
    layer = Hydra(config).double().blocks[0].attn
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    x = torch.randn(2, 11, config.dim, dtype=torch.float64)
    return layer, x, make_context(torch.arange(11), {layer.rope_width}, config.rope_theta), config


def rms(v, gain=None, eps=1e-6):
    v = v / torch.sqrt((v * v).mean() + eps)
    return v if gain is None else v * gain


def rotate(v, t, theta=10000.0):
    """RoPE of one vector at position t, pair by pair (channel i with i + K/2)."""
    out, half = v.clone(), len(v) // 2
    for i in range(half):
        angle = t * theta ** (-2 * i / len(v))
        out[i] = v[i] * math.cos(angle) - v[i + half] * math.sin(angle)
        out[i + half] = v[i + half] * math.cos(angle) + v[i] * math.sin(angle)
    return out


def softmax_read(q, keys, values):
    scores = torch.stack([q @ k for k in keys]) / math.sqrt(len(q))
    return (scores.softmax(0)[:, None] * torch.stack(values)).sum(0)


def reference_gqa(layer, x, window):
    H, G, K = layer.n_head, layer.n_kv_head, layer.head_width
    W = layer.qkv.weight
    Wq, Wk, Wv = W[: H * K].view(H, K, -1), W[H * K : (H + G) * K].view(G, K, -1), W[(H + G) * K :].view(G, K, -1)
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        for t in range(x.size(1)):
            first = max(0, t - window + 1) if window else 0
            heads = []
            for h in range(H):
                g = h * G // H
                keys = [rotate(Wk[g] @ x[b, s], s) for s in range(first, t + 1)]
                values = [Wv[g] @ x[b, s] for s in range(first, t + 1)]
                heads.append(softmax_read(rotate(Wq[h] @ x[b, t], t), keys, values))
            out[b, t] = layer.out.weight @ rms(torch.cat(heads), layer.norm.weight)
    return out


def reference_ccqa(layer, x, c):
    H, G, K = c.ccqa_heads
    L = c.dim // c.compression
    kappa, taps = G * K, c.conv_kernel
    W = layer.down.weight
    Wq, Wk, Wv = W[:L], W[L : L + kappa], W[L + kappa :]
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        T = x.size(1)
        q0, k0 = [Wq @ x[b, t] for t in range(T)], [Wk @ x[b, t] for t in range(T)]
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
            queries.append([rotate(rms(uq[h] + m_q[h]), t) for h in range(H)])
            keys.append([rotate(rms(uk[g] + m_k[g]) * layer.k_temperature[g], t) for g in range(G)])
        for t in range(T):
            heads = [softmax_read(queries[t][h], [keys[s][h * G // H] for s in range(t + 1)],
                                  [values[s][h * G // H] for s in range(t + 1)]) for h in range(H)]
            out[b, t] = layer.out.weight @ rms(torch.cat(heads), layer.norm.weight)
    return out


def reference_mla(layer, x, c):
    H, R = c.n_head, int(c.dim * c.latent_ratio)
    K = R // H
    Wq, Wkr, Wuk, Wuv = layer.up.weight.split((R, K // 2, R // 2, R))
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        latent = [rms(layer.down.weight @ x[b, t], layer.latent_norm.weight) for t in range(x.size(1))]
        for t in range(x.size(1)):
            heads = []
            for h in range(H):
                q = Wq[h * K : (h + 1) * K] @ latent[t]
                q = torch.cat((q[: K // 2], rotate(q[K // 2 :], t)))
                keys = [torch.cat((Wuk[h * K // 2 : (h + 1) * K // 2] @ latent[s], rotate(Wkr @ latent[s], s)))
                        for s in range(t + 1)]
                heads.append(softmax_read(q, keys, [Wuv[h * K : (h + 1) * K] @ latent[s] for s in range(t + 1)]))
            out[b, t] = layer.out.weight @ rms(torch.cat(heads), layer.norm.weight)
    return out


@torch.no_grad()
@pytest.mark.parametrize("letter, window", [("A", 0), ("G", 0), ("M", 0), ("M", 1), ("M", 3), ("M", 20)])
def test_mha_gqa_mqa_equal_the_reference(letter, window):
    layer, x, ctx, _ = build(letter, window=window)
    torch.testing.assert_close(layer(x, ctx), reference_gqa(layer, x, window), rtol=1e-5, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {}, {"compression": 4}, {"compression": 8, "n_kv_head": 4}, {"conv_kernel": 0}, {"conv_kernel": 1},
    {"conv_kernel": 2}, {"qk_gain": 0.0}, {"qk_gain": 0.5}, {"value_shift": False}, {"n_kv_head": 1},
    {"latent_head_dim": 16}, {"latent_head_dim": 4}, {"conv_kernel": 0, "qk_gain": 0.0, "value_shift": False},
], ids=str)  # fmt: skip
def test_ccqa_equals_the_reference(changes):
    layer, x, ctx, config = build("C", **changes)
    torch.testing.assert_close(layer(x, ctx), reference_ccqa(layer, x, config), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("letter", ["G", "M", "C"])
def test_repeating_key_value_heads_for_idle_threads_changes_no_gradient(letter, monkeypatch):
    layer, x, ctx, _ = build(letter)
    x, found = x[:1].requires_grad_(), []
    for threads in (1, 4):  # 4 threads have one head each only if those of the queries are repeated
        monkeypatch.setattr(attention, "cpu_threads", lambda threads=threads: threads)
        y = layer(x, ctx)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    heads, shared = torch.empty(1, 4, 9, 8), torch.empty(1, 2, 9, 8)
    assert not attention.share_heads(heads, shared) and attention.share_heads(heads.expand(2, -1, -1, -1), shared)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_mla_equals_the_reference(ratio):
    layer, x, ctx, config = build("L", latent_ratio=ratio)
    torch.testing.assert_close(layer(x, ctx), reference_mla(layer, x, config), rtol=1e-5, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("letter", "AGMCL")
def test_true_positions_are_used(letter):
    """Positions shifted as a whole change nothing (RoPE is relative), a gap changes the output, rows may differ."""
    layer, x, ctx, config = build(letter)
    widths = {layer.rope_width}

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
    i, j = torch.arange(T)[:, None], torch.arange(T)
    scores = (q.float() @ k.float().transpose(-1, -2) / 4).masked_fill(~((j <= i) & (j > i - window)), -math.inf)
    tol = 1e-5 if dtype == torch.float32 else 2e-2
    expected = scores.softmax(-1) @ v.float()
    torch.testing.assert_close(sdpa_window(q, k, v, window, True).float(), expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("letter", "AGMCL")
def test_every_variant_runs_on_the_fused_kernel(letter, dtype, grad):
    """SDPA falls back to its slow math silently, for unequal widths or heads that are not dense: here it raises."""
    layer, x, ctx, _ = build(letter)
    fused = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16), fused:
        y = layer.float()(x.float().requires_grad_(grad), ctx)
        if grad:
            y.sum().backward()


def dense(mask, T):
    """What a BlockMask lets the compiled kernel see: mask_mod in partial tiles, everything in full ones."""
    B, n = attention.FLEX_BLOCK, -(-T // attention.FLEX_BLOCK)
    seen = torch.zeros(n * B, n * B, dtype=torch.bool)
    q, k = torch.arange(n * B)[:, None], torch.arange(n * B)
    allowed = mask.mask_mod(0, 0, q, k)
    for row in range(n):
        for tile in mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist():
            s = (slice(row * B, row * B + B), slice(tile * B, tile * B + B))
            seen[s] = allowed[s]
        for tile in mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist():
            seen[row * B : row * B + B, tile * B : tile * B + B] = True
    return seen[:T, :T]


@pytest.mark.parametrize("T, window", [(128, 0), (200, 0), (513, 0), (640, 1), (640, 128), (640, 129), (640, 300),
                                       (1000, 127), (100, 30)])  # fmt: skip
def test_the_block_mask_lists_exactly_the_visible_tiles(T, window):
    mask = causal_block_mask(T, window, torch.device("cpu"))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    assert torch.equal(dense(mask, T), (j <= i) & (j > i - (window or T)))
    made = flex_module.create_block_mask(mask.mask_mod, None, None, T, T, device="cpu")
    for ours, theirs in ((mask.kv_num_blocks, made.kv_num_blocks), (mask.full_kv_num_blocks, made.full_kv_num_blocks),
                         (mask.q_num_blocks, made.q_num_blocks)):
        if T % attention.FLEX_BLOCK == 0:  # else create_block_mask calls the ragged last tiles partial, or full
            assert torch.equal(ours, theirs)


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


@pytest.mark.parametrize("letter, window", [("M", 0), ("M", 8), ("C", 0), ("L", 0)])
def test_the_flex_road_is_one_graph_with_gradients_equal_to_sdpa(letter, window, monkeypatch):
    """The road that CUDA takes, traced forward and backward on a CPU with FlexAttention's device check patched away."""
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "flex_problem", lambda *_: "")
    config = HydraConfig(**SHAPE | {"pattern": letter, "window": window})
    torch.manual_seed(0)
    reference = Hydra(config)
    torch._dynamo.reset()
    flex = Hydra(replace(config, attn_backend="flex"))
    flex.load_state_dict(reference.state_dict())
    idx, targets = torch.randint(0, 61, (2, 24)), torch.randint(0, 61, (2, 24))
    recorder = AotEagerAndRecordGraphs()
    _, loss = torch.compile(flex, backend=recorder, fullgraph=True)(idx, targets)
    loss.backward()
    assert len(recorder.graphs) == 1
    forward, backward = recorder.fw_graphs[0].code, recorder.bw_graphs[0].code
    assert "higher_order.flex_attention(" in forward and "higher_order.flex_attention_backward(" in backward
    _, expected = reference(idx, targets)
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
        model.backend(compiled=True, grad=True)


def test_letters_name_the_variants():
    config = HydraConfig(**SHAPE)
    made = {letter: make_attention(letter, config) for letter in "AGMCL"}
    assert {k: type(v) for k, v in made.items()} == {"A": GQA, "G": GQA, "M": GQA, "C": CCQA, "L": MLA}
    assert [made[k].n_kv_head for k in "AGM"] == [4, 2, 1]
    with pytest.raises(UserError, match="unknown letter 'X'"):
        make_attention("X", config)


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_the_gpu_form_of_the_per_head_convolution(taps):
    u, filters = torch.randn(2, 9 + taps - 1, 24), torch.randn(24, 8, taps)
    torch.testing.assert_close(attention.per_head_einsum(u, filters), attention.per_head_conv1d(u, filters),
                               rtol=1e-5, atol=1e-5)  # fmt: skip


def test_no_argument_switches_causality_off():
    """The only calls of the kernels are causal: is_causal=True, a mask made from positions, or a causal BlockMask."""
    import inspect

    for function in (attend, sdpa_window, GQA.forward, CCQA.forward, MLA.forward, Hydra.forward):
        names = " ".join(inspect.signature(function).parameters)
        assert "causal" not in names and "mask" not in names
    assert inspect.getsource(attention).count("is_causal=True") == 1
    q = torch.randn(1, 8, 2, 4)
    changed = q.clone()
    changed[:, 5:] += 1
    ctx = make_context(torch.arange(8), {4}, 1e4)
    for window in (0, 3):
        a, b = attend(q, q, q, ctx, window), attend(changed, changed, changed, ctx, window)
        assert torch.equal(a[:, :5], b[:, :5]) and not torch.equal(a[:, 5:], b[:, 5:])


def test_scale_is_one_over_sqrt_k():
    q, k, v = (torch.randn(1, 6, 2, 16) for _ in range(3))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / 4
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf).softmax(-1)
    expected = torch.einsum("bhts,bshk->bthk", scores, v).flatten(2)
    ctx = make_context(torch.arange(6), {16}, 1e4)
    torch.testing.assert_close(attend(q, k, v, ctx), expected, rtol=1e-5, atol=1e-5)
