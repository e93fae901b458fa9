"""The texts and teacher outputs that ``encoder.py`` trains on, and its batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from teach import AS_QUERIES, chosen, load_both, load_space, load_vectors
from torch import Tensor

DEV = 300  # last passages and queries of each language, held out


@dataclass
class TaughtTexts:
    """Texts of one kind and language: token ids, offsets and lengths, and the teacher's vectors and token states."""

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    vectors: np.ndarray
    states: np.ndarray

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return padded ids, lengths, the states of all tokens, and vectors."""
        lengths = self.lengths[rows]
        ids = np.zeros((len(rows), max(1, lengths.max())), np.int64)
        for i, row in enumerate(rows):
            ids[i, : lengths[i]] = self.ids[self.starts[row] : self.starts[row] + lengths[i]]
        states = np.concatenate([self.states[self.starts[r] : self.starts[r] + self.lengths[r]] for r in rows])
        return (torch.from_numpy(ids), torch.from_numpy(lengths), torch.from_numpy(states.astype(np.float32)),
                torch.from_numpy(self.vectors[rows]))  # fmt: skip


def load(work: Path, kind: str, language: str) -> TaughtTexts:
    """Load what ``teach.py`` wrote for a kind of text."""
    stored, query = np.load(work / f"{kind}.{language}.npz"), kind in AS_QUERIES
    given = load_vectors(work, kind, language)
    lengths = stored["lengths"][: len(given[0])].astype(np.int64)
    if language == "en":
        vectors = load_both(work).place(given[0], given[1], query)
    else:
        vectors = load_space(work, language).place(given[0].astype(np.float32), query)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    states = np.load(work / f"{kind}.{language}.states.npy", mmap_mode="r")
    return TaughtTexts(stored["ids"], np.cumsum(lengths) - lengths, lengths, vectors, states)


class Corpus:
    """All texts of a language, and the source passage of each query."""

    def __init__(self, work: Path, language: str) -> None:
        kinds = ("passages", "everyday", "extra", "queries", "asked")
        self.passages, self.everyday, self.extra, self.queries, self.asking = (load(work, k, language) for k in kinds)
        places, _ = chosen(work, "passages", language)
        inside = {place: i for i, place in enumerate(places)}
        self.sources = np.array([inside[r["source"]] for r in chosen(work, "queries", language)[1]])
        self.held = np.unique(np.concatenate([self.sources[-DEV:], np.arange(len(places) - DEV, len(places))]))
        self.asked: dict[int, list[int]] = {}
        for query, source in enumerate(self.sources[:-DEV]):
            self.asked.setdefault(int(source), []).append(query)
        self.kept = np.setdiff1d(np.arange(len(places)), self.held)
        stored = np.load(work / "pairs.npz")
        rows = {row: i for i, row in enumerate(chosen(work, "queries", language)[0][:-DEV])}
        mine = [i for i, row in enumerate(stored["queries"].tolist()) if row in rows]
        self.planned: list[tuple[str, np.ndarray]] = []
        self.hard = np.array([rows[row] for row in stored["queries"][mine].tolist()])
        local = [[inside.get(place, -1) for place in row] for row in stored["candidates"][mine].tolist()]
        self.candidates = np.where(np.isin(local, self.held), -1, local)
        texts = np.repeat(np.arange(len(self.asking.lengths)), self.asking.lengths)
        order = np.argsort(self.asking.ids, kind="stable")
        self.holding, self.begin = (
            texts[order],
            np.searchsorted(self.asking.ids[order], np.arange(self.asking.ids.max() + 2)),
        )

    def sharing(self, rng: np.random.Generator, words: int = 10, each: int = 8) -> np.ndarray:
        """Draw short texts of which some share a word."""
        drawn = rng.integers(0, len(self.asking.ids), words)  # in proportion to word frequency
        out = [rng.choice(self.holding[self.begin[t] : self.begin[t + 1]], each) for t in self.asking.ids[drawn]]
        return np.unique(np.concatenate(out))

    def confusing(self, rng: np.random.Generator, queries: int = 14, each: int = 4) -> tuple[np.ndarray, np.ndarray]:
        """Draw queries and passages: each query's own passage and similar ones."""
        drawn = rng.choice(len(self.hard), queries, replace=False)
        others = rng.permuted(self.candidates[drawn, 1:], axis=1)[:, :each]
        passages = np.unique(np.concatenate([self.candidates[drawn, 0], others.ravel()]))
        passages = passages[(passages >= 0) & (self.passages.lengths[passages] > 0)]
        return self.hard[drawn], passages[np.argsort(self.passages.lengths[passages])]

    def plan(self, rng: np.random.Generator, budget: int) -> list[tuple[str, np.ndarray]]:
        """Plan an epoch: batches of similar lengths with about `budget` tokens each."""
        out = []
        for kind in ("passages", "everyday", "extra"):
            texts = getattr(self, kind)
            rows = self.kept if kind == "passages" else np.arange(len(texts.lengths))
            rows = rows[texts.lengths[rows] > 0]
            rows = rows[np.argsort(texts.lengths[rows] + rng.normal(0, 3, len(rows)))]
            start = 0
            while start < len(rows):
                stop = start + 8
                while stop < len(rows) and stop - start < 160 and (stop - start) * texts.lengths[rows[stop]] < budget:
                    stop += 1
                out.append((kind, rows[start:stop]))
                start = stop
        return [out[i] for i in rng.permutation(len(out))]


Part = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(corpus: Corpus, rng: np.random.Generator, budget: int, hard: bool) -> list[Part]:
    """Return separately padded parts: the next texts with some queries, or confusing ones, and short texts."""
    if hard:
        asked, rows = corpus.confusing(rng)
        parts = [corpus.passages.batch(half) for half in np.array_split(rows, 2)]
    else:
        corpus.planned = corpus.planned or corpus.plan(rng, budget)
        kind, rows = corpus.planned.pop()
        parts = [getattr(corpus, kind).batch(rows)]
        asked = rng.choice(len(corpus.sources) - DEV, 24, replace=False)
        if kind == "passages":
            asked = np.array([rng.choice(corpus.asked[r]) for r in rows.tolist() if r in corpus.asked][:64], np.int64)
    asked = asked[corpus.queries.lengths[asked] > 0]
    if len(asked):
        parts.append(corpus.queries.batch(asked))
    return [*parts, corpus.asking.batch(corpus.sharing(rng))]
