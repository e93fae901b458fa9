"""Every form in which a text file or a pipe arrives gives the same lines, whatever the locale."""

from __future__ import annotations

import gzip
import io
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from local_rerank.errors import InvalidRequest
from local_rerank.text_files import lines, open_utf8, plain_file, suffix_of

TEXT = 'first\r\n{"text": "U+2028 \u2028 is no line end"}\n\n巴黎是法国的首都 🗼'
LINES = [(1, "first"), (2, '{"text": "U+2028 \u2028 is no line end"}'), (3, ""), (4, "巴黎是法国的首都 🗼")]
UTF8 = TEXT.encode()
zstd = zstandard.ZstdCompressor().compress

FORMS: dict[str, Callable[[], bytes]] = {
    "utf-8": lambda: UTF8,
    "utf-8 with BOM": lambda: TEXT.encode("utf-8-sig"),
    "utf-16": lambda: TEXT.encode("utf-16"),
    "utf-16-be": lambda: b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "gzip": lambda: gzip.compress(UTF8),
    "gzip of two members": lambda: gzip.compress(UTF8[:9]) + gzip.compress(UTF8[9:]),
    "gzip, padded": lambda: gzip.compress(UTF8) + bytes(99),
    "gzip of utf-16": lambda: gzip.compress(TEXT.encode("utf-16")),
    "zstd": lambda: zstd(UTF8),
    "zstd of two frames": lambda: zstd(UTF8[:9]) + zstd(UTF8[9:]),
    "zstd with BOM": lambda: zstd(TEXT.encode("utf-8-sig")),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_lines(form: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(FORMS[form]())
    assert list(lines(file, "input")) == LINES


@pytest.mark.parametrize("form", FORMS)
def test_a_pipe_gives_the_same_lines_even_if_it_delivers_single_bytes(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()

    def deliver() -> None:
        for byte in FORMS[form]():
            os.write(write, bytes([byte]))
        os.close(write)

    thread = threading.Thread(target=deliver)
    thread.start()
    with io.TextIOWrapper(os.fdopen(read, "rb"), encoding="latin-1") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert list(lines(None, "documents")) == LINES
    thread.join()


@pytest.mark.parametrize("form", FORMS)
def test_a_plain_file_can_be_read_from_any_offset(form: str, tmp_path: Path) -> None:
    file, copy = tmp_path / "file", tmp_path / "copy"
    file.write_bytes(FORMS[form]())
    plain = plain_file(file, copy, "corpus")
    assert plain.read_bytes().removeprefix(b"\xef\xbb\xbf") == UTF8
    assert (plain == file) == form.startswith("utf-8")
    assert plain_file(file, copy, "corpus") == plain


def test_empty_and_short_files_are_read(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"a", b"\xef\xbb\xbf", b"\xff\xfe")):
        file = tmp_path / str(number)
        file.write_bytes(content)
        assert list(lines(file, "input")) == ([(1, "a")] if content == b"a" else [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\nb\xe4d\n", r"file:2 is not UTF-8 \(byte 2: invalid continuation byte\); save it as UTF-8"),
        (gzip.compress(UTF8, mtime=0)[:-9], "file is compressed and damaged"),
        (gzip.compress(UTF8, mtime=0)[:20] + b"garbage", "file is compressed and damaged"),
        (zstd(UTF8 * 9)[:12] + b"garbage", "file is compressed and damaged"),
        (TEXT.encode("utf-16")[:-1], "file is not UTF-16, as its BOM says"),
    ],
)
def test_an_error_names_the_file_and_what_is_wrong(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(InvalidRequest, match=message) as error:
        list(lines(file, "corpus"))
    assert error.value.field == "corpus"


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for file, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InvalidRequest, match=f"{file} cannot be read: {why}"), open_utf8(file, "input"):
            pass


def test_the_suffix_is_that_of_the_form() -> None:
    names = {"a.jsonl": ".jsonl", "a.JSONL.gz": ".jsonl", "a.b.TSV.ZST": ".tsv", "a.gz": "", "a": ""}
    assert {name: suffix_of(Path("folder.d") / name) for name in names} == names
