"""A file of records -> rows, one after the other, from any position of it: JSON lines, CSV, TSV and Parquet.

Each item comes with the position behind it, from which a later run can go on. A record that cannot be read is an item
too (`Rejected`) and the next one follows; only a file that cannot be read at all is an error. Memory holds one record,
or one batch of a Parquet file. TREC runs are in `trec_source`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from local_rerank.batch.rows import Row, parse_record
from local_rerank.errors import InvalidRequest

MAX_LINE_BYTES = 64 << 20  # a longer line is rejected: it would be no record, but a file without line feeds
MAX_FIELD_CHARS = 8 << 20  # of CSV; a quote that is never closed ends here
MAX_CONTENT_CHARS = 10_000  # of a rejected record that are kept


@dataclass(frozen=True, slots=True)
class Position:
    """Where the next record begins."""

    offset: int = 0  # bytes of a text file, rows of others
    number: int = 1  # its line, or its row


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A record that cannot be ranked, and why."""

    number: int  # its line, or its row
    error: str
    content: str  # as it stands in the file, its start if it is long
    file: str


Item = tuple[Row | Rejected, Position]
"""A record and the position behind it."""


class Source(Protocol):
    """Where rows come from."""

    @property
    def file(self) -> Path:
        """The file that line and row numbers are of."""

    @property
    def size(self) -> int:
        """The offset behind the last record."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the fields; of JSON lines those of the first record."""

    @property
    def is_pairs(self) -> bool:
        """Whether each record is one pair, or each a query with its documents."""

    def read(self, position: Position) -> Iterator[Item]:
        """Records from a position to the end."""


def open_source(file: Path) -> Source:
    """The reader for a file, by its name; raises InvalidRequest."""
    opener = SOURCES.get(file.suffix.lower())
    if opener is None:
        raise InvalidRequest(f"{file} must end in one of {', '.join(SOURCES)}", field="input")
    if not file.is_file():
        raise InvalidRequest(f"{file} is no file here", field="input")
    try:
        return opener(file)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}", field="input") from error


class JsonLines:
    """An object on each line, all pairs or all queries with documents as the first is; blank lines are skipped."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.size = file.stat().st_size
        first = next((item for item, _ in self._read(Position()) if isinstance(item, Row)), None)
        self.is_pairs = first is not None and first.is_pair
        self.columns = ("query",) if first is None else tuple(first.fields)

    def read(self, position: Position) -> Iterator[Item]:
        for item, behind in self._read(position):
            if isinstance(item, Row) and item.is_pair != self.is_pairs:
                content = json.dumps(item.fields, ensure_ascii=False)[:MAX_CONTENT_CHARS]
                number, error = behind.number - 1, other_kind(self.is_pairs)
                yield Rejected(file=str(self.file), number=number, error=error, content=content), behind
            else:
                yield item, behind

    def _read(self, position: Position) -> Iterator[Item]:
        with self.file.open("rb") as stream:
            stream.seek(position.offset)
            for line, start, behind in lines_of(stream, position):
                if line.strip():
                    yield (
                        _parsed(str(self.file), start.number, line, lambda data: parse_record(parse_json_line(data))),
                        behind,
                    )


class Delimited:
    """A header, then a pair on each line. A quoted field of CSV may hold line feeds; TSV has no quotes, as is usual."""

    is_pairs = True

    def __init__(self, file: Path) -> None:
        self.file = file
        self._is_tsv = file.suffix.lower() == ".tsv"
        self.size = file.stat().st_size
        with file.open("rb") as stream:
            line = stream.readline(MAX_LINE_BYTES)
        try:
            (header,) = self._reader([line.decode("utf-8-sig")])
        except (ValueError, csv.Error) as error:
            raise InvalidRequest(f"{file}:1 is no header: {error or 'the file is empty'}", field="input") from error
        if missing := [name for name in ("query", "document") if name not in header]:
            raise InvalidRequest(f"{file}:1 names no column {missing[0]}; it has {', '.join(header)}", field="input")
        if len(set(header)) < len(header):
            raise InvalidRequest(f"{file}:1 names a column twice", field="input")
        self.columns = tuple(header)
        self._begin = Position(len(line), 2)

    def read(self, position: Position) -> Iterator[Item]:
        with self.file.open("rb") as stream:
            behind = max(position, self._begin, key=lambda each: each.offset)
            while behind.offset < self.size:
                stream.seek(behind.offset)
                for item, behind in self._until_broken(stream, behind):  # noqa: B020  # to go on behind the last one
                    if item is not None:
                        yield item, behind

    def _until_broken(self, stream: IO[bytes], position: Position) -> Iterator[tuple[Row | Rejected | None, Position]]:
        """Records up to the end or to a record that is no CSV, of which the first line is rejected."""
        lines = _Lines(stream, position)
        reader = self._reader(lines)
        while True:
            start, lines.first = lines.behind, b""
            try:
                values = next(reader)
            except StopIteration:
                yield None, lines.behind
                return
            except (csv.Error, UnicodeDecodeError) as error:
                behind = Position(start.offset + len(lines.first), start.number + 1)
                yield self._rejected(start.number, f"not {self._kind}: {error}", lines.first), behind
                return
            if values:  # a blank line has none
                yield self._row(values, start.number, lines.first), lines.behind

    def _row(self, values: list[str], number: int, line: bytes) -> Row | Rejected:
        if len(values) != len(self.columns):
            return self._rejected(number, f"{len(values)} fields; the header has {len(self.columns)}", line)
        record = dict(zip(self.columns, values, strict=True))
        return _parsed(str(self.file), number, line, lambda _: parse_record(_without_blanks(record)))

    def _rejected(self, number: int, error: str, line: bytes) -> Rejected:
        return Rejected(file=str(self.file), number=number, error=error, content=content_of(line))

    def _reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        csv.field_size_limit(MAX_FIELD_CHARS)
        if self._is_tsv:
            return csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return csv.reader(lines, strict=True)

    @property
    def _kind(self) -> str:
        return "TSV" if self._is_tsv else "CSV"


class _Lines:
    """Lines for a csv.reader, which takes as many as a record has; remembers the first of them and where it stands."""

    def __init__(self, stream: IO[bytes], position: Position) -> None:
        self._stream = stream
        self.behind = position
        self.first = b""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        self.first = self.first or line
        self.behind = Position(self.behind.offset + len(line), self.behind.number + 1)
        return line.decode("utf-8")


def lines_of(stream: IO[bytes], position: Position) -> Iterator[tuple[bytes, Position, Position]]:
    """Lines with the positions before and behind each; of one that is too long only the beginning, without its end."""
    while line := stream.readline(MAX_LINE_BYTES):
        length = len(line)
        more = line
        while len(more) == MAX_LINE_BYTES and not more.endswith(b"\n"):
            more = stream.readline(MAX_LINE_BYTES)
            length += len(more)
        behind = Position(position.offset + length, position.number + 1)
        yield line, position, behind
        position = behind


def _parsed(file: str, number: int, line: bytes, parse: Callable[[bytes], Row]) -> Row | Rejected:
    try:
        if len(line) >= MAX_LINE_BYTES:
            raise ValueError(f"the line has {MAX_LINE_BYTES} bytes or more")
        return replace(parse(line), number=number)
    except (InvalidRequest, ValueError, RecursionError) as error:
        return Rejected(file=file, number=number, error=str(error), content=content_of(line))


def parse_json_line(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig").rstrip("\r\n"), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("not JSON: nested too deeply") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name}")


def _without_blanks(record: dict[str, str]) -> dict[str, Any]:
    """CSV has no null: an empty instruction means that there is none."""
    return record | {"instruction": record.get("instruction") or None} if "instruction" in record else record


def other_kind(is_pairs: bool) -> str:
    """Why a record is rejected that is not of the kind of the first one; `is_pairs`: whether that is a pair."""
    kinds = ("documents", "document") if is_pairs else ("document", "documents")
    return "the record has {}, where the first one of the file has {}".format(*kinds)


def content_of(line: bytes) -> str:
    """A rejected line as text, cut."""
    return line.decode("utf-8", "backslashreplace").rstrip("\r\n")[:MAX_CONTENT_CHARS]


def _open_parquet(file: Path) -> Source:
    from local_rerank.batch.parquet import ParquetSource

    return ParquetSource(file)


SOURCES: dict[str, Callable[[Path], Source]] = {
    ".jsonl": JsonLines,
    ".csv": Delimited,
    ".tsv": Delimited,
    ".parquet": _open_parquet,
}
"""By the end of the file's name."""
