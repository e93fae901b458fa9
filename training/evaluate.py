"""Step 7: measure nDCG@10 on the evaluation collections (never trained on), alone and blended with BM25.

``python evaluate.py --model FOLDER --ir DIR`` reranks the top 20 of each ``bm25.run``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import ir_measures
import numpy as np
import torch
from ir_measures import Qrel, ScoredDoc, nDCG
from model import Nano, collate, load_folder
from tokenizers import Tokenizer
from tqdm import tqdm
from vocabulary import INSTRUCTION, Prompt

COLLECTIONS = ("xquad_sent_en", "xquad_sent_zh", "med", "cran")
DEPTH = 20


def texts(file: Path) -> dict[str, str]:
    """Read texts by id."""
    return {r["id"]: r["text"] for r in map(json.loads, file.open())}


def read_run(file: Path) -> dict[str, list[tuple[str, float]]]:
    """Read documents and scores by query, in order of rank."""
    run: dict[str, list[tuple[str, float]]] = {}
    for line in file.open():
        query, _, document, _, score, _ = line.split()
        run.setdefault(query, []).append((document, float(score)))
    return {q: sorted(found, key=lambda pair: -pair[1]) for q, found in run.items()}


def read_qrels(file: Path) -> list[Qrel]:
    """Read relevance judgements."""
    rows = (line.split() for line in file.open())
    return [Qrel(query, document, int(grade)) for query, _, document, grade in rows]


@torch.inference_mode()
def score(model: Nano, prompt: Prompt, query: str, documents: list[str], instruction: str = INSTRUCTION) -> list[float]:
    """Return log-odds of a query's documents, in batches of similar length."""
    tails = [prompt.tail(d) for d in documents]
    order = sorted(range(len(tails)), key=lambda i: len(tails[i]))
    out = [0.0] * len(tails)
    for start in range(0, len(order), 10):
        part = order[start : start + 10]
        values = model(collate([prompt.head(query, instruction)], [[tails[i] for i in part]]))[0].tolist()
        for i, value in zip(part, values, strict=True):
            out[i] = value
    return out


def standardise(values: list[float]) -> np.ndarray:
    """Return z-scores."""
    array = np.array(values)
    return np.asarray((array - array.mean()) / (array.std() + 1e-9))


def ndcg(qrels: list[Qrel], rankings: dict[str, list[str]]) -> float:
    """Return the mean nDCG@10 over the ranked queries."""
    judged = [q for q in qrels if q.query_id in rankings]
    run = [ScoredDoc(q, d, -float(i)) for q, found in rankings.items() for i, d in enumerate(found)]
    return float(ir_measures.calc_aggregate([nDCG @ 10], judged, run)[nDCG @ 10])


def collection(model: Nano, prompt: Prompt, folder: Path, limit: int | None) -> dict[str, float]:
    """Return nDCG@10 of BM25, of the model, and of the sum of their z-scores."""
    corpus, queries = texts(folder / "corpus.jsonl"), texts(folder / "queries.jsonl")
    run, qrels = read_run(folder / "bm25.run"), read_qrels(folder / "qrels.trec")
    judged = {q.query_id for q in qrels}
    chosen = [q for q in queries if q in judged and q in run][:limit]
    rankings: dict[str, dict[str, list[str]]] = {"bm25": {}, "model": {}, "blend": {}}
    for query in tqdm(chosen, desc=folder.name, leave=False):
        documents = [d for d, _ in run[query]]
        top = documents[:DEPTH]
        own = score(model, prompt, queries[query], [corpus[d] for d in top])
        both = standardise(own) + standardise([s for _, s in run[query][:DEPTH]])
        rankings["bm25"][query] = documents
        for name, values in (("model", own), ("blend", both)):
            rankings[name][query] = [top[i] for i in np.argsort(-np.array(values), kind="stable")] + documents[DEPTH:]
    return {name: ndcg(qrels, ranking) for name, ranking in rankings.items()} | {"queries": len(chosen)}


def sanity(model: Nano, prompt: Prompt, file: Path) -> dict[str, float]:
    """Count relevant documents at rank 1, and describe the range of scores."""
    cases = [json.loads(line) for line in file.open()]
    right, wrong, hits = [], [], 0
    for case in cases:
        values = score(model, prompt, case["query"], case["documents"])
        best = int(np.argmax(values))
        hits += best == case["right"]
        if best != case["right"]:
            print(f"  missed: {case['query']} -> {case['documents'][best][:60]}")
        odds = [1 / (1 + math.exp(-v)) for v in values]
        right.append(odds.pop(case["right"]))
        wrong += odds
    return {"right_at_1": hits, "of": len(cases), "right_above_0.5": float(np.mean(np.array(right) > 0.5)),
            "wrong_below_0.2": float(np.mean(np.array(wrong) < 0.2)), "median_right": float(np.median(right)),
            "median_wrong": float(np.median(wrong))}  # fmt: skip


def main() -> None:
    """Print one line per collection and, on request, the result on the hand-written cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ir", type=Path)
    parser.add_argument("--limit", type=int, help="use only the first queries")
    parser.add_argument("--sanity", type=Path, help="JSON lines of query, documents, right")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, _ = load_folder(arguments.model)
    prompt = Prompt(Tokenizer.from_file(str(arguments.model / "tokenizer.json")))
    result: dict[str, dict[str, float]] = {}
    if arguments.ir:
        for name in COLLECTIONS:
            result[name] = collection(model, prompt, arguments.ir / name, arguments.limit)
            print(name, {k: round(v, 3) for k, v in result[name].items()}, flush=True)
        means = {k: float(np.mean([result[c][k] for c in COLLECTIONS])) for k in ("bm25", "model", "blend")}
        result["mean"] = means
        print("mean", {k: round(v, 3) for k, v in means.items()})
    if arguments.sanity:
        result["sanity"] = sanity(model, prompt, arguments.sanity)
        print("sanity", {k: round(v, 3) for k, v in result["sanity"].items()})
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
