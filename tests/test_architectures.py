"""Architectures at random: what holds for every one of them, whatever its letters, heads, taps and routers.

Causality, decoding from a state equal to the full forward, a gradient for every parameter, counts by the closed
formulas. In fp64, where equal means what it says: decoding differs from a forward by the order of sums alone, 7e-15 at
most in 235 architectures; DENSE has room for a hundred times that, and none for a mistake. (In fp32 a CCQA head of 2
channels, whose norm divides by the length of two numbers, makes 5e-5 of the same roundings.) A router's scores are fp32
by design: its gate then differs by 1e-7, and logits behind several of them by 1e-6; so ROUTED. A score that close to 0
may fall on either side: such a draw says nothing.
"""

import formulas
import pytest
import torch
from test_accounting import torch_flops

import accounting
from configurator import UserError
from generate import decode, new_state, prefill
from model import Hydra, HydraConfig
from routing import Router

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

DENSE, ROUTED = 1e-12, 1e-5  # of logits of about 1
T, WORDS = 24, 61


@st.composite
def architectures(draw) -> HydraConfig:
    """Of every letter that has formulas, narrow and of few layers; what does not divide is drawn again."""
    heads = draw(st.sampled_from([1, 2, 4]))
    shape = dict(
        vocab_size=WORDS, block_size=T, n_head=heads, mlp_ratio=0.1,
        n_kv_head=draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0])),
        dim=8 * heads * draw(st.integers(1, 3)),
        n_layer=draw(st.integers(1, 4)),
        pattern=draw(st.text(st.sampled_from(formulas.LETTERS), min_size=1, max_size=4)),
        compression=draw(st.sampled_from([1, 2, 4])),
        latent_head_dim=draw(st.sampled_from([-1, 0, 2, 4])),
        conv_kernel=draw(st.integers(0, 5)),
        qk_gain=draw(st.sampled_from([0.0, 0.25, 0.5])),
        value_shift=draw(st.booleans()),
        latent_ratio=draw(st.sampled_from([0.5, 1.0])),
        window=draw(st.sampled_from([0, 1, 2, 5, T - 1, T + 9])),
        rope_theta=draw(st.sampled_from([1.0, 100.0, 10000.0])),
        mod_capacity=draw(st.sampled_from([0.0, 0.0, 0.25, 0.6, 1.0])),
        mor_recursions=draw(st.sampled_from([1, 1, 2, 3])),
        router=draw(st.sampled_from(["learned", "learned", "random"])),
        qk_norm=draw(st.booleans()),
        short_conv=draw(st.sampled_from([0, 0, 2, 4])),
        rope_fraction=draw(st.sampled_from([0.0, 0.5, 1.0])),
        alpha=draw(st.sampled_from(["fixed", "one", "learned"])),
        ccqa_norm=draw(st.booleans()),
        pre_out_norm=draw(st.booleans()),
        k_temperature=draw(st.booleans()),
    )  # fmt: skip
    try:
        return HydraConfig(**shape)
    except UserError:
        hypothesis.reject()


def make(config: HydraConfig, seed: int) -> Hydra:
    """A model in fp64 in which no parameter is at its start, and whose routers decide this way as often as that."""
    torch.manual_seed(seed)
    net = Hydra(config).double()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p)) if "router" in name else p.add_(torch.randn_like(p) * 0.05)
    return net


def is_routed(config: HydraConfig) -> bool:
    return config.mod_capacity > 0 or config.mor_recursions > 1


@torch.no_grad()
def check_causality(net: Hydra, idx: torch.Tensor, full: torch.Tensor, t: int) -> None:
    """Bit for bit, and what comes behind does change."""
    changed = idx.clone()
    changed[:, t + 1 :] = (changed[:, t + 1 :] + 1 + torch.arange(T - t - 1)) % WORDS
    got = net(changed, idx).logits
    assert torch.equal(got[:, : t + 1], full[:, : t + 1])
    assert not torch.equal(got[:, t + 1 :], full[:, t + 1 :])


@torch.no_grad()
def check_state(net: Hydra, idx: torch.Tensor, full: torch.Tensor, lengths: list[int], static: bool) -> None:
    """A prefill of prompts of these lengths, then token by token to the end of the longest row."""
    L, rows = torch.tensor(lengths), torch.arange(len(lengths))
    state = new_state(net, len(lengths), T, static)
    close = dict(rtol=0, atol=ROUTED if is_routed(net.config) else DENSE)
    got = prefill(net, [idx[b, :n] for b, n in enumerate(lengths)], state)
    torch.testing.assert_close(got, full[rows, L - 1], **close)
    for step in range(min(6, T - max(lengths))):
        torch.testing.assert_close(decode(net, idx[rows, L + step], state), full[rows, L + step], **close)


def check_gradients(net: Hydra, idx: torch.Tensor) -> None:
    """Of the loss to train on, in training."""
    net.train()
    net(idx, idx.roll(-1, 1)).loss.backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def check_accounting(net: Hydra) -> None:
    """Against the closed formulas, the model's own tensors, and the products that torch counts."""
    config = net.config
    assert accounting.count_params(config) == formulas.count_params(config) == sum(p.numel() for p in net.parameters())
    assert accounting.flops_per_token(config, T) == pytest.approx(formulas.flops_per_token(config, T), rel=1e-12)
    if not (config.window and "M" in config.layers):  # of a window torch counts what is masked, too
        assert torch_flops(config, 1, T) == pytest.approx(formulas.torch_flops(config, T), rel=1e-12)
    filled = formulas.kv_bytes(config, T, 8) + formulas.tail_bytes(config, 8)
    allocated = formulas.kv_bytes(config, T, 8, allocated=True) + formulas.tail_bytes(config, 8)
    assert accounting.state_bytes(config, T, 8) == filled
    assert accounting.state_bytes(config, T, 8, allocated=True) == allocated == new_state(net, 1, T).bytes()


def least_score(net: Hydra, idx: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The logits, and how near to 0 a router's score came."""
    scores = [torch.ones(1)]
    hooks = [module.register_forward_hook(lambda _, __, score: scores.append(score.abs().flatten()))
             for module in net.modules() if isinstance(module, Router)]  # fmt: skip
    with torch.no_grad():
        logits = net(idx, idx).logits
    for hook in hooks:
        hook.remove()
    return logits, torch.cat(scores).min().item()


@pytest.mark.faults
@pytest.mark.parametrize("examples", [25, pytest.param(300, marks=pytest.mark.slow)])
def test_a_random_architecture_keeps_every_promise(examples):
    @settings(max_examples=examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(architectures(), st.integers(0, 999), st.integers(0, T - 2), st.booleans(),
           st.lists(st.integers(1, T - 1), min_size=2, max_size=2))  # fmt: skip
    def check(config, seed, t, static, lengths):
        net = make(config, seed).eval()
        idx = torch.randint(0, WORDS, (2, T))
        full, score = least_score(net, idx)
        assume(score > 1e-5)
        check_causality(net, idx, full, t)
        check_state(net, idx, full, lengths, static)
        check_accounting(net)
        check_gradients(net, idx)

    check()
