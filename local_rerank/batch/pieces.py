"""A large input in pieces that any worker can score alone: byte ranges of JSON lines, row groups of Parquet.

Input and output are named by path or by URI (`s3://`, `gs://`, `hdfs://`, `fsspec+...://`: what pyarrow knows), the
input may be a folder of files. Each piece becomes one part of the output folder, `part-00000.jsonl` or `.parquet`,
which has its name only when it is whole; what is rejected stands beside it. Parts in order are the output. What a
`PartFormat` says holds for all of them, so that parts of one job have the same columns.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from local_rerank.batch.parquet import output_fields, table_of
from local_rerank.batch.rows import Record, Row, parse_record, to_record
from local_rerank.batch.scoring import BlockScorer
from local_rerank.batch.sources import MAX_CONTENT_CHARS, content_of, other_kind, parse_json_line
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.blending import Blend
from local_rerank.reranker import Reranker

PIECE_BYTES = 1 << 20  # of JSON lines: some thousand short pairs, seconds of a GPU's work
SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of one input file; `begin` and `end` are bytes of JSON lines, or row groups."""

    number: int
    path: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What came of a piece."""

    number: int
    num_rows: int
    num_pairs: int
    num_tokens: int  # that went through the model
    num_rejected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFormat:
    """What is written of each row."""

    suffix: str  # of the parts
    with_documents: bool = False
    is_blended: bool = False
    is_pairs: bool = False  # of JSON lines, whose first record decides both
    columns: tuple[str, ...] = ("query",)

    def schema(self, found: pa.Schema | None) -> pa.Schema:
        """Columns of a Parquet part: those of the Parquet file that was read, or of the JSON lines as strings."""
        if found is None:
            fields, is_pairs = {name: pa.string() for name in self.columns}, self.is_pairs
        else:
            fields, is_pairs = {field.name: field.type for field in found}, "document" in found.names
        return output_fields(fields, is_pairs=is_pairs, with_documents=self.with_documents, is_blended=self.is_blended)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """A record of a piece: its row, or why it has none, and where it stands in its file."""

    row: Row | InvalidRequest
    place: dict[str, int]
    content: str


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI and the path in it; raises ConfigError."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).resolve())
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{uri} cannot be opened: {error}") from error
    return filesystem, path


def suffix_of(uri: str) -> str:
    """How the name ends, in lower case; `?region=...` behind it is the filesystem's."""
    return Path(urlsplit(uri).path if "://" in uri else uri).suffix.lower()


def find_pieces(uri: str) -> list[Piece]:
    """The pieces of a file, or of all .jsonl and .parquet files of a folder, in order; raises InvalidRequest."""
    filesystem, files = _files(uri)
    pieces: list[Piece] = []
    for file in files:
        for begin, end in _ranges(filesystem, file):
            pieces.append(Piece(number=len(pieces), path=file.path, begin=begin, end=end))
    if not pieces:
        raise InvalidRequest(f"{uri} holds no rows in {' or '.join(SUFFIXES)} files", field="input")
    return pieces


def state_of(uri: str) -> str:
    """What tells whether an input was changed: a digest of its files' names, sizes and times."""
    states = [f"{file.path} {file.size} {file.mtime_ns}" for file in _files(uri)[1]]
    return hashlib.sha256("\n".join(states).encode()).hexdigest()[:16]


def _files(uri: str) -> tuple[pafs.FileSystem, list[pafs.FileInfo]]:
    filesystem, path = open_filesystem(uri)
    found = filesystem.get_file_info(path)
    if found.type == pafs.FileType.NotFound:
        raise InvalidRequest(f"{uri} is neither a file nor a folder", field="input")
    if found.type != pafs.FileType.Directory:
        return filesystem, [found]
    selected = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    return filesystem, sorted((file for file in selected if file.path.endswith(SUFFIXES)), key=lambda file: file.path)


def _ranges(filesystem: pafs.FileSystem, file: pafs.FileInfo) -> Iterator[tuple[int, int]]:
    if file.path.endswith(".parquet"):
        with filesystem.open_input_file(file.path) as stream:
            groups = pq.ParquetFile(stream).metadata.num_row_groups
        yield from ((group, group + 1) for group in range(groups))
    elif file.path.endswith(".jsonl"):
        yield from ((begin, min(begin + PIECE_BYTES, file.size)) for begin in range(0, file.size, PIECE_BYTES))
    else:
        raise InvalidRequest(f"input is {file.path}; it must end in {' or '.join(SUFFIXES)}", field="input")


def part_path(folder: str, number: int, suffix: str) -> str:
    return f"{folder}/part-{number:05}{suffix}"


def first_row(uri: str, pieces: list[Piece]) -> Row | None:
    """The first record of the JSON lines that can be ranked, which decides the kind of all and their columns."""
    filesystem, _ = open_filesystem(uri)
    for piece in pieces:
        if piece.path.endswith(".jsonl"):
            with filesystem.open_input_file(piece.path) as stream:
                for _, line in lines_between(io.BufferedReader(stream), piece.begin, piece.end):
                    if line.strip() and isinstance(row := _row(line), Row):
                        return row
    return None


class PieceScorer:
    """Scores pieces with a reranker of its own and writes their parts."""

    def __init__(self, reranker: Reranker, input: str, output: str, parts: PartFormat, *, blend: Blend | None) -> None:
        self._scorer = BlockScorer(reranker, blend=blend, advance=self._advance)
        self._input, _ = open_filesystem(input)
        self._output, self._folder = open_filesystem(output)
        self._parts = parts
        self._num_tokens = 0  # of the piece that is scored

    def __call__(self, piece: Piece) -> Done:
        """Done twice, it writes the same part."""
        self._num_tokens = 0
        items, schema = self._read(piece)
        scored = iter(self._scorer.score([item.row for item in items if isinstance(item.row, Row)]))
        outcomes = [next(scored) if isinstance(item.row, Row) else item.row for item in items]
        good = [outcome for outcome in outcomes if not isinstance(outcome, InvalidRequest)]
        bad = [
            {"file": piece.path, **item.place, "error": str(outcome), "content": item.content}
            for item, outcome in zip(items, outcomes, strict=True)
            if isinstance(outcome, InvalidRequest)
        ]
        if bad:
            self._write(part_path(self._folder, piece.number, ".rejects.jsonl"), _lines(bad))
        records = [to_record(row, with_documents=self._parts.with_documents) for row in good]
        is_parquet = self._parts.suffix == ".parquet"
        data = _table_bytes(records, self._parts.schema(schema)) if is_parquet else _lines(records)
        self._write(part_path(self._folder, piece.number, self._parts.suffix), data)
        return Done(
            number=piece.number,
            num_rows=len(good),
            num_pairs=sum(len(row.results) for row in good),
            num_tokens=self._num_tokens,
            num_rejected=len(bad),
        )

    def _advance(self, num_pairs: int, num_tokens: int) -> None:
        self._num_tokens += num_tokens

    def _read(self, piece: Piece) -> tuple[list[_Item], pa.Schema | None]:
        """The records of a piece, and the columns of a Parquet file."""
        with self._input.open_input_file(piece.path) as stream:
            if piece.path.endswith(".parquet"):
                parquet = pq.ParquetFile(stream)
                return list(_rows_of(parquet, piece)), parquet.schema_arrow
            lines = lines_between(io.BufferedReader(stream), piece.begin, piece.end)  # pyarrow's own reads no lines
            return [
                _Item(row=_row(line, is_pairs=self._parts.is_pairs), place={"byte": byte}, content=content_of(line))
                for byte, line in lines
                if line.strip()
            ], None

    def _write(self, path: str, data: bytes) -> None:
        """A local file gets its name when it is whole; an object store shows an object only then."""
        if not isinstance(self._output, pafs.LocalFileSystem):
            with self._output.open_output_stream(path) as stream:
                stream.write(data)
            return
        with self._output.open_output_stream(path + ".new") as stream:
            stream.write(data)
        self._output.move(path + ".new", path)


def _rows_of(parquet: pq.ParquetFile, piece: Piece) -> Iterator[_Item]:
    before = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.begin))
    records = parquet.read_row_groups(list(range(piece.begin, piece.end))).to_pylist()
    for number, record in enumerate(records, before + 1):
        yield _Item(row=_parsed(record), place={"row": number}, content=str(record)[:MAX_CONTENT_CHARS])


def lines_between(stream: IO[bytes], begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in [begin, end), each with its offset: each line of a file belongs to one of its ranges."""
    position = begin
    if begin:
        stream.seek(begin - 1)
        position = begin - 1 + len(stream.readline())  # the rest of a line that began before
    while position < end and (line := stream.readline()):
        yield position, line
        position += len(line)


def _row(line: bytes, *, is_pairs: bool | None = None) -> Row | InvalidRequest:
    """The row of a line, or why it is none; `is_pairs`: of what kind it must be."""
    try:
        row = _parsed(parse_json_line(line))
    except ValueError as error:
        return InvalidRequest(str(error), field="record")
    if isinstance(row, Row) and is_pairs not in (None, row.is_pair):
        return InvalidRequest(other_kind(not row.is_pair), field="record")
    return row


def _parsed(record: object) -> Row | InvalidRequest:
    try:
        return parse_record(record)
    except InvalidRequest as error:
        return error


def _lines(records: list[Record]) -> bytes:
    text = "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    return text.encode("utf-8", "backslashreplace")


def _table_bytes(records: list[Record], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table_of(records, schema), sink)
    return bytes(sink.getvalue())
