"""Read the files of an evaluation: documents, queries, relevance judgements (qrels) and a first-stage run.

A malformed line raises InvalidRequest with its file and line number; what else cannot be used is counted in `left_out`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from local_rerank.errors import InvalidRequest
from local_rerank.evaluation.left_out import UNKNOWN_DOCUMENT, LeftOut
from local_rerank.evaluation.text_forms import read_texts
from local_rerank.evaluation.trec_files import Candidate, read_qrels, read_run


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Everything to evaluate: each query has a judgement and each candidate has a text."""

    documents: dict[str, str]  # by id: candidates of all judged queries, including those that max_queries cuts off
    queries: dict[str, str]  # by id, in file order
    qrels: dict[str, dict[str, int]]  # query id -> document id -> grade
    run: dict[str, tuple[Candidate, ...]]  # query id -> candidates, best first; may be empty
    num_unjudged_queries: int  # skipped because no judgement names them
    left_out: LeftOut = field(default_factory=LeftOut)


def read_collection(
    *, corpus: Path, queries: Path, qrels: Path, run: Path, max_queries: int | None = None
) -> Collection:
    """Read the four files and keep the first `max_queries` queries; raises InvalidRequest."""
    left_out = LeftOut()
    judgements = read_qrels(qrels)
    texts = dict(read_texts(queries, "queries", left_out))
    asked = dict(islice(texts.items(), max_queries))
    judged = {query_id: text for query_id, text in asked.items() if query_id in judgements}
    if not judged:
        first, other = next(iter(judgements), None), next(iter(asked), None)
        raise InvalidRequest(nothing_shared("query", qrels, first, queries, other), field="qrels")
    candidates = read_run(run, left_out, texts.keys() & judgements.keys())
    found = {query_id: candidates.get(query_id, ()) for query_id in judged}
    if not any(found.values()):
        raise InvalidRequest(f"none of the {len(judged)} judged queries has candidates in {run}", field="run")
    named = {candidate.document_id: None for each in candidates.values() for candidate in each}
    documents = dict(read_texts(corpus, "corpus", left_out, only=named))
    if not documents:
        raise InvalidRequest(no_document(corpus, run, next(iter(named))), field="corpus")
    return Collection(
        documents=documents,
        queries=judged,
        qrels={query_id: judgements[query_id] for query_id in judged},
        run={query_id: _with_text(query_id, each, documents, run, left_out) for query_id, each in found.items()},
        num_unjudged_queries=len(asked) - len(judged),
        left_out=left_out,
    )


def _with_text(
    query_id: str, candidates: Iterable[Candidate], documents: Container[str], run: Path, left_out: LeftOut
) -> tuple[Candidate, ...]:
    """Leave out the candidates that the corpus lacks, for the first stage and for the model."""
    known = []
    for candidate in candidates:
        if candidate.document_id in documents:
            known.append(candidate)
        else:
            left_out.add(UNKNOWN_DOCUMENT, candidate.document_id, f"{run}, query {query_id}")
    return tuple(known)


def no_document(corpus: object, run: Path, document_id: str) -> str:
    return f"{corpus} has none of the documents of {run}, not even {document_id}"


def nothing_shared(what: str, file: Path, one: str | None, other: object, another: str | None) -> str:
    """Say that two files have no id in common, with an id of each."""
    shown = [f"{name} has {value or 'none'}" for name, value in ((file, one), (other, another))]
    return f"{file} and {other} have no {what} in common: {', '.join(shown)}"
