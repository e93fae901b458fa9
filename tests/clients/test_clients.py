"""Unchanged clients of the hosted service get from this server what the library says, and errors as they know them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

import pytest

from local_rerank import Reranker
from local_rerank_server.config import HOSTED_INSTRUCTION
from tests.clients.conftest import KEY
from tests.clients.driver import CLIENTS, Answer, Client, Request

SAME = 1e-6  # fp32 on both sides; the JSON between them keeps every digit
ENGLISH = {
    "model": "qwen3-rerank",
    "query": "What is a text reranking model?",
    "documents": [
        "Text reranking models are widely used in search engines and recommender systems "
        "to sort candidates by relevance.",
        "Quantum computing is a frontier field of computer science.",
        "The rise of pretrained language models has brought new advances to text reranking.",
    ],
}
CHINESE = {
    "model": "gte-rerank-v2",
    "query": "什么是重排序模型",
    "documents": [
        "量子计算是计算科学的前沿领域",
        "重排序模型广泛应用于搜索引擎和推荐系统，按相关性对候选文本进行排序",
        "预训练语言模型的发展为重排序模型带来了新的进展 🚀 <|im_end|>",
        "",
    ],
    "top_n": 2,
    "return_documents": True,
    "instruct": "Retrieve semantically similar text.",
}


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A request that the server refuses, and what the caller of a client has to learn."""

    change: Request = field(default_factory=dict)  # of ENGLISH
    key: str = KEY
    status: int
    code: str
    exception: str  # both SDKs that raise have the same names
    exit_status: int  # of the DashScope command line


REFUSALS = {
    "a wrong key": Refusal(
        key="a-wrong-key", status=401, code="InvalidApiKey", exception="AuthenticationError", exit_status=2
    ),
    "an unknown model": Refusal(
        change={"model": "no-such-model"}, status=404, code="ModelNotFound", exception="NotFoundError", exit_status=1
    ),
    "top_n of 0": Refusal(
        change={"top_n": 0}, status=400, code="InvalidParameter", exception="BadRequestError", exit_status=3
    ),
    "a blank query": Refusal(
        change={"query": " "}, status=400, code="InvalidParameter", exception="BadRequestError", exit_status=3
    ),
}


@dataclass(frozen=True, kw_only=True)
class Called:
    """A client and what it answered to everything that is asked of clients here: a process takes seconds to start."""

    client: Client
    english: Answer
    chinese: Answer
    refusals: dict[str, Answer]


@pytest.fixture(scope="module", params=CLIENTS, ids=str)
def called(request: pytest.FixtureRequest, base_url: str) -> Called:
    client: Client = request.param
    refused = [(refusal.key, ENGLISH | refusal.change) for refusal in REFUSALS.values()]
    english, chinese, *refusals = client.call(base_url, [(KEY, ENGLISH), (KEY, CHINESE), *refused])
    return Called(client=client, english=english, chinese=chinese, refusals=dict(zip(REFUSALS, refusals, strict=True)))


def check(answer: Answer, client: Client, request: Request, nano: Reranker) -> None:
    assert "error" not in answer, answer
    sent = client.sendable(request)
    expected = nano.rank(
        sent["query"],
        sent["documents"],
        instruction=sent.get("instruct", HOSTED_INSTRUCTION),
        top_n=sent.get("top_n"),
    )
    assert [item["index"] for item in answer["results"]] == [item.index for item in expected]
    scores = [item["relevance_score"] for item in answer["results"]]
    assert scores == pytest.approx([item.relevance_score for item in expected], abs=SAME)
    if sent.get("return_documents"):
        assert [item["text"] for item in answer["results"]] == [item.document for item in expected]
    if "total_tokens" in client.shows:
        assert answer["total_tokens"] == expected.total_tokens
    if "request_id" in client.shows:
        assert is_uuid(answer["request_id"])


def is_uuid(text: str) -> bool:
    return str(uuid.UUID(text)) == text


def test_a_client_gets_the_order_and_the_scores_of_the_library(called: Called, nano: Reranker) -> None:
    check(called.english, called.client, ENGLISH, nano)


def test_what_a_client_can_ask_for_arrives_and_its_texts_come_back_unchanged(called: Called, nano: Reranker) -> None:
    check(called.chinese, called.client, CHINESE, nano)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_client_hands_on_what_an_error_is(called: Called, name: str) -> None:
    refusal, answer = REFUSALS[name], called.refusals[name]
    if name == "an unknown model" and "model" not in called.client.sends:
        assert "results" in answer  # it sent a name of its own, which is known
        return
    error = answer["error"]
    match called.client.errors:
        case "hidden":  # it reads the results of a response that has none
            assert error["type"] == "AttributeError"
        case "printed":
            assert error["exit_status"] == refusal.exit_status
            assert f"status_code: {refusal.status}, code: {refusal.code}" in error["message"]
        case "returned":
            assert (error["status_code"], error["code"]) == (refusal.status, refusal.code)
            assert error["message"]
            assert is_uuid(error["request_id"])
        case "raised":
            assert error["type"] == refusal.exception
            assert (error["status_code"], error["code"]) == (refusal.status, refusal.code)
            assert error["message"]
            assert is_uuid(error["request_id"])
