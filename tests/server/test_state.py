"""Deadlines, tokenization, and model names."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import pytest
from starlette.requests import Request

from local_rerank import EngineConfig, RerankRequest, RerankResult
from local_rerank.config import DType
from local_rerank.errors import DeadlineExceeded
from local_rerank_server.config import ServerConfig
from local_rerank_server.errors import InvalidField, UnknownModel
from local_rerank_server.state import LONG_CHARS, TOKENIZER_THREADS, ServerState
from tests.server.conftest import HeldRanker, until

pytestmark = pytest.mark.anyio
REQUEST = RerankRequest(query="q", documents=("d",))


def state_over(ranker: Any, **options: Any) -> ServerState:
    state = ServerState(ServerConfig(**options))
    state.serve(ranker)
    return state


def http_request(**headers: str) -> Request:
    """A request whose client stays connected."""

    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request(
        {"type": "http", "headers": raw, "state": {"request_id": "the-id", "num_documents": 0, "results": []}}, receive
    )


async def test_the_header_lowers_the_deadline_and_cannot_raise_it() -> None:
    state = state_over(HeldRanker(), request_timeout_ms=50)
    with pytest.raises(DeadlineExceeded, match="within 20 ms"):
        await state.rank(http_request(x_request_timeout_ms="20"), REQUEST)
    with pytest.raises(DeadlineExceeded, match="within 50 ms"):
        await asyncio.wait_for(state.rank(http_request(x_request_timeout_ms="1e9"), REQUEST), 5)


@pytest.mark.parametrize("dtype", ["auto", "int8"])
async def test_c17_a_timeout_names_the_measured_rate_and_what_to_change(dtype: DType) -> None:
    ranker = HeldRanker()
    ranker.tokens_per_second, ranker.config = 1234.5, EngineConfig(dtype=dtype)
    state = state_over(ranker, request_timeout_ms=20)
    with pytest.raises(DeadlineExceeded) as caught:
        await state.rank(http_request(), REQUEST)
    message = str(caught.value)
    assert "documents: 1, measured rate: 1,234 tokens per second. Send" in message
    assert "fewer or shorter documents, raise --request-timeout-ms, or serve with" in message
    assert ("--dtype int8" in message) is (dtype != "int8")
    assert "a smaller model" in message
    with pytest.raises(
        DeadlineExceeded, match=r"raise the header x-request-timeout-ms \(the server's --request.* 20\)"
    ):
        await state.rank(http_request(x_request_timeout_ms="10"), REQUEST)


@pytest.mark.parametrize("is_partial", [False, True])
async def test_a_timeout_while_the_model_is_loaded_again_says_so(is_partial: bool) -> None:
    """Also if the load ends between the deadline and the time until which a partial result is awaited."""
    ranker = HeldRanker(DeadlineExceeded(timeout_ms=1))
    state = state_over(ranker, request_timeout_ms=50)
    model = state.default
    model.is_leaving, model.num_users = True, 1  # another request uses it
    headers = {"x_on_deadline": "partial"} if is_partial else {}
    answer = asyncio.ensure_future(state.rank(http_request(**headers), REQUEST))
    await until(lambda: model.loads)
    if is_partial:
        await asyncio.sleep(0.06)
        model.num_users += 1
        model.loads[0].set_result(ranker)
    with pytest.raises(DeadlineExceeded, match=r"within 50 ms; .*model held was still loading"):
        await answer


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", ""])
async def test_an_invalid_deadline_is_refused(value: str) -> None:
    with pytest.raises(InvalidField, match="x-request-timeout-ms"):
        await state_over(HeldRanker()).rank(http_request(x_request_timeout_ms=value), REQUEST)


async def test_work_is_cancelled_if_tokenization_ends_after_the_deadline() -> None:
    tokenizing, go_on = threading.Event(), threading.Event()

    class Slow(HeldRanker):
        def submit(self, request: RerankRequest, **options: Any) -> Future[RerankResult]:
            tokenizing.set()
            go_on.wait(5)
            return super().submit(request, **options)

    ranker = Slow()
    with pytest.raises(DeadlineExceeded):
        await state_over(ranker, request_timeout_ms=30).rank(http_request(), REQUEST)
    assert tokenizing.is_set()
    go_on.set()
    await until(lambda: ranker.futures and ranker.futures[0].cancelled())


async def test_long_requests_do_not_delay_the_tokenization_of_short_ones() -> None:
    go_on = threading.Event()

    class SlowWithLong(HeldRanker):
        def submit(self, request: RerankRequest, **options: Any) -> Future[RerankResult]:
            assert len(request.documents[0]) < 10 or go_on.wait(5)
            return super().submit(request, **options)

    ranker = SlowWithLong()
    state = state_over(ranker)
    long = RerankRequest(query="q", documents=("d" * LONG_CHARS,))
    answers = [asyncio.create_task(state.rank(http_request(), long)) for _ in range(2 * TOKENIZER_THREADS)]
    answers.append(asyncio.create_task(state.rank(http_request(), REQUEST)))
    await until(lambda: ranker.futures)
    assert len(ranker.futures) == 1, "the short one"
    go_on.set()
    await until(lambda: len(ranker.futures) == len(answers))
    for answer in answers:
        answer.cancel()
    await asyncio.gather(*answers, return_exceptions=True)


async def test_model_names_are_checked_if_dialect_or_option_is_strict() -> None:
    lenient, strict = state_over(HeldRanker()), state_over(HeldRanker(), strict_models=True)
    for name in ("held", "qwen3-rerank", "gte-rerank-v2", "gte-rerank", "qwen3.7-text-rerank"):
        lenient.check_model(name, strict=True)
    lenient.check_model("rerank-v3.5", strict=False)
    for either in (lenient, strict):
        either.check_model(None, strict=False)
    for state, demanded in ((lenient, True), (strict, False)):
        with pytest.raises(UnknownModel, match=r"rerank-v3\.5"):
            state.check_model("rerank-v3.5", strict=demanded)
