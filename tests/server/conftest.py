"""Fixtures for the server's tests: an application in this process, a stand-in for the model, and a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from httpx2 import ASGITransport, AsyncClient

from local_rerank import EngineConfig, Reranker, RerankRequest, RerankResult
from local_rerank.errors import DeviceFailure
from local_rerank.requests.worker import BatchReport
from local_rerank.types import ModelInfo
from local_rerank_server.app import create_app
from local_rerank_server.config import ServerConfig
from local_rerank_server.keys import ApiKeys
from local_rerank_server.state import ServerState
from tests.reference import ModelCard
from tests.serving import Server, options, serving
from tests.tiny_checkpoints import make_checkpoint, qwen_tokenizer_json


class HeldRanker:
    """Takes the place of a `Reranker`. Tests resolve its futures; `submit` raises `error` if there is one."""

    model_id = "held"
    config = EngineConfig()
    info = ModelInfo(
        model_id="held",
        source="folder",
        revision=None,
        device="cpu",
        dtype="fp32",
        compute_dtype="fp32",
        decoder="transformers",
        kernel="dense",
        threads=1,
        reasons={},
        num_parameters=1,
        num_layers=1,
        hidden_size=1,
        max_length=8192,
        max_batch_tokens=2048,
        load_seconds=0.0,
    )
    num_queued_tokens = 700
    num_queued_requests = 2
    max_batch_tokens = 2048
    tokens_per_second: float | None = None

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.futures: list[Future[RerankResult]] = []

    def submit(self, request: RerankRequest, *, name: str | None = None, on_scored: Any = None) -> Future[RerankResult]:
        if self.error is not None:
            raise self.error
        self.on_scored = on_scored
        self.futures.append(Future())
        return self.futures[-1]

    def observe_batches(self, observer: Callable[[BatchReport], None]) -> None:
        self.observer = observer

    def observe_failure(self, observer: Callable[[DeviceFailure], None]) -> None:
        self.on_failure = observer

    def retry_after(self) -> float:
        return 2.5


Serve = Callable[..., AbstractAsyncContextManager[AsyncClient]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def serve() -> Serve:
    """`serve(reranker, **options)`: a client of an application with that reranker; None: the model is still loading."""

    @asynccontextmanager
    async def client(reranker: Reranker | HeldRanker | None, **options: object) -> AsyncIterator[AsyncClient]:
        config = ServerConfig(**options)  # type: ignore[arg-type]
        state = ServerState(config)
        if reranker is not None:
            state.serve(reranker)  # type: ignore[arg-type]
        app = create_app(state, ApiKeys.from_config(config))
        async with AsyncClient(transport=ASGITransport(app), base_url="http://localhost") as made:
            made.state = state  # type: ignore[attr-defined]
            yield made

    return client


@pytest.fixture(scope="session")
def qwen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with Qwen's tokenizer, whose merges and control tokens hostile texts aim at."""
    return make_checkpoint(tmp_path_factory.mktemp("hostile") / "qwen", tokenizer_json=qwen_tokenizer_json())


@pytest.fixture(scope="session")
def qwen_card(qwen_checkpoint: Path) -> ModelCard:
    return ModelCard(qwen_checkpoint)


@pytest.fixture(scope="session")
def hostile_server(qwen_checkpoint: Path) -> Iterator[Server]:
    """The server that test_hostile.py and test_fuzz.py share; in the end it has logged no error."""
    log = qwen_checkpoint.parent / "log"
    with serving(log, *options(qwen_checkpoint), "--client-timeout-seconds", "2") as running:
        yield running
        assert " ERROR " not in running.output


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def message_of(body: dict[str, Any]) -> str:
    """The error message of an answer in any dialect."""
    inner = body.get("error")
    found = inner["message"] if isinstance(inner, dict) else body.get("message", body.get("detail", inner))
    assert isinstance(found, str)
    assert found
    return found
