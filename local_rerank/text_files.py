"""Read text as files and pipes hold it: UTF-8 with or without BOM, UTF-16 by its BOM, gzip and zstd by their magic.

Every command reads through `lines` or `open_utf8`, so that no result depends on the locale, and every error names the
file and the line. `visible` is for showing text of others to people.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from local_rerank.errors import ConfigError, InvalidRequest

CHUNK_BYTES = 1 << 16
COMPRESSED_SUFFIXES = (".gz", ".zst")
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_DECOMPRESSORS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),  # 31: with gzip's header and checksum
    b"\x28\xb5\x2f\xfd": lambda: zstandard.ZstdDecompressor().decompressobj(),
}
_BINARY = {  # what starts a file -> what it is
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a zip archive, such as DOCX, XLSX, EPUB or a bundle",
    b"\xd0\xcf\x11\xe0": "an old Office file, such as DOC or XLS",
    b"{\\rtf1": "RTF",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"PAR1\x15": "Parquet",
    b"ARROW1\x00\x00": "Arrow",
    b"SQLite format 3\x00": "an SQLite database",
    b"BZh91AY&": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x1f\x8b": "compressed twice",
    b"\x28\xb5\x2f\xfd": "compressed twice",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
}
_INVISIBLE = re.compile(
    "[\0-\x1f\x7f-\x9f"  # control characters: C0 with escape, line ends and tabs; C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # those of bidirectional text
    "\u00ad\u180e\u200b\u2028\u2029\u2060-\u2065\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"  # no width, or a line end
)
_HEAD_BYTES = max(map(len, _BINARY))


def lines(file: Path | None, field: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line of a file, or of standard input for None, without line ends.

    Only \\n and \\r\\n end a line, because JSON strings may contain Unicode's other line breaks. Raises InvalidRequest
    about `field`.
    """
    with open_utf8(file, field) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InvalidRequest(not_utf8(f"{name_of(file)}:{number}", error), field=field) from error


def not_utf8(where: str, error: UnicodeDecodeError) -> str:
    """Describe a line that is not UTF-8."""
    if b"\0" in error.object:
        return has_nul(where)
    return f"{where} is not UTF-8 (byte {error.start + 1}: {error.reason}); save it as UTF-8, or as UTF-16 with a BOM"


def has_nul(where: str) -> str:
    """Describe a line that no text has."""
    return f"{where} has a NUL: it is binary, or UTF-16 without a byte order mark"


@contextmanager
def open_utf8(file: Path | None, field: str) -> Iterator[IO[bytes]]:
    """Open a file, or standard input for None, as a stream of UTF-8 bytes without BOM.

    Raises InvalidRequest about `field` when opened, and when read from inside the block.
    """
    try:
        stream = sys.stdin.buffer if file is None else file.open("rb")
    except OSError as error:
        raise InvalidRequest(_unreadable(file, error), field=field) from error
    with nullcontext() if file is None else stream:
        yield io.BufferedReader(_RawChunks(_readable_chunks(stream, file, field)), CHUNK_BYTES)


def name_of(file: Path | None) -> str:
    return "standard input" if file is None else str(file)


def as_utf8(argument: str) -> str:
    """A text from the command line in UTF-8, whatever the locale. Bytes that are not UTF-8 stay as they are read."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def visible(text: str, *, keep_lines: bool = False) -> str:
    r"""A text for people, in which no character can move the cursor, hide or reorder text, or start another line.

    `keep_lines`: leave line feeds, in texts that have several lines of our own.

    >>> visible("\x1b[31mred\n")
    '\\x1b[31mred\\n'
    """
    return _INVISIBLE.sub(lambda found: found[0] if keep_lines and found[0] == "\n" else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def suffix_of(file: Path) -> str:
    """The suffix that tells the file's form: in lower case, without that of a compression.

    >>> suffix_of(Path("corpus.JSONL.gz"))
    '.jsonl'
    """
    name = Path(file.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED_SUFFIXES else name.suffix


def plain_file(file: Path, copy: Path, field: str) -> Path:
    """Return a file in UTF-8 that can be read from any offset: `file` itself, or `copy`, which is then written."""
    try:
        with file.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise InvalidRequest(_unreadable(file, error), field=field) from error
    if _decompressor(head) is None and not head.startswith(_UTF16_BOMS):
        return file
    if not copy.exists():
        incomplete = copy.with_name(copy.name + ".new")
        incomplete.unlink(missing_ok=True)
        with open_utf8(file, field) as stream, incomplete.open("xb") as target:
            shutil.copyfileobj(stream, target)
        incomplete.replace(copy)
    return copy


def check_writable(file: Path, field: str) -> None:
    """Raise ConfigError before the work if a file could not be written after it."""
    if file.is_dir():
        raise ConfigError(f"{field} is {file}, which is a folder; it must be a file")
    if not file.parent.is_dir():
        raise ConfigError(f"{field} is {file}; there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{field} is {file}, which cannot be written: no permission")


def _unreadable(file: Path | None, error: OSError) -> str:
    return f"{name_of(file)} cannot be read: {error.strerror or error}"


def _readable_chunks(stream: IO[bytes], file: Path | None, field: str) -> Iterator[bytes]:
    """The stream in UTF-8; every error names the file."""
    chunks = iter(partial(cast(io.BufferedReader, stream).read1, CHUNK_BYTES), b"")
    try:
        head, chunks = _peek(_decompressed(chunks))
        if kind := next((kind for magic, kind in _BINARY.items() if head.startswith(magic)), None):
            what = f"{name_of(file)} is {kind}, which cannot be read; give text, plain or compressed with gzip or zstd"
            raise InvalidRequest(what, field=field)
        yield from _utf8(chunks)
    except OSError as error:
        raise InvalidRequest(_unreadable(file, error), field=field) from error
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise InvalidRequest(f"{name_of(file)} is compressed and damaged: {error}", field=field) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name_of(file)} is not UTF-16, as its BOM says: {error.reason}", field=field) from error


def _utf8(chunks: Iterator[bytes]) -> Iterator[bytes]:
    head, chunks = _peek(chunks)
    if head.startswith(_UTF16_BOMS):
        return codecs.iterencode(codecs.iterdecode(chunks, "utf-16"), "utf-8")
    if head.startswith(_UTF8_BOM):
        return chain([next(chunks).removeprefix(_UTF8_BOM)], chunks)
    return chunks


def _decompressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The contents of gzip members or zstd frames; other data as it is. Raises EOFError if a part is incomplete."""
    head, chunks = _peek(chunks)
    decompressor = _decompressor(head)
    if decompressor is None:
        yield from chunks
        return
    part = decompressor()
    for chunk in chunks:
        rest = chunk
        while rest := rest.lstrip(b"\0") if part.eof else rest:  # zeros may pad a gzip file
            part = decompressor() if part.eof else part
            yield part.decompress(rest)
            rest = part.unused_data
    if not part.eof:
        raise EOFError("it ends too early")


def _decompressor(head: bytes) -> Callable[[], Any] | None:
    return next((each for magic, each in _DECOMPRESSORS.items() if head.startswith(magic)), None)


def _peek(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return at least the first `_HEAD_BYTES`, which a pipe may deliver one by one, and chunks that still hold them."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= _HEAD_BYTES:
            break
    return head, chain([head], chunks)


class _RawChunks(io.RawIOBase):
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's buffer has no length
        chunk = self._rest or next(filter(None, self._chunks), b"")
        count = min(len(chunk), len(buffer))
        buffer[:count], self._rest = chunk[:count], chunk[count:]
        return count
