"""Read and write Parquet. Needs the extra `local-rerank[parquet]`.

A table has a column `query` and either `document` (each row is a pair) or `documents` (a list of strings, or of structs
with `text` and optional `id` and `score`). A Parquet file cannot be appended to, so a job writes a part per commit and
joins the parts at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from local_rerank.batch.durable import replace
from local_rerank.batch.rows import AddedColumns, Record, Row, ScoredRow, parse_record, to_record
from local_rerank.batch.sources import MAX_CONTENT_CHARS, Item, Position, Rejected
from local_rerank.errors import ConfigError, InvalidRequest

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError as error:
    raise ConfigError(f'Parquet needs {error.name}: pip install "local-rerank[parquet]"') from error

READ_ROWS = 256  # decoded at a time
JOIN_BYTES = 64 << 20  # size of the parts joined into one row group of the output

ARROW_TYPES = {float: pa.float64(), int: pa.int64(), str: pa.string()}


class ParquetSource:
    """The rows of a Parquet file. Offsets count rows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with pq.ParquetFile(file) as parquet:
                self.schema: pa.Schema = parquet.schema_arrow
                self.size: int = parquet.metadata.num_rows
        except pa.ArrowException as error:
            raise InvalidRequest(f"{file} is not a Parquet file: {error}", field="input") from error
        names = self.schema.names
        if "query" not in names or ("document" in names) == ("documents" in names):
            what = f"{file} must have the columns query and either document or documents; it has {', '.join(names)}"
            raise InvalidRequest(what, field="input")
        self.columns = tuple(names)
        self.is_pairs = "document" in names

    def read(self, position: Position) -> Iterator[Item]:
        with pq.ParquetFile(self.file) as parquet:
            groups, row = _groups_from(parquet, position.offset)
            # without pre_buffer, which would hold whole row groups
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
    """Return the row groups from the one that contains a row, and that group's first row."""
    first = 0
    for group in range(parquet.num_row_groups):
        end = first + parquet.metadata.row_group(group).num_rows
        if end > row:
            return list(range(group, parquet.num_row_groups)), first
        first = end
    return [], first


def output_schema(
    found: pa.Schema | None,
    columns: Sequence[str],
    *,
    is_pairs: bool,
    added: AddedColumns,
) -> pa.Schema:
    """Return the columns of the output, which must be known before the first row: the input's plus the scores.

    `found` is the schema of a Parquet input; for other files, `columns` are strings.
    """
    fields = {name: pa.string() for name in columns} if found is None else {each.name: each.type for each in found}
    kinds = added.of_pair if is_pairs else added.of_result
    scores = {name: ARROW_TYPES[kind] for name, kind in kinds.items()}
    if is_pairs:
        fields = fields | scores
    else:
        result = {"index": pa.int64(), "id": pa.string(), **scores}
        fields = fields | {"results": pa.list_(pa.struct(list(result.items())))}
        fields.pop("documents", None)
        if added.counts_below:
            fields["num_below_min_score"] = pa.int64()
    return pa.schema(list(fields.items()))


class ParquetSink:
    """Writes parts into `folder` and joins them into `file` at the end. Its mark is the number of complete parts."""

    def __init__(self, file: Path, folder: Path, schema: pa.Schema, *, with_documents: bool) -> None:
        self._file = file
        self._folder = folder
        self._schema = schema
        self._with_documents = with_documents
        self._rows: list[Record] = []
        self._num_parts = 0

    def refusal(self, row: Row) -> str | None:
        return None

    def rewind(self, mark: int) -> None:
        for part in self._folder.glob("part-*.parquet*"):
            if not part.name.endswith(".parquet") or int(part.stem.removeprefix("part-")) >= mark:
                part.unlink()
        if missing := [number for number in range(mark) if not self._part(number).is_file()]:
            raise ConfigError(f"{self._part(missing[0])} is missing, but the job wrote it; --overwrite starts again")
        self._num_parts = mark

    def write(self, rows: Sequence[ScoredRow]) -> None:
        self._rows += [to_record(row, with_documents=self._with_documents) for row in rows]

    def commit(self) -> int:
        """Write the rows since the last commit as a part; returns the number of parts."""
        if self._rows:
            with replace(self._part(self._num_parts)) as stream:
                pq.write_table(table_of(self._rows, self._schema), stream)
            self._rows = []
            self._num_parts += 1
        return self._num_parts

    def finish(self) -> None:
        """Join the parts; idempotent."""
        with (
            replace(self._file, self._folder / "output.new") as stream,
            pq.ParquetWriter(stream, self._schema) as writer,
        ):
            pending: list[pa.Table] = []
            for number in range(self._num_parts):
                pending.append(pq.read_table(self._part(number), schema=self._schema))
                if sum(table.nbytes for table in pending) >= JOIN_BYTES:
                    writer.write_table(pa.concat_tables(pending))
                    pending = []
            if pending:
                writer.write_table(pa.concat_tables(pending))

    def close(self) -> None:
        pass  # no file stays open between commits

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:08}.parquet"


def table_of(records: Sequence[Record], schema: pa.Schema) -> pa.Table:
    """Build a table; a value in a string column that is not a string, such as a numeric id, is written as JSON."""
    strings = [field.name for field in schema if pa.types.is_string(field.type)]
    rows = [record | {name: _text(record.get(name)) for name in strings} for record in records]
    return pa.Table.from_pylist(rows, schema=schema)


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
