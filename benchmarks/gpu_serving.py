"""The part of gpu.py that starts the real server and sends it load from a process of its own.

Without the server's packages, clients of an AsyncReranker in this process take its place, and the figures say so.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_pack import ROOT
from benchmarks.gpu_setup import (
    DOCUMENTS,
    RandomTexts,
    Result,
    Setting,
    loaded,
    pairs_of_300,
    run_batches,
    timed,
)
from benchmarks.host_path import Address
from local_rerank import AsyncReranker, RerankRequest
from local_rerank.bench.measure import percentile

NUM_REQUESTS = 48  # different ones
CLIENTS = (16, 64)
START_SECONDS = 60.0  # at most
Measure = Callable[[int, float], tuple[float, list[float]]]
"""Takes a number of clients and seconds; returns requests per second, and latencies in milliseconds."""


class NoServer(Exception):
    """The server did not start; the message says why."""


def serving(setting: Setting) -> Iterator[Result]:
    """Measure the start, and clients of ten documents each beside batch after batch, in alternation."""
    with loaded(setting) as reranker:
        pairs = pairs_of_300(setting, reranker)
        requests = RandomTexts(setting.folder).requests_of_300(4 if setting.quick else NUM_REQUESTS, reranker)
        run_batches(reranker, pairs, 3)

        def batch_after_batch() -> float:
            number = 2 if setting.quick else 60
            return number * len(pairs) / timed(lambda: run_batches(reranker, pairs, number), setting.device)

        cache = setting.folder.parent / "triton-cache"  # empty at the first start
        start = started_server
        try:
            with start(setting, requests, cache) as (seconds, _):
                yield {"clients": "over HTTP", "cold_start_seconds": seconds}
        except NoServer as error:
            start = started_library
            shutil.rmtree(cache, ignore_errors=True)
            with start(setting, requests, cache) as (seconds, _):
                yield {"clients": "of AsyncReranker", "why": str(error), "cold_start_seconds": seconds}
        with start(setting, requests, cache) as (seconds, measure):
            yield {"warm_start_seconds": seconds}
            yield from loads(setting, measure, batch_after_batch)


def loads(setting: Setting, measure: Measure, batch_after_batch: Callable[[], float]) -> Iterator[Result]:
    numbers, seconds = CLIENTS, 1.0 if setting.quick else 4.0  # 800 requests and more on an H200
    latencies: dict[int, list[float]] = {number: [] for number in numbers}
    rates: dict[int, list[float]] = {number: [] for number in numbers}
    shares: dict[int, list[float]] = {number: [] for number in numbers}
    for number in numbers:
        measure(number, 0.1)  # after a second of warm-up, as each
    alone = [batch_after_batch()]
    for _ in range(2):
        for number in numbers:
            rate, taken = measure(number, seconds)
            alone.append(batch_after_batch())
            rates[number].append(rate * DOCUMENTS)
            shares[number].append(rate * DOCUMENTS / (0.5 * sum(alone[-2:])))  # beside what came before and after it
            latencies[number] = sorted(latencies[number] + taken)
            yield {"batch_after_batch_pairs_per_second": median(alone)}
            yield {
                f"{number} clients": {
                    "pairs_per_second": median(rates[number]),
                    "share_of_batch_after_batch": median(shares[number]),
                    "p50_ms": percentile(latencies[number], 50),
                    "p99_ms": percentile(latencies[number], 99),
                }
            }


@contextmanager
def started_server(setting: Setting, requests: list[RerankRequest], cache: Path) -> Iterator[tuple[float, Measure]]:
    """Yield the seconds until `/ready` answers 200, and what measures the server. It prints what the server says."""
    folder = setting.folder.parent
    log = folder / "server.log"
    command = [sys.executable, "-m", "local_rerank", "serve", "--model", str(setting.folder), "--port", "0"]
    command += ["--device", str(setting.device), "--no-self-test"]  # random weights cannot pass it
    command += ["--dtype", "bf16", "--max-batch-tokens", str(setting.batch_tokens)] if setting.quick else []
    begin = time.perf_counter()
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
            env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        )  # fmt: skip
    try:
        address = ready_address(server, log, begin)
        seconds = time.perf_counter() - begin
        host, port = address.removeprefix("http://").rsplit(":", 1)
        bodies = [body_of(request) for request in requests]
        yield seconds, lambda clients, seconds: measured(Address(host, int(port), server.pid), bodies, clients, seconds)
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if " POST " not in line]
        print("\n".join(f"  {line}" for line in said[:40]), flush=True)


def ready_address(server: subprocess.Popen[bytes], log: Path, begin: float) -> str:
    while time.perf_counter() - begin < START_SECONDS and server.poll() is None:
        if found := re.search(r"listening on (http://\S+:\d+),", log.read_text(encoding="utf-8")):
            try:
                with urllib.request.urlopen(f"{found[1]}/ready", timeout=START_SECONDS):
                    return found[1]
            except (urllib.error.URLError, ConnectionError):
                pass
        time.sleep(0.02)
    status, said = server.poll(), log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise NoServer(
        f"the server ended with status {status}: {said[-1:]}" if status is not None else "the server was not ready"
    )


def body_of(request: RerankRequest) -> bytes:
    fields = {name: value for name, value in asdict(request).items() if name in ("query", "documents")}
    body = json.dumps(fields).encode()
    return (
        f"POST /v1/local/rank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def measured(address: Address, bodies: list[bytes], clients: int, seconds: float) -> tuple[float, list[float]]:
    """Send requests from a process of its own (host_path.py). Raises SystemExit unless each answer has all scores."""
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job", Path(folder) / "result"
        job.write_bytes(pickle.dumps((seconds, address, bodies, clients)))
        command = [sys.executable, "-m", "benchmarks.host_path", "--client", str(job), str(result)]
        subprocess.run(command, check=True, cwd=ROOT, timeout=START_SECONDS + seconds)
        ((start, _, first), (end, _, last)), answers = pickle.loads(result.read_bytes())
    for _, _, _, answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200") or len(json.loads(body)["results"]) != DOCUMENTS:
            raise SystemExit(f"{head.decode()}\n{body.decode()}")
    latencies = [1e3 * (answered - sent) for _, sent, answered, _ in answers[first:last]]
    return (last - first) / (end - start), latencies


@contextmanager
def started_library(setting: Setting, requests: list[RerankRequest], cache: Path) -> Iterator[tuple[float, Measure]]:
    """Like `started_server`, with the first answer of a new process as its start, and clients in this process."""
    options: dict[str, Any] = {"device": str(setting.device), "max_queued_tokens": 10**7}
    if setting.quick:
        options |= {"dtype": "bf16", "max_batch_tokens": setting.batch_tokens}
    code = f"from local_rerank import Reranker; Reranker({str(setting.folder)!r}, **{options!r}).rank('a', ['b'])"
    begin = time.perf_counter()
    alone = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    subprocess.run([sys.executable, "-c", code], check=True, env=alone, timeout=START_SECONDS)
    seconds = time.perf_counter() - begin
    reranker = AsyncReranker(str(setting.folder), **options)
    try:
        yield seconds, lambda clients, seconds: asyncio.run(asked(reranker, requests, clients, seconds))
    finally:
        asyncio.run(reranker.close())


async def asked(
    reranker: AsyncReranker, requests: list[RerankRequest], num_clients: int, seconds: float
) -> tuple[float, list[float]]:
    latencies: list[float] = []
    begin = time.perf_counter()

    async def ask(client: int) -> None:
        number = client
        while time.perf_counter() - begin < seconds:
            request, start = requests[number % len(requests)], time.perf_counter()
            await reranker.rank(request.query, request.documents)
            latencies.append(1e3 * (time.perf_counter() - start))
            number += num_clients

    await asyncio.gather(*map(ask, range(num_clients)))
    return len(latencies) / (time.perf_counter() - begin), latencies
