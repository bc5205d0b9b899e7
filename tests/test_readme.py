"""The README's tables are made from results/: what a command prints of a file there stands in the README."""

from pathlib import Path

import pytest

import claims
import compare
from accounting import count_params
from configurator import build, parse
from model import HydraConfig
from train import TrainConfig

ROOT = Path(compare.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_stored_comparison_is_in_the_readme(path, capsys):
    if '"bases"' in path.read_text():
        assert compare.main([str(path)]) == 0
        assert capsys.readouterr().out.strip() in README
    else:
        assert path.name in README


def test_the_answer_to_the_older_report_is_in_the_readme(capsys):
    assert claims.main(["--markdown"]) == 0
    assert capsys.readouterr().out.strip() in README


def test_pictures_are_there_and_small():
    pictures = sorted((ROOT / "results").glob("*.png"))
    assert len(pictures) >= 3 and README.index("](results/headline.png)") < README.index("## Set up")
    for path in pictures:
        assert f"](results/{path.name})" in README and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "learning").glob("*.toml")), ids=lambda path: path.stem)
def test_contestants_have_the_parameters_that_they_say(path):
    """All within 1% of the hybrid's."""
    counts = []
    for name in (path, path.with_name("hybrid.toml")):
        config, _ = build(parse([str(name)], HydraConfig, TrainConfig), HydraConfig, TrainConfig)
        counts.append(count_params(config))
    assert f"# {counts[0]:,} parameters by the hidden width" in path.read_text()
    assert counts[0] == pytest.approx(counts[1], rel=0.01)
