"""One road for configuration: `python train.py [config/x.toml ...] [--key=value ...]`, read in order, later wins.

The keys are the fields of plain dataclasses of int, float, bool, str, AnyPath (a str, in which ~ is the home folder),
bool | AnyPath (a switch that may be a path) and tuple[str, ...], an option that may be given several times; a field's
trailing comment is its --help text. `parse` reads files and options into a dict, `build` makes the dataclasses of it,
`to_toml` writes a file that `parse` reads back to the same values, `cli` runs a main function, what a run says goes
through `say`, `command` is a line for the shell that runs a program.
Unknown keys and wrong types are a UserError; a programmer's mistake is a TypeError.
Left out: exec, tables, lists, None, environment variables.
"""

import difflib
import errno
import gc
import glob
import inspect
import io
import json
import math
import os
import re
import shlex
import sys
import tomllib
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import NewType, get_type_hints

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)  # what a stdout's print may raise
AnyPath = NewType("AnyPath", str)
REPEATED = tuple[str, ...]
SWITCH = bool | AnyPath
INTS = range(-(2**63), 2**63)  # what torch, numpy and the log can hold
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # what editors make of two of them
BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
EXPECTED = {
    int: "an int of 64 bits: give a whole number, e.g. 1000",
    float: "a finite float: give a number, e.g. 3e-4",
    bool: "a bool: give true or false",
    str: "a str: give UTF-8 text (in quotes in a file)",
    AnyPath: "a path: give UTF-8 text (in quotes in a file)",
    SWITCH: "a bool or a path: give true, false or UTF-8 text (in quotes in a file)",
    REPEATED: "a list of str: give UTF-8 text, several times for several (a list in a file)",
}


def breaks(character: str) -> bool:
    """Whether it ends a line, steers a terminal or cannot be shown; other spaces than the plain one are none."""
    return unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")


class UserError(ValueError):
    """Bad input by the user. Its text is one line, whatever is in it: the value, the reason, the remedy."""

    def __init__(self, text: str):
        super().__init__("".join(repr(c)[1:-1] if breaks(c) else c for c in text))


def need(config: object, names: str, holds: bool, remedy: str) -> None:
    """A check in a dataclass's __post_init__: UserError, with the values of `names` and the remedy, unless `holds`."""
    if not holds:
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in names.split())
        raise UserError(f"{values}: {remedy}")


def need_file(config: object, name: str) -> None:
    """A check of the option of a file to write, "" = none: UserError where it cannot be written, before any work."""
    path = getattr(config, name)
    need(config, name, os.path.isdir(os.path.dirname(path) or "."), "its folder does not exist: make it first")
    is_file = os.path.isfile(path) or not os.path.lexists(path)  # it will be replaced: no folder, no device, no link
    need(config, name, is_file, "it is no file: name another")


def key_types(types: tuple[type, ...]) -> dict[str, type]:
    """Every key of the dataclasses with its type."""
    kinds: dict[str, type] = {}
    for cls in types:
        for name, kind in get_type_hints(cls).items():
            if kind not in EXPECTED or name in kinds:
                raise TypeError(f"{cls.__name__}.{name}: give it a type of EXPECTED, and a name of its own")
            kinds[name] = kind
    return kinds


def known(name: str, kinds: dict[str, type], where: str = "") -> str:
    """`name` as the key it stands for; otherwise a UserError that names the nearest ones."""
    key = name.replace("-", "_")
    if key in kinds:
        return key
    near = difflib.get_close_matches(key.lower(), kinds, n=3)
    hint = f"did you mean {', '.join(near)}? (--help lists every key)" if near else "--help lists every key"
    raise UserError(f"{where}unknown key {name!r}: {hint}")


def at_home(path: str) -> str:
    """`path` with a home folder for a leading ~ or ~user; UserError where there is no such user, and for no path."""
    if not path:
        raise UserError("'' is an empty path: name a file or a folder")
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(f"{path!r}: there is no such user: write {shlex.quote(f'./{path}')} if that is a file's name")
    return found


def usable_path(path: str, where: str) -> str:
    """`at_home(path)`, or an empty one; UserError where the system takes it for no path, or lets nobody look there, and
    where a command with it, in one line, could not be typed again."""
    if not path:
        return path
    found = at_home(path)
    if any(map(breaks, found)):
        raise UserError(f"{where}{path!r}: it has a character that cannot be shown: give another path, or rename it")
    try:
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be made; if not, whoever needs it says what is missing
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{where}{path!r}: {reason}: give another path") from None
    return found


def shown(value: object) -> str:
    """`value` in an error. Python writes out no whole number of thousands of digits."""
    if type(value) is int and value not in INTS:
        return f"a number of {value.bit_length()} bits"
    return repr(value)


def number(text: str, kind: type) -> int | float:
    """A number in plain digits: int() and float() also take those of other scripts, and underscores. ValueError."""
    if not text.isascii() or "_" in text:
        raise ValueError
    return kind(text)


def typed(value: object, kind: type, where: str, text: bool = False) -> int | float | bool | str | tuple:
    """`value` as a `kind`, or a UserError. Only an option is `text` to convert; a file has types and keeps them."""
    if kind == REPEATED and isinstance(value, (str, list, tuple)):
        several = [value] if isinstance(value, str) else value
        return tuple(typed(one, str, where) for one in several)
    expected = EXPECTED[kind]
    if kind == SWITCH:
        is_text = isinstance(value, str) and not (text and value.lower() in BOOLS)
        kind = str if is_text else bool
    result = value
    try:
        if text and kind is bool:
            result = BOOLS[value.lower()]
        elif text and kind in (int, float):
            result = number(value, kind)
        elif kind is float and type(value) is int:
            result = float(value)
        valid = type(result) is (str if kind is AnyPath else kind)
        if type(result) is float:
            valid &= math.isfinite(result)
        elif type(result) is int:
            valid &= result in INTS
        elif type(result) is str:
            result.encode()  # an argument that is not UTF-8 has lone surrogates, which no TOML file can hold
    except (KeyError, ValueError, OverflowError):
        valid = False
    if not valid:
        raise UserError(f"{where}{shown(value)} is not {expected}")
    return result


def asked_for(value: object, kind: type, where: str, text: bool = False) -> int | float | bool | str | tuple:
    """`typed`, of what the user has given just now: a path must be usable, which a stored one need not be any more."""
    result = typed(value, kind, where, text)
    if kind is AnyPath or (kind == SWITCH and isinstance(result, str)):
        return usable_path(result, where)
    return result


def no_file(word: str) -> UserError:
    """The error for an argument that is neither an option nor an existing .toml file, with the likely intention."""
    if "=" in word or word.startswith(tuple(DASHES)):
        return UserError(f"{word!r} is no file: options have two dashes, write "
                         + shlex.quote(f"--{word.lstrip(DASHES)}"))
    reason = "does not exist"
    if os.path.isdir(word):
        reason = "is a directory"
    elif os.path.exists(word):
        reason = "is no regular file" if word.endswith(".toml") else "is not a .toml file"
    paths = glob.glob("config/*.toml")
    folder = os.path.dirname(word)
    if not folder or os.path.isdir(folder):
        paths += glob.glob(os.path.join(glob.escape(folder), "*.toml"))
    stems = {os.path.basename(path).removesuffix(".toml"): path for path in reversed(paths) if os.path.isfile(path)}
    near = difflib.get_close_matches(os.path.basename(word).removesuffix(".toml"), stems, n=1)
    remedy = f"did you mean {stems[near[0]]}?" if near else "give a .toml file or --key=value (see --help)"
    return UserError(f"{word!r} {reason}: {remedy}")


def read_toml(path: str, kinds: dict[str, type]) -> dict:
    """The keys of one flat TOML file, typed. UserErrors name the file."""
    path = at_home(path)
    if not path.endswith(".toml") or not (os.path.isfile(path) or os.path.isdir(path)):
        raise no_file(path)
    try:
        with open(path, encoding="utf-8-sig") as file:  # -sig: some Windows editors put a byte order mark
            text = file.read()
        table = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{path!r} cannot be read: {error.strerror}, give a readable .toml file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path!r} is not UTF-8: save it as UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{path!r} is nested too deeply: keys are flat, write key = value lines only") from None
    except ValueError as error:  # TOMLDecodeError, which gives no line number at the end, or too many digits
        reason = str(error).replace("end of document", f"the end, line {len(text.splitlines())}")
        raise UserError(f"{path!r} is not valid TOML: {reason}") from None
    given = {}
    for name, value in table.items():
        listed = isinstance(value, list) and kinds.get(name.replace("-", "_")) != REPEATED
        if listed or isinstance(value, dict):
            raise UserError(f"{path}: {name!r} is a table or a list: keys are flat, write key = value lines only")
        key = known(name, kinds, f"{path}: ")
        given[key] = asked_for(value, kinds[key], f"{path}: {key} = ")
    return given


def parse(argv: list[str], *types: type, doc: str = "", base: dict | None = None, unread: Collection[str] = ()) -> dict:
    """Files and options of `argv` in order, later wins: only the given keys, with typed values. Raises UserError.
    `base` are the program's own defaults, for --help. Of what it leaves `unread`, an option is a UserError; a file may
    have it, for other programs."""
    kinds, given, rest = key_types(types), {}, list(argv)
    repeated: dict[str, tuple] = {}
    if "-h" in rest or "--help" in rest:  # before all else, so that it also helps beside a mistake
        print(help_text(types, doc, base or {}, unread))
        raise SystemExit(0)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            stored = read_toml(arg, kinds)
            given |= stored
            repeated = {key: values for key, values in repeated.items() if key not in stored}
            continue
        name, equals, text = arg[2:].partition("=")
        key = known(name, kinds)
        if key in unread:
            raise UserError(f"--{key}: this program does not read it: leave it out")
        if not equals and kinds[key] in (bool, SWITCH):
            is_path = kinds[key] == SWITCH and rest and not rest[0].startswith("-") and not rest[0].endswith(".toml")
            text = rest.pop(0) if rest and (rest[0].lower() in BOOLS or is_path) else "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key} needs a value: write --{key}=VALUE")
            text = rest.pop(0)
        if kinds[key] in (AnyPath, SWITCH) and not text:  # such as that of a variable which is not set
            raise UserError(f"--{key}='' is an empty path: name one, or leave the option out")
        given[key] = asked_for(text, kinds[key], f"--{key}=", text=True)
        if kinds[key] == REPEATED:
            given[key] = repeated[key] = repeated.get(key, ()) + given[key]
    return {key: value for key, value in given.items() if key not in unread}


def build(given: dict, *types: type, base: dict | None = None) -> tuple:
    """One instance of each dataclass: defaults < `base` (a stored run's) < `given`. Raises UserError."""
    kinds = key_types(types)
    values: dict = {}
    for name, value in [*(base or {}).items(), *given.items()]:
        key = known(name, kinds)
        values[key] = typed(value, kinds[key], f"{key} = ")
    return tuple(cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}) for cls in types)


def literal(value: int | float | bool | str | tuple) -> str:
    """`value` in TOML. JSON escapes strings as TOML does, except for DEL; ASCII-only JSON would make surrogates."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def to_toml(*configs: object) -> str:
    """The configurations as flat TOML (write it as UTF-8), which `parse` reads back to the same values."""
    kinds = key_types(tuple(type(config) for config in configs))
    lines = []
    for config in configs:
        lines.append(f"# {type(config).__name__}")
        for key in (field.name for field in fields(config)):
            lines.append(f"{key} = {literal(typed(getattr(config, key), kinds[key], f'{key} = '))}")
        lines.append("")
    return "\n".join(lines)


def field_comments(cls: type) -> dict[str, str]:
    """The comment behind each field, `name: type = default  # comment`, "" where there is none."""
    found = dict(re.findall(r"^ +(\w+): [^#\n]* = [^#\n]*  # (.*)", inspect.getsource(cls), re.MULTILINE))
    return {f.name: found.get(f.name, "") for f in fields(cls)}


HOW_READ = "Read in order, later wins. Also --key value; --key alone sets a bool to true."


def help_text(types: tuple[type, ...], doc: str, base: dict, unread: Collection[str]) -> str:
    """`doc`, the usage, and every key but those `unread` with its default, of `base` or else its own, and its comment,
    by dataclass."""
    lines = [doc.strip(), ""] if doc else []
    if not doc.startswith("usage: "):
        lines += [f"usage: python {os.path.basename(sys.argv[0])} [config/x.toml ...] [--key=value ...]", HOW_READ]
    for cls in types:
        comments = field_comments(cls)
        options = {f.name: f"  --{f.name}={literal(base.get(f.name, f.default))}" for f in fields(cls)
                   if f.name not in unread}  # fmt: skip
        width = max(map(len, options.values()))
        lines += ["", cls.__name__, *(f"{text:{width}}  {comments[key]}".rstrip() for key, text in options.items())]
    return "\n".join(lines)


def command(program: str, *words: str, **options: int | float | str) -> str:
    """What to type to run a program of this project from the present folder, quoted for the shell."""
    path = Path(__file__).with_name(program)
    if path.parent == Path.cwd():
        path = path.relative_to(path.parent)
    given = [f"--{name}={value}" for name, value in options.items()]
    return shlex.join(["python", str(path), *words, *given])


def say(text: str, error: bool = False) -> bool:
    """Print to stdout, an `error` to stderr, at once. False where nobody reads it any more. What else may be wrong with
    a stream, which is closed, full, or somebody's object, is no reason to end a run: the text is lost then."""
    try:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)
    except ConnectionError:  # a broken pipe is one
        return False
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError):
        return True
    return True


def open_streams() -> None:
    """stdout and stderr to write to, whatever this process was started with."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before Python began
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end a run


def flush_stdout() -> OSError | None:
    """Why what was printed cannot be written, if it cannot; Python would complain once more at its exit."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    except ValueError:  # it was closed
        return None
    return None


def cli(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(sys.argv[1:])` as the program: a UserError is one line and exit code 2, Ctrl-C is exit code 130; what
    was printed and cannot be written is 1."""
    open_streams()
    problem = None
    try:
        code = main(sys.argv[1:]) or 0
    except BrokenPipeError:  # the reader, such as head, has seen enough
        code = 1
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        problem, code = error, 0
    except UserError as error:
        say(f"error: {error}", error=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:  # --help
        code = end.code or 0
    problem = flush_stdout() or problem
    if problem and not code:
        code = 1
        if not isinstance(problem, ConnectionError):
            say(f"error: the output cannot be written ({problem.strerror})", error=True)
    gc.freeze()  # Python would look through all that torch has made for cycles, which takes it a second
    sys.exit(code)
