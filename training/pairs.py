"""Step 4: choose candidates for every query, and score them with BM25 and the teachers.

Candidates are the query's source, passages that BM25 ranks high (hard negatives), some of its middle ranks, some that
the language's teacher ranks high (which may share no word), and a random one. The queries of ``asked.jsonl`` have no
source, so the teacher's first passage replaces it. Cosines are standardized by those of random pairs; English uses the
mean of two teachers.

``python pairs.py --work training/work`` writes ``pairs.npz``. Candidate numbers count ``passages.jsonl`` and then
``everyday.jsonl``; query numbers count ``queries.jsonl`` and then ``asked.jsonl``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import Stemmer
from scipy import sparse
from teach import chosen, count, load_vectors
from tqdm import tqdm

SEED = 20261123
K1, B = 1.2, 0.75
TOP, MIDDLE, ALIKE = 4, 2, 3  # candidates from BM25's ranks 1-12 and 13-50, and from the teacher's ranks 1-12
WIDTH = 1 + TOP + MIDDLE + ALIKE + 1
ASKED = 1000  # texts of ``asked.jsonl``, of five characters or more


def terms(texts: list[str]) -> list[list[str]]:
    """Return Porter stems of words and bigrams of Chinese characters."""
    stemmer = Stemmer.Stemmer("porter")
    out = []
    for text in texts:
        lower = text.lower()
        words = stemmer.stemWords(re.findall(r"[a-z0-9]+", lower))
        runs = re.findall(r"[\u4e00-\u9fff]+", lower)
        out.append(words + [run[i : i + 2] for run in runs for i in range(max(1, len(run) - 1))])
    return out


class BM25:
    """BM25 as a sparse matrix of term weights."""

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
        """Return term counts."""
        cells = [(row, self.ids[t]) for row, d in enumerate(documents) for t in d if t in self.ids]
        rows, columns = np.array(cells or [(0, 0)]).T
        return sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), (len(documents), len(self.ids)))

    def score(self, queries: list[str]) -> sparse.csr_matrix:
        """Return the scores of all documents, one sparse row per query."""
        return (self.matrix([list(set(d)) for d in terms(queries)]).tocsr() @ self.weights).tocsr()


def standardised(queries: np.ndarray, passages: np.ndarray, rows: np.ndarray, candidates: np.ndarray,
                 rng: np.random.Generator) -> np.ndarray:  # fmt: skip
    """Return candidates' cosines standardized by those of random pairs."""
    a, b = rng.integers(0, len(queries), 20000), rng.integers(0, len(passages), 20000)
    chance = (queries[a].astype(np.float32) * passages[b].astype(np.float32)).sum(1)
    cosines = np.einsum("qd,qcd->qc", queries[rows].astype(np.float32), passages[candidates].astype(np.float32))
    return np.asarray((cosines - chance.mean()) / chance.std(), np.float32)


def draw(scores: np.ndarray, cosines: np.ndarray, source: int | None, rng: np.random.Generator) -> np.ndarray:
    """Return the source and sampled candidates, without repetition."""
    source = int(cosines.argmax()) if source is None else source
    ranked = [i for i in np.argsort(-scores, kind="stable")[:50] if i != source]
    picked = [source, *rng.permutation(ranked[:12])[:TOP], *rng.permutation(ranked[12:])[:MIDDLE]]
    alike = [i for i in np.argsort(-cosines, kind="stable")[:20] if i not in picked]
    picked += list(rng.permutation(alike[:12])[:ALIKE])
    while len(picked) < WIDTH:
        other = int(rng.integers(len(scores)))
        if other not in picked:
            picked.append(other)
    return np.array(picked)


Gathered = tuple[np.ndarray, list[dict[str, Any]], list[np.ndarray]]


def gather(work: Path, kinds: tuple[str, str], language: str, most: int | None = None) -> Gathered:
    """Join two kinds of texts: numbers, records and vectors by each teacher; at most `most` of the second."""
    places, records, vectors, before = [], [], [], 0
    for kind in kinds:
        rows, found = chosen(work, kind, language)
        kept = [i for i, r in enumerate(found) if most is None or kind == kinds[0] or len(r["text"]) >= 5]
        kept = kept if kind == kinds[0] else kept[:most]
        places += [rows[i] + before for i in kept]
        records += [found[i] for i in kept]
        vectors.append([v[kept].astype(np.float32) for v in load_vectors(work, kind, language)])
        before += count(work, kind)
    return np.array(places), records, [np.concatenate(parts) for parts in zip(*vectors, strict=True)]


def main() -> None:
    """Choose candidates per language, then compute all scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    work = parser.parse_args().work
    rng = np.random.default_rng(SEED)
    found: list[dict[str, np.ndarray]] = []
    for language in ("en", "zh"):
        places, passages, texts = gather(work, ("passages", "everyday"), language)
        rows, queries, asks = gather(work, ("queries", "asked"), language, ASKED)
        inside = {place: i for i, place in enumerate(places.tolist())}
        index = BM25([p["text"] for p in passages])
        bm25, best = np.zeros((len(rows), WIDTH), np.float32), np.zeros(len(rows), np.float32)
        local = np.zeros((len(rows), WIDTH), np.int64)
        for start in tqdm(range(0, len(rows), 512), desc=language, mininterval=10):
            block = queries[start : start + 512]
            scores = index.score([q["text"] for q in block]).toarray()
            cosines = np.mean([a[start : start + 512] @ t.T for a, t in zip(asks, texts, strict=True)], axis=0)
            for row, query in enumerate(block, start):
                source = inside[query["source"]] if "source" in query else None
                local[row] = draw(scores[row - start], cosines[row - start], source, rng)
                bm25[row] = scores[row - start][local[row]]
                best[row] = scores[row - start].max()
        scored = [standardised(a, t, np.arange(len(rows)), local, rng) for a, t in zip(asks, texts, strict=True)]
        found.append({"queries": rows, "candidates": places[local], "bm25": bm25, "best": best,
                      "teacher": np.mean(scored, axis=0)})  # fmt: skip
    order = np.random.default_rng(SEED).permutation(sum(len(part["best"]) for part in found))
    np.savez(work / "pairs.npz", **{k: np.concatenate([part[k] for part in found])[order] for k in found[0]})


if __name__ == "__main__":
    main()
