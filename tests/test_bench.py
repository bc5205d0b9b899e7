"""The bench prints and stores what it measured, and refuses what it cannot do."""

import json
import sys

import pytest
import torch

import bench
from configurator import UserError

TINY = ["--dim=32", "--n_head=2", "--n_kv_head=1", "--compression=2", "--n_layer=8", "--vocab_size=64", "--mlp_ratio=1",
        "--prompt_tokens=8", "--new_tokens=4", "--context=16", "--rounds=1"]  # fmt: skip


def test_decode_measures_every_dtype_and_batch(tmp_path, capsys):
    assert bench.main(["decode", *TINY, "--pattern=M", f"--json={tmp_path / 'bench.json'}"]) == 0
    result, printed = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert [(r["dtype"], r["batch"]) for r in result["decode"]] == [
        ("torch.float32", 1), ("torch.float32", 8), ("torch.bfloat16", 1), ("torch.bfloat16", 8)]  # fmt: skip
    for row in result["decode"]:
        assert all(v > 0 for k, v in row.items() if k != "dtype")
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
        assert f"{row['tokens_per_s']:.1f}" in printed
    assert result["torch"] == torch.__version__ and "dim = 32" in result["config"]


def test_turns_are_interleaved_after_one_that_is_not_counted():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = bench.in_turns(contestants, 3, torch.device("cpu"))
    assert calls == list("abababab") and {name: len(t) for name, t in seconds.items()} == {"a": 3, "b": 3}
    assert bench.ratio([2.0, 9.0, 4.0], [1.0, 1.0, 2.0]) == 2.0


@pytest.mark.parametrize("args, words", [
    (["speeds"], "unknown table .speeds.: use decode"), (["--rounds=0"], "rounds=0"),
    (["--pears"], "did you mean peers"),
    (["--dim=33"], "dim=33"),
])  # fmt: skip
def test_bad_input_is_refused(args, words):
    with pytest.raises(UserError, match=words):
        bench.main(args)


def test_peers_without_transformers_says_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        bench.main([*TINY, "--peers"])
