"""Files of text: what a file is, by its content, and the texts in it.

- Read: UTF-8 text, a document a file, and JSON lines, a document a record; plain or in gzip.
- Known, with the command that makes text of it: archives and containers by their first bytes, UTF-16 and UTF-32 by
  their mark or their zeros, tables by even rows, notebooks and other JSON, texts of one byte a character by their first
  byte that is not UTF-8.
Left out: the conversion itself; telling encodings apart that differ by their language only.
"""

import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import json
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

from configurator import UserError

CHUNK = 1 << 18  # bytes or characters at once: twice as much still fits the stack of every tiktoken pattern
LONGEST = 1 << 28  # bytes of a JSON line: a file without line ends must not fill the memory
MAGIC = b"HYDRATOK"  # begins a token file


class Unfit(NamedTuple):
    """Why a file is no text."""

    reason: str  # what it is: files are counted by it
    place: str = ""  # where that shows
    remedy: str = ""  # a command, with {path} for the file and {out} for its name without suffix

    def command(self, path: str) -> str:
        return self.remedy.replace("{path}", shlex.quote(path)).replace("{out}", shlex.quote(str(Path(path).stem)))


ICONV = "iconv -f %s -t UTF-8 {path} > {out}.utf8.txt"
PANDAS = ("python -c \"import pandas, sys; pandas.%s(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)\" "
          "{path} {out}.jsonl")  # fmt: skip
FROM_JSON = ("python -c \"import json, sys; d = json.load(open(sys.argv[1], encoding='utf-8-sig')); "
             '[print(json.dumps(r)) for r in (d if isinstance(d, list) else [d])]" {path} > {out}.jsonl')  # fmt: skip
FROM_CSV = ('python -c "import csv, json, sys; csv.field_size_limit(2**30); [print(json.dumps(r)) for r in '
            "csv.DictReader(open(sys.argv[1], encoding='utf-8-sig', newline=''), delimiter='%s')]\" {path} > "
            "{out}.jsonl, and name the text's column by --text_field")  # fmt: skip
FORMATS = {  # the first bytes -> what it is
    MAGIC: Unfit("token file"),
    b"PAR1": Unfit("parquet table", "", PANDAS % "read_parquet"),
    b"PK\3\4": Unfit("zip archive", "", "python -m zipfile -e {path} {out}"),
    b"\x28\xb5\x2f\xfd": Unfit("zstd archive", "", "zstd -d {path}"),
    b"\xfd7zXZ\0": Unfit("xz archive", "", "xz -dk {path}"),
    b"BZh": Unfit("bzip2 archive", "", "bzip2 -dk {path}"),
    b"%PDF-": Unfit("PDF", "", "pdftotext {path} {out}.txt"),
    b"\xff\xfe\0\0": Unfit("UTF-32", "by its byte order mark", ICONV % "UTF-32"),
    b"\0\0\xfe\xff": Unfit("UTF-32", "by its byte order mark", ICONV % "UTF-32"),
    b"\xff\xfe": Unfit("UTF-16", "by its byte order mark", ICONV % "UTF-16"),
    b"\xfe\xff": Unfit("UTF-16", "by its byte order mark", ICONV % "UTF-16"),
}
IN_ZIP = {  # a folder in a zip archive -> what it is
    b"word/": Unfit("Word document", "", "pandoc -t plain {path} -o {out}.txt"),
    b"xl/": Unfit("Excel table", "", PANDAS % "read_excel"),
}
DELIMITERS = {",": "CSV table", "\t": "TSV table", ";": "CSV table"}
JSON_LINES = Unfit("JSON lines")  # the one that is read
JSON_OBJECT = re.compile(rb'\s*(\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')
NOTEBOOK = re.compile(rb'"(nbformat|cells)"\s*:')
CONTROLS = bytes(range(8)) + bytes(range(14, 27)) + bytes(range(28, 32))  # that a text does not have
ASCII, LATIN = bytes(range(128)), bytes(range(160, 256))


# ---- what a file is

def is_token_file(path: str | Path) -> bool:
    """Whether this project wrote it, see data.py; OSError where it cannot be read."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def sniff_binary(head: bytes) -> Unfit | None:
    """Archives and containers, UTF-16 and UTF-32, whatever has a zero byte."""
    if head.startswith(tuple(FORMATS)):
        magic = next(magic for magic in FORMATS if head.startswith(magic))
        inside = [found for folder, found in IN_ZIP.items() if magic == b"PK\3\4" and folder in head]
        return inside[0] if inside else FORMATS[magic]
    if head[257:262] == b"ustar":
        return Unfit("tar archive", "", "tar xf {path}")
    if b"\0" not in head:
        return None
    even, odd = (head[side::2].count(0) / len(head) for side in (0, 1))
    for name, many, few in (("UTF-16LE", odd, even), ("UTF-16BE", even, odd)):  # of ASCII one byte in two is zero
        if many > 0.25 and few < 0.01 and head.count(0) > 3:
            return Unfit(name, "every other byte is zero", ICONV % name)
    return Unfit("binary", f"a zero byte at offset {head.index(0)}")


def sniff_table(head: bytes, name: str) -> Unfit | None:
    """CSV and TSV: rows of as many cells, two or more, none of the first row empty or with a space or a brace in front,
    as a text or a program has them. Without such a suffix three rows are needed."""
    body = head.removeprefix(codecs.BOM_UTF8).lstrip(b"\r\n")
    first = body.partition(b"\n")[0].rstrip(b"\r")
    for delimiter, reason in DELIMITERS.items():
        cells = first.split(delimiter.encode())
        if len(cells) < 2 or not all(cells) or any(cell[0] in b" {" for cell in cells):
            continue
        rows: list[list[str]] = []
        with contextlib.suppress(csv.Error):  # a cell may be larger than csv's limit
            rows.extend(csv.reader(io.StringIO(body.decode(errors="replace"), newline=""), delimiter=delimiter))
        rows = [row for row in rows if row]
        width = len(rows[0]) if rows else 0
        even = width > 1 and all(len(row) == width for row in rows[:-1] or rows)  # the last one may be cut
        if even and (len(rows) >= 3 or name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))):
            return Unfit(reason, f"columns {', '.join(rows[0])[:80]}", FROM_CSV % delimiter.replace("\t", r"\t"))
    return None


def json_object(line: bytes) -> dict | None:
    """The JSON object of a line, None where there is none."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def some_keys(record: dict) -> str:
    return ", ".join(map(repr, list(record)[:6]))[:120] or "nothing"


def sniff_json(head: bytes, name: str, field: str) -> Unfit | None:
    """JSON_LINES, or what other JSON it is. A file whose name does not say so has JSON lines where its first line is an
    object with a text in `field`."""
    body, name = head.removeprefix(codecs.BOM_UTF8).lstrip(), name.lower().removesuffix(".gz")
    named = name.endswith((".jsonl", ".ndjson"))
    if not body.startswith((b"{", b"[")):
        return None
    record = json_object(body.partition(b"\n")[0])
    if record is not None and isinstance(record.get(field), str):
        return JSON_LINES
    if body.startswith(b"{") and NOTEBOOK.search(head):
        return Unfit("notebook", "", "jupyter nbconvert --to script {path}")
    if named and record is not None:
        remedy = "name the text's field with --text_field"
        return Unfit(f"JSON lines without a text in {field!r}", f"line 1 has {some_keys(record)}", remedy)
    if named:
        return JSON_LINES  # the first line is broken, and will be named
    if JSON_OBJECT.match(body) or name.endswith((".json", ".ipynb")):
        return Unfit("JSON that is not lines", "", FROM_JSON)
    return None


def sniff(head: bytes, name: str, field: str) -> Unfit | None:
    """What a file that begins with `head` is: None for a text, if no bad byte follows."""
    return sniff_binary(head) or sniff_table(head, name) or sniff_json(head, name, field)


def sniff_bytes(chunk: bytes, bad: int, offset: int, wide: bool) -> Unfit:
    """What a text with a byte that is not UTF-8 (chunk[bad], at `offset` of the file) may be; `wide`: valid characters
    of several bytes came before it."""
    place = f"byte 0x{chunk[bad]:02x} at offset {offset}"
    if len(chunk) - len(chunk.translate(None, CONTROLS)) > 0.01 * len(chunk):
        return Unfit("binary", place)
    if wide:
        return Unfit("UTF-8 with damage", place, "iconv -c -f UTF-8 -t UTF-8 {path} > {out}.utf8.txt")
    if len(chunk.translate(None, ASCII)) > max(3, 0.4 * len(chunk)):
        return Unfit("not UTF-8", f"{place}, its encoding unknown", ICONV % "ENCODING")
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


def open_plain(path: str) -> io.BufferedReader:
    """A file's bytes, unpacked where they are in gzip."""
    file = open(path, "rb")
    if file.peek(2)[:2] != b"\x1f\x8b":
        return file
    file.close()
    return io.BufferedReader(gzip.open(path), CHUNK)


def records(file: BinaryIO, path: str, field: str) -> Iterator[str]:
    """The texts of JSON lines. Raises UserError: a line without one."""
    for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        record = json_object(line)
        if record is None:
            raise UserError(f"{path}, line {number}: no JSON object, or longer than {LONGEST:,} bytes: mend the line "
                            "or remove it")  # fmt: skip
        text = record.get(field)
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number}: no text in {field!r}, the line has {some_keys(record)}: name the "
                            "text's field with --text_field, or remove the line")  # fmt: skip
        yield text if text.isascii() else text.encode("utf-8", "replace").decode()  # half a surrogate pair: "?"


def measure_text(head: bytes, file: BinaryIO, name: str) -> TextFile | Unfit:
    """Sizes and hash of a text that begins with `head` and goes on in the file; or the first byte that is no text."""
    decoder, digest, size, chars = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), 0, 0
    while head:
        if b"\0" in head:
            return Unfit("binary", f"a zero byte at offset {size + head.index(0)}")
        following = file.read(CHUNK)
        waiting = len(decoder.getstate()[0])  # bytes of a character that began in the chunk before
        try:
            chars += len(decoder.decode(head, final=not following))
        except UnicodeDecodeError as error:
            wide = chars < size - waiting or not error.object[: error.start].isascii()
            return sniff_bytes(error.object, error.start, size - waiting + error.start, wide)
        digest.update(head)
        size += len(head)
        head = following
    return TextFile(name, size, chars, digest.digest()) if size else Unfit("empty")


def framed(record: bytes) -> bytes:
    """What a record of JSON lines adds to the hash: where it ends is a part of it."""
    return len(record).to_bytes(8, "little") + record


def measure_lines(file: BinaryIO, path: str, name: str, field: str) -> TextFile | Unfit:
    """Sizes and hash of the texts in JSON lines."""
    digest, size, chars = hashlib.sha256(b"JSON lines"), 0, 0
    for text in records(file, path, field):
        data = text.encode()
        digest.update(framed(data))
        size += len(data)
        chars += len(text)
    return TextFile(name, size, chars, digest.digest(), True) if size else Unfit("empty")


def inspect(path: str, name: str, field: str) -> TextFile | Unfit:
    """The file's sizes and hash, or why it is no text. Without a `field` (of JSON lines) it is a text in any case."""
    try:
        with open_plain(path) as file:
            head = file.read(CHUNK)
            found = sniff(head, name, field) if field else None
            if found is JSON_LINES:
                file.seek(0)
                return measure_lines(file, path, name, field)
            found = found or measure_text(head, file, name)
            if isinstance(found, Unfit) and found.remedy and isinstance(file.raw, gzip.GzipFile):
                return Unfit(f"{found.reason} in gzip", found.place, "gzip -dk {path}, then give what that unpacks")
            return found
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        return Unfit("damaged gzip archive", str(error))


def pieces(root: Path, file: TextFile, field: str) -> Iterator[str]:
    """The texts of a file in pieces that end with a line (within a line only if it is huge), line ends left as they
    are; an empty piece ends a document."""
    path = f"{root}/{file.name}"
    with open_plain(path) as binary:
        documents: Iterable[TextIO]
        if file.size <= CHUNK and not file.lines:  # the same piece as below, in less time
            yield binary.read().decode()
            yield ""
            return
        if file.lines:
            documents = (io.StringIO(text, newline="") for text in records(binary, path, field))
        else:
            documents = [io.TextIOWrapper(binary, encoding="utf-8", newline="")]
        for document in documents:
            while text := document.read(CHUNK):
                yield text + document.readline(CHUNK)
            yield ""


def checked_pieces(root: Path, file: TextFile, field: str) -> Iterator[str]:
    """`pieces`, all of them; UserError, at the end if not before, where they are not the texts that `inspect` saw."""
    digest = hashlib.sha256(b"JSON lines" if file.lines else b"")
    changed = UserError(f"{root}/{file.name} has changed while it was read: run again")
    record: list[str] = []
    chars = 0
    try:
        for text in pieces(root, file, field):
            chars += len(text)
            if chars > file.chars:  # one that grows as fast as it is read would never end
                raise changed
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
        raise changed from None
    if digest.digest() != file.digest:
        raise changed
