"""Measure `local-rerank batch`: pairs per second, the gain of a cache, and whether memory grows with the file.

    python -m benchmarks.batch_jobs --queries 100 --times 10

Runs a file of queries with 20 documents of 30 words each, a file ten times as large, and the large one twice with a
cache. The last line fits docs/log.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

WORDS = "river mountain engine protein market treaty violin harbour glacier senate enzyme orchard".split()
DOCUMENTS, LENGTH = 20, 30


@dataclass(frozen=True)
class JobFigures:
    pairs: int
    seconds: float  # without loading the model
    pairs_per_second: float
    tokens_per_second: float
    peak_mb: float  # resident memory of the process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--times", type=int, default=10, help="size of the large file over that of the small one")
    parser.add_argument("options", nargs="*", help="options of `local-rerank batch`, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large = folder / "small.jsonl", folder / "large.jsonl"
        write(small, options.queries)
        write(large, options.queries * options.times)
        cache = ["--cache", str(folder / "scores.sqlite")]
        runs = {
            "small": run(small, folder / "1.jsonl", options.options),
            "large": run(large, folder / "2.jsonl", options.options),
            "large, cache empty": run(large, folder / "3.jsonl", [*options.options, *cache]),
            "large, all in the cache": run(large, folder / "4.jsonl", [*options.options, *cache]),
        }
        megabytes = large.stat().st_size / 1e6
    for title, each in runs.items():
        print(
            f"{title}: {each.pairs} pairs, {each.seconds:.1f} s, {each.pairs_per_second:.0f} pairs/s, "
            f"{each.tokens_per_second:.0f} tokens/s, peak {each.peak_mb:.0f} MB"
        )
    print(
        f"batch of {DOCUMENTS} x {LENGTH} words: {runs['large'].pairs_per_second:.0f} pairs/s, from the cache "
        f"{runs['large, all in the cache'].pairs_per_second:.0f}; peak {runs['small'].peak_mb:.0f} MB, with a file "
        f"{options.times} times as large ({megabytes:.1f} MB) {runs['large'].peak_mb:.0f} MB"
    )


def write(file: Path, num_queries: int) -> None:
    draw = random.Random(0)
    with file.open("w") as stream:
        for number in range(num_queries):
            documents = [" ".join(draw.choices(WORDS, k=LENGTH)) for _ in range(DOCUMENTS)]
            record = {"id": number, "query": f"Which {WORDS[number % 12]} is number {number}?", "documents": documents}
            stream.write(json.dumps(record) + "\n")


def run(input: Path, output: Path, options: list[str]) -> JobFigures:
    command = [sys.executable, "-m", "local_rerank", "batch", str(input), "--output", str(output), "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    *_, last = process.stdout
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    done = json.loads(last)
    return JobFigures(
        pairs=done["pairs"],
        seconds=done["seconds"],
        pairs_per_second=done["pairs_per_second"],
        tokens_per_second=done["tokens_per_second"],
        peak_mb=usage.ru_maxrss * 1024 / 1e6,
    )


if __name__ == "__main__":
    main()
