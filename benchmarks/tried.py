"""What do the engine's ideas bring, one by one? Random weights in the shape of the 0.6B model, in turn, on the CPU.

    python benchmarks/tried.py --weights DIR [--dtype auto] [--rounds 3]

- last layer: only the tokens that are read ask in it, against all tokens;
- system prompt: many small requests whose common first tokens are computed once, by leaving them out of all but the
  first request: what sharing them between requests could bring at most;
- batch: tokens of a forward pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from local_rerank import Reranker
from local_rerank.bench.measure import workload_requests
from local_rerank.bench.shapes import make_checkpoint
from local_rerank.bench.workloads import WORKLOADS
from local_rerank.engine.engine import Engine
from local_rerank.engine.packing import pack
from local_rerank.requests.tokenization import Pair

BATCHES = (512, 1024, 2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = make_checkpoint(options.weights, "qwen3-reranker-0.6b")
    with Reranker(str(folder), device="cpu", dtype=options.dtype) as reranker:
        print(f"{reranker.info.dtype} multiplied in {reranker.info.compute_dtype}")
        passages = _pairs(reranker, "passages")[0]
        engine = reranker.engine
        batch = pack(passages[:24])
        pruned, whole = (lambda: engine.forward(batch)), (lambda: _unpruned(engine, passages[:24]))
        _print("last layer: pruned, whole", _in_turn([pruned, whole], options.rounds))
        small = _pairs(reranker, "small")[:4]
        common = _common(small)
        shared = [small[0], *([dataclasses.replace(pair, prefix_ids=pair.prefix_ids[common:]) for pair in pairs]
                              for pairs in small[1:])]  # fmt: skip
        ways = [_forward(engine, pairs) for pairs in (shared, small)]
        _print(f"first {common} tokens of 4 requests: once, in each", _in_turn(ways, options.rounds))
        sizes = [_batches(engine, _pairs(reranker, "passages", 96)[0], size) for size in BATCHES]
        _print(f"batches of {BATCHES} tokens", _in_turn(sizes, options.rounds))


def _pairs(reranker: Reranker, workload: str, num_documents: int | None = None) -> list[list[Pair]]:
    requests = workload_requests(WORKLOADS[workload], reranker, num_documents=num_documents)
    return [list(reranker.tokenizer.pairs(request).pairs) for request in requests]


def _common(requests: Sequence[Sequence[Pair]]) -> int:
    """How many first tokens all prefixes share."""
    columns = zip(*(pairs[0].prefix_ids for pairs in requests), strict=False)
    return next(i for i, column in enumerate(columns) if len(set(column)) > 1)


def _forward(engine: Engine, requests: Sequence[Sequence[Pair]]) -> Callable[[], object]:
    batch = pack([pair for pairs in requests for pair in pairs])
    return lambda: engine.forward(batch)


def _batches(engine: Engine, pairs: Sequence[Pair], num_tokens: int) -> Callable[[], object]:
    """The same pairs in as many forward passes as a budget needs."""
    batches: list[list[Pair]] = [[]]
    for pair in pairs:
        used = len(pairs[0].prefix_ids) + sum(len(each.document_ids) for each in batches[-1])
        if batches[-1] and used + len(pair.document_ids) > num_tokens:
            batches.append([])
        batches[-1].append(pair)
    packed = [pack(each) for each in batches]
    return lambda: [engine.forward(batch) for batch in packed]


def _unpruned(engine: Engine, pairs: Sequence[Pair]) -> None:
    """Every token asks in the last layer, as if a document ended at each."""
    batch = pack(pairs)
    layout = engine.kernel.layout(batch, False)
    with torch.inference_mode():
        engine._odds_of(
            dataclasses.replace(batch, last_token_index=torch.arange(batch.num_tokens)), layout, lambda: layout
        )


def _in_turn(ways: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each way, by round, after one round that does not count."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for taken, way in zip(times, ways, strict=True):
            started = time.perf_counter()
            way()
            taken.append(time.perf_counter() - started)
    return [taken[1:] for taken in times]


def _print(what: str, times: Sequence[Sequence[float]]) -> None:
    medians = [statistics.median(taken) for taken in times]
    ratios = ", ".join(f"{value / medians[0]:.3f}" for value in medians)
    print(f"{what}: {', '.join(f'{value:.2f} s' for value in medians)} ({ratios} of the first)", flush=True)


if __name__ == "__main__":
    main()
