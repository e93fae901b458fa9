"""A server of its own and load on it, for the other scripts here: requests of equal documents, closed or open loop."""

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
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

PATH = "/v1/local/rank"
WORDS = "river mountain engine protein market treaty violin harbour glacier senate enzyme orchard".split()
START_SECONDS = 240


@contextmanager
def server(*options: str) -> Iterator[str]:
    """`local-rerank serve` on a free port, ready; yields host and port."""
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
    """A request whose documents of so many words in the mean (log-normal) differ from those of every other number."""
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


def num_computed_tokens(address: str, content: bytes) -> int:
    """Tokens that the model computes for a request."""
    answer = post(http.client.HTTPConnection(address), content)
    return int(answer["num_computed_tokens"])


def closed_loop(address: str, bodies: list[bytes], clients: int, seconds: float) -> float:
    """Requests answered in a second; each client sends its next request when it has its answer."""
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
    """Latencies in seconds, sorted, of requests that come at random, `rate` in a second, whatever is answered."""
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


def health_milliseconds(address: str, times: int = 200) -> float:
    """What a request costs that asks nothing of the model."""
    url = f"http://{address}/health"
    started = time.perf_counter()
    for _ in range(times):
        urllib.request.urlopen(url).read()
    return (time.perf_counter() - started) / times * 1e3
