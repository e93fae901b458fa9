"""`stream: true` on our own route: lines as documents are scored, then the ranking."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from local_rerank import RankedDocument, Reranker, RerankResult
from local_rerank.errors import EngineFailure
from tests.server.conftest import HeldRanker, Serve, until
from tests.server.test_metrics import samples

pytestmark = pytest.mark.anyio

LOCAL = "/v1/local/rank"
BODY: dict[str, Any] = {"query": "capital", "documents": ["Rome", "Paris is a city", "Rome"], "stream": True}


class Exchange:
    """A request whose response is seen message by message, and whose client can leave."""

    def __init__(self, app: Any, body: dict[str, Any]) -> None:
        self.messages: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        scope = {"type": "http", "method": "POST", "path": LOCAL, "query_string": b"", "headers": [], "client": None}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if (body := self._body) is not None:
            self._body = None
            return {"type": "http.request", "body": body}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    @property
    def lines(self) -> list[dict[str, Any]]:
        text = b"".join(message.get("body", b"") for message in self.messages)
        return [json.loads(line) for line in text.splitlines()]


def scored(index: int, log_odds: float) -> RankedDocument:
    return RankedDocument(
        index=index, relevance_score=0.5, log_odds=log_odds, document="d", num_tokens=1, num_truncated_tokens=0
    )


async def test_a_stream_has_every_document_and_then_the_usual_body(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker) as client:
        answer = await client.post(LOCAL, json=BODY | {"top_n": 2, "return_documents": False})
        usual = (await client.post(LOCAL, json=BODY | {"stream": False, "top_n": 2, "return_documents": False})).json()
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.headers["x-rerank-model"] == tiny_reranker.model_id
    *items, last = (json.loads(line) for line in answer.text.splitlines())
    assert sorted(item["index"] for item in items) == [0, 1, 2]
    ranked = sorted(items, key=lambda item: (-item["log_odds"], item["index"]))
    assert last["results"] == ranked[:2]
    assert (list(last), last["status"]) == (list(usual), "ok")
    assert list(last["results"][0]) == list(usual["results"][0])


async def test_what_min_score_leaves_out_has_no_line(serve: Serve, tiny_reranker: Reranker) -> None:
    whole = tiny_reranker.rank(BODY["query"], BODY["documents"][:2])
    asked = {"documents": BODY["documents"][:2], "first_stage_scores": [1, 2]}
    asked["min_score"] = sum(item.relevance_score for item in whole) / 2
    async with serve(tiny_reranker) as client:
        answer = await client.post(LOCAL, json=BODY | asked)
        page = (await client.get("/metrics")).text
    line, last = (json.loads(line) for line in answer.text.splitlines())
    (found,) = last["results"]
    assert found.pop("blended_score") == pytest.approx(2 * (1 if whole[0].index == 1 else 0), abs=1e-6)
    assert line == found, "without the blended score, which all documents make"
    assert (last["status"], last["num_below_min_score"]) == ("below=1", 1)
    assert (
        samples(page)["local_rerank_results_total", frozenset({("model", tiny_reranker.model_id), ("status", "below")})]
        == 1
    )


async def test_a_line_is_sent_before_the_next_document_is_scored(serve: Serve, tiny_reranker: Reranker) -> None:
    ranker = HeldRanker()
    async with serve(ranker) as client:
        exchange = Exchange(client._transport.app, BODY)  # type: ignore[attr-defined]
        await until(lambda: ranker.futures)
        ranker.on_scored([scored(1, 2.0)])
        await until(lambda: len(exchange.lines) == 1)
        assert exchange.lines[0]["index"] == 1
        ranker.on_scored([scored(0, 1.0), scored(2, 1.0)])
        await until(lambda: len(exchange.lines) == 3)
        result: RerankResult = tiny_reranker.rank(BODY["query"], BODY["documents"])
        ranker.futures[0].set_result(result)
        await exchange.task
    assert exchange.lines[3]["status"] == "ok"
    assert exchange.messages[-1].get("more_body", False) is False


async def test_an_error_before_the_first_line_is_an_ordinary_one(serve: Serve) -> None:
    ranker = HeldRanker()
    async with serve(ranker) as client:
        assert (await client.post(LOCAL, json=BODY | {"documents": []})).status_code == 400
        exchange = Exchange(client._transport.app, BODY)  # type: ignore[attr-defined]
        await until(lambda: ranker.futures)
        ranker.futures[0].set_exception(EngineFailure("no"))
        await exchange.task
    assert exchange.messages[0]["status"] == 500
    assert exchange.lines[0]["error"]["type"] == "EngineFailure"


@pytest.mark.parametrize("end", ["failure", "deadline", "stop"])
async def test_an_error_after_the_first_line_is_the_last_line(end: str, serve: Serve) -> None:
    ranker = HeldRanker()
    async with serve(ranker, request_timeout_ms=300 if end == "deadline" else 60_000) as client:
        exchange = Exchange(client._transport.app, BODY)  # type: ignore[attr-defined]
        await until(lambda: ranker.futures)
        ranker.on_scored([scored(1, 2.0)])
        await until(lambda: len(exchange.lines) == 1)
        if end == "failure":
            ranker.futures[0].set_exception(EngineFailure("the model failed"))
        if end == "stop":
            exchange.task.cancel()
        await exchange.task
        page = (await client.get("/metrics")).text
    kind = {"failure": "EngineFailure", "deadline": "DeadlineExceeded", "stop": "ModelUnavailable"}[end]
    assert exchange.messages[0]["status"] == 200
    assert [exchange.lines[1]["error"]["type"], exchange.lines[1]["request_id"] != ""] == [kind, True]
    assert len(exchange.lines) == 2
    assert samples(page)["local_rerank_refusals_total", frozenset({("reason", kind)})] == 1
    await until(lambda: end == "failure" or ranker.futures[0].cancelled())


async def test_a_client_that_leaves_a_stream_frees_the_engine(serve: Serve) -> None:
    ranker = HeldRanker()
    async with serve(ranker) as client:
        exchange = Exchange(client._transport.app, BODY)  # type: ignore[attr-defined]
        await until(lambda: ranker.futures)
        ranker.on_scored([scored(1, 2.0)])
        await until(lambda: len(exchange.lines) == 1)
        exchange.gone.set()
        await exchange.task
        assert client.state.admission.num_requests == 0  # type: ignore[attr-defined]
    await until(lambda: ranker.futures[0].cancelled())
