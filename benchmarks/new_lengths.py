"""What do texts of new lengths cost? Time of a request at first and once more, and the memory that stays.

    python benchmarks/new_lengths.py [--model FOLDER] [--dtype bf16] [--requests 150]

Set ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024 and LRU_CACHE_CAPACITY=1024 for what happens by itself.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import psutil

from local_rerank.engine.cpu.process_setup import configure_process

configure_process()  # as commands do, before torch is loaded

from local_rerank import Reranker  # noqa: E402

KINDS = [(1, 20), (1, 400), (8, 60), (32, 60)]  # documents and the most words of one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=150)
    options = parser.parse_args()
    generator = random.Random(1)
    with Reranker(options.model, device="cpu", dtype=options.dtype) as reranker:
        reranker.rank("a query", ["word " * 60] * 64)
        before = psutil.Process().memory_info().rss
        for documents, words in KINDS:
            first, again = list[float](), list[float]()
            for _ in range(options.requests):
                texts = ["word " * generator.randint(words // 3, words) for _ in range(documents)]
                query = "word " * generator.randint(1, 12)
                for seconds in (first, again):
                    start = time.perf_counter()
                    reranker.rank(query, texts)
                    seconds.append(time.perf_counter() - start)
            grown = (psutil.Process().memory_info().rss - before) >> 20
            print(
                f"{reranker.info.dtype}, {documents} documents of up to {words} words: "
                f"{milliseconds(first)} ms, once more {milliseconds(again)}; {grown} MiB more than before the first"
            )


def milliseconds(seconds: list[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f}"


if __name__ == "__main__":
    main()
