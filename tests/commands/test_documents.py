"""Documents of `rank`: every form of a file and of standard input, by suffix and by content."""

from __future__ import annotations

import gzip
import io
import sys
import zipfile
from pathlib import Path

import pytest
import zstandard

from local_rerank.commands.documents import read_documents
from local_rerank.errors import InvalidRequest

LINES = b"one\n\n two\r\nthree\n"
JSON_LINES = b'"one"\n\n{"text": " two", "document": "x"}\r\n{"id": 1, "document": "three"}\n'
JSON_ARRAY = b'[\n "one", {"text": " two"},\n {"text": null, "document": "three"}\n]\n'
JSON_OBJECTS = b'{\n "text": "one"\n}\n{\n "text": " two"\n} {"text": "three"}'  # as jq prints them
CSV = 'id,Text\n1,one\n2," two"\n3,three\n'
TEXTS = ["one", " two", "three"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.txt", LINES),
        ("d", LINES),
        ("D.TXT.GZ", gzip.compress(LINES, mtime=0)),
        ("d.md", b"\xef\xbb\xbf" + LINES),
        ("d.jsonl", JSON_LINES),
        ("d.NDJSON.zst", zstandard.ZstdCompressor().compress(JSON_LINES)),
        ("d.JSONL", '"one"\n" two"\n"three"'.encode("utf-16")),
        ("d.Json", JSON_ARRAY),
        ("d.json", JSON_LINES),
        ("d.jsonl", JSON_ARRAY),
        ("d.json", JSON_OBJECTS),
        ("d.csv", CSV.encode()),
        ("d.CSV.gz", gzip.compress(CSV.encode("utf-8-sig"), mtime=0)),
        ("d.csv", CSV.replace(",", ";").encode()),
        ("d.tsv", CSV.replace(",", "\t").encode("utf-16")),
        ("d.txt", JSON_ARRAY),
        ("d.txt", JSON_OBJECTS),
        ("d.txt", b'"one"\n" two"\n"three"'),
    ],
)
def test_a7_a_file_is_read_by_suffix_and_content(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_documents(tmp_path / name) == TEXTS


@pytest.mark.parametrize("file", [None, Path("-")], ids=["no file", "--file -"])
@pytest.mark.parametrize("content", [LINES, JSON_ARRAY, JSON_OBJECTS, "one\n two\nthree".encode("utf-16")])
def test_a8_standard_input_is_read_by_content_whatever_the_locale(
    content: bytes, file: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
    assert read_documents(file) == TEXTS


@pytest.mark.parametrize(
    "content",
    [
        '[1] "A" is cited\n[2] B',
        '"To be" is a quotation\nand this is none',
        "{curly}\n{text}",
        "{\n a: 1\n}",
        "[]()",
        "1\n2",
    ],
)
def test_a7_text_that_only_resembles_json_is_text(content: str, tmp_path: Path) -> None:
    file = tmp_path / "d.txt"
    file.write_text(content, encoding="utf-8")
    assert read_documents(file) == content.split("\n")


def test_a7_cells_of_a_table_may_be_long_and_of_several_lines(tmp_path: Path) -> None:
    file, long = tmp_path / "d.csv", "x" * 200_000
    file.write_text(f'text,id\n"a ""b"",\n\u2028c",1\n{long},2\n,3\n', encoding="utf-8")
    assert read_documents(file) == ['a "b",\n\u2028c', long, ""]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.csv", b"id,body\n1,a\n", r"d.csv must have a column text or document; its columns are: id, body"),
        ("d.tsv", b"7\tno head\n", "its columns are: 7, no head"),
        ("d.csv", b"", "its columns are: none"),
        ("d.csv", b"id,text\n1,a\n2\n", "d.csv:3 has 1 columns; the head has 2"),
        ("d.csv", b'text,id\n"a"b,1\n', "d.csv:2 is not a table in CSV"),
        ("d.csv", b'text,id\n"a,1\n', "is not a table in CSV: unexpected end of data"),
        ("d.jsonl", b'"a"\n{"text": 1}\n', "d.jsonl:2 must be a string or an object with text or document"),
        ("d.jsonl", b'"a"\n{"text": "b"\n', "d.jsonl:2 is not JSON"),
        ("d.json", b'["a", {"body": "b"}]', "d.json, element 2 must be a string or an object"),
        ("d.json", b'{\n"documents": ["a"]\n}', "d.json:1 must be a string or an object"),
        ("d.txt", b'{"text": "a"}\nb\n', "d.txt:2 is not JSON"),
        ("d.txt", b'{"body": "a"}\n', "d.txt:1 must be a string or an object"),
        ("d.txt", b'["a",', "d.txt:1 is not JSON"),
        ("d.json", b"[" * 100_000, "d.json:1 is not JSON that can be read"),
        ("d.txt", b"%PDF-1.7\n%\xe2\xe3", "d.txt is a PDF, which cannot be read; give text"),
        ("d.txt", b"\x89PNG\r\n\x1a\n\0", "is an image"),
        ("d.jsonl", gzip.compress(gzip.compress(b"a", mtime=0), mtime=0), "is compressed twice"),
        ("d.txt", b"a\nb\0c\n", "d.txt:2 has a NUL: it is binary"),
        ("d.txt", "no BOM".encode("utf-16-le"), "d.txt:1 has a NUL: it is binary, or UTF-16 without a byte order mark"),
        ("d.txt", "巴黎\n".encode("utf-16-be"), "d.txt:1 has a NUL"),
        ("d.txt", b"\x7fELF\x02\0\xff\n", "d.txt:1 has a NUL: it is binary"),
        ("d.txt", "a".encode("utf-32"), "is UTF-32"),
        ("d.txt", b"caf\xe9\n", "d.txt:1 is not UTF-8"),
    ],
)
def test_a7_what_cannot_be_read_is_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest, match=words) as error:
        read_documents(tmp_path / name)
    assert error.value.field == "file"


def test_a7_an_office_file_is_not_ranked_as_text(tmp_path: Path) -> None:
    file = tmp_path / "d.docx"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    with pytest.raises(InvalidRequest, match="is a zip archive, such as DOCX"):
        read_documents(file)
