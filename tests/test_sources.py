"""sources.py and formats.py: what files are and what becomes of them, folders, links, the split, tokens on all cores.

Every file is made here, byte by byte; what comes back is compared with what was written. CPU, no network.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import write_folder
from test_train import options

import data
import formats
import sources
import tokenfiles
import train
from configurator import UserError

TOKENIZERS = ("python4096", "bytes")


def prepare(source, tmp_path, tokenizer="bytes", **keys):
    return data.prepare(str(source), tokenizer, str(tmp_path / "cache"), **keys)


def set_chunk(monkeypatch, size):
    for module in (formats, sources):
        monkeypatch.setattr(module, "CHUNK", size)


def documents(tokens, enc):
    """The texts of ids, each of which <|endoftext|> closes."""
    ids = np.asarray(tokens)
    ends = np.flatnonzero(ids == enc.eot_token)
    assert len(ends) and ends[-1] == len(ids) - 1
    return [enc.decode_bytes(part[part != enc.eot_token].tolist()).decode() for part in np.split(ids, ends[:-1] + 1)]


def both(corpus):
    """All documents, those that the split cut put together again."""
    train, val = documents(corpus.train, corpus.enc), documents(corpus.val, corpus.enc)
    return train, val


def jsonl(texts, field="text"):
    return "".join(json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts))


# ---- the default corpus

def test_the_hash_of_a_path_depends_on_the_path_only():
    names = ("ast.py", "bdb.py", "cmd.py", "json/decoder.py", "os.py", "re/__init__.py", "typing.py")
    for name in names:
        assert sources.path_hash(name) == int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    assert [name for name in names if sources.path_hash(name) < 10] == ["ast.py", "typing.py"]


def test_default_corpus():
    source = sources.default_source()
    names = [file.name for file in source.files]
    assert names == sorted(names) and 300 < len(names) < 2000 and "argparse.py" in names
    assert not [name for name in names if sources.NO_CORPUS & set(name.split("/"))]
    assert not [name for name in names if "cp1252" in name or "_sysconfigdata" in name or "topics" in name]
    assert "encodings/utf_8.py" in names and "unittest/case.py" in names
    assert len({file.digest for file in source.files}) == len(names)
    assert source.text_field == ""  # so that nothing but a bad byte keeps a file out, whatever the version of Python


def test_the_default_corpus_takes_a_table_for_a_program(tmp_path, monkeypatch):
    files = {f"{i}.py": f"x = {i}\n" for i in range(sources.FEWEST_FILES)} | {"table.py": csv_of()}
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: write_folder(tmp_path / "library", files))
    assert len(sources.default_source().files) == sources.FEWEST_FILES + 1


def test_the_default_corpus_is_split_by_path_whatever_the_share():
    source = sources.default_source()
    for fraction in (0.1, 0.25):
        train, val, _ = sources.split(source, fraction)
        for file, (begin, end), (begin_val, end_val) in zip(source.files, train.spans, val.spans, strict=True):
            here = int(hashlib.sha256(file.name.encode()).hexdigest()[:8], 16) % 100 < 100 * fraction
            assert (begin, end, begin_val, end_val) == ((0, 0, 0, file.chars) if here else (0, *[file.chars] * 3))
    text = "".join(sources.part_pieces(train))
    assert text == "".join((source.root / f.name).read_bytes().decode()
                           for f, (_, end) in zip(source.files, train.spans, strict=True) if end)  # fmt: skip


def test_no_default_corpus_without_a_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "library"))
    for files in ({}, {f"{i}.py": f"x = {i}\n" for i in range(sources.FEWEST_FILES - 1)}):
        write_folder(tmp_path / "library", files)
        with pytest.raises(UserError, match="no Python sources in .*library: give a text file or folder with --data"):
            prepare("", tmp_path)
    write_folder(tmp_path / "library", {"one_more.py": "x = 'more'\n"})
    assert f"{sources.FEWEST_FILES} files" in prepare("", tmp_path).description


# ---- what is read

CONTENTS = ["a\nb\n", "né🐍\r\nnext", "<|endoftext|>", "  ", "long line " * 100, "\ufeffmark",
            *(f"t{i}\n" for i in range(30))]  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a", "a.jsonl.bak"])
@pytest.mark.parametrize("field", ["text", "content"])
def test_a_record_of_json_lines_is_a_document(name, field, tmp_path):
    empty = json.dumps({field: ""}) + "\n"
    raw = ("\ufeff" + jsonl(CONTENTS[:3], field) + "\n  \n" + empty + jsonl(CONTENTS[3:], field) + empty).encode()
    write_folder(tmp_path, {name: gzip.compress(raw) if name.endswith("gz") else raw})
    train, val = both(prepare(tmp_path / name, tmp_path, text_field=field))
    assert train + val == CONTENTS and val  # cut between two documents


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt", "a.gz", "a.jsonl"])
def test_gzip_is_known_by_its_content(name, tmp_path):
    text = "".join(f"line {i} né\r\n" for i in range(5000))
    write_folder(tmp_path, {name: gzip.compress(text.encode()), "plain.txt": text})
    packed, plain = (prepare(tmp_path / n, tmp_path) for n in (name, "plain.txt"))
    assert np.array_equal(packed.train, plain.train) and np.array_equal(packed.val, plain.val)
    assert "".join(sum(both(packed), [])) == text


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    write_folder(tmp_path, {"a.jsonl": '{"text": "a\\ud83dz"}\n{"text": "\\ud83d\\udc0d"}\n'})
    assert both(prepare(tmp_path / "a.jsonl", tmp_path, val_fraction=0.5)) == (["a?z"], ["🐍"])


@pytest.mark.parametrize(("line", "what", "remedy"), [
    ('{"text": "cut', "no JSON object", "mend the line or remove it"), ("[1]", "no JSON object", "mend the line"),
    ('{"id": 1, "content": "x"}', "has 'id', 'content'", "name the text's field with --text_field, or remove the line"),
    ("[" * 100_000, "no JSON object", "mend the line"), ('{"text": "\\x"}', "no JSON object", "mend the line"),
    ('{"text": null}', "has null there", "remove the line, or name"), ('{"text": [1]}', "has [1] there", "remove the"),
    ("{}", "has nothing", "name the text's field"), (b'{"text": "\xe9"}', "not UTF-8", "mend the line or remove it"),
])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_line_without_text_is_named_and_costs_its_file_alone(number, line, what, remedy, tmp_path, monkeypatch):
    """Wherever the line is, in the first chunk or behind it."""
    set_chunk(monkeypatch, 18)
    lines = [b'{"text": "good"}', b"", b'{"text": "better"}']
    lines.insert(number - 1, line if isinstance(line, bytes) else line.encode())
    write_folder(tmp_path / "in", {"a.jsonl": b"\n".join(lines), "b.txt": "text"})
    if number == 1 and isinstance(line, bytes):  # the first chunk says what the whole file is
        what, remedy = "byte 0xe9 at offset 10", "iconv -f ISO-8859-1"
    with pytest.raises(UserError, match=r"--data=.*a.jsonl: not text but .*: ") as caught:
        prepare(tmp_path / "in/a.jsonl", tmp_path)
    assert "\n" not in str(caught.value) and what in str(caught.value) and remedy in str(caught.value)
    corpus = prepare(tmp_path / "in", tmp_path)
    assert "".join(sum(both(corpus), [])) == "text" and what in corpus.description and remedy in corpus.description
    if "iconv" not in remedy:
        assert f"line {number} " in str(caught.value) and f"(a.jsonl, line {number} " in corpus.description


def test_json_lines_of_other_fields(tmp_path):
    write_folder(tmp_path / "in", {"a.jsonl": jsonl(CONTENTS, "content"), "b.txt": "text\n" * 20, "c.jsonl": "cut{"})
    with pytest.raises(UserError, match="JSON lines without a text in 'text'.*'id', 'content'.*--text_field"):
        prepare(tmp_path / "in/a.jsonl", tmp_path)
    skipped = prepare(tmp_path / "in", tmp_path).description
    assert "1 JSON lines without a text in 'text' (a.jsonl, line 1 has 'id', 'content'" in skipped


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST", 100)
    write_folder(tmp_path, {"a.jsonl": jsonl(["x" * 50, "y" * 200])})
    with pytest.raises(UserError, match="line 2 is longer than 100 bytes.: mend the line"):
        prepare(tmp_path / "a.jsonl", tmp_path)


# ---- what is no text

def zip_of(*names):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for name in names:
            archive.writestr(name, "content of it")
    return raw.getvalue()


def tar_of(name):
    raw, content = io.BytesIO(), b"content of it"
    with tarfile.open(fileobj=raw, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def csv_of(delimiter=","):
    raw = io.StringIO()
    writer = csv.writer(raw, delimiter=delimiter)
    writer.writerows([["id", "text"], ["1", f'Hello{delimiter} "world"\nsecond line'], ["2", "né"], ["3", "end"]])
    return raw.getvalue()


LATIN = "Café déjà vu, naïve\n" * 30
KINDS = {  # content, what is found, command
    "parquet": (b"PAR1\x15\x04" + bytes(90) + b"PAR1", "parquet table", "read_parquet"),
    "zip": (zip_of("a.txt"), "zip archive", "python -m zipfile -e"),
    "docx": (zip_of("[Content_Types].xml", "word/document.xml"), "Word document", "pandoc -t plain"),
    "xlsx": (zip_of("[Content_Types].xml", "xl/workbook.xml"), "Excel table", "read_excel"),
    "zstd": (b"\x28\xb5\x2f\xfd\x24\x05" + b"rest", "zstd archive", "zstd -d"),
    "xz": (b"\xfd7zXZ\0\0\4" + b"rest", "xz archive", "xz -dc"),
    "bz2": (b"BZh91AY&SY\xff\xfe", "bzip2 archive", "bzip2 -dc"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "PDF", "pdftotext"),
    "tar": (b"a.txt".ljust(257, b"\0") + b"ustar\x0000" + bytes(500), "tar archive", "tar xf"),
    "csv": (csv_of(), "CSV table (columns id, text)", "rename it to .txt, else convert it and name .. --text_field"),
    "semicolons": (csv_of(";"), "CSV table (columns id, text)", "delimiter=';'"),
    "csv, cut": ("id,text\r\n" + "12345678,w\r\n" * 50_000, "CSV table (columns id, text)", "--text_field"),
    "tsv": (csv_of("\t"), "TSV table (columns id, text)", r"delimiter='\t'"),
    "notebook": ('{\n "cells": [\n  {"cell_type": "code"}\n ],\n "nbformat": 4\n}', "notebook", "jupyter nbconvert"),
    "notebook in a line": (json.dumps({"metadata": {}, "nbformat": 4, "cells": []}), "notebook", "jupyter nbconvert"),
    "json list": (json.dumps([{"text": "a"}, {"text": "b"}], indent=1), "JSON that is not lines", "json.load"),
    "json": ('{\n  "name": "x"\n}\n', "JSON that is not lines", "json.load"),
    "json in a line": ('{"name": "x"}', "JSON that is not lines", "json.load"),
    "utf-16": (("\ufeff" + LATIN).encode("utf-16-le"), "UTF-16 (by its byte order mark)", "iconv -f UTF-16 "),
    "utf-16 be": (("\ufeff數学").encode("utf-16-be"), "UTF-16 (by its byte order mark)", "iconv -f UTF-16 "),
    "utf-16 no mark": (LATIN.encode("utf-16-le"), "UTF-16LE", "iconv -f UTF-16LE "),
    "utf-16 be no mark": (LATIN.encode("utf-16-be"), "UTF-16BE", "iconv -f UTF-16BE "),
    "utf-32": (LATIN.encode("utf-32"), "UTF-32", "iconv -f UTF-32 "),
    "latin": (LATIN.encode("latin-1"), "Latin-1 (byte 0xe9 at offset 3)", "iconv -f ISO-8859-1 "),
    "latin, last": (b"plain caf\xe9", "Latin-1 (byte 0xe9 at offset 9, the last one, or", "iconv -f ISO-8859-1 "),
    "cut letter": ("plain café".encode()[:-1], "UTF-8 with damage (byte 0xc3 at offset 9, ", "iconv -c -f UTF-8 "),
    "cut sign": ("plain 數".encode()[:-1], "UTF-8 with damage (byte 0xe6 at offset 6, ", "iconv -c -f UTF-8 "),
    "latin table": ("id,text\n1,né\n2,b\n".encode("latin-1"), "Latin-1 (byte 0xe9 at offset 11)", "iconv -f ISO"),
    "latin lines": ('{"text": "né"}\n'.encode("latin-1"), "Latin-1 (byte 0xe9 at offset 11)", "iconv -f ISO"),
    "binary": (b"a" * 95 + b"\1\2\xff", "binary (byte 0xff at offset 97)", "give UTF-8 text"),
    "controls": (bytes(range(1, 32)) * 9, "binary (216 control characters in the first 279 bytes)", "give UTF-8 text"),
    "utf-16 russian": ("Привет, мир".encode("utf-16-le"), "UTF-16LE (without a byte", "iconv -f UTF-16LE "),
    "utf-16 be greek": ("Καλημέρα κόσμε\n".encode("utf-16-be"), "UTF-16BE (without a byte", "iconv -f UTF-16BE "),
    "utf-16 chinese": ("一个人在等待着黎明到来，世界上最远".encode("utf-16-le"), "UTF-16LE", "iconv -f UTF-16LE "),
    "utf-16 korean": ("안녕하세요 세계 가나다라".encode("utf-16-be"), "UTF-16BE", "iconv -f UTF-16BE "),
    "utf-16 hindi": ("नमस्ते दुनिया, यह पाठ है\n".encode("utf-16-le"), "UTF-16LE", "iconv -f UTF-16LE "),
    "utf-32 no mark": (LATIN.encode("utf-32-le"), "UTF-32LE (without", "iconv -f UTF-32LE "),
    "utf-32 be russian": ("Привет, мир".encode("utf-32-be"), "UTF-32BE (without", "iconv -f UTF-32BE "),
    "ids": (struct.pack("<400H", *[i * i % 50257 for i in range(400)]), "binary (a zero byte", "give UTF-8 text"),
    "wide ids": (struct.pack("<400i", *[i * i % 50257 for i in range(400)]), "binary (a zero byte", "give UTF-8 text"),
    "text with zeros": (b"some text\0\0\1 and more\0", "binary (a zero byte", "give UTF-8 text"),
    "shard": (struct.pack("<256i", 20240520, 1, 0, *[0] * 253), "token shard", "name the shards *_train_*.bin and"),
    "llama shard": (struct.pack("<256i", 20240801, 7, 0, *[0] * 253), "token shard", "name the shards *_train_*.bin"),
    "zeros": (b"text \0 text", "binary (a zero byte at offset 5)", "give UTF-8 text"),
    "empty": (b"", "empty", "give UTF-8 text"), "only a mark": (b"\xef\xbb\xbf", "empty", "give UTF-8 text"),
    "token file": (b"HYDRATOK{}", "token file", "give the text that it was made from"),
    "windows": ("“quoted” é ".encode("cp1252"), "Windows-1252 (byte 0x93 at offset 0)", "iconv -f WINDOWS-1252 "),
    "damaged": ("né\n".encode() * 9 + b"a\xffb", "UTF-8 with damage (byte 0xff at offset 37)", "iconv -c -f UTF-8 "),
    "cut": ("né né".encode()[:-1], "UTF-8 with damage (byte 0xc3 at offset 5, in the last", "iconv -c -f UTF-8 "),
    "cyrillic": ("Привет мир".encode("cp1251"), "not UTF-8 (byte 0xcf at offset 0", "iconv -f ENCODING "),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_text_gets_a_sentence(kind, packed, tmp_path):
    content, found, remedy = KINDS[kind]
    content = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / "in here/it's.dat"  # the suffix says nothing
    write_folder(tmp_path, {"in here/it's.dat": gzip.compress(content) if packed else content})
    with pytest.raises(UserError) as caught:
        prepare(path, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"--data={path}: not text but ") and "\n" not in message
    reason = found.partition(" (")[0]
    if packed and KINDS[kind][2] not in ("give UTF-8 text", "give the text that it was made from"):
        reason += " in gzip"
        assert reason in message and "unpack it and give what comes out: gzip -dc" in message
    elif not packed:
        assert found in message and all(part in message for part in remedy.split(" .. "))
    write_folder(tmp_path, {"in here/good.txt": "good text\n" * 50})
    description = prepare(tmp_path / "in here", tmp_path).description
    assert "1 files" in description and f"1 {reason}" in description and "it's.dat" in description
    if not packed and "give UTF" not in remedy:  # and the same remedy as for the file alone
        assert message.partition(f"{reason} ")[2].partition("): ")[2] in description


@pytest.mark.parametrize("kind", ["csv", "semicolons", "tsv", "json list", "utf-16", "utf-16 no mark", "utf-32",
                                  "latin", "windows", "damaged", "cut letter", "zip", "tar", "gzip", "csv in gzip"])
@pytest.mark.parametrize("name", ["it's.dat", "data", "a.jsonl", "a.text.jsonl"])
def test_the_commands_make_text_of_it_and_can_be_pasted_as_they_stand(name, kind, tmp_path, monkeypatch):
    """In the file's own folder, where a command that wrote to its name would destroy it."""
    packed = gzip.compress(csv_of().encode())
    tables = {"tar": tar_of("a.txt"), "gzip": gzip.compress(LATIN.encode("latin-1")), "csv in gzip": packed}
    content = tables[kind] if kind in tables else KINDS[kind][0]
    path = Path(write_folder(tmp_path, {f"in here/{name}": content})) / "in here" / name
    content = path.read_bytes()
    (tmp_path / "bin").mkdir()
    os.symlink(sys.executable, tmp_path / "bin/python")
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    texts = None
    while texts is None:  # what is unpacked may need another command
        try:
            texts = sum(both(prepare(path, tmp_path, val_fraction=0.3)), [])
        except UserError as error:
            command = re.search(r": ((python|iconv|gzip|mkdir) .*)", str(error))[1]
            before = {*path.parent.iterdir()}
            done = subprocess.run(command, shell=True, cwd=path.parent, env=environment, capture_output=True)
            assert done.returncode == 0 or kind in ("damaged", "cut letter"), done.stderr
            (path,) = {*path.parent.iterdir()} - before
    assert (tmp_path / "in here" / name).read_bytes() == content
    expected = {"csv": ['Hello, "world"\nsecond line', "né", "end"], "json list": ["a", "b"], "zip": ["content of it"],
                "semicolons": ['Hello; "world"\nsecond line', "né", "end"], "windows": ["“quoted” é "],
                "tsv": ['Hello\t "world"\nsecond line', "né", "end"], "damaged": ["né\n" * 9 + "ab"],
                "cut letter": ["plain caf"], "tar": ["content of it"]}  # fmt: skip
    expected["csv in gzip"] = expected["csv"]
    assert "".join(texts) == "".join(expected.get(kind, [LATIN]))


@pytest.mark.parametrize(("name", "text"), [
    ("commas.txt", "one, two\nthree, four\nfive, six\n"), ("a.js", "{\n  const a = [1,2];\n}\n"),
    ("a.py", "[\n    1,\n    2,\n]\n"), ("Makefile", "all:\n\tcc a.c\n\tcc b.c\n"), ("a.ini", "[a]\nb=1,2\n[c]\nd=3,4"),
    ("table.h", "{ 1,\t2,\t3 },\n{ 4,\t5,\t6 },\n{ 7,\t8,\t9 },\n"),
    ("x.html", "<a>\n<b,c>\n</a>"), ("a.md", "[link]: x\n{\"a\" is} fine\n"),
    ("a.jsonl", "no JSON at all\nreally\n"), ("PAR", "PARIS\n"), ("bom.txt", "\ufefftext\nwith a mark\n"),
])
def test_text_and_programs_stay_text(name, text, tmp_path):
    write_folder(tmp_path, {name: text})
    corpus = prepare(tmp_path / name, tmp_path)
    assert "".join(sum(both(corpus), [])) == text.removeprefix("\ufeff") and not corpus.warnings


@pytest.mark.parametrize("kind", ["csv", "semicolons", "tsv", "json", "json list", "notebook"])
@pytest.mark.parametrize("name", ["poem.txt", "POEM.TXT.gz", "table.py", "a.md"])
def test_a_texts_suffix_makes_a_table_a_text_and_says_so(name, kind, tmp_path):
    content, found, _ = KINDS[kind]
    raw = content.encode()
    path = Path(write_folder(tmp_path, {name: gzip.compress(raw) if name.endswith("gz") else raw})) / name
    corpus = prepare(path, tmp_path)
    assert "".join(sum(both(corpus), [])) == content
    (warning,) = corpus.warnings
    reason = found.partition(" (")[0] + " in gzip" * name.endswith("gz")
    assert f"such as {name}, a {reason}; if it is one, convert it: " in warning and f" {path}" in warning
    if name.endswith("gz"):
        return
    path.rename(tmp_path / "table.dat")  # and the message names that way
    with pytest.raises(UserError, match="jupyter" if kind == "notebook" else "if it is a text as it stands, rename"):
        prepare(tmp_path / "table.dat", tmp_path)


def converted(path, error, monkeypatch):
    """What the command of an error makes of a file, in its folder."""
    command = re.search(r": (python -c .*)", str(error))[1].replace("python", sys.executable, 1)
    before = {*path.parent.iterdir()}
    done = subprocess.run(command, shell=True, cwd=path.parent, capture_output=True, executable="/bin/bash")
    assert done.returncode == 0, done.stderr
    (made,) = {*path.parent.iterdir()} - before
    return made


@pytest.mark.parametrize(("name", "text", "column", "expected"), [
    ("pandas.csv", ",text\n0,a\n1,b\n", "text", "ab"), ("one.csv", "text\na\nb\n", "text", "ab"),
    ("spaces.csv", 'id, text\n1, "a, b"\n2, c\n', "text", "a, bc"),
    ("ragged.csv", "id,text\n1,a,x\n2,b\n", "text", "ab"),
    ("bars.csv", "id|text\n1|a\n2|b\n", "text", "ab"), ("bars.CSV", "text| more\na|1\nb|2\n", "text", "ab"),
    ("empty.tsv", "\ttext\n0\ta\n1\tb\n", "text", "ab"), ("one.tsv", "text\na\nb\n", "text", "ab"),
    ("quotes.tsv", 'id\ttext\n1\t"a said he\n2\tb"c\n', "text", '"a said heb"c'),
    ("quotes.dat", 'id\ttext\n1\t"a said he\n2\tb"c\n', "text", '"a said heb"c'),
    ("prose.csv", "It was a dark, stormy night,\nand nobody, not one, was out.", "It was a dark", "and nobody"),
])
def test_a_table_by_its_suffix_is_no_text_however_its_rows_are(name, text, column, expected, tmp_path, monkeypatch):
    text = text if name != "prose.csv" else text * 2
    path = Path(write_folder(tmp_path / "in", {name: text})) / name
    with pytest.raises(UserError, match="not text but (CSV|TSV) table .columns .*rename it to .txt, else") as caught:
        prepare(path, tmp_path)
    made = converted(path, caught.value, monkeypatch)
    records = [json.loads(line) for line in made.read_text().splitlines()]
    assert "".join(record[column] for record in records).startswith(expected)


@pytest.mark.parametrize("name", ["a.json", "a.jsonlines", "a.ndjson", "a.jsonl", "a", "a.json.gz"])
@pytest.mark.parametrize("length", [1, 300])
def test_json_lines_of_another_field_name_their_fields_under_any_name(name, length, tmp_path, monkeypatch):
    """Also where the first line is longer than the first chunk."""
    set_chunk(monkeypatch, 100)
    raw = jsonl(["x" * length + "\n", "y", "z"], "body").encode()
    write_folder(tmp_path, {name: gzip.compress(raw) if name.endswith("gz") else raw})
    with pytest.raises(UserError, match="JSON lines without a text in 'text' .line 1 has 'id', 'body'.*--text_field"):
        prepare(tmp_path / name, tmp_path)
    assert "".join(sum(both(prepare(tmp_path / name, tmp_path, text_field="body")), [])) == "x" * length + "\nyz"


def test_json_lines_whose_first_lines_are_broken_and_long_numbers(tmp_path):
    lines = '\n# a note\nbroken\n{"text": "a"}\n'
    write_folder(tmp_path, {"a.jsonl": lines, "b.jsonl": '{"n": %s, "text": "ab"}\n' % ("7" * 9000)})
    with pytest.raises(UserError, match="JSON lines with a bad line .line 2 is no JSON object"):
        prepare(tmp_path / "a.jsonl", tmp_path)
    assert "".join(sum(both(prepare(tmp_path / "b.jsonl", tmp_path)), [])) == "ab"


@pytest.mark.parametrize("text", ['{\n "text": "a}"\n}\n{\n "text": "{b"\n}\n',
                                  '{"text": "a}",\n "b": []}\n {"text": "{b"}'])
def test_values_of_json_behind_each_other_are_converted(text, tmp_path, monkeypatch):
    path = Path(write_folder(tmp_path / "in", {"a.json": text})) / "a.json"
    with pytest.raises(UserError, match="JSON that is not lines") as caught:
        prepare(path, tmp_path)
    made = converted(path, caught.value, monkeypatch)
    assert [json.loads(line)["text"] for line in made.read_text().splitlines()] == ["a}", "{b"]
    path.write_text(text + "{")
    made.unlink()
    with pytest.raises(AssertionError, match="JSONDecodeError"):
        converted(path, caught.value, monkeypatch)
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize(("record", "field"), [
    ({"id": 1, "data": {"text": "ab"}}, "data.text"), ({"id": 1, "data": {"text": "ab"}}, "data"),
    ({"data": {"deep": {"body": "ab"}}}, "data.deep.body"), ({"data": {"text": "ab"}}, "text"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "b", "content": "b"}]}, "messages"),
    ({"id": 1, "messages": [{"role": "user", "content": "a"}, {"role": "b", "content": "b"}]}, "text"),
])
def test_nested_json_lines_are_converted(record, field, tmp_path, monkeypatch):
    path = Path(write_folder(tmp_path / "in", {"a.jsonl": (json.dumps(record) + "\n") * 3})) / "a.jsonl"
    with pytest.raises(UserError, match="the field must be a string at the top level: .*--text_field") as caught:
        prepare(path, tmp_path, text_field=field)
    made = converted(path, caught.value, monkeypatch)
    texts = sum(both(prepare(made, tmp_path)), [])
    assert "".join(texts).replace("\n", "") == "ababab"


@pytest.mark.parametrize("name", ["{path}{out}.csv", "{name};$(touch x).csv", "new\nline 'and\\ \ttab é.csv"])
def test_names_of_files_stay_words_of_a_command_in_one_line(name, tmp_path, monkeypatch):
    path = Path(write_folder(tmp_path / "in", {name: csv_of()})) / name
    with pytest.raises(UserError) as caught:
        prepare(path, tmp_path)
    made = converted(path, caught.value, monkeypatch)
    assert made.name == path.stem + ".text.jsonl" and len(made.read_text().splitlines()) == 3
    made.unlink()
    write_folder(tmp_path / "in", {"a\nb.txt": "good\n"})
    corpus = prepare(tmp_path / "in", tmp_path)
    assert str(caught.value).isprintable() and corpus.description.isprintable()


@pytest.mark.parametrize("size", [3, 4, 50, 1000])
def test_a_byte_order_mark_is_no_part_of_a_text(size, tmp_path, monkeypatch):
    set_chunk(monkeypatch, size)
    text = "né \ufeffinside\r\n" * 40
    write_folder(tmp_path, {"plain/a.txt": text, "marked/a.txt": "\ufeff" + text})
    plain, marked = (prepare(tmp_path / name, tmp_path) for name in ("plain", "marked"))
    assert "".join(sum(both(marked), [])) == text and marked.fingerprint == plain.fingerprint
    write_folder(tmp_path, {"bad.txt": "\ufeff" + text + "\0"})
    with pytest.raises(UserError, match=f"a zero byte at offset {len(text.encode()) + 3}"):
        prepare(tmp_path / "bad.txt", tmp_path)


def test_a_suffix_decides_where_two_rows_may_be_a_table(tmp_path):
    table = b"id,text\n1,a\n"
    write_folder(tmp_path, {"a.csv": table, "b.csv.gz": gzip.compress(table), "c.txt": table})
    for name in ("a.csv", "b.csv.gz"):
        with pytest.raises(UserError, match="CSV table"):
            prepare(tmp_path / name, tmp_path)
    assert "".join(sum(both(prepare(tmp_path / "c.txt", tmp_path)), [])) == table.decode()


@pytest.mark.parametrize("chunk", [5, 64])
def test_a_bad_byte_is_placed_across_chunks(chunk, tmp_path, monkeypatch):
    set_chunk(monkeypatch, chunk)
    for offset in range(150, 160):
        raw = ("a數é🐍" * 30).encode()[:offset].decode(errors="ignore").encode()
        write_folder(tmp_path, {"a.txt": raw + b"\xffxyz"})
        with pytest.raises(UserError, match=f"byte 0xff at offset {len(raw)}"):
            prepare(tmp_path / "a.txt", tmp_path)
        write_folder(tmp_path, {"a.txt": b"a" * offset + "é".encode() + b"b" * 99 + b"\xffxyz"})
        with pytest.raises(UserError, match=f"UTF-8 with damage .byte 0xff at offset {offset + 101}"):
            prepare(tmp_path / "a.txt", tmp_path)
        write_folder(tmp_path, {"a.txt": raw + b"\0xyz"})
        with pytest.raises(UserError, match=f"a zero byte at offset {len(raw)}"):
            prepare(tmp_path / "a.txt", tmp_path)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw[:40] + b"\xff\xff\xff" + raw[43:]])
def test_a_damaged_gzip_archive(damage, tmp_path):
    raw = damage(gzip.compress(random.Random(0).randbytes(300).hex().encode()))
    write_folder(tmp_path / "in", {"a.txt.gz": raw, "b.txt": "text" * 9})
    with pytest.raises(UserError, match="damaged gzip archive .*: copy or download it again"):
        prepare(tmp_path / "in/a.txt.gz", tmp_path)
    assert "1 damaged gzip archive (a.txt.gz" in prepare(tmp_path / "in", tmp_path).description


# ---- folders

def test_unusable_files_are_skipped_and_counted(folder, tmp_path):
    clean = prepare(folder, tmp_path)
    root = tmp_path / "texts"
    write_folder(root, {".hidden/a.txt": "h", ".secret": "h", "nul.txt": "a\0b", "empty.txt": "",
                        "zcopy.txt": (root / "part0/0.txt").read_bytes()})  # fmt: skip
    os.symlink(tmp_path / "nowhere", root / "link.txt")
    os.mkfifo(root / "pipe")
    corpus = prepare(folder, tmp_path)
    assert corpus.fingerprint == clean.fingerprint and np.array_equal(corpus.train, clean.train)
    assert ("skipped: 1 binary (nul.txt, a zero byte at offset 1); 2 broken links and devices (link.txt); "
            "1 duplicate (zcopy.txt); 1 empty (empty.txt); 2 hidden (.hidden)") in corpus.description  # fmt: skip
    assert corpus.warnings == ()


def test_a_folder_of_which_more_than_half_was_skipped_says_so_loudly(tmp_path):
    files = {f"{i}.txt": f"né {i}\n" * 9 for i in range(4)} | {f".{i}": "hidden" for i in range(9)}
    root = write_folder(tmp_path / "in", files | {f"{i}.latin": f"n\xe9 {i}".encode("latin-1") for i in range(4)})
    assert prepare(root, tmp_path).warnings == ()
    write_folder(tmp_path / "in", {"five.latin": "né".encode("latin-1")})
    (warning,) = prepare(root, tmp_path).warnings
    assert "hidden" not in warning  # the whole list is in the line of the corpus
    assert "5 of 9 files were skipped" in warning and "5 Latin-1 (0.latin, byte 0xe9 at offset 1: iconv" in warning


def test_links_are_followed_once_and_loops_end(folder, tmp_path):
    root = tmp_path / "texts"
    alone = prepare(folder, tmp_path)
    write_folder(tmp_path, {"outside.txt": "not below the folder\n"})
    os.symlink(tmp_path, root / "up")  # holds the folder itself
    os.symlink(root, root / "part0/self")
    os.symlink(root / "part1", root / "again")
    loops = prepare(folder, tmp_path)
    assert loops.fingerprint == alone.fingerprint
    assert re.search(r"3 links to what is above, elsewhere or seen \((up|part0/self|again)", loops.description)
    write_folder(tmp_path / "else", {"a.txt": "elsewhere a\n", "deep/b.txt": "elsewhere b\n", "c.txt": "a file\n"})
    os.symlink(tmp_path / "else", tmp_path / "else/deep/loop")
    os.symlink(tmp_path / "else", root / "first")
    os.symlink(tmp_path / "else", root / "second")
    os.symlink(tmp_path / "else/c.txt", root / "c.txt")
    names = [file.name for file in sources.user_source(folder).files]
    assert {"first/a.txt", "first/deep/b.txt", "c.txt"} <= set(names) and not [n for n in names if "second" in n]
    assert len(names) == 43


def test_a_link_to_itself_is_a_broken_one(folder, tmp_path):
    root = tmp_path / "texts"
    clean = prepare(folder, tmp_path)
    os.symlink(root / "loop", root / "loop")
    os.symlink("round.bin", root / "part0/about.bin")
    os.symlink("about.bin", root / "part0/round.bin")
    corpus = prepare(folder, tmp_path)
    assert corpus.fingerprint == clean.fingerprint and "3 broken links and devices (loop)" in corpus.description
    for name in (root / "loop", root / "loop/below", "x" * 300, "~nobody_of_this_name/x"):
        for keys in ({"source": name}, {"source": folder, "val_data": str(name)}):
            with pytest.raises(UserError, match="--(val_)?data=.*: no such file or folder"):
                prepare(tmp_path=tmp_path, **keys)


@pytest.mark.parametrize("where", ["", "deep/"])
def test_runs_and_caches_of_any_run_are_left_out(where, folder, tmp_path):
    root = tmp_path / "texts"
    clean = prepare(folder, tmp_path)
    prepare(folder, root / f"{where}x")  # a cache of another run
    write_folder(root, {f"{where}a/config.toml": "x = 1", f"{where}a/log.jsonl": "{}\n", f"{where}a/run-1/b.txt": "b",
                        f"{where}b/last.pt": b"PK", f"{where}b/notes.txt": "of a run"})  # fmt: skip
    corpus = prepare(folder, tmp_path)
    assert corpus.fingerprint == clean.fingerprint and "3 with a run or a cache in it" in corpus.description
    write_folder(root, {f"{where}c/config.toml": "x = 1"})  # no run without its log
    assert prepare(folder, tmp_path).fingerprint != clean.fingerprint


@pytest.mark.usefixtures("quick")
def test_a_run_does_not_read_what_other_runs_wrote(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path, {f"{i}.txt": f"a text, number {i}\n" * 40 for i in range(12)})
    monkeypatch.chdir(tmp_path)
    tiny = [option for option in options(tmp_path, "a") if not option.startswith(("--data", "--out", "--cache"))]
    keys = [*tiny, "--data=.", "--n_layer=1", "--pattern=C", "--eval_interval=1"]
    for out, cache in (("a", "tokens"), ("b", "elsewhere/tokens"), ("a", "tokens"), (".", "tokens")):
        assert train.main([*keys, "--max_iters=1", f"--out_dir={out}", f"--cache_dir={cache}"]) == 0
    for out in ("a", "b", "."):
        assert train.main(["--resume", f"--out_dir={out}", "--max_iters=2"]) == 0
    logs = [json.loads((tmp_path / out / "log.jsonl").read_text().splitlines()[0]) for out in ("a", "b", ".")]
    assert len({log["fingerprint"] for log in logs}) == 1 and "12 files" in logs[0]["corpus"]


def test_missing_empty_and_unreadable_data(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path, {"binary/a": b"\0\1", "zero": "", "one": "x"})
    for path, reason in (("nowhere", "no such file"), ("empty", "no text"), ("binary", "1 binary"),
                         ("zero", "not text but empty: give UTF-8 text"), ("one", "no text.*two characters or more")):
        with pytest.raises(UserError, match=reason):
            prepare(tmp_path / path, tmp_path)

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(formats, "open", refuse, raising=False)
    with pytest.raises(UserError, match="one: Permission denied.*readable"):
        prepare(tmp_path / "one", tmp_path)


def test_fingerprint_sees_content_names_and_split(folder, tmp_path):
    first = sources.read_texts(folder).fingerprint
    assert first == sources.read_texts(folder).fingerprint == sources.user_source(folder).fingerprint()
    held_out = write_folder(tmp_path / "other", {"a.txt": "held out\n"})
    others = {sources.read_texts(folder, fraction=0.2).fingerprint, sources.read_texts(folder, held_out).fingerprint}
    path = tmp_path / "texts/part0/0.txt"
    os.rename(path, path.with_name("00.txt"))  # still the first of the folder
    others.add(sources.read_texts(folder).fingerprint)
    path.with_name("00.txt").write_text("other")
    assert len({first, *others, sources.read_texts(folder).fingerprint}) == 5
    path = tmp_path / "lines.jsonl"
    seen = set()
    first = '{"text": "ab", "b": "ab"}\n{"text": "c", "b": "d"}'
    for lines in (first, '{"text": "a"}\n{"text": "bc"}', '{"text": "abc"}'):
        path.write_text(lines)
        seen.add(sources.read_texts(str(path)).fingerprint)
    path.write_text(first)
    assert sources.read_texts(str(path)).fingerprint in seen and len(seen) == 3
    assert sources.read_texts(str(path), field="b").fingerprint not in seen


# ---- split

def sizes(corpus):
    return [len("".join(side).encode()) for side in both(corpus)]


@pytest.mark.parametrize("seed", range(40))
def test_validation_is_a_tenth_of_the_text_and_nothing_is_lost(seed, tmp_path, monkeypatch):
    rng = random.Random(seed)
    set_chunk(monkeypatch, rng.choice([7, 100, 1 << 18]))
    fraction = rng.choice([0.1, 0.1, 0.05, 0.3])
    alphabet = rng.choice(["ab \n", "aé數🐍\n", "abcdefghijklmnopqrstuvwxyzéè" * 40 + "\n", "é數"])
    files, texts = {}, {}
    for _ in range(rng.choice([1, 2, 3, 8, 60])):
        lengths = [int(rng.expovariate(1 / 900)) + 1 for _ in range(rng.choice([1, 1, 30]))]
        made = ["".join(rng.choices(alphabet, k=length)) for length in lengths]
        name = f"{rng.random()}.{'txt' if len(made) == 1 else 'jsonl'}"
        texts[name] = made
        files[name] = made[0] if len(made) == 1 else jsonl(made)
    corpus = prepare(write_folder(tmp_path / "in", files), tmp_path, val_fraction=fraction)
    train, val = both(corpus)
    total = sum(sizes(corpus))
    assert abs(sizes(corpus)[1] / total - fraction) <= 0.1 * fraction + 4 / total
    expected = [text for name in sorted(texts) for text in texts[name]]
    if "by the hash" in corpus.description:
        assert sorted(train + val) == sorted(expected)
    else:
        assert "".join(train + val) == "".join(expected) and len(train + val) <= len(expected) + 1
        assert "the tail of the joined text" in corpus.description


@pytest.mark.parametrize("name", TOKENIZERS)
def test_folder_is_split_by_the_hash_of_its_paths(name, folder, tmp_path):
    corpus = prepare(folder, tmp_path, name)
    root = tmp_path / "texts"
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.txt"))
    ordered = sorted(names, key=lambda n: (int(hashlib.sha256(n.encode()).hexdigest()[:8], 16) % 100, n))
    for tokens, side in ((corpus.train, ordered[4:]), (corpus.val, ordered[:4])):
        assert documents(tokens, corpus.enc) == [(root / n).read_bytes().decode() for n in names if n in side]
    assert "40 files" in corpus.description and name in corpus.description


@pytest.mark.parametrize("chunk", [7, 64, 1 << 18])
@pytest.mark.parametrize("text", ["".join(f"line {i} né🐍\r\n" for i in range(90)), "數é🐍a" * 60, "ab", "🐍é", "é數",
                                  "\n" * 99 + "the end", "x" * 500 + "\n", "first\n" + "x" * 500])
def test_a_single_file_gives_its_tail_to_validation(text, chunk, tmp_path, monkeypatch):
    set_chunk(monkeypatch, chunk)
    write_folder(tmp_path, {"one.txt": text})
    (train,), (val,) = both(prepare(tmp_path / "one.txt", tmp_path))
    assert train + val == text and train and val
    assert text[0] != "l" or train.endswith("\r\n")  # at a line's end, where one is near
    assert len(text) < 9 or abs(len(val.encode()) / len(text.encode()) - 0.1) < 0.011
    (train,), (val,) = both(prepare(tmp_path / "one.txt", tmp_path, val_fraction=0.95))  # all of the text is near it
    assert train + val == text and train and val


@pytest.mark.parametrize("texts", [["abc", "🐍"], ["🐍a"], ["🐍", "a"], ["數", "é"], ["a🐍", "b"]])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_the_smallest_texts_have_two_sides(texts, fraction, tmp_path):
    root = write_folder(tmp_path / "in", {f"{i}.txt": text for i, text in enumerate(texts)})
    train, val = both(prepare(root, tmp_path, val_fraction=fraction))
    assert train and val and sorted("".join(train + val)) == sorted("".join(texts))


def test_two_files_of_which_one_is_a_licence(tmp_path):
    names = [n for n in map("{}.txt".format, range(99)) if sources.path_hash(n) < 10][:1] + ["LICENSE"]
    for large, small in (names, names[::-1]):
        root = write_folder(tmp_path / large, {large: "a line of text\n" * 9000, small: "licence\n" * 80})
        train, val = sizes(prepare(root, tmp_path))
        assert abs(val / (train + val) - 0.1) < 0.001


def test_validation_of_its_own(folder, tmp_path):
    inside = f"{folder}/part1"
    corpus = prepare(folder, tmp_path, val_data=inside)
    val = [path.read_bytes().decode() for path in sorted(Path(inside).iterdir())]
    train = [path.read_bytes().decode() for part in "02" for path in sorted((tmp_path / f"texts/part{part}").iterdir())]
    assert both(corpus) == (train, val) and f"the text of {inside}" in corpus.description
    assert corpus.fingerprint != prepare(folder, tmp_path).fingerprint
    with pytest.raises(UserError, match="every text of --data"):
        prepare(inside, tmp_path, val_data=folder)
    with pytest.raises(UserError, match="--val_data=nowhere: no such file"):
        prepare(folder, tmp_path, val_data="nowhere")
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="val_fraction=.*above 0 and below 1"):
            prepare(folder, tmp_path, val_fraction=fraction)


def test_warnings_of_the_shares():
    assert sources.split_warning(900, 100, 99, "help") == "" and sources.split_warning(300, 100, 64, "help") == ""
    for train_tokens, val_tokens, block, words in (
        (9950, 49, 8, "0.5%"), (299, 101, 8, "25.2%"), (900, 100, 100, "fewer than one block of 100"),
    ):  # fmt: skip
        warning = sources.split_warning(train_tokens, val_tokens, block, "help")
        assert words in warning and warning.endswith(": help")


def test_the_remedy_for_a_split_and_options_without_effect(folder, tmp_path):
    """Which ones are named depends on what validates."""
    held_out = write_folder(tmp_path / "other", {"a.txt": "held out\n", "b.bad": b"\0"})
    plain = sources.read_texts(folder, fraction=0.2)
    assert "--val_fraction" in plain.remedy and "--val_data=PATH" in plain.remedy and plain.warnings == ()
    apart = sources.read_texts(folder, held_out, 0.2, "body")
    assert "--val_fraction" not in apart.remedy and "--val_data=PATH" in apart.remedy
    assert "1 binary (b.bad" in apart.rule
    assert [warning.partition(":")[0] for warning in apart.warnings] == [
        "--val_fraction=0.2 has no effect", "--text_field=body has no effect"]  # fmt: skip
    write_folder(tmp_path / "other", {"c.jsonl": '{"body": "text"}'})
    assert sources.read_texts(folder, held_out, field="body").warnings == ()


# ---- tokens

@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_core_writes_what_many_write(name, tmp_path, monkeypatch):
    set_chunk(monkeypatch, 1000)
    rng = random.Random(0)
    files = {f"{i}.txt": f"text {i}\nénd\n" * rng.choice([1, 3, 400]) for i in range(150)}
    root = write_folder(tmp_path / "in", files | {"z.jsonl": jsonl(CONTENTS * 9)})
    written = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(sources, "cores", lambda cores=cores: cores)
        prepare(root, tmp_path / str(cores), name)
        written.append([path.read_bytes() for path in sorted((tmp_path / f"{cores}/cache").iterdir())])
    assert written[0] == written[1] == written[2] and len(written[0]) == 2


def test_pieces_end_with_a_line_and_are_tokenised_one_by_one(tmp_path, monkeypatch):
    set_chunk(monkeypatch, 50)
    text = "".join(f"def f{i}(x):\n        return {i}\n\n" for i in range(300))
    write_folder(tmp_path, {"a.py": text})
    enc = data.get_tokenizer("python4096")
    expected, rest = [], text
    while rest:
        at = rest.find("\n", 50) + 1 if len(rest) > 50 else len(rest)
        expected.append(enc.encode_ordinary(rest[:at]))
        rest = rest[at:]
    part = sources.whole(sources.user_source(str(tmp_path / "a.py")))
    got = np.concatenate(list(sources.encode(part, enc))).tolist()
    assert got == sum(expected, []) + [enc.eot_token] != enc.encode_ordinary(text) + [enc.eot_token]


def test_work_is_bounded_and_progress_is_shown(tmp_path, monkeypatch, capsys):
    set_chunk(monkeypatch, 1000)
    monkeypatch.setattr(sources, "cores", lambda: 2)
    write_folder(tmp_path, {"a.txt": "a line of text\n" * 20_000})
    part = sources.whole(sources.user_source(str(tmp_path / "a.txt")))
    taken = []
    bundles = list(sources.bundles(part))
    monkeypatch.setattr(sources, "bundles", lambda part: (taken.append(1) or bundle for bundle in bundles))
    stream = sources.encode(part, data.get_tokenizer("bytes"))
    next(stream)
    assert len(taken) <= 6
    list(stream)
    assert len(taken) > 250 and capsys.readouterr().err == ""
    monkeypatch.setattr(sources, "PROGRESS_SECONDS", 0)
    list(sources.encode(part, data.get_tokenizer("bytes")))
    assert re.fullmatch(r"tokens: 0 of 0 MB, [\d.]+ MB/s, \d+ s left", capsys.readouterr().err.splitlines()[-1])


def test_special_tokens_spelled_in_a_text_stay_text(tmp_path):
    corpus = prepare(write_folder(tmp_path / "texts", {f"{i}.txt": f"{i}<|endoftext|>\n" for i in range(40)}), tmp_path)
    for tokens in (corpus.train, corpus.val):
        texts = corpus.enc.decode_bytes(tokens.tolist()).count(b"<|endoftext|>") / 2
        assert (np.asarray(tokens) == corpus.enc.eot_token).sum() == texts > 0


def test_an_interrupted_preparation_leaves_nothing_and_two_at_once_agree(folder, tmp_path, monkeypatch):
    set_chunk(monkeypatch, 500)
    encode_bundle, calls = sources.encode_bundle, []

    def interrupted(enc, bundle):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return encode_bundle(enc, bundle)

    monkeypatch.setattr(sources, "encode_bundle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path)
    assert len(calls) > 8 and os.listdir(tmp_path / "cache") == []
    with ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(lambda _: prepare(folder, tmp_path), range(4)))
    alone = prepare(folder, tmp_path / "alone")
    assert all(np.array_equal(c.train, alone.train) and np.array_equal(c.val, alone.val) for c in corpora)
    assert len(os.listdir(tmp_path / "cache")) == 2


# ---- texts that change under the reader


def grow(path):
    path.write_bytes(path.read_bytes() + b"more\n")


def shrink(path):
    path.write_bytes(path.read_bytes()[:-3])


def change_a_letter(path):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def change_the_end(path):
    path.write_bytes(path.read_bytes()[:-2] + b"~\n")


def become_binary(path):
    path.write_bytes(bytes(range(256)) * 9)


def vanish(path):
    path.unlink()


def become_a_folder(path):
    path.unlink()
    path.mkdir()


def become_empty(path):
    path.write_bytes(b"")


CHANGES = [grow, shrink, change_a_letter, change_the_end, become_binary, vanish, become_a_folder, become_empty]
LINES = "".join(f"line {i} né\n" for i in range(60))


FOLDER = {"a.txt": LINES} | {f"{i}.txt": f"text {i}\n" * 40 for i in range(30)}  # a.txt is on one of the sides
PACKED = {"a.txt.gz": gzip.compress(LINES.encode(), mtime=0)}


@pytest.mark.faults
@pytest.mark.parametrize(("files", "change", "chunk"), [
    *[({"a.txt": LINES}, change, 50) for change in CHANGES],  # it is cut into both sides
    *[({"a.txt": LINES}, change, 1 << 18) for change in (grow, shrink, change_a_letter, become_binary)],
    *[({"a.jsonl": jsonl([LINES, "b" * 90, "", LINES])}, change, 50) for change in (grow, shrink, change_a_letter)],
    *[(PACKED, change, 50) for change in (shrink, change_a_letter)],
    *[(FOLDER, change, 50) for change in (grow, vanish)],
], ids=lambda it: getattr(it, "__name__", None))
def test_a_text_that_changes_while_it_is_read_is_named_and_not_cached(change, files, chunk, tmp_path, monkeypatch):
    """Between the scan and the encoding of either side; put back it is encoded as if nothing had been."""
    set_chunk(monkeypatch, chunk)
    root = tmp_path / "texts"
    write_folder(root, files)
    path = root / next(iter(files))
    (tmp_path / "alone").mkdir()
    expected = prepare(root, tmp_path / "alone")
    real_encode = sources.encode
    for side in (0, 1):
        calls = []

        def encode(part, enc, side=side, calls=calls):
            if len(calls) == side:
                change(path)
            calls.append(1)
            return real_encode(part, enc)

        monkeypatch.setattr(data, "encode", encode)
        read = any(file.name == path.name and begin < end for part in sources.read_texts(str(root)).parts[side:]
                   for file, (begin, end) in zip(part.source.files, part.spans, strict=True))  # fmt: skip
        if read:
            with pytest.raises(UserError, match=f"{path.name} has changed while it was read: run again$"):
                prepare(root, tmp_path)
            assert os.listdir(tmp_path / "cache") == []
        if path.is_dir():
            path.rmdir()
        write_folder(root, files)
    monkeypatch.setattr(data, "encode", real_encode)
    corpus = prepare(root, tmp_path)
    assert corpus.fingerprint == expected.fingerprint
    assert np.array_equal(corpus.train, expected.train) and np.array_equal(corpus.val, expected.val)


@pytest.mark.faults
def test_a_text_that_grows_as_fast_as_it_is_read_ends(tmp_path, monkeypatch):
    set_chunk(monkeypatch, 100)
    path = tmp_path / "a.txt"
    path.write_text(LINES)
    source = sources.user_source(str(path))
    pieces = 0
    with pytest.raises(UserError, match="a.txt has changed while it was read: run again"):
        for _ in formats.checked_pieces(source.root, source.files[0], "text"):
            pieces += 1
            assert pieces < 20
            with path.open("a") as file:
                file.write(LINES)

@pytest.mark.faults
def test_no_token_file_is_empty(tmp_path):
    enc = data.get_tokenizer("bytes")
    for ids in ([], [[]], [[], [1]]):
        with pytest.raises(UserError, match="t.bin would have [01] tokens: its text has changed"):
            tokenfiles.write_tokens(tmp_path / "t.bin", iter(ids), enc, "")
    assert os.listdir(tmp_path) == []


@pytest.mark.faults
def test_the_side_that_a_change_is_not_on_sees_it_too(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(LINES)
    train_part, val_part, _ = sources.split(sources.user_source(str(path)), 0.3)
    kept = "".join(sources.part_pieces(train_part))
    assert kept and LINES == kept + "".join(sources.part_pieces(val_part))
    change_the_end(path)
    for part in (train_part, val_part):
        with pytest.raises(UserError, match="has changed while it was read"):
            list(sources.part_pieces(part))
