"""curl with the requests of the README and of the hosted documentation."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from local_rerank import Reranker
from local_rerank_server.config import HOSTED_INSTRUCTION
from tests.clients.conftest import KEY
from tests.clients.test_clients import ENGLISH, SAME

QUERY, DOCUMENTS = ENGLISH["query"], ENGLISH["documents"]
QUANTUM = 1  # the document that is about something else
INSTRUCT = "Retrieve semantically similar text."


def curl(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST with curl; the JSON body of a 200 answer."""
    command = ["curl", "--silent", "--show-error", "--fail-with-body", url]
    command += ["--header", "Content-Type: application/json", "--header", f"Authorization: Bearer {KEY}"]
    done = subprocess.run(
        [*command, "--data", json.dumps(body, ensure_ascii=False), "--write-out", "\n%{http_code} %{content_type}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    text, _, status = done.stdout.rpartition("\n")
    assert status == "200 application/json"
    answer: dict[str, Any] = json.loads(text)
    return answer


def test_the_native_route_answers_curl_key_by_key(base_url: str, nano: Reranker) -> None:
    answer = curl(
        f"{base_url}/api/v1/services/rerank/text-rerank/text-rerank",
        {
            "model": "qwen3-rerank",
            "input": {"query": QUERY, "documents": DOCUMENTS},
            "parameters": {"return_documents": True, "top_n": 5},
        },
    )
    expected = nano.rank(QUERY, DOCUMENTS, instruction=HOSTED_INSTRUCTION)
    assert list(answer) == ["output", "usage", "request_id"]
    assert answer["usage"] == {"total_tokens": expected.total_tokens}
    assert answer["output"] == {
        "results": [
            {
                "document": {"text": item.document},
                "index": item.index,
                "relevance_score": pytest.approx(item.relevance_score, abs=SAME),
            }
            for item in expected
        ]
    }


def test_the_compatible_route_answers_curl_key_by_key(base_url: str, nano: Reranker) -> None:
    answer = curl(
        f"{base_url}/compatible-api/v1/reranks",
        {"model": "qwen3-rerank", "query": QUERY, "documents": DOCUMENTS, "top_n": 2, "instruct": INSTRUCT},
    )
    expected = nano.rank(QUERY, DOCUMENTS, instruction=INSTRUCT, top_n=2)
    assert list(answer) == ["object", "results", "model", "id", "usage"]
    assert (answer["object"], answer["model"]) == ("list", "qwen3-rerank")
    assert answer["usage"] == {"total_tokens": expected.total_tokens}
    assert answer["results"] == [
        {"index": item.index, "relevance_score": pytest.approx(item.relevance_score, abs=SAME)} for item in expected
    ]


def test_an_unrelated_sentence_comes_last_with_a_clear_gap(base_url: str) -> None:
    answer = curl(f"{base_url}/v1/reranks", {"model": "qwen3-rerank", "query": QUERY, "documents": DOCUMENTS})
    scores = {item["index"]: item["relevance_score"] for item in answer["results"]}
    off_topic = scores.pop(QUANTUM)
    assert off_topic < min(scores.values()) - 0.2
