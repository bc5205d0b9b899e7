"""Command lines at random, of every key of every program: exit code 0, one line of a UserError, or a run that starts.

Nothing else ever comes out: no other exception, no second line. A run is cut at its first step, which is its start.
"""

import contextlib
import functools
import io
import shutil
import signal
import socket
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
from test_train import SHAPE, options

import bench
import limits
import sample
import train
from bench import BenchConfig
from configurator import REPEATED, SWITCH, AnyPath, UserError
from model import HydraConfig
from sample import SampleConfig
from train import TrainConfig

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

PROGRAMS = {"train": (HydraConfig, TrainConfig), "sample": (SampleConfig,), "bench": (HydraConfig, BenchConfig)}


class Started(Exception):
    """The first step of a run, or the first thing that is measured."""


# ---- what is drawn

# Lone surrogates, controls, every script. Nothing is written at a root: some of these programs really start.
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12).map(lambda text: text.lstrip("/"))
ODD_NUMBERS = st.sampled_from(["", "0", "-0", "+1", "00", " 1", "1 ", "1_0", "0x10", "1e3", "1e400", "-1e400", "nan",
                               "inf", "-inf", "٣", "½", "１", "1.", ".5", "1e-400", "1,5", "1.0", "true", "None", "--1",
                               "9" * 19, "9" * 400, "9" * 5000, "1e308", "5e-324", str(2**63)])  # fmt: skip
INTS = st.integers(-3, 70) | st.sampled_from([2**k + d for k in (7, 10, 16, 24, 31, 32, 53, 63) for d in (-1, 0, 1)])
FLOATS = st.floats(allow_nan=False) | st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 1e-9, 1e9])
WORDS = st.sampled_from(["auto", "on", "off", "none", "cpu", "cuda", "cuda:99", "mps", "float32", "bfloat16",
                         "random", "epochs", "block", "best", "last", "sdpa", "flex", "ddp", "fsdp", "bytes", "MC",
                         "A", "GC", "X", "ml", "speed eager", "python4096", "text"])  # fmt: skip
PATHS = st.sampled_from(["", ".", "~", "~/x", "~nobody-at-all", "a" * 300, "a/" * 3000, "here/socket", "no/such/x",
                         "here/run", "here/text.txt", "here/run/best.pt", "here/it's a $HOME", "here/é\u2028", "a\0b",
                         "here/text.txt/x", "here/*", "[", "here/loop", "here/deep.toml"])  # fmt: skip


@functools.cache
def values(kind: type) -> st.SearchStrategy[str]:
    """Texts for an option of this type: such as can be, extreme ones, and those of another type."""
    right = {int: INTS.map(str), float: FLOATS.map(repr), bool: st.sampled_from(["true", "no", "1", "maybe", ""]),
             str: WORDS | ANY_TEXT, AnyPath: PATHS | WORDS | ANY_TEXT, SWITCH: PATHS | WORDS | ANY_TEXT,
             REPEATED: ANY_TEXT}  # fmt: skip
    return st.integers(0, 9).flatmap(
        lambda n: right[kind] if n < 8 else st.one_of(ODD_NUMBERS, WORDS, PATHS, ANY_TEXT, INTS.map(str)))


@functools.cache
def words(key: str, kind: type) -> st.SearchStrategy[list[str]]:
    """Of an option: --key=value, --key value, a key alone."""
    one = values(kind).map(lambda value: [f"--{key}={value}"])
    two = values(kind).map(lambda value: [f"--{key.replace('_', '-')}", value])
    return st.one_of(one, one, two, st.just([f"--{key}"]))


def toml_line(kinds: dict[str, type]) -> st.SearchStrategy[str]:
    """A line of a file: numbers, texts, lists, tables, or nothing that a file may have."""
    value = st.one_of(INTS.map(str), FLOATS.map(repr), st.sampled_from(["true", '"x"', "[]", '["a"]', "{a=1}", "nan"]),
                      st.sampled_from(["[" * 3000, "0x" + "f" * 5000, '"\\u0000"', '"\\n"', "1979-05-27", '"""']))
    return st.tuples(st.sampled_from(sorted(kinds)), value).map(" = ".join)


WILD = st.one_of(ANY_TEXT.map(lambda text: [text]), ANY_TEXT.map(lambda text: [f"--{text}"]), PATHS.map(lambda p: [p]),
                 st.sampled_from([["--"], ["-h"], ["here/config.toml"], ["here/deep.toml"], ["tiny"], ["~/x.toml"]]))


def command_lines(program: str) -> st.SearchStrategy[tuple[str, list[str], list[str]]]:
    """(program, arguments, the lines of here/config.toml)."""
    kinds = {}
    for cls in PROGRAMS[program]:
        kinds |= get_type_hints(cls)
    options = st.sampled_from(sorted(kinds)).flatmap(lambda key: words(key, kinds[key]))
    drawn = st.lists(st.one_of(*[options] * 9, WILD), min_size=1, max_size=3)
    tables = st.sampled_from([[], ["flops"], ["speed"], ["decode"], ["nowhere"]] if program == "bench" else [[]])
    argv = st.tuples(tables, drawn).map(lambda pair: [*pair[0], *(word for some in pair[1] for word in some)])
    return st.tuples(st.just(program), argv, st.lists(toml_line(kinds), max_size=2))


# ---- what comes of it


def start(*_, **__):
    raise Started


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a run, in which the programs are called; nothing in it is changed by what is refused."""
    tmp = tmp_path_factory.mktemp("lines")
    (tmp / "here").mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main(options(tmp / "here", "run", max_iters=1, n_layer=1, final_eval_iters=1)) == 0
    (tmp / "here" / "text.txt").write_text("some text\n" * 99)
    (tmp / "here" / "deep.toml").write_text("a = " + "[" * 50_000)
    (tmp / "here" / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as nobody, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp)  # its name must be short
        nobody.bind("here/socket")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp)
        patch.setenv("HOME", str(tmp / "here"))
        kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for name in ("machine.matmul_peak", "bench.matmul_peak"):
            patch.setattr(name, lambda device, dtype, n=0: 1e12)
        for module in (sample, bench):
            patch.setattr(module, "copy_bandwidth", lambda device: 1e9)
        # where a run starts: with its first step, its first token, its first measurement
        patch.setattr(train, "train_step", start)
        patch.setattr(train, "evaluate", lambda *_, **__: {"val_loss": 1.0})
        patch.setattr(sample, "generate", start)
        patch.setattr(bench, "Contestant", start)
        patch.setattr(bench, "in_child", start)
        # what takes seconds and has its own tests: the plans, and layers by the thousand
        patch.setattr(train, "plan_lines", lambda *_: iter(()))
        patch.setattr(bench, "step_bytes", lambda *_: (1, 1))
        patch.setattr(bench, "gc", SimpleNamespace(collect=lambda: None))
        patch.setattr(limits, "total_memory", lambda device: 2**29)
        patch.setattr("model.DEEPEST", 64)
        yield tmp
        for number, handler in kept.items():
            signal.signal(number, handler)


def outcome(program: str, argv: list[str]) -> str:
    """What a command line comes to."""
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        try:
            code = {"train": train, "sample": sample, "bench": bench}[program].main(argv)
        except Started:
            return "started"
        except UserError as error:
            seen = [c.isprintable() or unicodedata.category(c) == "Zs" for c in str(error)]  # a path may have any space
            assert seen and all(seen), repr(str(error))
            assert said.getvalue() == "" or program != "train"
            return "refused"
        except SystemExit as ended:
            code = ended.code
    if code == 1 and program == "bench":  # of all tables one was refused, in its line
        failures = [line for line in said.getvalue().splitlines() if line.startswith("failed: ")]
        assert failures and all(line.startswith("failed: UserError: ") for line in failures), failures
        return "refused"
    assert code == 0, (code, said.getvalue(), told.getvalue())
    return "ended"


def try_one(here: Path, case: tuple[str, list[str], list[str]]) -> str:
    program, drawn, lines = case
    (here / "here" / "config.toml").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    small = [f"--{key}={value}" for key, value in SHAPE.items()]
    base = {"train": [*small, "--data=here/text.txt", "--tokenizer=bytes", "--out_dir=here/new", "--eval_iters=1",
                      "--cache_dir=here/cache", "--n_layer=2", "--device=cpu", "--sample_tokens=0"],
            "sample": ["--out_dir=here/run", "--device=cpu"],
            "bench": [*small, "--n_layer=2", "--device=cpu", "--rounds=1"]}[program]  # fmt: skip
    argv = drawn[:1] + base + drawn[1:] if program == "bench" and not drawn[0].startswith("-") else base + drawn
    try:
        return outcome(program, argv)
    finally:
        shutil.rmtree(here / "here" / "new", ignore_errors=True)


@pytest.mark.faults
@pytest.mark.parametrize("examples", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_random_command_line_ends_runs_or_is_refused_in_one_line(here, examples):
    outcomes: Counter[str] = Counter()

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.one_of(*map(command_lines, PROGRAMS)))
    def check(case):
        outcomes[try_one(here, case)] += 1

    check()
    assert min(outcomes[kind] for kind in ("started", "refused")) > examples / 10, outcomes
