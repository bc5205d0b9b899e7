"""The invariants of the model: causality, initialisation, optimiser groups, loss, one graph, accounting, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import model as model_module
from attention import RMSNorm
from configurator import UserError
from model import (
    ChunkedCrossEntropy,
    Hydra,
    HydraConfig,
    attention_flops,
    attention_params,
    count_params,
    flops_per_token,
    kv_bytes,
    pick,
    state_values,
    tail_bytes,
)

SHAPE = dict(vocab_size=97, block_size=64, dim=64, n_head=4, n_kv_head=2, n_layer=8, compression=2, latent_head_dim=0,
             mlp_ratio=1.0)  # fmt: skip
SMALL = dict(latent_head_dim=0, vocab_size=50257, block_size=1024, dim=768, n_head=12, n_kv_head=3,
             n_layer=24, mlp_ratio=3.0)  # fmt: skip
MEDIUM = SMALL | dict(dim=896, n_head=14, n_kv_head=2, mlp_ratio=3.5)
LARGE = SMALL | dict(dim=1024, n_head=16, n_kv_head=4, mlp_ratio=4.0)
PATTERNS = ["A", "G", "M", "C", "L", "MMCCCLML"]


def make(pattern="MMCCCLML", **changes) -> Hydra:
    torch.manual_seed(0)
    return Hydra(HydraConfig(**SHAPE | {"pattern": pattern} | changes))


def batch(B=2, T=40, seed=0):
    tokens = torch.randint(0, 97, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:].contiguous()


# ---- 1 causality


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_future_never_changes_the_past(pattern, window):
    net = make(pattern, window=window).eval()
    idx, targets = batch()
    logits, _ = net(idx, targets)
    for t in (0, 1, 2, 17, 38):
        changed = idx.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1 + torch.arange(39 - t)) % 97
        other, _ = net(changed, targets)
        assert torch.equal(logits[:, : t + 1], other[:, : t + 1])
        assert not torch.equal(logits[:, t + 1 :], other[:, t + 1 :])


@pytest.mark.slow
@torch.no_grad()
def test_the_future_never_changes_the_past_compiled():
    torch._dynamo.reset()
    net = make("C", n_layer=1, dim=32, n_head=2, n_kv_head=1).eval()  # the compiled run of test_train.py has its graph
    idx, targets = batch(T=32)
    expected, _ = net(idx, targets)
    net.blocks[0].compile(fullgraph=True, dynamic=False)
    logits, _ = net(idx, targets)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    changed = idx.clone()
    changed[:, 20:] = (changed[:, 20:] + 5) % 97
    assert torch.equal(logits[:, :20], net(changed, targets)[0][:, :20])


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["M", "C", "L"])
def test_every_earlier_token_can_matter(pattern):
    """The mirror of causality: with full attention the first token reaches the last position."""
    net, (idx, targets) = make(pattern).eval(), batch()
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 97
    assert not torch.equal(net(idx, targets)[0][:, -1], net(changed, targets)[0][:, -1])


# ---- 3 initialisation, groups, gradients


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_parameter_is_initialised_once_by_its_role(pattern):
    net = make(pattern)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(math.nan)
    net.init_weights()
    for name, p in net.named_parameters():
        assert p.isfinite().all(), name
        role = name.rsplit(".", 2)[-2] if name.endswith(".weight") else name.rsplit(".", 1)[-1]
        if role == "conv_depthwise":
            assert torch.equal(p[:, -1], torch.ones(len(p))) and not p[:, :-1].any(), name
        elif role.endswith("norm") or role == "k_temperature":
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            residual = name.endswith((".attn.out.weight", ".mlp.down.weight"))
            expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            if role == "conv_grouped":
                expected = 1 / math.sqrt(p.size(1) * p.size(2))
            assert p.std().item() == pytest.approx(expected, rel=0.12), name


def test_a_parameter_without_an_initialisation_is_refused():
    net = make()
    net.blocks[0].extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="not initialised once"):
        net.init_weights()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_parameter_is_in_one_group_and_gets_a_gradient(pattern):
    net = make(pattern)
    decayed, plain = net.optimizer_groups(0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    ids = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in net.parameters())
    names = {id(p): n for n, p in net.named_parameters()}
    for p in plain["params"]:
        assert names[id(p)].endswith(("norm.weight", "k_temperature", "conv_depthwise")), names[id(p)]
    for p in decayed["params"]:
        assert p.dim() >= 2 and not names[id(p)].endswith("conv_depthwise")
    net(*batch())[1].backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_residual_lines_are_scaled():
    """One block by hand: alpha is 1 for MQA and 0.5 for CCQA and MLA."""
    for letter, alpha in {"A": 1.0, "G": 1.0, "M": 1.0, "C": 0.5, "L": 0.5}.items():
        net = make(letter, n_layer=1)
        block, x = net.blocks[0], torch.randn(1, 5, 64)
        ctx = net.context(torch.arange(5))
        mid = x + alpha * block.attn(block.attn_norm(x), ctx)
        gate, up = (block.mlp_norm(mid) @ block.mlp.gate_up.weight.t()).chunk(2, -1)
        expected = mid + (F.silu(gate) * up) @ block.mlp.down.weight.t()
        torch.testing.assert_close(block(x, ctx), expected)


# ---- 4 the loss


@pytest.mark.parametrize("pattern", PATTERNS)
def test_initial_loss_is_log_vocab(pattern):
    _, loss = make(pattern)(*batch(8))
    assert loss.dtype == torch.float32 and abs(loss.item() - math.log(97)) < 0.1


def test_without_targets_only_the_last_logits():
    net, (idx, targets) = make(), batch()
    full, _ = net(idx, targets)
    last, none = net(idx)
    assert full.shape == (2, 40, 97) and last.shape == (2, 1, 97) and none is None
    torch.testing.assert_close(last, full[:, -1:])


@pytest.mark.parametrize("rows", [1, 7, 16, 80])
def test_the_chunked_loss_equals_the_plain_one(rows, monkeypatch):
    net, (idx, targets) = make(), batch()
    targets[:, 5:9] = -1
    logits, plain = net(idx, targets)
    plain.backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    monkeypatch.setattr(model_module, "MAX_LOGITS", min(rows, 79) * 97)
    none, loss = net(idx, targets)
    (loss * 3).backward()
    assert logits is not None and none is None
    torch.testing.assert_close(loss, plain)
    for p, grad in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 3 * grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(net(idx, targets)[1], plain)
        with FlopCounterMode(display=False) as counter:  # no gradient is made where there is no backward
            net.loss(torch.randn(2, 40, net.config.dim), targets)
    assert counter.get_total_flops() == 2 * 80 * 97 * net.config.dim


def test_the_chunked_loss_never_holds_all_logits(monkeypatch):
    """The largest tensor that the forward or the backward makes stays at one chunk (or one weight)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    x, w = torch.randn(512, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    with Largest() as seen:
        ChunkedCrossEntropy.apply(x, w, torch.randint(0, 300, (512,)), 64, torch.float32, True).backward()
    assert seen.numel == 64 * 300


def test_the_chunked_loss_under_autocast_keeps_fp32_gradients(monkeypatch):
    net, (idx, targets) = make(), batch()
    monkeypatch.setattr(model_module, "MAX_LOGITS", 16 * 97)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = net(idx, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and net.embed.weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(97), abs=0.1)


# ---- 5 one graph


@pytest.mark.parametrize("pattern", ["AA", "MCL"])
def test_training_forward_is_one_graph_without_recompiles(pattern):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    net = make(pattern, n_layer=len(pattern))
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for step in range(3):
        idx, targets = batch(seed=step)
        loss = compiled(idx, targets)[1]
        torch.testing.assert_close(loss, net(idx, targets)[1], rtol=1e-5, atol=1e-5)
        loss.backward()
    assert counter.frame_count == 1


def test_blocks_of_one_letter_share_their_graph():
    """Compiled block by block, 16 layers of 3 letters cost 3 compilations; all letters, trained and evaluated, fit."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    net = make(n_layer=16)
    for block in net.blocks:
        block.compile(backend=counter, fullgraph=True)
    for step in range(2):
        net(*batch(seed=step))[1].backward()
    assert counter.frame_count == 3
    with torch._dynamo.config.patch(recompile_limit=64):  # as train.py does
        net = make("AGMCL", n_layer=10)
        for block in net.blocks:
            block.compile(backend=counter, fullgraph=True)
        for step in range(2):
            net(*batch(seed=step))[1].backward()
            with torch.no_grad():
                net(*batch(seed=step))
    assert counter.frame_count == 3 + 7  # A and G trained, five evaluated; the other three are there already


# ---- functions with a backward of their own


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rmsnorm_with_gradients_is_torchs(dtype):
    norm = RMSNorm(48, 1e-6).to(dtype)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    x, grad = (torch.randn(3, 7, 48).to(dtype) for _ in range(2))
    x.requires_grad_()
    got, expected = norm(x), F.rms_norm(x, (48,), norm.weight, 1e-6)
    assert got.grad_fn is not None and "RMSNormFunction" in got.grad_fn.name() and torch.equal(got, expected)
    ours, torchs = (torch.autograd.grad(y, [x, norm.weight], grad) for y in (got, expected))
    tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("autocast", [False, True])
def test_swiglu_with_gradients_is_the_plain_one_and_keeps_less(autocast):
    """Besides its input and weights it keeps gate and up, and neither silu(gate) nor the product."""
    mlp, x = make("A").blocks[0].mlp, torch.randn(2, 5, 64, requires_grad=True)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            got = mlp(x)
        gate, up = F.linear(x, mlp.gate_up.weight).chunk(2, dim=-1)
        expected = F.linear(F.silu(gate) * up, mlp.down.weight)
    assert torch.equal(got, expected)
    hidden = mlp.down.in_features
    assert sum(n for n in kept.values() if n % hidden == 0 and n < 64 * hidden) == 10 * 2 * hidden
    ours, plain = (torch.autograd.grad(y.float().square().sum(), [x, *mlp.parameters()]) for y in (got, expected))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- 6 accounting


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("changes", [{}, {"conv_kernel": 0}, {"compression": 4}, {"latent_ratio": 0.25},
                                     {"n_layer": 11}, {"latent_head_dim": 16}])  # fmt: skip
def test_counted_parameters_equal_the_formula(pattern, changes):
    net = make(pattern, **changes)
    assert count_params(net.config) == sum(p.numel() for p in net.parameters())
    for letter, block in zip(net.config.layers, net.blocks, strict=True):
        assert attention_params(net.config, letter) == sum(p.numel() for p in block.attn.parameters())


@pytest.mark.parametrize("shape, millions", [(SMALL, 186.8), (MEDIUM, 287.4), (LARGE, 389.9)])
def test_the_named_shapes(shape, millions):
    with torch.device("meta"):
        net = Hydra(HydraConfig(**shape))
    assert count_params(net.config) == sum(p.numel() for p in net.parameters())
    assert round(count_params(net.config) / 1e6, 1) == millions


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("changes", [{}, {"conv_kernel": 0}, {"compression": 4}, {"latent_ratio": 0.25},
                                     {"latent_head_dim": 4}])  # fmt: skip
def test_counted_flops_equal_the_formula(pattern, changes):
    """torch counts matrix products, convolutions and all T*T pairs of the attention (told of its CPU kernel): the
    formula takes the causal mean T/2 of the pairs and adds the depthwise convolution, which torch does not count."""

    def core(q, k, v, *args, out_val=None, **kwargs):
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    core._get_raw = True
    net = make(pattern, **changes).eval()
    c, (B, T) = net.config, (2, 40)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: core}) as counter:
        net(*batch(B, T))
    expected = B * T * flops_per_token(c, T)
    for letter in c.layers:
        width = {"C": c.dim // c.compression, "L": int(c.dim * c.latent_ratio)}.get(letter, c.dim)
        expected += B * T * 2 * T * width  # the upper half of the pairs
        if letter == "C":
            H, G, K = c.ccqa_heads
            expected -= B * T * 2 * c.conv_kernel * (H + G) * K
    assert counter.get_total_flops() == expected


def test_wider_heads_of_the_latent_keep_the_group_ratio_as_far_as_it_divides():
    for asked, heads in ((0, (12, 3, 16)), (16, (12, 3, 16)), (32, (6, 2, 32)), (64, (3, 1, 64)), (8, (24, 6, 8)),
                         (192, (1, 1, 192))):  # fmt: skip
        assert HydraConfig(**SMALL | {"latent_head_dim": asked}).ccqa_heads == heads
    assert HydraConfig(**SMALL | {"n_kv_head": 12, "latent_head_dim": 32}).ccqa_heads == (6, 6, 32)


def test_windowed_flops_count_the_visible_pairs():
    c = HydraConfig(**SHAPE | {"pattern": "M", "window": 8})
    pairs = sum(min(t + 1, 8) for t in range(64))
    full = attention_flops(HydraConfig(**SHAPE | {"pattern": "M"}), "M", 64)
    got = attention_flops(c, "M", 64) - (full - 2 * 64 * 64)
    assert got == pytest.approx(4 * 64 * (pairs - 64 / 2 * 8 / 64) / 64, rel=1e-3)  # the mean of t keys, not t+1


def test_state_bytes_of_the_architecture_page():
    c = HydraConfig(**SMALL)
    assert [state_values(c, a) for a in "AGMCL"] == [1536, 384, 128, 96, 400]
    assert kv_bytes(c, 1) / 2 / 24 == 184
    assert tail_bytes(HydraConfig(**SMALL | {"pattern": "AGML", "latent_head_dim": 512})) == 0
    windowed = HydraConfig(**SMALL | {"window": 100})
    assert kv_bytes(c, 1000) - kv_bytes(windowed, 1000) == 2 * 900 * 128 * 9


# ---- errors and sampling


@pytest.mark.parametrize("changes, words", [
    ({"dim": 63}, "dim=63: .* multiple of"), ({"dim": 0}, "dim=0: it must be at least 1"),
    ({"n_kv_head": 3}, "n_kv_head=3: it must divide n_head=4"), ({"pattern": "MXC"}, "unknown letter 'X'"),
    ({"pattern": ""}, "at least one layer"), ({"compression": 3}, "dim=64: .*compression=24"),
    ({"qk_gain": 0.7}, "qk_gain=0.7: choose a value from 0 to 0.5"), ({"latent_ratio": 0.3}, "latent_ratio=0.3"),
    ({"attn_backend": "fa3"}, "attn_backend='fa3': use auto, flex or sdpa"), ({"window": -1}, "window=-1"),
    ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"), ({"vocab_size": 0}, "vocab_size=0"), ({"conv_kernel": -2}, "conv_kernel=-2"),
    ({"latent_head_dim": 12}, "latent_head_dim=12: .* divides dim/compression=32"),
    ({"latent_head_dim": 1}, "latent_head_dim=1: .* even width"), ({"latent_head_dim": -8}, "latent_head_dim=-8"),
    ({"latent_ratio": -1.0}, "latent_ratio=-1.0"), ({"compression": 0}, "compression=0"),
])  # fmt: skip
def test_a_config_that_cannot_be_is_refused_in_one_line(changes, words):
    with pytest.raises(UserError, match=words) as error:
        HydraConfig(**SHAPE | changes)
    assert "\n" not in str(error.value)


def test_every_config_field_is_read():
    """A field that no code reads would be a setting without effect."""
    import dataclasses
    import re
    from pathlib import Path

    root = Path(model_module.__file__).parent
    code = (root / "model.py").read_text() + (root / "attention.py").read_text()
    for field in dataclasses.fields(HydraConfig):
        assert re.search(rf"(config|\bc|self)\.{field.name}\b", code), field.name


def test_too_long_a_text_is_refused():
    with pytest.raises(UserError, match="65 tokens do not fit"):
        make()(torch.zeros(1, 65, dtype=torch.long))


def test_pick_against_a_plain_reference():
    """top-k and top-p keep exactly the tokens that their definitions name."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 2
    probs = (logits / 0.7).softmax(-1)[0]
    ranked = sorted(range(50), key=lambda i: -probs[i])
    for top_k, top_p in [(0, 1.0), (5, 1.0), (0, 0.6), (7, 0.8), (1, 1.0), (0, 1e-6), (50, 1.0), (99, 1.0)]:
        kept, mass = [], 0.0
        pool = ranked[:top_k] if top_k else ranked
        total = sum(probs[i].item() for i in pool)
        for i in pool:
            if mass / total >= top_p:
                break
            kept.append(i)
            mass += probs[i].item()
        drawn = pick(logits.expand(4000, -1).clone(), 0.7, top_k, top_p, torch.Generator().manual_seed(2))
        assert set(drawn.tolist()) <= set(kept)
        frequency = (drawn == kept[0]).float().mean().item()
        assert frequency == pytest.approx(probs[kept[0]].item() / mass, abs=0.04)
    assert pick(logits, 0.0, 0, 1.0, None).item() == ranked[0]
