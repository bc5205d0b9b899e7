"""Presets are measured where they fit and predicted elsewhere, with honest intervals."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
import contestants
import scaling
from accounting import count_params
from configurator import UserError
from model import HydraConfig

# an older report's rows that were not paged to disk: parameters in millions, its "MoD prob", its ms/step
REPORT = ([100.5, 216.3, 569.6, 926.8, 1194.8, 1420.4], [0.808, 0.787, 0.759, 0.779, 0.847, 0.798],
          [150, 241, 323, 451, 731, 536])  # fmt: skip


def test_the_fit_of_the_older_report():
    x = [math.log(p) for p in REPORT[0]]
    fraction = scaling.fit(x, [scaling.logit(p) for p in REPORT[1]])
    assert not fraction.sloped and abs(fraction.slope) < 2 * fraction.error
    middle, low, high = map(scaling.logistic, fraction.predict(math.log(7200)))
    assert [middle, low, high] == pytest.approx([0.798, 0.627, 0.914], abs=5e-4)
    time = scaling.fit(x, [math.log(ms) for ms in REPORT[2]])
    assert time.sloped and time.slope == pytest.approx(0.53, abs=0.005)
    middle, low, high = map(math.exp, time.predict(math.log(7200)))
    assert low < middle < high < 47527 / 4
    near, far = (time.predict(math.log(p)) for p in (500, 7200))
    assert far[2] - far[1] > 1.4 * (near[2] - near[1])


def test_a_slope_without_significance_is_a_constant():
    x = [0.0, 1.0, 2.0, 3.0]
    assert scaling.fit(x, [1.0, 3.0, 5.0, 7.1]).sloped and not scaling.fit(x, [1.0, 9.0, 2.0, 7.0]).sloped
    assert not scaling.fit(x[:3], [1.0, 3.0, 6.5]).sloped  # three points: the error of the slope is hardly known
    assert scaling.fit(x, [2.0] * 4).predict(99.0) == (2.0, 2.0, 2.0)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    generator = np.random.default_rng(0)
    x = [0.0, 1.0, 2.0, 3.0, 4.0]
    inside = 0
    for _ in range(400):
        noise = generator.normal(size=6)
        _, low, high = scaling.fit(x, [a + 0.2 * e for a, e in zip(x, noise, strict=False)]).predict(6.0)
        inside += low <= 6.0 + 0.2 * noise[5] <= high
    assert 0.92 < inside / 400 < 0.99


def test_any_number_of_shapes_can_be_fitted():
    """By a table of t that ended at ten degrees of freedom, thirteen could not."""
    x = [float(i) for i in range(13)]
    trend = scaling.fit(x, [a + 0.1 * (-1) ** int(a) for a in x])
    _, low, high = trend.predict(6.0)
    variance = 0.01 * (13 - 1 / 13) / 11
    assert trend.sloped and high - low == pytest.approx(2 * 2.2010 * math.sqrt(variance * 14 / 13), rel=1e-4)


def test_extremes_of_a_fraction_can_be_fitted():
    none, all_ = scaling.logit(0.0), scaling.logit(1.0)
    assert none == pytest.approx(-all_) and none < -4
    assert scaling.logistic(scaling.logit(0.3)) == pytest.approx(0.3) and scaling.logistic(-1e5) == 0


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Runs it on five tiny presets; the memory is enough for four."""
    for i, dim in enumerate((32, 48, 64, 96, 512)):
        (tmp_path / f"scale_{i}.toml").write_text(
            f"dim = {dim}\nn_head = 2\nn_kv_head = 1\nlatent_head_dim = 0\npattern = 'MC'\nn_layer = 2\n"
            f"mod_capacity = 0.5\nmor_recursions = {3 + i % 2}\nvocab_size = 64\nblock_size = 32\n")  # fmt: skip
    monkeypatch.setattr(scaling, "CONFIGS", tmp_path)
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(scaling, "STEP_TOKENS", 32)
    monkeypatch.setattr(scaling, "EVALUATIONS", 4)
    monkeypatch.setattr(bench, "free_memory", lambda device: 20e6)
    monkeypatch.setattr(bench, "step_bound", lambda *_: math.inf)  # whose plan, which takes seconds, has its own tests
    monkeypatch.setattr(bench, "step_bytes", lambda config, B, T, copies: (4 * copies * count_params(config), 0))
    tokens = np.random.default_rng(0).integers(0, 64, 4096).astype(np.uint16)
    corpus = SimpleNamespace(train=tokens, val=tokens, enc=SimpleNamespace(n_vocab=64))
    monkeypatch.setattr(scaling, "prepare", lambda *_: corpus)

    def run(*argv, code=0):
        assert scaling.main(["--rounds=2", f"--json={tmp_path / 'b.json'}", *argv]) == code
        return json.loads((tmp_path / "b.json").read_text())["tables"]["scaling"]

    return run


def test_it_measures_what_fits_and_predicts_the_rest(stored, capsys):
    rows = stored()
    measured, left_out = [r for r in rows if "steps" in r], [r for r in rows if "left_out" in r]
    assert [r["mix"] for r in measured] == ["scale_0", "scale_1", "scale_2", "scale_3"]
    for i, row in enumerate(measured):
        assert 0 <= row["routed_fraction"] <= 1 and 1 <= row["mean_depth"] <= 3 + i % 2
        assert row["recursing"] == pytest.approx((row["mean_depth"] - 1) / (2 + i % 2))
        assert row["params"] > 0 and row["ms_per_token"] > 0 and row["steps"] == 3
    assert [r["mix"] for r in left_out] == ["scale_4"] and "GB of memory" in left_out[0]["left_out"]
    fits = {r["mix"]: r for r in rows if r["level"] == "fit"}
    assert fits.keys() == {"ms_per_token", "routed_fraction", "recursing"}
    assert all(r["form"] in ("line", "constant") and r["measured"] == 4 for r in fits.values())
    (row,) = [r for r in rows if r["level"] == "predicted"]
    config = HydraConfig(dim=512, n_head=2, n_kv_head=1, latent_head_dim=0, pattern="MC", n_layer=2, mod_capacity=0.5,
                         mor_recursions=3, vocab_size=64)  # fmt: skip
    assert row["params"] == count_params(config) and "beyond 3x" in row["note"]
    curve = fits["ms_per_token"]["curve"]
    assert curve[0][0] == pytest.approx(measured[0]["params"]) and curve[-1][0] == pytest.approx(row["params"])
    assert curve[-1][1] == pytest.approx(row["ms_per_token"])
    for key, top in (("routed_fraction", 1), ("mean_depth", 3), ("ms_per_token", math.inf)):
        assert 0 <= row[f"{key}_low"] <= row[key] <= row[f"{key}_high"] <= top
    assert "a guess" in capsys.readouterr().out


def test_a_preset_is_trained_at_its_own_rate(stored, monkeypatch, tmp_path):
    rates = []
    monkeypatch.setattr(contestants, "make_optimizer",
                        lambda net, run: rates.append(run.learning_rate) or torch.optim.SGD(net.parameters(), 0.1))
    (tmp_path / "scale_1.toml").open("a").write("learning_rate = 0.25\n")
    stored("--only=scale_1")
    assert rates == [0.25]


def test_where_everything_fits_nothing_is_predicted(stored, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda device: 1e12)
    monkeypatch.setattr(scaling, "LONGEST", 1e9)
    rows = stored()
    assert len([r for r in rows if "steps" in r]) == 5 and {r["level"] for r in rows} == {"scaling", "fit"}


def test_three_shapes_are_needed_to_predict(stored, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda device: 1e6)
    rows = stored()
    assert len([r for r in rows if "steps" in r]) < 3 and "three measured shapes" in rows[-1]["left_out"]


def test_dense_shapes_and_some(stored, monkeypatch):
    rows = stored("--mor_recursions=1", "--mod_capacity=0")
    assert [r["mix"] for r in rows if r["level"] == "fit"] == ["ms_per_token"]
    assert not any({"mean_depth", "routed_fraction"} & r.keys() for r in rows)
    with pytest.raises(UserError, match="no row of scaling"):
        stored("--only=nothing")
    monkeypatch.setattr(scaling, "LONGEST", 0)
    assert ["more than 0 s on a CPU" in r["left_out"] for r in stored("--only=scale_1") if r["mix"] == "scale_1"][0]


def test_a_loss_that_is_not_finite_is_no_measurement(stored, monkeypatch):
    real = contestants.Hydra.forward

    def forward(self, *args):
        output = real(self, *args)
        return output if self.training else output._replace(loss=output.loss * math.nan)

    monkeypatch.setattr(contestants.Hydra, "forward", forward)
    rows = stored()
    assert all("left_out" in r for r in rows) and "not finite" in rows[0]["left_out"]


def test_a_failure_is_a_row(stored, monkeypatch, capsys):
    def breaks(*_):
        raise RuntimeError("no more\nlines")

    monkeypatch.setattr(scaling, "train_shortly", breaks)
    assert stored(code=1) == [{"failed": "RuntimeError: no more"}]
    assert "failed: RuntimeError: no more" in capsys.readouterr().out


@pytest.mark.parametrize("args, words", [
    (["--context=8"], "--context: this program does not read it: leave it out"), (["--peers"], "--peers: this"),
    (["config/tiny.toml"], "scaling has its own files"), (["--pears"], "unknown key"), (["--rounds=0"], "rounds=0"),
    (["--dim=33"], "dim=33"), (["--json=no/such/x.json"], "its folder does not exist"),
])  # fmt: skip
def test_bad_input_is_refused(args, words, monkeypatch):
    monkeypatch.setattr(scaling, "begin", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(UserError, match=words):
        scaling.main(args)
