"""Does memory grow with the number of documents? The peak over the loaded model, each size in a process of its own.

    python benchmarks/flat_memory.py [--shape qwen3-reranker-0.6b [--layers 28]] [--dtype auto] [--tokens 4000] 10 60

Layers run one after the other and keep nothing, so that fewer of them show the same peak in less time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from local_rerank import Reranker
from local_rerank.bench.memory import PeakMemory
from local_rerank.bench.shapes import make_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=int, nargs="+")
    parser.add_argument("--shape", help="random weights; without it the built-in model")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if len(options.documents) == 1 and options.shape is None:
        print(measure(options))
        return
    with tempfile.TemporaryDirectory() as folder:
        shape = []
        if options.shape:
            shape = ["--model", str(make_checkpoint(Path(folder) / "shape", options.shape, num_layers=options.layers))]
        for number in options.documents:
            arguments = [str(number), "--dtype", options.dtype, "--tokens", str(options.tokens), *shape]
            subprocess.run([sys.executable, __file__, *arguments], check=True)


def measure(options: argparse.Namespace) -> str:
    """One request in this process."""
    number = options.documents[0]
    with Reranker(options.model, dtype=options.dtype) as reranker:
        documents = [f"{i} " + "word " * options.tokens for i in range(number)]  # one token a word, the rest is cut
        started = time.perf_counter()
        with PeakMemory(reranker.info.device) as memory:
            result = reranker.rank("a query", documents)
        info = reranker.info
    return (
        f"{info.model_id}, {info.num_layers} layers, {info.dtype}: {number} documents, {result.num_computed_tokens} "
        f"tokens, peak {memory.peak_bytes / 2**20:.0f} MiB over the model, {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
