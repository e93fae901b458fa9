"""Request ids, API keys, body limits, draining, and the access log."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator

import pytest
from starlette.types import ASGIApp, Message
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from local_rerank import Reranker
from local_rerank.errors import ModelUnavailable
from local_rerank_server.dialects import OPEN_PATHS
from tests.server.conftest import HeldRanker, Serve, until
from tests.server.test_config import AWS

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
    probes = {"/health", "/healthz", "/ping", "/ready", "/v1/health/ready", "/v1/health/live"}
    probes |= {"/.well-known/live", "/.well-known/ready", "/meta"}
    assert set(open_paths) == pages | probes | {"/v1/cluster/auth"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "{}"},
        {"Authorization": AWS},
        {"api-key": "{}"},
        {"Api-Key": "{}", "X-Pinecone-Api-Version": "2026-07"},
        {"X-API-KEY": "{}", "Authorization": "Basic YTpi"},
    ],
    ids=lambda headers: " ".join(headers),
)
async def test_every_way_to_send_a_key_opens_every_route_and_no_key_is_logged(
    headers: dict[str, str], serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serve(HeldRanker(), api_key=("sesame",)) as client:
        protected = [("GET", path) for path in paths(client) if path not in OPEN_PATHS] + [("POST", NATIVE)]
        for key, error in (("sesam", "InvalidApiKey"), ("", "MissingApiKey"), ("sesame", None)):
            sent = {name: value.format(key) for name, value in headers.items()}
            for method, path in protected:
                status = (await client.request(method, path, headers=sent)).status_code
                logged = [vars(record)["error"] for record in caplog.records if record.name == LOGGER][-1]
                assert (logged if status == 401 else None) == error, path
    assert "sesam" not in caplog.text


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
    async with serve(HeldRanker(), root_path="/rerank/", api_key=("secret",)) as client:
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
    assert lines[0].startswith(f"127.0.0.1 POST {NATIVE}%0Aforged%20line 404 ")
    assert lines[0].endswith(f"id={answer.headers['x-request-id']}")
    assert "secret" not in caplog.text


async def test_the_access_log_has_key_error_and_id(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serve(HeldRanker(), api_key=("a",)) as client:
        answer = await client.post(LOCAL, json={}, headers={"Authorization": "Bearer a"})
    (record,) = [record for record in caplog.records if record.name == "local_rerank_server.middleware"]
    request_id = answer.headers["x-request-id"]
    assert record.getMessage().endswith(f" dialect='local-rerank' key=key-1 error=MissingField id={request_id}")
    fields = record.__dict__
    assert (fields["request_id"], fields["status"], fields["key"], fields["error"]) == (
        request_id, 400, "key-1", "MissingField",
    )  # fmt: skip


LOGGER = "local_rerank_server.middleware"
BODIES = {
    NATIVE: {"model": "qwen3-rerank", "input": {"query": "q", "documents": ["a", "b"]}},
    COMPATIBLE: {"model": "qwen3-rerank", "query": "q", "documents": ["a", "b"]},
    LOCAL: {"query": "q", "documents": ["a", "b"]},
    "/v2/rerank": {"model": "m", "query": "q", "documents": ["a", "b"]},
    "/v1/rerank": {"model": "m", "query": "q", "documents": ["a", "b"]},
}


async def test_request_ids_of_callers_are_taken_over(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker, max_body_bytes=1000) as client:
        sent = "order 17/" + "x" * 119
        for path, body in BODIES.items():
            for answer in (
                await client.post(path, json=body, headers={"X-Request-ID": sent}),
                await client.post(path, json={}, headers={"X-Request-ID": sent}),
                await client.post(path, content=b" " * 1001, headers={"X-Request-ID": sent}),
                await client.get(path + "/nowhere", headers={"X-Request-ID": sent}),
            ):
                assert answer.headers.get_list("x-request-id") == [sent]
                found = answer.json()
                assert {found[name] for name in ("id", "request_id") if name in found} <= {sent}
        for refused in (sent + "x", "a\tb", "é"):
            answer = await client.post(NATIVE, json=BODIES[NATIVE], headers={"X-Request-ID": refused.encode()})
            assert UUID.fullmatch(answer.headers["x-request-id"])
            assert answer.json()["request_id"] == answer.headers["x-request-id"]


async def test_the_access_log_has_what_a_request_cost(
    serve: Serve, tiny_reranker: Reranker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serve(tiny_reranker) as client:
        for path, body in BODIES.items():
            assert (await client.post(path, json=body)).status_code == 200
    records = [record for record in caplog.records if record.name == LOGGER]
    assert [vars(record)["dialect"] for record in records][:3] == [
        "DashScope native", "DashScope compatible", "local-rerank",
    ]  # fmt: skip
    for record in records:
        line, fields = record.getMessage(), vars(record)
        assert re.search(r" documents=2 tokens=\d+ waiting_ms=\d+\.\d computing_ms=\d+\.\d id=", line), line
        assert (fields["client"], fields["documents"]) == ("127.0.0.1", 2)


async def test_the_access_log_can_be_switched_off(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serve(HeldRanker(), no_access_log=True) as client:
        await client.post(LOCAL, json={})
    assert [record for record in caplog.records if record.name == LOGGER] == []


@pytest.mark.parametrize("path", [*BODIES, "/v1/rerank voyage"])
async def test_b3_a_cancelled_request_gets_the_503_of_its_dialect(path: str, serve: Serve) -> None:
    path, _, other = path.partition(" ")
    body = {"query": "q", "documents": ["a"], "model": "rerank-2.5", "top_k": 1} if other else BODIES[path]
    ranker = HeldRanker()
    async with serve(ranker) as client:
        task = asyncio.create_task(client.post(path, json=body))
        await until(lambda: ranker.futures)
        task.cancel()  # the transport of tests runs the application in the client's task
        answer = await task
    assert (answer.status_code, "was stopped" in answer.text or "ModelUnavailable" in answer.text) == (503, True)
    assert ("detail" in answer.json() and len(answer.json()) == 1) is (other == "voyage")


@pytest.mark.parametrize("root", ["/rerank", "/api", "/v1", "/a/b"])
async def test_b4_a_proxy_may_strip_the_root_path_or_leave_it(
    root: str, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serve(HeldRanker(ModelUnavailable("no")), root_path=root) as client:
        for path in (NATIVE, COMPATIBLE, "/rerank", "/v1/rerank", LOCAL):
            for prefix in ("", root):
                caplog.clear()
                assert (await client.post(prefix + path, json=BODIES[COMPATIBLE])).status_code == 503
                (record,) = [record for record in caplog.records if record.name == LOGGER]
                if (root, prefix, path) != ("/v1", "", "/v1/rerank"):  # which is also /rerank below /v1
                    assert vars(record)["path"] == path
        if root == "/rerank":  # below the root path, or the route itself
            assert (await client.post("/rerank/", json=BODIES[COMPATIBLE])).status_code == 503
        for path in (root, root + "/", "/"):
            page = (await client.get(path)).text
            assert f'<base href="{root}/">' in page
        assert (await client.get(f"{root}/docs")).status_code == (await client.get("/openapi.json")).status_code == 200
        assert (await client.put(root + NATIVE)).json()["code"] == "InvalidParameter"


async def test_b8_a_target_may_be_a_whole_url_or_no_path(serve: Serve) -> None:
    async with serve(HeldRanker(), root_path="/rerank", api_key=("secret",)) as client:
        app = client._transport.app  # type: ignore[attr-defined]
        assert await status_of_target(app, "GET", "http://127.0.0.1:8106/version") == 401
        assert await status_of_target(app, "GET", "HTTPS://user@host/health") == 200
        assert await status_of_target(app, "GET", "http://host/rerank/health") == 200
        assert await status_of_target(app, "GET", "http://host") == 200
        assert await status_of_target(app, "CONNECT", "host:443") == 405
        assert await status_of_target(app, "OPTIONS", "*") == 204


async def status_of_target(app: ASGIApp, method: str, target: str, *headers: tuple[bytes, bytes]) -> int:
    """The status of a request whose target an HTTP client would not send."""
    statuses = []

    async def send(message: Message) -> None:
        statuses.append(message.get("status"))

    scope = {"type": "http", "method": method, "path": target, "query_string": b"", "client": None}
    await app(scope | {"headers": headers}, None, send)  # type: ignore[arg-type]
    status = statuses[0]
    assert isinstance(status, int)
    return status


async def test_the_client_address_cannot_forge_a_line(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serve(HeldRanker()) as client:
        app = ProxyHeadersMiddleware(client._transport.app, "*")  # type: ignore[attr-defined]
        client._transport.app = app  # type: ignore[attr-defined]
        for sent in ("203.0.113.7", "[2001:db8::1]:443", "x\n forged id=1"):
            await client.post(LOCAL, json={}, headers={"X-Forwarded-For": sent})
    lines = [record.getMessage().split(" ")[:2] for record in caplog.records if record.name == LOGGER]
    assert lines == [["203.0.113.7", "POST"], ["2001:db8::1", "POST"], ["x%0A%20forged%20id%3D1", "POST"]]


async def test_a_forged_client_address_loads_no_model(serve: Serve) -> None:
    """A proxy at a Unix socket adds the client's address behind what the client has sent."""
    async with serve(HeldRanker()) as client:
        model = {"model": (await client.get("/v1/models")).json()["data"][0]["id"]}
        client._transport.app = ProxyHeadersMiddleware(client._transport.app, "*")  # type: ignore[attr-defined]
        for sent, status in (("127.0.0.1", 200), ("203.0.113.7", 403), ("127.0.0.1, 203.0.113.7", 403)):
            answer = await client.post("/v1/models/load", json=model, headers={"X-Forwarded-For": sent})
            assert answer.status_code == status, answer.text


def paths(client: object) -> list[str]:
    documented = client._transport.app.openapi()["paths"]  # type: ignore[attr-defined]
    return [path for path, methods in documented.items() if "get" in methods]
