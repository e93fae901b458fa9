"""Request ids, API keys, body limits, draining, and the access log."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator

import pytest

from tests.server.conftest import HeldRanker, Serve

pytestmark = pytest.mark.anyio
NATIVE = "/api/v1/services/rerank/text-rerank/text-rerank"
COMPATIBLE = "/compatible-api/v1/reranks"
LOCAL = "/v1/local/rank"
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


async def test_every_response_has_a_unique_id(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        answers = [await client.get(path) for path in ("/health", "/docs", "/nothing", NATIVE, "/v1/models")]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(UUID.fullmatch(request_id) for request_id in ids)
    assert len(set(ids)) == len(ids)
    assert answers[3].json()["request_id"] == ids[3]


async def test_only_pages_and_probes_need_no_key(serve: Serve) -> None:
    async with serve(HeldRanker(), api_key=("secret",)) as client:
        open_paths = [path for path in paths(client) if (await client.get(path)).status_code != 401]
    pages = {"/", "/docs", "/openapi.json"}  # which ask for a key themselves
    assert set(open_paths) == pages | {"/health", "/healthz", "/ping", "/ready", "/v1/cluster/auth"}


@pytest.mark.parametrize("path", [NATIVE, COMPATIBLE, LOCAL])
async def test_a_body_over_the_limit_is_refused_without_being_read(path: str, serve: Serve) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async with serve(HeldRanker(), max_body_bytes=100) as client:
        answer = await client.post(path, content=body(), headers={"Content-Length": "101"})
        assert answer.status_code == 413
        assert "at most 100 bytes" in answer.text
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", [NATIVE, COMPATIBLE, LOCAL])
async def test_a_body_in_chunks_is_refused_as_soon_as_it_is_over_the_limit(path: str, serve: Serve) -> None:
    num_sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(100):
            num_sent += 1
            yield b"[" * 60

    async with serve(HeldRanker(), max_body_bytes=100) as client:
        answer = await client.post(path, content=body(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert num_sent <= 3


async def test_a_body_of_exactly_the_limit_is_read(serve: Serve) -> None:
    async with serve(HeldRanker(), max_body_bytes=100) as client:
        answer = await client.post(LOCAL, content=b"{}".ljust(100), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


async def test_while_draining_requests_are_refused_and_health_answers(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        assert "connection" not in (await client.get("/version")).headers
        client.state.drain()  # type: ignore[attr-defined]
        ranked = await client.post(NATIVE, json={})
        ready, health = await client.get("/ready"), await client.get("/health")
    assert (ranked.status_code, ranked.json()["code"]) == (503, "ModelUnavailable")
    assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
    assert health.status_code == 200
    assert {answer.headers["connection"] for answer in (ranked, ready, health)} == {"close"}


async def test_a_root_path_is_optional_in_requests(serve: Serve) -> None:
    async with serve(HeldRanker(), root_path="/rerank", api_key=("secret",)) as client:
        for prefix in ("", "/rerank"):
            assert (await client.get(f"{prefix}/health")).status_code == 200
            refused = await client.post(prefix + NATIVE)
            assert (refused.status_code, list(refused.json())) == (401, ["code", "message", "request_id"])
        assert (await client.get("/rerankhealth", headers={"Authorization": "Bearer secret"})).status_code == 404


async def test_the_access_log_has_one_line_per_request_without_its_texts(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serve(HeldRanker()) as client:
        answer = await client.post(NATIVE + "%0Aforged line", json={"model": "a secret", "input": "a secret"})
        await client.get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "local_rerank_server.middleware"]
    assert len(lines) == 1
    assert lines[0].startswith(f"POST {NATIVE}\\nforged line 404 ")
    assert lines[0].endswith(f"id={answer.headers['x-request-id']}")
    assert "secret" not in caplog.text


async def test_the_access_log_has_key_error_and_id(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serve(HeldRanker(), api_key=("anna:a",)) as client:
        answer = await client.post(LOCAL, json={}, headers={"Authorization": "Bearer a"})
    (record,) = [record for record in caplog.records if record.name == "local_rerank_server.middleware"]
    request_id = answer.headers["x-request-id"]
    assert record.getMessage().endswith(f" ms key=anna error=MissingField id={request_id}")
    fields = record.__dict__
    assert (fields["request_id"], fields["status"], fields["key"], fields["error"]) == (
        request_id, 400, "anna", "MissingField",
    )  # fmt: skip


def paths(client: object) -> list[str]:
    documented = client._transport.app.openapi()["paths"]  # type: ignore[attr-defined]
    return [path for path, methods in documented.items() if "get" in methods]
