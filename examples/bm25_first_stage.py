"""Measure how much reranking improves BM25 on a public collection.

    pip install 'local-rerank[eval]' ir-datasets
    python examples/bm25_first_stage.py vaswani        # ir_datasets downloads the collection once

BM25 comes from SQLite's full-text search. Both runs are written as TREC files to the working directory, for
`local-rerank compare bm25.run reranked.run --qrels qrels.trec`.
"""

import argparse
import re
import sqlite3
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import ir_datasets
import ir_measures
from ir_measures import RR, R, nDCG

from local_rerank import Reranker, RerankRequest

MEASURES = [nDCG @ 10, RR @ 10, R @ 20]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="name of a collection at https://ir-datasets.com")
    parser.add_argument("--num-queries", type=int, default=50)
    parser.add_argument("--top-k", type=int, default=20, help="candidates to rerank per query")
    parser.add_argument("--folder", type=Path, default=Path(), help="folder for the runs")
    options = parser.parse_args()

    dataset = ir_datasets.load(options.dataset)
    texts = {document.doc_id: document.default_text() for document in dataset.docs_iter()}
    queries = {query.query_id: query.default_text() for query in islice(dataset.queries_iter(), options.num_queries)}
    qrels = [judgement for judgement in dataset.qrels_iter() if judgement.query_id in queries]

    index = make_index(texts)
    bm25 = {query_id: search(index, query, options.top_k) for query_id, query in queries.items()}
    with Reranker() as reranker:
        reranked = dict(rerank(reranker, queries, texts, bm25))

    (options.folder / "qrels.trec").write_text("".join(f"{q.query_id} 0 {q.doc_id} {q.relevance}\n" for q in qrels))
    for name, run in (("bm25", bm25), ("reranked", reranked)):
        write_run(options.folder / f"{name}.run", run, name)
        scored = {query_id: {doc: -rank for rank, doc in enumerate(docs)} for query_id, docs in run.items()}
        means = ir_measures.calc_aggregate(MEASURES, qrels, scored)
        print(f"{name:10}" + "  ".join(f"{measure} {means[measure]:.3f}" for measure in MEASURES))


def make_index(texts: dict[str, str]) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:")
    database.execute("CREATE VIRTUAL TABLE documents USING fts5(id UNINDEXED, text, tokenize = 'porter')")
    database.executemany("INSERT INTO documents VALUES (?, ?)", texts.items())
    return database


def search(index: sqlite3.Connection, query: str, num_documents: int) -> list[str]:
    """Return the ids of the best documents by BM25 that contain any word of the query."""
    words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", query))
    found = "SELECT id FROM documents WHERE documents MATCH ? ORDER BY bm25(documents) LIMIT ?"
    return [document_id for (document_id,) in index.execute(found, (words, num_documents))]


def rerank(
    reranker: Reranker, queries: dict[str, str], texts: dict[str, str], run: dict[str, list[str]]
) -> Iterator[tuple[str, list[str]]]:
    found = {query_id: docs for query_id, docs in run.items() if docs}
    requests = (
        RerankRequest(query=queries[query_id], documents=tuple(texts[doc] for doc in docs))
        for query_id, docs in found.items()
    )
    for (query_id, docs), result in zip(found.items(), reranker.rank_batch(requests), strict=True):
        yield query_id, [docs[item.index] for item in result]


def write_run(file: Path, run: dict[str, list[str]], name: str) -> None:
    with file.open("w") as stream:
        for query_id, docs in run.items():
            stream.writelines(f"{query_id} Q0 {doc} {rank} {-rank} {name}\n" for rank, doc in enumerate(docs, 1))


if __name__ == "__main__":
    main()
