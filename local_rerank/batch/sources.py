"""Read rows from JSON lines, CSV and TSV files, starting at any position.

Each item comes with the position after it, where a later run can resume. A malformed record becomes a `Rejected` item
and reading continues; only an unreadable file is an error. One record is in memory at a time.
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

MAX_LINE_BYTES = 64 << 20  # a longer line is rejected; it is probably a file without line feeds
MAX_FIELD_CHARS = 8 << 20  # in CSV; limits a quote that is never closed
MAX_CONTENT_CHARS = 10_000  # kept of a rejected record


@dataclass(frozen=True, slots=True)
class Position:
    """Where the next record starts."""

    offset: int = 0  # bytes in a text file, rows in others
    number: int = 1  # line or row


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A record that cannot be ranked, with the reason."""

    number: int  # line or row
    error: str
    content: str  # as in the file, truncated
    file: str


Item = tuple[Row | Rejected, Position]
"""A record and the position after it."""


class Source(Protocol):
    """A reader of rows."""

    @property
    def file(self) -> Path:
        """The file that line and row numbers refer to."""

    @property
    def size(self) -> int:
        """The offset after the last record."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The field names; for JSON lines, those of the first record."""

    @property
    def is_pairs(self) -> bool:
        """Whether each record is a pair, rather than a query with its documents."""

    def read(self, position: Position) -> Iterator[Item]:
        """Yield the records from a position to the end."""


class JsonLines:
    """One object per line; blank lines are skipped. All must be pairs, or all rankings, like the first one.

    `plain` is the file itself or a copy that can be read from any offset.
    """

    def __init__(self, file: Path, plain: Path) -> None:
        self.file = file
        self._plain = plain
        self.size = plain.stat().st_size
        first = first_row(self._read(Position()), file)
        self.is_pairs = first is not None and first.is_pair
        self.columns = ("query",) if first is None else tuple(first.fields)

    def read(self, position: Position) -> Iterator[Item]:
        for item, end in self._read(position):
            if isinstance(item, Row) and item.is_pair != self.is_pairs:
                content = json.dumps(item.fields, ensure_ascii=False)[:MAX_CONTENT_CHARS]
                error = mixed_kinds(self.is_pairs)
                yield Rejected(file=str(self.file), number=item.number, error=error, content=content), end
            else:
                yield item, end

    def _read(self, position: Position) -> Iterator[Item]:
        with self._plain.open("rb") as stream:
            stream.seek(position.offset)
            for line, start, end in lines_of(stream, position):
                if line.strip():
                    yield _parsed(self.file, start.number, line, lambda data: parse_record(parse_json_line(data))), end


class Delimited:
    """CSV or TSV: a header, then one pair per record. Quoted CSV fields may contain line feeds; TSV has no quotes."""

    is_pairs = True

    def __init__(self, file: Path, plain: Path, *, is_tsv: bool) -> None:
        self.file = file
        self._plain = plain
        self._is_tsv = is_tsv
        self.size = plain.stat().st_size
        with plain.open("rb") as stream:
            line = stream.readline(MAX_LINE_BYTES)
        try:
            (header,) = self._reader([line.decode("utf-8-sig")])
        except (ValueError, csv.Error) as error:
            raise InvalidRequest(f"{file}:1 is not a header: {error or 'the file is empty'}", field="input") from error
        if missing := [name for name in ("query", "document") if name not in header]:
            raise InvalidRequest(f"{file}:1 has no column {missing[0]}; it has {', '.join(header)}", field="input")
        if len(set(header)) < len(header):
            raise InvalidRequest(f"{file}:1 repeats a column name", field="input")
        self.columns = tuple(header)
        self._start = Position(len(line), 2)

    def read(self, position: Position) -> Iterator[Item]:
        with self._plain.open("rb") as stream:
            end = max(position, self._start, key=lambda each: each.offset)
            while end.offset < self.size:
                stream.seek(end.offset)
                for item, end in self._until_error(stream, end):  # noqa: B020  # resume after the last item
                    if item is not None:
                        yield item, end

    def _until_error(self, stream: IO[bytes], position: Position) -> Iterator[tuple[Row | Rejected | None, Position]]:
        """Yield records up to the end of the file or the first malformed record, whose first line is rejected."""
        lines = _LineCounter(stream, position)
        reader = self._reader(lines)
        while True:
            start, lines.first = lines.end, b""
            try:
                values = next(reader)
            except StopIteration:
                yield None, lines.end
                return
            except (csv.Error, UnicodeDecodeError) as error:
                end = Position(start.offset + len(lines.first), start.number + 1)
                kind = "TSV" if self._is_tsv else "CSV"
                yield self._rejected(start.number, f"not {kind}: {error}", lines.first), end
                return
            if values:  # empty for a blank line
                yield self._row(values, start.number, lines.first), lines.end

    def _row(self, values: list[str], number: int, line: bytes) -> Row | Rejected:
        if len(values) != len(self.columns):
            return self._rejected(number, f"{len(values)} fields; the header has {len(self.columns)}", line)
        record = dict(zip(self.columns, values, strict=True))
        return _parsed(self.file, number, line, lambda _: parse_record(_without_empty_instruction(record)))

    def _rejected(self, number: int, error: str, line: bytes) -> Rejected:
        return Rejected(file=str(self.file), number=number, error=error, content=content_of(line))

    def _reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        csv.field_size_limit(MAX_FIELD_CHARS)
        if self._is_tsv:
            return csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return csv.reader(lines, strict=True)


class _LineCounter:
    """Lines for csv.reader, which takes as many as a record has; tracks the position and the record's first line."""

    def __init__(self, stream: IO[bytes], position: Position) -> None:
        self._stream = stream
        self.end = position
        self.first = b""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        self.first = self.first or line
        self.end = Position(self.end.offset + len(line), self.end.number + 1)
        return line.decode("utf-8")


def first_row(items: Iterator[Item], file: Path) -> Row | None:
    """Return the first record that can be ranked, or None for an empty file; raises InvalidRequest if none can be."""
    rejected: Rejected | None = None
    for item, _ in items:
        if isinstance(item, Row):
            return item
        rejected = rejected or item
    if rejected is not None:
        what = f"{file} has no record that can be ranked; line {rejected.number}: {rejected.error}"
        raise InvalidRequest(what, field="input")
    return None


def lines_of(stream: IO[bytes], position: Position) -> Iterator[tuple[bytes, Position, Position]]:
    """Yield lines with the positions before and after each; a line that is too long is truncated."""
    while line := stream.readline(MAX_LINE_BYTES):
        length = len(line)
        more = line
        while len(more) == MAX_LINE_BYTES and not more.endswith(b"\n"):
            more = stream.readline(MAX_LINE_BYTES)
            length += len(more)
        end = Position(position.offset + length, position.number + 1)
        yield line, position, end
        position = end


def _parsed(file: Path, number: int, line: bytes, parse: Callable[[bytes], Row]) -> Row | Rejected:
    try:
        if len(line) >= MAX_LINE_BYTES:
            raise ValueError(f"the line has {MAX_LINE_BYTES} bytes or more; it must be shorter")
        return replace(parse(line), number=number)
    except (InvalidRequest, ValueError, RecursionError) as error:
        return Rejected(file=str(file), number=number, error=str(error), content=content_of(line))


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


def _without_empty_instruction(record: dict[str, str]) -> dict[str, Any]:
    """Treat an empty instruction as missing, because CSV has no null."""
    return record | {"instruction": record.get("instruction") or None} if "instruction" in record else record


def mixed_kinds(first_is_pair: bool) -> str:
    """Say why a record is rejected that is a pair where the first one is a ranking, or the reverse."""
    found, first = ("documents", "document") if first_is_pair else ("document", "documents")
    return f"the record has {found}, but the first one of the file has {first}"


def content_of(line: bytes) -> str:
    """Decode a rejected line for the report, truncated."""
    return line.decode("utf-8", "backslashreplace").rstrip("\r\n")[:MAX_CONTENT_CHARS]
