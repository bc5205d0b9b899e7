"""The invariants of the model: causality, initialisation, optimiser groups, gradients, loss, one graph, and what its
configuration refuses."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import FAIR
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import layers
from attention import KINDS, ccqa_heads
from configurator import UserError
from layers import ResidualScale
from model import Hydra, HydraConfig, Output
from train import TrainConfig, make_optimizer

SHAPE = dict(vocab_size=97, block_size=64, dim=64, n_head=4, n_kv_head=2, compression=2, latent_head_dim=0,
             mlp_ratio=1.0)  # fmt: skip
SMALL = dict(dim=768, n_head=12, n_kv_head=3)
PATTERNS = [*KINDS, "MMCCCLML"]
every_shape = pytest.mark.parametrize("changes", [*({"pattern": pattern} for pattern in PATTERNS), *FAIR], ids=str)


def make(pattern="MMCCCLML", **changes) -> Hydra:
    torch.manual_seed(0)
    return Hydra(HydraConfig(**SHAPE | {"pattern": pattern} | changes))


def batch(B=2, T=40, seed=0):
    tokens = torch.randint(0, 97, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:].contiguous()


# ---- 1 causality


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 8])
@every_shape
def test_the_future_never_changes_the_past(changes, window):
    net = make(**{"window": window} | changes).eval()
    idx, targets = batch()
    logits = net(idx, targets).logits
    for t in (0, 1, 2, 17, 38):
        changed = idx.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1 + torch.arange(39 - t)) % 97
        other = net(changed, targets).logits
        assert torch.equal(logits[:, : t + 1], other[:, : t + 1])
        assert not torch.equal(logits[:, t + 1 :], other[:, t + 1 :])


@pytest.mark.slow
@torch.no_grad()
def test_the_future_never_changes_the_past_compiled():
    torch._dynamo.reset()
    net = make("C", n_layer=1, dim=32, n_head=2, n_kv_head=1).eval()  # the compiled run of test_train.py has its graph
    idx, targets = batch(T=32)
    expected = net(idx, targets).logits
    net.blocks[0].compile(fullgraph=True, dynamic=False)
    logits = net(idx, targets).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    changed = idx.clone()
    changed[:, 20:] = (changed[:, 20:] + 5) % 97
    assert torch.equal(logits[:, :20], net(changed, targets).logits[:, :20])


@torch.no_grad()
@pytest.mark.parametrize("pattern", KINDS)
def test_every_earlier_token_can_matter(pattern):
    """The mirror of causality: with full attention the first token reaches the last position."""
    net = make(pattern).eval()
    idx, targets = batch()
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 97
    assert not torch.equal(net(idx, targets).logits[:, -1], net(changed, targets).logits[:, -1])


# ---- 3 initialisation, groups, gradients


@every_shape
def test_every_parameter_is_initialised_by_its_role(changes):
    net = make(**changes)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(math.nan)
    net.init_weights()
    for name, p in net.named_parameters():
        assert p.isfinite().all(), name
        role = name.rsplit(".", 2)[-2] if name.endswith(".weight") else name.rsplit(".", 1)[-1]
        if role in ("conv_depthwise", "short_conv"):
            assert torch.equal(p[:, -1], torch.ones(len(p))) and not p[:, :-1].any(), name
        elif role in ("line_bias", "layer_bias"):
            assert not p.any(), name
        elif role == "layer_scale":
            assert (p == (1.0 if "mlp" in name else net.blocks[int(name.split(".")[1])].alpha)).all(), name
        elif role.endswith("norm") or role in ("k_temperature", "line_scale"):
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            residual = name.endswith((".attn.out.weight", ".mlp.down.weight"))
            expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            if role == "conv_grouped":
                expected = 1 / math.sqrt(p.size(1) * p.size(2))
            assert p.std().item() == pytest.approx(expected, rel=0.12), name


def test_a_parameter_without_an_initialisation_is_refused_by_its_name():
    net = make()
    net.blocks[0].extra = nn.Parameter(torch.zeros(3))
    net.blocks[2].attn.more = nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match=r"not initialised: blocks\.0\.extra, blocks\.2\.attn\.more; fill"):
        net.init_weights()


@every_shape
def test_every_parameter_is_in_one_group_and_gets_a_gradient(changes):
    net = make(**changes)
    decayed, plain = make_optimizer(net, TrainConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    ids = [id(p) for group in (decayed, plain) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in net.parameters())
    names = {id(p): n for n, p in net.named_parameters()}
    filters = ("conv_depthwise", "short_conv.weight")
    for p in plain["params"]:
        assert p.dim() < 2 or names[id(p)].endswith(filters), names[id(p)]
    for p in decayed["params"]:
        assert p.dim() >= 2 and not names[id(p)].endswith(filters), names[id(p)]
    net(*batch()).loss.backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_the_scales_of_the_residual_lines():
    """1 for the uncompressed attentions, 0.5 for CCQA and MLA."""
    alphas = {letter: KINDS[letter].alpha for letter in "AGMCL"}
    assert alphas == {"A": 1.0, "G": 1.0, "M": 1.0, "C": 0.5, "L": 0.5}


@pytest.mark.parametrize("letter", KINDS)
@pytest.mark.parametrize("alpha", ["fixed", "one"])
def test_residual_lines_are_scaled(letter, alpha):
    """One block by hand."""
    net = make(letter, n_layer=1, alpha=alpha)
    scale = 1.0 if alpha == "one" else KINDS[letter].alpha
    block = net.blocks[0]
    x = torch.randn(1, 5, 64)
    ctx = net.context(torch.arange(5))
    mid = x + scale * block.attn(block.attn_norm(x), ctx)
    gate, up = (block.mlp_norm(mid) @ block.mlp.gate_up.weight.t()).chunk(2, -1)
    expected = mid + (F.silu(gate) * up) @ block.mlp.down.weight.t()
    torch.testing.assert_close(block(x, ctx), expected)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"mod_capacity": 0.5, "mor_recursions": 2}], ids=str)
def test_learned_scales_start_as_the_fixed_ones(changes):
    plain = make(**changes)
    learned = make(alpha="learned", **changes)
    scales = {name for name, _ in learned.named_parameters() if "_scale." in name}
    assert set(learned.load_state_dict(plain.state_dict(), strict=False).missing_keys) == scales
    assert len(scales) == 8 * len(plain.blocks)
    torch.testing.assert_close(learned(*batch()).logits, plain(*batch()).logits)
    scale = ResidualScale(64, 0.5)
    for p in scale.parameters():
        p.normal_()
    x, y = torch.randn(2, 5, 64)
    expected = (x + scale.line_bias) * scale.line_scale + (y + scale.layer_bias) * scale.layer_scale
    torch.testing.assert_close(scale(x, y), expected)


# ---- 4 the loss


@every_shape
def test_initial_loss_is_log_vocab(changes):
    loss = make(**changes)(*batch(8)).loss
    assert loss.dtype == torch.float32 and abs(loss.item() - math.log(97)) < 0.1


def test_the_loss_is_the_mean_over_the_targets_of_the_returned_logits():
    net = make()
    idx, targets = batch()
    targets[:, 5:9] = layers.IGNORE
    for mode in (True, False):
        output = net.train(mode)(idx, targets)
        expected = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), ignore_index=layers.IGNORE)
        torch.testing.assert_close(output.cross_entropy, expected)
        assert torch.equal(output.loss, output.cross_entropy) and output.routing == {}  # no router, no other loss


def test_without_targets_only_the_last_logits():
    net = make()
    idx, targets = batch()
    full = net(idx, targets).logits
    output = net(idx)
    assert full.shape == (2, 40, 97) and output == Output(output.logits, None, None, {})
    assert output.logits.shape == (2, 1, 97)
    torch.testing.assert_close(output.logits, full[:, -1:])


@pytest.mark.parametrize("rows", [1, 7, 79])
def test_the_chunked_loss_trains_as_the_plain_one(rows, monkeypatch):
    net = make()
    idx, targets = batch()
    targets[:, 5:9] = layers.IGNORE
    plain = net(idx, targets)
    plain.loss.backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    monkeypatch.setattr(layers, "MAX_LOGITS", rows * 97)
    output = net(idx, targets)
    (output.loss * 3).backward()
    assert plain.logits is not None and output.logits is None
    torch.testing.assert_close(output.loss, plain.loss)
    for p, grad in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 3 * grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [2**25, 16 * 97])
def test_the_loss_under_autocast_is_fp32_with_fp32_gradients(limit, monkeypatch):
    net = make()
    idx, targets = batch()
    monkeypatch.setattr(layers, "MAX_LOGITS", limit)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(idx, targets)
    output.loss.backward()
    assert output.loss.dtype == output.cross_entropy.dtype == torch.float32
    assert net.embed.weight.grad.dtype == torch.float32
    assert output.loss.item() == pytest.approx(math.log(97), abs=0.1)
    if output.logits is not None:
        expected = F.cross_entropy(output.logits.float().flatten(0, 1), targets.flatten())
        torch.testing.assert_close(output.loss, expected)


# ---- 5 one graph


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"pattern": "AA"}, {"pattern": "MCL"}, FAIR[-1] | {"pattern": "MCL"}], ids=str)
def test_training_forward_is_one_graph_without_recompiles(changes):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    net = make(**changes, n_layer=len(changes["pattern"]))
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for step in range(3):
        idx, targets = batch(seed=step)
        loss = compiled(idx, targets).loss
        torch.testing.assert_close(loss, net(idx, targets).loss, rtol=1e-5, atol=1e-5)
        loss.backward()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_blocks_of_one_letter_share_their_graph():
    """Compiled block by block, 16 layers of 3 letters cost 3 compilations; all letters, trained and evaluated, fit."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    net = make(n_layer=16)
    for block in net.blocks:
        block.compile(backend=counter, fullgraph=True)
    for step in range(2):
        net(*batch(seed=step)).loss.backward()
    assert counter.frame_count == 3
    with torch._dynamo.config.patch(recompile_limit=64):  # as train.py does
        net = make("AGMCL", n_layer=10)
        for block in net.blocks:
            block.compile(backend=counter, fullgraph=True)
        for step in range(2):
            net(*batch(seed=step)).loss.backward()
            with torch.no_grad():
                net(*batch(seed=step))
    assert counter.frame_count == 3 + 7  # A and G trained, five evaluated; the other three are there already


# ---- the configuration

REFUSED = [
    ({"dim": 63}, "dim=63, .* a multiple of [48]"), ({"dim": 0}, "dim=0: it must be at least 1"),
    ({"n_kv_head": 3}, "n_head=4, n_kv_head=3: the second must divide the first"),
    ({"pattern": "MXC"}, f"pattern='MXC': unknown letter 'X': use {', '.join(KINDS)}"),
    ({"pattern": ""}, "at least one layer"), ({"compression": 3}, "dim=64, compression=3: .* multiple of 6"),
    ({"qk_gain": 0.7}, "qk_gain=0.7: choose a value from 0 to 0.5"), ({"latent_ratio": 0.3}, "latent_ratio=0.3: .*19"),
    ({"attn_backend": "fa3"}, "attn_backend='fa3': use auto, flex or sdpa"), ({"window": -1}, "window=-1"),
    ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"), ({"vocab_size": 0}, "vocab_size=0"), ({"conv_kernel": -2}, "conv_kernel=-2"),
    ({"latent_head_dim": 12}, "latent_head_dim=12: .*divides dim/compression=32: latent_head_dim=-1 fits itself"),
    ({"latent_head_dim": 1}, "latent_head_dim=1: .*even width"), ({"latent_head_dim": -8}, "latent_head_dim=-8"),
    ({"latent_ratio": -1.0}, "latent_ratio=-1.0"), ({"compression": 0}, "compression=0"),
    # numbers that a model cannot live with: overflow, no memory, rotations and norms that divide by zero
    ({"mlp_ratio": 1e308}, "mlp_ratio=1e.308"), ({"conv_kernel": 10**9}, "conv_kernel=1000000000"),
    ({"rope_theta": 1e-300}, "rope_theta=1e-300"), ({"rope_theta": 0.5}, "rope_theta=0.5"),
    ({"rope_theta": 1e300}, "rope_theta=1e.300"), ({"norm_eps": 1e-300}, "norm_eps=1e-300"),
    ({"norm_eps": 0.0}, "norm_eps=0.0"), ({"norm_eps": 1e30}, "norm_eps=1e.30"),
    ({"pattern": "M", "latent_ratio": 2.0}, "latent_ratio=2.0"), ({"pattern": "C", "latent_ratio": 0.0}, "=0.0: "),
    ({"pattern": "M", "conv_kernel": 10**9}, "conv_kernel=10000"), ({"mod_capacity": -0.1}, "mod_capacity=-0.1"),
    ({"mod_capacity": 1.5}, "mod_capacity=1.5: choose a value from 0"), ({"mor_recursions": 0}, "mor_recursions=0"),
    ({"mod_capacity": 0.5, "n_layer": 1}, "mod_capacity=0.5: .*n_layer=1"), ({"alpha": "0.5"}, "alpha='0.5': use fix"),
    ({"short_conv": -1}, "short_conv=-1: choose"), ({"short_conv": 10**9}, "short_conv=1000000000: choose"),
    ({"rope_fraction": 1.5}, "rope_fraction=1.5: choose a value from 0 to 1"), ({"rope_fraction": -0.5}, "from 0 to 1"),
    *(({"pattern": letter, "rope_fraction": 0.3}, "rope_fraction=0.3: of [0-9]+ channels [0-9.]+ would turn") for letter
      in KINDS), ({"pattern": "L", "rope_fraction": 0.25}, "of 4 channels 1 would turn, which must be an even number"),
    ({"pattern": "C", "qk_norm": True}, "pattern='C', qk_norm=True, .*see ccqa_norm and conv_kernel: leave these off"),
    ({"pattern": "CC", "short_conv": 3}, "pattern='CC', .*short_conv=3: CCQA has its own"),
]  # fmt: skip
FLOATS = [field.name for field in dataclasses.fields(HydraConfig) if field.type in ("float", float)]


@pytest.mark.parametrize("changes, words", REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_a_config_that_cannot_be_is_refused_in_one_line(changes, words):
    with pytest.raises(UserError, match=words) as error:
        HydraConfig(**SHAPE | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", FLOATS)
def test_no_number_may_be_nan_or_infinite(name, value):
    with pytest.raises(UserError, match=f"{name}={value}"):
        HydraConfig(**SHAPE | {name: value})


@pytest.mark.parametrize("pattern", KINDS)
def test_errors_name_what_the_user_set(pattern):
    """A width, or a number of heads, that does not fit is in the message: never only a key that was left alone."""
    with pytest.raises(UserError, match="dim=130"):
        HydraConfig(pattern=pattern, n_layer=1, dim=130)
    with pytest.raises(UserError, match="n_head=7"):
        HydraConfig(pattern=pattern, n_layer=1, dim=128, n_head=7, n_kv_head=4 if pattern == "C" else 1)


def test_heads_of_the_latent_are_as_many_as_asked_for_or_refused():
    """latent_head_dim=0 is dim/compression/n_head: 32/7 is no width, and 8 heads of 4 are not what was asked for."""
    assert ccqa_heads(HydraConfig(pattern="C", dim=128, n_head=8, n_kv_head=2, latent_head_dim=0)) == (8, 2, 4)
    with pytest.raises(UserError, match="dim=128, n_head=7, .*latent_head_dim=0"):
        HydraConfig(pattern="C", dim=128, n_head=7, n_kv_head=1, latent_head_dim=0)


@pytest.mark.parametrize("dim", range(64, 513, 32))
def test_a_width_works_as_it_stands(dim):
    """Every option but dim at its default; CCQA's heads fit themselves."""
    config = HydraConfig(dim=dim, n_layer=8)
    H, G, K = ccqa_heads(config)
    assert K % 2 == 0 and H * K == dim // 4 and H % G == 0 and 8 <= K <= 128
    with torch.device("meta"):
        net = Hydra(config)
    assert net(torch.zeros(1, 9, dtype=torch.long, device="meta")).logits.shape == (1, 1, 4096)


def test_the_default_width_trains_with_heads_of_24():
    net = Hydra(HydraConfig(n_layer=4, pattern="MCCL", vocab_size=97))
    assert ccqa_heads(net.config) == (2, 2, 24)
    net(*batch()).loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_wider_heads_of_the_latent_keep_the_group_ratio_as_far_as_it_divides():
    for width, heads in ((0, (12, 3, 16)), (16, (12, 3, 16)), (32, (6, 2, 32)), (64, (3, 1, 64)), (8, (24, 6, 8)),
                         (192, (1, 1, 192)), (-1, (6, 2, 32))):  # fmt: skip
        assert ccqa_heads(HydraConfig(**SMALL, latent_head_dim=width)) == heads
    assert ccqa_heads(HydraConfig(**SMALL | {"n_kv_head": 12}, latent_head_dim=32)) == (6, 6, 32)
    # nearest by the logarithm: 7 groups of 1 or one of 7 for 3 of 12
    assert ccqa_heads(HydraConfig(pattern="C", dim=224, n_head=12, n_kv_head=4, latent_head_dim=8)) == (7, 1, 8)


@pytest.mark.parametrize("dim, heads", [(256, (2, 2, 32)), (264, (3, 3, 22)), (280, (1, 1, 70)), (64, (1, 1, 16))])
def test_heads_of_the_latent_fit_themselves(dim, heads):
    """Of 66 channels 22 are an even part where 33 are not; of 70 channels 70 are nearer to 32 than 14, by a factor."""
    assert ccqa_heads(HydraConfig(pattern="C", dim=dim)) == heads


def test_every_option_of_the_model_has_an_effect():
    """A field that no code reads would be a setting without effect: each changes what a model of all letters computes,
    what it holds, or what it refuses."""
    base = SHAPE | {"pattern": "GMCL", "n_layer": 4}
    changes = dict(
        vocab_size=98, block_size=30, dim=128, n_head=2, n_kv_head=4, n_layer=5, pattern="GMCA", mlp_ratio=5.0,
        compression=4, latent_head_dim=16, conv_kernel=2, qk_gain=0.5, value_shift=False, latent_ratio=0.25, window=3,
        rope_theta=100.0, norm_eps=0.1, mod_capacity=0.5, mor_recursions=2, attn_backend="flex",
        doc_mask=True, ccqa_norm=False, qk_norm=True, k_temperature=False, short_conv=2, rope_fraction=0.5,
        pre_out_norm=False, alpha="learned", mlp_multiple=128, mod_aux=0.1, mor_aux=0.1, router="random")  # fmt: skip
    among = dict.fromkeys(("mod_aux", "mor_aux", "router"), {"mod_capacity": 0.5, "mor_recursions": 2})
    assert changes.keys() == {field.name for field in dataclasses.fields(HydraConfig)}

    def behaviour(**changed):
        torch.manual_seed(0)
        net = Hydra(HydraConfig(**base | changed))
        net.end_token = batch()[0][0, 5].item()
        generator = torch.Generator().manual_seed(0)
        shapes = []
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
                shapes.append(p.shape)
        try:
            return shapes, net(*batch()).loss.item()
        except UserError as error:
            return shapes, str(error)

    assert behaviour() == behaviour()
    for name, value in changes.items():
        others = among.get(name, {})
        assert behaviour(**others | {name: value}) != behaviour(**others), name


def test_layers_tile_the_pattern():
    for n, layers_of in ((1, "M"), (3, "MCL"), (4, "MCLM"), (7, "MCLMCLM")):
        assert HydraConfig(**SHAPE | {"pattern": "MCL", "n_layer": n}).layers == layers_of
    net = make("MCL", n_layer=4)
    assert [type(block.attn).__name__ for block in net.blocks] == ["GQA", "CCQA", "MLA", "GQA"]


def test_the_hidden_width_is_rounded_up_to_a_multiple():
    for ratio, hidden in ((1.0, 256), (4.0, 256), (4.01, 512), (8.0, 512), (1000.0, 64000)):
        assert HydraConfig(**SHAPE | {"mlp_ratio": ratio}).mlp_hidden == hidden
    for ratio, multiple, hidden in ((1.0, 8, 64), (1.3125, 8, 88), (1.01, 4, 68), (1.01, 64, 128)):
        config = HydraConfig(**SHAPE | {"mlp_ratio": ratio, "mlp_multiple": multiple})
        assert config.mlp_hidden == Hydra(config).blocks[0].mlp.down.in_features == hidden


def test_too_long_a_text_is_refused():
    net = make(n_layer=1)
    with pytest.raises(UserError, match="65 tokens do not fit: crop the text to block_size=64"):
        net(torch.zeros(1, 65, dtype=torch.long))
    assert net(torch.zeros(1, 64, dtype=torch.long)).logits.shape == (1, 1, 97)


def test_the_head_is_the_embedding():
    net = make()
    assert not [name for name, _ in net.named_parameters() if "head" in name]
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(net.head(x), net.norm(x) @ net.embed.weight.t())
