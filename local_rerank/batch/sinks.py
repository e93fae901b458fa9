"""Scored rows -> a file, in pieces that are on disk when they are counted: JSON lines, CSV, TSV, TREC run, Parquet.

JSON lines and Parquet keep a row as it came, with scores beside a pair and a list of results in a ranking. CSV, TSV and
runs have a line for each document, best first.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from local_rerank.batch.durable import AppendFile
from local_rerank.batch.rows import PAIR_COLUMNS, Record, Row, ScoredRow, result_record, to_record
from local_rerank.batch.sources import Source
from local_rerank.errors import ConfigError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".run")
_TO_SPACES = str.maketrans("\t\r\n", "   ")


class Sink(Protocol):
    """Where rows go. A mark says how much is there for certain; what lies behind it is forgotten by `rewind`."""

    def rewind(self, mark: int) -> None: ...

    def write(self, rows: Sequence[ScoredRow]) -> None: ...

    def commit(self) -> int:
        """Bring what was written to disk; returns the new mark."""

    def finish(self) -> None:
        """Make the output complete; may be called again after a kill."""

    def objection(self, row: Row) -> str | None:
        """Why a row cannot be written, if it cannot."""


class TextSink:
    """A file of lines. Its mark is its size in bytes."""

    def __init__(
        self,
        file: Path,
        encode: Callable[[ScoredRow], str],
        *,
        header: str = "",
        objection: Callable[[Row], str | None] = lambda row: None,
    ) -> None:
        self._file = AppendFile(file)
        self._encode = encode
        self._header = header
        self.objection = objection

    def rewind(self, mark: int) -> None:
        self._file.rewind(mark)
        if mark == 0:
            self._file.append(self._header.encode())

    def write(self, rows: Sequence[ScoredRow]) -> None:
        self._file.append("".join(map(self._encode, rows)).encode("utf-8", "backslashreplace"))

    def commit(self) -> int:
        return self._file.commit()

    def finish(self) -> None:
        self._file.close()


def open_sink(
    file: Path, folder: Path, source: Source, *, model_id: str, with_documents: bool, is_blended: bool
) -> Sink:
    """The writer for a file, by its name; `folder` is for what is not finished. Raises ConfigError."""
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        return TextSink(file, partial(_json_line, with_documents=with_documents))
    if suffix == ".run":
        if source.is_pairs:
            raise ConfigError(f"output {file} would be a run, but the input has pairs; they make no ranking")
        return TextSink(file, partial(_run_lines, name=_word(model_id.rpartition("/")[2])), objection=_no_id)
    if suffix == ".parquet":
        from local_rerank.batch.parquet import ParquetSink, output_schema

        schema = output_schema(source, with_documents=with_documents, is_blended=is_blended)
        return ParquetSink(file, folder, schema, with_documents=with_documents)
    if suffix in (".csv", ".tsv"):
        names = _flat_columns(source, with_documents=with_documents, is_blended=is_blended)
        delimited = _tsv_line if suffix == ".tsv" else _csv_line
        lines = partial(_flat_lines, names=names, line=delimited)
        return TextSink(file, lines, header=delimited(names))
    raise ConfigError(f"output is {file}; it must end in one of {', '.join(SUFFIXES)}")


def _json_line(scored: ScoredRow, *, with_documents: bool) -> str:
    return json.dumps(to_record(scored, with_documents=with_documents), ensure_ascii=False, default=str) + "\n"


def _run_lines(scored: ScoredRow, *, name: str) -> str:
    """Lines `query Q0 document rank score name`; documents that were not scored follow below the lowest score."""
    row = scored.row
    if scored.blended_scores is not None:
        scores = list(scored.blended_scores)
    else:
        scores = [item.log_odds for item in scored.results]
    ids = [str(item.index) if row.document_ids is None else row.document_ids[item.index] for item in scored.results]
    scores += [min(scores) - below for below in range(1, len(row.tail_ids) + 1)]
    return "".join(
        f"{_word(row.id)} Q0 {_word(document_id)} {rank} {score!r} {name}\n"
        for rank, (document_id, score) in enumerate(zip([*ids, *row.tail_ids], scores, strict=True), 1)
    )


def _no_id(row: Row) -> str | None:
    return "the record has no id, which a run needs" if row.id is None else None


def _word(name: str | None) -> str:
    """An id as a run can hold it."""
    return "_".join((name or "").split()) or "_"


def _flat_columns(source: Source, *, with_documents: bool, is_blended: bool) -> tuple[str, ...]:
    if source.is_pairs:
        return (*(name for name in source.columns if name not in PAIR_COLUMNS), *PAIR_COLUMNS)
    names = ["id", "query", "rank", "index", "document_id", *PAIR_COLUMNS]
    return (*names, *["blended_score"] * is_blended, *["document"] * with_documents)


def _flat_lines(scored: ScoredRow, *, names: Iterable[str], line: Callable[[Sequence[Any]], str]) -> str:
    return "".join(line([record.get(name) for name in names]) for record in _flat_records(scored))


def _flat_records(scored: ScoredRow) -> list[Record]:
    """A record for each document."""
    if scored.row.is_pair:
        return [to_record(scored)]
    records = []
    for rank in range(1, len(scored.results) + 1):
        result = result_record(scored, rank, with_documents=True)
        result["document_id"] = result.pop("id", None)
        records.append({"id": scored.row.id, "query": scored.row.query, "rank": rank} | result)
    return records


def _csv_line(values: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _tsv_line(values: Sequence[Any]) -> str:
    """Without quotes; tabs and line feeds in a text become spaces."""
    return "\t".join("" if value is None else str(value).translate(_TO_SPACES) for value in values) + "\n"
