"""configurator.py: what is given is what arrives, typed; every mistake is one line that names the remedy.

Each error kind has its row in ERRORS with the words its message must hold; the program's behaviour (exit code, stderr)
is tested from outside, in a process of its own.
"""

import math
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path

import pytest

from configurator import AnyPath, UserError, build, cli, command, field_comments, need, parse, to_toml

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Shape:
    dim: int = 384  # width of the "stream" # in channels
    batch_size: int = 8  # sequences per step
    pattern: "str" = "MMCCC"  # one letter per layer
    seed: int = 1  # of the weights
    bare: str = "# no comment"

    def __post_init__(self):
        if self.dim % 2:
            raise UserError(f"dim = {self.dim} is odd: give an even one")


@dataclass
class Run:
    learning_rate: float = 3e-4  # peak of the schedule
    compile: bool = False  # fuse with torch.compile
    out_dir: str = "out"  # where it is saved


@dataclass(frozen=True)
class Places:
    folder: AnyPath = "here"  # a path
    count: int = 1  # of them


@dataclass(frozen=True)
class Several:
    prompt: tuple[str, ...] = ("import",)  # texts to go on from
    stop: tuple[str, ...] = ()  # ends
    count: int = 1  # of each


@pytest.fixture
def toml(tmp_path, monkeypatch):
    """Writes a file into the current folder, which is empty at first, and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "a.toml") -> str:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


def same(got: object, want: object) -> bool:
    """Equal in value and in type: 1 is not True and not 1.0."""
    return got == want and type(got) is type(want)


@pytest.mark.parametrize("argv, key, value", [
    (["--dim=64"], "dim", 64),
    (["--dim", "64"], "dim", 64),
    (["--dim", "-1"], "dim", -1),
    (["--dim=-1"], "dim", -1),
    (["--batch-size=2"], "batch_size", 2),
    (["--batch-size", "2"], "batch_size", 2),
    (["--learning_rate=1"], "learning_rate", 1.0),
    (["--learning_rate=1e-05"], "learning_rate", 1e-5),
    (["--learning_rate", "-.5"], "learning_rate", -0.5),
    (["--out_dir=a=b"], "out_dir", "a=b"),
    (["--out_dir=a-b"], "out_dir", "a-b"),
    (["--out_dir="], "out_dir", ""),
    (["--out_dir", ""], "out_dir", ""),
    (["--out_dir", "-x"], "out_dir", "-x"),
    (["--out_dir=--dim"], "out_dir", "--dim"),
    (["--out_dir=1"], "out_dir", "1"),
    (["--pattern=true"], "pattern", "true"),
    (["--compile"], "compile", True),
    *[([f"--compile={text}"], "compile", True) for text in ("true", "TRUE", "Yes", "1")],
    *[([f"--compile={text}"], "compile", False) for text in ("false", "False", "NO", "0")],
    (["--compile", "No"], "compile", False),
    (["--dim=2", "--dim=4"], "dim", 4),
])
def test_option(argv, key, value):
    given = parse(argv, Shape, Run)
    assert list(given) == [key] and same(given[key], value)


def test_flag_consumes_only_a_bool(toml):
    assert parse(["--compile", "no", "--dim=2"], Shape, Run) == {"compile": False, "dim": 2}
    assert parse(["--compile", "--dim=2"], Shape, Run) == {"compile": True, "dim": 2}
    assert parse(["--compile", toml("dim = 2")], Shape, Run) == {"compile": True, "dim": 2}


@dataclass(frozen=True)
class Switch:
    resume: bool | AnyPath = False  # a switch, or a path
    dim: int = 1  # width


def test_a_switch_is_a_bool_or_a_text(toml):
    for argv, value in ((["--resume"], True), (["--resume=No"], False), (["--resume", "true"], True),
                        (["--resume=a/b.pt"], "a/b.pt"), (["--resume", "a/b.pt", "--dim=2"], "a/b.pt"),
                        (["--resume", "--dim=2"], True), (["--resume", toml("dim = 2")], True),
                        ([toml("resume = true", "b.toml")], True),
                        ([toml('resume = "true"', "c.toml")], "true")):  # fmt: skip
        given = parse(argv, Switch)
        assert same(given["resume"], value), argv
        (built,) = build(given, Switch)
        assert build(parse([toml(to_toml(built), "d.toml")], Switch), Switch) == (built,)
    with pytest.raises(UserError, match="--resume='' is an empty path: name one, or leave the option out"):
        parse(["--resume="], Switch)
    with pytest.raises(UserError, match="resume = 3 is not a bool or a path: give true, false or"):
        parse([toml("resume = 3")], Switch)


def test_only_given_keys():
    assert parse([], Shape, Run) == {}
    assert parse(["--dim=384"], Shape, Run) == {"dim": 384}


def test_position_decides(toml):
    a, b = toml("dim = 2\nseed = 2"), toml("dim = 4", "b.toml")
    assert parse([a, b], Shape) == {"dim": 4, "seed": 2}
    assert parse([b, a], Shape) == {"dim": 2, "seed": 2}
    assert parse([a, "--dim=6"], Shape) == {"dim": 6, "seed": 2}
    assert parse(["--dim=6", "--seed", "3", a], Shape) == {"dim": 2, "seed": 2}
    assert parse([a, "--seed=3", b], Shape) == {"dim": 4, "seed": 3}


def test_file_types(toml):
    text = '\ufeff# made on Windows\r\nlearning_rate = 1\r\nbatch-size = 4\r\ncompile = true\r\nout_dir = "é"\r\n'
    given = parse([toml(text)], Shape, Run)
    assert given == {"learning_rate": 1.0, "batch_size": 4, "compile": True, "out_dir": "é"}
    assert type(given["learning_rate"]) is float and type(given["compile"]) is bool


# argv, the text of a.toml (or None), the words of the message
ERRORS = {
    "typo": (["--learning_rat=1"], None, ["unknown key 'learning_rat': did you mean learning_rate? (--help"]),
    "case": (["--DIM=1"], None, ["'DIM'", "did you mean dim?"]),
    "nothing near": (["--zzzz=1"], None, ["unknown key 'zzzz': --help lists every key"]),
    "newline in a key": (["--di\nm=1"], None, ["unknown key", "dim"]),
    "a long dash": (["\u2014dim=3"], None, ["'\u2014dim=3' is no file: options have two dashes, write --dim=3"]),
    "a short one": (["\u2013\u2013dim"], None, ["write --dim"]),
    "no dashes, to be pasted": (["data=it's a text"], None, ["""write '--data=it'"'"'s a text'"""]),
    "two dashes": (["--"], None, ["unknown key ''"]),
    "word for int": (["--dim=big"], None, ["--dim='big'", "int", "whole number"]),
    "exponent for int": (["--dim=1e3"], None, ["--dim='1e3'", "int"]),
    "float for int": (["--dim", "3.0"], None, ["--dim='3.0'", "int"]),
    "empty int": (["--dim="], None, ["--dim=''", "int"]),
    "digits of another script": (["--dim=٦٤"], None, ["--dim='٦٤'", "int"]),
    "underscores": (["--dim=6_4"], None, ["--dim='6_4'", "int"]),
    "float with underscores": (["--learning_rate=1_0.5"], None, ["'1_0.5'", "float"]),
    "float of another script": (["--learning_rate=٣.٥"], None, ["'٣.٥'", "float"]),
    "hexadecimal": (["--dim=0x10"], None, ["'0x10'", "int"]),
    "beyond 64 bits": ([f"--dim={2**63}"], None, [f"'{2**63}'", "64 bits"]),
    "below 64 bits": ([f"--dim={-(2**63) - 1}"], None, ["64 bits"]),
    "NUL in a file's name": (["a\0b/c.toml"], None, ["does not exist", "\\x00"]),
    "no such user": (["~nobody-at-all/a.toml"], None, ["~nobody-at-all/a.toml", "no such user"]),
    "no such user's": (["~nobody-at-all/it's.toml"], None, ["""write './~nobody-at-all/it'"'"'s.toml' if"""]),
    "line break in a name": (["a\nb\u2028c.toml"], None, ["does not exist", "a\\nb\\u2028c"]),
    "line break in a value": (["--dim=1\r\n2"], None, ["--dim=", "\\r\\n2", "int"]),
    "huge int": (["--dim=" + "9" * 5000], None, ["--dim=", "int"]),
    "word for float": (["--learning_rate=fast"], None, ["'fast'", "float", "3e-4"]),
    "empty float": (["--learning_rate="], None, ["float"]),
    "nan": (["--learning_rate=nan"], None, ["'nan'", "finite"]),
    "inf": (["--learning_rate=-inf"], None, ["'-inf'", "finite"]),
    "overflow": (["--learning_rate=1e999"], None, ["finite"]),
    "word for bool": (["--compile=maybe"], None, ["'maybe'", "true or false"]),
    "empty bool": (["--compile="], None, ["true or false"]),
    "not UTF-8": (["--out_dir=\udcff"], None, ["UTF-8"]),
    "value missing": (["--dim"], None, ["--dim needs a value", "--dim=VALUE"]),
    "value is an option": (["--out-dir", "--dim=2"], None, ["--out_dir needs a value"]),
    "no dashes": (["learning_rate=1"], None, ["'learning_rate=1'", "write --learning_rate=1"]),
    "one dash": (["-dim=2"], None, ["'-dim=2'", "write --dim=2"]),
    "missing file": (["config/b.toml"], None, ["'config/b.toml' does not exist", ".toml file or --key=value"]),
    "near file": (["aa.toml"], "", ["'aa.toml' does not exist", "did you mean a.toml?"]),
    "near config": (["tinny"], None, ["'tinny' does not exist", "did you mean config/tiny.toml?"]),
    "prompt-long word": (["word " * 1000], None, ["does not exist"]),
    "directory": (["config"], None, ["'config' is a directory"]),
    "toml directory": (["dir.toml"], None, ["'dir.toml' cannot be read", "directory"]),
    "not .toml": (["notes.txt"], None, ["'notes.txt' is not a .toml file"]),
    "not UTF-8 file": (["a.toml"], b"dim = 2 # \xff", ["'a.toml'", "UTF-8"]),
    "invalid TOML": (["a.toml"], "dim = 2\nseed 3\n", ["'a.toml' is not valid TOML", "line 2"]),
    "TOML cut short": (["a.toml"], 'dim = 2\nout_dir = """x', ["'a.toml' is not valid TOML", "line 2"]),
    "key twice": (["a.toml"], "dim = 2\ndim = 3\n", ["not valid TOML", "line 2"]),
    "table": (["a.toml"], "[model]\ndim = 2", ["a.toml: 'model' is a table", "flat"]),
    "dotted key": (["a.toml"], "model.dim = 2", ["a.toml: 'model' is a table"]),
    "list": (["a.toml"], "dim = [2]", ["a.toml: 'dim'", "list"]),
    "typo in file": (["a.toml"], "dmi = 2", ["a.toml: unknown key 'dmi': did you mean dim?"]),
    "str for int in file": (["a.toml"], 'dim = "2"', ["a.toml: dim = '2'", "int"]),
    "float for int in file": (["a.toml"], "dim = 2.0", ["a.toml: dim = 2.0", "int"]),
    "bool for int in file": (["a.toml"], "dim = true", ["a.toml: dim = True", "int"]),
    "bool for float in file": (["a.toml"], "learning_rate = true", ["float"]),
    "int for bool in file": (["a.toml"], "compile = 1", ["compile = 1", "true or false"]),
    "int for str in file": (["a.toml"], "out_dir = 1", ["out_dir = 1", "quotes"]),
    "date for str in file": (["a.toml"], "out_dir = 2020-01-01", ["a.toml: out_dir", "str"]),
    "nan in file": (["a.toml"], "learning_rate = nan", ["nan", "finite"]),
    "beyond 64 bits in file": (["a.toml"], f"dim = {2**63}", ["dim = a number of 64 bits", "an int of 64 bits"]),
    "hexadecimal of 5000 digits": (["a.toml"], "dim = 0x" + "f" * 5000, ["a number of 20000 bits", "int"]),
    "the same for float": (["a.toml"], "learning_rate = 0x" + "f" * 5000, ["a number of 20000 bits", "float"]),
    "nested deeply": (["a.toml"], "out_dir = " + "[" * 50_000, ["'a.toml' is nested too deeply", "flat"]),
    "nested deeply in tables": (["a.toml"], "out_dir = " + "{a = " * 50_000, ["'a.toml' is nested too deeply", "flat"]),
    "line break in a key of a file": (["a.toml"], '"di\\nm" = 1', ["unknown key 'di\\nm'"]),
    "int too large for float": (["a.toml"], "learning_rate = 1" + "0" * 400, ["finite"]),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", ERRORS)
def test_error(name, toml):
    argv, text, words = ERRORS[name]
    toml("", "config/tiny.toml"), toml("", "notes.txt"), Path("dir.toml").mkdir()
    if text is not None:
        toml(text)
    with pytest.raises(UserError) as caught:
        parse(argv, Shape, Run)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.faults
@pytest.mark.parametrize("argv", [["--folder=~/a b"], ["--folder", "~/a b"], ["a.toml"]])
def test_a_leading_tilde_is_the_home_folder(argv, toml, monkeypatch):
    """On the command line, in a file and in the name of a file; elsewhere it is a character."""
    monkeypatch.setenv("HOME", str(Path.cwd()))
    toml('folder = "~/a b"')
    assert parse(argv, Places)["folder"] == f"{Path.cwd()}/a b"
    assert parse(["~/a.toml"], Places)["folder"] == f"{Path.cwd()}/a b"
    for plain in ("a~", "./~", "a/~/b"):
        assert parse([f"--folder={plain}"], Places) == {"folder": plain}
    assert parse([toml(to_toml(Places("~")))], Places)["folder"] == str(Path.cwd())
    assert parse([toml('folder = ""')], Places) == {"folder": ""}
    with pytest.raises(UserError, match="--folder='' is an empty path: name one, or leave the option out"):
        parse(["--folder", ""], Places)


@pytest.mark.faults
@pytest.mark.parametrize("path, words", [
    ("~nobody-at-all/x", ["'~nobody-at-all/x'", "no such user", "write './~nobody-at-all/x'"]),
    ("a" * 300, ["File name too long: give another path"]),
    ("a/" * 3000, ["File name too long: give another path"]),
    ("a\0b", ["'a\\x00b'", "a character that cannot be shown: give another path"]),
    ("a\tb", ["'a\\tb'", "a character that cannot be shown"]), ("a\nb", ["'a\\nb'", "cannot be shown"]),
    ("a\x1b[31m", ["cannot be shown"]), ("a\u2028b", ["cannot be shown"]), ("\x7f", ["cannot be shown"]),
    ("loop/x", ["'loop/x'", "Too many levels of symbolic links"]),
    ("\udcff", ["a path: give UTF-8 text"]),
])
def test_a_path_that_cannot_be_is_one_line(path, words, toml):
    os.symlink("loop", "loop")
    with pytest.raises(UserError) as caught:
        parse([f"--folder={path}"], Places)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.faults
def test_a_folder_without_permission_is_one_line(toml, monkeypatch):
    def denied(path):  # chmod would not stop root
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("configurator.os.stat", denied)
    with pytest.raises(UserError, match="^--folder='x/y': Permission denied: give another path$"):
        parse(["--folder=x/y"], Places)


def test_a_stored_path_need_not_be_usable_any_more():
    assert build({}, Places, base={"folder": "a" * 300}) == (Places("a" * 300),)


@pytest.mark.faults
def test_an_error_is_one_line_whatever_is_in_it():
    text = str(UserError("a\nb\r\x1b[31m\u2028\x85\udcff 'é'\t"))
    assert text == "a\\nb\\r\\x1b[31m\\u2028\\x85\\udcff 'é'\\t" and text.isprintable()
    shown = "a\xa0b\u3000c\u202fé 字"  # spaces that a path may have, and that a command with it must keep
    assert str(UserError(shown)) == shown
    assert str(UserError("\ue000\u0378\u2029\0")) == "\\ue000\\u0378\\u2029\\x00"


@pytest.mark.faults
@pytest.mark.parametrize("argv", [["--folder=a\tb"], ["--folder", "a\tb"], ["a.toml"], ["--folder=~/x"]])
def test_a_path_that_no_line_can_show_is_refused_wherever_it_comes_from(argv, toml, monkeypatch):
    toml('folder = "a\\tb"')
    monkeypatch.setenv("HOME", "/home/a\tb")
    with pytest.raises(UserError, match="folder ?= ?.*it has a character that cannot be shown: give another path"):
        parse(argv, Places)
    assert parse(["--folder=a\xa0b"], Places) == {"folder": "a\xa0b"}


@pytest.mark.faults
def test_a_pipe_is_no_file_of_options(toml):
    os.mkfifo("pipe.toml")
    with pytest.raises(UserError, match="'pipe.toml' is no regular file: give a .toml file or --key=value"):
        parse(["pipe.toml"], Places)


def test_a_command_is_quoted_for_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = command("sample.py", "a b.toml", out_dir="it's; a $HOME\nof mine", top_p=0.5)
    words = ["python", "sample.py", "a b.toml", "--out_dir=it's; a $HOME\nof mine", "--top_p=0.5"]
    assert shlex.split(line) == words
    monkeypatch.chdir(tmp_path)
    assert shlex.split(command("sample.py"))[1] == str(ROOT / "sample.py")


# ---- options that may be given several times


@pytest.mark.parametrize("argv, texts", [
    (["--prompt=a"], ("a",)),
    (["--prompt=a", "--prompt=b"], ("a", "b")),
    (["--prompt=a", "--count=2", "--prompt", "b", "--prompt=a"], ("a", "b", "a")),
    (["--prompt", "-x"], ("-x",)),
    (["--prompt=--count"], ("--count",)),
    (["--prompt="], ("",)),
    (["--prompt", ""], ("",)),
    (["--prompt=a,b"], ("a,b",)),
    (['--prompt=["a", "b"]'], ('["a", "b"]',)),
])
def test_repeated_options(argv, texts):
    given = parse(argv, Several, Run)
    assert same(given["prompt"], texts)
    assert build(given, Several)[0].prompt == texts


def test_repeated_options_replace_the_default_and_a_file_before_them(toml):
    assert build({}, Several) == (Several(("import",)),)
    listed, single = toml('prompt = ["a", "b"]'), toml('prompt = "c"', "c.toml")
    empty = toml("prompt = []\nstop = []", "e.toml")
    assert parse([listed], Several) == {"prompt": ("a", "b")}
    assert parse([single], Several) == {"prompt": ("c",)}
    assert parse([listed, single], Several) == parse(["--prompt=x", listed, single], Several) == {"prompt": ("c",)}
    assert parse([listed, "--prompt=x", "--prompt=y"], Several) == {"prompt": ("x", "y")}
    assert parse(["--prompt=x", listed, "--prompt=y"], Several) == {"prompt": ("y",)}
    assert parse([empty], Several) == {"prompt": (), "stop": ()}
    assert parse(["--prompt=x", "--stop=y", "--prompt=z"], Several) == {"prompt": ("x", "z"), "stop": ("y",)}


@pytest.mark.parametrize("argv, text, words", [
    (["--prompt"], "", ["--prompt needs a value"]),
    (["--prompt", "--count=2"], "", ["--prompt needs a value"]),
    (["--prompt=\udcff"], "", ["--prompt=", "UTF-8"]),
    (["a.toml"], "prompt = 1", ["a.toml: prompt = 1", "list of str"]),
    (["a.toml"], "prompt = true", ["a.toml: prompt = True", "list of str"]),
    (["a.toml"], 'prompt = ["a", 1]', ["a.toml: prompt = 1", "str"]),
    (["a.toml"], 'prompt = ["a", ["b"]]', ["a.toml: prompt = ['b']", "str"]),
    (["a.toml"], "prompt = {a = 1}", ["a.toml: 'prompt' is a table"]),
    (["a.toml"], "count = [1]", ["a.toml: 'count'", "list"]),
    (["a.toml"], 'promt = ["a"]', ["a.toml: 'promt'", "list"]),
    (["a.toml"], 'promt = "a"', ["a.toml: unknown key 'promt': did you mean prompt?"]),
])
def test_wrong_repeated_options(argv, text, words, toml):
    toml(text)
    with pytest.raises(UserError) as caught:
        parse(argv, Several)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_build_takes_a_text_or_several():
    assert build({"prompt": "a"}, Several)[0].prompt == ("a",)
    assert build({}, Several, base={"prompt": ["a", "b"]})[0].prompt == ("a", "b")
    for wrong in (1, [1], None, {"a": 1}):
        with pytest.raises(UserError, match="prompt = "):
            build({"prompt": wrong}, Several)


def test_need_names_every_value_and_the_remedy():
    need(Shape(), "dim seed", True, "never said")
    with pytest.raises(UserError) as caught:
        need(Shape(dim=2, pattern="x"), "dim pattern seed", False, "choose others")
    assert str(caught.value) == "dim=2, pattern='x', seed=1: choose others"


def test_unreadable_file(toml, monkeypatch):
    def denied(*_args, **_options):  # chmod would not stop root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(UserError, match="'a.toml' cannot be read: Permission denied"):
        parse([toml("dim = 2")], Shape)


def test_no_more_than_three_names():
    wide = make_dataclass("Wide", [(f"rate_{i}", int, 0) for i in range(6)])
    with pytest.raises(UserError) as caught:
        parse(["--rate_=1"], wide)
    assert str(caught.value).count("rate_") == 1 + 3


def test_build_order():
    shape, run = build({"dim": 2}, Shape, Run, base={"dim": 4, "batch_size": 3, "learning_rate": 1})
    assert (shape, run) == (Shape(dim=2, batch_size=3), Run(learning_rate=1.0))
    assert build({}, Shape, Run) == (Shape(), Run())
    assert build({}, Run) == (Run(),)


@pytest.mark.parametrize("given, base, words", [
    ({}, {"learning_rat": 1.0}, "unknown key 'learning_rat': did you mean learning_rate?"),
    ({"dmi": 2}, None, "did you mean dim?"),
    ({"dim": "2"}, None, "dim = '2' is not an int"),
    ({}, {"compile": 1}, "compile = 1 is not a bool"),
    ({"dim": 3}, None, r"^dim = 3 is odd: give an even one$"),
])
def test_build_errors(given, base, words):
    with pytest.raises(UserError, match=words):
        build(given, Shape, Run, base=base)


def test_programmers_mistakes():
    second = make_dataclass("Second", [("seed", int, 1)])
    for types in ((Shape, second), (make_dataclass("Odd", [("sizes", list, None)]),)):
        with pytest.raises(TypeError, match="seed|sizes"):
            parse([], *types)
        with pytest.raises(TypeError, match="seed|sizes"):
            build({}, *types)
    with pytest.raises(TypeError, match="seed"):
        to_toml(Shape(), second())


AWKWARD = ["", " ", "plain", "C:\\new\\table", "it's \"quoted\"", '"""', "'''",
           "line\nline\r\nline\ttab", "# no comment",
           "é ∑ 漢字 😀", "\x00\x01\x1f\x7f\x80\x85\u2028\ufeff", "\\u0041", "a = 1", "[table]", "{x}%s", "\b\f\\"]


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_text(text, toml):
    shape, run = Shape(pattern=text), Run(out_dir=text[::-1])
    assert build(parse([toml(to_toml(shape, run))], Shape, Run), Shape, Run) == (shape, run)


@pytest.mark.parametrize("texts", [(), ("",), tuple(AWKWARD), ("a", "a")])
def test_round_trip_repeated(texts, toml):
    several = Several(prompt=texts, stop=texts[::-1], count=3)
    assert build(parse([toml(to_toml(several))], Several), Several) == (several,)


@pytest.mark.parametrize("number", [1e-05, 0.0003, 0.1, 1 / 3, 1.0, 100000.0, 1e16, 1e22, 1.7e308, 5e-324, -0.0, 2])
def test_round_trip_numbers(number, toml):
    got = parse([toml(to_toml(Shape(dim=-(2**63)), Run(learning_rate=number, compile=True)))], Shape, Run)
    assert same(got["learning_rate"], float(number)) and repr(got["learning_rate"]) == repr(float(number))
    assert same(got["dim"], -(2**63)) and same(got["compile"], True)


def test_toml_is_complete_and_grouped(toml):
    text = to_toml(Shape(), Run())
    lines = text.splitlines()
    assert set(parse([toml(text)], Shape, Run)) == {f.name for cls in (Shape, Run) for f in fields(cls)}
    assert lines[0] == "# Shape" and lines.index("# Run") < lines.index("learning_rate = 0.0003")
    assert lines.index("dim = 384") < lines.index("# Run") and "compile = false" in lines


def test_toml_refuses_what_parse_would():
    with pytest.raises(UserError, match="finite"):
        to_toml(Run(learning_rate=math.inf))


def test_field_comments():
    assert field_comments(Shape) == {
        "dim": 'width of the "stream" # in channels', "batch_size": "sequences per step",
        "pattern": "one letter per layer", "seed": "of the weights", "bare": ""}
    assert field_comments(Run)["out_dir"] == "where it is saved"
    assert field_comments(Several)["prompt"] == "texts to go on from"


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["--dim=2", "--help"], ["--learning_rat=1", "-h"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(argv, Shape, Run, Several, doc="What it does.\n")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "What it does." and "usage: " in out and "[config/x.toml ...] [--key=value ...]" in out
    groups = [lines.index(cls.__name__) for cls in (Shape, Run, Several)] + [len(lines)]
    for cls, begin, end in zip((Shape, Run, Several), groups, groups[1:], strict=False):
        for key, comment in field_comments(cls).items():
            row = [line for line in lines[begin:end] if line.startswith(f"  --{key}=")]
            assert len(row) == 1 and row[0].endswith(comment)
    for option in ("--dim=384", "--learning_rate=0.0003", "--compile=false", '--out_dir="out"', "--stop=[]"):
        assert f"  {option} " in out


def test_help_has_the_program_s_own_defaults_and_keys(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], Shape, Run, base={"dim": 7, "other": 1}, unread={"learning_rate"})
    out = capsys.readouterr().out
    assert "--dim=7" in out and "--learning_rate" not in out and "--compile=false" in out and "other" not in out


def test_help_of_repeated_options(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], Several)
    out = capsys.readouterr().out
    assert '  --prompt=["import"]  texts to go on from' in out and "  --stop=[]" in out


PROGRAM = """
import sys
from configurator import UserError, cli, parse
from tests.test_configurator import Shape

def main(argv):
    if argv == ["interrupt"]:
        raise KeyboardInterrupt
    if argv == ["bug"]:
        raise ValueError("a bug")
    return parse(argv, Shape, doc="a program").get("seed")

cli(main)
"""


def program(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", PROGRAM, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_program_user_error():
    done = program("--dmi=3")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr == "error: unknown key 'dmi': did you mean dim? (--help lists every key)\n"


def test_program_help():
    done = program("--help")
    assert done.returncode == 0 and done.stderr == "" and "--dim=384" in done.stdout


def test_program_interrupt():
    done = program("interrupt")
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_program_bug_keeps_its_traceback():
    done = program("bug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr


@pytest.mark.parametrize("argv, code", [([], 0), (["--seed=0"], 0), (["--seed=5"], 5)])
def test_cli_returns_the_code(argv, code, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    with pytest.raises(SystemExit) as caught:
        cli(lambda args: parse(args, Shape).get("seed"))
    assert caught.value.code == code
