"""Decoding from states: equal to the full forward token by token, one graph however long the text grows, generation as
its arguments define it, and what it refuses."""

import math
from itertools import islice

import pytest
import torch
from conftest import FAIR
from tape import Tape, listed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import generate as generation
from attention import KINDS
from configurator import UserError
from generate import (
    check_sampling,
    compile_decoding,
    decode,
    decode_step,
    generate,
    longest_text,
    new_state,
    pack,
    prefill,
    prefill_step,
    sample_token,
    sampled_tokens,
    until_all_end,
)
from model import Hydra, HydraConfig

SHAPE = dict(vocab_size=97, block_size=64, dim=64, n_head=4, n_kv_head=2, n_layer=8, compression=2, latent_head_dim=0,
             mlp_ratio=1.0)  # fmt: skip
VARIANTS = [
    *({"pattern": p} for p in (*KINDS, "MMCCCLML")),
    *({"pattern": "M", "window": w} for w in (1, 5, 8, 40)),
    *({"pattern": "C"} | c for c in ({"compression": 4}, {"compression": 8, "n_kv_head": 4}, {"conv_kernel": 0},
                                     {"conv_kernel": 1}, {"conv_kernel": 2}, {"conv_kernel": 5}, {"value_shift": False},
                                     {"qk_gain": 0.0}, {"latent_head_dim": 4},
                                     {"conv_kernel": 0, "value_shift": False})),
    {"pattern": "L", "latent_ratio": 0.25}, {"pattern": "MMCCCLML", "window": 6}, *FAIR,
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


def text_of(net: Hydra, prompts, n: int, **keys) -> torch.Tensor:
    """The n tokens that follow, the likeliest each time, [B, n]."""
    return torch.stack(list(generate(net, prompts, n, **{"temperature": 0.0} | keys)), dim=1)


# ---- equal to the full forward


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_decoding_equals_the_full_forward(changes, static):
    """Token by token from prefills of 0, 1, 2 and many tokens, rows of one length and of different ones."""
    net = make(**changes)
    idx = tokens(3, 24)
    full = net(idx, idx).logits
    rows = torch.arange(3)
    for lengths in ([0, 0, 0], [2, 2, 2], [3, 1, 7], [16, 2, 5]):
        state = new_state(net, 3, 40, static)
        L = torch.tensor(lengths)
        longest = max(lengths)
        if longest:
            got = prefill(net, [idx[b, :n] for b, n in enumerate(lengths)], state)
            torch.testing.assert_close(got, full[rows, L - 1], rtol=1e-5, atol=1e-5)
        assert state.tokens == longest and state.uniform == (min(lengths) == longest)
        for step in range(24 - longest):
            got = decode(net, idx[rows, L + step], state)
            torch.testing.assert_close(got, full[rows, L + step], rtol=1e-5, atol=1e-5)
        assert torch.equal(state.pos_B, L + 24 - longest) and state.tokens == 24


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_padding_is_never_seen(changes):
    """Whatever fills the texts up on the right, the logits and the text that follows are bit-equal."""
    net = make(**changes)
    idx = tokens(3, 24)
    lengths = [11, 2, 5]
    L = torch.tensor(lengths)
    rows = torch.arange(3)
    found = []
    for filling in (0, 55, 96):
        text = idx[:, :14].clone()
        text[torch.arange(14) >= L[:, None]] = filling
        state = new_state(net, 3, 40, static=True)
        steps = [prefill_step(net, text, L, state)]
        for step in range(9):
            steps.append(decode_step(net, idx[rows, L + step], state, 64, False))
        found.append(torch.stack(steps))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@torch.no_grad()
@pytest.mark.parametrize("pattern", [*KINDS, "MMCCCLML"])
def test_greedy_text_is_the_same_with_and_without_states(pattern):
    net = make(pattern=pattern)
    text = tokens(2, 7)
    got = text_of(net, text, 30)
    for _ in range(30):
        text = torch.cat((text, net(text).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(got, text[:, 7:])


def test_a_row_does_not_depend_on_its_neighbours():
    """Prompts of 1, 4 and 11 tokens in one batch give what each gives alone, static shapes or not."""
    net = make()
    text = tokens(3, 11)
    prompts = [text[0, :4], text[1, :1], text[2]]
    alone = torch.cat([text_of(net, [prompt], 12) for prompt in prompts])
    for static in (False, True):
        assert torch.equal(text_of(net, prompts, 12, static=static), alone)


@torch.no_grad()
def test_the_promises_of_a_step_follow_the_texts(monkeypatch):
    """Views up to the longest text, plain writes where all are as long; in a static state a power of two alone."""
    net = make(pattern="M", n_layer=1)
    promised = []
    real = generation.decode_step

    def spy(model, token_B, state, visible, uniform):
        promised.append((visible, uniform))
        return real(model, token_B, state, visible, uniform)

    monkeypatch.setattr(generation, "decode_step", spy)
    for prompts in (tokens(2, 5), [tokens(5), tokens(2)]):
        text_of(net, prompts, 4)
    assert promised == [(6, True), (7, True), (8, True), (6, False), (7, False), (8, False)]
    promised.clear()
    for least in (2, 64):
        text_of(net, tokens(2, 5), 6, state=new_state(net, 2, 11, static=True, least=least))
    assert promised == [*[(8, False)] * 3, *[(16, False)] * 2, *[(16, False)] * 5]


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_a_state_has_the_dtype_that_the_model_computes_in(autocast):
    net = make(pattern="MCL")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        state = new_state(net, 2, 16)
        dtype = torch.bfloat16 if autocast else torch.float32
        assert {t.dtype for layer in state.layers for t in layer.values()} == {dtype}
        expected = net(tokens(2, 9)).logits[:, -1]
        prefill(net, tokens(2, 9)[:, :8], state)
        got = decode(net, tokens(2, 9)[:, 8], state)
    tolerance = 0.05 if autocast else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_static_states_have_a_power_of_two_of_slots():
    net = make(pattern="M", n_layer=1)
    assert [new_state(net, 1, S, static=True).slots for S in (1, 2, 3, 16, 17, 33)] == [1, 2, 4, 16, 32, 64]
    assert [new_state(net, 1, S).slots for S in (1, 3, 17)] == [1, 3, 17]
    assert new_state(net, 1, 17, static=True).layers[0]["k"].size(1) == 32


# ---- packed weights


@torch.no_grad()
@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "short_conv": 3}], ids=str)
def test_packed_weights_give_the_same_logits(dtype, autocast, changes):
    """Under autocast too, which then has no say; and where this CPU cannot pack, the plain weights do."""
    net = make(pattern="AGMCL", **changes).to(dtype)
    text = tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = net(text).logits[:, -1].float()
        problem = pack(net)
        state = new_state(net, 2, 16)
        prefill(net, text[:, :8], state)
        got = decode(net, text[:, 8], state).float()
    tolerance = 0.05 if autocast else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    if problem:
        assert dtype == torch.bfloat16 and "cannot pack bfloat16" in problem
        return
    left = [name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)]
    assert left == ["blocks.4.attn.up"]  # MLA's, which a step reads itself
    x = torch.randn(2, 64, dtype=dtype)
    expected = net.head(x)
    net.embed.weight.zero_()
    assert torch.equal(net.head(x), expected) and expected.any()  # the head reads its own copy


# ---- sampling


def run(net, seed, **keys) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return text_of(net, tokens(2, 5), 10, generator=generator, **{"temperature": 1.0} | keys)


def test_generation_repeats_with_its_seed():
    net = make()
    assert torch.equal(run(net, 1), run(net, 1)) and not torch.equal(run(net, 1), run(net, 2))
    greedy = run(net, 1, temperature=0.0)
    assert torch.equal(greedy, run(net, 2, top_k=1)) and torch.equal(greedy, run(net, 2, top_p=1e-9))
    assert not torch.equal(run(net, 1, temperature=0.01), run(net, 1, temperature=3.0))


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.6), (7, 0.8), (1, 1.0), (0, 1e-6), (50, 1.0),
                                          (99, 1.0)])  # fmt: skip
def test_sampling_against_a_plain_reference(top_k, top_p):
    """top-k and top-p keep exactly the tokens that their definitions name."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 2
    probs = (logits / 0.7).softmax(-1)[0]
    ranked = sorted(range(50), key=lambda i: -probs[i])
    pool = ranked[:top_k] if top_k else ranked
    total = sum(probs[i].item() for i in pool)
    kept = []
    mass = 0.0
    for i in pool:
        if mass / total >= top_p:
            break
        kept.append(i)
        mass += probs[i].item()
    noise = torch.empty(4000, 50).exponential_(generator=torch.Generator().manual_seed(2))
    drawn = sample_token(logits.expand(4000, -1).clone(), 0.7, top_k, top_p, noise)
    assert set(drawn.tolist()) <= set(kept)
    for i in kept[:3]:
        frequency = (drawn == i).float().mean().item()
        assert frequency == pytest.approx(probs[i].item() / mass, abs=0.04)
    assert sample_token(logits, 0.0, 0, 1.0, None).item() == ranked[0]


def test_stop_ends_rows_and_then_the_generation():
    net = make()
    text = tokens(3, 5)
    free = text_of(net, text, 20)
    stop = int(free[0, 3])
    got = text_of(net, text, 20, stop=stop)
    ends = [row.index(stop) if stop in row else 20 for row in free.tolist()]
    assert got.size(1) == min(20, max(ends) + 1)
    for b, end in enumerate(ends):
        assert torch.equal(got[b, :end], free[b, :end]) and (got[b, end:] == stop).all()
    alone = text_of(net, text[:1], 20, stop=stop)
    assert torch.equal(alone, free[:1, : ends[0] + 1])


def test_tokens_come_one_by_one_and_as_many_as_asked():
    net = make(pattern="M", n_layer=1)
    assert list(generate(net, tokens(1, 3), 0)) == []
    for n in (1, 2, 5):
        assert [token_B.shape for token_B in generate(net, tokens(2, 3), n)] == [(2,)] * n
    state = new_state(net, 1, 8)
    steps = generate(net, tokens(1, 3), 5, state=state)
    next(steps)
    assert state.tokens == 3  # nothing is computed ahead
    next(steps)
    assert state.tokens == 4


# ---- captured


@pytest.fixture
def taped(monkeypatch) -> list[int]:
    """Steps are replayed from tapes as on CUDA from graphs -> of every capture the slots that it reads."""
    captures = []
    monkeypatch.setattr(generation, "Replayed", listed(captures))
    return captures


CAPTURED = [
    *({"pattern": p} for p in KINDS), {"window": 6}, {"pattern": "C", "conv_kernel": 0, "value_shift": False},
    {"mod_capacity": 0.5}, {"mor_recursions": 3, "n_layer": 2}, {"mor_recursions": 2, "mod_capacity": 0.3},
    {"pattern": "M", "window": 3, "mod_capacity": 0.5}, FAIR[3], FAIR[-1] | {"mod_capacity": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("changes", CAPTURED, ids=str)
def test_captured_text_is_the_eager_one(changes, taped):
    """Rows of different lengths, which grow over powers of two, greedy and sampled."""
    net = make(**changes)
    prompts = [tokens(n) for n in (3, 9, 1)]
    for keys in ({}, {"temperature": 1.0, "top_k": 50, "top_p": 0.9}):
        found = []
        for static in (False, True):
            state = new_state(net, 3, 64, static, least=16)
            taped.clear()
            generator = torch.Generator().manual_seed(3)
            found.append(text_of(net, prompts, 12, state=state, generator=generator, **keys))
        assert torch.equal(*found) and taped == [16, 32]
    assert len(found[0].unique()) > 10  # no text that repeats itself


def test_a_state_reads_fewer_slots_than_it_has(taped):
    """In one graph, where that is asked for; a text that stays short is never captured at the length it could have."""
    net = make(pattern="MCL", block_size=1024)
    expected = text_of(net, tokens(2, 120), 20)
    for least, slots in ((128, [128, 256]), (1024, [1024])):
        taped.clear()
        state = new_state(net, 2, 1000, static=True, least=least)
        assert torch.equal(text_of(net, tokens(2, 120), 20, state=state), expected) and taped == slots


def test_a_step_that_may_not_be_captured_is_not(taped):
    net = make(pattern="M", n_layer=1)
    for keys in ({"static": False}, {"static": True, "capture": False}):
        text_of(net, tokens(2, 5), 9, **keys)
    assert not taped
    assert not generation.Replayed.__base__.__base__.possible(net.embed.weight)  # on a CPU, tapes aside


@pytest.mark.parametrize("n", [1, 2, 9, 10, 30])
def test_captured_text_stops_where_the_eager_one_does(n, taped):
    """Whichever step of a group the last row ends at; the end is looked at once a group."""
    net = make()
    prompts = [tokens(5), tokens(3)]
    free = text_of(net, prompts, 30)
    for stop in free.unique().tolist():
        eager = text_of(net, prompts, n, stop=stop)
        assert torch.equal(text_of(net, prompts, n, stop=stop, static=True), eager)


def test_captured_steps_are_looked_at_in_groups(taped):
    """The first token at once; with no stop token every one as it comes."""
    net = make()
    for stop, computed in ((96, [5, *[13] * 8, *[21] * 8, 24, 24, 24]), (None, [*range(5, 25)])):
        state = new_state(net, 1, 25, static=True)
        assert [state.tokens for _ in generate(net, tokens(1, 5), 20, 0.0, stop=stop, state=state)] == computed


@torch.no_grad()
@pytest.mark.parametrize("breaks", ["a position", "a choice", "a new tensor"])
def test_a_tape_tells_a_step_that_cannot_be_captured(breaks, taped, monkeypatch):
    net = make(mod_capacity=0.5)
    expected = text_of(net, tokens(1, 5), 20)
    real = generation.decode_step

    def broken(model, token_B, state, visible, uniform):
        if breaks == "a position":
            return real(model, token_B, state, state.tokens, True)
        if breaks == "a choice":
            state.static = False
        else:
            state.pos_B = state.pos_B.clone()
        return real(model, token_B, state, visible, uniform)

    monkeypatch.setattr(generation, "decode_step", broken)
    if breaks == "a choice":
        with pytest.raises(RuntimeError, match="_local_scalar_dense waits for the device"):
            text_of(net, tokens(1, 5), 20, static=True)
    else:
        assert not torch.equal(text_of(net, tokens(1, 5), 20, static=True), expected)


def test_a_capture_runs_nothing():
    x = torch.zeros(3)
    with Tape() as tape:
        x[1:].add_(1)
        x.mul_(x + 2)
    assert x.tolist() == [0, 0, 0]
    tape.replay()
    tape.replay()
    assert x.tolist() == [0, 24, 24]  # (0 + 1) * (1 + 2) = 3, (3 + 1) * (4 + 2) = 24


# ---- refused


def test_a_text_may_fill_the_block_and_no_more():
    text = tokens(1, 10)
    for net in (make(n_layer=1), make(window=8)):  # CCQA and MLA have no window
        assert text_of(net, text, 54).size(1) == 54
        with pytest.raises(UserError, match="max_new_tokens=55: with a prompt of 10 tokens .* block_size=64"):
            next(generate(net, text, 55))
        assert longest_text(net) == 64
    with pytest.raises(UserError, match="max_new_tokens=0: with a prompt of 65 tokens .* block_size=64"):
        next(generate(make(n_layer=1), tokens(1, 65), 0))


@torch.no_grad()
def test_where_every_layer_has_a_window_a_text_is_endless():
    net = make(pattern="M", window=8, n_layer=2)
    assert math.isinf(longest_text(net))
    text = tokens(1, 10)
    long = text_of(net, text, 100)[0]
    # two layers see 15 tokens: the last token follows from those alone, at positions far beyond the block
    tail = torch.cat((text[0], long))[-16:-1]
    assert net(tail[None]).logits[0, -1].argmax() == long[-1]
    wide = make(pattern="M", window=8, n_layer=2, block_size=128)
    assert torch.equal(text_of(wide, text, 100)[0], long)
    assert new_state(net, 1, 110).bytes() == new_state(net, 1, 8).bytes()


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_ring_holds_a_window_or_is_refused(static):
    """With fewer slots than the window an older token would be overwritten too early: a wrong text."""
    net = make(pattern="M", window=8)
    text = tokens(1, 10)
    expected = text_of(net, text, 20)
    for slots in (4,) if static else (1, 4, 7):
        with pytest.raises(UserError, match=f"8 tokens do not fit into a state of {slots}"):
            next(generate(net, text, 20, state=new_state(net, 1, slots, static)))
        with pytest.raises(UserError, match=f"8 tokens do not fit into a state of {slots}"):
            prefill(net, text, new_state(net, 1, slots, static))
    for slots in (8, 9, 30):
        state = new_state(net, 1, slots, static)
        assert torch.equal(text_of(net, text, 20, state=state), expected)
        assert state.layers[0]["k"].size(1) == 8
    short = new_state(net, 1, 4)  # of a text that is shorter than the window as well
    assert torch.equal(text_of(net, text[:, :2], 2, state=short), text_of(net, text[:, :2], 2))
    state = new_state(net, 1, 4)
    prefill(net, text[:, :4], state)
    with pytest.raises(UserError, match="5 tokens do not fit into a state of 4"):
        decode(net, text[:, 4], state)


def test_the_widest_window_decides():
    """Of layers with windows of their own."""
    net = make(pattern="M", window=8)
    net.blocks[0].attn.window = 5
    with pytest.raises(UserError, match="8 tokens do not fit into a state of 5"):
        prefill(net, tokens(1, 10), new_state(net, 1, 5))
    net.blocks[0].attn.window = 0
    assert longest_text(net) == 64


def test_a_prompt_without_tokens_is_an_error():
    for prompts in ([], [torch.tensor([], dtype=torch.long)], [tokens(3), torch.tensor([], dtype=torch.long)]):
        with pytest.raises(UserError, match="no token"):
            next(generate(make(), prompts, 3))


@pytest.mark.parametrize("name, value", [
    ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("top_p", math.nan), ("temperature", -1.0), ("temperature", 1e-40),
    ("temperature", math.inf), ("temperature", math.nan), ("temperature", 1e7), ("max_new_tokens", -9),
])  # fmt: skip
def test_sampling_values_that_cannot_be_are_errors(name, value):
    with pytest.raises(UserError, match=f"{name}={value}: ".replace("+", ".")) as error:
        next(generate(make(), tokens(1, 3), **{"max_new_tokens": 3} | {name: value}))
    assert "\n" not in str(error.value)


def test_sampling_values_that_can_be_are_taken():
    for temperature in (0, 1e-3, 1.0, 1e6):
        check_sampling(3, temperature, 0, 1.0)
    net = make()
    assert run(net, 1, temperature=1e-3).shape == run(net, 1, temperature=1e6).shape == (2, 10)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_state_that_is_full_is_an_error(static):
    net = make()
    text = tokens(2, 9)
    with pytest.raises(UserError, match="9 tokens do not fit into a state of 8"):
        prefill(net, text, new_state(net, 2, 8, static))
    state = new_state(net, 2, 8, static)
    prefill(net, text[:, :7], state)
    decode(net, text[:, 7], state)
    with pytest.raises(UserError, match="9 tokens do not fit into a state of 8"):
        decode(net, text[:, 8], state)
    with pytest.raises(UserError, match="12 tokens do not fit into a state of 8"):  # before any token is yielded
        next(generate(net, text, 3, state=new_state(net, 2, 8, static)))


@torch.no_grad()
def test_a_state_of_other_rows_is_an_error():
    net = make()
    for B in (1, 3):
        with pytest.raises(UserError, match=rf"2 prompts for a state of {B} texts"):
            prefill(net, tokens(2, 5), new_state(net, B, 12))
        with pytest.raises(UserError, match=rf"2 prompts for a state of {B} texts"):
            next(generate(net, tokens(2, 5), 3, state=new_state(net, B, 12)))


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_state_in_use_is_refused(static):
    net = make()
    state = new_state(net, 2, 16, static)
    prefill(net, tokens(2, 5), state)
    before = [t.clone() for layer in state.layers for t in layer.values()]
    with pytest.raises(UserError, match="this state holds texts of up to 5 tokens: .*new_state"):
        prefill(net, tokens(2, 5), state)
    with pytest.raises(UserError, match="this state holds texts"):
        next(generate(net, tokens(2, 5), 3, state=state))
    for old, new in zip(before, [t for layer in state.layers for t in layer.values()], strict=True):
        assert torch.equal(old, new)
    fresh = new_state(net, 2, 16, static)
    decode(net, tokens(2), fresh)
    with pytest.raises(UserError, match="texts of up to 1 tokens"):
        prefill(net, tokens(2, 5), fresh)


# ---- one graph


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {"pattern": "M", "window": 6, "n_layer": 1},
    *(pytest.param(it, marks=pytest.mark.slow) for it in ({"pattern": "A"}, {}, FAIR[-1])),
], ids=str)  # fmt: skip
def test_prefill_and_decode_are_one_graph_each(changes, monkeypatch):
    """However long the text grows; prompts and states are padded to powers of two, so that few shapes exist."""
    torch._dynamo.reset()
    net = make(**changes)
    eager = [text_of(net, tokens(1, n), 8) for n in (9, 10, 12)]
    prefills = CompileCounterWithBackend("eager")
    decodes = CompileCounterWithBackend("eager")
    monkeypatch.setattr(generation, "prefill_step", torch.compile(prefill_step, backend=prefills, fullgraph=True))
    monkeypatch.setattr(generation, "decode_step", torch.compile(decode_step, backend=decodes, fullgraph=True))
    for n, expected in zip((9, 10, 12), eager, strict=True):
        state = new_state(net, 1, n + 20, static=True)
        got = [prefill(net, tokens(1, n), state).argmax(-1)]
        for _ in range(7):
            got.append(decode(net, got[-1], state).argmax(-1))
        assert torch.equal(torch.stack(got, dim=1), expected)
    assert (prefills.frame_count, decodes.frame_count) == (1, 1)


@pytest.mark.slow
@torch.no_grad()
def test_a_decode_step_asks_the_device_for_nothing():
    """Fake tensors have no values: a sync, an .item() or a shape that depends on the data would raise. Only the look
    for the end is one."""
    with FakeTensorMode():
        net = Hydra(HydraConfig(**SHAPE | {"mod_capacity": 0.5, "mor_recursions": 2, "n_layer": 2, "pattern": "CL"}))
        state = new_state(net, 2, 32, static=True)
        steps = sampled_tokens(net, state, torch.zeros(2, 97), (0.7, 5, 0.9), 3, None, False)
        assert [token_B.shape for token_B in islice(steps, 9)] == [(2,)] * 9 and state.tokens == 8
        with pytest.raises(DataDependentOutputException):
            next(until_all_end(steps, 3, 8))


@pytest.mark.slow
@torch.no_grad()
def test_blocks_compiled_for_decoding_equal_eager():
    """For one row products are sums: no library product is left in the step's graph."""
    torch._dynamo.reset()
    net = make(pattern="L", n_layer=1)
    expected = text_of(net, tokens(1, 9), 12)
    compile_decoding(net)
    assert torch.equal(text_of(net, tokens(1, 9), 12, static=True), expected)
    state = new_state(net, 1, 32, static=True)
    decode(net, torch.zeros(1, dtype=torch.long), state)
    with torch.profiler.profile() as profile:
        decode(net, torch.zeros(1, dtype=torch.long), state)
    called = {event.key for event in profile.key_averages()}
    assert not called & {"aten::linear", "aten::mm", "aten::addmm", "aten::mv"}, called


@torch.no_grad()
@pytest.mark.parametrize("top_p", [1e-50, 1e-9])
def test_a_tiny_top_p_is_the_likeliest_token(top_p):
    """Below what fp32 tells from nothing too."""
    logits = torch.randn(5, 97, generator=torch.Generator().manual_seed(0))
    noise = torch.empty(5, 97).exponential_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_token(logits, 1.0, 0, top_p, noise), logits.argmax(-1))
