"""Copied code runs unchanged and gives the ranking that the page shows."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from playwright.sync_api import Page, expect

from local_rerank_server.config import HOSTED_INSTRUCTION
from tests.client_servers import RunPython
from tests.playground.conftest import OTHER_NAME, Open, rank, shown

QUERY = 'it\'s "quoted", costs $HOME `date` \\n 什么?'
DOCUMENTS = [
    "it's one\nof two lines\t",
    'back\\slash "quoted" $(date) costs',
    "\u2028 什么 \U0001f600",
    "${costs} %s {0}",
]
INSTRUCTION = 'Don\'t "retrieve" {anything}'
ENVIRONMENTS = {  # of tests/clients, each with the newest version of the client's package
    "DashScope": "frameworks",
    "OpenAI": "frameworks",
    "Cohere": "sdks",
    "LiteLLM": "sdks",
    "Voyage AI": "sdks",
    "LangChain": "frameworks",
    "LlamaIndex": "frameworks",
}
CARD_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
HOSTED_ROUTES = {"LiteLLM", "LangChain", "LlamaIndex"}  # they send none, to routes that have their own
WITHOUT_INSTRUCTION = {*HOSTED_ROUTES, "Voyage AI"}  # their code says so
CLIPBOARD = ["clipboard-read", "clipboard-write"]


def copied(page: Page, client: str) -> str:
    page.get_by_role("radio", name=client, exact=True).check(force=True)
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("#copied")).to_have_text("Copied")
    text = page.evaluate("navigator.clipboard.readText()")
    assert isinstance(text, str)
    return text


def fill(page: Page, instruction: str) -> None:
    page.get_by_label("Top n").fill("3")
    page.get_by_label("Instruction what").fill(instruction)
    rank(page, QUERY, json.dumps(DOCUMENTS))
    shown(page)


def order_and_scores(page: Page) -> list[tuple[int, float]]:
    indexes = [int(re.findall(r"index (\d+)", text)[0]) for text in page.locator("li .meta").all_inner_texts()]
    scores = [float(str(score.get_attribute("title"))) for score in page.locator("li .score").all()]
    return list(zip(indexes, scores, strict=True))


def test_the_copied_curl_command_gives_the_same_ranking(open_page: Open, base_url: str) -> None:
    page = open_page(base_url, permissions=CLIPBOARD)
    fill(page, INSTRUCTION)
    done = subprocess.run(["sh", "-c", copied(page, "curl")], capture_output=True, check=True, timeout=60)
    results = json.loads(done.stdout)["results"]
    assert [item["document"] for item in results] == [DOCUMENTS[item["index"]] for item in results]
    answered = [(item["index"], item["relevance_score"]) for item in results]
    assert answered == [(index, pytest.approx(score, abs=1e-5)) for index, score in order_and_scores(page)]
    assert len(answered) == 3


def indexes_and_scores(printed: str) -> list[tuple[int, float]]:
    """The lines that a client's code prints."""
    return [(int(index), float(score)) for index, score in re.findall(r"^(\d+) (\S+)$", printed, re.MULTILINE)]


def test_the_copied_code_of_each_sdk_gives_the_same_ranking(
    open_page: Open, base_url: str, run_python: RunPython
) -> None:
    page = open_page(base_url, permissions=CLIPBOARD)
    fill(page, INSTRUCTION)
    codes = {client: copied(page, client) for client in ENVIRONMENTS}
    assert page.get_by_role("radio").count() == len(codes) + 1, "all but curl"
    printed = {client: indexes_and_scores(run_python(ENVIRONMENTS[client], code)) for client, code in codes.items()}
    assert {client for client, code in codes.items() if "cannot send an instruction" in code} == WITHOUT_INSTRUCTION
    for instruction, clients in (
        (INSTRUCTION, codes.keys() - WITHOUT_INSTRUCTION),
        (HOSTED_INSTRUCTION, HOSTED_ROUTES),
        (CARD_INSTRUCTION, WITHOUT_INSTRUCTION - HOSTED_ROUTES),
    ):
        with page.expect_response("**/v1/local/rank"):
            fill(page, instruction)
        expected = order_and_scores(page)
        assert len(expected) == 3
        for client in clients:
            assert printed[client] == [(index, pytest.approx(score, abs=1e-5)) for index, score in expected], client


def test_the_code_follows_the_fields(page: Page) -> None:
    snippet = page.locator("#snippet")
    page.get_by_label("Query").fill("first")
    expect(snippet).to_contain_text('"query": "first"')
    expect(snippet).not_to_contain_text("instruction")
    expect(snippet).not_to_contain_text("Authorization")
    page.get_by_label("Model").select_option("gte-rerank")
    expect(snippet).to_contain_text('"model": "gte-rerank"')
    page.get_by_label("Read long documents in chunks").check()
    expect(snippet).to_contain_text('"long_documents": "chunk"')
    page.get_by_role("radio", name="Cohere").check(force=True)
    expect(snippet).to_contain_text("# Long documents in chunks: local-rerank serve --long-documents chunk")


def test_code_of_many_documents_is_shown_in_part_and_copied_whole(open_page: Open, base_url: str) -> None:
    page = open_page(base_url, permissions=CLIPBOARD)
    documents = [f"document {number} " + "word " * 20 for number in range(300)]
    page.get_by_label("Documents", exact=True).fill(json.dumps(documents))
    expect(page.locator("#snippet")).to_contain_text("more characters; Copy copies all of them")
    assert "document 299" not in page.locator("#snippet").inner_text()
    assert "document 299" in copied(page, "curl")


def test_copying_works_without_the_browsers_clipboard(open_page: Open, base_url: str) -> None:
    """Which plain http from another machine does not have; pasting shows what was copied."""
    url = base_url.replace("127.0.0.1", OTHER_NAME)
    page = open_page(url)
    assert page.evaluate("window.isSecureContext") is False
    page.get_by_label("Query").fill("to copy")
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("#copied")).to_have_text("Copied")
    expect(page.get_by_role("button", name="Copy")).to_be_focused()
    code = page.locator("#snippet").inner_text()
    assert f"curl {url}/v1/local/rank" in code
    page.get_by_label("Query").fill("")
    page.keyboard.press("ControlOrMeta+V")
    assert page.get_by_label("Query").input_value().strip() == code.strip()
