"""The health of a checkpoint: what is wrong with one that was made by hand is named, spans and taps are those of closed
formulas, and what is printed has no colours outside of a terminal."""

import contextlib
import io
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAIR
from test_train import checkpoint, options, shape, text_tokens

import health
import train
from configurator import UserError
from model import Hydra, HydraConfig
from routing import select_positive
from train import TrainConfig

pytestmark = pytest.mark.usefixtures("quick")

KEPT = {"keep_every": 1, "weight_decay": 0.0, "sample_tokens": 0}
ROUTED = {"n_layer": 4, "pattern": "MCLA", "mod_capacity": 0.5, "mor_recursions": 2, "window": 8}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of three steps of every letter, with all routers."""
    tmp = tmp_path_factory.mktemp("trained")
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main(options(tmp, "run", max_iters=3, dtype="float32", **KEPT, **ROUTED)) == 0
    return tmp / "run"


def changed(trained: Path, tmp: Path, change) -> str:
    """The folder of that run with its last.pt changed by hand."""
    out = Path(shutil.copytree(trained, tmp / "run"))
    content = checkpoint(out)
    change(content["model"])
    torch.save(content, out / "last.pt")
    return str(out)


def look(capsys, *args: str) -> tuple[str, dict]:
    """-> what it prints, and its result."""
    capsys.readouterr()
    assert health.main(list(args)) == 0
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])


def test_a_healthy_checkpoint_has_no_finding(trained, capsys):
    printed, found = look(capsys, str(trained))
    assert found["findings"] == [] and "no findings" in printed and "\033" not in printed
    assert found["letters"].keys() == set("MCLA") and "of a letter's heads: M span " in printed
    assert found["path"] == str(trained / "last.pt") and found["step"] == 3 and found["tokens"] == 8 * 32
    assert [row["layer"] for row in found["layers"][:5]] == ["embed", *(f"blocks.{i}" for i in range(4))]
    model = Hydra(HydraConfig(**checkpoint(trained)["model_config"]))
    assert sum(row["parameters"] for row in found["layers"]) == sum(p.numel() for p in model.parameters())


def fill(names: tuple[str, ...], value: float):
    """A change of these parameters."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in names:
            weights[name].fill_(value)

    return change


def point_router(name: str, sign: float):
    """A change that makes the score of every token positive or negative: all of them get a large first channel."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["embed.weight"][:, 0] = 100.0
        weights[name].zero_()
        weights[name][0] = sign

    change.sign = sign
    return change


@pytest.mark.parametrize("change, what, where", [
    (fill(("blocks.2.attn.out.weight",), 0.0), "dead layer", "blocks.2"),
    (fill(("blocks.1.mlp.down.weight",), 1e-9), "dead layer", "blocks.1"),
    (fill(("blocks.3.attn.out.weight",), 1e-6), "dead layer", "attention of blocks.3"),
    (fill(("blocks.0.attn_norm.weight",), 0.0), "dead layer", "blocks.0"),
    (fill(("blocks.1.attn.k_temperature",), 40.0), "temperature gone wild", "blocks.1"),
    (fill(("blocks.1.attn.k_temperature",), 0.01), "temperature gone wild", "blocks.1"),
    (fill(("blocks.1.attn.k_temperature",), -1.0), "temperature gone wild", "blocks.1"),
    (fill(("blocks.2.attn_norm.weight",), math.nan), "not finite", "blocks.2.attn_norm.weight"),
    (fill(("embed.weight",), math.inf), "not finite", "embed.weight"),
    (point_router("blocks.1.router.weight", 1.0), "saturated router", "block 1"),
    (point_router("blocks.3.router.weight", -1.0), "saturated router", "block 3"),
    (point_router("recursion_routers.0.weight", 1.0), "saturated router", "recursion 2"),
    (point_router("recursion_routers.0.weight", -1.0), "saturated router", "recursion 2"),
])  # fmt: skip
def test_what_is_wrong_is_named(trained, tmp_path, capsys, change, what, where):
    """With its value and the reason; a large first channel makes what layers add small, which is another finding."""
    printed, found = look(capsys, changed(trained, tmp_path, change))
    finding = next(one for one in found["findings"] if one["what"] == what and where in one["where"])
    assert finding["reason"] and f"{what}: {finding['where']}{':' if what == 'not finite' else ' = '}" in printed
    others = {one["what"] for one in found["findings"]} - {what}
    assert not others or what == "saturated router" and others == {"dead layer"}
    if what == "saturated router":
        assert finding["value"] in (0.0, 1.0) and finding["value"] == (change.sign > 0)


def test_what_a_layer_adds_is_what_its_scale_lets_through():
    """By letter, one, or learned."""
    shape = dict(vocab_size=64, block_size=8, dim=32, n_head=2, n_kv_head=1, n_layer=1, pattern="L")
    idx = torch.randint(64, (1, 8))

    def added(alpha: str, scale: float = 1.0) -> float:
        """The square of what attention adds."""
        torch.manual_seed(0)
        model = Hydra(HydraConfig(**shape, alpha=alpha))
        for name, p in model.named_parameters():
            if name.endswith("layer_scale"):
                p.data.fill_(scale)
        patient = health.Patient(Path("it"), {}, model, TrainConfig(), None, [])
        return health.observe(patient, health.Windows("it", [(idx, idx)], None, 0))[0].layers[0].squares["attention"]

    assert added("one") == pytest.approx(4 * added("fixed")) == pytest.approx(added("learned"))
    assert added("learned", 2.0) == pytest.approx(4 * added("learned"))


def test_a_router_that_hardly_chooses_is_saturated():
    """Less than a tenth of what it should select, or of what it should leave; not one that is merely off."""
    model = Hydra(HydraConfig(vocab_size=64, block_size=8, dim=32, n_head=2, n_kv_head=1, n_layer=1))
    patient = health.Patient(Path("it"), {}, model, TrainConfig(), None, [])
    for part, bad in ((0.02, True), (0.03, False), (0.9, False), (0.93, True), (0.0, True), (1.0, True)):
        router = {"router": "block 1", "capacity": 0.25, "candidates": 1000, "selected": part}
        assert bool(health.findings_of(patient, [], [router], 1.0)) == bad, part


def test_a_dead_block_is_few_findings(trained, tmp_path, capsys):
    def kill(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if name.startswith("blocks.0."):
                weights[name].zero_()

    found = look(capsys, changed(trained, tmp_path, kill))[1]["findings"]
    assert [one["what"] for one in found] == ["dead layer"] * len(found) and len(found) <= 3


def test_a_text_too_short_to_tell_is_no_finding(trained, tmp_path, capsys):
    path = changed(trained, tmp_path, point_router("blocks.1.router.weight", 1.0))
    for tokens, found in ((9, set()), (60, {"saturated router"})):
        result = look(capsys, path, f"--text={'x' * tokens}")[1]
        assert {one["what"] for one in result["findings"]} & {"saturated router"} == found
    assert look(capsys, path, f"--text={'x' * 33}")[1]["routers"][2]["candidates"] == 33  # the last one alone


def test_a_moment_that_is_not_finite_is_named(trained, tmp_path, capsys):
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    content = checkpoint(out)
    content["optimizer"]["state"][3]["exp_avg_sq"].view(-1)[0] = math.nan
    content["optimizer"]["state"][2]["exp_avg_sq"].view(-1)[0] = -1.0
    torch.save(content, out / "last.pt")
    _, found = look(capsys, str(out))
    assert [one["what"] for one in found["findings"]] == ["not possible", "not finite"]
    assert all(one["where"].startswith("exp_avg_sq of ") for one in found["findings"])


def test_the_update_is_what_the_last_step_changed(trained, capsys):
    """Which the run has done without weight decay, from step 2 to step 3."""
    _, found = look(capsys, str(trained))
    before, after = checkpoint(trained, "step-2")["model"], checkpoint(trained)["model"]
    for row in found["layers"]:
        names = [name for name in after if health.layer_of(name) == row["layer"]]
        change = torch.cat([(after[name] - before[name]).flatten() for name in names])
        weights = torch.cat([after[name].flatten() for name in names])
        assert row["norm"] == pytest.approx(weights.norm().item(), rel=1e-5)
        assert row["update_ratio"] == pytest.approx((change.norm() / weights.norm()).item(), rel=1e-3)


def test_best_has_no_moments(trained, capsys):
    printed, found = look(capsys, str(trained / "best.pt"))
    assert all(row["update_ratio"] is None for row in found["layers"])
    assert "update_ratio is n/a: this checkpoint has no moments" in printed


# ---- spans


def spans(model: Hydra, T: int = 32) -> list[dict]:
    """Of every layer, over two random texts."""
    torch.manual_seed(1)
    batches = [tuple(torch.randint(257, (2, 1, T)).unbind()) for _ in range(2)]
    patient = health.Patient(Path("it"), {}, model.eval(), TrainConfig(), None, [])
    seen, _, _ = health.observe(patient, health.Windows("random", batches, None, 0))
    return [health.spans_of(layer) for layer in seen.layers]


@pytest.mark.parametrize("pattern", ["A", "G", "M", "C", "L"])
def test_uniform_attention_has_the_closed_formula_s_span(pattern):
    """Query t, from 0, has the mean distance t/2, thus T/4 - 1/4 in the mean; 90% of the weight is within what the
    counts say."""
    model = Hydra(shape(pattern=pattern, n_layer=1))
    for name, p in model.named_parameters():
        if name.endswith(("qkv.weight", "attn.down.weight", "attn.up.weight")):
            p.data.zero_()  # equal scores, which are 0
    T = 32
    (found,) = spans(model, T)
    weight = [sum(1 / (t + 1) for t in range(d, T)) / T for d in range(T)]
    within = next(d for d in range(T) if sum(weight[: d + 1]) >= 0.9)
    assert found["span"] == pytest.approx([(T - 1) / 4] * len(found["span"]), rel=1e-5)
    assert found["span90"] == [within] * len(found["span"])


def test_documents_bound_the_span():
    """Each of eight tokens, in which positions begin anew."""
    model = Hydra(shape(pattern="MCAL", n_layer=4, doc_mask=True))
    for name, p in model.named_parameters():
        if name.endswith(("qkv.weight", "attn.down.weight", "attn.up.weight")):
            p.data.zero_()
    model.end_token = 7
    idx = torch.arange(32)[None] % 8
    patient = health.Patient(Path("it"), {}, model.eval(), TrainConfig(), None, [])
    seen, _, _ = health.observe(patient, health.Windows("it", [(idx, idx)], None, 0))
    for layer in seen.layers:
        assert health.spans_of(layer)["span"] == pytest.approx([7 / 4] * 2, rel=1e-5)


@pytest.mark.parametrize("window", [1, 4, 20])
def test_a_window_bounds_the_span(window):
    """Also where the core takes its queries in pieces."""
    model = Hydra(shape(pattern="M", n_layer=1, window=window, block_size=256))
    model.blocks[0].attn.qkv.weight.data.zero_()
    T = 256
    (found,) = spans(model, T)
    expected = sum(min(t + 1, window) - 1 for t in range(T)) / 2 / T
    assert found["span"] == pytest.approx([expected] * 2, rel=1e-5) and max(found["span90"]) < window


@pytest.mark.parametrize("keys", FAIR, ids=lambda keys: "-".join(map(str, keys.values())))
def test_the_probabilities_are_those_of_the_core(keys, monkeypatch):
    """They weigh the values to what the core returns, of every letter and option."""
    torch.manual_seed(0)
    model = Hydra(shape(dim=64, n_head=4, n_kv_head=2, **keys)).eval()
    real, seen = torch.nn.functional.scaled_dot_product_attention, []

    def look(self, q, k, mask):
        seen.append((q, k, mask))

    monkeypatch.setattr(health.Watcher, "look", look)
    with health.Watcher(model) as watcher, torch.no_grad():
        watcher.begin(32)
        model(torch.randint(257, (1, 32)))
    for q, k, mask in seen:
        v = torch.randn_like(k)
        causal = mask is None
        expected = real(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))
        weights = health.probabilities(q, k, mask)
        assert torch.allclose(weights @ v[0].repeat_interleave(q.size(1) // k.size(1), 0), expected[0], atol=1e-5)
    assert len(seen) == len(model.blocks)


def test_a_letter_s_span_is_the_mean_of_its_heads():
    rows = [{"layer": "embed"}, {"letter": "M", "span": [1.0, 3.0], "span90": [2, 2]}, {"letter": "L", "span": None},
            {"letter": "M", "span": [8.0], "span90": [5]}]  # fmt: skip
    assert health.letter_spans(rows) == {"M": {"span": 4.0, "span90": 3.0}}


def test_watching_changes_nothing():
    torch.manual_seed(0)
    model = Hydra(shape(**ROUTED)).eval()
    idx = torch.randint(257, (1, 32))
    with torch.no_grad():
        before = model(idx).logits
        with health.Watcher(model) as watcher:
            watcher.begin(32)
            assert torch.equal(model(idx).logits, before)
        assert torch.equal(model(idx).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_head_that_looks_back_by_its_values_is_counted_at_true_positions():
    """Behind a router the tokens that are left stand as far apart as in the text."""
    torch.manual_seed(0)
    model = Hydra(shape(pattern="A", n_layer=2, mod_capacity=0.5, rope_fraction=0.0)).eval()
    model.blocks[1].attn.qkv.weight.data.zero_()
    model.embed.weight.data[:, 0] = torch.where(torch.arange(257) % 4 == 0, 50.0, -50.0)
    model.blocks[1].router.weight.data.zero_()[0] = 1.0
    idx = torch.arange(32)[None]  # every fourth token goes through the second layer
    patient = health.Patient(Path("it"), {}, model, TrainConfig(), None, [])
    seen, choices, _ = health.observe(patient, health.Windows("it", [(idx, idx)], None, 0))
    assert choices == [[("block 1", list(range(32)), list(range(0, 32, 4)))]]
    assert health.spans_of(seen.layers[1])["span"] == pytest.approx([4 * 7 / 4] * 2, rel=1e-5)


# ---- taps, routers


def test_taps_are_those_that_are_put_in():
    model = Hydra(shape(pattern="CM", n_layer=2, short_conv=2))
    conv = model.blocks[0].attn
    for lag, value in enumerate((3.0, -2.0, 0.5)):
        conv.conv_depthwise.data[:, -1 - lag] = value
        conv.conv_grouped.data[..., -1 - lag] = -value
    model.blocks[1].attn.short_conv.weight.data[:, 0] = 7.0  # the token before
    assert health.taps_of(model) == [
        {"layer": "blocks.0", "kind": "depthwise", "rms": [3.0, 2.0, 0.5], "mean": [3.0, -2.0, 0.5]},
        {"layer": "blocks.0", "kind": "grouped", "rms": [3.0, 2.0, 0.5]},
        {"layer": "blocks.1", "kind": "short_conv", "rms": [1.0, 7.0], "mean": [1.0, 7.0]}]  # fmt: skip
    assert health.taps_of(Hydra(shape(pattern="CA", n_layer=2, conv_kernel=0))) == []


@pytest.mark.parametrize("keys", [{}, {"router": "random"}])
def test_the_routers_choices_are_those_of_the_model(keys, monkeypatch):
    """Of every router in every recursion, which tokens, by the true positions that the layers are given."""
    torch.manual_seed(0)
    model = Hydra(shape(**ROUTED | {"mor_recursions": 3} | keys)).eval()
    expected = []

    def select(r_BT, x_BTD, ctx, state):
        found = select_positive(r_BT, x_BTD, ctx, state)
        alive = int(ctx.lengths[0]) if ctx.lengths is not None else r_BT.size(1)
        pos = ctx.pos.reshape(-1)[:alive]
        expected.append((sorted(pos.tolist()), sorted(found[0].ctx.pos[0, : int(found[0].ctx.lengths[0])].tolist())))
        return found

    monkeypatch.setattr("routing.select_positive", select)
    patient = health.Patient(Path("it"), {}, model, TrainConfig(), None, [])
    idx = torch.randint(257, (1, 32))
    _, (choices,), _ = health.observe(patient, health.Windows("it", [(idx, idx)], None, 0))
    assert [(sorted(it.candidates), sorted(it.selected)) for it in choices] == expected and len(expected) == 3 * 2 + 2
    blocks = ["block 1", "block 3"]
    assert [it.name for it in choices] == [*blocks, "recursion 2", *blocks, "recursion 3", *blocks]
    found = health.capacities(model)
    assert found == pytest.approx({"block 1": 0.5, "block 3": 0.5, "recursion 2": 2 / 3, "recursion 3": 0.5})


def test_a_text_is_shown_with_what_the_routers_did(trained, capsys, monkeypatch):
    """In digits below it, or in colours in a terminal; what would steer it becomes a dot."""
    text = "def é(x):\n\033[31m y\x07"
    printed, found = look(capsys, str(trained), f"--text={text}")
    assert "\033" not in printed and found["text"] == "the given text" and found["tokens"] == len(text.encode())
    lines = printed.splitlines()
    at = lines.index("def é(x):")
    assert lines[at + 2] == "·[31m y·" and len(lines[at + 1]) == 9 and len(lines[at + 3]) == 8
    assert set(lines[at + 1] + lines[at + 3]) <= set("012345")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    coloured, same = look(capsys, str(trained), f"--text={text}")
    assert same == found and "\033[0m" in coloured and "\033[31m y" not in coloured


def test_a_text_may_come_from_a_file_and_the_result_is_stored(trained, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abc def " * 20)
    path = tmp_path / "health.json"
    _, found = look(capsys, str(trained), f"--text_file={tmp_path / 'text.txt'}", f"--json={path}", "--windows=3")
    assert json.loads(path.read_text()) == found and found["tokens"] == 3 * 32
    assert found["text"] == "the given text"


def test_the_loss_is_that_of_an_evaluation(trained, capsys):
    _, found = look(capsys, str(trained), "--windows=4")
    content = checkpoint(trained)
    model = Hydra(HydraConfig(**content["model_config"]))
    model.load_state_dict(content["model"])
    tokens = text_tokens(trained.parent)
    expected = train.evaluate(model, tokens.val, torch.zeros(257), 1, 4, torch.device("cpu"))
    assert found["loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


@pytest.mark.parametrize("args, words", [
    ([], "nothing to look at: name a run"), (["OUT", "other"], "'other' is one too many"),
    (["/no/such"], "'/no/such' does not exist: name a run's"), (["EMPTY"], "has neither a last.pt nor a best.pt"),
    (["OUT", "--window=3"], "did you mean windows"), (["OUT", "--windows=0"], "windows=0: it must be at least 1"),
    (["OUT", "--text=a"], "1 tokens have nothing to look back at"), (["OUT", "--text=a", "--text_file=b"], "give one"),
    (["OUT", "--text_file=/no/such"], "text_file='/no/such': No such file"), (["OUT/log.jsonl"], "is no checkpoint of"),
    (["OUT", "--json=/no/such/x.json"], "its folder does not exist"), (["OUT", "--json=OUT"], "it is no file"),
])  # fmt: skip
def test_what_cannot_be_looked_at_is_one_line(trained, tmp_path, args, words):
    (tmp_path / "empty").mkdir()
    places = {"OUT": str(trained), "EMPTY": str(tmp_path / "empty")}
    for name, path in places.items():
        args = [word.replace(name, path) for word in args]
    with pytest.raises(UserError, match=words) as error:
        health.main(args)
    assert "\n" not in str(error.value)


def test_a_text_that_is_gone_is_named_with_the_remedy(trained, tmp_path):
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    content = checkpoint(out)
    content["train_config"] |= {"data": "/no/such/text", "cache_dir": str(tmp_path / "cache")}
    torch.save(content, out / "last.pt")
    with pytest.raises(UserError, match="/no/such/text.*; or look at another text, with --text or --text_file"):
        health.main([str(out)])
