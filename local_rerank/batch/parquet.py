"""Parquet in and out. Needs the extra `local-rerank[parquet]`.

A table has a column `query` and either `document` (each row a pair) or `documents` (a list of texts, or of structs with
`text` and perhaps `id` and `score`). A Parquet file cannot be appended to: a job writes small files of their own
(parts), each complete when it is counted, and joins them at its end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from local_rerank.batch.durable import replace
from local_rerank.batch.rows import Record, Row, ScoredRow, parse_record, to_record
from local_rerank.batch.sources import MAX_CONTENT_CHARS, Item, Position, Rejected, Source
from local_rerank.errors import ConfigError, InvalidRequest

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError as error:
    raise ConfigError(f'Parquet needs {error.name}: pip install "local-rerank[parquet]"') from error

READ_ROWS = 256  # decoded at a time
JOIN_BYTES = 64 << 20  # of parts that become one row group of the output

SCORES = {
    "relevance_score": pa.float64(),
    "log_odds": pa.float64(),
    "num_tokens": pa.int64(),
    "num_truncated_tokens": pa.int64(),
}


class ParquetSource:
    """Rows of a Parquet file. Offsets are rows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with pq.ParquetFile(file) as parquet:
                self.schema: pa.Schema = parquet.schema_arrow
                self.size: int = parquet.metadata.num_rows
        except pa.ArrowException as error:
            raise InvalidRequest(f"{file} is no Parquet file: {error}", field="input") from error
        names = self.schema.names
        if "query" not in names or ("document" in names) == ("documents" in names):
            what = f"{file} must have the columns query and either document or documents; it has {', '.join(names)}"
            raise InvalidRequest(what, field="input")
        self.columns = tuple(names)
        self.is_pairs = "document" in names

    def read(self, position: Position) -> Iterator[Item]:
        with pq.ParquetFile(self.file) as parquet:
            groups, row = _groups_from(parquet, position.offset)
            # without pre_buffer: it would hold whole row groups
            for batch in parquet.iter_batches(READ_ROWS, row_groups=groups):
                for record in batch.to_pylist():
                    row += 1
                    if row > position.offset:
                        yield self._parsed(record, row), Position(row, row + 1)

    def _parsed(self, record: dict[str, Any], number: int) -> Row | Rejected:
        try:
            return replace_fields(parse_record(record), number=number)
        except InvalidRequest as error:
            return Rejected(
                file=str(self.file), number=number, error=str(error), content=str(record)[:MAX_CONTENT_CHARS]
            )


def _groups_from(parquet: pq.ParquetFile, row: int) -> tuple[list[int], int]:
    """The row groups from the one that holds a row on, and the first row of that one."""
    first = 0
    for group in range(parquet.num_row_groups):
        behind = first + parquet.metadata.row_group(group).num_rows
        if behind > row:
            return list(range(group, parquet.num_row_groups)), first
        first = behind
    return [], first


def output_schema(source: Source, *, with_documents: bool, is_blended: bool) -> pa.Schema:
    """Columns of the output, known before the first row: those of the input, if they are, and the scores."""
    fields = _input_fields(source)
    return output_fields(fields, is_pairs=source.is_pairs, with_documents=with_documents, is_blended=is_blended)


def output_fields(
    fields: dict[str, pa.DataType], *, is_pairs: bool, with_documents: bool, is_blended: bool
) -> pa.Schema:
    """The same, from the columns of the input and their types."""
    if is_pairs:
        fields = fields | SCORES
    else:
        result = {"index": pa.int64(), "id": pa.string(), **SCORES}
        if is_blended:
            result["blended_score"] = pa.float64()
        if with_documents:
            result["document"] = pa.string()
        fields = fields | {"results": pa.list_(pa.struct(list(result.items())))}
        fields.pop("documents", None)
    return pa.schema(list(fields.items()))


def _input_fields(source: Source) -> dict[str, pa.DataType]:
    if isinstance(source, ParquetSource):
        return {field.name: field.type for field in source.schema}
    return {name: pa.string() for name in source.columns}


class ParquetSink:
    """Scored rows -> parts in `folder`, joined into `file` at the end. Its mark is the number of complete parts."""

    def __init__(self, file: Path, folder: Path, schema: pa.Schema, *, with_documents: bool) -> None:
        self._file = file
        self._folder = folder
        self._schema = schema
        self._with_documents = with_documents
        self._rows: list[Record] = []
        self._num_parts = 0

    def objection(self, row: Row) -> str | None:
        return None

    def rewind(self, mark: int) -> None:
        for part in self._folder.glob("part-*.parquet*"):
            if not part.name.endswith(".parquet") or int(part.stem.removeprefix("part-")) >= mark:
                part.unlink()
        if missing := [number for number in range(mark) if not self._part(number).is_file()]:
            raise ConfigError(f"{self._part(missing[0])} is missing, which was counted; --overwrite begins anew")
        self._num_parts = mark

    def write(self, rows: Sequence[ScoredRow]) -> None:
        self._rows += [to_record(row, with_documents=self._with_documents) for row in rows]

    def commit(self) -> int:
        """Make a part of what was written since the last one; returns the number of parts."""
        if self._rows:
            with replace(self._part(self._num_parts)) as stream:
                pq.write_table(table_of(self._rows, self._schema), stream)
            self._rows = []
            self._num_parts += 1
        return self._num_parts

    def finish(self) -> None:
        """Join the parts; done twice, it gives the same file."""
        with replace(self._file) as stream, pq.ParquetWriter(stream, self._schema) as writer:
            waiting: list[pa.Table] = []
            for number in range(self._num_parts):
                waiting.append(pq.read_table(self._part(number), schema=self._schema))
                if sum(table.nbytes for table in waiting) >= JOIN_BYTES:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:08}.parquet"


def table_of(records: Sequence[Record], schema: pa.Schema) -> pa.Table:
    """A table of those columns. Values of JSON lines that are no strings (a number as id) become strings in them."""
    strings = [field.name for field in schema if pa.types.is_string(field.type)]
    rows = [record | {name: _text(record.get(name)) for name in strings} for record in records]
    return pa.Table.from_pylist(rows, schema=schema)


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
