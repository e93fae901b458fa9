"""Training groups: a query, its candidates as token ids, and the target log-odds from the teachers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from teach import count
from tokenizers import Tokenizer
from vocabulary import INSTRUCTION, Prompt

INSTRUCTIONS = [
    (INSTRUCTION, 0.6),
    (INSTRUCTION + ".", 0.2),
    ("Given the user query, retrieval the relevant passages", 0.05),
    ("Retrieve documents that can answer the user's query", 0.05),
    ("Given a question, find the passage that contains the answer", 0.04),
    ("Retrieve semantically similar text", 0.03),
    ("找出能够回答问题的段落", 0.03),
]
LEXICAL = 1.0  # weight of BM25 relative to the query's best, in deviations of the teacher's scores
MIDPOINT = {"en": 3.9, "zh": 3.5}  # teacher's score (with the lexical share) at log-odds 0
SLOPE = 1.2  # log-odds per deviation
LARGEST = 6.0  # log-odds
DEV = 400  # last queries, held out


@dataclass
class Groups:
    """The training data; token ids are computed on demand."""

    prompt: Prompt
    passages: list[list[int]]
    queries: list[str]
    languages: list[str]
    asked: np.ndarray  # which queries come from ``asked.jsonl``
    candidates: np.ndarray
    targets: np.ndarray  # log-odds
    by_language: dict[str, np.ndarray]

    def group(
        self, row: int, columns: np.ndarray, instruction: str, limit: int, rng: np.random.Generator | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """Return head and tails of a query for the chosen candidates; `rng` embeds each in a long document."""
        tails = [self.passages[i][:limit] for i in self.candidates[row, columns]]
        if rng is not None:
            tails = [self.embed(t, self.languages[row], rng) for t in tails]
        return self.prompt.head(self.queries[row], instruction), [t + self.prompt.suffix for t in tails]

    def embed(self, tail: list[int], language: str, rng: np.random.Generator) -> list[int]:
        """Put a passage between unrelated ones, 120 to 260 tokens in all, as in a long document."""
        goal = int(rng.integers(120, 260))
        while len(tail) < goal:
            other = self.passages[rng.choice(self.by_language[language])][: goal - len(tail)]
            tail = tail + other if rng.random() < 0.5 else other + tail
        return tail


def load(work: Path) -> Groups:
    """Load texts, candidates and scores."""
    prompt = Prompt(Tokenizer.from_file(str(work / "tokenizer.json")))
    records, every = (
        [json.loads(line) for kind in kinds for line in (work / f"{kind}.jsonl").open()]
        for kinds in (("passages", "everyday"), ("queries", "asked"))
    )
    stored = np.load(work / "pairs.npz")
    queries = [every[i] for i in stored["queries"]]
    languages = [q["language"] for q in queries]
    lexical = stored["bm25"] / np.maximum(stored["best"], 1e-6)[:, None]
    midpoint = np.array([MIDPOINT[language] for language in languages])[:, None]
    targets = SLOPE * (stored["teacher"] + LEXICAL * lexical - midpoint)
    ids = [
        e.ids
        for e in prompt.user.encode_batch([" " + t for t in (r["text"] for r in records)], add_special_tokens=False)
    ]
    targets = np.clip(targets, -LARGEST, LARGEST).astype(np.float32)
    places = {x: np.array([i for i, r in enumerate(records) if r["language"] == x]) for x in ("en", "zh")}
    return Groups(
        prompt,
        ids,
        [q["text"] for q in queries],
        languages,
        stored["queries"] >= count(work, "queries"),
        stored["candidates"],
        targets,
        places,
    )
