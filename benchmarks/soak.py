"""Check that answers stay correct and memory stays flat under long, hostile and excessive load.

The last line of each command fits docs/log.md:

    python -m benchmarks.soak mixed --minutes 22       # mixed traffic on the built-in model: slope of resident memory
    python -m benchmarks.soak overload --seconds 60    # ten times what a slowed engine can do
    python -m benchmarks.soak fuzz                     # 5,000 schemathesis cases and 20,000 hypothesis bodies
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
from httpx2 import AsyncClient, HTTPError

from local_rerank import Reranker
from tests.server.load import PATH, Case, Tally, all_at_once, ask, make_cases, make_client, offer, text
from tests.serving import Server, options, started, until
from tests.tiny_checkpoints import make_checkpoint

WARM_UP_SECONDS = 300  # during which memory is not counted
SAMPLE_SECONDS = 5
MIB = 1 << 20


def slope(samples: list[tuple[float, float]]) -> float:
    """Return the least-squares slope of (seconds, MiB) samples in MiB per minute."""
    return statistics.linear_regression(*zip(*samples, strict=True)).slope * 60


async def mixed(address: str, process: psutil.Process, cases: list[Case], minutes: float) -> None:
    """Run several kinds of traffic at the same time and sample memory every five seconds."""
    tally, others, samples = Tally(), Counter[str](), list[tuple[float, float]]()
    begin, end = time.monotonic(), time.monotonic() + 60 * minutes

    async def forever(what: Callable[[AsyncClient, random.Random], Awaitable[None]], pause: float, seed: int) -> None:
        generator = random.Random(seed)
        async with make_client(address) as client:
            while time.monotonic() < end:
                await what(client, generator)
                await asyncio.sleep(pause * 2 * generator.random())

    async def right(client: AsyncClient, generator: random.Random) -> None:
        await ask(client, generator.choice(cases), tally)

    async def large(client: AsyncClient, generator: random.Random) -> None:
        documents = [text(generator, 60) for _ in range(generator.randint(20, 120))]
        answer = await client.post(PATH, json={"query": text(generator, 8), "documents": documents})
        others[f"large {answer.status_code}"] += 1

    async def wrong(client: AsyncClient, generator: random.Random) -> None:
        bodies = [b"{", b"[" * 5000, b'{"query":1}', b"\xff", json.dumps({"query": "q", "documents": [7]}).encode()]
        answer = await client.post(PATH, content=generator.choice(bodies), headers={"Content-Type": "application/json"})
        others[f"wrong {answer.status_code}"] += 1

    async def too_late(client: AsyncClient, generator: random.Random) -> None:
        await ask(client, generator.choice(cases), late, **{"X-Request-Timeout-Ms": str(generator.choice([1, 5, 50]))})

    async def leaving(client: AsyncClient, generator: random.Random) -> None:
        try:
            await client.post(PATH, json=generator.choice(cases).body, timeout=generator.choice([0.001, 0.01, 0.05]))
        except HTTPError:
            others["left"] += 1

    async def cut(_: AsyncClient, generator: random.Random) -> None:
        host, port = address.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        raw = json.dumps(generator.choice(cases).body).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
        writer.write((head + raw)[: generator.randrange(len(head + raw) + 1)])
        await writer.drain()
        writer.transport.abort()
        others["cut"] += 1

    async def watching(client: AsyncClient, _: random.Random) -> None:
        for path in ("/metrics", "/health", "/ready", "/limits", "/v1/models", "/docs"):
            others[f"{path} {(await client.get(path)).status_code}"] += 1

    async def sampling(_: AsyncClient, __: random.Random) -> None:
        samples.append((time.monotonic() - begin, process.memory_info().rss / MIB))
        if len(samples) % 12 == 0:
            print(
                f"{samples[-1][0]:.0f} s: {samples[-1][1]:.1f} MiB, {sum(tally.statuses.values())} scored", flush=True
            )

    late = Tally()
    often = [(wrong, 0.5), (too_late, 0.5), (leaving, 0.5), (cut, 0.5)]
    kinds = [(right, 0.2)] * 4 + [(large, 3.0), *often, (watching, 10)]
    async with asyncio.TaskGroup() as group:
        for seed, (what, pause) in enumerate(kinds):
            group.create_task(forever(what, pause, seed))
        group.create_task(forever(sampling, SAMPLE_SECONDS / 2, 99))
    counted = [sample for sample in samples if sample[0] >= min(WARM_UP_SECONDS, 30 * minutes)]
    print(f"answers {dict(tally.statuses)}, with short deadlines {dict(late.statuses)}, others {dict(others)}")
    print(
        f"soak of {minutes:g} minutes: {len(tally.wrong) + len(late.wrong)} wrong, {len(tally.lost)} lost; "
        f"resident memory {counted[0][1]:.1f} MiB after the warm-up, {counted[-1][1]:.1f} at the end, "
        f"slope {slope(counted):+.3f} MiB per minute"
    )


def run_mixed(minutes: float, folder: Path) -> None:
    with Reranker(device="cpu", dtype="fp32", threads=1) as reranker:
        cases = make_cases(reranker, 100)
    arguments = ["local_rerank", "serve", "--port", "0", "--device", "cpu", "--threads", "1", "--log-level", "warning"]
    with started(folder / "log", *arguments) as server:
        server.wait_for("ready: ")
        asyncio.run(mixed(server.address, psutil.Process(server.process.pid), cases, minutes))
        report_end(server)


def run_overload(seconds: float, folder: Path) -> None:
    """Offer 200 requests per second to a server slowed down to less than 20."""
    checkpoint = make_checkpoint(folder / "tiny")
    with Reranker(str(checkpoint), device="cpu", dtype="fp32", threads=1) as reranker:
        cases = make_cases(reranker, 100)
    arguments = ["tests.server.slow_server", "150", *options(checkpoint), "--port", "0", "--max-queued-tokens", "20000"]
    with started(folder / "log", *arguments, "--log-level", "error") as server:
        server.wait_for("ready: ")
        process = psutil.Process(server.process.pid)
        asyncio.run(offer(server.address, cases, per_second=200, seconds=5))  # warm-up, so that memory is comparable
        capacity = asyncio.run(all_at_once(server.address, cases, 30))
        before = process.memory_info().rss / MIB
        over = time.monotonic() + seconds  # when the last request is sent
        tally = asyncio.run(offer(server.address, cases, per_second=200, seconds=seconds))
        after = process.memory_info().rss / MIB
        drained = time.monotonic() - over
        quiet = asyncio.run(all_at_once(server.address, cases, 30))
        report_end(server)
    served = tally.statuses[200] / seconds
    print(
        f"overload for {seconds:g} s, 200 requests a second offered, {served:.1f} served ({200 / served:.1f} times): "
        f"{dict(tally.statuses)}, "
        f"{len(tally.wrong)} wrong, {len(tally.lost)} lost; "
        f"retry-after {min(tally.retry_after)}-{max(tally.retry_after)} s; memory {before:.1f} -> {after:.1f} MiB; "
        f"the last answer came {drained:.1f} s after the last request; 30 requests at once: before "
        f"{max(capacity.seconds):.2f} s, then {max(quiet.seconds):.2f} s, all 200: {quiet.statuses[200] == 30}"
    )


def run_fuzz(num_bodies: int, num_cases: int, seed: int) -> None:
    """Run the fuzz tests with more examples."""
    test = ["-m", "pytest", "-q", "-s", "tests/server/test_fuzz.py", "--num-bodies", str(num_bodies)]
    test += ["--num-cases", str(num_cases), "--fuzz-seed", str(seed), "--fuzz-phases", "examples,coverage,fuzzing"]
    subprocess.run([sys.executable, *test], check=True)


def report_end(server: Server) -> None:
    status = server.stop()
    until(lambda: server.process.poll() is not None)
    noise = [line for line in server.output.splitlines() if " ERROR " in line or "Traceback" in line]
    print(f"exit status {status}, {len(noise)} errors in the log {noise[:3]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mixed", "overload", "fuzz"])
    parser.add_argument("--minutes", type=float, default=22)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--num-bodies", type=int, default=20_000)
    parser.add_argument("--num-cases", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=1, help="of fuzz, to split a long run")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        match chosen.what:
            case "mixed":
                run_mixed(chosen.minutes, Path(folder))
            case "overload":
                run_overload(chosen.seconds, Path(folder))
            case "fuzz":
                run_fuzz(chosen.num_bodies, chosen.num_cases, chosen.seed)


if __name__ == "__main__":
    main()
