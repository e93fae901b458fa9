"""16 concurrent clients over real sockets: each gets its own, correct answers."""

from __future__ import annotations

import http.client
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from local_rerank import Reranker, RerankRequest, RerankResult
from local_rerank_server.config import HOSTED_INSTRUCTION
from tests.clients.conftest import KEY

NUM_CLIENTS = 16
NUM_REQUESTS = 4  # of each client
TOLERANCE = 1e-5  # fp32; batches change the order of sums
WORDS = "river bank loan music stone cloud engine paper 模型 排序 garden law fever orbit salt theory".split()

HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}


def make_request(seed: int) -> RerankRequest:
    """Queries and documents of few words, so that requests have texts in common."""
    generator = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, most)))

    documents = tuple(text(20) for _ in range(generator.randint(1, 6)))
    return RerankRequest(query=text(5), documents=documents, instruction=HOSTED_INSTRUCTION)


def post(connection: http.client.HTTPConnection, request: RerankRequest) -> dict[str, Any]:
    body = {
        "model": "qwen3-rerank",
        "input": {"query": request.query, "documents": request.documents},
        "parameters": {"return_documents": True},
    }
    path = "/api/v1/services/rerank/text-rerank/text-rerank"
    connection.request("POST", path, json.dumps(body).encode(), HEADERS)
    response = connection.getresponse()
    answer: dict[str, Any] = json.load(response)
    assert response.status == 200, answer
    assert response.headers["x-request-id"] == answer["request_id"]
    return answer


def run_client(base_url: str, requests: list[RerankRequest]) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=120)
    try:
        return [post(connection, request) for request in requests]
    finally:
        connection.close()


def check(answer: dict[str, Any], expected: RerankResult) -> None:
    results = {item["index"]: item for item in answer["output"]["results"]}
    assert len(results) == len(expected) == len(answer["output"]["results"])
    for item in expected:
        assert results[item.index]["document"] == {"text": item.document}
        assert results[item.index]["relevance_score"] == pytest.approx(item.relevance_score, abs=TOLERANCE)
    scores = [item["relevance_score"] for item in answer["output"]["results"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["usage"]["total_tokens"] == expected.total_tokens


def test_sixteen_concurrent_clients_get_their_own_answers(base_url: str, nano: Reranker) -> None:
    seeds = [range(client * NUM_REQUESTS, (client + 1) * NUM_REQUESTS) for client in range(NUM_CLIENTS)]
    requests = [[make_request(seed) for seed in of_client] for of_client in seeds]
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = list(pool.map(run_client, [base_url] * NUM_CLIENTS, requests))
    expected = nano.rank_batch(request for of_client in requests for request in of_client)
    for answer, result in zip((answer for of_client in answers for answer in of_client), expected, strict=True):
        check(answer, result)
    request_ids = {answer["request_id"] for of_client in answers for answer in of_client}
    assert len(request_ids) == NUM_CLIENTS * NUM_REQUESTS
