"""A large input in pieces that any worker can score alone: byte ranges of JSON lines, row groups of Parquet.

Input and output are named by path or by URI (`s3://`, `gs://`, `hdfs://`, ...: what pyarrow's filesystems know), the
input may be a folder of files. Each piece becomes one part of the output folder, `part-00000.jsonl` or `.parquet`,
which has its name only when it is whole; what is rejected stands beside it. Parts in order are the output.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from local_rerank.batch.parquet import output_fields
from local_rerank.batch.rows import Record
from local_rerank.batch.scoring import BlockScorer
from local_rerank.batch.sources import MAX_CONTENT_CHARS, parse_json_line
from local_rerank.errors import ConfigError, InvalidRequest

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
    num_rejected: int


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI and the path in it; raises ConfigError."""
    whole = re.sub(r"^(\w+):/(?!/)", r"\1://", uri)  # a pathlib.Path has lost the second slash
    if "://" not in whole:
        return pafs.LocalFileSystem(), str(Path(whole).resolve())
    try:
        filesystem, path = pafs.FileSystem.from_uri(whole)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{whole} cannot be opened: {error}") from error
    return filesystem, path


def find_pieces(uri: str) -> list[Piece]:
    """The pieces of a file, or of all .jsonl and .parquet files of a folder, in order; raises InvalidRequest."""
    filesystem, path = open_filesystem(uri)
    found = filesystem.get_file_info(path)
    if found.type == pafs.FileType.NotFound:
        raise InvalidRequest(f"{uri} is neither a file nor a folder", field="input")
    files = [found]
    if found.type == pafs.FileType.Directory:
        selected = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        files = sorted((file for file in selected if file.path.endswith(SUFFIXES)), key=lambda file: file.path)
    pieces: list[Piece] = []
    for file in files:
        for begin, end in _ranges(filesystem, file):
            pieces.append(Piece(number=len(pieces), path=file.path, begin=begin, end=end))
    if not pieces:
        raise InvalidRequest(f"{uri} holds no rows in {' or '.join(SUFFIXES)} files", field="input")
    return pieces


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


class PieceScorer:
    """Scores pieces with one `BlockScorer` and writes their parts."""

    def __init__(self, scorer: BlockScorer, input: str, output: str, suffix: str, *, with_documents: bool) -> None:
        self._scorer = scorer
        self._input, _ = open_filesystem(input)
        self._output, self._folder = open_filesystem(output)
        self._suffix = suffix
        self._with_documents = with_documents

    def __call__(self, piece: Piece) -> Done:
        """Done twice, it writes the same part."""
        records, schema = self._read(piece)
        outcomes = self._scorer.score_records(
            [record for record in records if not isinstance(record, InvalidRequest)],
            with_documents=self._with_documents,
        )
        scored = iter(outcomes)
        whole = [record if isinstance(record, InvalidRequest) else next(scored) for record in records]
        good = [outcome for outcome in whole if not isinstance(outcome, InvalidRequest)]
        bad = [
            {
                "file": piece.path,
                "piece": piece.number,
                "place": place,
                "error": str(outcome),
                "content": _shown(record),
            }
            for place, (record, outcome) in enumerate(zip(records, whole, strict=True), 1)
            if isinstance(outcome, InvalidRequest)
        ]
        if bad:
            self._write(part_path(self._folder, piece.number, ".rejects.jsonl"), _lines(bad))
        if self._suffix == ".parquet":
            self._write(part_path(self._folder, piece.number, ".parquet"), _table_bytes(good, self._schema(schema)))
        else:
            self._write(part_path(self._folder, piece.number, ".jsonl"), _lines(good))
        num_pairs = sum(len(record["results"]) if "results" in record else 1 for record in good)
        return Done(number=piece.number, num_rows=len(good), num_pairs=num_pairs, num_rejected=len(bad))

    def _read(self, piece: Piece) -> tuple[list[Record | InvalidRequest], pa.Schema | None]:
        with self._input.open_input_file(piece.path) as stream:
            if piece.path.endswith(".parquet"):
                parquet = pq.ParquetFile(stream)
                table = parquet.read_row_groups(list(range(piece.begin, piece.end)))
                return table.to_pylist(), parquet.schema_arrow
            lines = lines_between(io.BufferedReader(stream), piece.begin, piece.end)  # pyarrow's own reads no lines
            return [_record(line) for line in lines if line.strip()], None

    def _schema(self, schema: pa.Schema | None) -> pa.Schema:
        assert schema is not None
        fields = {field.name: field.type for field in schema}
        return output_fields(
            fields, is_pairs="document" in fields, with_documents=self._with_documents, is_blended=False
        )

    def _write(self, path: str, data: bytes) -> None:
        """A local file gets its name when it is whole; an object store shows an object only then."""
        if not isinstance(self._output, pafs.LocalFileSystem):
            with self._output.open_output_stream(path) as stream:
                stream.write(data)
            return
        with self._output.open_output_stream(path + ".new") as stream:
            stream.write(data)
        self._output.move(path + ".new", path)


def lines_between(stream: IO[bytes], begin: int, end: int) -> Iterator[bytes]:
    """The lines that begin in [begin, end): each line of a file belongs to one of its ranges."""
    position = begin
    if begin:
        stream.seek(begin - 1)
        position = begin - 1 + len(stream.readline())  # the rest of a line that began before
    while position < end and (line := stream.readline()):
        position += len(line)
        yield line


def _record(line: bytes) -> Any:
    try:
        return parse_json_line(line)
    except ValueError as error:
        return InvalidRequest(str(error), field="record")


def _lines(records: list[Record]) -> bytes:
    text = "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    return text.encode("utf-8", "backslashreplace")


def _table_bytes(records: list[Record], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records, schema=schema), sink)
    return bytes(sink.getvalue())


def _shown(record: object) -> str:
    return "" if isinstance(record, InvalidRequest) else str(record)[:MAX_CONTENT_CHARS]
