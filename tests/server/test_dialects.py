"""What all dialects have in common: shared paths, model names and options."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from local_rerank import Reranker
from local_rerank_server.dialects import ROWS, make_routes
from local_rerank_server.dialects._route import DialectRoute
from local_rerank_server.dialects._shared_paths import SharedRoute
from tests.encoder_checkpoints import make_encoder
from tests.server.conftest import HeldRanker, Serve, message_of

pytestmark = pytest.mark.anyio
TEXTS = {"query": "q", "documents": ["a", "b"]}


@pytest.fixture(scope="module")
def logit_encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reranker]:
    folder = make_encoder(
        tmp_path_factory.mktemp("encoder") / "m", "Bert", activation="torch.nn.modules.linear.Identity"
    )
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        yield reranker


def routes() -> list[DialectRoute]:
    return [route for _, router in ROWS for route in router.routes if isinstance(route, DialectRoute)]


def test_on_a_shared_path_each_example_goes_to_its_own_dialect() -> None:
    shared = [route for route in make_routes() if isinstance(route, SharedRoute)]
    assert {"/rerank", "/v1/rerank", "/reranking", "/v1/reranking"} <= {route.path for route in shared}
    for route in shared:
        *selective, last = route.forms
        assert last.takes is None
        for form in selective:
            assert form.takes is not None
        for form in route.forms:
            for example in form.examples.values():
                owners = [other for other in selective if other.takes and other.takes(example)] or [last]
                assert owners == [form], (route.path, example)


async def test_on_an_unknown_path_each_example_with_a_marker_is_told_its_own_dialect_and_path(serve: Serve) -> None:
    marked = [route for route in routes() if route.takes is not None]
    assert len({route.dialect.name for route in marked}) >= 4
    async with serve(HeldRanker()) as client:
        for route in marked:
            own = next(each.path for each in routes() if each.dialect is route.dialect and each.examples)
            for example in route.examples.values():
                message = message_of((await client.post("/nothing/here", json=example)).json())
                assert f"this body is {route.dialect.name}'s: POST {own}" in message


async def test_every_route_but_dashscopes_accepts_and_returns_any_model_name(
    serve: Serve, tiny_reranker: Reranker
) -> None:
    async with serve(tiny_reranker) as client:
        for route, example in ranking():
            if route.dialect.name.startswith("DashScope"):
                continue
            for model in ("any/name", None):
                answer = await client.post(route.path, json={**example, "model": model})
                assert answer.status_code == 200, answer.text
                has_model = "model" in getattr(route.response_model, "__annotations__", {})
                if has_model and route.dialect.name != "local-rerank":
                    assert answer.json()["model"] == (model or tiny_reranker.model_id)


async def test_strict_models_refuses_unknown_names_on_every_route(serve: Serve) -> None:
    async with serve(HeldRanker(), strict_models=True) as client:
        for route, example in ranking():
            answer = await client.post(route.path, json={**example, "model": "unknown"})
            assert answer.status_code == 404, answer.text


def ranking() -> list[tuple[DialectRoute, dict[str, Any]]]:
    return [(route, example) for route in routes() for example in route.examples.values()]


async def test_document_echo_string_returns_documents_as_strings(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker, document_echo="string") as client:
        for path in ("/rerank", "/v1/rerank"):
            results = (await client.post(path, json=TEXTS)).json()["results"]
            assert sorted(item["document"] for item in results) == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "is_raw"),
    [({}, True), ({"raw_scores": False}, False), ({"raw_scores": True}, True), ({"texts": ["a"]}, False)],
)
async def test_a_bare_logit_becomes_a_score_between_0_and_1_where_the_request_asks_for_no_raw_one(
    fields: dict[str, Any], is_raw: bool, serve: Serve, logit_encoder: Reranker
) -> None:
    async with serve(logit_encoder) as client:
        answer = (await client.post("/rerank", json={"query": "q", "documents": ["a"]} | fields)).json()
    item = answer[0] if "texts" in fields else answer["results"][0]
    logit = logit_encoder.score([("q", "a")], logits=True)[0]
    assert abs(logit) > 0.1
    expected = logit if is_raw else 1 / (1 + math.exp(-logit))
    assert item.get("score", item.get("relevance_score")) == pytest.approx(expected, abs=1e-5)


async def test_c19_teis_info_has_every_field_of_its_own(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker, max_documents=7) as client:
        info = (await client.get("/info")).json()
    assert info["model_id"] == tiny_reranker.model_id
    assert info["max_client_batch_size"] == 7
    assert info["max_input_length"] == tiny_reranker.info.max_length
    assert list(info["model_type"]) == ["reranker"]
    texts = ("model_id", "model_dtype", "served_model_name", "version")  # of TEI's Info; the rest may be null
    assert all(isinstance(info[name], str) for name in texts)
    assert {"model_sha", "max_batch_requests", "sha", "docker_label"} <= info.keys()


async def test_an_unknown_path_lists_every_endpoint(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        listed = set((await client.post("/v1/rerankk")).json()["endpoints"])
    ranked = {f"POST {route.path.replace(':path', '')}" for route in routes() if route.examples}
    assert ranked | {"GET /health", "GET /info", "GET /v1/models/{model_id}"} <= listed


async def test_score_refuses_more_pairs_than_the_limit(serve: Serve) -> None:
    async with serve(HeldRanker(), max_documents=2) as client:
        answer = await client.post("/score", json={"text_1": ["a", "b", "c"], "text_2": ["a", "b", "c"]})
    assert (answer.status_code, answer.json()["error"]["message"][:12]) == (400, "3 documents;")


async def test_score_fails_if_one_query_fails(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker) as client:
        answer = await client.post("/score", json={"text_1": ["a", " "], "text_2": ["a", "b"]})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "text_1 is empty; it must hold some text")


async def test_c17_every_dialect_tells_what_to_change_after_a_timeout(serve: Serve) -> None:
    async with serve(HeldRanker(), request_timeout_ms=1) as client:
        for route, example in ranking():
            answer = await client.post(route.path, json=example)
            assert answer.status_code in (408, 500, 504)
            assert "--request-timeout-ms" in message_of(answer.json()), route.path


async def test_c19_headers_tell_what_was_cut_off(serve: Serve, tiny_reranker: Reranker) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v2/rerank": TEXTS,
        "/rerank": {"query": "q", "texts": ["a", "b"]},
        "/score": {"text_1": ["a long query", "q"], "text_2": ["a", "b c d"]},
    }
    async with serve(tiny_reranker) as client:
        for path, body in bodies.items():
            whole = await client.post(path, json=body)
            assert not {"x-truncated-documents", "x-truncated-query-tokens"} & whole.headers.keys()
            cut = await client.post(path, json={**body, "max_tokens_per_query": 1, "max_tokens_per_doc": 1})
            assert cut.headers["x-truncated-documents"] == "2", "one token is the space before a document"
            assert ("x-truncated-query-tokens" in cut.headers) is (path == "/score")
