"""The status of an answer: in the headers of every dialect, our own body, the access log and the metrics.

An order that stays as it was, equal scores and missing scores never look like a ranking.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from local_rerank import Reranker
from local_rerank.requests.pair import Pair
from tests.server.conftest import Serve, message_of
from tests.server.test_metrics import samples
from tests.serving import NATIVE

pytestmark = pytest.mark.anyio

LOCAL, LOGGER = "/v1/local/rank", "local_rerank_server.middleware"
TEXTS = [f"document {number} " + "x" * 20 for number in range(8)]
BODIES: dict[str, dict[str, Any]] = {
    LOCAL: {"query": "q", "documents": TEXTS},
    NATIVE: {"model": "qwen3-rerank", "input": {"query": "q", "documents": TEXTS}},
    "/v2/rerank": {"model": "m", "query": "q", "documents": TEXTS},
    "/score": {"model": "m", "queries": "q", "documents": TEXTS},
    "/v1/inference/m": {"queries": ["q"], "documents": TEXTS},
}


class Gate:
    """Lets the engine score `num_free` batches; the next one waits until the block ends."""

    def __init__(self, reranker: Reranker, monkeypatch: pytest.MonkeyPatch, num_free: int) -> None:
        self.num_free, self.opened, score = num_free, threading.Event(), reranker.engine.score

        def held(pairs: Sequence[Pair]) -> list[float]:
            self.num_free -= 1
            assert self.num_free >= 0 or self.opened.wait(30)
            return score(pairs)

        monkeypatch.setattr(reranker.engine, "score", held)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.opened.set()


@pytest.fixture(scope="module")
def small(tiny_reranker: Reranker) -> Iterator[Reranker]:
    """With batches that hold two documents of a request."""
    num_tokens = len(tiny_reranker.explain("q", TEXTS[0])[1])
    with Reranker(config=replace(tiny_reranker.config, max_batch_tokens=num_tokens + 100)) as reranker:
        yield reranker


async def test_equal_scores_are_reported_everywhere_and_keep_the_order(
    serve: Serve, tiny_reranker: Reranker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tiny_reranker.engine, "score", lambda pairs: [0.5] * len(pairs))
    monkeypatch.setattr(Reranker, "model_id", "模型 7%")
    async with serve(tiny_reranker, cors_origins=("http://page",)) as client:
        for path, body in BODIES.items():
            answer = await client.post(path, json=body, headers={"Origin": "http://page"})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-rerank-status"] == "constant", path
            assert answer.headers["x-rerank-model"] == "%E6%A8%A1%E5%9E%8B 7%"
            assert {"x-rerank-status", "x-rerank-model"} <= set(
                answer.headers["access-control-expose-headers"].lower().split(", ")
            )
        cut = await client.post(
            LOCAL, json=BODIES[LOCAL] | {"max_document_tokens": 9, "max_query_tokens": 1, "top_n": 1}
        )
        alone = await client.post(LOCAL, json={"query": "q", "documents": ["one"]})
        page = (await client.get("/metrics")).text
    body = cut.json()
    assert (body["status"], body["model"], body["is_constant"]) == ("truncated=8; constant", "模型 7%", True)
    assert [item["index"] for item in body["results"]] == [0]
    assert (alone.headers["x-rerank-status"], alone.json()["status"]) == ("ok", "ok")
    lines = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert [" rerank_status='constant' id=" in line for line in lines[:5]] == [True] * 5
    assert " rerank_status='truncated=8; constant' id=" in lines[5]
    assert "rerank_status" not in lines[6]
    counts = {
        kind: samples(page)[
            "local_rerank_results_total", frozenset({("model", tiny_reranker.model_id), ("status", kind)})
        ]
        for kind in KINDS
    }
    assert counts == {"ok": 1, "truncated": 1, "constant": 6, "partial": 0, "below": 0}


KINDS = ("ok", "truncated", "partial", "below", "constant")


@pytest.mark.parametrize("path", [LOCAL, NATIVE, "/v2/rerank", "/score"])
async def test_at_the_deadline_what_is_scored_is_ranked_and_the_rest_is_left_out(
    path: str, serve: Serve, small: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = {"x-request-timeout-ms": "600"}
    body = BODIES[path] | ({"on_deadline": "partial"} if path == LOCAL else {})
    headers = sent if path == LOCAL else sent | {"x-on-deadline": "Partial"}
    async with serve(small) as client:
        with Gate(small, monkeypatch, 1):
            answer = await client.post(path, json=body, headers=headers)
            assert small.num_queued_tokens == 0
        whole = (await client.post(path, json=BODIES[path])).json()
    assert answer.status_code == 200, answer.text
    found, all_ = indices(answer.json()), indices(whole)
    assert 0 < len(found) < len(all_) == len(TEXTS)
    assert found == [index for index in all_ if index in found], "in the order of the whole ranking"
    assert answer.headers["x-rerank-status"] == f"partial={len(TEXTS) - len(found)}"
    if path == LOCAL:
        assert answer.json()["status"] == answer.headers["x-rerank-status"]
        assert answer.json()["not_scored"] == [index for index in range(len(TEXTS)) if index not in found]


def indices(body: dict[str, Any]) -> list[int]:
    items = body.get("results") or body.get("data") or body["output"]["results"]
    return [item["index"] for item in items]


@pytest.mark.parametrize(
    ("path", "headers", "num_free", "status", "message"),
    [
        (LOCAL, {}, 1, 504, "not answered within 100 ms; documents: 8"),
        ("/score", {}, 1, 504, "not answered within 100 ms; documents: 1"),  # one of two queries was ranked
        ("/v2/rerank", {"x-on-deadline": "error"}, 1, 504, "not answered within 100 ms; documents: 8"),
        ("/v2/rerank", {"x-on-deadline": "partial"}, 0, 504, "100 ms; no document was scored by then; documents: 8"),
        ("/v2/rerank", {"x-on-deadline": "all"}, 9, 400, "x-on-deadline: one of error, partial is expected, not all"),
        ("/v1/inference/m", {"x-on-deadline": "partial"}, 9, 400, "partial has no place here, where each document has"),
    ],
)
async def test_without_a_partial_result_a_deadline_is_an_error(
    path: str, headers: dict[str, str], num_free: int, status: int, message: str,
    serve: Serve, small: Reranker, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    async with serve(small) as client:
        with Gate(small, monkeypatch, num_free):
            body = {"queries": ["q", "r"], "documents": TEXTS[:2]} if path == "/score" else BODIES[path]
            answer = await client.post(path, json=body, headers=headers | {"x-request-timeout-ms": "100"})
    assert (answer.status_code, message in message_of(answer.json())) == (status, True), answer.text
    assert "x-rerank-status" not in answer.headers
