"""Sends load to a running server and checks every score; used by tests and by `benchmarks/soak.py`."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from httpx2 import AsyncClient, HTTPError, Limits, Timeout

from local_rerank import Reranker

PATH = "/v1/local/rank"
TOLERANCE = 1e-5  # of fp32 log-odds, relative above 1: batching changes the order of sums
WORDS = "river bank loan music stone cloud engine paper 模型 排序 garden law fever orbit salt theory 😀 é".split()


@dataclass(frozen=True)
class Case:
    """A request and the log-odds of each of its documents when ranked alone."""

    body: dict[str, Any]
    log_odds: tuple[float, ...]


@dataclass
class Tally:
    """The outcomes of many requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # responses with an unexpected score
    lost: list[str] = field(default_factory=list)  # requests without a response
    retry_after: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of those answered with 200


def text(generator: random.Random, most: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(1, most)))


def make_cases(reranker: Reranker, count: int, *, documents: int = 4, words: int = 8, seed: int = 0) -> list[Case]:
    generator = random.Random(seed)
    cases = []
    for _ in range(count):
        query = text(generator, 4)
        texts = [text(generator, words) for _ in range(generator.randint(1, documents))]
        alone = tuple(reranker.rank(query, [one])[0].log_odds for one in texts)
        cases.append(Case({"query": query, "documents": texts}, alone))
    return cases


def fault_of(case: Case, answer: dict[str, Any]) -> str | None:
    """Describes an unexpected score in a response; None if all are right."""
    found = {item["index"]: item["log_odds"] for item in answer["results"]}
    if sorted(found) != list(range(len(case.log_odds))):
        return f"indices {sorted(found)} for {len(case.log_odds)} documents"
    for index, expected in enumerate(case.log_odds):
        if abs(found[index] - expected) > TOLERANCE * max(1.0, abs(expected)):
            return f"document {index} has {found[index]}, alone {expected}"
    return None


async def ask(client: AsyncClient, case: Case, tally: Tally, **headers: str) -> None:
    started = time.perf_counter()
    try:
        answer = await client.post(PATH, json=case.body, headers=headers)
    except HTTPError as error:
        tally.lost.append(f"{type(error).__name__}: {error}")
        return
    tally.statuses[answer.status_code] += 1
    if answer.status_code == 429:
        tally.retry_after.append(int(answer.headers["retry-after"]))
    if answer.status_code == 200:
        tally.seconds.append(time.perf_counter() - started)
        if fault := fault_of(case, answer.json()):
            tally.wrong.append(fault)


def make_client(address: str, *, timeout: float = 120, connections: int | None = None) -> AsyncClient:
    limits = Limits(max_connections=connections, max_keepalive_connections=connections)
    return AsyncClient(base_url=address, timeout=Timeout(timeout), limits=limits)


async def offer(address: str, cases: list[Case], *, per_second: float, seconds: float) -> Tally:
    """Send requests at a fixed rate, and wait for every response."""
    tally, generator = Tally(), random.Random(1)
    async with make_client(address, connections=400) as client, asyncio.TaskGroup() as group:
        started = time.perf_counter()
        for number in range(round(per_second * seconds)):
            await asyncio.sleep(max(0.0, started + number / per_second - time.perf_counter()))
            group.create_task(ask(client, generator.choice(cases), tally))
    return tally


async def all_at_once(address: str, cases: list[Case], count: int) -> Tally:
    """Send `count` requests concurrently, each on its own connection."""
    tally = Tally()
    async with make_client(address, connections=count) as client, asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(ask(client, cases[number % len(cases)], tally))
    return tally
