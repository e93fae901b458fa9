"""The status of each error, and its shape in each dialect."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest
from pydantic import ConfigDict, TypeAdapter, with_config

from local_rerank import errors as library_errors
from local_rerank.errors import LocalRerankError
from local_rerank_server import errors
from local_rerank_server.dialects import ROWS, dialect_at
from local_rerank_server.dialects._route import Dialect, DialectRoute
from local_rerank_server.errors import STATUS
from tests.server.conftest import HeldRanker, Serve, message_of

SAMPLES: dict[type[LocalRerankError], LocalRerankError] = {
    type(error): error
    for error in (
        library_errors.InvalidRequest("what is wrong", field="query"),
        library_errors.WrongType(7, field="query", expected="a string"),
        library_errors.EmptyQuery(),
        library_errors.EmptyDocument(index=1),
        library_errors.InvalidDocumentCount(limit=500, value=501),
        library_errors.NoDocuments(limit=500),
        library_errors.DocumentTooLong(index=1, limit=10, value=11),
        library_errors.TooManyCharacters(field="query", limit=10, value=11),
        library_errors.TooManyTokens(limit=120_000, value=120_001),
        library_errors.TextTooLong(field="query", limit=10, value=11),
        library_errors.TooManyChunks(field="documents", limit=10_000, value=10_001),
        library_errors.InstructionTooLong(limit=1024, value=1025),
        library_errors.InvalidTopN(value=0),
        library_errors.Overloaded("full", retry_after=1.2),
        library_errors.DeadlineExceeded(timeout_ms=60_000),
        library_errors.ModelUnavailable("it cannot be loaded", retry_after=29.1),
        library_errors.DeviceFailure("cuda:0 failed"),
        library_errors.UnusableAfterFork("the model is on cuda:0"),
        library_errors.EngineFailure("the model failed"),
        library_errors.OutOfMemory(num_tokens=2048),
        library_errors.CheckpointError("no reranker"),
        library_errors.ConfigError("unknown option"),
        errors.MissingField("documents"),
        errors.InvalidField("top_n", "Input should be a valid integer"),
        errors.UnsupportedInput("documents.0", "images"),
        errors.MalformedBody("no JSON"),
        errors.BodyTooLarge(limit=64),
        errors.BodyTooSlow(limit_seconds=60),
        errors.RequestRateExceeded(limit=10, retry_after=30.5),
        errors.TokenRateExceeded(limit=10, retry_after=30.5),
        errors.UnsupportedContent("gzip is not supported"),
        errors.UnknownModel("x", known=["y"]),
        errors.UnknownRoute("/x", endpoints=["GET /y"], nearest="GET /y", address="http://localhost"),
        errors.MethodNotAllowed("GET", "/x", allowed="POST"),
        errors.MissingApiKey(),
        errors.InvalidApiKey(),
        errors.ForeignOrigin("http://evil.test"),
        errors.UnknownHost("evil.test"),
        errors.ModelNotLoaded("small", retry_after=1.2),
        errors.NotOnThisMachine(),
        errors.AmbiguousBody("two lengths"),
        errors.AsyncNotSupported(),
        errors.ClientDisconnected("gone"),
    )
}
HEADERS = {
    library_errors.Overloaded: ("retry-after", "2"),
    library_errors.ModelUnavailable: ("retry-after", "30"),
    errors.ModelNotLoaded: ("retry-after", "2"),
    errors.RequestRateExceeded: ("retry-after", "31"),
    errors.TokenRateExceeded: ("retry-after", "31"),
    errors.BodyTooSlow: ("connection", "close"),
    errors.AmbiguousBody: ("connection", "close"),
    library_errors.DeadlineExceeded: ("x-should-retry", "false"),
    errors.MissingApiKey: ("www-authenticate", "Bearer"),
    errors.InvalidApiKey: ("www-authenticate", "Bearer"),
    errors.MethodNotAllowed: ("allow", "POST"),
}
DIALECTS = [dialect for dialect, _ in ROWS]
RANKING = [
    dialect
    for dialect, router in ROWS
    if any(isinstance(route, DialectRoute) and route.examples for route in router.routes)
]
WRONG_MODEL = {"model": 7}
PLAIN_TEXT = {"Content-Type": "text/plain"}


def tree(root: type[LocalRerankError]) -> set[type[LocalRerankError]]:
    return {root}.union(*(tree(child) for child in root.__subclasses__()))


def test_every_error_class_has_a_status() -> None:
    assert set(STATUS) == tree(LocalRerankError) - {LocalRerankError}


def test_only_dashscope_tei_and_bedrock_override_statuses() -> None:
    hosted = {errors.MethodNotAllowed: 400, library_errors.DeadlineExceeded: 500}
    changed = {dialect.name: dict(dialect.status) for dialect in DIALECTS if dialect.status}
    tei = changed.pop("Text Embeddings Inference")
    bedrock = {library_errors.DeadlineExceeded: 408}
    assert changed == {"DashScope native": hosted, "DashScope compatible": hosted, "AWS Bedrock": bedrock}
    assert set(tei.values()) == {413, 422, 424}


@pytest.mark.anyio
@pytest.mark.parametrize("dialect", RANKING, ids=lambda dialect: dialect.name)
async def test_each_dialect_answers_each_error_in_its_shape(dialect: Dialect, serve: Serve) -> None:
    path, example = requests(dialect)[0]
    ranker = HeldRanker()
    async with serve(ranker) as client:
        for kind in STATUS:
            ranker.error = SAMPLES[kind]
            response = await client.post(path, json=example)
            assert response.status_code == dialect.status.get(kind, STATUS[kind]), kind
            assert response.headers["content-type"] == "application/json"
            check_shape(dialect, response.json())
            name, value = HEADERS.get(kind, ("content-type", "application/json"))
            assert response.headers[name] == value, kind


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_each_dialect_renders_each_error(dialect: Dialect) -> None:
    for kind in STATUS:
        body = dict(dialect.render_error(SAMPLES[kind], STATUS[kind], "the-id"))
        check_shape(dialect, body)
        assert "{" not in message_of(body), kind
        assert body.get("request_id", "the-id") == body.get("id", "the-id") == "the-id"


@pytest.mark.anyio
@pytest.mark.parametrize("dialect", RANKING, ids=lambda dialect: dialect.name)
async def test_each_dialect_refuses_missing_and_invalid_fields(dialect: Dialect, serve: Serve) -> None:
    missing, invalid = (dialect.status.get(kind, STATUS[kind]) for kind in (errors.MissingField, errors.InvalidField))
    async with serve(HeldRanker()) as client:
        for path, example in requests(dialect):
            for change, status in (({"query": None, "queries": None, "text_1": None}, missing), (WRONG_MODEL, invalid)):
                nested = {"input": example["input"] | change} if isinstance(example.get("input"), dict) else {}
                if nested and "query" not in change:
                    nested = {}
                response = await client.post(path, json={**example, **change, **nested})
                assert response.status_code == status, response.text
                check_shape(dialect, response.json())


@pytest.mark.anyio
@pytest.mark.parametrize("dialect", RANKING, ids=lambda dialect: dialect.name)
async def test_without_a_readable_body_the_path_decides_the_shape(dialect: Dialect, serve: Serve) -> None:
    async with serve(HeldRanker(), api_key=("secret",), max_body_bytes=1000) as client:
        for path, _ in requests(dialect):
            owner = dialect_at(path)
            key = {"Authorization": "Bearer secret"}
            statuses = [
                (await client.post(path), errors.MissingApiKey),
                (await client.post(path, headers={"Authorization": "Bearer x"}), errors.InvalidApiKey),
                (await client.post(path, content=b"{", headers=key), errors.MalformedBody),
                (await client.post(path, content=b'{"query": "\xff"}', headers=key), errors.MalformedBody),
                (await client.post(path, content=b"x" * 1001, headers=key), errors.BodyTooLarge),
                (await client.post(path, content=b"{}", headers=key | PLAIN_TEXT), errors.UnsupportedContent),
                (await client.put(path, headers=key), errors.MethodNotAllowed),
            ]
            for response, kind in statuses:
                assert response.status_code == owner.status.get(kind, STATUS[kind]), (path, kind, response.text)
                check_shape(owner, response.json())


@pytest.mark.anyio
async def test_bedrocks_clients_get_the_name_of_the_exception_before_and_after_the_body(serve: Serve) -> None:
    names = dict.fromkeys((401, 403), "AccessDenied") | {404: "ResourceNotFound", 408: "ModelTimeout"}
    names |= {429: "Throttling", 500: "InternalServer", 503: "ServiceUnavailable"}
    bedrock = next(dialect for dialect in RANKING if dialect.name == "AWS Bedrock")
    key, ranker = {"Authorization": "Bearer secret"}, HeldRanker()
    async with serve(ranker, api_key=("secret",), key_requests_per_minute=2 * len(STATUS)) as client:
        answers = []
        for path, example in requests(bedrock):
            answers += [await client.post(path, json=example), await client.post(path, content=b"{", headers=key)]
            for ranker.error in map(SAMPLES.__getitem__, STATUS):
                answers.append(await client.post(path, json=example, headers=key))
        assert answers[-1].status_code == 429, "of admission, before the body"
        client.state.drain()  # type: ignore[attr-defined]
        answers += [await client.post(path, headers=key) for path, _ in requests(bedrock)]
    assert {answer.status_code for answer in answers} > {400, 401, 404, 408, 413, 429, 500, 503}
    for answer in answers:
        name = names.get(answer.status_code, "Validation")
        assert answer.headers["x-amzn-errortype"] == f"{name}Exception", answer.text
        assert isinstance(answer.json()["message"], str)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "path",  # but those below which every path is a model's
    [
        path
        for dialect in DIALECTS
        for path in dialect.prefixes
        if not path.startswith(("/v1/models/", "/v1/inference"))
    ],
)
async def test_an_unknown_path_under_a_prefix_gets_that_dialects_shape(path: str, serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            response = await client.request(method, f"{path}/nothing/here")
            assert response.status_code == 404
            listed = response.json().get("endpoints", [])
            assert ("POST /v2/rerank" in listed) is dialect_at(path).lists_endpoints
            check_shape(dialect_at(path), response.json())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/api/v1", "DashScope native"),
        ("/api/v1/x", "DashScope native"),
        ("/api/v10/x", "Housekeeping"),
        ("/v1/reranks/", "DashScope compatible"),
        ("/v1/reranksx", "Housekeeping"),
        ("/v1/local/rank", "local-rerank"),
        ("/", "Housekeeping"),
        ("/api/v1/rerank", "OpenRouter"),
        ("/api/v1/reranking", "DashScope native"),
    ],
)
def test_dialect_at_finds_the_longest_prefix(path: str, name: str) -> None:
    assert dialect_at(path).name == name


@pytest.mark.anyio
async def test_an_unexpected_exception_is_an_internal_error_in_the_dialects_shape(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(HeldRanker(error=ZeroDivisionError("a secret"))) as client:  # type: ignore[arg-type]
        body = {"model": "qwen3-rerank", "query": "q", "documents": ["d"]}
        response = await client.post("/compatible-api/v1/reranks", json=body)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "Internal server error!"
    assert "secret" not in response.text
    failures = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(failures) == 1
    assert response.headers["x-request-id"] in failures[0].getMessage()
    assert "ZeroDivisionError" in failures[0].getMessage()
    assert "tests/server/conftest.py" in failures[0].getMessage(), "where it was raised"
    assert "secret" not in caplog.text, "its message may quote the request"


def requests(dialect: Dialect) -> list[tuple[str, dict[str, Any]]]:
    """Each ranking path of a dialect with each of its examples."""
    routes = [route for own, router in ROWS if own is dialect for route in router.routes]
    return [
        (route.path, example)
        for route in routes
        if isinstance(route, DialectRoute)
        for example in route.examples.values()
    ]


def check_shape(dialect: Dialect, body: dict[str, Any]) -> None:
    """The body has exactly the fields of the dialect's error model and, for an unknown path, `endpoints`."""
    shape = strictly(dialect.error_model)
    shape.validate_python({name: value for name, value in body.items() if name != "endpoints"})


@cache
def strictly(model: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(with_config(ConfigDict(extra="forbid", strict=True))(model))
