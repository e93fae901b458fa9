"""Bodies as clients write them: options of other dialects, numbers as strings, content parts; and their errors."""

from __future__ import annotations

from typing import Any

import pytest

from local_rerank import Reranker
from tests.server.conftest import HeldRanker, Serve, message_of
from tests.serving import NATIVE

pytestmark = pytest.mark.anyio
COMPATIBLE = "/compatible-api/v1/reranks"
QUERY, TEXTS = "capital of France", ["Rome", "Paris", "Bananas"]
FLAT = {"model": "qwen3-rerank", "query": QUERY, "documents": TEXTS}
PLAIN = {"query": QUERY, "documents": TEXTS}
BODIES = {  # by path: a body of each dialect whose answer is ranked
    "/v1/rerank": PLAIN,
    "/v2/rerank": PLAIN,
    "/v1/reranking": PLAIN,
    "/api/v1/rerank": PLAIN,
    "/v1/local/rank": PLAIN,
    "/rerank": {"query": QUERY, "texts": TEXTS},  # TEI
    "/reranking": {"query": QUERY, "input": TEXTS},  # Mixedbread
    "/rerank/": {**PLAIN, "top_k": None},  # Voyage
}
by_dialect = pytest.mark.parametrize(("path", "body"), BODIES.items(), ids=BODIES)


def results_of(answer: Any) -> list[dict[str, Any]]:
    body = answer.json()
    assert answer.status_code == 200, body
    results: list[dict[str, Any]]
    results = body if isinstance(body, list) else body.get("output", body).get("results") or body["data"]
    return results


def nested(**parameters: Any) -> dict[str, Any]:
    return {"model": "qwen3-rerank", "input": PLAIN, "parameters": parameters}


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/local/rank", "/rerank", "/reranking", "/rerank/"])
async def test_c11_a_count_may_be_written_as_string_or_float_under_any_name(
    path: str, serve: Serve, tiny_reranker: Reranker
) -> None:
    body = BODIES[path]
    async with serve(tiny_reranker) as client:
        inside = await client.post(path, json={**body, "parameters": {"top_n": 2, "top_k": None}})
        assert len(results_of(inside)) == 2
        for name, value in (("top_n", "2"), ("top_k", 2.0), ("topN", 2), ("TopK", " 2.0"), ("TOP_N", 2)):
            assert len(results_of(await client.post(path, json={**body, name: value}))) == 2, name
            for value, shown in (("2.5", '"2.5"'), (2.5, "2.5"), (True, "true"), ("two", '"two"'), (-1.5, "-1.5")):
                refused = await client.post(path, json={**body, name: value})
                assert refused.status_code in (400, 422), (name, value)
                assert message_of(refused.json()).startswith(name)
                assert shown in message_of(refused.json())


@by_dialect
async def test_c11_an_option_of_another_dialect_is_heeded_or_refused(
    path: str, body: dict[str, Any], serve: Serve, tiny_reranker: Reranker
) -> None:
    async with serve(tiny_reranker) as client:
        for name, wanted in (("return_documents", True), ("return_text", "false"), ("return_input", True)):
            for result in results_of(await client.post(path, json={**body, name: wanted})):
                assert bool({"document", "text", "input"} & result.keys()) is (wanted is True), (name, result)
        for name, value in (("use_activation", False), ("returnRawScores", "true")):
            scores = [
                result.get("log_odds", result.get("relevance_score", result.get("score")))
                for result in results_of(await client.post(path, json={**body, name: value}))
            ]
            assert not all(0 <= score <= 1 for score in scores if score is not None), name
        for name, value in (("truncate", False), ("truncation", "error"), ("truncate", "NONE")):
            for limit in ("max_tokens_per_doc", "max_document_tokens"):
                answer = await client.post(path, json={**body, name: value, limit: 1})
                assert answer.status_code in (400, 413), (name, answer.text)
        for name in ("return_embeddings", "relevant_spans", "rewrite_query"):
            refused = await client.post(path, json={**body, name: True})
            assert refused.status_code in (400, 422)
            assert name in message_of(refused.json())
        extra = {"relevant_spans": False, "max_chunks_per_doc": 1024}
        extra |= {} if path == "/v1/local/rank" else {"priority": 0, "user": "u", "x": [1]}
        assert len(results_of(await client.post(path, json={**body, **extra}))) == 3


async def test_c11_scores_in_the_order_of_the_request_have_no_top_n(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        for name in ("top_n", "top_k", "topN", "return_documents", "rank_fields"):
            refused = await client.post("/score", json={"text_1": "q", "text_2": ["a"], name: 1})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


async def test_a11_the_value_of_a_single_rank_field_is_ranked_alone(serve: Serve, tiny_reranker: Reranker) -> None:
    documents = [{"title": "t", "text": text} for text in ("Paris is the capital", "Bananas")]
    async with serve(tiny_reranker) as client:
        for fields, first in (
            (["text"], "{text}"),
            ("title", "{title}"),
            (["title", "text"], "title: t\ntext: {text}"),
        ):
            named = {"documents": documents, "rank_fields": fields}
            plain = {"documents": [first.format(**document) for document in documents]}
            answers = [
                await client.post("/v2/rerank", json={"query": "q", "return_documents": False, **body})
                for body in (named, plain)
            ]
            assert results_of(answers[0]) == results_of(answers[1]), fields


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2", "Input should be a valid integer"),
        (2.0, "Input should be a valid integer"),
        (True, "Input should be a valid integer"),
        (0, "Value error, top_n is invalid, it should be greater than 0."),
        (-1, "Value error, top_n is invalid, it should be greater than 0."),
        (None, None),
        (10**19, None),
    ],
)
async def test_e3_dashscopes_top_n_is_refused_in_the_hosted_words(
    value: Any, message: str | None, serve: Serve, tiny_reranker: Reranker
) -> None:
    async with serve(tiny_reranker) as client:
        for path, body, name in (
            (NATIVE, nested(top_n=value), "parameters.top_n"),
            (NATIVE, {**FLAT, "top_n": value}, "top_n"),
            (COMPATIBLE, {**FLAT, "top_n": value}, "top_n"),
            (COMPATIBLE, {**FLAT, "parameters": {"top_n": value}}, "parameters.top_n"),
        ):
            answer = await client.post(path, json=body)
            if message is None:
                assert len(results_of(answer)) == 3
                continue
            assert (answer.status_code, answer.json()["code"]) == (400, "InvalidParameter")
            assert answer.json()["message"] == f"<400> InternalError.Algo.InvalidParameter: {message}: {name}"
            assert answer.json().get("error", {"param": name})["param"] == name


INSTRUCTIONS: list[dict[str, Any]] = [
    {"instruct": "Find a city", "instruction": "Find a fruit"},
    {"instruct": " ", "instruction": "Find a city"},
    {"chat_template_kwargs": {"instruction": "Find a city"}},
    {"instruction": "Find a city", "chat_template_kwargs": 7},
]


@pytest.mark.parametrize("sent", INSTRUCTIONS)
async def test_e1_the_instruction_is_taken_under_each_of_its_names(
    sent: dict[str, Any], serve: Serve, tiny_reranker: Reranker
) -> None:
    async with serve(tiny_reranker) as client:
        expected = sorted(item.relevance_score for item in tiny_reranker.rank(QUERY, TEXTS, instruction="Find a city"))
        forms = [(NATIVE, nested(**sent)), (COMPATIBLE, {**FLAT, **sent}), (COMPATIBLE, {**FLAT, "parameters": sent})]
        forms += [("/score", {"text_1": QUERY, "text_2": TEXTS, **sent})]
        others = BODIES if sent is INSTRUCTIONS[0] else {"/v1/rerank": PLAIN}  # all of which share the options
        forms += [(path, {**body, **sent}) for path, body in others.items()]
        for path, body in forms:
            results = results_of(await client.post(path, json=body))
            scores = sorted(result.get("relevance_score", result.get("score", 0.0)) for result in results)
            assert scores == pytest.approx(expected, rel=1e-4), path


async def test_e1_a_meaningless_instruction_is_an_unknown_key_on_dashscopes_routes(
    serve: Serve, tiny_reranker: Reranker
) -> None:
    async with serve(tiny_reranker) as client:
        for value in (5, [1], {"a": None}):
            for sent in ({"instruction": value}, {"chat_template_kwargs": {"instruction": value}}):
                assert len(results_of(await client.post(NATIVE, json=nested(**sent)))) == 3
                assert len(results_of(await client.post(COMPATIBLE, json={**FLAT, **sent}))) == 3


async def test_e2_a_body_of_the_other_api_is_named_as_such(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        for path in (COMPATIBLE, "/v1/reranks", "/v2/rerank", "/v1/local/rank"):
            refused = await client.post(path, json=nested())
            assert refused.status_code == 400
            assert f"the body has an `input`, as DashScope's native API takes it: send it to {NATIVE}" in refused.text
        refused = await client.post(NATIVE, json={"model": "qwen3-rerank", "query": "q"})
        assert refused.json()["code"] == "BadRequest.EmptyInput"
        assert "`documents`" in refused.json()["message"]


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        (COMPATIBLE, {**FLAT, "query": " "}, "query"),
        (COMPATIBLE, {**FLAT, "documents": []}, "documents"),
        (COMPATIBLE, {**FLAT, "documents": ["a", 7]}, "documents.1"),
        (COMPATIBLE, {**FLAT, "instruction": "x" * 50_001}, "instruction"),
        (COMPATIBLE, {**FLAT, "parameters": {"instruct": "x" * 50_001}}, "parameters.instruct"),
        (COMPATIBLE, {**FLAT, "model": "other"}, "model"),
        (COMPATIBLE, {"model": "qwen3-rerank"}, "query"),
        ("/score", {"text_1": "q", "text_2": []}, "text_2"),
        ("/score", {"data_1": ["q", " "], "data_2": ["a", "b"]}, "data_1"),
        ("/v1/rerank", {**PLAIN, "topN": "x"}, "topN"),
        ("/v1/rerank", {**PLAIN, "parameters": {"top_n": "x"}}, "parameters.top_n"),
        ("/v1/reranking", {"query": "q", "input": ["a", {"x": 1}]}, "input.1"),
        ("/v1/rerank", {**PLAIN, "truncatePromptTokens": 5}, "truncate_prompt_tokens"),
    ],
)
async def test_e2_error_param_is_the_name_in_the_body_that_was_sent(
    path: str, body: dict[str, Any], name: str, serve: Serve, tiny_reranker: Reranker
) -> None:
    async with serve(tiny_reranker) as client:
        error = (await client.post(path, json=body)).json()["error"]
    assert error["param"] == name, error


async def test_e2_a_score_request_names_the_position_in_its_own_body(serve: Serve, tiny_reranker: Reranker) -> None:
    body = {"text_1": ["q", "r"], "text_2": ["a", "a long document"], "truncation": False, "max_tokens_per_doc": 3}
    async with serve(tiny_reranker) as client:
        error = (await client.post("/score", json=body)).json()["error"]
    assert error["param"] == "text_2[1]"
    assert error["message"].startswith("text_2[1] has ")


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


async def test_c13_content_parts_are_ranked_like_their_text_in_every_dialect(
    serve: Serve, tiny_reranker: Reranker
) -> None:
    expected = tiny_reranker.rank("capital\nof France", ["Rome\nItaly", "Paris", "Bananas"], instruction="i")
    query = {"content": [part("capital"), "of France"]}
    texts = [{"content": [part("Rome"), part("Italy")]}, {"content": "Paris"}, {"text": "Bananas"}]
    forms = [(path, {**body, "query": query}) for path, body in BODIES.items()]
    forms += [(NATIVE, {**nested(instruct="i"), "input": {"query": query, "documents": texts}})]
    forms += [(COMPATIBLE, {**FLAT, "query": query}), ("/score", {"text_1": query, "text_2": texts})]
    async with serve(tiny_reranker) as client:
        for path, body in forms:
            sent = {name: texts if value is TEXTS else value for name, value in body.items()} | {"instruct": "i"}
            ranked = {
                item["index"]: item.get("relevance_score", item.get("score"))
                for item in results_of(await client.post(path, json=sent))
            }
            assert ranked == {item.index: pytest.approx(item.relevance_score, rel=1e-4) for item in expected}, path


@pytest.mark.parametrize(
    ("document", "kind", "at"),
    [
        ({"content": [part("a"), {"type": "image_url", "image_url": {"url": "x"}}]}, "images", ".content.1"),
        ({"content": [{"type": "input_audio", "data": "x"}]}, "audio", ".content.0"),
        ({"content": [{"type": "video_url", "video_url": {"url": "x"}}]}, "videos", ".content.0"),
        ({"text": "a", "image": "x"}, "images", ""),
        ({"type": "image_url", "image_url": {"url": "x"}}, "images", ""),
        (f"data:image/png;base64,{PNG}", "images", ""),
        ({"text": f"data:image/png;base64,{PNG}"}, "images", ".text"),
        ({"content": "data:video/mp4;base64,xx"}, "videos", ".content"),
        ({"content": [part("data:audio/wav;base64,xx")]}, "audio", ".content.0"),
        (PNG, "images", ""),
    ],
)
async def test_c13_an_image_is_refused_with_its_position(document: Any, kind: str, at: str, serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        for path, name in (("/v1/rerank", "documents.1"), (COMPATIBLE, "documents.1"), ("/score", "documents.1")):
            left = {"queries": "q"} if path == "/score" else {"query": "q"}
            answer = await client.post(path, json={"model": "qwen3-rerank", **left, "documents": ["a", document]})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"].startswith(name + at)
            assert f"{kind} {'is' if kind == 'audio' else 'are'} not supported" in message_of(answer.json())
        asked = await client.post("/v2/rerank", json={"query": document, "documents": ["a"]})
        assert "not supported" in message_of(asked.json())


async def test_c13_a_text_that_only_mentions_an_image_is_ranked(serve: Serve, tiny_reranker: Reranker) -> None:
    texts = [f"data:image/png;base64,{PNG} is a red dot", "/9j/ is how a JPEG begins", "data: 1"]
    async with serve(tiny_reranker) as client:
        assert len(results_of(await client.post("/v1/rerank", json={"query": "q", "documents": texts}))) == 3
