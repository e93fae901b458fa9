"""How long does a body that is all structure and no text keep the server from answering anyone else?

    python -m benchmarks.freeze

Each body is sent once while `/health` is asked all the time; reported is the longest that took.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable

import psutil

from benchmarks.serving_load import server

BYTES = 60_000_000
PATHS = ("/v1/local/rank", "/v1/rerank")


def fill(item: str) -> str:
    return (item + ",") * (BYTES // (len(item) + 1)) + item


def request(documents: str, more: str = "0") -> str:
    return f'{{"query": "q", "documents": [{documents}], "more": {more}}}'


BODIES: dict[str, Callable[[], str]] = {
    "empty lists": lambda: request('"d"', f"[{fill('[]')}]"),
    "numbers": lambda: request('"d"', f"[{fill('1')}]"),
    "empty documents": lambda: request(fill('""')),
    "numbers in a document": lambda: request(f'{{"text": "d", "more": [{fill("1")}]}}'),
    "keys of a document": lambda: request('{"text": "d", ' + fill('"a":1') + "}"),
    "escapes": lambda: request('"' + r"\u0041" * (BYTES // 6) + '"'),
    "long documents": lambda: request(",".join(['"' + "word " * 380_000 + '"'] * 30)),
}


def longest_health(address: str, over: threading.Event) -> float:
    longest = 0.0
    while not over.is_set():
        started = time.perf_counter()
        connection = http.client.HTTPConnection(address, timeout=600)
        connection.request("GET", "/health")
        connection.getresponse().read()
        longest = max(longest, time.perf_counter() - started)
        time.sleep(0.01)
    return longest


def attack(address: str, path: str, content: bytes) -> tuple[int, float, float]:
    """Status, seconds, and the longest that `/health` took beside it."""
    over, found = threading.Event(), list[float]()
    watcher = threading.Thread(target=lambda: found.append(longest_health(address, over)))
    watcher.start()
    started = time.perf_counter()
    connection = http.client.HTTPConnection(address, timeout=600)
    connection.request("POST", path, content, {"Content-Type": "application/json"})
    status = connection.getresponse().status
    seconds = time.perf_counter() - started
    over.set()
    watcher.join()
    return status, seconds, found[0]


def main() -> None:
    with server() as address:
        for name, make in BODIES.items():
            content = make().encode()
            for path in PATHS:
                status, seconds, longest = attack(address, path, content)
                print(
                    f"{name}, {path}: {status} after {seconds:.2f} s; /health took {longest:.2f} s at most", flush=True
                )
        children = psutil.Process().children()
        print(f"resident at the end: {sum(child.memory_info().rss for child in children) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
