"""Read relevance judgements (qrels) and runs: TREC's columns, BEIR's and MS MARCO's, with or without a header.

The first line decides the form of a file. Columns are separated by tabs or spaces, in .csv by commas.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from local_rerank.errors import InvalidRequest
from local_rerank.evaluation.left_out import NO_FINITE_SCORE, REPEATED_DOCUMENT, LeftOut
from local_rerank.text_files import lines as lines_of_file
from local_rerank.text_files import suffix_of

QRELS_FORM = "`query 0 document grade` (TREC) or `query document grade` (BEIR)"
RUN_FORM = "`query Q0 document rank score name` (TREC)"
QUERY_NAMES = {"query", "query-id", "query_id", "queryid", "qid", "q_id", "topic", "topic_id"}
DOCUMENT_NAMES = {
    "document", "document_id", "doc", "doc-id", "doc_id", "docid", "docno", "corpus-id", "corpus_id", "cid", "pid",
    "passage_id",
}  # fmt: skip
GRADE_NAMES = {"score", "grade", "relevance", "rel", "label", "judgment", "judgement"}
SCORE_NAMES = {"score", "sim", "similarity"}
RANK_NAMES = {"rank"}
TREC_COLUMNS = 6  # of a run; trec_eval also reads lines with text behind them
RUN_COLUMNS = (
    "query Q0 document rank score name",
    "query Q0 document rank score",
    "query document rank score name",
    "query document rank score",
    "query Q0 document value name",
    "query Q0 document value",
    "query document value name",
    "query document value",
)
"""Forms of a run, of which the first that fits is taken; `value` is a rank or a score."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document that the first stage returned, with its score."""

    document_id: str
    score: float


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where a line has what."""

    query: int
    document: int
    value: int
    count: int
    is_rank: bool = False
    is_guess: bool = False  # whether only the values tell if they are ranks or scores


def read_qrels(file: Path) -> dict[str, dict[str, int]]:
    """Read grades by query and document; raises InvalidRequest. Grades below 1 are not relevant, as in trec_eval."""
    qrels: dict[str, dict[str, int]] = {}
    rows = ((number, line) for number, line in lines_of_file(file, "qrels") if line.strip())
    if (table := _table(file, rows, GRADE_NAMES)) is None:
        raise InvalidRequest(f"{file} is empty; each line must be {QRELS_FORM}", field="qrels")
    split, head, data = table
    columns = head
    for number, line in data:
        where, cells = f"{file}:{number}", split(line)
        columns = columns or _qrels_columns(cells)
        if columns is None or len(cells) != columns.count:
            raise InvalidRequest(f"{where} is not {QRELS_FORM}", field="qrels")
        value = _grade(cells[columns.value], where)
        if qrels.setdefault(cells[columns.query], {}).setdefault(cells[columns.document], value) != value:
            raise InvalidRequest(f"{where} contradicts an earlier grade of the same document", field="qrels")
    return qrels


def _grade(text: str, where: str) -> int:
    value = _number(text)
    if value is None or not value.is_integer():
        what = f"{where} has the grade {text}; a grade must be a whole number, in {QRELS_FORM}"
        raise InvalidRequest(what, field="qrels")
    return int(value)


def _qrels_columns(cells: Sequence[str]) -> _Columns | None:
    return {4: _Columns(0, 2, 3, 4), 3: _Columns(0, 1, 2, 3)}.get(len(cells))


def read_orders(file: Path, left_out: LeftOut, queries: Container[str]) -> dict[str, list[str]]:
    """Read a run's document ids by query, best first, for these queries only."""
    return {
        query_id: [candidate.document_id for candidate in candidates]
        for query_id, candidates in read_run(file, left_out, queries).items()
    }


def read_run(file: Path, left_out: LeftOut, queries: Container[str]) -> dict[str, tuple[Candidate, ...]]:
    """Read the candidates of these queries, sorted by score; equal scores keep the order of the file.

    Raises InvalidRequest for a malformed line.
    """
    found: dict[str, dict[str, float]] = {}
    for number, _, parsed in run_lines(file, lines_of_file(file, "run"), "run"):
        where = f"{file}:{number}"
        if parsed is None:
            raise InvalidRequest(f"{where} is not {RUN_FORM}, as the first line is", field="run")
        query_id, document_id, score = parsed
        if query_id not in queries:
            continue
        if not math.isfinite(score):
            left_out.add(NO_FINITE_SCORE, str(score), where)
        elif document_id in found.setdefault(query_id, {}):
            left_out.add(REPEATED_DOCUMENT, document_id, where)
        else:
            found[query_id][document_id] = score
    return {
        query_id: tuple(Candidate(*item) for item in sorted(scores.items(), key=lambda item: -item[1]))
        for query_id, scores in found.items()
    }


def run_lines(
    file: Path, lines: Iterable[tuple[int, str]], field: str
) -> Iterator[tuple[int, str, tuple[str, str, float] | None]]:
    """Yield number, text and (query, document, score) of each line of a run; None if it differs from the first line.

    Raises InvalidRequest about `field` if the file has no known form, or if ranks cannot be told from scores.
    """
    table = _table(file, ((number, line) for number, line in lines if line.strip()), SCORE_NAMES, RANK_NAMES)
    if table is None:
        raise InvalidRequest(f"{file} is empty; each line must be {RUN_FORM}", field=field)
    split, columns, data = table
    last: tuple[str, float] | None = None
    for number, line in data:
        cells = split(line)
        if columns is None and (columns := _run_columns(cells)) is None:
            raise InvalidRequest(f"{file}:{number} is not {RUN_FORM}", field=field)
        value = _number(cells[columns.value]) if len(cells) > columns.value else None
        if value is None or (len(cells) != columns.count and not len(cells) > columns.count == TREC_COLUMNS):
            yield number, line, None
            continue
        query_id = cells[columns.query]
        if columns.is_guess:
            before = last[1] if last is not None and last[0] == query_id else None
            if not _is_told(cells[columns.value], value, before, columns.is_rank):
                what = f"{file}:{number} has {cells[columns.value]} where ranks, from 1 on, cannot be told from scores"
                raise InvalidRequest(f"{what}; write {RUN_FORM}", field=field)
            last = query_id, value
        yield number, line, (query_id, cells[columns.document], -value if columns.is_rank else value)


def _run_columns(cells: Sequence[str]) -> _Columns | None:
    """Find the columns of a run without header by the first line."""
    for names in map(str.split, RUN_COLUMNS):
        at = {name: place for place, name in enumerate(names)}
        value, is_guess, is_trec = at.get("score", at.get("value", 0)), "value" in at, len(names) == TREC_COLUMNS
        is_fit = len(cells) >= len(names) if is_trec else len(cells) == len(names) and _fits(at, cells)
        if is_fit and _number(cells[value]) is not None:
            is_rank = is_guess and cells[value] == "1"
            return _Columns(at["query"], at["document"], value, len(names), is_rank, is_guess)
    return None


def _fits(at: dict[str, int], cells: Sequence[str]) -> bool:
    """Whether Q0 and the rank are where a form of fewer than six columns has them."""
    is_q0, is_zero = cells[1].upper() == "Q0", cells[1] == "0" and len(cells) == 5  # 0 could also be a document's id
    has_q0 = is_q0 or (is_zero and "rank" in at) if "Q0" in at else not (is_q0 or is_zero)
    return has_q0 and ("rank" not in at or cells[at["rank"]].isdecimal())


def _is_told(text: str, value: float, before: float | None, is_rank: bool) -> bool:
    """Whether a value is certainly a rank, or certainly a score: whole numbers that rise could be either."""
    if is_rank:
        return text.isdecimal() and value == (1 if before is None else before + 1)
    return not text.isdecimal() or before is None or value <= before


Rows = Iterator[tuple[int, str]]


def _table(
    file: Path, rows: Rows, *values: set[str]
) -> tuple[Callable[[str], list[str]], _Columns | None, Rows] | None:
    """Return how to split a line, the columns if names tell them, and the rows below a header; None for an empty file.

    `values` are the possible names of the column of values, best first.
    """
    if (first := next(rows, None)) is None:
        return None
    split: Callable[[str], list[str]] = _split_csv if suffix_of(file) == ".csv" else str.split
    if first[1].lstrip().startswith("{"):
        names = _json_names(first[1])
        columns = _columns_of(names, values)
        return _json_splitter([] if columns is None else names), columns, chain([first], rows)
    columns = _columns_of(split(first[1]), values)
    return split, columns, chain([first], rows) if columns is None else rows


def _columns_of(names: Sequence[str], values: Sequence[set[str]]) -> _Columns | None:
    """Find the columns by the names of a header; None if it is none."""
    lowered = [name.strip().lower() for name in names]
    found = [
        next((place for place, name in enumerate(lowered) if name in known), None)
        for known in (QUERY_NAMES, DOCUMENT_NAMES, *values)
    ]
    query, document, *places = found
    value = next((place for place in places if place is not None), None)
    if query is None or document is None or value is None:
        return None
    return _Columns(query, document, value, len(names), is_rank=lowered[value] in RANK_NAMES)


def _split_csv(line: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line]), [])]


def _json_names(line: str) -> list[str]:
    try:
        return list(json.loads(line))
    except ValueError:
        return []


def _json_splitter(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Split a JSON object into its values, in the order of the first object's names."""

    def split(line: str) -> list[str]:
        try:
            value = json.loads(line)
            return [str(value[name]) for name in names]
        except (ValueError, KeyError, TypeError):
            return []

    return split


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
