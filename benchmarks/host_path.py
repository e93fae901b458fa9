"""Measure the host path: the real server over real sockets, with a device that computes in no time or at a fixed rate.

    git worktree add ../before 1f1db49
    python -m benchmarks.host_path --before ../before [--rates 0 530000] [--seconds 4] [--rounds 3]

The servers of both trees take turns. Only the device is replaced, where the worker hands it a batch: packing and tile
layouts run as for a GPU, and the scores are computed from the packed ids. The client is a process of its own on the
same cores. It checks every score against the ids of the whole prompt, so a lost or mixed-up score ends the benchmark.
The last line fits docs/log.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pickle
import random
import re
import runpy
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

MAX_BATCH_TOKENS = 16384  # a GPU's default
MODULUS = 1_000_003
WARM_UP_SECONDS = 1.0
NUM_BODIES = 48  # different requests of a load
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


@dataclass(frozen=True)
class Load:
    clients: int
    documents: int
    tokens: int  # of a document

    def __str__(self) -> str:
        return f"{self.documents}x{self.tokens}"


LOADS = {0: [Load(8, 100, 200), Load(16, 10, 200), Load(4, 10, 60)]}
LOADS_AT_A_RATE = [Load(16, 100, 200), Load(16, 10, 200)]


@dataclass(frozen=True)
class Address:
    host: str
    port: int
    pid: int


Answer = tuple[int, float, float, bytes]
"""The number of the request, when it was sent and answered, and the answer."""
Mark = tuple[float, float, int]
"""A time, the CPU seconds of the server until then, and the number of answers."""
Told = tuple[list[Mark], list[Answer]]
"""What a client tells: the start and the end of the measurement, and all answers."""


@dataclass(frozen=True)
class Figures:
    pairs_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_seconds: float  # of the server, per 1,000 pairs
    busy: float  # share of the time in which the device computed


def weighted(ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What each token adds to a pair's sum, which depends on the token and its place."""
    return ids * (positions * 40_503 % 65_521)


def score_of(sums: np.ndarray) -> np.ndarray:
    """The log-odds that the device gives pairs with these sums."""
    return sums % MODULUS / MODULUS * 12 - 6


def serve(rate: float, log: Path, arguments: Sequence[str]) -> None:
    """`local-rerank serve` of the tree in PYTHONPATH, with the device replaced; writes when the device was busy."""
    try:
        from local_rerank.engine.cuda.attention import tile_layout
        from local_rerank.engine.packing import pack
        from local_rerank.requests.worker import Worker

        takes_pairs = True
    except ModuleNotFoundError:  # before the packages were split
        from local_rerank.cuda_attention import tile_layout
        from local_rerank.packing import pack
        from local_rerank.worker import Worker

        takes_pairs = False
    import torch

    busy_until = 0.0
    times = log.open("w", buffering=1)

    def launch(given: Any) -> Callable[[], Any]:
        nonlocal busy_until
        batch = pack(given) if takes_pairs else given
        for last_tokens_only in (False, True):
            tile_layout(batch, last_tokens_only)
        sums = np.concatenate([[0], weighted(batch.input_ids[0].numpy(), batch.position_ids[0].numpy()).cumsum()])
        ends = batch.last_token_index.numpy() + 1
        in_order = np.empty(len(ends))
        for group in batch.groups:
            first, last = group.first_document, group.first_document + group.num_documents
            prefix_end = group.start + group.prefix_length
            edges = np.concatenate([[prefix_end], ends[first:last]])
            own = np.diff(sums[edges]) + sums[prefix_end] - sums[group.start]
            in_order[batch.pair_order.numpy()[first:last]] = score_of(own)
        if rate:
            began = max(time.monotonic(), busy_until)
            busy_until = end = began + batch.num_tokens / rate
            times.write(f"{began} {end}\n")

        def fetch() -> Any:
            if rate:
                time.sleep(max(0.0, end - time.monotonic()))
            return in_order.tolist() if takes_pairs else torch.from_numpy(in_order)

        return fetch

    original = Worker.__init__

    def with_device(self: Any, score: Any, **options: Any) -> None:
        original(self, lambda given: launch(given)(), **options | {"launch": launch})

    Worker.__init__ = with_device
    sys.argv = ["local-rerank", "serve", *arguments]
    runpy.run_module("local_rerank", run_name="__main__", alter_sys=True)


def ask_for(seconds: float, server: Address, requests: list[bytes], num_clients: int) -> Told:
    """Keep `num_clients` requests in flight, each on a connection of its own; read the answers, and parse none."""
    process = psutil.Process(server.pid)
    waiting = selectors.DefaultSelector()
    answers: list[Answer] = []
    marks: list[Mark] = []
    count = 0

    def send(connection: socket.socket) -> list[Any]:
        nonlocal count
        number, count = count % len(requests), count + 1
        sent = time.monotonic()
        connection.sendall(requests[number])
        return [number, sent, b"", 0]  # what came so far, and how long the answer is

    for _ in range(num_clients):
        connection = socket.create_connection((server.host, server.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        waiting.register(connection, selectors.EVENT_READ, send(connection))
    start = time.monotonic()
    open_connections = num_clients
    while open_connections:
        for key, _ in waiting.select():
            connection, state = key.fileobj, key.data
            assert isinstance(connection, socket.socket)
            received = connection.recv(1 << 20)
            if not received:
                raise SystemExit("the server closed a connection")
            state[2] += received
            if not state[3] and (found := LENGTH.search(state[2])):
                state[3] = state[2].index(b"\r\n\r\n") + 4 + int(found[1])
            if state[3] and len(state[2]) >= state[3]:
                now = time.monotonic()
                answers.append((state[0], state[1], now, state[2]))
                if now - start > (WARM_UP_SECONDS, WARM_UP_SECONDS + seconds, math.inf)[len(marks)]:
                    marks.append((now, sum(process.cpu_times()[:2]), len(answers)))
                if len(marks) == 2:
                    waiting.unregister(connection)
                    open_connections -= 1
                else:
                    state[:] = send(connection)
    return marks, answers


class Texts:
    """Makes requests with documents of a length in tokens, and the scores that the device gives them."""

    def __init__(self, tokenizer_json: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        vocabulary = self.tokenizer.get_vocab()
        words = sorted((rank, word[1:]) for word, rank in vocabulary.items() if re.fullmatch("Ġ[a-z]{2,12}", word))
        self.words = [word for _, word in words]
        self.weights = [1 / (rank + 10) for rank in range(len(words))]  # as often as words of a language

    def text(self, draw: random.Random, num_tokens: int) -> str:
        words = draw.choices(self.words, self.weights, k=num_tokens)
        for place in range(0, num_tokens, 9):  # a name that is not in the vocabulary
            words[place] = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=7)).capitalize() + ","
        text = " ".join(words)
        offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return text[: offsets[num_tokens - 1][1]]

    def requests(self, load: Load) -> tuple[list[bytes], list[list[float]], int]:
        """Requests as bytes, log-odds by request and document, and tokens of the longest request."""
        from tests.reference import prompt_ids

        draw = random.Random(load.documents * load.tokens)
        requests, expected, longest = [], [], 0
        for _ in range(NUM_BODIES):
            query = self.text(draw, 10)
            documents = [self.text(draw, load.tokens) for _ in range(load.documents)]
            body = json.dumps({"query": query, "documents": documents}).encode()
            head = f"POST /v1/local/rank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
Content-Length: {len(body)}\r\n\r\n"
            requests.append(head.encode() + body)
            prompts = [np.asarray(prompt_ids(self.tokenizer, query, document)) for document in documents]
            expected.append([float(score_of(weighted(ids, np.arange(len(ids))).sum())) for ids in prompts])
            prefix = len(prompts[0]) - load.tokens - 9
            longest = max(longest, prefix + sum(len(ids) - prefix for ids in prompts))
        return requests, expected, longest


def check(expected: list[list[float]], answers: list[Answer]) -> None:
    """Raise SystemExit unless every answer has the score of each of its documents."""
    for number, _, _, answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"{head.decode()}\n{body.decode()}")
        results = {item["index"]: item["log_odds"] for item in json.loads(body)["results"]}
        if len(results) != len(expected[number]) or any(
            abs(results[index] - score) > 1e-9 for index, score in enumerate(expected[number])
        ):
            raise SystemExit(f"request {number} has other scores than its texts")


@dataclass(frozen=True)
class Running:
    address: Address
    busy_log: Path

    def measure(self, load: Load, requests: list[bytes], seconds: float, folder: Path) -> tuple[Figures, list[Answer]]:
        job, result = folder / "job", folder / "result"
        job.write_bytes(pickle.dumps((seconds, self.address, requests, load.clients)))
        subprocess.run([sys.executable, "-m", "benchmarks.host_path", "--client", str(job), str(result)], check=True)
        ((start, cpu, first), (end, cpu_at_end, last)), answers = pickle.loads(result.read_bytes())
        latencies = sorted(1e3 * (answered - sent) for _, sent, answered, _ in answers[first:last])
        num_pairs = (last - first) * load.documents
        figures = Figures(
            pairs_per_second=num_pairs / (end - start),
            p50_ms=statistics.median(latencies),
            p99_ms=latencies[int(0.99 * len(latencies))],
            cpu_seconds=1e3 * (cpu_at_end - cpu) / num_pairs,
            busy=self._busy(start, end),
        )
        return figures, answers

    def _busy(self, start: float, end: float) -> float:
        times = [tuple(map(float, line.split())) for line in self.busy_log.read_text().splitlines()]
        return sum(max(0.0, min(end, until) - max(start, since)) for since, until in times) / (end - start)


@contextmanager
def running(tree: Path, rate: float, checkpoint: Path, folder: Path) -> Iterator[Running]:
    busy_log, log = folder / f"busy-{tree.name}", folder / f"log-{tree.name}"
    options = ["--model", str(checkpoint), "--device", "cpu", "--dtype", "fp32", "--no-self-test", "--port", "0"]
    options += ["--max-batch-tokens", str(MAX_BATCH_TOKENS)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(rate), str(busy_log), *options],
            stdout=output, stderr=subprocess.STDOUT, cwd=folder,
            env=os.environ | {"PYTHONPATH": f"{tree}:{tree / 'server'}", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        while "ready: " not in (said := log.read_text(encoding="utf-8")):
            if process.poll() is not None:
                raise SystemExit(said)
            time.sleep(0.1)
        host, port = re.findall(r"listening on http://(\S+):(\d+),", said)[0]
        yield Running(Address(host, int(port), process.pid), busy_log)
    finally:
        process.kill()
        process.wait()


def compare(options: argparse.Namespace, folder: Path) -> str:
    from tests.tiny_checkpoints import make_checkpoint, qwen_tokenizer_json

    checkpoint = make_checkpoint(folder / "tiny", tokenizer_json=qwen_tokenizer_json())
    texts = Texts((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    requests = functools.cache(texts.requests)
    trees = {"after": Path(__file__).resolve().parents[1]}
    if options.before is not None:
        trees = {"before": options.before.resolve(), **trees}
    ratios: list[str] = []
    for rate in options.rates:
        with ExitStack() as stack:
            servers = [stack.enter_context(running(tree, rate, checkpoint, folder)) for tree in trees.values()]
            for load in LOADS.get(rate, LOADS_AT_A_RATE):
                bodies, expected, request_tokens = requests(load)
                rounds: dict[str, list[Figures]] = {name: [] for name in trees}
                for _ in range(options.rounds):
                    for name, server in zip(trees, servers, strict=True):
                        figures, answers = server.measure(load, bodies, options.seconds, folder)
                        check(expected, answers)
                        rounds[name].append(figures)
                for name, each in rounds.items():
                    print(_line(name, rate, load, each, request_tokens), flush=True)
                if not rate and "before" in rounds:
                    pairs = ((a.pairs_per_second / b.pairs_per_second) for b, a in zip(*rounds.values(), strict=True))
                    ratios.append(f"{load} {statistics.median(pairs):.1f}x")
    return f"host_path: {', '.join(ratios)}"


def _line(name: str, rate: float, load: Load, rounds: list[Figures], request_tokens: int) -> str:
    def middle(field: str) -> float:
        return statistics.median(getattr(each, field) for each in rounds)

    line = (
        f"{name:6} rate {rate:,.0f}, {load.clients} clients x {load}: {middle('pairs_per_second'):,.0f} pairs/s, "
        f"p50 {middle('p50_ms'):.1f} ms, p99 {middle('p99_ms'):.1f} ms, "
        f"{middle('cpu_seconds'):.3f} CPU seconds of the server per 1,000 pairs"
    )
    if not rate:
        return line
    most = 1e3 * (load.clients * request_tokens + 1.5 * MAX_BATCH_TOKENS) / rate
    return f"{line}, device busy {100 * middle('busy'):.1f} %, p99 may be {most:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a worktree of the code to compare with")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0, 530_000], help="tokens/s of the device; 0: it takes no time"
    )
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    with tempfile.TemporaryDirectory() as folder:
        print(compare(parser.parse_args(), Path(folder)))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--serve", rate, busy_log, *arguments]:
            serve(float(rate), Path(busy_log), arguments)
        case ["--client", job, result]:
            Path(result).write_bytes(pickle.dumps(ask_for(*pickle.loads(Path(job).read_bytes()))))
        case _:
            main()
