"""Pictures are made of files alone: they exist, every table has its own, and what cannot be drawn is said in a line."""

import json
import struct
import sys

import pytest

import plot
from configurator import UserError


def log(folder, steps=4, cut=False):
    """A log.jsonl: a line for every second step, evaluations at steps 0 and 3, and the final one."""
    folder.mkdir(exist_ok=True)
    config = {"batch_size": 2, "block_size": 8, "gradient_accumulation_steps": 3}
    records = [{"started": 0, "config": config, "flops_per_token": 100.0},
               {"step": 0, "val_loss": 5.0, "val_bpb": 3.0, "best": True}]  # fmt: skip
    records += [{"step": step, "loss": 5.0 - step, "ms": 500.0 * step} for step in (2, 4)]
    records.insert(3, {"step": 3, "val_loss": 4.0, "val_bpb": 2.5})
    records += [{"step": 4, "skipped": "loss"}, {"step": 4, "val_loss": 3.0, "val_bpb": 2.0, "final": True}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(text + '{"step": 5, "loss": 1.' if cut else text)
    return folder


def size(path):
    """(width, height) of a PNG, from its header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def matplotlib():
    pytest.importorskip("matplotlib", reason="charts are optional: pip install matplotlib")


@pytest.mark.parametrize("cut", [False, True])
def test_a_run_is_placed_on_every_axis(tmp_path, cut):
    path = log(tmp_path / "out", cut=cut) / "log.jsonl"
    places = {x: plot.read_run(path, x) for x in plot.AXES}
    assert places["steps"] == {"loss": ([2, 4], [3.0, 1.0]), "val_bpb": ([0, 3], [3.0, 2.5]), "final": ([4], [2.0])}
    assert places["tokens"]["loss"][0] == [2 * 48, 4 * 48]  # 2 texts of 8 tokens, three times
    assert places["flops"]["loss"][0] == [2 * 4800, 4 * 4800]
    assert places["seconds"]["loss"][0] == [2 * 1.0, 2 * 1.0 + 2 * 2.0]  # ms is the mean since the last line
    assert places["seconds"]["val_bpb"][0] == [0, 3 * 1.0] and places["seconds"]["final"][0] == [6.0]


def test_a_resumed_run_counts_by_its_new_header(tmp_path):
    path = log(tmp_path / "out") / "log.jsonl"
    header = {"resumed_at": 4, "config": {"batch_size": 1, "block_size": 8, "gradient_accumulation_steps": 1},
              "flops_per_token": 100.0}  # fmt: skip
    with path.open("a") as file:
        file.write(json.dumps(header) + "\n" + json.dumps({"step": 6, "loss": 0.5, "ms": 250.0}) + "\n")
    assert plot.read_run(path, "tokens")["loss"][0] == [96, 192, 192 + 2 * 8]
    assert plot.read_run(path, "seconds")["loss"][0] == [2.0, 6.0, 6.5]


@pytest.mark.parametrize("x", plot.AXES)
def test_runs_are_drawn(matplotlib, tmp_path, x):
    out = tmp_path / "runs.png"
    runs = [str(log(tmp_path / "a")), str(log(tmp_path / "b") / "log.jsonl")]
    assert plot.main([*runs, f"--out={out}", f"--x={x}"]) == 0
    assert size(out) == (1100, 700) and out.stat().st_size > 5000


def attention(mix, T, dtype="float32"):
    return {"level": "attention", "mix": mix, "B": 1, "T": T, "dtype": dtype, "mode": "eager", "ms": T / 10}


FIT = {"level": "fit", "mix": "ms_per_token", "form": "line", "curve": [[1e6, 1.0, 0.5, 2.0], [1e8, 9.0, 4.0, 20.0]]}
TABLES = {
    "length": [*(attention(mix, T) for mix in "AGMCL" for T in (256, 512)),
               {"level": "attention", "left_out": "no time"}],
    "speed": [attention("A", 256), attention("C", 256, "bfloat16"), {"level": "block", "left_out": "no time"}],
    "memory": [{"level": "attention", "mix": "A", "B": 1, "T": 256, "dtype": "float32", "step_mb": 3.0}],
    "compression": [attention("A", 1024), {"level": "attention", "mix": "A", "dtype": "float32", "step_mb": 3.0}],
    "flops": [{"mix": "A", "of_layer_1024": 1.0}, {"mix": "C", "of_layer_1024": 0.7}],
    "scaling": [{"level": "scaling", "mix": "scale_1", "params": 10**7, "ms_per_token": 3.0}, FIT,
                {"level": "predicted", "mix": "scale_2", "params": 10**8, "ms_per_token": 9.0}],
    "train": [{"mix": "tiny", "left_out": "no time"}, {"failed": "RuntimeError: no"}],
}  # fmt: skip


def test_runs_in_folders_of_one_name_are_all_drawn(matplotlib, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folders = [log(tmp_path / "a" / "out"), log(tmp_path / "b" / "out", steps=4), log(tmp_path / "alone")]
    drawn, real = [], plot.draw_runs

    def draw(runs, x, figure):
        drawn.append(list(runs))
        real(runs, x, figure)

    monkeypatch.setattr(plot, "draw_runs", draw)
    plot.main([*map(str, folders), f"--out={tmp_path / 'runs.png'}"])
    assert drawn == [[str(folders[0]), str(folders[1]), "alone"]]


@pytest.mark.parametrize("table", [table for table in TABLES if table != "train"])
def test_a_table_is_drawn(matplotlib, tmp_path, table):
    (tmp_path / "bench.json").write_text(json.dumps({"tables": {table: TABLES[table]}}))
    out = tmp_path / "table.png"
    assert plot.main([str(tmp_path / "bench.json"), f"--out={out}"]) == 0
    assert size(out)[0] == 1100 and out.stat().st_size > 3000


def test_several_tables_are_several_pictures(matplotlib, tmp_path, capsys):
    (tmp_path / "bench.json").write_text(json.dumps({"tables": TABLES}))
    assert plot.main([str(tmp_path / "bench.json"), f"--out={tmp_path / 'bench.png'}"]) == 0
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {f"bench_{table}.png" for table in TABLES if table != "train"}
    assert all(name in capsys.readouterr().out for name in ["bench_speed.png"])


def comparison(path):
    """compare.py's JSON of two contestants at two things that are equal, with three and two evaluations."""
    def curve(n, shift):
        return {x: [1.0 + i for i in range(n)] for x in plot.AXES[1:]} | {
            "losses": [[3.0 - i + shift, 3.2 - i, 3.1 - i] for i in range(n)]}  # fmt: skip

    bases = {basis: {"rows": [], "curves": {"a": curve(n, 0.0), "b": curve(n, 0.5)}}
             for basis, n in (("tokens", 3), ("seconds", 2))}  # fmt: skip
    path.write_text(json.dumps({"measure": "bits/byte", "bases": bases}))


def test_a_comparison_is_drawn(matplotlib, tmp_path, monkeypatch):
    """By its file or by its folder, which has a log of its own: a row for each basis, lines and bands on three axes."""
    (tmp_path / "log.jsonl").write_text('{"run": "a/5-steps", "loss": 2.0}\n')
    comparison(tmp_path / "compare.json")
    drawn, real = [], plot.draw_compare

    def draw(found, x, figure):
        real(found, x, figure)
        drawn.append(figure)

    monkeypatch.setattr(plot, "draw_compare", draw)
    for name in ("compare.json", "."):
        assert plot.main([str(tmp_path / name), f"--out={tmp_path / 'x.png'}"]) == 0
    assert size(tmp_path / "x.png") == (1100, 700)
    for figure in drawn:
        assert [axes.get_xlabel() for axes in figure.axes] == [plot.NAMES[x] for x in plot.COMPARED] * 2
        words = ["bits/byte, equal tokens", "bits/byte, equal seconds"]
        assert [axes.get_ylabel() for axes in figure.axes[::3]] == words
        a, b = figure.axes[0].lines
        assert list(b.get_ydata()) == pytest.approx([3.8 / 3 + 2, 3.8 / 3 + 1, 3.8 / 3]) and b.get_label() == "b"
        low, high = figure.axes[0].collections[1].get_datalim(figure.axes[0].transData).intervaly
        assert (low, high) == pytest.approx((1.1, 3.5))
    assert plot.main([str(tmp_path), f"--out={tmp_path / 'x.png'}", "--x=flops"]) == 0
    assert [axes.get_xlabel() for axes in drawn[-1].axes] == ["training FLOPs"] * 2


HEALTH = {"subject": "checkpoint", "layers": [
    {"layer": "embed"}, {"layer": "blocks.0", "letter": "M", "span": [3.0, 5.0], "span90": [7, 9]},
    {"layer": "blocks.1", "letter": "C", "span": [4.0], "span90": [6]},
    {"layer": "blocks.2", "letter": "C", "span": [None], "span90": [0]}, {"layer": "norm", "span": None}],
    "taps": [{"layer": "blocks.1", "kind": "depthwise", "rms": [1.0, 0.5, 0.25], "mean": [1.0, -0.5, 0.25]},
             {"layer": "blocks.1", "kind": "grouped", "rms": [0.3, 0.2, 0.1]},
             {"layer": "blocks.2", "kind": "depthwise", "rms": [2.0, None, 0.0]}]}  # fmt: skip


def test_a_checkpoint_s_health_is_drawn(matplotlib, tmp_path, monkeypatch):
    """Every head of a layer whose spans are finite, from its mean to where 90% lies; every tap in its place."""
    (tmp_path / "health.json").write_text(json.dumps(HEALTH))
    figures = {}

    def noted(name, real):
        def draw(rows, x, figure):
            real(rows, x, figure)
            figures[name] = figure

        monkeypatch.setattr(plot, name, draw)

    noted("draw_spans", plot.draw_spans)
    noted("draw_taps", plot.draw_taps)
    assert plot.main([str(tmp_path / "health.json"), f"--out={tmp_path / 'x.png'}"]) == 0
    assert size(tmp_path / "x_spans.png") == (1100, 500) and size(tmp_path / "x_taps.png")[0] == 1100
    (axes,) = figures["draw_spans"].axes
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == {"C": [4.0], "M": [3.0, 5.0]}
    ends = {segment[0][1]: segment[1][1] for lines in axes.collections for segment in lines.get_segments()}
    assert ends == {3.0: 7.0, 5.0: 9.0, 4.0: 6.0}
    (tmp_path / "health.json").write_text(json.dumps(HEALTH).replace('"letter": "M"', '"letter": "X"'))
    assert plot.main([str(tmp_path / "health.json"), f"--out={tmp_path / 'x.png'}"]) == 0
    assert "X" in [line.get_label() for line in figures["draw_spans"].axes[0].lines]  # a letter of the user
    assert [round(x) for line in axes.lines for x in line.get_xdata()] == [1, 0, 0]
    found = [axes.images[0].get_array().tolist() for axes in figures["draw_taps"].axes]
    assert found == [[[1.0, 0.5, 0.25]], [[0.3, 0.2, 0.1]]]
    assert [axes.get_title() for axes in figures["draw_taps"].axes] == ["depthwise", "grouped"]


def test_it_reads_no_other_program():
    others = ("bench", "scaling", "compare", "trials", "train", "health", "torch")
    done = [name for name in others if name in vars(plot)]
    assert not done


def files(tmp_path):
    log(tmp_path / "run")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "log.jsonl").write_text('{"started": 0}\n{"step": 1, "loss": 2.0, "ms": 1.0}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").write_text("")
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "ill.json").write_text('{"subject": "checkpoint", "layers": [3]}')
    (tmp_path / "bare.json").write_text('{"subject": "checkpoint", "layers": [], "taps": []}')
    (tmp_path / "cut.json").write_text('{"tables": {')
    (tmp_path / "bases.json").write_text('{"bases": {"tokens": {"curves": {"a": 3}}}, "reference": "a"}')
    for name, line in (("deep", "[" * 100_000), ("odd", '{"step": "a", "loss": 1}'), ("ms", '{"step": 1, "ms": null}'),
                       ("header", '{"started": 0, "config": [1]}')):  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text(line)
    (tmp_path / "rows.json").write_text(json.dumps({"tables": {"train": TABLES["train"]}}))


@pytest.mark.parametrize("args, words", [
    ([], "nothing to draw"), (["nowhere"], "does not exist"), (["empty"], "no step"), (["noise.bin"], "no step"),
    (["list.json"], "is no JSON of bench.py"), (["ill.json"], "is no JSON of bench.py"),
    (["bare.json"], "no rows to draw"), (["cut.json"], "is no JSON of bench.py"),
    (["rows.json"], "no rows to draw"), (["rows.json", "run"], "one JSON at a time"), (["run", "--x=hours"], "x='h"),
    (["old", "--x=flops"], "does not say its flops"), (["run", "--out=no/such/x.png"], "its folder does not exist"),
    (["deep.jsonl"], "no step of a run"), (["odd.jsonl"], "has something of another form .TypeError"),
    (["ms.jsonl"], "another form"), (["header.jsonl"], "another form"), (["bases.json"], "another form"),
    (["run", "--out=x.jpg"], "name a .png"), (["run", "--xx=steps"], "unknown key"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_said_in_a_line(args, words, tmp_path, monkeypatch):
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        plot.main(args)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.png"))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot.main([str(log(tmp_path / "run"))])
