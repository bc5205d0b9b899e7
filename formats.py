"""Files of text: what a file is, by its content, and the texts in it.

- Read: UTF-8 text, a document a file, without a byte order mark, and JSON lines, a document a record; plain or in gzip.
- Known, with the command that makes text of it: archives and containers by their first bytes, UTF-16 and UTF-32 by
  their mark or what they decode to, tables by even rows or their suffix, notebooks and other JSON, texts of one byte a
  character by their first byte that is not UTF-8. A table or JSON under the name of a text (TEXT_SUFFIXES) is a text.
Left out: the conversion itself; telling encodings apart that differ by their language only.
"""

import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

from configurator import UserError

CHUNK = 1 << 18  # bytes or characters at once: twice as much still fits the stack of every tiktoken pattern
LONGEST = 1 << 28  # bytes of a JSON line: a file without line ends must not fill the memory
MAGIC = b"HYDRATOK"  # begins a token file


PACKED_SUFFIX = re.compile(r"\.(gz|xz|zst|bz2)$", re.IGNORECASE)


def visible(text: str) -> str:
    """A name, in which what does not print is shown escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shell_word(text: str) -> str:
    """A word for the shell, in one line whatever is in it."""
    if text.isprintable():
        return shlex.quote(text)
    shown = (chr(b) if 32 <= b < 127 and chr(b) not in "\\'" else f"\\x{b:02x}" for b in os.fsencode(text))
    return "$'" + "".join(shown) + "'"


class Unfit(NamedTuple):
    """Why a file is no text."""

    reason: str  # what it is: files are counted by it
    place: str = ""  # where that shows
    command: str = ""  # makes text of the file {path}; {name} is its name, {out} without suffix, {inner} unpacked
    advice: str = ""  # in words, before the command

    def remedy(self, path: str) -> str:
        """The advice, then the command: it ends the line, so that it can be pasted as it stands."""
        name = Path(path).name
        names = {"path": path, "name": name, "out": Path(path).stem, "inner": PACKED_SUFFIX.sub("", name)}
        command = re.sub(r"\{(path|name|out|inner)\}", lambda found: shell_word(names[found[1]]), self.command)
        return ": ".join(filter(None, (self.advice, command)))


# None writes to a name that its own file could have, in whatever folder it is pasted.
ICONV = "iconv -f %s -t UTF-8 {path} > utf8.{name}"
PANDAS = ("python -c \"import pandas, sys; pandas.%s(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)\" "
          "{path} {out}.text.jsonl")  # fmt: skip
# One value, or several behind each other, as in JSON lines; the file is made when all of them are read.
FROM_JSON = ("python -c \"import json, re, sys; t = open(sys.argv[1], encoding='utf-8-sig').read(); "
             r"d = json.loads('[' + re.sub(r'}\s*\n\s*{', '},{', t) + ']'); "
             "d = d[0] if len(d) == 1 and isinstance(d[0], list) else d; "
             "open(sys.argv[2], 'w').writelines(json.dumps(r) + chr(10) for r in d)\" {path} {out}.text.jsonl")
FROM_CSV = ('python -c "import csv, json, sys; csv.field_size_limit(2**30); [print(json.dumps(r)) for r in '
            "csv.DictReader(open(sys.argv[1], encoding='utf-8-sig', newline=''), delimiter='%s', %s)]\" {path} > "
            "{out}.text.jsonl")  # fmt: skip
FROM_NESTED = ("python -c \"import json, sys; [print(json.dumps({'text': %s})) for r in map(json.loads, "
               "filter(str.strip, open(sys.argv[1], encoding='utf-8-sig')))]\" {path} > {out}.text.jsonl")
COLUMN = "convert it and name the column of its text with --text_field"
IS_TEXT = "if it is a text as it stands, rename it to .txt, else "
AGAIN = "copy or download it again"
SHARD = Unfit("token shard", advice="name the shards *_train_*.bin and *_val_*.bin, all in one folder, and give that "
              "folder or a glob of them")  # fmt: skip
FORMATS = {  # the first bytes -> what it is
    **{magic.to_bytes(4, "little"): SHARD for magic in (20240520, 20240801)},  # shards.FORMATS
    MAGIC: Unfit("token file", advice="give the text that it was made from, or shards as `data.py shard` writes them"),
    b"PAR1": Unfit("parquet table", "", PANDAS % "read_parquet", COLUMN),
    b"PK\3\4": Unfit("zip archive", "", "python -m zipfile -e {path} unpacked.{out}"),
    b"\x28\xb5\x2f\xfd": Unfit("zstd archive", "", "zstd -dc {path} > unpacked.{inner}"),
    b"\xfd7zXZ\0": Unfit("xz archive", "", "xz -dc {path} > unpacked.{inner}"),
    b"BZh": Unfit("bzip2 archive", "", "bzip2 -dc {path} > unpacked.{inner}"),
    b"%PDF-": Unfit("PDF", "", "pdftotext {path} {out}.text.txt"),
    b"\xff\xfe\0\0": Unfit("UTF-32", "by its byte order mark", ICONV % "UTF-32"),
    b"\0\0\xfe\xff": Unfit("UTF-32", "by its byte order mark", ICONV % "UTF-32"),
    b"\xff\xfe": Unfit("UTF-16", "by its byte order mark", ICONV % "UTF-16"),
    b"\xfe\xff": Unfit("UTF-16", "by its byte order mark", ICONV % "UTF-16"),
}
IN_ZIP = {  # a folder in a zip archive -> what it is
    b"word/": Unfit("Word document", "", "pandoc -t plain {path} -o {out}.text.txt"),
    b"xl/": Unfit("Excel table", "", PANDAS % "read_excel", COLUMN),
}
TEXT_SUFFIXES = tuple(
    "." + suffix for suffix in
    "txt text md markdown rst tex log srt html htm xml yaml yml toml ini cfg py pyi c h cc cpp hpp cs java kt go rs "
    "swift js jsx ts tsx css sh bat rb php pl lua r jl hs ml scala sql asm".split())  # fmt: skip
DELIMITERS = {",": "CSV table", "\t": "TSV table", ";": "CSV table", "|": "CSV table"}
JSON_LINES = Unfit("JSON lines")  # the one that is read
EMPTY = Unfit("empty")
JSON_OBJECT = re.compile(rb'\s*(\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')
LINE_OF_JSON = re.compile(rb"\A\[|^\s*\{", re.MULTILINE)
NOTEBOOK = re.compile(rb'"(nbformat|cells)"\s*:')
CONTROLS = bytes(range(8)) + bytes(range(14, 27)) + bytes(range(28, 32))  # that a text does not have
ASCII, LATIN = bytes(range(128)), bytes(range(160, 256))
WIDE = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")


# ---- what a file is

def is_token_file(path: str | Path) -> bool:
    """Whether this project wrote it, see data.py; OSError where it cannot be read."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def is_our_shard(path: str) -> bool:
    """Whether `data.py shard` wrote it; OSError where it cannot be read."""
    if not re.fullmatch(r"text_(train|val)_\d{6}\.bin", os.path.basename(path)):
        return False
    with open(path, "rb") as file:
        return FORMATS.get(file.read(4)) is SHARD


def script(code: int) -> int:
    """A block of code points for those that a text mixes: -1 of any text, 0 of Latin, Chinese with Japanese, Korean."""
    if code < 0x80 or 0x2000 <= code < 0x2070:
        return 0 if chr(code).isalpha() else -1
    if code < 0x250 or 0x1E00 <= code < 0x1F00:
        return 0
    if 0x2E80 <= code < 0xA000 or 0xFF00 <= code < 0x10000:
        return 0x4E
    return 0xAC if 0xAC00 <= code < 0xD7B0 else code >> 8


def is_wide(head: bytes, encoding: str) -> bool:
    """Whether it is a text in one of WIDE: characters that print, of one script beside ASCII. What is ASCII itself
    would often be Chinese, two letters a character."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    printing = sum(c.isprintable() or c.isspace() for c in text)
    scripts = Counter(script(ord(c)) for c in text)
    common = scripts.pop(-1, 0)
    one = max(scripts.values(), default=0) + common + (scripts[0] if max(scripts, default=0) else 0)
    letters = sum(32 <= b < 127 for b in head)
    return len(text) > 3 and printing > 0.97 * len(text) and one > 0.9 * len(text) and letters < 0.8 * len(head)


def sniff_binary(head: bytes) -> Unfit | None:
    """Archives and containers, UTF-16 and UTF-32, whatever has a zero byte or many control characters."""
    if head.startswith(tuple(FORMATS)):
        magic = next(magic for magic in FORMATS if head.startswith(magic))
        inside = [found for folder, found in IN_ZIP.items() if magic == b"PK\3\4" and folder in head]
        return inside[0] if inside else FORMATS[magic]
    if head[257:262] == b"ustar":
        return Unfit("tar archive", "", "mkdir unpacked.{out} && tar xf {path} -C unpacked.{out}")
    controls = len(head) - len(head.translate(None, CONTROLS))
    for name in WIDE if controls > 0.01 * len(head) else ():
        if is_wide(head[:1 << 14], name):
            return Unfit(name, "without a byte order mark", ICONV % name)
    if b"\0" in head:
        return Unfit("binary", f"a zero byte at offset {head.index(0)}")
    if controls > 0.1 * len(head):
        return Unfit("binary", f"{controls} control characters in the first {len(head)} bytes")
    return None


def has_suffix(name: str, *suffixes: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(suffixes)


def table(delimiter: str, columns: list[str], quoted: bool = True) -> Unfit:
    """A table of these columns, and how to convert it."""
    options = "skipinitialspace=True" if quoted else "quoting=csv.QUOTE_NONE"
    command = FROM_CSV % (delimiter.replace("\t", r"\t"), options)
    return Unfit(DELIMITERS[delimiter], f"columns {visible(', '.join(columns))[:80]}", command, IS_TEXT + COLUMN)


def table_by_name(head: bytes, name: str) -> Unfit | None:
    """What a file *.csv or *.tsv is, however uneven its rows are: a table with the delimiter that its first line has
    most of."""
    lines = head.decode("utf-8-sig", "replace").split("\n")
    first = next(filter(None, map(str.strip, lines)), "")
    if not first or not has_suffix(name, ".csv", ".tsv"):
        return None
    likely = "\t" if has_suffix(name, ".tsv") else ","
    delimiter = max((likely, *DELIMITERS), key=first.count)  # the first of equals
    return table(delimiter, first.split(delimiter), delimiter != "\t" or '"' in first)


def sniff_table(head: bytes, name: str) -> Unfit | None:
    """CSV and TSV: rows of as many cells, two or more, none of the first row empty or with a space or a brace in front,
    as a text or a program has them. Without such a suffix three rows are needed. Tabs mostly come without quoting."""
    body = head.removeprefix(codecs.BOM_UTF8).lstrip(b"\r\n")
    first = body.partition(b"\n")[0].rstrip(b"\r")
    for delimiter in ",\t;":  # without a suffix, "|" is in many a text
        cells = first.split(delimiter.encode())
        if len(cells) < 2 or not all(cells) or any(cell[0] in b" {" for cell in cells):
            continue
        for quoted in (False, True) if delimiter == "\t" and b'""' not in body else (True,):
            rows: list[list[str]] = []
            quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            lines = io.StringIO(body.decode(errors="replace"), newline="")
            with contextlib.suppress(csv.Error):  # a cell may be larger than csv's limit
                rows.extend(csv.reader(lines, delimiter=delimiter, quoting=quoting))
            rows = [row for row in rows if row]
            width = len(rows[0]) if rows else 0
            even = width > 1 and all(len(row) == width for row in rows[:-1] or rows)  # the last one may be cut
            if even and (len(rows) >= 3 or has_suffix(name, ".csv", ".tsv")):
                return table(delimiter, rows[0], quoted)
    return None


def json_object(line: bytes) -> dict | None:
    """The JSON object of a line, None where there is none."""
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        record = json.loads(line.decode(), parse_int=lambda digits: int(digits[:4000]))  # int takes no more
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def some_keys(record: dict) -> str:
    return ", ".join(map(repr, list(record)[:6]))[:120] or "nothing"


def sniff_json(head: bytes, name: str, field: str) -> Unfit | None:
    """JSON_LINES, or what other JSON it is. JSON lines are known by an object with a text in `field` in the first line;
    where the name says so by a line that begins as one, elsewhere by one in each of the first two."""
    body = head.removeprefix(codecs.BOM_UTF8).lstrip()
    first, second = map(json_object, (body.split(b"\n", 2) + [b""])[:2])
    if first is not None and isinstance(first.get(field), str):
        return JSON_LINES
    if body.startswith(b"{") and NOTEBOOK.search(head):
        return Unfit("notebook", "", "jupyter nbconvert --to script {path}")
    listed = body.startswith(b"[") and JSON_OBJECT.match(body)
    if has_suffix(name, ".jsonl", ".ndjson", ".jsonlines") and not listed and LINE_OF_JSON.search(body):
        return JSON_LINES  # where its first line is broken, that will be named
    if first is not None and second is not None:
        return bad_line(body.split(b"\n")[0], 1, field) if has_suffix(name, *TEXT_SUFFIXES) else JSON_LINES
    if JSON_OBJECT.match(body) or (body.startswith((b"{", b"[")) and has_suffix(name, ".json", ".ipynb")):
        return Unfit("JSON that is not lines", "", FROM_JSON, IS_TEXT + "convert it")
    return None


def sniff(head: bytes, name: str, field: str) -> Unfit | None:
    """What other text than prose or a program begins with `head`, which is UTF-8."""
    return sniff_table(head, name) or sniff_json(head, name, field) or table_by_name(head, name)


def is_utf8(head: bytes) -> bool:
    """Whether it is, a character at the end of a whole chunk excepted, which may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < CHUNK)
    except UnicodeDecodeError:
        return False
    return True


def sniff_bytes(error: UnicodeDecodeError, offset: int, wide: bool) -> Unfit:
    """What a text with bytes that are not UTF-8 may be; they are at `offset` of the file; `wide`: valid characters of
    several bytes came before them."""
    chunk, bad = error.object, error.start
    place = f"byte 0x{chunk[bad]:02x} at offset {offset}"
    cut = error.reason == "unexpected end of data"  # the file ends within a character
    if len(chunk) - len(chunk.translate(None, CONTROLS)) > 0.01 * len(chunk):
        return Unfit("binary", place)
    if cut:
        place += ", in the last character, which is cut" if wide else ", the last one, or UTF-8 that is cut there"
    if wide or (cut and (error.end > bad + 1 or chunk[bad] < 0xDF)):  # no Latin-1 word ends in such bytes
        return Unfit("UTF-8 with damage", place, "iconv -c -f UTF-8 -t UTF-8 {path} > utf8.{name}")
    if len(chunk.translate(None, ASCII)) > max(3, 0.4 * len(chunk)):
        advice = "put the one that it was written in for ENCODING, such as WINDOWS-1251 or SHIFT_JIS"
        return Unfit("not UTF-8", f"{place}, its encoding unknown", ICONV % "ENCODING", advice)
    if chunk.translate(None, ASCII + LATIN):
        return Unfit("Windows-1252", place, ICONV % "WINDOWS-1252")
    return Unfit("Latin-1", place, ICONV % "ISO-8859-1")


# ---- the texts in it

@dataclass(frozen=True)
class TextFile:
    name: str  # path below the root, with slashes: the same on every system
    size: int  # bytes of its texts
    chars: int
    digest: bytes  # sha256 of its texts
    lines: bool = False  # JSON lines
    like: Unfit | None = None  # what it would be if its name did not say that it is a text


def open_plain(path: str) -> io.BufferedReader:
    """A file's bytes, unpacked where they are in gzip."""
    file = open(path, "rb")
    if file.peek(2)[:2] != b"\x1f\x8b":
        return file
    file.close()
    return io.BufferedReader(gzip.open(path), CHUNK)


def inner_text(record: dict, field: str) -> str:
    """A Python expression for the text within a record `r` that has it deeper than `field`; empty where none is found.
    Its names need no quotes in a shell."""
    first, *rest = field.split(".")
    for name in (first,) if first in record else record:
        value, path = record[name], f"r['{name}']"
        for key in rest[:-1]:
            value, path = value.get(key) if isinstance(value, dict) else None, f"{path}['{key}']"
        listed = isinstance(value, list)
        inner = value[0] if listed and value else value
        found = [key for key in (*rest[-1:], "text", "content", "value")
                 if isinstance(inner, dict) and isinstance(inner.get(key), str)]  # fmt: skip
        if found and all(map(str.isidentifier, (name, *rest[:-1], found[0]))):
            return f"chr(10).join(m['{found[0]}'] for m in {path})" if listed else f"{path}['{found[0]}']"
    return ""


def bad_line(line: bytes, number: int, field: str) -> Unfit:
    """Why a line of JSON lines has no text in `field`."""
    record = json_object(line)
    if record is None:
        what = "no JSON object" if is_utf8(line) else "not UTF-8"
        if len(line) == LONGEST:
            what = f"longer than {LONGEST:,} bytes"
        return Unfit("JSON lines with a bad line", f"line {number} is {what}", advice="mend the line or remove it")
    reason, advice = f"JSON lines without a text in {field!r}", "name the text's field with --text_field"
    if inside := inner_text(record, field):
        advice = "the field must be a string at the top level: name another with --text_field, or convert it"
        return Unfit(reason, f"line {number} has {some_keys(record)}", FROM_NESTED % inside, advice)
    if field in record:
        value = json.dumps(record[field])[:40]
        return Unfit(reason, f"line {number} has {value} there", advice=f"remove the line, or {advice}")
    return Unfit(reason, f"line {number} has {some_keys(record)}", advice=f"{advice}, or remove the line")


def records(file: BinaryIO, field: str) -> Iterator[str | Unfit]:
    """The texts of JSON lines; at a line without one why, and nothing behind it."""
    for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        text = (json_object(line) or {}).get(field)
        if not isinstance(text, str):
            yield bad_line(line, number, field)
            return
        yield text if text.isascii() else text.encode("utf-8", "replace").decode()  # half a surrogate pair: "?"


def measure_text(head: bytes, file: BinaryIO, name: str) -> TextFile | Unfit:
    """Sizes and hash of a text that begins with `head` and goes on in the file, a byte order mark left out; or the
    first byte that is no text."""
    decoder, digest, size, chars = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), 0, 0
    mark = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    head = head[mark:] or file.read(CHUNK)
    while head:
        if b"\0" in head:
            return Unfit("binary", f"a zero byte at offset {mark + size + head.index(0)}")
        following = file.read(CHUNK)
        waiting = len(decoder.getstate()[0])  # bytes of a character that began in the chunk before
        try:
            chars += len(decoder.decode(head, final=not following))
        except UnicodeDecodeError as error:
            wide = chars < size - waiting or not error.object[: error.start].isascii()
            return sniff_bytes(error, mark + size - waiting + error.start, wide)
        digest.update(head)
        size += len(head)
        head = following
    return TextFile(name, size, chars, digest.digest()) if size else EMPTY


def framed(record: bytes) -> bytes:
    """What a record of JSON lines adds to the hash: where it ends is a part of it."""
    return len(record).to_bytes(8, "little") + record


def measure_lines(file: BinaryIO, name: str, field: str) -> TextFile | Unfit:
    """Sizes and hash of the texts in JSON lines."""
    digest, size, chars = hashlib.sha256(b"JSON lines"), 0, 0
    for text in records(file, field):
        if isinstance(text, Unfit):
            return text
        data = text.encode()
        digest.update(framed(data))
        size += len(data)
        chars += len(text)
    return TextFile(name, size, chars, digest.digest(), True) if size else EMPTY


def measure(file: io.BufferedReader, name: str, field: str) -> TextFile | Unfit:
    """`inspect`, of an open file."""
    head = file.read(CHUNK)
    found = sniff_binary(head) if field else None
    if found or not field or not is_utf8(head):
        return found or measure_text(head, file, name)
    if JSON_OBJECT.match(head.removeprefix(codecs.BOM_UTF8)):  # two whole lines tell what they are
        while head.count(b"\n") < 2 and (rest := file.readline(LONGEST)):
            head += rest
    like = sniff(head, name, field)
    if like is JSON_LINES:
        file.seek(0)
        return measure_lines(file, name, field)
    if like and not has_suffix(name, *TEXT_SUFFIXES):
        return like
    found = measure_text(head, file, name)
    return found if isinstance(found, Unfit) else replace(found, like=like)


def in_gzip(unfit: Unfit) -> Unfit:
    """The same, found in a gzip archive."""
    if not unfit.command and unfit is not SHARD:
        return unfit
    advice = "unpack it and give what comes out"
    return Unfit(f"{unfit.reason} in gzip", unfit.place, "gzip -dc {path} > unpacked.{inner}", advice)


def inspect(path: str, name: str, field: str) -> TextFile | Unfit:
    """The file's sizes and hash, or why it is no text. Without a `field` (of JSON lines) it is a text in any case."""
    try:
        with open_plain(path) as file:
            found = measure(file, name, field)
            if not isinstance(file.raw, gzip.GzipFile):
                return found
            if isinstance(found, Unfit):
                return in_gzip(found)
            return replace(found, like=found.like and in_gzip(found.like))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        return Unfit("damaged gzip archive", str(error), advice=AGAIN)


def as_document(text: str | Unfit, path: str) -> TextIO:
    if isinstance(text, Unfit):  # `inspect` found none
        raise UserError(f"{path}: it was changed while it was read ({text.place}): run this again")
    return io.StringIO(text, newline="")


def pieces(root: Path, file: TextFile, field: str) -> Iterator[str]:
    """The texts of a file in pieces that end with a line (within a line only if it is huge), line ends left as they
    are; an empty piece ends a document."""
    path = f"{root}/{file.name}"
    with open_plain(path) as binary:
        documents: Iterable[TextIO]
        if file.size <= CHUNK and not file.lines:  # the same piece as below, in less time
            yield binary.read().decode("utf-8-sig")
            yield ""
            return
        if file.lines:
            documents = (as_document(text, path) for text in records(binary, field))
        else:
            documents = [io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")]
        for document in documents:
            while text := document.read(CHUNK):
                yield text + document.readline(CHUNK)
            yield ""


def checked_pieces(root: Path, file: TextFile, field: str) -> Iterator[str]:
    """`pieces`, all of them; UserError, at the end if not before, where they are not the texts that `inspect` saw."""
    digest = hashlib.sha256(b"JSON lines" if file.lines else b"")
    changed = partial(UserError, f"{root}/{file.name} has changed while it was read: run again")
    record: list[str] = []
    chars = 0
    try:
        for text in pieces(root, file, field):
            chars += len(text)
            if chars > file.chars:  # one that grows as fast as it is read would never end
                raise changed()
            if not file.lines:
                digest.update(text.encode())
            elif text:
                record.append(text)
            else:
                digest.update(framed("".join(record).encode()))
                record.clear()
            yield text
    except (EOFError, ValueError, zlib.error, gzip.BadGzipFile, FileNotFoundError, IsADirectoryError,
            NotADirectoryError):  # fmt: skip
        raise changed() from None
    if digest.digest() != file.digest:
        raise changed()
