"""Mixture-of-Depths, Mixture-of-Recursions, and both at once: causality, expert choice, the causal rule in generation,
auxiliary losses, one graph, and that it learns and saves what it should."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import FAIR
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex_module
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import accounting
import generate as generation
import machine
import routing
import sample
import train
from attention import KINDS, make_context
from configurator import UserError
from generate import decode, decode_step, generate, new_state, pack, prefill, prefill_step
from model import Block, Hydra, HydraConfig, MoD
from routing import Router, Selection
from train import TrainConfig, make_optimizer

SHAPE = dict(vocab_size=97, block_size=256, dim=64, n_head=4, n_kv_head=2, compression=2, latent_head_dim=0,
             mlp_ratio=1.0)  # fmt: skip
VARIANTS = {
    "MoD-M": dict(pattern="M", n_layer=4, mod_capacity=0.5),
    "MoD-C": dict(pattern="C", n_layer=4, mod_capacity=0.5),
    "MoD-L": dict(pattern="L", n_layer=4, mod_capacity=0.5),
    "MoR": dict(pattern="MCL", n_layer=3, mor_recursions=3),
    "MoD in MoR": dict(pattern="LMMCCL", n_layer=6, mod_capacity=0.5, mor_recursions=3),  # routes an M, a C and an L
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
GRAPHS = {name: {"n_layer": 2} for name in VARIANTS if "MoR" not in name}
GRAPHS["MoD in MoR"] = {"pattern": "LC", "n_layer": 2, "mor_recursions": 2}
every_graph = pytest.mark.parametrize("variant, changes", GRAPHS.items(), ids=GRAPHS)


def make(variant="MoD in MoR", **changes) -> Hydra:
    """A model in which no parameter is at its start, and whose routers decide this way as often as that."""
    torch.manual_seed(0)
    net = Hydra(HydraConfig(**SHAPE | VARIANTS[variant] | changes))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p)) if "router" in name else p.add_(torch.randn_like(p) * 0.05)
    return net


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def changed_after(idx: torch.Tensor, t: int) -> torch.Tensor:
    other = idx.clone()
    other[:, t + 1 :] = (other[:, t + 1 :] + 1 + torch.arange(idx.size(1) - t - 1)) % 97
    return other


def text_of(net: Hydra, prompts, n: int, **keys) -> torch.Tensor:
    """The n tokens that follow, the likeliest each time, [B, n]."""
    return torch.stack(list(generate(net, prompts, n, temperature=0.0, **keys)), dim=1)


def routers_of(net: Hydra) -> list[Router]:
    return net.depth_routers + [*net.recursion_routers]


def scores(monkeypatch, replay: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """The list that every router's scores are written to from now on; or they are `replay`, whatever the tokens are."""
    seen = []
    real = Router.forward

    def forward(self, x):
        seen.append(real(self, x))
        return seen[-1] if replay is None else replay[len(seen) - 1]

    monkeypatch.setattr(Router, "forward", forward)
    return seen


def selections(monkeypatch) -> list[Selection]:
    """The list that every selection is written to from now on."""
    seen = []
    real = routing.select

    def select(*args):
        selection, record = real(*args)
        seen.append(selection)
        return selection, record

    monkeypatch.setattr(routing, "select", select)
    return seen


# ---- causality


@torch.no_grad()
@every_variant
def test_the_future_never_changes_the_past_in_evaluation(variant):
    net = make(variant).eval()
    idx = tokens(2, 40)
    expected = net(idx, idx).logits
    for t in (0, 1, 2, 17, 38):
        got = net(changed_after(idx, t), idx).logits
        assert torch.equal(got[:, : t + 1], expected[:, : t + 1])
        assert not torch.equal(got[:, t + 1 :], expected[:, t + 1 :])
    assert not torch.equal(net.train()(idx, idx).logits, expected)  # top-k is another rule


LONG = {"MoD": {"mod_capacity": 0.5}, "MoR": {"mor_recursions": 3}, "both": {"mod_capacity": 0.5, "mor_recursions": 2}}


@torch.no_grad()
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("T", [130, 200, 300, 520, 800])
def test_a_long_text_depends_on_neither_its_future_nor_its_neighbours(T, name, seed, monkeypatch):
    """Bit for bit, in fp32 and under bf16 autocast, though another future or another neighbour selects another number
    of tokens, by which a product, or a sum over keys, may round differently."""
    shape = {"pattern": "LMMCCL", "n_layer": 6, "block_size": 800, "mor_recursions": 1, "dim": 32, "n_head": 2}
    net = make("MoR", **shape | LONG[name]).eval()
    real = Router.forward
    # a function of the token alone, above 0 for about half of them
    monkeypatch.setattr(Router, "forward", lambda self, x: (9 * real(self, x) / x.float().norm(dim=-1)).sin())
    idx = tokens(2, T, seed=seed)
    other = tokens(2, T, seed=seed + 100)
    t = T // 3
    future = torch.cat((idx[:, : t + 1], other[:, t + 1 :]), dim=1)
    neighbour = torch.cat((idx[:1], other[1:]))
    seen = selections(monkeypatch)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, changed, beside = (net(x, x).logits for x in (idx, future, neighbour))
        assert torch.equal(changed[:, : t + 1], expected[:, : t + 1])
        assert not torch.equal(changed[:, t + 1 :], expected[:, t + 1 :])
        assert torch.equal(beside[0], expected[0]) and not torch.equal(beside[1], expected[1])
    calls = len(seen) // 6
    part = seen[0].ctx.lengths / T
    assert ((part > 0.2) & (part < 0.8)).all()
    counts = torch.stack([selection.ctx.lengths for selection in seen]).unflatten(0, (6, calls))
    assert not torch.equal(counts[0], counts[1]) and not torch.equal(counts[0], counts[2])


@torch.no_grad()
@every_variant
def test_the_future_never_changes_the_past_in_training_with_the_routing_held_fixed(variant, monkeypatch):
    net = make(variant)
    idx = tokens(2, 40)
    fixed = scores(monkeypatch)
    expected = net(idx, idx).logits
    for t in (0, 1, 2, 17, 38):
        scores(monkeypatch, replay=fixed)
        got = net(changed_after(idx, t), idx).logits
        assert torch.equal(got[:, : t + 1], expected[:, : t + 1])
        assert not torch.equal(got, expected)


# ---- expert choice


@every_variant
def test_the_best_k_are_selected_in_the_order_of_the_text(variant, monkeypatch):
    net = make(variant)
    idx = tokens(3, 40)
    r = scores(monkeypatch)
    seen = selections(monkeypatch)
    net(idx, idx)
    expected = {"MoR": [26, 13], "MoD in MoR": [20, 20, 20, 26, 13, 13, 13, 13, 6, 6, 6]}.get(variant, [20, 20])
    assert [selection.index.size(1) for selection in seen] == expected
    for selection, r_BT, k in zip(seen, r, expected, strict=True):
        index = selection.index.squeeze(-1)
        assert (index.diff(dim=1) > 0).all() and index.shape == (3, k)
        torch.testing.assert_close(r_BT.gather(1, index).sort(descending=True).values, r_BT.topk(k).values)
        assert torch.equal(selection.gate.squeeze(-1), r_BT.gather(1, index).sigmoid())
    assert not torch.equal(seen[0].index[0], seen[0].index[1])  # each sequence its own


@torch.no_grad()
@every_variant
@pytest.mark.parametrize("training", [False, True])
def test_selected_tokens_keep_their_true_positions(variant, training, monkeypatch):
    """Through a selection of a selection too: for letters that read ctx.pos, and in the rotations."""
    net = make(variant).train(training)
    seen = []
    real = routing.select

    def select(router, k, x_BTD, ctx, state):
        selection, record = real(router, k, x_BTD, ctx, state)
        seen.append((ctx, selection))
        return selection, record

    monkeypatch.setattr(routing, "select", select)
    net(tokens(3, 40), tokens(3, 40))
    for ctx, selection in seen:
        got = selection.ctx
        expected = ctx.pos.expand(3, -1).gather(1, selection.index.squeeze(-1))
        assert torch.equal(got.pos, expected)
        made = make_context(expected, net.rope_widths, net.config.rope_theta)
        for width in net.rope_widths:
            torch.testing.assert_close(got.rope[width], made.rope[width])
    assert any(ctx.pos.dim() == 2 for ctx, _ in seen) == ("MoR" in variant)


@torch.no_grad()
@pytest.mark.parametrize("letter", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_a_routed_block_is_the_block_on_the_selected_tokens_alone(letter, training):
    """x + sigmoid(r) * (block(x) - x), row by row on a text of the selected tokens at their true positions."""
    block = make("MoD-M", pattern=letter).blocks[1].train(training)
    x = torch.randn(3, 30, 64)
    width = {block.attn.rope_width}
    got, _ = block(x, make_context(torch.arange(30), width, 10000.0))
    for b in range(3):
        r = x[b] @ block.router.weight
        index = torch.tensor(sorted(r.topk(15).indices.tolist())) if training else (r > 0).nonzero().squeeze(1)
        part = x[b : b + 1, index]
        delta = Block.forward(block, part, make_context(index, width, 10000.0)) - part
        expected = x[b].clone()
        expected[index] += r[index].sigmoid()[:, None] * delta[0]
        torch.testing.assert_close(got[b], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_recursions_are_hierarchical(training):
    """The shared blocks run for all, then for those that each router selects among the ones before it."""
    net = make("MoR").train(training)
    x = torch.randn(1, 30, 64)
    got, _ = routing.recurse(net.blocks, net.recursion_routers, x, net.context(torch.arange(30)), None)

    def run(x, index):
        for block in net.blocks:
            x = block(x, make_context(index, net.rope_widths, 10000.0))
        return x

    alive = torch.arange(30)
    expected = run(x, alive)
    for router, k in zip(net.recursion_routers, (20, 10), strict=True):
        r = expected[0, alive] @ router.weight
        chosen = torch.tensor(sorted(r.topk(k).indices.tolist())) if training else (r > 0).nonzero().squeeze(1)
        alive, gate = alive[chosen], r[chosen].sigmoid()[:, None]
        part = expected[:, alive]
        expected[:, alive] = part + gate * (run(part, alive) - part)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---- gradients and auxiliary losses


@every_variant
def test_the_routers_learn_from_the_language_model_loss_alone(variant):
    net = make(variant)
    net(tokens(2, 40), tokens(2, 40, seed=2)).cross_entropy.backward()
    routers = routers_of(net)
    assert len(routers) == {"MoR": 2, "MoD in MoR": 5}.get(variant, 2)
    for router in routers:
        assert router.weight.grad.abs().max() > 1e-6


@every_variant
def test_the_loss_to_train_on_has_the_auxiliary_losses(variant):
    """In training; its gradient reaches the routers, which an evaluation's loss is without."""
    net = make(variant)
    idx = tokens(2, 40)
    targets = tokens(2, 40, seed=2)
    output = net(idx, targets)
    assert output.routing["aux_loss"] > 0
    torch.testing.assert_close(output.loss, output.cross_entropy + output.routing["aux_loss"])
    expected = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(output.cross_entropy, expected)
    weights = [router.weight for router in routers_of(net)]
    both = torch.autograd.grad(output.loss, weights, retain_graph=True)
    language = torch.autograd.grad(output.cross_entropy, weights, retain_graph=True)
    auxiliary = torch.autograd.grad(output.routing["aux_loss"], weights)
    for a, b, c in zip(both, language, auxiliary, strict=True):
        assert b.abs().max() > 0 and c.abs().max() > 0
        torch.testing.assert_close(a, b + c)
    output = net.eval()(idx, targets)
    assert torch.equal(output.loss, output.cross_entropy) and output.routing["aux_loss"] == 0


@every_variant
def test_the_auxiliary_loss_and_the_statistics_are_their_definitions(variant, monkeypatch):
    net = make(variant)
    idx = tokens(3, 40)
    r = scores(monkeypatch)
    recursion = {"MoR": (0, 1), "MoD in MoR": (3, 7)}.get(variant, ())  # calls that are the recursions' own
    k = {"MoR": [26, 13], "MoD in MoR": [20, 20, 20, 26, 13, 13, 13, 13, 6, 6, 6]}.get(variant, [20, 20])
    found = net(idx, idx).routing
    aux = 0.0
    agree = []
    above = []
    for call, r_BT in enumerate(r):
        inside = r_BT >= r_BT.topk(k[call]).values[:, -1:]
        bce = -(inside * F.logsigmoid(r_BT) + ~inside * F.logsigmoid(-r_BT)).mean()
        aux = aux + (1e-3 if call in recursion else 0.01) * bce
        agree.append((inside == (r_BT > 0)).float().mean().item())
        above.append((r_BT > 0).float().mean().item())
    torch.testing.assert_close(found["aux_loss"], aux)
    got = {name: value.item() for name, value in found.items()}
    depth = [n for n in range(len(above)) if n not in recursion]
    names = {"aux_loss", "router_agreement"}
    if depth:
        names.add("routed_fraction")
        assert got["routed_fraction"] == pytest.approx(sum(above[n] for n in depth) / len(depth), abs=1e-6)
    if recursion:
        names.add("mean_depth")
        first, second = (above[n] for n in recursion)
        assert got["mean_depth"] == pytest.approx(1 + first + first * second, abs=1e-6)
    assert got.keys() == names
    if variant == "MoD in MoR":  # the mean over routers, of the mean over the calls of each
        calls = [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3,), (7,)]
        agree = [sum(agree[n] for n in group) / len(group) for group in calls]
    assert got["router_agreement"] == pytest.approx(sum(agree) / len(agree), abs=1e-6)


@torch.no_grad()
@every_variant
def test_evaluation_counts_what_the_rule_does(variant, monkeypatch):
    net = make(variant).eval()
    idx = tokens(3, 40)
    seen = selections(monkeypatch)
    found = net(idx, idx).routing
    assert found["aux_loss"] == 0 and found["router_agreement"].isnan()
    counts = [selection.ctx.lengths.sum().item() for selection in seen]
    if variant == "MoR":
        first, second = (found["mean_depth"].item(), 1 + sum(counts) / 120)
        assert first == pytest.approx(second)
    if "MoD-" in variant:
        assert found["routed_fraction"].item() == pytest.approx(sum(counts) / 240)
    assert Hydra(HydraConfig(**SHAPE))(idx, idx).routing == {}


def test_scores_are_fp32_under_autocast():
    router = make().depth_routers[0]
    x = torch.randn(2, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        r = router(x)
    assert r.dtype == torch.float32 and torch.equal(r, router(x))
    assert router.to(torch.bfloat16)(x.bfloat16()).dtype == torch.float32


def test_a_toy_batch_is_learnt_and_the_rule_agrees_with_top_k():
    torch.manual_seed(0)
    net = Hydra(HydraConfig(**SHAPE | VARIANTS["MoD in MoR"] | dict(pattern="MC", n_layer=2)))
    optimizer = make_optimizer(net, TrainConfig(learning_rate=3e-3))
    idx = tokens(4, 33)
    targets = idx[:, 1:].contiguous()
    outputs = []
    for _ in range(80):
        output = net(idx[:, :-1], targets)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(output)
    first = outputs[0].cross_entropy.item()
    assert outputs[-1].cross_entropy < 0.3 * first
    agreement = outputs[-1].routing["router_agreement"]
    assert agreement > 0.8 and agreement > outputs[0].routing["router_agreement"] + 0.1
    with torch.no_grad():  # so that the causal rule's loss is near the one trained with
        assert net.eval()(idx[:, :-1], targets).loss < 0.5 * first


@every_variant
def test_the_invariants_of_parameters(variant):
    net = make(variant)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(torch.nan)
    net.init_weights()  # asserts that none is forgotten
    assert all(p.isfinite().all() for p in net.parameters())
    routers = routers_of(net)
    assert 0.01 < torch.cat([router.weight for router in routers]).std() < 0.03
    depth = net.config.n_layer * net.config.mor_recursions
    assert net.blocks[1].mlp.down.weight.std().item() == pytest.approx(0.02 / (2 * depth) ** 0.5, rel=0.1)
    decayed, plain = ({id(p) for p in group["params"]} for group in make_optimizer(net, TrainConfig()).param_groups)
    assert decayed | plain == {id(p) for p in net.parameters()} and not decayed & plain
    assert plain >= {id(router.weight) for router in routers}
    net(tokens(2, 40), tokens(2, 40, seed=2)).loss.backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_every_other_block_is_routed_and_runs_are_shared():
    net = make("MoD in MoR")
    assert [isinstance(block, MoD) for block in net.blocks] == [False, True] * 3
    assert [router.aux_weight for router in routers_of(net)] == [0.01] * 3 + [1e-3] * 2
    assert routing.layer_tokens(net.config, 40) == [40, 20] * 3 + [26, 13] * 3 + [13, 6] * 3
    assert routing.layer_tokens(net.config, 1) == [1] * 18  # a token is left everywhere


# ---- generation


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("variant, changes", [*((name, {}) for name in VARIANTS), ("MoD-M", {"window": 5}),
                                              ("MoD in MoR", {"window": 3}), ("MoD in MoR", FAIR[-1] | {"n_layer": 6}),
                                              ("MoD-L", {"qk_norm": True, "short_conv": 3}),
                                              ("MoD-C", {"router": "random"}), ("MoR", {"router": "random"}),
                                              ("MoD in MoR", {"router": "random"})], ids=str)  # fmt: skip
def test_decoding_equals_the_evaluation_forward(variant, changes, static):
    """Token by token from prefills of 1, 2 and many tokens, rows of different lengths that route differently."""
    net = make(variant, **changes).eval()
    idx = tokens(3, 96)
    full = net(idx, idx).logits
    for lengths in ([1, 1, 1], [2, 2, 2], [3, 1, 7], [9], [80, 30, 66]):
        L = torch.tensor(lengths)
        B = len(lengths)
        rows = torch.arange(B)
        state = new_state(net, B, 100, static)
        got = prefill(net, [idx[b, :n] for b, n in enumerate(lengths)], state)
        torch.testing.assert_close(got, full[rows, L - 1], rtol=1e-5, atol=1e-5)
        for step in range(14):
            got = decode(net, idx[rows, L + step], state)
            torch.testing.assert_close(got, full[rows, L + step], rtol=1e-5, atol=1e-5)
        counts = torch.stack([layer["count"] for layer in state.layers if "count" in layer])
        assert B == 1 or net.config.router == "random" or (counts.diff(dim=1) != 0).any()
        assert (counts < state.pos_B).any()


@torch.no_grad()
@every_variant
def test_padding_is_neither_seen_nor_routed(variant):
    """Whatever fills the texts up on the right: bit-equal logits, counts and states."""
    net = make(variant).eval()
    idx = tokens(3, 96)
    L = torch.tensor([80, 30, 66])
    found = []
    for filling in (0, 55, 96):
        text = idx[:, :90].clone()
        text[torch.arange(90) >= L[:, None]] = filling
        state = new_state(net, 3, 100, static=True)
        steps = [prefill_step(net, text, L, state)]
        for step in range(9):
            steps.append(decode_step(net, idx[torch.arange(3), L + step], state, 128, False))
        counts = [layer["count"] for layer in state.layers if "count" in layer]
        found.append((torch.stack(steps), torch.stack(counts)))
    for logits, counts in found[1:]:
        assert torch.equal(logits, found[0][0]) and torch.equal(counts, found[0][1])


@torch.no_grad()
@pytest.mark.parametrize("variant, changes", [*((name, {}) for name in VARIANTS),
                                              ("MoD-L", {"qk_norm": True, "short_conv": 3})], ids=str)  # fmt: skip
@pytest.mark.parametrize("static", [False, True])
def test_a_row_that_bypasses_leaves_every_state_untouched(variant, changes, static, monkeypatch):
    net = make(variant, **changes).eval()
    idx = tokens(2, 12)
    state = new_state(net, 2, 20, static)
    prefill(net, [idx[0, :9], idx[1, :5]], state)
    before = [{name: t.clone() for name, t in layer.items()} for layer in state.layers]
    monkeypatch.setattr(Router, "forward", lambda self, x: torch.tensor([1.0, -1.0])[:, None].expand(x.shape[:2]))
    decode(net, idx[:, 9], state)
    for old, new in zip(before, state.layers, strict=True):
        for name in old:
            assert "count" not in old or torch.equal(old[name][1], new[name][1]), name
            assert not torch.equal(old[name][0], new[name][0]), name
    assert any("count" in layer for layer in before)


@torch.no_grad()
@every_variant
def test_nothing_is_computed_where_no_token_is_selected(variant, monkeypatch):
    """Prefill and decode steps of one text, with routers that let nobody pass: only the dense layers run, once."""
    net = make(variant).eval()
    ran = []
    for i, block in enumerate(net.blocks):
        block.attn.register_forward_hook(lambda *_, i=i: ran.append(i))
    monkeypatch.setattr(Router, "forward", lambda self, x: -torch.ones(x.shape[:2]))
    assert len(list(generate(net, tokens(1, 7), 3))) == 3
    dense = [i for i, block in enumerate(net.blocks) if not isinstance(block, MoD)]
    assert ran == dense * 3


@torch.no_grad()
@every_variant
def test_a_token_that_no_router_selects_passes_unchanged(variant, monkeypatch):
    """In evaluation: the trunk is that of the dense layers alone."""
    net = make(variant).eval()
    monkeypatch.setattr(Router, "forward", lambda self, x: -torch.ones(x.shape[:2]))
    x = torch.randn(2, 9, 64)
    ctx = net.context(torch.arange(9))
    expected = x
    for block in net.blocks:
        if not isinstance(block, MoD):
            expected = block(expected, ctx)
    got, _ = routing.recurse(net.blocks, net.recursion_routers, x, ctx, None)
    torch.testing.assert_close(got, expected)


@torch.no_grad()
@every_variant
def test_text_is_the_same_with_and_without_states_and_alone_or_in_a_batch(variant):
    net = make(variant).eval()
    text = tokens(3, 11)
    prompts = [text[0, :4], text[1, :1], text[2]]
    expected = []
    for prompt in prompts:
        for _ in range(12):
            prompt = torch.cat((prompt, net(prompt[None]).logits[0, -1].argmax(-1, keepdim=True)))
        expected.append(prompt[-12:])
    expected = torch.stack(expected)
    assert torch.equal(torch.cat([text_of(net, [prompt], 12) for prompt in prompts]), expected)
    net.train()  # the rule is the causal one all the same
    for static in (False, True):
        assert torch.equal(text_of(net, prompts, 12, static=static), expected)
    pack(net)
    assert torch.equal(text_of(net, prompts, 12), expected)


@torch.no_grad()
@every_variant
def test_bf16_weights_generate(variant):
    net = make(variant).to(torch.bfloat16).eval()
    for static in (False, True):
        assert text_of(net, [tokens(9), tokens(3)], 5, static=static).shape == (2, 5)


# ---- one graph


@pytest.mark.slow
@every_graph
def test_training_is_one_graph_over_steps(variant, changes):
    torch._dynamo.reset()
    net = make(variant, **changes)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for step in range(3):
        idx = tokens(2, 40, seed=step)
        targets = tokens(2, 40, seed=step + 9)
        output = compiled(idx, targets)
        expected = net(idx, targets)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.routing, expected.routing)
        output.loss.backward()
    assert counter.frame_count == 1


@pytest.mark.slow
@every_graph
@torch.no_grad()
def test_prefill_and_decode_are_one_graph_each(variant, changes, monkeypatch):
    torch._dynamo.reset()
    net = make(variant, **changes).eval()
    expected = [text_of(net, tokens(1, n), 20) for n in (9, 12)]
    prefills = CompileCounterWithBackend("eager")
    decodes = CompileCounterWithBackend("eager")
    monkeypatch.setattr(generation, "prefill_step", torch.compile(prefill_step, backend=prefills, fullgraph=True))
    monkeypatch.setattr(generation, "decode_step", torch.compile(decode_step, backend=decodes, fullgraph=True))
    for n, text in zip((9, 12), expected, strict=True):
        state = new_state(net, 1, 32, static=True)
        got = [prefill(net, tokens(1, n), state).argmax(-1)]
        for _ in range(19):
            got.append(decode(net, got[-1], state).argmax(-1))
        assert torch.equal(torch.stack(got, dim=1), text)
    assert (prefills.frame_count, decodes.frame_count) == (1, 1)


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=64)
def test_blocks_compiled_one_by_one_have_static_shapes():
    """As train.py compiles them: all graphs are there after one step and one evaluation, whatever is routed."""
    torch._dynamo.reset()
    net = make(pattern="MC", n_layer=2)
    counter = CompileCounterWithBackend("eager")
    frames = []
    for block in net.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    for step in range(3):
        idx = tokens(2, 40, seed=step)
        net.train()(idx, idx).loss.backward()
        with torch.no_grad():
            net.eval()(idx, idx)
        frames.append(counter.frame_count)
    assert frames == [frames[0]] * 3


@pytest.mark.parametrize("changes", [{}, {"mod_capacity": 0.25}, {"mor_recursions": 3}], ids=str)
def test_recomputed_blocks_keep_their_inputs_alone_and_change_nothing(changes):
    idx = tokens(2, 24)
    kept, gradients = [], []
    for recompute in (False, True):
        net = make(**changes)
        net.recompute = recompute
        parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
        storages = {}

        def pack(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = net(idx, idx).loss
        loss.backward()
        kept.append(sum(n for pointer, n in storages.items() if pointer not in parameters))
        gradients.append([p.grad for p in net.parameters()])
    assert kept[1] < kept[0] / 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_the_flex_road_has_a_mask_for_every_number_of_tokens(monkeypatch):
    """Traced as for CUDA: one graph, the loss of SDPA, block masks made before it. Its gradients: test_attention.py."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(machine, "flex_problem", lambda *_: "")
    torch._dynamo.reset()
    reference = make(pattern="MC", n_layer=2, mor_recursions=2, window=8)
    flex = Hydra(replace(reference.config, attn_backend="flex"))
    flex.load_state_dict(reference.state_dict())
    assert flex.context(torch.arange(24)).masks.keys() == {(24, 8), (12, 0), (12, 8), (6, 0)}
    idx = tokens(2, 24)
    recorder = AotEagerAndRecordGraphs()
    with torch.no_grad():
        output = torch.compile(flex, backend=recorder, fullgraph=True)(idx, idx)
        torch.testing.assert_close(output.loss, reference(idx, idx).loss, rtol=1e-5, atol=1e-5)
    assert recorder.fw_graphs[0].code.count("higher_order.flex_attention(") == 4 and len(recorder.graphs) == 1
    assert flex.eval().context(torch.arange(24)).masks.keys() == {(24, 8), (24, 0)}  # the rule may select any number
    assert not flex.context(torch.arange(24)[:, None], decoding=True).masks


# ---- work


@every_variant
def test_a_prefill_computes_less_where_fewer_are_selected(variant, monkeypatch):
    """On a CPU, and only in generation: an evaluation computes all tokens, so that its rounding follows none."""
    net = make(variant).eval()

    def core(q, k, v, *args, out_val=None, **kwargs):
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    core._get_raw = True
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    prefills = []
    evaluations = []
    for part in (0, 60, 190):  # the first tokens of each text, and none of the others
        monkeypatch.setattr(Router, "forward", lambda self, x, n=part: (torch.arange(x.size(1)) < n).float().expand(
            x.shape[:2]) - 0.5)  # fmt: skip
        for found, call in ((prefills, lambda: prefill(net, tokens(1, 256), new_state(net, 1, 256))),
                            (evaluations, lambda: net(tokens(1, 256), tokens(1, 256)))):  # fmt: skip
            with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={kernel: core}) as counter:
                call()
            found.append(counter.get_total_flops())
    assert prefills[0] < 0.9 * prefills[1] < 0.8 * prefills[2]
    assert len(set(evaluations)) == 1


# ---- the control


@every_variant
def test_a_random_router_selects_by_position_alone_and_as_many(variant, monkeypatch):
    """In training just the capacity, under the rule about as much; the same whatever the tokens, not the same in two
    layers; selected tokens have a gate of 1, and nothing is learned or added to the loss."""
    net = make(variant, router="random", block_size=2048)
    assert not any("router" in name for name, _ in net.named_parameters())
    seen = selections(monkeypatch)
    found = net(tokens(2, 256), tokens(2, 256)).routing
    learned = make(variant, block_size=2048)
    first, seen[:] = seen[:], []
    net(tokens(2, 256, seed=5), tokens(2, 256))
    assert len(first) == len(seen) and all(torch.equal(a.index, b.index) for a, b in zip(first, seen, strict=True))
    assert all((s.gate > 0.99).float().mean() > 0.8 for s in first)
    seen[:] = []
    learned(tokens(2, 256), tokens(2, 256))
    assert [s.index.shape for s in first] == [s.index.shape for s in seen]
    same_depth = [s.index for s in first if s.index.shape == first[0].index.shape]
    assert len(same_depth) < 2 or not torch.equal(same_depth[0], same_depth[1])
    assert found["aux_loss"] == 0 and found["router_agreement"] > 0.8
    with torch.no_grad():
        found = net.eval()(tokens(1, 2048), tokens(1, 2048)).routing
    if "MoD" in variant:
        assert found["routed_fraction"] == pytest.approx(0.5, abs=0.06)
    if "MoR" in variant:
        assert found["mean_depth"] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("keys, words", [
    ({"router": "random"}, "there is nothing to route"), ({"mod_aux": -1.0}, "mod_aux=-1.0"),
    ({"router": "x", "mod_capacity": 0.5}, "use learned or random"), ({"mor_aux": float("nan")}, "mor_aux=nan"),
])  # fmt: skip
def test_options_that_cannot_be(keys, words):
    with pytest.raises(UserError, match=words):
        HydraConfig(**keys)


# ---- as a user meets it


@pytest.mark.parametrize("keys, names", [
    (["--mod_capacity=0.25"], {"routed_fraction"}), (["--mor_recursions=3"], {"mean_depth"}),
    (["--mod_capacity=0.25", "--mor_recursions=2"], {"routed_fraction", "mean_depth"}), ([], set()),
])  # fmt: skip
def test_a_run_logs_its_routing_and_its_checkpoint_generates(keys, names, tmp_path, capsys):
    """`loss` is the language model's: the same as without an auxiliary loss, which moves only the weights."""
    args = ["--dim=32", "--latent_head_dim=0", "--n_head=2", "--n_kv_head=1", "--compression=2",
            "--n_layer=4", "--pattern=MCLM", "--mlp_ratio=1", "--block_size=32",
            "--vocab_size=257", "--tokenizer=bytes", f"--data={__file__}", "--batch_size=2", "--eval_iters=2",
            "--final_eval_iters=4", "--log_interval=1", "--sample_tokens=4", "--max_iters=2",
            "--gradient_accumulation_steps=2", f"--cache_dir={tmp_path / 'cache'}"]  # fmt: skip
    logs = {}
    for weight in (1, 0):
        if not weight:
            args += ["--mod_aux=0", "--mor_aux=0"]
        assert train.main([*args, *keys, f"--out_dir={tmp_path / str(weight)}"]) == 0
        lines = (tmp_path / str(weight) / "log.jsonl").read_text().splitlines()
        logs[weight] = [json.loads(line) for line in lines]
    printed = capsys.readouterr().out
    steps = [record for record in logs[1] if "grad_norm" in record]
    validations = [record for record in logs[1] if "best" in record]
    expected = {"aux_loss", "router_agreement"} | names if names else set()
    everything = {"aux_loss", "router_agreement", "routed_fraction", "mean_depth"}
    assert all(everything & r.keys() == expected for r in steps)
    assert all({n for n in everything if f"val_{n}" in r} == names for r in validations)
    assert all(f"{name} " in printed for name in expected) and (names or "router_" not in printed)
    unaided = [r for r in logs[0] if "grad_norm" in r]
    assert steps[0]["loss"] == unaided[0]["loss"] and (steps[0]["grad_norm"] != unaided[0]["grad_norm"]) == bool(names)
    assert sample.main([f"--out_dir={tmp_path / '1'}", "--prompt=ab", "--prompt=abcd", "--max_new_tokens=9"]) == 0
    filled, allocated = (int(n.replace(",", "")) for n in re.search(
        r"holds ([\d,]+) of ([\d,]+) bytes", capsys.readouterr().err).groups())  # fmt: skip
    config = HydraConfig(**torch.load(tmp_path / "1" / "last.pt", weights_only=True)["model_config"])
    assert filled < allocated == 2 * accounting.state_bytes(config, 13, 4, allocated=True)
