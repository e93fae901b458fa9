"""Split a large input into pieces that workers score independently: byte ranges of JSON lines, row groups of Parquet.

Input and output are paths or URIs that pyarrow knows (`s3://`, `gs://`, `hdfs://`, `fsspec+...://`). The input may be a
folder. Each piece becomes one part of the output folder, `part-00000.jsonl` or `.parquet`, which gets its name once it
is complete; rejected records are written beside it. All parts share a `PartFormat`, so their columns are the same.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from local_rerank.batch.parquet import output_schema, table_of
from local_rerank.batch.rows import AddedColumns, Record, Row, encode, json_line, to_record, try_parse
from local_rerank.batch.scoring import BlockScorer
from local_rerank.batch.sources import MAX_CONTENT_CHARS, content_of, mixed_kinds, parse_json_line
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.blending import Blend
from local_rerank.reranker import Reranker

PIECE_BYTES = 1 << 20  # of JSON lines: about a thousand short pairs, seconds of work for a GPU
SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A range of one input file; `begin` and `end` are bytes of JSON lines, or row groups."""

    number: int
    path: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceResult:
    """The counts of a scored piece."""

    number: int
    num_rows: int
    num_pairs: int
    num_tokens: int  # computed by the model
    num_rejected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFormat:
    """How parts are written."""

    suffix: str
    added: AddedColumns
    is_pairs: bool = False  # for JSON lines; the first record decides this and the columns
    columns: tuple[str, ...] = ("query",)

    def schema(self, found: pa.Schema | None) -> pa.Schema:
        """Return the columns of a Parquet part; `found` is the schema of a Parquet input."""
        is_pairs = self.is_pairs if found is None else "document" in found.names
        return output_schema(found, self.columns, is_pairs=is_pairs, added=self.added)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PieceRecord:
    """A record of a piece: its row or its error, and its place in the file."""

    row: Row | InvalidRequest
    place: dict[str, int]
    content: str


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a path or URI and the path in it; raises ConfigError."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).resolve())
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{uri} cannot be opened: {error}") from error
    return filesystem, path


def suffix_of(uri: str) -> str:
    """Return a name's suffix in lower case, without a URI's query string."""
    return Path(urlsplit(uri).path if "://" in uri else uri).suffix.lower()


def find_pieces(uri: str) -> list[Piece]:
    """Return the pieces of a file, or of all .jsonl and .parquet files in a folder, in order; raises InvalidRequest."""
    filesystem, files = _files(uri)
    pieces: list[Piece] = []
    for file in files:
        for begin, end in _ranges(filesystem, file):
            pieces.append(Piece(number=len(pieces), path=file.path, begin=begin, end=end))
    if not pieces:
        raise InvalidRequest(f"{uri} contains no rows in {' or '.join(SUFFIXES)} files", field="input")
    return pieces


def state_of(uri: str) -> str:
    """Return a digest of the names, sizes and modification times of the input files, to detect changes."""
    states = [f"{file.path} {file.size} {file.mtime_ns}" for file in _files(uri)[1]]
    return hashlib.sha256("\n".join(states).encode()).hexdigest()[:16]


def _files(uri: str) -> tuple[pafs.FileSystem, list[pafs.FileInfo]]:
    filesystem, path = open_filesystem(uri)
    found = filesystem.get_file_info(path)
    if found.type == pafs.FileType.NotFound:
        raise InvalidRequest(f"input is {uri}; there is no such file or folder", field="input")
    if found.type != pafs.FileType.Directory:
        return filesystem, [found]
    selected = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    return filesystem, sorted(
        (file for file in selected if file.path.lower().endswith(SUFFIXES)), key=lambda file: file.path
    )


def _ranges(filesystem: pafs.FileSystem, file: pafs.FileInfo) -> Iterator[tuple[int, int]]:
    if file.path.lower().endswith(".parquet"):
        with filesystem.open_input_file(file.path) as stream:
            groups = pq.ParquetFile(stream).metadata.num_row_groups
        yield from ((group, group + 1) for group in range(groups))
    elif file.path.lower().endswith(".jsonl"):
        yield from ((begin, min(begin + PIECE_BYTES, file.size)) for begin in range(0, file.size, PIECE_BYTES))
    else:
        raise InvalidRequest(f"input is {file.path}; with --ray it must end in {' or '.join(SUFFIXES)}", field="input")


def part_path(folder: str, number: int, suffix: str) -> str:
    return f"{folder}/part-{number:05}{suffix}"


def first_row(uri: str, pieces: list[Piece]) -> Row | None:
    """Return the first valid record of the JSON lines, which decides the kind of all records and their columns."""
    filesystem, _ = open_filesystem(uri)
    for piece in pieces:
        if piece.path.lower().endswith(".jsonl"):
            with filesystem.open_input_file(piece.path) as stream:
                for _, line in lines_between(io.BufferedReader(stream), piece.begin, piece.end):
                    if line.strip() and isinstance(row := _row(line), Row):
                        return row
    return None


class PieceScorer:
    """Scores pieces with its own reranker and writes their parts."""

    def __init__(
        self,
        reranker: Reranker,
        input: str,
        output: str,
        parts: PartFormat,
        *,
        blend: Blend | None,
        min_score: float | None = None,
    ) -> None:
        self._scorer = BlockScorer(reranker, blend=blend, min_score=min_score, advance=self._advance)
        self._input, _ = open_filesystem(input)
        self._output, self._folder = open_filesystem(output)
        self._parts = parts
        self._num_tokens = 0  # of the current piece

    def __call__(self, piece: Piece) -> PieceResult:
        """Score a piece and write its part; idempotent."""
        self._num_tokens = 0
        items, schema = self._read(piece)
        outcomes = list(self._scorer.score([item.row for item in items]))
        good = [outcome for outcome in outcomes if not isinstance(outcome, InvalidRequest)]
        bad = [
            {"file": piece.path, **item.place, "error": str(outcome), "content": item.content}
            for item, outcome in zip(items, outcomes, strict=True)
            if isinstance(outcome, InvalidRequest)
        ]
        if bad:
            self._write(part_path(self._folder, piece.number, ".rejects.jsonl"), _lines(bad))
        records = [to_record(row, with_documents=self._parts.added.with_documents) for row in good]
        is_parquet = self._parts.suffix == ".parquet"
        data = _table_bytes(records, self._parts.schema(schema)) if is_parquet else _lines(records)
        self._write(part_path(self._folder, piece.number, self._parts.suffix), data)
        return PieceResult(
            number=piece.number,
            num_rows=len(good),
            num_pairs=sum(len(scored.row.documents) for scored in good),
            num_tokens=self._num_tokens,
            num_rejected=len(bad),
        )

    def _advance(self, num_pairs: int, num_tokens: int, num_document_tokens: int) -> None:
        self._num_tokens += num_tokens

    def _read(self, piece: Piece) -> tuple[list[_PieceRecord], pa.Schema | None]:
        """Return the records of a piece and the schema of a Parquet file."""
        with self._input.open_input_file(piece.path) as stream:
            if piece.path.lower().endswith(".parquet"):
                parquet = pq.ParquetFile(stream)
                return list(_rows_of(parquet, piece)), parquet.schema_arrow
            is_pairs = self._parts.is_pairs
            lines = lines_between(io.BufferedReader(stream), piece.begin, piece.end)  # pyarrow's stream has no readline
            return [
                _PieceRecord(row=_row(line, is_pairs=is_pairs), place={"byte": byte}, content=content_of(line))
                for byte, line in lines
                if line.strip()
            ], None

    def _write(self, path: str, data: bytes) -> None:
        """Write a part atomically: rename a local file once it is complete; object stores do this by themselves."""
        if not isinstance(self._output, pafs.LocalFileSystem):
            with self._output.open_output_stream(path) as stream:
                stream.write(data)
            return
        with self._output.open_output_stream(path + ".new") as stream:
            stream.write(data)
        self._output.move(path + ".new", path)


def _rows_of(parquet: pq.ParquetFile, piece: Piece) -> Iterator[_PieceRecord]:
    before = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.begin))
    records = parquet.read_row_groups(list(range(piece.begin, piece.end))).to_pylist()
    for number, record in enumerate(records, before + 1):
        yield _PieceRecord(row=try_parse(record), place={"row": number}, content=str(record)[:MAX_CONTENT_CHARS])


def lines_between(stream: IO[bytes], begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that start in [begin, end) with their offsets, so each line belongs to exactly one range."""
    position = begin
    if begin:
        stream.seek(begin - 1)
        position = begin - 1 + len(stream.readline())  # skip the rest of a line that started earlier
    while position < end and (line := stream.readline()):
        yield position, line
        position += len(line)


def _row(line: bytes, *, is_pairs: bool | None = None) -> Row | InvalidRequest:
    """Parse a line as a row, or return the error; `is_pairs` is the required kind."""
    try:
        row = try_parse(parse_json_line(line))
    except ValueError as error:
        return InvalidRequest(str(error), field="record")
    if isinstance(row, Row) and is_pairs not in (None, row.is_pair):
        return InvalidRequest(mixed_kinds(not row.is_pair), field="record")
    return row


def _lines(records: list[Record]) -> bytes:
    return encode("".join(map(json_line, records)))


def _table_bytes(records: list[Record], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table_of(records, schema), sink)
    return bytes(sink.getvalue())
