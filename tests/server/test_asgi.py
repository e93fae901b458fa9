"""The ASGI application under gunicorn, in real processes, and in forked children."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from httpx2 import ASGITransport, AsyncClient, Client, ConnectError

from local_rerank import Reranker
from local_rerank.errors import ConfigError, DeviceFailure, UnusableAfterFork
from local_rerank_server import asgi
from local_rerank_server.app import create_app
from local_rerank_server.config import ServerConfig
from local_rerank_server.keys import ApiKeys
from local_rerank_server.state import ServerState
from tests.forked import in_child
from tests.serving import WAIT_SECONDS, Server, started, until

DOCUMENTS = ["Rome is in Italy", "Paris is the capital of France"]
BODY = {"model": "any", "query": "capital of France", "documents": DOCUMENTS}
CLOSE = 1e-5  # of scores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gunicorn forks, and /proc tells which worker answers")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("LOCAL_RERANK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_RERANK_THREADS", "1")
    yield
    asgi.create.cache_clear()


@contextmanager
def gunicorn(log: Path, num_workers: int, *options: str) -> Iterator[Server]:
    command = ["gunicorn", "-k", "uvicorn_worker.UvicornWorker", "-w", str(num_workers), "-b", "127.0.0.1:0"]
    command += ["--timeout", str(WAIT_SECONDS), "--no-control-socket", *options, "local_rerank_server.asgi:app"]
    with started(log, *command) as server:
        server.wait_for("Listening at: ")
        yield server


def workers_of(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()


def answers(server: Server, num_workers: int) -> dict[int, list[float]]:
    """The scores of each worker by its pid; sends requests until all have answered."""
    found: dict[int, list[float]] = {}
    address = server.output.partition("Listening at: ")[2].split()[0]

    def all_have_answered() -> bool:
        assert server.process.poll() is None, server.output
        with suppress(ConnectError):
            found.update([_ask(server, address)])
        return len(found) == num_workers

    until(all_have_answered)
    return found


def _ask(server: Server, address: str) -> tuple[int, list[float]]:
    with Client(base_url=address, timeout=WAIT_SECONDS) as client:
        with client.stream("POST", "/v1/rerank", json=BODY) as response:
            host_and_port = response.extensions["network_stream"].get_extra_info("client_addr")
            (pid,) = (worker.pid for worker in workers_of(server) if _serves(worker, host_and_port))
            response.read()
        assert response.status_code == 200, response.text
        return pid, scores_of(response.json())


def _serves(worker: psutil.Process, client: tuple[str, int]) -> bool:
    return any(connection.raddr == client for connection in worker.net_connections("tcp"))


def scores_of(answer: Any) -> list[float]:
    items = sorted(answer["results"], key=lambda item: item["index"])
    return [item["relevance_score"] for item in items]


def expected_of(reranker: Reranker) -> list[float]:
    result = reranker.rank("capital of France", DOCUMENTS)
    return [item.relevance_score for item in sorted(result, key=lambda item: item.index)]


def check(server: Server, reranker: Reranker, *, num_workers: int) -> None:
    for scores in answers(server, num_workers).values():
        assert scores == pytest.approx(expected_of(reranker), abs=CLOSE)
    workers = [worker.pid for worker in workers_of(server)]
    assert server.stop() == 0
    assert not any(psutil.pid_exists(pid) for pid in workers)
    assert "Traceback" not in server.output
    assert "KILL" not in server.output


def test_gunicorn_with_preload(tmp_path: Path, nano: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers share the weights of the built-in model."""
    monkeypatch.setenv("LOCAL_RERANK_INSECURE", "true")
    with gunicorn(tmp_path / "log", 2, "--preload") as server:
        check(server, nano, num_workers=2)


def test_gunicorn_without_preload(
    tmp_path: Path, tiny_checkpoint: Path, tiny_reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker loads its own model."""
    options = {"MODEL": str(tiny_checkpoint), "DEVICE": "cpu", "DTYPE": "fp32", "NO_SELF_TEST": "true"}
    options["INSECURE"] = "true"
    for name, value in options.items():
        monkeypatch.setenv(f"LOCAL_RERANK_{name}", value)
    with gunicorn(tmp_path / "log", 1) as server:
        check(server, tiny_reranker, num_workers=1)


def test_a_gpu_that_fails_stops_the_worker_so_that_its_supervisor_starts_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RERANK_INSECURE", "true")
    monkeypatch.setattr(asgi, "AsyncReranker", lambda config: None)
    app, sent = asgi.create(), list[tuple[int, int]]()
    monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
    app.state.server.fail(DeviceFailure("cuda:0 failed"))  # type: ignore[attr-defined]
    assert app.state.server.status == "draining"  # type: ignore[attr-defined]
    assert sent == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "no LOCAL_RERANK_API_KEY and no LOCAL_RERANK_API_KEY_FILE is set"),
        ({"MAX_DOCUMENT": "3"}, "LOCAL_RERANK_MAX_DOCUMENT is not a known variable"),
        ({"MAX_DOCUMENTS": "many"}, "MAX_DOCUMENTS"),
        ({"MAX_DOCUMENTS": "0", "INSECURE": "true"}, "max_documents is 0"),
        ({"RAY": "true", "INSECURE": "true"}, "ray is not supported here"),
    ],
)
def test_an_invalid_variable_is_named(variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"LOCAL_RERANK_{name}", value)
    with pytest.raises(ConfigError, match=named):
        asgi.create()


def _post(state: ServerState) -> tuple[int, Any, int]:
    """Status, body, and the number of requests in the metrics."""

    async def post() -> tuple[int, Any, int]:
        transport = ASGITransport(create_app(state, ApiKeys({})))
        async with AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.post("/v1/rerank", json=BODY)
            page = (await client.get("/metrics")).text
            counts = re.findall(r"^local_rerank_requests_total{.*} (\S+)", page, re.MULTILINE)
            return response.status_code, response.json(), int(sum(map(float, counts)))

    return asyncio.run(post())


def test_an_application_created_before_a_fork_works_in_the_child_with_its_own_counters(tiny_reranker: Reranker) -> None:
    state = ServerState(ServerConfig())
    state.serve(tiny_reranker)
    for number in (1, 3):  # GET /metrics is counted too
        assert _post(state)[2] == number
    with state.admission.admitted():
        status, body, num_requests = in_child(lambda: (*_post(state)[:2], state.admission.num_requests))
    assert (status, num_requests) == (200, 0)
    assert scores_of(body) == pytest.approx(expected_of(tiny_reranker), abs=CLOSE)
    assert in_child(lambda: _post(state))[2] == 1


def test_a_child_that_cannot_use_the_model_answers_503(
    tiny_checkpoint: Path, tiny_reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_reranker.engine, replace(tiny_reranker.info, device="cuda:0")
    monkeypatch.setattr("local_rerank.reranker.load", lambda *_, **__: loaded)
    monkeypatch.setattr("local_rerank.reranker.make_plan", lambda *_: None)
    with Reranker(str(tiny_checkpoint)) as reranker:
        state = ServerState(ServerConfig())
        state.serve(reranker)
        status, body, _ = in_child(lambda: _post(state))
        with pytest.raises(UnusableAfterFork, match="without --preload"):
            in_child(lambda: reranker.rank("q", ["a"]))
    assert status == 503
    assert "without --preload" in str(body)
