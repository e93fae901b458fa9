"""Unusual requests get a ranking or a clear 4xx, never a 5xx; and the limits of a request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from local_rerank import Reranker
from local_rerank_server.dialects._field_types import Documents, Texts
from tests.reference import PREFIX, SUFFIX
from tests.server.conftest import Serve, message_of

pytestmark = pytest.mark.anyio
NATIVE = "/api/v1/services/rerank/text-rerank/text-rerank"
COMPATIBLE = "/compatible-api/v1/reranks"
LOCAL = "/v1/local/rank"
GENERIC = "/v1/rerank"
ROUTES = [NATIVE, COMPATIBLE, LOCAL, GENERIC, "/v2/rerank", "/v1/reranking", "/api/v1/rerank"]
JSON = {"Content-Type": "application/json"}


def flat(**fields: Any) -> dict[str, Any]:
    """A body that every ranking route accepts."""
    return {"model": "qwen3-rerank", "query": "q", "documents": ["a", "b"], **fields}


@pytest.mark.parametrize("path", ROUTES)
async def test_a_ranking_request_in_another_encoding_is_400(path: str, serve: Serve, tiny_reranker: Reranker) -> None:
    text = json.dumps(flat(query="é"), ensure_ascii=False)
    async with serve(tiny_reranker) as client:
        assert (await client.post(path, content=text.encode(), headers=JSON)).status_code == 200
        for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1", "gb18030"):
            answer = await client.post(path, content=text.encode(encoding), headers=JSON)
            assert answer.status_code == 400, encoding
            assert "body" in message_of(answer.json())


WRONG: list[Any] = [
    None, True, 7, -1, 1.5, float("nan"), float("inf"), 1e308, "", "text", [], [[]], [None], [1], ["x", 7], [["x"]], {},
    [{}], {"a": [1]}, {"text": None}, [{"text": None}], [{"text": ["x"]}], [{"image": "x"}],
    [{"text": "x", "video": "y"}], 10**400,
]  # fmt: skip
OTHER_FIELDS = [
    "truncation", "max_query_tokens", "max_document_tokens", "top_k", "kwargs", "chat_template_kwargs",
    "truncate_prompt_tokens", "max_tokens_per_query", "max_tokens_per_doc", "raw_scores", "use_activation",
    "truncate", "truncation_direction", "return_text", "top_n", "return_documents", "instruct", "instruction", "model",
]  # fmt: skip
FIELDS = ["query", "documents", "texts", "rank_fields", "parameters", "input"]
ONE_OF_EACH_KIND: list[Any] = [None, -1, 10**400, "text", {"a": [1]}]
VALUES = [(field, value) for field in FIELDS for value in WRONG]
VALUES += [(field, value) for field in OTHER_FIELDS for value in ONE_OF_EACH_KIND]
FEWER_VALUES = [(field, value) for field in FIELDS + OTHER_FIELDS for value in (10**400, {"a": [1]})]


@pytest.mark.parametrize("path", ROUTES)
async def test_any_type_in_any_field_is_ranked_or_refused(path: str, serve: Serve, tiny_reranker: Reranker) -> None:
    """All values on the path that most dialects share, two on the others, because dialects share their field types."""
    async with serve(tiny_reranker) as client:
        for field, value in VALUES if path == GENERIC else FEWER_VALUES:
            answer = await client.post(path, content=json.dumps(flat(**{field: value})), headers=JSON)
            assert answer.status_code in (200, 400, 404, 413, 422), (field, value, answer.text)
            if answer.status_code != 200:
                assert "rnal" not in message_of(answer.json()).replace("InternalError.Algo", "")


@pytest.mark.parametrize("path", ROUTES)
async def test_these_headers_are_ignored(path: str, serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker) as client:
        for headers in (
            {},
            {"Content-Type": "application/json; charset=utf-8"},
            {"Content-Type": "APPLICATION/JSON"},
            {"Content-Type": "application/vnd.api+json"},
            {"Content-Type": "application/json", "Content-Encoding": "identity"},
            {"Content-Type": "application/json", "Accept": "text/event-stream", "X-DashScope-SSE": "enable"},
            {"Content-Type": "application/json", "X-DashScope-Async": "disable"},
            {"Content-Type": "application/json", "X-DashScope-DataInspection": '{"input":"disable"}'},
            {"Content-Type": "application/json", "X-Request-Timeout-Ms": "60000"},
        ):
            answer = await client.post(path, content=json.dumps(flat()).encode(), headers=headers)
            assert answer.status_code == 200, (headers, answer.text)
            assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", ROUTES)
async def test_a_byte_order_mark_and_escapes_and_plain_utf8_mean_the_same(
    path: str, serve: Serve, tiny_reranker: Reranker
) -> None:
    body = flat(query="什么是文本排序模型", documents=["文档一", "😀"], return_documents=True)
    plain = json.dumps(body, ensure_ascii=False).encode()
    async with serve(tiny_reranker) as client:
        answers = [
            await client.post(path, content=raw, headers=JSON)
            for raw in (plain, json.dumps(body).encode(), b"\xef\xbb\xbf" + plain)
        ]
    assert all(answer.status_code == 200 for answer in answers)
    assert all("文档一" in answer.text and "😀" in answer.text for answer in answers)  # unescaped
    ranked = [_results(answer.json()) for answer in answers]
    assert ranked[0] == ranked[1] == ranked[2]


async def test_a_top_n_above_the_count_gives_all_however_large(serve: Serve, tiny_reranker: Reranker) -> None:
    async with serve(tiny_reranker) as client:
        for top_n in (2, 3, 10**19):
            for path in ROUTES:
                answer = await client.post(path, json=flat(top_n=top_n))
                assert len(_results(answer.json())) == 2


async def test_the_hosted_limits_hold_on_dashscope_and_larger_ones_elsewhere(
    serve: Serve, tiny_reranker: Reranker
) -> None:
    count = (
        "<400> InternalError.Algo.InvalidParameter: Value error, batch size of documents is invalid, "
        "it should not be empty or larger than 500.: input.documents"
    )
    length = (
        "<400> InternalError.Algo.InvalidParameter: Value error, document index:1 is invalid, "
        "it should not be larger than 300000: input.documents"
    )
    tokens = "<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 120000]"
    too_much = {count: ["d"] * 501, length: ["d", "d" * 300_001], tokens: ["d" * 3999] * 31}
    async with serve(tiny_reranker) as client:
        for message, documents in too_much.items():
            expected = message.replace("input.", "")  # the names of the flat body
            for path in (NATIVE, COMPATIBLE):
                answer = await client.post(path, json=flat(documents=documents))
                assert (answer.status_code, answer.json()["message"]) == (400, expected)
        for documents in (["d"] * 501, ["d", "d" * 300_001]):
            assert (await client.post(LOCAL, json=flat(documents=documents))).status_code == 200
        refused = await client.post(LOCAL, json=flat(documents=["d"] * 1001))
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "InvalidDocumentCount")


async def test_without_an_instruct_the_dashscope_routes_use_their_configured_one(
    serve: Serve, tiny_reranker: Reranker
) -> None:
    async with serve(tiny_reranker, dashscope_instruction="Find the opposite") as client:
        for path in (NATIVE, COMPATIBLE):
            without = await client.post(path, json=flat())
            given = await client.post(path, json=flat(instruct="Find the opposite"))
            other = await client.post(path, json=flat(instruct="Find the same"))
            assert _results(without.json()) == _results(given.json())
            assert _results(without.json()) != _results(other.json())


@pytest.mark.parametrize("path", ROUTES)
async def test_a_long_body_is_parsed_like_a_short_one(path: str, serve: Serve, tiny_reranker: Reranker) -> None:
    """Long bodies are parsed in a thread of their own."""
    body = json.dumps(flat()).encode()
    padded = b" " * 600_000 + body
    async with serve(tiny_reranker) as client:
        short, long = [await client.post(path, content=each, headers=JSON) for each in (body, padded)]
        assert _results(short.json()) == _results(long.json())
        broken = await client.post(path, content=padded[:-1], headers=JSON)
        assert broken.status_code == 400


def _results(body: dict[str, Any]) -> list[Any]:
    results: list[Any] = body.get("output", body)["results"]
    return results


@pytest.mark.parametrize("documents", [Texts, Documents, Texts | None, Documents | None])
def test_validation_stops_at_the_first_wrong_document(documents: Any) -> None:
    """An error record for each of two megabytes of wrong documents would block the event loop for seconds."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(documents).validate_python([1] * 1000)
    assert caught.value.error_count() == 1


async def test_a12_prompts_that_vllms_examples_render_get_the_scores_of_the_plain_texts(
    serve: Serve, tiny_reranker: Reranker
) -> None:
    plain = [f"<Document>: {text}{SUFFIX}" for text in ("a", "b")]
    query = f"{PREFIX}<Instruct>: Find a city\n<Query>: q\n"
    wrapped = flat(query=query, documents=plain, instruction="another", instruct="another")
    paths = {path: (flat(instruction="Find a city", instruct="Find a city"), wrapped) for path in (GENERIC, COMPATIBLE)}
    score = {"text_1": "q", "text_2": ["a", "b"], "instruction": "Find a city"}
    paths["/score"] = (score, {"text_1": query, "text_2": plain})
    async with serve(tiny_reranker) as client:
        for path, bodies in paths.items():
            expected, found = [await client.post(path, json=body) for body in bodies]
            assert (found.status_code, found.headers.get("x-unwrapped-queries")) == (200, "1"), path
            assert "x-unwrapped-queries" not in expected.headers
            assert scores(found.json()) == scores(expected.json()), path


def scores(body: dict[str, Any]) -> dict[int, float]:
    results = body.get("results", body.get("data", []))
    return {item["index"]: item.get("relevance_score", item.get("score")) for item in results}


async def test_a13_headers_report_what_was_cut_on_every_route(serve: Serve, tiny_reranker: Reranker) -> None:
    texts = {"query": "long " * 200, "documents": ["short", "x" * 500, "y" * 500]}
    body = flat(**texts, truncate_prompt_tokens=500)
    own = {**texts, "max_query_tokens": 10, "max_document_tokens": 10}
    async with serve(tiny_reranker) as client:
        for path, sent in ((GENERIC, body), ("/v2/rerank", body), ("/v1/reranking", body), (LOCAL, own)):
            response = await client.post(path, json=sent)
            assert response.status_code == 200, response.text
            assert int(response.headers["x-truncated-documents"]) == 2
            assert int(response.headers["x-truncated-query-tokens"]) > 800
        pairs = {"text_1": ["long " * 200, "r"], "text_2": ["x" * 500, "y"], "truncate_prompt_tokens": 500}
        response = await client.post("/score", json=pairs)
        assert response.headers["x-truncated-documents"] == "1"
        response = await client.post(GENERIC, json=flat())
        assert not [name for name in response.headers if name.startswith("x-truncated")]
        refused = await client.post(GENERIC, json=flat(query="long " * 1000, truncate_prompt_tokens=100))
        assert refused.status_code == 400
        assert "truncate_prompt_tokens is 100" in message_of(refused.json())
