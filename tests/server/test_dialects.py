"""What the dialects share: whose a body is, names of models, settings, discovery, and how small a dialect stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import local_rerank_server.dialects
from local_rerank import Reranker
from local_rerank_server.dialects import ROWS, dialect_at, make_routes
from local_rerank_server.dialects._route import DialectRoute
from local_rerank_server.dialects._shared_paths import SharedRoute
from tests.server.conftest import HeldRanker, Serve

pytestmark = pytest.mark.anyio
FOLDER = Path(local_rerank_server.dialects.__file__).parent
MOST_LINES = 220
TEXTS = {"query": "q", "documents": ["a", "b"]}


def routes() -> list[DialectRoute]:
    return [route for _, router in ROWS for route in router.routes if isinstance(route, DialectRoute)]


def test_a_dialect_stays_one_small_file() -> None:
    for path in FOLDER.glob("[a-z]*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, path.name


def test_where_paths_are_shared_each_example_is_its_own_dialects_and_one_takes_the_rest() -> None:
    shared = [route for route in make_routes() if isinstance(route, SharedRoute)]
    assert {"/rerank", "/v1/rerank", "/reranking", "/v1/reranking"} <= {route.path for route in shared}
    for route in shared:
        *choosy, last = route.forms
        assert last.takes is None
        for form in choosy:
            assert form.takes is not None
        for form in route.forms:
            for example in form.examples.values():
                owners = [other for other in choosy if other.takes and other.takes(example)] or [last]
                assert owners == [form], (route.path, example)


async def test_every_route_but_dashscopes_takes_any_model_or_none_and_sends_it_back(
    serve: Serve, tiny_reranker: Reranker
) -> None:
    async with serve(tiny_reranker) as client:
        for route, example in ranking():
            if route.path.startswith(("/api/v1/s", "/compatible", "/v1/reranks")) or "input" in example:
                continue
            for model in ("any/name", None):
                answer = await client.post(route.path, json={**example, "model": model})
                assert answer.status_code == 200, answer.text
                if isinstance(answer.json(), dict) and route.dialect.name != "local-rerank":
                    assert answer.json()["model"] == (model or tiny_reranker.model_id)


async def test_strict_models_refuses_unknown_names_on_every_route(serve: Serve) -> None:
    async with serve(HeldRanker(), strict_models=True) as client:
        for route, example in ranking():
            answer = await client.post(route.path, json={**example, "model": "unknown"})
            assert answer.status_code == 404, answer.text


def ranking() -> list[tuple[DialectRoute, dict[str, Any]]]:
    return [(route, example) for route in routes() for example in route.examples.values()]


async def test_documents_come_back_as_strings_where_the_setting_says_so(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker, document_echo="string") as client:
        for path in ("/rerank", "/v1/rerank"):
            results = (await client.post(path, json=TEXTS)).json()["results"]
            assert sorted(item["document"] for item in results) == ["a", "b"]


async def test_xinferences_client_is_told_whether_to_send_its_key(serve: Serve) -> None:
    async with serve(HeldRanker(), api_key=("secret",)) as client:
        assert (await client.get("/v1/cluster/auth")).json() == {"auth": True}
    async with serve(HeldRanker()) as client:
        assert (await client.get("/v1/cluster/auth")).json() == {"auth": False}


async def test_teis_info_tells_what_is_served(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker, max_documents=7) as client:
        info = (await client.get("/info")).json()
    assert info["model_id"] == tiny_reranker.model_id
    assert info["max_client_batch_size"] == 7
    assert info["max_input_length"] == tiny_reranker.info.max_length
    assert list(info["model_type"]) == ["reranker"]


async def test_a_wrong_path_lists_every_endpoint(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        listed = set((await client.post("/v1/rerankk")).json()["endpoints"])
    ranked = {f"POST {route.path}" for route in routes() if route.examples and not route.path.endswith("/")}
    assert ranked | {"GET /health", "GET /info", "GET /v1/models/{model_id}"} <= listed


async def test_score_refuses_more_pairs_than_the_limit(serve: Serve) -> None:
    async with serve(HeldRanker(), max_documents=2) as client:
        answer = await client.post("/score", json={"text_1": ["a", "b", "c"], "text_2": ["a", "b", "c"]})
    assert (answer.status_code, answer.json()["error"]["message"][:12]) == (400, "3 documents;")


async def test_one_query_that_fails_fails_the_whole_score(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker) as client:
        answer = await client.post("/score", json={"text_1": ["a", " "], "text_2": ["a", "b"]})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "query is empty; it must hold some text")


async def test_the_page_names_each_example_of_each_dialect(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        page = (await client.get("/docs")).text
    for route in routes():
        for name in route.examples:
            assert f"<h3>{name}</h3>" in page


def test_openrouters_path_is_not_dashscopes() -> None:
    assert dialect_at("/api/v1/rerank").name == "OpenRouter"
    assert dialect_at("/api/v1/reranking").name == "DashScope native"
