"""Unmodified clients of each API get the library's scores from this server, and the errors that they expect."""

from __future__ import annotations

import shutil
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from local_rerank import Reranker
from tests.client_servers import TWIN, RunPython
from tests.clients.conftest import KEY
from tests.clients.driver import CLIENTS, Answer, Client, Request, answer

SAME = 1e-6  # of scores, fp32 on both sides; the JSON between them keeps every digit
SAME_LOG_ODDS = 4e-5  # a score moves by at most a quarter of its log-odds; 6e-6 at log-odds of 5 was seen
ENGLISH = {
    "model": "qwen3-rerank",
    "query": "What is a text reranking model?",
    "documents": [
        "Text reranking models are widely used in search engines and recommender systems "
        "to sort candidates by relevance.",
        "Quantum computing is a frontier field of computer science.",
        "The rise of pretrained language models has brought new advances to text reranking.",
    ],
    "top_n": 3,  # as many as there are
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
    """A request that the server refuses, and what the client's caller sees."""

    change: Request = field(default_factory=dict)  # of ENGLISH
    key: str = KEY
    status: int
    code: str  # on the routes of DashScope
    exception: str  # both SDKs of those routes that raise have the same names
    exit_status: int  # of the DashScope command line
    words: str = ""  # on the other routes, where such a request is refused


REFUSALS = {
    "a wrong key": Refusal(
        key="a-wrong-key",
        status=401,
        code="InvalidApiKey",
        exception="AuthenticationError",
        exit_status=2,
        words="the API key is wrong",
    ),
    "an unknown model": Refusal(
        change={"model": "no-such-model"}, status=404, code="ModelNotFound", exception="NotFoundError", exit_status=1
    ),
    "top_n of 0": Refusal(
        change={"top_n": 0}, status=400, code="InvalidParameter", exception="BadRequestError", exit_status=3
    ),
    "a blank query": Refusal(
        change={"query": " "},
        status=400,
        code="InvalidParameter",
        exception="BadRequestError",
        exit_status=3,
        words="is empty; it must hold some text",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Called:
    """A client and its answers to all of `ASKED`, together, because importing it takes seconds."""

    client: Client
    english: Answer
    chinese: Answer
    refusals: dict[str, Answer]


ASKED = [(KEY, ENGLISH), (KEY, CHINESE), *((refusal.key, ENGLISH | refusal.change) for refusal in REFUSALS.values())]


@pytest.fixture(scope="session")
def call_script(base_url: str, open_url: str, run_python: RunPython) -> Callable[[str, str], dict[str, list[Answer]]]:
    """The answers of each client of a script to all of `ASKED`, from one process for the script."""
    urls = {"keyed": base_url, "open": open_url}
    called: dict[tuple[str, str], dict[str, list[Answer]]] = {}

    def call(environment: str, script: str) -> dict[str, list[Answer]]:
        if (environment, script) not in called:
            clients = [client for client in CLIENTS if (client.environment, client.script) == (environment, script)]
            jobs = [client.job(urls[client.server], key, request) for client in clients for key, request in ASKED]
            answers = answer(environment, script, jobs, run_python)
            count = len(ASKED)
            called[environment, script] = {
                str(client): answers[place * count : (place + 1) * count] for place, client in enumerate(clients)
            }
        return called[environment, script]

    return call


@pytest.fixture(params=CLIENTS, ids=str)
def called(request: pytest.FixtureRequest, call_script: Callable[[str, str], dict[str, list[Answer]]]) -> Called:
    client: Client = request.param
    if client.environment == "node" and shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    english, chinese, *refusals = call_script(client.environment, client.script)[str(client)]
    return Called(client=client, english=english, chinese=chinese, refusals=dict(zip(REFUSALS, refusals, strict=True)))


def check(answer: Answer, client: Client, request: Request, nano: Reranker) -> None:
    assert "error" not in answer, answer
    sent = client.sendable(request)
    expected = nano.rank(
        sent["query"],
        sent["documents"],
        instruction=sent.get("instruct", client.default_instruction),
        top_n=sent.get("top_n"),
    )
    assert [item["index"] for item in answer["results"]] == [item.index for item in expected]
    scores = [item["relevance_score"] for item in answer["results"]]
    shown = [item.log_odds if client.shows_log_odds else item.relevance_score for item in expected]
    assert scores == pytest.approx(shown, abs=SAME_LOG_ODDS if client.shows_log_odds else SAME)
    if sent.get("return_documents"):
        assert [item["text"] for item in answer["results"]] == [item.document for item in expected]
    if "total_tokens" in client.shows:
        assert answer["total_tokens"] == expected.total_tokens
    if "request_id" in client.shows:
        assert is_uuid(answer["request_id"])


def is_uuid(text: str) -> bool:
    return str(uuid.UUID(text)) == text


def test_a_client_gets_the_librarys_ranking_and_its_texts_unchanged(called: Called, nano: Reranker) -> None:
    check(called.english, called.client, ENGLISH, nano)
    check(called.chinese, called.client, CHINESE, nano)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_client_reports_what_an_error_is(called: Called, name: str) -> None:
    refusal, answer = REFUSALS[name], called.refusals[name]
    if not called.client.hosted:
        check_other(called.client, name, answer)
        return
    if name == "an unknown model" and "model" not in called.client.sends:
        assert "results" in answer  # it sent a name of its own, which is known
        return
    error = answer["error"]
    match called.client.errors:
        case "hidden":  # the client reads results that the response does not have
            assert error["type"] == "AttributeError"
        case "printed":
            assert error["exit_status"] == refusal.exit_status
            assert f"status_code: {refusal.status}, code: {refusal.code}" in error["message"]
        case "returned" | "raised":
            assert error.get("type") == (refusal.exception if called.client.errors == "raised" else None)
            assert (error["status_code"], error["code"]) == (refusal.status, refusal.code)
            assert error["message"]
            assert is_uuid(error["request_id"])


def check_other(client: Client, name: str, answer: Answer) -> None:
    """Other dialects accept any model, and most accept a `top_n` of 0."""
    refusal = REFUSALS[name]
    if client.errors == "hidden" and refusal.words:
        assert "error" in answer
    elif name in client.raises:
        error = answer["error"]
        assert error["type"] == client.raises[name]
        assert error.get("http_status", error.get("status_code", refusal.status)) in (refusal.status, None)
        if client.shows_words:
            assert refusal.words in f"{error.get('text')} {error.get('message')}"
    elif name == "an unknown model" and not client.script.startswith("litellm"):
        assert "results" in answer, answer


def test_clients_pick_a_model_by_its_name(base_url: str, run_python: RunPython, nano: Reranker) -> None:
    picked = [ENGLISH | {"model": TWIN}] * 2
    for number, script in enumerate(("cohere_sdk.py", "dashscope_sdk.py"), start=1):
        client = next(client for client in CLIENTS if client.script == script)
        jobs = [client.job(base_url, KEY, request) for request in picked]
        for got in answer(client.environment, script, jobs, run_python):
            check(got, client, ENGLISH, nano)
        page = urllib.request.Request(f"{base_url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(page) as metrics:
            assert f'request_documents_count{{model="{TWIN}"}} {2.0 * number}' in metrics.read().decode()
