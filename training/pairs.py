"""Step 4: candidates of every query, with their BM25 scores and the teachers' scores.

Candidates are the query's source, passages that BM25 ranks high (the near misses a reranker must tell apart), some of
its middle ranks, and a random one. Teachers' cosines are standardised by random pairs; English takes the mean of both.

``python pairs.py --work training/work`` writes ``pairs.npz``.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import Stemmer
from scipy import sparse

SEED = 20261123
K1, B = 1.2, 0.75
TOP, MIDDLE = 5, 2  # candidates from ranks 1-12 and 13-50


def terms(texts: list[str]) -> list[list[str]]:
    """Porter stems of words, and bigrams of Chinese characters."""
    stemmer = Stemmer.Stemmer("porter")
    out = []
    for text in texts:
        lower = text.lower()
        words = stemmer.stemWords(re.findall(r"[a-z0-9]+", lower))
        runs = re.findall(r"[\u4e00-\u9fff]+", lower)
        out.append(words + [run[i : i + 2] for run in runs for i in range(max(1, len(run) - 1))])
    return out


class BM25:
    """Okapi BM25 as a sparse matrix of term weights."""

    def __init__(self, texts: list[str]) -> None:
        documents = terms(texts)
        self.ids = {t: i for i, t in enumerate(dict.fromkeys(t for d in documents for t in d))}
        counts = self.matrix(documents).tocsr()
        lengths = np.asarray(counts.sum(1)).ravel()
        df = np.asarray((counts > 0).sum(0)).ravel()
        idf = np.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        rows = np.repeat(np.arange(len(texts)), np.diff(counts.indptr))
        norm = K1 * (1 - B + B * lengths[rows] / lengths.mean())
        counts.data = counts.data * (K1 + 1) / (counts.data + norm) * idf[counts.indices]
        self.weights = counts.T.tocsr()

    def matrix(self, documents: list[list[str]]) -> sparse.coo_matrix:
        """Term counts."""
        cells = [(row, self.ids[t]) for row, d in enumerate(documents) for t in d if t in self.ids]
        rows, columns = np.array(cells or [(0, 0)]).T
        return sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), (len(documents), len(self.ids)))

    def score(self, queries: list[str]) -> sparse.csr_matrix:
        """Scores of all documents, one sparse row per query."""
        return (self.matrix([list(set(d)) for d in terms(queries)]).tocsr() @ self.weights).tocsr()


def standardised(queries: np.ndarray, passages: np.ndarray, rows: np.ndarray, candidates: np.ndarray,
                 rng: np.random.Generator) -> np.ndarray:  # fmt: skip
    """Cosines of the candidates in units of the deviation of random pairs."""
    a, b = rng.integers(0, len(queries), 20000), rng.integers(0, len(passages), 20000)
    chance = (queries[a].astype(np.float32) * passages[b].astype(np.float32)).sum(1)
    cosines = np.einsum("qd,qcd->qc", queries[rows].astype(np.float32), passages[candidates].astype(np.float32))
    return np.asarray((cosines - chance.mean()) / chance.std(), np.float32)


def draw(scores: np.ndarray, source: int, rng: np.random.Generator) -> np.ndarray:
    """Candidates of one query (positions within its language)."""
    ranked = [i for i in np.argsort(-scores)[:51] if i != source and scores[i] > 0]
    top, middle = ranked[:12], ranked[12:50]
    picked = [source, *rng.permutation(top)[:TOP], *rng.permutation(middle)[:MIDDLE]]
    while len(picked) < 1 + TOP + MIDDLE + 1:
        other = int(rng.integers(len(scores)))
        if other not in picked:
            picked.append(other)
    return np.array(picked)


def main() -> None:
    """Candidates per language, then all scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    arguments = parser.parse_args()
    rng = np.random.default_rng(SEED)
    passages = [json.loads(line) for line in (arguments.work / "passages.jsonl").open()]
    queries = [json.loads(line) for line in (arguments.work / "queries.jsonl").open()]
    width = 2 + TOP + MIDDLE
    candidates = np.zeros((len(queries), width), np.int32)
    bm25 = np.zeros((len(queries), width), np.float32)
    teacher = np.zeros((len(queries), width), np.float32)
    best = np.zeros(len(queries), np.float32)
    for language in ("en", "zh"):
        places = np.array([i for i, p in enumerate(passages) if p["language"] == language])
        inside = {place: i for i, place in enumerate(places.tolist())}
        rows = np.array([i for i, q in enumerate(queries) if q["language"] == language])
        index = BM25([passages[i]["text"] for i in places])
        local = np.zeros((len(rows), width), np.int64)
        for start in range(0, len(rows), 512):
            block = rows[start : start + 512]
            scores = index.score([queries[i]["text"] for i in block]).toarray()
            for offset, row in enumerate(block):
                local[start + offset] = draw(scores[offset], inside[queries[row]["source"]], rng)
                bm25[row] = scores[offset][local[start + offset]]
                best[row] = scores[offset].max()
        candidates[rows] = places[local]
        found = []
        for name in ("minilm", "e5") if language == "en" else ("e5",):
            file = arguments.work / f"passages.{name}.npy"
            if not file.exists() or not (arguments.work / f"queries.{name}.npy").exists():
                print("no", file.name)
                continue
            texts, asks = np.load(file), np.load(arguments.work / f"queries.{name}.npy")
            if name == "e5":
                texts, asks = texts[places], asks[rows]
            else:
                asks = asks[: len(rows)]
            found.append(standardised(asks, texts, np.arange(len(rows)), local, rng))
        if found:
            teacher[rows] = np.mean(found, 0)
        print(language, len(rows), "queries", flush=True)
    np.savez(arguments.work / "pairs.npz", candidates=candidates, bm25=bm25, best=best, teacher=teacher)


if __name__ == "__main__":
    main()
