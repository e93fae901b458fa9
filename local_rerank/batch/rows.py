"""Validate input records as `Row`s and convert scored rows back to records.

A record is a dict from any kind of file. With `documents` (strings, or objects with `text` and optional `id` and
`score`) it asks for a ranking; with `document` it is a single pair. All other fields are copied to the output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from local_rerank.errors import EmptyQuery, InvalidRequest, NoDocuments
from local_rerank.types import RankedDocument

Record = dict[str, Any]
T = TypeVar("T")

PAIR_COLUMNS = {"relevance_score": float, "log_odds": float, "num_tokens": int, "num_truncated_tokens": int}
"""Fields that scoring adds to a pair's record."""

CHUNK_COLUMNS = {"num_chunks": int, "best_chunk_start": int, "best_chunk_end": int, "best_chunk_score": float}
"""Fields that follow if long documents are scored in chunks. Positions are code points of the document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedColumns:
    """Which fields a job adds to its records, beside PAIR_COLUMNS."""

    in_chunks: bool = False
    is_calibrated: bool = False
    is_blended: bool = False  # only in results of a ranking, as the next
    with_documents: bool = False
    counts_below: bool = False  # num_below_min_score, beside the results of a ranking

    @property
    def of_pair(self) -> dict[str, type]:
        """The fields of a pair and their types, in order."""
        probability = {"probability": float} if self.is_calibrated else {}
        return PAIR_COLUMNS | (CHUNK_COLUMNS if self.in_chunks else {}) | probability

    @property
    def of_result(self) -> dict[str, type]:
        """The fields of a result of a ranking, after its index and id."""
        blended = {"blended_score": float} if self.is_blended else {}
        return self.of_pair | blended | ({"document": str} if self.with_documents else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One record of the input."""

    query: str
    documents: tuple[str, ...]
    is_pair: bool = False  # its scores are written beside its fields, not as a list of results
    instruction: str | None = None  # None means the engine's
    id: str | None = None  # the query's id in a run
    document_ids: tuple[str, ...] | None = None
    first_stage_scores: tuple[float, ...] | None = None  # used by `--blend run=W`
    tail_ids: tuple[str, ...] = ()  # candidates below top_k: not scored, written after the others
    fields: Record = field(default_factory=dict)  # copied to the output
    number: int = 0  # line or row in the input, for messages


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRow:
    """A row with its ranked documents, best first."""

    row: Row
    results: tuple[RankedDocument, ...]
    num_below_min_score: int | None = None  # documents left out of the results; None without min_score
    num_left_out_tokens: int = 0  # of those documents

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents of the row."""
        return sum(item.num_tokens for item in self.results) + self.num_left_out_tokens


def parse_record(record: object) -> Row:
    """Validate a record; raises InvalidRequest that names the field.

    >>> parse_record({"id": 7, "query": "capital of France", "documents": ["Rome", {"text": "Paris"}]}).documents
    ('Rome', 'Paris')
    """
    if not isinstance(record, dict):
        raise InvalidRequest(f"a record must be an object, not {type(record).__name__}", field="record")
    query, instruction = record.get("query"), record.get("instruction")
    if not isinstance(query, str):
        raise InvalidRequest(f"query must be a string, not {_kind(record, 'query')}", field="query")
    if not query.strip():
        raise EmptyQuery()
    if instruction is not None and not isinstance(instruction, str):
        raise InvalidRequest(f"instruction must be a string, not {_kind(record, 'instruction')}", field="instruction")
    name = _name(record.get("id"), "id")
    if (document := record.get("document")) is not None:
        if record.get("documents") is not None:
            raise InvalidRequest("document and documents are both given; give one", field="document")
        if not isinstance(document, str):
            raise InvalidRequest(f"document must be a string, not {_kind(record, 'document')}", field="document")
        return Row(query=query, documents=(document,), is_pair=True, instruction=instruction, id=name, fields=record)
    documents = record.get("documents")
    if not isinstance(documents, list):
        raise InvalidRequest(f"documents must be a list, not {_kind(record, 'documents')}", field="documents")
    if not documents:
        raise NoDocuments(limit=None)
    parsed = [_parse_document(document, index) for index, document in enumerate(documents)]
    return Row(
        query=query,
        documents=tuple(text for text, _, _ in parsed),
        instruction=instruction,
        id=name,
        document_ids=_all_or_none([document_id for _, document_id, _ in parsed], "id"),
        first_stage_scores=_all_or_none([score for _, _, score in parsed], "score"),
        fields={key: value for key, value in record.items() if key != "documents"},
    )


def try_parse(record: object) -> Row | InvalidRequest:
    """Like `parse_record`, but return the error."""
    try:
        return parse_record(record)
    except InvalidRequest as error:
        return error


def to_record(scored: ScoredRow, *, with_documents: bool = False) -> Record:
    """Return the output record: the row's fields plus its scores (a pair) or its results (a ranking)."""
    if scored.row.is_pair:
        return scored.row.fields | _scores(scored.results[0])
    results = [result_record(scored, rank, with_documents=with_documents) for rank in range(1, len(scored.results) + 1)]
    below = scored.num_below_min_score
    return scored.row.fields | {"results": results} | ({} if below is None else {"num_below_min_score": below})


def result_record(scored: ScoredRow, rank: int, *, with_documents: bool = False) -> Record:
    """Return the record of one ranked document; `rank` counts from 1."""
    item, row = scored.results[rank - 1], scored.row
    record: Record = {"index": item.index}
    if row.document_ids is not None:
        record["id"] = row.document_ids[item.index]
    record |= _scores(item)
    if with_documents:
        record["document"] = item.document
    return record


def _scores(item: RankedDocument) -> Record:
    scores = {name: getattr(item, name) for name in PAIR_COLUMNS}
    if (chunk := item.best_chunk) is not None:
        scores |= zip(CHUNK_COLUMNS, (item.num_chunks, chunk.start, chunk.end, chunk.score), strict=True)
    optional = {"probability": item.probability, "blended_score": item.blended_score}
    return scores | {name: value for name, value in optional.items() if value is not None}


def json_line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def encode(text: str) -> bytes:
    """Encode as UTF-8; a lone surrogate, which JSON can contain, is written as its escape."""
    return text.encode("utf-8", "backslashreplace")


def _parse_document(document: object, index: int) -> tuple[str, str | None, float | None]:
    """Return the text, id and first-stage score of one entry of `documents`."""
    where = f"documents[{index}]"
    if isinstance(document, str):
        return document, None, None
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise InvalidRequest(f"{where} must be a string or an object with text", field="documents")
    score = document.get("score")
    if score is not None and (
        not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score)
    ):
        raise InvalidRequest(f"{where}.score must be a finite number", field="documents")
    return document["text"], _name(document.get("id"), f"{where}.id"), None if score is None else float(score)


def _all_or_none(values: Sequence[T | None], name: str) -> tuple[T, ...] | None:
    """Return the values if all documents have one, None if none has; raises InvalidRequest otherwise."""
    present = [value for value in values if value is not None]
    if present and len(present) < len(values):
        missing = next(index for index, value in enumerate(values) if value is None)
        raise InvalidRequest(f"documents[{missing}] has no {name}, but others have", field="documents")
    return tuple(present) or None


def _name(value: object, where: str) -> str | None:
    """Return an id as a string; an empty one, as in a CSV file, counts as missing."""
    if value is None or value == "":
        return None
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InvalidRequest(f"{where} must be a string or a whole number", field=where)
    return str(value)


def _kind(record: Record, name: str) -> str:
    value = record.get(name)
    return ("null" if name in record else "missing") if value is None else type(value).__name__
