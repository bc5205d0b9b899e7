"""Decoding from states: equal to the full forward token by token, as large as the formula says, one graph however long
the text grows, and generation as its arguments define it."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from configurator import UserError
from model import Hydra, HydraConfig, kv_bytes, tail_bytes

SHAPE = dict(vocab_size=97, block_size=64, dim=64, n_head=4, n_kv_head=2, n_layer=8, compression=2, latent_head_dim=0,
             mlp_ratio=1.0)  # fmt: skip
VARIANTS = [
    *({"pattern": p} for p in ("A", "G", "M", "C", "L", "MMCCCLML")),
    *({"pattern": "M", "window": w} for w in (1, 5, 8, 40)),
    *({"pattern": "C"} | c for c in ({"compression": 4}, {"compression": 8, "n_kv_head": 4}, {"conv_kernel": 0},
                                     {"conv_kernel": 1}, {"conv_kernel": 2}, {"conv_kernel": 5}, {"value_shift": False},
                                     {"qk_gain": 0.0}, {"latent_head_dim": 4},
                                     {"conv_kernel": 0, "value_shift": False})),
    {"pattern": "L", "latent_ratio": 0.25}, {"pattern": "MMCCCLML", "window": 6},
]  # fmt: skip


def make(**changes) -> Hydra:
    """A model in which no parameter is at its start, so that convolutions and temperatures matter."""
    torch.manual_seed(0)
    net = Hydra(HydraConfig(**SHAPE | {"n_layer": max(3, len(changes.get("pattern", "")))} | changes)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return net


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_decoding_equals_the_full_forward(changes, static):
    """Token by token from prefills of 0, 1, 2 and many tokens, rows of one length and of different ones."""
    net, idx = make(**changes), tokens(3, 24)
    full, _ = net(idx, idx)
    rows = torch.arange(3)
    for lengths in ([0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 1, 7], [9, 9, 9], [16, 2, 5]):
        state, L, longest = net.new_state(3, 40), torch.tensor(lengths), max(lengths)
        if longest:
            text = idx[:, :longest].clone()
            text[torch.arange(longest) >= L[:, None]] = 55  # padding that must not be seen
            torch.testing.assert_close(net.prefill(text, L, state), full[rows, L - 1], rtol=1e-5, atol=1e-5)
        state.visible, state.uniform = (None, False) if static else (longest, min(lengths) == longest)
        for step in range(24 - longest):
            got = net.decode(idx[rows, L + step], state)
            torch.testing.assert_close(got, full[rows, L + step], rtol=1e-5, atol=1e-5)
        assert torch.equal(state.pos_B, L + 24 - longest)


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_state_has_the_size_of_the_formula(changes):
    net = make(**changes)
    for B, S in ((1, 1), (2, 17), (3, 64)):
        expected = B * (kv_bytes(net.config, S, 4) + tail_bytes(net.config, 4))
        assert net.new_state(B, S).bytes() == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert net.new_state(3, 64).bytes() == expected // 2
    assert net.to(torch.bfloat16).new_state(3, 64).bytes() == expected // 2


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["A", "M", "C", "L", "MMCCCLML"])
def test_greedy_text_is_the_same_with_and_without_states(pattern):
    net, text = make(pattern=pattern), tokens(2, 7)
    got = torch.stack(list(net.generate(text, 30, temperature=0.0)), dim=1)
    for _ in range(30):
        text = torch.cat((text, net(text)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(got, text[:, 7:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same_logits(dtype):
    """Under autocast too, which then has no say."""
    net, text = make().to(dtype), tokens(2, 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = net(text)[0][:, -1]
        net.pack()
        state = net.new_state(2, 16)
        got = net.prefill(text[:, :8], torch.tensor([8, 8]), state)
        state.visible = 8
        got = net.decode(text[:, 8], state)
    tol = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)
    assert not any(isinstance(m, torch.nn.Linear) for m in net.blocks[0].modules())


def test_a_row_does_not_depend_on_its_neighbours():
    """Prompts of 1, 4 and 11 tokens in one batch give what each gives alone, static shapes or not."""
    net, text = make(), tokens(3, 11)
    prompts = [text[0, :4], text[1, :1], text[2]]
    alone = [torch.cat(list(net.generate([p], 12, temperature=0.0))) for p in prompts]
    for static in (False, True):
        together = torch.stack(list(net.generate(prompts, 12, temperature=0.0, static=static)), dim=1)
        assert torch.equal(together, torch.stack(alone))


def test_generation_repeats_with_its_seed_and_is_sampled_like_pick():
    net, text = make(), tokens(2, 5)

    def run(seed, **keys):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack(list(net.generate(text, 10, generator=generator, **keys)), dim=1)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    greedy = run(1, temperature=0.0)
    assert torch.equal(greedy, run(2, top_k=1)) and torch.equal(greedy, run(2, top_p=1e-9))


def test_stop_ends_rows_and_then_the_generation():
    net, text = make(), tokens(3, 5)
    free = torch.stack(list(net.generate(text, 20, temperature=0.0)), dim=1)
    stop = int(free[0, 3])
    got = torch.stack(list(net.generate(text, 20, temperature=0.0, stop=stop)), dim=1)
    ends = [row.index(stop) if stop in row else 20 for row in free.tolist()]
    assert got.size(1) == min(20, max(ends) + 1)
    for b, end in enumerate(ends):
        assert torch.equal(got[b, :end], free[b, :end]) and (got[b, end:] == stop).all()


def test_past_the_block_is_an_error_unless_every_layer_has_a_window():
    text = tokens(1, 10)
    with pytest.raises(UserError, match="max_new_tokens=60: with a prompt of 10 tokens .* block_size=64"):
        next(make().generate(text, 60))
    with pytest.raises(UserError, match="block_size=64"):
        next(make(window=8).generate(text, 60))  # CCQA and MLA have none
    assert len(list(make().generate(text, 54))) == 54
    net = make(pattern="M", window=8, n_layer=2)
    long = torch.cat(list(net.generate(text, 100, temperature=0.0)))
    # two layers see 15 tokens: the last token follows from those alone, at positions far beyond the block
    tail = torch.cat((text[0], long))[-16:-1]
    assert net(tail[None])[0].argmax() == long[-1]
    wide = make(pattern="M", window=8, n_layer=2, block_size=128)
    assert torch.equal(torch.cat(list(wide.generate(text, 100, temperature=0.0))), long)
    assert net.new_state(1, 110).bytes() == kv_bytes(net.config, 110, 4) == kv_bytes(net.config, 8, 4)


def test_a_prompt_without_tokens_is_an_error():
    for prompts in ([], [torch.tensor([], dtype=torch.long)], [tokens(3), torch.tensor([], dtype=torch.long)]):
        with pytest.raises(UserError, match="no token"):
            next(make().generate(prompts, 3))
    assert list(make().generate(tokens(1, 3), 0)) == []


def test_sampling_values_that_cannot_be_are_errors():
    for name, value in (("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("temperature", -1.0), ("temperature", 1e-40),
                        ("max_new_tokens", -9)):  # fmt: skip
        with pytest.raises(UserError, match=f"{name}={value}: "):
            next(make().generate(tokens(1, 3), **{"max_new_tokens": 3} | {name: value}))


@torch.no_grad()
def test_a_state_that_is_full_is_an_error():
    net, text = make(), tokens(2, 9)
    with pytest.raises(UserError, match="9 tokens do not fit into a state of 8"):
        net.prefill(text, torch.tensor([9, 9]), net.new_state(2, 8))
    state = net.new_state(2, 8)
    net.prefill(text[:, :8], torch.tensor([8, 8]), state)
    state.visible = 8
    with pytest.raises(UserError, match="9 tokens do not fit into a state of 8"):
        net.decode(text[:, 8], state)
    for B, S in ((2, 11), (1, 12)):
        with pytest.raises(UserError, match=r"new_state\(2, 12\)"):
            next(net.generate(text, 3, state=net.new_state(B, S)))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"pattern": "A"}, {}, {"pattern": "M", "window": 6}], ids=str)
def test_prefill_and_decode_are_one_graph_each(changes):
    """However long the text grows; prompts and states are padded to powers of two, so that few shapes exist."""
    torch._dynamo.reset()
    net = make(**changes)
    eager = [torch.cat(list(net.generate(tokens(1, n), 20, temperature=0.0))) for n in (9, 10, 12)]
    prefills, decodes = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    net.prefill = torch.compile(net.prefill, backend=prefills, fullgraph=True)
    net.decode = torch.compile(net.decode, backend=decodes, fullgraph=True)
    for n, expected in zip((9, 10, 12), eager, strict=True):
        got = torch.cat(list(net.generate(tokens(1, n), 20, temperature=0.0, static=True)))
        assert torch.equal(got, expected)
    assert (prefills.frame_count, decodes.frame_count) == (1, 1)


@torch.no_grad()
def test_a_decode_step_asks_the_device_for_nothing():
    """Fake tensors have no values: a sync, an .item() or a shape that depends on the data would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net = Hydra(HydraConfig(**SHAPE))
        state = net.new_state(2, 32)
        for _ in range(2):
            assert net.decode(torch.zeros(2, dtype=torch.long), state).shape == (2, 97)


@pytest.mark.slow
@torch.no_grad()
def test_blocks_compiled_for_decoding_equal_eager():
    """For one row products are sums: no library product is left in the step's graph."""
    torch._dynamo.reset()
    net = make(pattern="CL", n_layer=2)
    expected = torch.stack(list(net.generate(tokens(1, 9), 12, temperature=0.0)))
    net.compile_decoding()
    assert torch.equal(torch.stack(list(net.generate(tokens(1, 9), 12, temperature=0.0))), expected)
    state = net.new_state(1, 32)
    with torch.profiler.profile() as profile:
        net.decode(torch.zeros(1, dtype=torch.long), state)
    called = {event.key for event in profile.key_averages()}
    assert not called & {"aten::linear", "aten::mm", "aten::addmm", "aten::mv"}, called
