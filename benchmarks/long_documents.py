"""Measure how well long documents are ranked: cut off, and by the best of their chunks.

    python -m benchmarks.long_documents --data DIR [--model MODEL] [--chunk-tokens 128 512] [--queries 10]

DIR as in quality.py. Of each collection, some queries whose first ten candidates hold a relevant one are drawn. Each
candidate is put among 2,000 to 6,000 tokens of other passages at a random depth; none of these is a candidate of the
query or judged for it. The draw is the same for all rows. Needs `local-rerank[eval]`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.quality import NAMES, read, short
from local_rerank import Reranker, RerankRequest, RerankResult
from local_rerank.evaluation.collection import Collection
from local_rerank.evaluation.measures import MEASURE, Orders, measure
from local_rerank.requests.pending import PendingRequest
from local_rerank.requests.scores import best_first

SEED, NUM_CANDIDATES, TOKENS = 25, 10, (2000, 6000)
WHOLE = {"long_documents": "truncate"}  # whatever the model says
BEST = (1, 2, 3)  # chunks whose mean a document gets


@dataclass(frozen=True, kw_only=True)
class LongDocument:
    """A candidate among other passages."""

    id: str
    passage: str
    text: str
    start: int  # of the passage in the text

    def holds(self, start: int, end: int) -> bool:
        """Whether a part of the text overlaps the passage."""
        return start < self.start + len(self.passage) and self.start < end


@dataclass
class Row:
    """What a way to rank gave."""

    name: str
    ndcg: list[float] = field(default_factory=list)
    chunks: list[bool] = field(default_factory=list)  # of relevant documents: whether the best chunk overlaps
    spans: list[bool] = field(default_factory=list)

    def cells(self) -> str:
        counts = [f"{sum(flags)} of {len(flags)}" for flags in (self.chunks, self.spans) if flags]
        return " | ".join([short(statistics.fmean(self.ndcg)), *counts])


def main() -> None:
    """Print a table for each collection: nDCG@10, and how often the best chunk and the best span hold the passage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--chunk-tokens", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--overlap", type=float, default=0.125, help="of chunks, as a share of them")
    parser.add_argument("--truncated-tokens", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--queries", type=int, default=10, help="of each collection")
    parser.add_argument("--collections", nargs="+", default=NAMES)
    arguments = parser.parse_args()
    with Reranker(arguments.model, max_document_tokens=max(arguments.truncated_tokens, default=512)) as reranker:
        for name in arguments.collections:
            start = time.perf_counter()
            rows = rows_of(reranker, read(arguments.data / name), name, arguments)
            print(f"\n{name}, {arguments.queries} queries, {time.perf_counter() - start:.0f} s; {MEASURE}", flush=True)
            for row in rows:
                print(f"| {row.name} | {row.cells()} |", flush=True)


def rows_of(reranker: Reranker, collection: Collection, name: str, arguments: argparse.Namespace) -> list[Row]:
    drawn = draw(collection, random.Random(f"{SEED} {name}"), reranker.tokenizer.count_tokens, arguments.queries)
    rows = [Row("bare passages")]
    for query_id, documents in drawn.items():
        result, _ = rank(reranker, collection.queries[query_id], [document.passage for document in documents], **WHOLE)
        add(rows[0], collection, query_id, [documents[item.index].id for item in result])
    for num_tokens in arguments.truncated_tokens:
        rows.append(Row(f"cut off at {num_tokens}"))
        for query_id, documents in drawn.items():
            texts = [document.text for document in documents]
            result, _ = rank(reranker, collection.queries[query_id], texts, max_document_tokens=num_tokens, **WHOLE)
            add(rows[-1], collection, query_id, [documents[item.index].id for item in result])
    for num_tokens in arguments.chunk_tokens:
        rows += chunk_rows(reranker, collection, drawn, num_tokens, arguments.overlap)
    return rows


def draw(
    collection: Collection, random_: random.Random, count_tokens: Callable[[str], int], num_queries: int
) -> dict[str, list[LongDocument]]:
    """The candidates of some queries as long documents, by query."""
    found = {
        query_id: [candidate.document_id for candidate in candidates[:NUM_CANDIDATES]]
        for query_id, candidates in collection.run.items()
    }
    usable = [query_id for query_id, ids in found.items() if any(grade(collection, query_id, id) for id in ids)]
    drawn = {}
    for query_id in sorted(random_.sample(usable, min(num_queries, len(usable)))):
        related = {*collection.qrels[query_id], *(each.document_id for each in collection.run[query_id])}
        others = [text for id, text in collection.documents.items() if id not in related]
        drawn[query_id] = [
            long_document(id, collection.documents[id], others, random_, count_tokens) for id in found[query_id]
        ]
    return drawn


def long_document(
    id: str, passage: str, others: Sequence[str], random_: random.Random, count_tokens: Callable[[str], int]
) -> LongDocument:
    wanted, before = random_.randint(*TOKENS), list[str]()
    num_tokens = count_tokens(passage)
    while num_tokens < wanted:
        before.append(random_.choice(others))
        num_tokens += count_tokens(before[-1])
    place = random_.randint(0, len(before))
    head = "".join(f"{text}\n" for text in before[:place])
    return LongDocument(id=id, passage=passage, text="\n".join([head + passage, *before[place:]]), start=len(head))


def chunk_rows(
    reranker: Reranker, collection: Collection, drawn: dict[str, list[LongDocument]], num_tokens: int, overlap: float
) -> list[Row]:
    """A row for each number of best chunks; the first also has how often the best chunk and span are right."""
    rows = [Row(f"chunks of {num_tokens}" + (f", mean of the best {best}" if best > 1 else "")) for best in BEST]
    for query_id, documents in drawn.items():
        result, scores = rank(
            reranker,
            collection.queries[query_id],
            [document.text for document in documents],
            long_documents="chunk",
            chunk_tokens=num_tokens,
            chunk_overlap_tokens=round(num_tokens * overlap),
            spans=True,
        )
        for row, best in zip(rows, BEST, strict=True):
            means = [statistics.fmean(sorted(each, reverse=True)[:best]) for each in scores]
            add(row, collection, query_id, [documents[index].id for index in best_first(means)])
        for item in result:
            document = documents[item.index]
            if grade(collection, query_id, document.id) and item.best_chunk:
                rows[0].chunks.append(document.holds(item.best_chunk.start, item.best_chunk.end))
                rows[0].spans.append(any(document.holds(span.start, span.end) for span in (item.spans or ())[:1]))
    return rows


def rank(
    reranker: Reranker, query: str, documents: Sequence[str], **options: object
) -> tuple[RerankResult, list[list[float]]]:
    """The result, and the log-odds of each document's chunks, which a result does not hold."""
    request = RerankRequest(query=query, documents=tuple(documents), **options)  # type: ignore[arg-type]
    tokenized = reranker.tokenizer.pairs(request)
    pending = PendingRequest(
        request, tokenized, model_id=reranker.model_id, started=0, span_pairs=reranker.tokenizer.span_pairs
    )
    reranker._worker.submit(pending)
    result = pending.future.result()
    return result, [[pending.log_odds[pair] for pair in own] for own in tokenized.pairs_of_document]


def grade(collection: Collection, query_id: str, document_id: str) -> bool:
    """Whether a document is relevant."""
    return collection.qrels[query_id].get(document_id, 0) > 0


def add(row: Row, collection: Collection, query_id: str, order: list[str]) -> None:
    orders: Orders = {query_id: order}
    row.ndcg += measure({query_id: collection.qrels[query_id]}, orders, [MEASURE])[MEASURE].values()


if __name__ == "__main__":
    main()
