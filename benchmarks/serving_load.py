"""Start a server and put closed-loop or open-loop load on it, for the other scripts here."""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

PATH = "/v1/local/rank"
WORDS = "river mountain engine protein market treaty violin harbour glacier senate enzyme orchard".split()
START_SECONDS = 240


@contextmanager
def server(*options: str) -> Iterator[str]:
    """Run `local-rerank serve` on a free port until it is ready; yields host and port."""
    command = [sys.executable, "-m", "local_rerank", "serve", "--port", "0", "--log-level", "warning", *options]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"}
            )
        try:
            yield _wait_until_ready(process, log)
        finally:
            process.terminate()
            process.wait(60)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if "ready: " in (said := log.read_text()):
            found = re.search(r"listening on http://(\S+?),", said)
            assert found
            return found[1]
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def body(number: int, documents: int, words: int, spread: float = 0.0) -> bytes:
    """Make a request body; `number` seeds its texts, whose lengths are log-normal with mean `words`."""
    draw = random.Random(number)
    location = math.log(words) - spread**2 / 2
    lengths = [max(1, round(draw.lognormvariate(location, spread))) for _ in range(documents)]
    texts = [" ".join(draw.choices(WORDS, k=length)) for length in lengths]
    return json.dumps({"query": f"Which {WORDS[number % 12]} is it?", "documents": texts}).encode()


def post(connection: http.client.HTTPConnection, content: bytes) -> dict[str, float]:
    connection.request("POST", PATH, content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    read = answer.read()
    assert answer.status == 200, read
    result: dict[str, float] = json.loads(read)
    return result


def closed_loop(address: str, bodies: list[bytes], clients: int, seconds: float) -> float:
    """Return requests per second of clients that send the next request when they have the answer."""
    stop_at = time.perf_counter() + seconds

    def ask(client: int) -> int:
        connection, answered = http.client.HTTPConnection(address), 0
        while time.perf_counter() < stop_at:
            post(connection, bodies[(client + answered * clients) % len(bodies)])
            answered += 1
        return answered

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answered = sum(pool.map(ask, range(clients)))
    return answered / (time.perf_counter() - started)


def open_loop(address: str, bodies: list[bytes], rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Return the sorted latencies of Poisson arrivals with `rate` requests per second."""
    draw = random.Random(seed)
    connections = threading.local()

    def ask(content: bytes, due: float) -> float:
        if not hasattr(connections, "one"):
            connections.one = http.client.HTTPConnection(address)
        post(connections.one, content)
        return time.perf_counter() - due

    due = time.perf_counter()
    end = due + seconds
    waiting = []
    with ThreadPoolExecutor(128) as pool:
        while (due := due + draw.expovariate(rate)) < end:
            time.sleep(max(0.0, due - time.perf_counter()))
            waiting.append(pool.submit(ask, bodies[len(waiting) % len(bodies)], due))
        return sorted(future.result() for future in waiting)
