"""Golden requests and responses: status, keys, their order, and texts.

`$name` in a response stands for a value of the library's result, so the files contain no scores of a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient, Response

from local_rerank import RankedDocument, Reranker, RerankRequest, RerankResult
from local_rerank_server.dialects import ROWS
from tests.server.conftest import Serve

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(GOLDEN.glob("*/*.json"))
MEASURED = ("$ms", "$created")

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
async def test_golden_request_gets_golden_response(path: Path, serve: Serve, tiny_reranker: Reranker) -> None:
    case = json.loads(path.read_text(encoding="utf-8"))
    async with serve(tiny_reranker) as client:
        response = await send(client, case["request"])
    assert response.status_code == case["response"]["status"], response.text
    assert response.headers["content-type"] == "application/json"
    values: dict[str, Any] = {"model": tiny_reranker.model_id, "request_id": response.headers["x-request-id"]}
    result = rank(tiny_reranker, case["library"]) if "library" in case else None
    if result is not None:
        in_order = sorted(result, key=lambda item: item.index)
        values["scores"] = [item.relevance_score for item in in_order]
        ours = {name: response.headers[name] for name in ("x-rerank-model", "x-rerank-status")}
        assert ours == {"x-rerank-model": tiny_reranker.model_id, "x-rerank-status": result.status}
    expected = fill(case["response"]["body"], values, result)
    assert masked(response.json()) == masked(expected)  # compared as text, which includes the order of keys
    assert list(numbers(response.json())) == pytest.approx(list(numbers(expected)), rel=1e-5)


def test_every_dialect_has_golden_files() -> None:
    modules = {router.routes[0].endpoint.__module__.rpartition(".")[2] for _, router in ROWS}  # type: ignore[attr-defined]
    assert {path.parent.name for path in CASES} == modules - {"_files", "docs"}, "tests/playground tests the pages"


async def send(client: AsyncClient, request: dict[str, Any]) -> Response:
    headers = {"Content-Type": "application/json"} | request.get("headers", {})
    content = request["raw"] if "raw" in request else json.dumps(request["body"]) if "body" in request else None
    return await client.request(request["method"], request["path"], content=content, headers=headers)


def rank(reranker: Reranker, arguments: dict[str, Any]) -> RerankResult:
    """`pairs` instead of query and documents gives one document a query, in their order."""
    if "pairs" in arguments:
        return one_by_one(reranker, arguments["pairs"])
    documents = tuple(arguments["documents"])
    return reranker.submit(RerankRequest(**{**arguments, "documents": documents})).result(timeout=60)


def one_by_one(reranker: Reranker, pairs: list[tuple[str, str]]) -> RerankResult:
    results = [reranker.rank(query, [document]) for query, document in pairs]
    items = tuple(replace(result[0], index=index) for index, result in enumerate(results))
    return replace(results[0], results=items, total_tokens=sum(result.total_tokens for result in results))


def fill(template: Any, values: dict[str, Any], result: RerankResult | None) -> Any:
    """The template with every `$name` replaced; an item with `$index` or `$document` stands for each document."""
    if isinstance(template, dict):
        return {key: fill(value, values, result) for key, value in template.items()}
    if isinstance(template, list) and result is not None and len(template) == 1 and is_one_document(template[0]):
        return [fill(template[0], values | fields(item), result) for item in result]
    if isinstance(template, list):
        return [fill(item, values, result) for item in template]
    if isinstance(template, str) and template.endswith("-$request_id"):
        return template.replace("$request_id", values["request_id"])
    if not isinstance(template, str) or not template.startswith("$") or template in MEASURED:
        return template
    name = template[1:]
    return values[name] if name in values else getattr(result, name)


def is_one_document(template: dict[str, Any]) -> bool:
    return any(value in ("$index", "$document") for value in template.values())


def fields(item: RankedDocument) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(item))))


def masked(body: Any) -> str:
    """The body as text; what is measured or computed in floating point counts by its place only."""
    return json.dumps(mask(body), ensure_ascii=False, indent=1)


def mask(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: mask(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [mask(inner) for inner in value]
    return "a number" if isinstance(value, float) or value in MEASURED or key == "created" else value


def numbers(value: Any, key: str = "") -> Iterator[float]:
    """Every floating-point number but the measured ones, in order."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, key)
    elif isinstance(value, float) and not key.endswith(("_ms", "_latency")):
        yield value
