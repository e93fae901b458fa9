"""Measure the overhead of HTTP: the same requests through a Reranker here and through a server, in alternation.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=20000 python -m benchmarks.http_overhead [--clients 16] [--rounds 5]

The variables are those that the server sets for itself. Client and server share the machine. Prints the throughput of
concurrent clients, as a ratio of HTTP to in-process, and the median time that HTTP adds to a small request.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from local_rerank import Reranker
from tests.server.test_process import started

Ask = Callable[[bytes], object]
SMALL_REQUESTS = 100
WORDS = "river mountain engine protein market treaty violin harbour glacier senate enzyme orchard".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    serve = ["--dtype", options.dtype, "--no-self-test"]  # random weights would fail it
    serve += ["--model", options.model] if options.model else []
    bodies = [body(number, options.documents, options.words) for number in range(options.clients)]
    with (
        tempfile.TemporaryDirectory() as folder,
        Reranker(options.model, dtype=options.dtype) as reranker,
        started(Path(folder) / "log", "local_rerank", "serve", "--port", "0", *serve) as server,
    ):
        server.wait_for("ready: ")
        address = server.address.removeprefix("http://")

        def in_process(content: bytes) -> object:
            request = json.loads(content)
            return reranker.rank(request["query"], request["documents"])

        def over_http(content: bytes) -> object:
            connection = http.client.HTTPConnection(address)
            connection.request("POST", "/v1/local/rank", content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            read = answer.read()
            assert answer.status == 200, read
            return json.loads(read)

        ways = {"in process": in_process, "HTTP": over_http}
        for ask in ways.values():
            at_once(ask, bodies)
        print(f"{reranker.model_id} {reranker.info.dtype}, {options.clients} clients, "
              f"{options.documents} documents of {options.words} words")  # fmt: skip
        print_rounds("requests/s", [{name: len(bodies) / at_once(ask, bodies) for name, ask in ways.items()}
                                    for _ in range(options.rounds)])  # fmt: skip
        small = body(0, options.documents, options.words)
        print_rounds("ms of one request, p50", [{name: one_at_a_time(ask, small) for name, ask in ways.items()}
                                                for _ in range(options.rounds)])  # fmt: skip


def body(number: int, documents: int, words: int) -> bytes:
    """Make a request body; `number` seeds its texts."""
    draw = random.Random(number)
    texts = [" ".join(draw.choices(WORDS, k=words)) for _ in range(documents)]
    return json.dumps({"query": f"Which {WORDS[number % 12]} is it?", "documents": texts}).encode()


def at_once(ask: Ask, bodies: list[bytes]) -> float:
    """Return the seconds until all clients have their answer."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(bodies)) as pool:
        list(pool.map(ask, bodies))
    return time.perf_counter() - started


def one_at_a_time(ask: Ask, content: bytes) -> float:
    """Return the median milliseconds of a request; slow requests are sent fewer times."""
    times: list[float] = []
    while len(times) < SMALL_REQUESTS and (len(times) < 3 or sum(times) < 3.0):
        started = time.perf_counter()
        ask(content)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def print_rounds(what: str, rounds: list[dict[str, float]]) -> None:
    ways = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    ratio = statistics.median(each["HTTP"] / each["in process"] for each in rounds)
    difference = statistics.median(each["HTTP"] - each["in process"] for each in rounds)
    medians = ", ".join(f"{name} {value:.4g}" for name, value in ways.items())
    print(f"{what}: {medians}; HTTP over in process {ratio:.3f}, difference {difference:.4g} (medians of "
          f"{len(rounds)} rounds)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
