"""What a file is, by its content: text, JSON lines, or something else, with the command that makes text of it.

Known: archives and containers by their first bytes, UTF-16 and UTF-32 by their mark or their zeros, tables by even
rows, notebooks and other JSON, texts of one byte a character by their first byte that is not UTF-8.
Left out: the conversion itself; telling encodings apart that differ by their language only.
"""

import codecs
import contextlib
import csv
import io
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

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
JSON_OBJECT = re.compile(rb'\s*(\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')
NOTEBOOK = re.compile(rb'"(nbformat|cells)"\s*:')
CONTROLS = bytes(range(8)) + bytes(range(14, 27)) + bytes(range(28, 32))  # that a text does not have
ASCII, LATIN = bytes(range(128)), bytes(range(160, 256))


def sniff_binary(head: bytes) -> Unfit | None:
    """Archives and containers, UTF-16 and UTF-32, whatever has a zero byte."""
    for magic, unfit in FORMATS.items():
        if head.startswith(magic):
            inside = [found for folder, found in IN_ZIP.items() if magic == b"PK\3\4" and folder in head]
            return inside[0] if inside else unfit
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
    text = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").lstrip("\r\n")
    first = text.partition("\n")[0].rstrip("\r")
    for delimiter, reason in DELIMITERS.items():
        cells = first.split(delimiter)
        if len(cells) < 2 or not all(cells) or any(cell[0] in " {" for cell in cells):
            continue
        rows: list[list[str]] = []
        with contextlib.suppress(csv.Error):  # a cell may be larger than csv's limit
            rows.extend(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
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


def sniff_json(head: bytes, name: str, field: str) -> Unfit | bool:
    """True for JSON lines, False for no JSON, or what else it is. A file whose name does not say so has them where
    its first line is an object with a text in `field`."""
    body, name = head.removeprefix(codecs.BOM_UTF8).lstrip(), name.lower().removesuffix(".gz")
    named = name.endswith((".jsonl", ".ndjson"))
    if not body.startswith((b"{", b"[")):
        return False
    record = json_object(body.partition(b"\n")[0])
    if record is not None and isinstance(record.get(field), str):
        return True
    if body.startswith(b"{") and NOTEBOOK.search(head):
        return Unfit("notebook", "", "jupyter nbconvert --to script {path}")
    if named and record is not None:
        remedy = "name the text's field with --text_field"
        return Unfit(f"JSON lines without a text in {field!r}", f"line 1 has {some_keys(record)}", remedy)
    if named:
        return True  # the first line is broken, and will be named
    if JSON_OBJECT.match(body) or name.endswith((".json", ".ipynb")):
        return Unfit("JSON that is not lines", "", FROM_JSON)
    return False


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
