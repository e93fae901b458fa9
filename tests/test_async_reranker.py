"""`AsyncReranker`: the scores of `Reranker`, shared batches, cancelled calls, errors and closing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from local_rerank import AsyncReranker, Reranker, RerankRequest, RerankResult
from local_rerank.async_reranker import queued
from local_rerank.errors import (
    CheckpointError,
    ConfigError,
    EmptyQuery,
    InvalidRequest,
    ModelUnavailable,
    NoDocuments,
)
from local_rerank.requests.pair import Pair

pytestmark = pytest.mark.anyio
CLOSE = 1e-4  # tolerance of fp32 log-odds in different batches


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Gate:
    """Wraps the engine's `score`: counts the pairs of each batch, and holds it while `open` is not set."""

    def __init__(self, reranker: Reranker) -> None:
        self.num_pairs: list[int] = []
        self.open, self.entered = threading.Event(), threading.Event()
        self._score = reranker.engine.score
        reranker.engine.score = self.score  # type: ignore[method-assign]

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        self.num_pairs.append(len(pairs))
        self.entered.set()
        assert self.open.wait(30)
        return self._score(pairs)


@asynccontextmanager
async def held(checkpoint: Path) -> AsyncIterator[tuple[AsyncReranker, Gate]]:
    """A reranker whose batches wait for the gate and have room for all requests."""
    async with AsyncReranker(str(checkpoint), device="cpu", dtype="fp32", max_batch_tokens=100_000) as reranker:
        gate = Gate(await reranker.load())
        try:
            yield reranker, gate
        finally:
            gate.open.set()


async def until_queued(reranker: AsyncReranker, num_requests: int, gate: Gate) -> None:
    """Wait until a batch runs and `num_requests` are in the queue."""
    loaded = await reranker.load()
    while not gate.num_pairs or loaded.num_queued_requests != num_requests:
        await asyncio.sleep(0.001)


def request(number: int) -> RerankRequest:
    return RerankRequest(query=f"query {number}", documents=(f"one {number}", "two", f"three {number}"))


def log_odds(result: RerankResult) -> dict[int, float]:
    return {item.index: item.log_odds for item in result}


@pytest.fixture(scope="module")
def expected(tiny_reranker: Reranker) -> list[dict[int, float]]:
    return [log_odds(result) for result in tiny_reranker.rank_batch(request(number) for number in range(50))]


async def test_every_call_gives_the_result_of_the_reranker(tiny_checkpoint: Path, tiny_reranker: Reranker) -> None:
    pairs = [("q", "one"), ("q", "two"), ("other", "one"), ("q", "three")]
    async with AsyncReranker(str(tiny_checkpoint), device="cpu", dtype="fp32") as reranker:
        ranked = await reranker.rank("q", ["one", "two", "three"], instruction="judge", top_n=2)
        wanted = tiny_reranker.rank("q", ["one", "two", "three"], instruction="judge", top_n=2)
        assert [(item.index, item.document) for item in ranked] == [(item.index, item.document) for item in wanted]
        assert log_odds(ranked) == pytest.approx(log_odds(wanted), abs=CLOSE)
        assert await reranker.score(pairs) == pytest.approx(tiny_reranker.score(pairs), abs=CLOSE)
        assert await reranker.score(iter(pairs), logits=True) == pytest.approx(
            tiny_reranker.score(pairs, logits=True), abs=CLOSE
        )
        assert (await reranker.load()).model_id == tiny_reranker.model_id
        whole = await reranker.submit(RerankRequest(query="q", documents=("one two",), max_document_tokens=2))
        assert whole.num_truncated_documents == 1
        long = RerankRequest(query="q", documents=("One two. Three. " * 9,), chunk_tokens=50, long_documents="chunk")
        (item,), (same,) = await reranker.submit(replace(long, spans=True)), tiny_reranker.submit(long).result()
        assert (item.best_chunk, item.num_chunks) == (same.best_chunk, same.num_chunks)
        assert item.spans


async def test_concurrent_calls_share_batches(tiny_checkpoint: Path, expected: list[dict[int, float]]) -> None:
    async with held(tiny_checkpoint) as (reranker, gate):
        calls = [asyncio.ensure_future(reranker.submit(request(0)))]
        await until_queued(reranker, 0, gate)
        calls += [asyncio.ensure_future(reranker.submit(request(number))) for number in range(1, 50)]
        await until_queued(reranker, 49, gate)
        gate.open.set()
        results = await asyncio.gather(*calls)
    assert gate.num_pairs == [3, 49 * 3]
    for result, wanted in zip(results, expected, strict=True):
        assert log_odds(result) == pytest.approx(wanted, abs=CLOSE)


async def test_a_cancelled_call_leaves_the_queue(tiny_checkpoint: Path) -> None:
    async with held(tiny_checkpoint) as (reranker, gate):
        first = asyncio.ensure_future(reranker.submit(request(0)))
        await until_queued(reranker, 0, gate)
        long = RerankRequest(query="q", documents=("word " * 400,), long_documents="chunk", chunk_tokens=100)
        second = asyncio.ensure_future(reranker.submit(replace(long, chunk_overlap_tokens=50)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await reranker.submit(request(2))
        await until_queued(reranker, 1, gate)
        assert (await reranker.load()).num_queued_tokens > 3000, "2,000 tokens in chunks that overlap by half"
        second.cancel()
        await until_queued(reranker, 0, gate)
        gate.open.set()
        await first
        await reranker.submit(request(3))
        with pytest.raises(asyncio.CancelledError):
            await second
    assert gate.num_pairs == [3, 3]  # of the first and the last


async def test_a_call_cancelled_during_tokenization_leaves_nothing_in_the_queue() -> None:
    tokenized, go_on = threading.Event(), threading.Event()
    answer: Future[RerankResult] = Future()

    def submit() -> Future[RerankResult]:
        tokenized.set()
        assert go_on.wait(30)
        return answer

    with ThreadPoolExecutor(1) as threads:
        call = asyncio.ensure_future(queued(threads, submit))
        await asyncio.to_thread(tokenized.wait, 30)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not answer.cancelled()
        go_on.set()
    assert answer.cancelled()


async def test_rank_batch_keeps_the_order_with_a_small_queue(
    tiny_checkpoint: Path, expected: list[dict[int, float]]
) -> None:
    async def requests() -> AsyncIterator[RerankRequest]:
        for number in range(50):
            yield request(number)

    async with AsyncReranker(str(tiny_checkpoint), device="cpu", dtype="fp32", max_queued_tokens=300) as reranker:
        results = [log_odds(result) async for result in reranker.rank_batch(requests())]
    assert len(results) == 50
    for result, wanted in zip(results, expected, strict=True):
        assert result == pytest.approx(wanted, abs=CLOSE)


async def test_a_cancelled_rank_batch_leaves_nothing_in_the_queue(tiny_checkpoint: Path) -> None:
    async with held(tiny_checkpoint) as (reranker, gate):
        first = asyncio.ensure_future(reranker.submit(request(0)))
        await until_queued(reranker, 0, gate)
        batch = reranker.rank_batch(request(number) for number in range(50))
        taking = asyncio.ensure_future(anext(batch))
        await until_queued(reranker, 50, gate)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        await until_queued(reranker, 0, gate)
        gate.open.set()
        await first
    assert gate.num_pairs == [3]


async def test_an_invalid_request_raises_or_is_returned_and_affects_no_other(
    tiny_checkpoint: Path, expected: list[dict[int, float]]
) -> None:
    long = RerankRequest(query="q", documents=("d",), instruction="word " * 2000)
    async with AsyncReranker(str(tiny_checkpoint), device="cpu", dtype="fp32") as reranker:
        with pytest.raises(EmptyQuery):
            await reranker.rank(" ", ["d"])
        with pytest.raises(NoDocuments):
            await reranker.rank("q", [])
        with pytest.raises(InvalidRequest, match="instruction has"):
            await reranker.submit(long)
        with pytest.raises(InvalidRequest, match="instruction has"):
            [result async for result in reranker.rank_batch([request(0), long, request(1)])]
        outcomes = [
            outcome async for outcome in reranker.rank_batch([request(0), long, request(1)], return_errors=True)
        ]
    assert len(outcomes) == 3
    assert isinstance(outcomes[1], InvalidRequest)
    for number, outcome in ((0, outcomes[0]), (1, outcomes[2])):
        assert isinstance(outcome, RerankResult)
        assert log_odds(outcome) == pytest.approx(expected[number], abs=CLOSE)


async def test_closing_finishes_the_running_batch_and_fails_queued_calls(tiny_checkpoint: Path) -> None:
    async with held(tiny_checkpoint) as (reranker, gate):
        running = asyncio.ensure_future(reranker.submit(request(0)))
        await until_queued(reranker, 0, gate)
        queued_call = asyncio.ensure_future(reranker.submit(request(1)))
        await until_queued(reranker, 1, gate)
        closing = asyncio.ensure_future(reranker.close())
        await asyncio.sleep(0)
        with pytest.raises(ModelUnavailable, match="the reranker is closed"):
            await reranker.submit(request(2))
        gate.open.set()
        await closing
        assert len(await running) == 3
        with pytest.raises(ModelUnavailable, match="the engine is closing"):
            await queued_call
        await reranker.close()  # a second call does nothing


async def test_every_call_raises_the_error_of_loading() -> None:
    with pytest.raises(ConfigError, match="unknown option 'treads'"):
        AsyncReranker(treads=2)
    with pytest.raises(CheckpointError, match=r"'./nowhere' is no folder"):
        async with AsyncReranker("./nowhere"):
            pass
    reranker = AsyncReranker("./nowhere")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"'./nowhere' is no folder"):
            await reranker.rank("q", ["d"])
    await reranker.close()


@pytest.fixture(scope="module", autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())  # other modules may have left some
    yield
    left = set(threading.enumerate()) - before
    assert [thread.name for thread in left if thread.name.startswith("tokenize")] == []
