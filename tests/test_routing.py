"""Mixture-of-Depths, Mixture-of-Recursions, and both at once: causality, expert choice, the causal rule in generation,
auxiliary losses, one graph, accounting, and that it learns and saves what it should."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex_module
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import attention
import model as model_module
import routing
import sample
import train
from attention import make_context
from configurator import UserError, parse
from model import Hydra, HydraConfig, MoD, count_params, flops_per_token, kv_bytes, layer_tokens, tail_bytes
from routing import Router
from train import TrainConfig

ROOT = Path(train.__file__).parent
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
GRAPHS = {name: {"n_layer": 2} for name in VARIANTS if "MoR" not in name} | {"MoD in MoR": {"mor_recursions": 2}}
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


def scores(monkeypatch, replay: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """The list that every router's scores are written to from now on; or they are `replay`, whatever the tokens are."""
    seen, real = [], Router.forward

    def forward(self, x):
        seen.append(real(self, x))
        return seen[-1] if replay is None else replay[len(seen) - 1]

    monkeypatch.setattr(Router, "forward", forward)
    return seen


def picks(monkeypatch) -> list[routing.Pick]:
    """The list that every pick is written to from now on."""
    seen, real = [], routing.select

    def select(*args):
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(routing, "select", select)
    monkeypatch.setattr(model_module, "select", select)
    return seen


# ---- causality


@torch.no_grad()
@every_variant
@pytest.mark.parametrize("static", [False, True])
def test_the_future_never_changes_the_past_in_evaluation(variant, static):
    net, idx = make(variant).eval(), tokens(2, 40)
    net.static = static
    expected, _ = net(idx, idx)
    for t in (0, 1, 2, 17, 38):
        got, _ = net(changed_after(idx, t), idx)
        assert torch.equal(got[:, : t + 1], expected[:, : t + 1])
        assert not torch.equal(got[:, t + 1 :], expected[:, t + 1 :])


@torch.no_grad()
@every_variant
def test_long_texts_too_whatever_is_computed_with_them(variant, monkeypatch):
    """With static shapes all tokens are computed, eager only the picked ones, in 64s: equal, and causal."""
    net, idx, seen, real = make(variant).eval(), tokens(2, 230), picks(monkeypatch), Router.forward
    monkeypatch.setattr(Router, "forward", lambda self, x: real(self, x) / x.norm(dim=-1) - 0.5)  # about a third
    expected, _ = net(idx, idx)
    assert {pick.index.size(1) for pick in seen if pick} & {64, 128, 192}
    other, _ = net(changed_after(idx, 70), idx)
    torch.testing.assert_close(other[:, :71], expected[:, :71], rtol=1e-5, atol=1e-5)
    net.static = True
    everything, _ = net(idx, idx)
    torch.testing.assert_close(everything, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(net(changed_after(idx, 70), idx)[0][:, :71], everything[:, :71])
    assert not torch.equal(net.train()(idx, idx)[0], expected)  # top-k is another rule


@torch.no_grad()
@every_variant
def test_the_future_never_changes_the_past_in_training_with_the_routing_held_fixed(variant, monkeypatch):
    net, idx = make(variant), tokens(2, 40)
    fixed = scores(monkeypatch)
    expected, _ = net(idx, idx)
    for t in (0, 1, 2, 17, 38):
        scores(monkeypatch, replay=fixed)
        got, _ = net(changed_after(idx, t), idx)
        assert torch.equal(got[:, : t + 1], expected[:, : t + 1])
        assert not torch.equal(got, expected)


# ---- expert choice


@every_variant
def test_the_best_k_are_picked_in_the_order_of_the_text(variant, monkeypatch):
    net, idx = make(variant), tokens(3, 40)
    r, seen = scores(monkeypatch), picks(monkeypatch)
    net(idx, idx)
    expected = {"MoR": [26, 13], "MoD in MoR": [20, 20, 20, 26, 13, 13, 13, 13, 6, 6, 6]}.get(variant, [20, 20])
    assert [pick.index.size(1) for pick in seen] == expected
    for pick, r_BT, k in zip(seen, r, expected, strict=True):
        index = pick.index.squeeze(-1)
        assert (index.diff(dim=1) > 0).all() and index.shape == (3, k)
        torch.testing.assert_close(r_BT.gather(1, index).sort(descending=True).values, r_BT.topk(k).values)
        assert torch.equal(pick.gate.squeeze(-1), r_BT.gather(1, index).sigmoid())
    assert not torch.equal(seen[0].index[0], seen[0].index[1])  # each sequence its own


@torch.no_grad()
@pytest.mark.parametrize("letter", ["M", "C", "L"])
@pytest.mark.parametrize("training", [False, True])
def test_a_routed_block_is_the_block_on_the_picked_tokens_alone(letter, training):
    """x + sigmoid(r) * (block(x) - x), row by row on a text of the picked tokens at their true positions."""
    block = make(f"MoD-{letter}").blocks[1].train(training)
    x, pos = torch.randn(3, 30, 64), torch.arange(30)
    width = {block.attn.rope_width}
    got = block(x, make_context(pos, width, 10000.0))
    for b in range(3):
        r = x[b] @ block.router.weight
        index = torch.tensor(sorted(r.topk(15).indices.tolist())) if training else (r > 0).nonzero().squeeze(1)
        part = x[b : b + 1, index]
        delta = model_module.Block.forward(block, part, make_context(index, width, 10000.0)) - part
        expected = x[b].clone()
        expected[index] += r[index].sigmoid()[:, None] * delta[0]
        torch.testing.assert_close(got[b], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_recursions_are_hierarchical(training):
    """The shared blocks run for all, then for those that each router picks among the ones before it."""
    net, x = make("MoR").train(training), torch.randn(1, 30, 64)
    got = routing.recurse(net.blocks, net.recursion_routers, x, net.context(torch.arange(30)), None)

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
    net(tokens(2, 40), tokens(2, 40, seed=2))[1].backward()
    routers = net.depth_routers + [*net.recursion_routers]
    assert len(routers) == {"MoR": 2, "MoD in MoR": 5}.get(variant, 2)
    for router in routers:
        assert router.weight.grad.abs().max() > 1e-6


@every_variant
def test_the_auxiliary_loss_and_the_statistics_are_their_definitions(variant, monkeypatch):
    net, idx, r = make(variant), tokens(3, 40), scores(monkeypatch)
    recursion = {"MoR": (0, 1), "MoD in MoR": (3, 7)}.get(variant, ())  # calls that are the recursions' own
    k = {"MoR": [26, 13], "MoD in MoR": [20, 20, 20, 26, 13, 13, 13, 13, 6, 6, 6]}.get(variant, [20, 20])
    _, loss = net(idx, idx)
    aux, agree, above = 0.0, [], []
    for call, r_BT in enumerate(r):
        inside = r_BT >= r_BT.topk(k[call]).values[:, -1:]
        bce = -(inside * F.logsigmoid(r_BT) + ~inside * F.logsigmoid(-r_BT)).mean()
        aux = aux + (1e-3 if call in recursion else 0.01) * bce
        agree.append((inside == (r_BT > 0)).float().mean().item())
        above.append((r_BT > 0).float().mean().item())
    torch.testing.assert_close(net.aux_loss(), aux)
    assert net.aux_loss().requires_grad and loss.item() == pytest.approx(net(idx, idx)[1].item())
    got = {name: value.item() for name, value in net.routing().items()}
    depth = [n for n in range(len(above)) if n not in recursion]
    if variant != "MoD in MoR":  # there the mean over routers is of the mean over their calls
        assert got["router_agreement"] == pytest.approx(sum(agree) / len(agree), abs=1e-6)
    if depth:
        assert got["routed_fraction"] == pytest.approx(sum(above[n] for n in depth) / len(depth), abs=1e-6)
    if recursion:
        first, second = (above[n] for n in recursion)
        assert got["mean_depth"] == pytest.approx(1 + first + first * second, abs=1e-6)


@torch.no_grad()
@every_variant
def test_evaluation_counts_what_the_rule_does(variant, monkeypatch):
    net, idx, seen = make(variant).eval(), tokens(3, 40), picks(monkeypatch)
    net(idx, idx)
    assert net.aux_loss() == 0 and net.routing()["router_agreement"].isnan()
    counts = [pick.ctx.lengths.sum().item() for pick in seen]
    got = {name: value.item() for name, value in net.routing().items()}
    if variant == "MoR":
        assert got["mean_depth"] == pytest.approx(1 + sum(counts) / 120)
    if "MoD-" in variant:
        assert got["routed_fraction"] == pytest.approx(sum(counts) / 240)
    dense = Hydra(HydraConfig(**SHAPE))
    assert dense.routing() == {} and dense.aux_loss() == 0


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
    optimizer = torch.optim.AdamW(net.optimizer_groups(0.1), lr=3e-3)
    idx = tokens(4, 33)
    first = None
    for _ in range(80):
        _, loss = net(idx[:, :-1], idx[:, 1:].contiguous())
        (loss + net.aux_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        first = first or (loss.item(), net.routing()["router_agreement"].item())
    agreement = net.routing()["router_agreement"].item()
    assert loss.item() < 0.3 * first[0] and agreement > 0.8 > first[1] + 0.1
    with torch.no_grad():  # so that the causal rule's loss is near the one trained with
        assert net.eval()(idx[:, :-1], idx[:, 1:].contiguous())[1] < 0.5 * first[0]


@every_variant
def test_the_invariants_of_parameters(variant):
    net = make(variant)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(torch.nan)
    net.init_weights()  # asserts that each is done once
    assert all(p.isfinite().all() for p in net.parameters())
    routers = net.depth_routers + [*net.recursion_routers]
    assert 0.01 < torch.cat([r.weight for r in routers]).std() < 0.03
    depth = len(layer_tokens(net.config, 1))
    assert net.blocks[1].mlp.down.weight.std().item() == pytest.approx(0.02 / (2 * depth) ** 0.5, rel=0.1)
    decayed, plain = ({id(p) for p in group["params"]} for group in net.optimizer_groups(0.1))
    assert decayed | plain == {id(p) for p in net.parameters()} and not decayed & plain
    assert plain >= {id(r.weight) for r in routers}
    _, loss = net(tokens(2, 40), tokens(2, 40, seed=2))
    (loss + net.aux_loss()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


# ---- generation


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("variant, changes", [*((name, {}) for name in VARIANTS), ("MoD-M", {"window": 5}),
                                              ("MoD in MoR", {"window": 3})], ids=str)  # fmt: skip
def test_decoding_equals_the_evaluation_forward(variant, changes, static):
    """Token by token from prefills of 1, 2 and many tokens, rows of different lengths that route differently."""
    net, idx = make(variant, **changes).eval(), tokens(3, 96)
    full, _ = net(idx, idx)
    for lengths in ([1, 1, 1], [2, 2, 2], [3, 1, 7], [9], [80, 30, 66]):
        L, B, longest = torch.tensor(lengths), len(lengths), max(lengths)
        rows, state = torch.arange(B), net.new_state(B, 100)
        text = idx[:B, :longest].clone()
        text[torch.arange(longest) >= L[:, None]] = 55  # padding that must not be seen or routed
        torch.testing.assert_close(net.prefill(text, L, state), full[rows, L - 1], rtol=1e-5, atol=1e-5)
        state.visible, state.uniform = (None, False) if static else (longest, min(lengths) == longest)
        for step in range(14):
            got = net.decode(idx[rows, L + step], state)
            torch.testing.assert_close(got, full[rows, L + step], rtol=1e-5, atol=1e-5)
        counts = torch.stack([layer["count"] for layer in state.layers if "count" in layer])
        assert B == 1 or (counts.diff(dim=1) != 0).any()
        assert (counts < state.pos_B).any()


@torch.no_grad()
@every_variant
@pytest.mark.parametrize("static", [False, True])
def test_a_row_that_bypasses_leaves_every_state_untouched(variant, static, monkeypatch):
    net, idx = make(variant).eval(), tokens(2, 12)
    state = net.new_state(2, 20)
    net.prefill(idx[:, :9], torch.tensor([9, 5]), state)
    state.visible, state.uniform = (None, False) if static else (9, False)
    before = [{name: t.clone() for name, t in layer.items()} for layer in state.layers]
    monkeypatch.setattr(Router, "forward", lambda self, x: torch.tensor([1.0, -1.0])[:, None].expand(x.shape[:2]))
    net.decode(idx[:, 9], state)
    for old, new in zip(before, state.layers, strict=True):
        for name in old:
            assert "count" not in old or torch.equal(old[name][1], new[name][1]), name
            assert not torch.equal(old[name][0], new[name][0]), name
    assert any("count" in layer for layer in before)


@torch.no_grad()
@every_variant
def test_nothing_is_computed_where_no_token_is_picked(variant, monkeypatch):
    """Prefill and decode steps of one text, with routers that let nobody pass: only the dense layers run, once."""
    net, ran = make(variant).eval(), []
    for i, block in enumerate(net.blocks):
        block.attn.register_forward_hook(lambda *_, i=i: ran.append(i))
    monkeypatch.setattr(Router, "forward", lambda self, x: -torch.ones(x.shape[:2]))
    assert len(list(net.generate(tokens(1, 7), 3))) == 3
    dense = [i for i, block in enumerate(net.blocks) if not isinstance(block, MoD)]
    assert ran == dense * 3


@torch.no_grad()
@every_variant
def test_text_is_the_same_with_and_without_states_and_alone_or_in_a_batch(variant):
    net, text = make(variant).eval(), tokens(3, 11)
    prompts = [text[0, :4], text[1, :1], text[2]]
    expected = []
    for prompt in prompts:
        for _ in range(12):
            prompt = torch.cat((prompt, net(prompt[None])[0][0, -1].argmax(-1, keepdim=True)))
        expected.append(prompt[-12:])
    alone = [torch.cat(list(net.generate([p], 12, temperature=0.0))) for p in prompts]
    assert torch.equal(torch.stack(alone), torch.stack(expected))
    net.train()  # the rule is the causal one all the same
    for static in (False, True):
        together = torch.stack(list(net.generate(prompts, 12, temperature=0.0, static=static)), dim=1)
        assert torch.equal(together, torch.stack(expected))
    net.pack()
    assert torch.equal(torch.stack(list(net.generate(prompts, 12, temperature=0.0)), dim=1), torch.stack(expected))


@torch.no_grad()
@every_variant
def test_bf16_weights_generate(variant):
    net = make(variant).to(torch.bfloat16).eval()
    for static in (False, True):
        assert len(list(net.generate([tokens(9), tokens(3)], 5, static=static))) == 5


# ---- one graph


@every_graph
def test_training_is_one_graph_over_steps(variant, changes):
    torch._dynamo.reset()
    net, counter = make(variant, **changes), CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for step in range(3):
        idx, targets = tokens(2, 40, seed=step), tokens(2, 40, seed=step + 9)
        loss = compiled(idx, targets)[1]
        aux = net.aux_loss()
        torch.testing.assert_close(loss, net(idx, targets)[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(aux, net.aux_loss())
        (loss + aux).backward()
    assert counter.frame_count == 1


@every_graph
def test_prefill_and_decode_are_one_graph_each(variant, changes):
    torch._dynamo.reset()
    net = make(variant, **changes).eval()
    expected = [torch.cat(list(net.generate(tokens(1, n), 20, temperature=0.0))) for n in (9, 12)]
    prefills, decodes = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    net.prefill = torch.compile(net.prefill, backend=prefills, fullgraph=True)
    net.decode = torch.compile(net.decode, backend=decodes, fullgraph=True)
    for n, text in zip((9, 12), expected, strict=True):
        assert torch.equal(torch.cat(list(net.generate(tokens(1, n), 20, temperature=0.0, static=True))), text)
    assert (prefills.frame_count, decodes.frame_count) == (1, 1)


@torch._dynamo.config.patch(recompile_limit=64)
def test_blocks_compiled_one_by_one_have_static_shapes():
    """As train.py compiles them: all graphs are there after one step and one evaluation, whatever is routed."""
    torch._dynamo.reset()
    net, counter, frames = make(pattern="MC", n_layer=2), CompileCounterWithBackend("eager"), []
    net.static = True
    for block in net.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    for step in range(3):
        net.train()
        idx = tokens(2, 40, seed=step)
        (net(idx, idx)[1] + net.aux_loss()).backward()
        net.eval()
        with torch.no_grad():
            net(idx, idx)
        frames.append(counter.frame_count)
    assert frames == [frames[0]] * 3


def test_the_flex_road_has_a_mask_for_every_number_of_tokens(monkeypatch):
    """Traced forward and backward as for CUDA: one graph, gradients equal to SDPA's, block masks made before it."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "flex_problem", lambda *_: "")
    torch._dynamo.reset()
    reference = make(pattern="MC", n_layer=2, mor_recursions=2, window=8)
    flex = Hydra(replace(reference.config, attn_backend="flex"))
    flex.load_state_dict(reference.state_dict())
    assert flex.context(torch.arange(24)).masks.keys() == {(24, 8), (12, 0), (12, 8), (6, 0)}
    idx, recorder = tokens(2, 24), AotEagerAndRecordGraphs()
    torch.compile(flex, backend=recorder, fullgraph=True)(idx, idx)[1].backward()
    reference(idx, idx)[1].backward()
    assert recorder.fw_graphs[0].code.count("higher_order.flex_attention(") == 4 and len(recorder.graphs) == 1
    for (name, a), b in zip(flex.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


# ---- accounting


def counted_flops(net: Hydra, B: int, T: int) -> int:
    """torch's count of a forward, told of the CPU's attention kernel."""

    def core(q, k, v, *args, out_val=None, **kwargs):
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    core._get_raw = True
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={kernel: core}) as counter:
        net(tokens(B, T), tokens(B, T))
    return counter.get_total_flops()


@every_variant
@pytest.mark.parametrize("capacity", [0.0, 0.125, 0.25, 0.75])
def test_counted_flops_equal_the_formula_and_fall_with_the_capacity(variant, capacity):
    """torch counts all pairs of the attention, and neither depthwise convolutions nor a matrix times a vector."""
    capacity = capacity if "MoD" in variant else 0.0
    net = make(variant, mod_capacity=capacity)
    c, (B, T) = net.config, (2, 40)
    expected = T * flops_per_token(c, T)
    for letter, t in layer_tokens(c, T):
        width = {"C": c.dim // c.compression, "L": int(c.dim * c.latent_ratio)}.get(letter, c.dim)
        expected += t * 2 * t * width  # the upper half of the pairs
        if letter == "C":
            expected -= t * 2 * c.conv_kernel * (width + width // c.n_head * c.n_kv_head)
    recursions = [40, 26, 13][: c.mor_recursions]
    expected -= 2 * c.dim * (sum(recursions[:-1]) + (c.n_layer // 2 if capacity else 0) * sum(recursions))
    assert counted_flops(net, B, T) == pytest.approx(B * expected, rel=1e-9)
    if 0 < capacity < 0.75:
        assert flops_per_token(c, T) < flops_per_token(replace(c, mod_capacity=2 * capacity), T)
    once = flops_per_token(replace(c, mor_recursions=1, mod_capacity=0.0), T)
    assert capacity or c.mor_recursions == 1 or once < flops_per_token(c, T) < 3 * once


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_computes_less_where_fewer_are_picked(variant, monkeypatch):
    net, flops = make(variant).eval(), []
    for part in (0, 60, 190):  # the first tokens of each text, and none of the others
        monkeypatch.setattr(Router, "forward", lambda self, x, n=part: (torch.arange(x.size(1)) < n).float().expand(
            x.shape[:2]) - 0.5)  # fmt: skip
        flops.append(counted_flops(net, 1, 256))
    assert flops[0] < 0.9 * flops[1] < 0.8 * flops[2]


@every_variant
def test_counted_parameters_equal_the_formula(variant):
    net = make(variant)
    assert count_params(net.config) == sum(p.numel() for p in net.parameters())
    dense = count_params(replace(net.config, mod_capacity=0.0, mor_recursions=1))
    assert count_params(net.config) - dense == 64 * len(net.depth_routers + [*net.recursion_routers])


@torch.no_grad()
@pytest.mark.parametrize("variant, changes", [*((name, {}) for name in VARIANTS), ("MoD-M", {"window": 5})], ids=str)
@pytest.mark.parametrize("capacity", [0.125, 0.5])
def test_a_state_fills_what_the_formula_says_and_has_room_for_the_worst_case(variant, changes, capacity, monkeypatch):
    """Routers that let pass exactly the training capacity fill kv_bytes; what is allocated does not depend on them."""
    net = make(variant, mod_capacity=capacity if "MoD" in variant else 0.0, **changes).eval()
    c, (B, T) = net.config, (3, 40)
    allowed = []
    for t in [40, 26, 13][: c.mor_recursions]:
        allowed += [t] * (t < 40) + [max(1, int(capacity * t))] * (c.n_layer // 2 if c.mod_capacity else 0)
    allowed = iter(allowed)
    monkeypatch.setattr(Router, "forward", lambda self, x: (torch.arange(x.size(1)) < next(allowed)).float().expand(
        x.shape[:2]) - 0.5)  # fmt: skip
    state = net.new_state(B, T)
    assert state.bytes(filled=True) == B * tail_bytes(c, 4)
    net.prefill(tokens(B, T), torch.full((B,), T), state)
    assert state.bytes(filled=True) == B * (kv_bytes(c, T, 4) + tail_bytes(c, 4))
    assert state.bytes() == B * (kv_bytes(c, T, 4, allocated=True) + tail_bytes(c, 4))
    dense = replace(c, mod_capacity=0.0, mor_recursions=1)
    assert kv_bytes(c, T, allocated=True) == c.mor_recursions * kv_bytes(dense, T)
    assert kv_bytes(c, T) < kv_bytes(c, T, allocated=True) or c.window


SCALES = {"100m": (768, 32, 12, 3), "250m": (1024, 48, 16, 4), "500m": (1536, 64, 24, 4), "750m": (1792, 80, 28, 4),
          "900m": (2048, 80, 32, 4), "1000m": (2048, 96, 32, 8), "1500m": (2560, 120, 40, 8),
          "4b": (4096, 160, 64, 8)}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_the_scales_have_the_report_s_shapes_and_the_stated_parameters(name):
    path = ROOT / "config" / f"scale_{name}.toml"
    given = parse([str(path)], HydraConfig, TrainConfig)
    c = HydraConfig(**{k: v for k, v in given.items() if k in HydraConfig.__dataclass_fields__})
    assert (c.dim, c.n_layer * c.mor_recursions, c.n_head, c.n_kv_head) == SCALES[name]
    assert c.n_layer % 8 == 0 and (c.pattern, c.vocab_size) == ("MMCCCLML", 50257)
    with torch.device("meta"):
        net = Hydra(c)
    assert count_params(c) == sum(p.numel() for p in net.parameters())
    assert int(re.search(r"([\d,]+) parameters", path.read_text())[1].replace(",", "")) == count_params(c)


# ---- as a user meets it


@pytest.mark.parametrize("changes, words", [
    ({"mod_capacity": -0.1}, "mod_capacity=-0.1: choose a value from 0"), ({"mod_capacity": 1.5}, "mod_capacity=1.5"),
    ({"mod_capacity": float("nan")}, "mod_capacity=nan"), ({"mor_recursions": 0}, "mor_recursions=0: .*at least 1"),
    ({"mod_capacity": 0.5, "n_layer": 1}, "mod_capacity=0.5: .*n_layer=1"),
])  # fmt: skip
def test_values_that_cannot_be_are_refused_in_one_line(changes, words):
    with pytest.raises(UserError, match=words) as error:
        HydraConfig(**SHAPE | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keys, names", [
    (["--mod_capacity=0.25"], {"routed_fraction"}), (["--mor_recursions=3"], {"mean_depth"}),
    (["--mod_capacity=0.25", "--mor_recursions=2"], {"routed_fraction", "mean_depth"}), ([], set()),
])  # fmt: skip
def test_a_run_logs_its_routing_and_its_checkpoint_generates(keys, names, tmp_path, capsys, monkeypatch):
    """`loss` is the language model's: the same as without an auxiliary loss, which moves only the weights."""
    args = ["--dim=32", "--latent_head_dim=0", "--n_head=2", "--n_kv_head=1", "--compression=2",
            "--n_layer=4", "--pattern=MCLM", "--mlp_ratio=1", "--block_size=32",
            "--vocab_size=257", "--tokenizer=bytes", f"--data={__file__}", "--batch_size=2", "--eval_iters=2",
            "--final_eval_iters=4", "--log_interval=1", "--sample_tokens=4", "--max_iters=2",
            "--gradient_accumulation_steps=2", f"--cache_dir={tmp_path / 'cache'}"]  # fmt: skip
    logs = {}
    for weight in (1, 0):
        if not weight:
            monkeypatch.setattr(Hydra, "aux_loss", lambda self: 0.0)
        assert train.main([*args, *keys, f"--out_dir={tmp_path / str(weight)}"]) == 0
        lines = (tmp_path / str(weight) / "log.jsonl").read_text().splitlines()
        logs[weight] = [json.loads(line) for line in lines]
    printed = capsys.readouterr().out
    steps, validations = ([r for r in logs[1] if key in r] for key in ("grad_norm", "best"))
    expected = {"aux_loss", "router_agreement"} | names if names else set()
    everything = {"aux_loss", "router_agreement", "routed_fraction", "mean_depth"}
    assert all(everything & r.keys() == expected for r in steps)
    assert all({n for n in everything if f"val_{n}" in r} == names for r in validations)
    assert all(f"{name} " in printed for name in expected) and (names or "router" not in printed.split("step     0")[1])
    unaided = [r for r in logs[0] if "grad_norm" in r]
    assert steps[0]["loss"] == unaided[0]["loss"] and (steps[0]["grad_norm"] != unaided[0]["grad_norm"]) == bool(names)
    assert sample.main([f"--out_dir={tmp_path / '1'}", "--prompt=ab", "--prompt=abcd", "--max_new_tokens=9"]) == 0
    filled, allocated = (int(n.replace(",", "")) for n in re.search(
        r"holds ([\d,]+) of ([\d,]+) bytes", capsys.readouterr().err).groups())  # fmt: skip
    config = HydraConfig(**torch.load(tmp_path / "1" / "last.pt", weights_only=True)["model_config"])
    assert filled < allocated == 2 * (kv_bytes(config, 13, 4, allocated=True) + tail_bytes(config, 4))
