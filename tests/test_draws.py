"""Architectures drawn at random over all options, beside the cases that other tests name: each keeps the invariants, so
that no two options get in each other's way."""

import random

import formulas
import pytest
import torch

import accounting
from attention import KINDS
from generate import decode, new_state, prefill
from model import Hydra, HydraConfig

END = 96
OPTIONS = {
    "n_kv_head": (1, 2, 4), "compression": (2, 4), "latent_head_dim": (-1, 8), "latent_ratio": (0.25, 0.5, 1.0),
    "conv_kernel": (0, 1, 2, 3), "qk_gain": (0.0, 0.25, 0.5), "value_shift": (False, True), "window": (0, 1, 6),
    "ccqa_norm": (False, True), "qk_norm": (False, True), "k_temperature": (False, True), "short_conv": (0, 1, 2, 4),
    "rope_fraction": (0.0, 0.5, 1.0), "pre_out_norm": (False, True), "alpha": ("fixed", "one", "learned"),
    "mod_capacity": (0.0, 0.0, 0.5), "mor_recursions": (1, 1, 2), "doc_mask": (False, True),
}  # fmt: skip


def drawn(seed: int) -> Hydra:
    """A model of three layers in which no parameter is at its start, and whose routers decide both ways."""
    draw = random.Random(seed)
    values = {name: draw.choice(choices) for name, choices in OPTIONS.items()}
    pattern = "".join(draw.choices(list(KINDS), k=2)) + draw.choice("AGML")  # what C alone would refuse has a letter
    torch.manual_seed(seed)
    net = Hydra(HydraConfig(vocab_size=97, block_size=32, dim=128, n_head=4, n_layer=3, mlp_ratio=1.0, pattern=pattern,
                            **values)).eval()  # fmt: skip
    net.end_token = END
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p)) if "router" in name else p.add_(torch.randn_like(p) * 0.05)
    return net


@pytest.mark.parametrize("seed", range(40))
def test_a_drawn_architecture_keeps_the_invariants(seed):
    net = drawn(seed)
    idx = torch.randint(0, 97, (3, 24))
    idx[0, 5] = idx[0, 13] = idx[1, 8] = END
    rows = torch.arange(3)
    with torch.no_grad():
        full = net(idx, idx).logits
        changed = idx.clone()
        changed[:, 15:] = (changed[:, 15:] + 1) % END
        assert torch.equal(net(changed, idx).logits[:, :15], full[:, :15])
        for static in (False, True):
            state = new_state(net, 3, 32, static)
            assert static or state.bytes() == 3 * accounting.state_bytes(net.config, 32, 4, allocated=True)
            place = torch.tensor([7, 1, 12])
            got = prefill(net, [row[:n] for row, n in zip(idx, place, strict=True)], state)
            torch.testing.assert_close(got, full[rows, place - 1], rtol=1e-4, atol=1e-4)
            for _ in range(12):
                got = decode(net, idx[rows, place], state)
                torch.testing.assert_close(got, full[rows, place], rtol=1e-4, atol=1e-4)
                place += 1
    config = net.config
    assert sum(p.numel() for p in net.parameters()) == formulas.count_params(config)
    assert accounting.flops_per_token(config, 24) == pytest.approx(formulas.flops_per_token(config, 24), rel=1e-12)
    states = formulas.kv_bytes(config, 24) + formulas.tail_bytes(config)
    assert accounting.state_bytes(config, 24) == states
    net.train()(idx, idx).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
