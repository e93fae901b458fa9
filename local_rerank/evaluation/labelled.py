"""Read labelled pairs: JSON lines with query, document and label, or the judged candidates of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_rerank.errors import InvalidRequest
from local_rerank.evaluation.collection import Collection
from local_rerank.text_files import lines

PAIR_FORM = '{"query": "a query", "document": "a document", "label": 0 or 1}'


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Distinct documents of each query, with whether they are relevant."""

    by_query: Mapping[str, Mapping[str, bool]]  # query -> document -> label
    num_unjudged: int = 0  # of a run's candidates, which count as not relevant

    @property
    def labels(self) -> list[bool]:
        return [label for labels in self.by_query.values() for label in labels.values()]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the pairs with their labels, in any order and from either form of input."""
        rows = sorted(
            json.dumps([query, document, label])
            for query, labels in self.by_query.items()
            for document, label in labels.items()
        )
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def read_pairs(file: Path) -> Labelled:
    """Read JSON lines; raises InvalidRequest with file and line. A pair that is repeated counts once."""
    by_query: dict[str, dict[str, bool]] = {}
    for number, line in lines(file, "labelled"):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{where} is not JSON: {error}", field="labelled") from error
        query, document, label = _pair(value, where)
        if by_query.setdefault(query, {}).setdefault(document, label) != label:
            raise InvalidRequest(f"{where} contradicts an earlier label of the same pair", field="labelled")
    return Labelled(by_query=by_query)


def _pair(value: Any, where: str) -> tuple[str, str, bool]:
    """A label is true, false or a grade; grades below 1 are not relevant, as in qrels."""
    fields = value if isinstance(value, dict) else {}
    query, document, label = (fields.get(name) for name in ("query", "document", "label"))
    if not isinstance(query, str) or not isinstance(document, str) or not query.strip():
        raise InvalidRequest(f"{where} is not {PAIR_FORM} with texts; the query must not be empty", field="labelled")
    if not isinstance(label, int | float) or label != label // 1:
        raise InvalidRequest(
            f"{where} has the label {json.dumps(label)}; it must be true, false or a whole number, from 1 for relevant",
            field="labelled",
        )
    return query, document, label >= 1


def pairs_of(collection: Collection, top_k: int) -> Labelled:
    """The first `top_k` candidates of each query; those without a judgement count as not relevant, as in trec_eval."""
    by_query: dict[str, dict[str, bool]] = {}
    num_unjudged = 0
    for query_id, query in collection.queries.items():
        grades = collection.qrels[query_id]
        for candidate in collection.run[query_id][:top_k]:
            num_unjudged += candidate.document_id not in grades
            document, label = collection.documents[candidate.document_id], grades.get(candidate.document_id, 0) >= 1
            labels = by_query.setdefault(query, {})
            labels[document] = label or labels.get(document, False)  # two documents may have one text
    return Labelled(by_query=by_query, num_unjudged=num_unjudged)
