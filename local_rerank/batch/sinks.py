"""Write scored rows as JSON lines, CSV, TSV or a TREC run, with commits that survive a kill.

JSON lines keep the input record and add the scores of a pair or the results of a ranking. CSV, TSV and runs have one
line per document, best first.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from local_rerank.batch.durable import AppendFile, OutputStream
from local_rerank.batch.rows import AddedColumns, Record, Row, ScoredRow, encode, result_record, to_record
from local_rerank.batch.sources import Source

_FORMULA = re.compile(r"[\t\r\n]|\s*[=+@＝＋－＠-]")  # how a cell begins that a spreadsheet may run
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
_TO_SPACES = str.maketrans("\t\r\n", "   ")


class Sink(Protocol):
    """A writer of rows. A mark tells how much is safely on disk; `rewind` drops everything after it."""

    def rewind(self, mark: int) -> None: ...

    def write(self, rows: Sequence[ScoredRow]) -> None: ...

    def commit(self) -> int:
        """Sync what was written to disk; returns the new mark."""

    def finish(self) -> None:
        """Complete the output; may be called again after a kill."""

    def close(self) -> None:
        """Let go of open files, also after an error."""

    def refusal(self, row: Row) -> str | None:
        """Return why a row cannot be written, or None if it can."""


class TextSink:
    """A text file or standard output. Its mark is its size in bytes."""

    def __init__(
        self,
        file: AppendFile | OutputStream,
        to_text: Callable[[ScoredRow], str],
        *,
        header: str = "",
        refusal: Callable[[Row], str | None] = lambda row: None,
    ) -> None:
        self._file = file
        self._to_text = to_text
        self._header = header
        self.refusal = refusal

    def rewind(self, mark: int) -> None:
        self._file.rewind(mark)
        if mark == 0:
            self._file.append(self._header.encode())

    def write(self, rows: Sequence[ScoredRow]) -> None:
        self._file.append(encode("".join(map(self._to_text, rows))))

    def commit(self) -> int:
        return self._file.commit()

    def finish(self) -> None:
        self.close()  # the file is complete after the last commit

    def close(self) -> None:
        self._file.close()


def run_lines(scored: ScoredRow, *, name: str) -> str:
    """Return lines `query Q0 document rank score name`; unscored documents follow with scores below the lowest.

    With min_score they are left out, too.
    """
    row = scored.row
    scores = [item.log_odds if item.blended_score is None else item.blended_score for item in scored.results]
    ids = [str(item.index) if row.document_ids is None else row.document_ids[item.index] for item in scored.results]
    tail_ids = row.tail_ids if scored.num_below_min_score is None else ()
    scores += [min(scores) - below for below in range(1, len(tail_ids) + 1)]
    return "".join(
        f"{_word(row.id)} Q0 {_word(document_id)} {rank} {score!r} {_word(name)}\n"
        for rank, (document_id, score) in enumerate(zip([*ids, *tail_ids], scores, strict=True), 1)
    )


def missing_id(row: Row) -> str | None:
    return "the record has no id, which a run needs" if row.id is None else None


def _word(name: str | None) -> str:
    """Replace the whitespace of an id, which separates the fields of a run."""
    return "_".join((name or "").split()) or "_"


def flat_columns(source: Source, added: AddedColumns) -> tuple[str, ...]:
    if source.is_pairs:
        return (*(name for name in source.columns if name not in added.of_pair), *added.of_pair)
    return ("id", "query", "rank", "index", "document_id", *added.of_result)


def flat_lines(scored: ScoredRow, *, names: Iterable[str], line: Callable[[Sequence[Any]], str]) -> str:
    return "".join(line([record.get(name) for name in names]) for record in _flat_records(scored))


def _flat_records(scored: ScoredRow) -> list[Record]:
    """Return one record per document."""
    if scored.row.is_pair:
        return [to_record(scored)]
    records = []
    for rank in range(1, len(scored.results) + 1):
        result = result_record(scored, rank, with_documents=True)
        result["document_id"] = result.pop("id", None)
        records.append({"id": scored.row.id, "query": scored.row.query, "rank": rank} | result)
    return records


def csv_line(values: Sequence[Any], *, spreadsheet_safe: bool = False) -> str:
    """Write a line. If it is to be safe, every text has quotes, because a spreadsheet may split at semicolons."""
    line = io.StringIO()
    if spreadsheet_safe:
        csv.writer(line, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).writerow(map(_as_text, values))
    else:
        csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _as_text(value: Any) -> Any:
    """A cell that spreadsheets show as text: with an apostrophe before what they might take for a formula."""
    is_formula = isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value)
    return f"'{value}" if is_formula else value


def tsv_line(values: Sequence[Any], *, spreadsheet_safe: bool = False) -> str:
    """Write a line without quotes; tabs and line breaks in a text become spaces."""
    values = [*map(_as_text, values)] if spreadsheet_safe else values
    return "\t".join("" if value is None else str(value).translate(_TO_SPACES) for value in values) + "\n"
