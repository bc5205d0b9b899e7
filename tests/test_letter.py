"""A new part is one class and one line: this file defines an attention of its own, registers it in one line, and all of
the project takes it. Nothing else is changed anywhere.

The letter S: softmax attention with a learned sink per head, a logit without a key or a value that takes probability
mass (as in arXiv:2309.17453 and gpt-oss).
"""

import json

import pytest
import torch
from torch import Tensor, nn

import accounting
import bench
import sample
import train
from attention import KINDS, Attention, Kind, apply_rope, store
from configurator import UserError, need
from generate import decode, generate, new_state, pack, prefill
from layers import Linear, RMSNorm
from model import Hydra, HydraConfig
from train import TrainConfig, make_optimizer

SHAPE = dict(vocab_size=97, block_size=64, dim=64, n_head=4, n_kv_head=2, n_layer=3, compression=2, latent_head_dim=0,
             mlp_ratio=1.0)  # fmt: skip
ROUTED = [{}, {"mod_capacity": 0.5}, {"mor_recursions": 2}, {"mod_capacity": 0.5, "mor_recursions": 2}]
every_routing = pytest.mark.parametrize("routing", ROUTED, ids=str)


class Sink(Attention):
    """softmax([q k^T / sqrt(K), sink]) [v; 0] under the causal mask, H heads of width D/H."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.head_width = self.rope_width = config.dim // config.n_head
        self.score_width = config.dim
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.sink = nn.Parameter(torch.empty(config.n_head))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.out = Linear(config.dim, config.dim)

    @staticmethod
    def check(config) -> None:
        unit = 2 * config.n_head
        need(config, "dim n_head", config.dim % unit == 0, f"the sink wants an even width: dim a multiple of {unit}")

    def init_weights(self) -> None:
        nn.init.normal_(self.sink)

    def new_state(self, B: int, S: int, like: Tensor) -> dict[str, Tensor]:
        shape = (B, S, self.n_head, self.head_width)
        return {"k": like.new_zeros(shape), "v": like.new_zeros(shape)}

    def forward(self, x_BTD: Tensor, ctx, state=None) -> Tensor:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3 * self.n_head, -1)).chunk(3, dim=2)
        q = apply_rope(q, ctx.rope[self.rope_width])
        k = apply_rope(k, ctx.rope[self.rope_width])
        if state is not None:
            store(state["k"], k, ctx)
            store(state["v"], v, ctx)
        if ctx.decoding:
            k = state["k"]
            v = state["v"]
            mask = (torch.arange(k.size(1), device=q.device) <= ctx.pos)[:, None, None]
        else:
            mask = torch.ones(q.size(1), q.size(1), dtype=torch.bool, device=q.device).tril()
        scores_BHTS = torch.einsum("bthk,bshk->bhts", q, k) / self.head_width**0.5
        scores_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf)
        sink_BHT1 = self.sink.to(q.dtype)[:, None, None].expand(*scores_BHTS.shape[:-1], 1)
        probs_BHTS = torch.cat((scores_BHTS, sink_BHT1), dim=-1).softmax(-1)[..., :-1].to(v.dtype)
        y_BTHK = torch.einsum("bhts,bshk->bthk", probs_BHTS, v)
        return self.out(self.norm(y_BTHK.flatten(2)))


class Forgetful(Sink):
    """The same, but nothing fills its sink."""

    def init_weights(self) -> None:
        pass


@pytest.fixture(autouse=True)
def letter(monkeypatch):
    """The one line."""
    monkeypatch.setitem(KINDS, "S", Kind(Sink, 0.7, Sink.check, "sink attention"))


def make(pattern="S", **changes) -> Hydra:
    """A model in which no parameter is at its start."""
    torch.manual_seed(0)
    net = Hydra(HydraConfig(**SHAPE | {"pattern": pattern} | changes)).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p)) if "router" in name else p.add_(torch.randn_like(p) * 0.05)
    return net


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


# ---- it trains


@every_routing
def test_it_is_initialised_learns_and_every_parameter_gets_a_gradient(routing):
    torch.manual_seed(0)
    net = Hydra(HydraConfig(**SHAPE | {"pattern": "SMS"} | routing))
    assert [block.alpha for block in net.blocks] == [0.7, 1.0, 0.7]
    assert 0.2 < net.blocks[0].attn.sink.std() < 3
    optimizer = make_optimizer(net, TrainConfig(learning_rate=3e-3, weight_decay=0.5))
    decayed, plain = (set(map(id, group["params"])) for group in optimizer.param_groups)
    for block in net.blocks[::2]:
        assert id(block.attn.sink) in plain and id(block.attn.qkv.weight) in decayed
    text = tokens(4, 33)
    losses = []
    for _ in range(25):
        output = net(text[:, :-1], text[:, 1:].contiguous())
        output.loss.backward()
        for name, p in net.named_parameters():
            assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.cross_entropy.item())
    assert losses[-1] < 0.6 * losses[0]


@torch.no_grad()
def test_the_sink_takes_probability_mass():
    """Far below all scores it is plain attention, far above nothing is left of the values (the norm aside)."""
    net = make(n_layer=1)
    attn = net.blocks[0].attn
    attn.norm = nn.Identity()
    x = torch.randn(1, 9, 64)
    ctx = net.context(torch.arange(9))
    plain = KINDS["A"].make(net.config)
    plain.norm = nn.Identity()
    plain.qkv.weight.copy_(attn.qkv.weight)
    plain.out.weight.copy_(attn.out.weight)
    attn.sink.fill_(-1e9)
    torch.testing.assert_close(attn(x, ctx), plain(x, ctx), rtol=1e-5, atol=1e-5)
    attn.sink.fill_(1e9)
    assert not attn(x, ctx).any()


@torch.no_grad()
@every_routing
@pytest.mark.parametrize("pattern", ["S", "SMCL"])
def test_it_is_causal(pattern, routing):
    net = make(pattern, n_layer=4, **routing)
    idx = tokens(2, 40)
    expected = net(idx, idx).logits
    for t in (0, 1, 17, 38):
        changed = idx.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1 + torch.arange(39 - t)) % 97
        got = net(changed, idx).logits
        assert torch.equal(got[:, : t + 1], expected[:, : t + 1])
        assert not torch.equal(got[:, t + 1 :], expected[:, t + 1 :])


# ---- it generates


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@every_routing
@pytest.mark.parametrize("pattern", ["S", "SMCL"])
def test_its_state_gives_what_the_full_forward_gives(pattern, routing, static):
    net = make(pattern, n_layer=4, **routing)
    idx = tokens(3, 30)
    full = net(idx, idx).logits
    rows = torch.arange(3)
    for lengths in ([1, 1, 1], [9, 9, 9], [3, 1, 14]):
        L = torch.tensor(lengths)
        state = new_state(net, 3, 30, static)
        got = prefill(net, [idx[b, :n] for b, n in enumerate(lengths)], state)
        torch.testing.assert_close(got, full[rows, L - 1], rtol=1e-5, atol=1e-5)
        for step in range(30 - max(lengths)):
            got = decode(net, idx[rows, L + step], state)
            torch.testing.assert_close(got, full[rows, L + step], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@every_routing
def test_its_text_is_the_same_packed_and_beside_neighbours(routing):
    net = make("SMCL", n_layer=4, **routing)
    text = tokens(3, 11)
    prompts = [text[0, :4], text[1, :1], text[2]]
    alone = [torch.cat(list(generate(net, [prompt], 12, temperature=0.0))) for prompt in prompts]
    assert torch.equal(torch.stack(list(generate(net, prompts, 12, temperature=0.0)), dim=1), torch.stack(alone))
    problem = pack(net)
    assert torch.equal(torch.stack(list(generate(net, prompts, 12, temperature=0.0)), dim=1), torch.stack(alone))
    plain = [m for m in net.blocks[0].modules() if isinstance(m, nn.Linear)]
    assert bool(plain) == bool(problem)


# ---- it is counted


@every_routing
def test_it_is_counted_exactly(routing):
    config = HydraConfig(**SHAPE | {"pattern": "S"} | routing)
    net = Hydra(config)
    D = config.dim
    H = config.n_head
    T = 40
    assert accounting.count_params(config) == sum(p.numel() for p in net.parameters())
    attention = 3 * D * D + H + D + D * D
    routers = bool(config.mod_capacity) + config.mor_recursions - 1
    block = attention + 3 * D * config.mlp_hidden + 2 * D
    assert accounting.count_params(config) == 97 * D + D + 3 * block + routers * D
    assert accounting.attention_flops(net.blocks[0].attn, T) == 2 * 4 * D * D + 4 * T / 2 * D

    # tokens of the three layers, at the training capacities
    layers = [T, T // 2 if config.mod_capacity else T, T]
    scored = T if config.mod_capacity else 0
    if config.mor_recursions == 2:
        layers += [n // 2 for n in layers]
        scored += T + scored // 2
    flops = 2 * D * scored
    for n in layers:
        flops += n * (8 * D * D + 2 * n * D + 6 * D * config.mlp_hidden)
    assert accounting.flops_per_token(config, T) == pytest.approx(2 * D * 97 + flops / T, rel=1e-12)

    assert accounting.state_bytes(config, T, 4) == 4 * 2 * D * sum(layers)
    allocated = 4 * 2 * D * T * 3 * config.mor_recursions
    assert accounting.state_bytes(config, T, 4, allocated=True) == new_state(net, 1, T).bytes() == allocated


# ---- it is named


def test_help_and_errors_name_it(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "  S  sink attention\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown letter 'X': use A, G, M, C, L, S"):
        HydraConfig(**SHAPE | {"pattern": "SX"})
    with pytest.raises(UserError, match="dim=68, n_head=4: the sink wants an even width: dim a multiple of 8"):
        HydraConfig(**SHAPE | {"pattern": "S", "dim": 68})


def test_a_parameter_that_it_forgets_is_named(monkeypatch):
    monkeypatch.setitem(KINDS, "F", Kind(Forgetful, 1.0, Sink.check, "forgetful attention"))
    with pytest.raises(AssertionError, match=r"not initialised: blocks\.0\.attn\.sink, blocks\.2\.attn\.sink;"):
        make("FMF")


def test_without_its_line_it_is_unknown(monkeypatch):
    monkeypatch.delitem(KINDS, "S")
    with pytest.raises(UserError, match="unknown letter 'S'"):
        HydraConfig(**SHAPE | {"pattern": "S"})


# ---- the programs take it


def test_a_run_trains_resumes_and_samples_it(tmp_path, capsys):
    (tmp_path / "text.py").write_text("def f(x):\n    return x + 1\n" * 200)
    out = tmp_path / "out"
    args = [f"--data={tmp_path / 'text.py'}", f"--out_dir={out}", f"--cache_dir={tmp_path / 'cache'}",
            "--tokenizer=bytes", "--vocab_size=257", "--pattern=SM", "--n_layer=2", "--dim=32", "--n_head=2",
            "--n_kv_head=1", "--mlp_ratio=1", "--block_size=32", "--batch_size=2", "--eval_iters=1",
            "--final_eval_iters=1", "--sample_tokens=4", "--log_interval=1", "--warmup_iters=1",
            "--mod_capacity=0.5", "--device=cpu"]  # fmt: skip
    assert train.main([*args, "--max_iters=3"]) == 0
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert records[0]["attention S"].endswith("; sink attention")
    assert "attention S: sdpa" in capsys.readouterr().out
    assert sum("grad_norm" in record for record in records) == 3
    assert train.main(["--resume", f"--out_dir={out}", "--max_iters=5"]) == 0
    last = torch.load(out / "last.pt", weights_only=True)
    assert last["step"] == 5 and last["model"]["blocks.0.attn.sink"].shape == (2,)
    assert sample.main([f"--out_dir={out}", "--prompt=def", "--max_new_tokens=5", "--device=cpu"]) == 0
    assert "def" in capsys.readouterr().out


def test_the_bench_times_it(tmp_path):
    path = tmp_path / "bench.json"
    shape = ["--dim=64", "--n_head=4", "--n_kv_head=2", "--compression=2", "--n_layer=2", "--vocab_size=97"]
    only = "--only=attention eager float32 256"
    assert bench.main(["speed", *shape, "--rounds=1", only, "--device=cpu", f"--json={path}"]) == 0
    rows = [row for row in json.loads(path.read_text())["tables"]["speed"] if "left_out" not in row]
    assert [row["mix"] for row in rows] == list(KINDS) and rows[-1]["mix"] == "S"
    assert all(row["level"] == "attention" and row["ms"] > 0 for row in rows)
