"""Measure the start-up time of the command line, of the open port, and of the ready built-in model.

    python -m benchmarks.startup --rounds 5

Each round starts new processes. The last line fits docs/log.md.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

COMMAND = [sys.executable, "-m", "local_rerank"]
LIMIT_SECONDS = 60.0


def help_seconds() -> float:
    start = time.perf_counter()
    subprocess.run([*COMMAND, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def serve_seconds(options: list[str]) -> tuple[float, float]:
    """Seconds from the start of the process to the first answer of /health, and of /ready with status 200."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = next(found[1] for line in process.stdout if (found := re.search(r"listening on (http\S+?),", line)))
        listening = wait_for(f"{address}/health", start)
        return listening, wait_for(f"{address}/ready", start)
    finally:
        process.terminate()
        process.communicate()


def wait_for(url: str, start: float) -> float:
    while time.perf_counter() - start < LIMIT_SECONDS:
        try:
            with urllib.request.urlopen(url, timeout=LIMIT_SECONDS):
                return time.perf_counter() - start
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.02)
    raise SystemExit(f"{url} did not answer within {LIMIT_SECONDS:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("options", nargs="*", help="of `local-rerank serve`, after --")
    arguments = parser.parse_args()
    rounds = [(help_seconds(), *serve_seconds(arguments.options)) for _ in range(arguments.rounds + 1)][1:]
    for taken in rounds:
        print("help {:.2f} s, listening {:.2f} s, ready {:.2f} s".format(*taken))
    medians = [statistics.median(values) for values in zip(*rounds, strict=True)]
    print("medians of {}: --help {:.2f} s, listening {:.2f} s, ready {:.2f} s".format(len(rounds), *medians))


if __name__ == "__main__":
    main()
