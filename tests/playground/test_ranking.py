"""Using the page: write, rank, compare, and see errors."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from local_rerank import Reranker, RerankRequest
from local_rerank.errors import EngineFailure
from tests.client_servers import MAX_DOCUMENT_TOKENS
from tests.playground.conftest import KEY, Open, bodies_sent, rank, shown
from tests.playground.test_access import faults
from tests.playground.test_origins import opened, own_server, statuses_of
from tests.serving import until

QUERY = "What is a text reranking model?"
DOCUMENTS = [
    "Quantum computing is a frontier field of computer science.",
    "Text reranking models sort candidates by relevance.",
    "The rise of pretrained language models has brought new advances to text reranking.",
]
EVIL = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>${pwned}{{pwned}}'


def test_a_ranking_shows_what_the_library_says(page: Page, nano: Reranker) -> None:
    expected = nano.rank(QUERY, DOCUMENTS)
    rank(page, QUERY, "\n".join(DOCUMENTS))
    assert shown(page) == [item.document for item in expected]
    scores = [float(title) for title in titles(page, "li .score")]
    assert scores == pytest.approx([item.relevance_score for item in expected], abs=1e-5)
    log_odds = [float(title.removeprefix("log-odds ")) for title in titles(page, "li .log-odds")]
    assert log_odds == pytest.approx([item.log_odds for item in expected], abs=1e-4)
    assert page.locator("li .meta").all_inner_texts() == [
        f"index {item.index} · {item.num_tokens} tokens" for item in expected
    ]
    facts = page.locator(".facts").inner_text()
    assert f"{expected.total_tokens} in all, {expected.num_computed_tokens} computed" in facts
    assert re.search(r"Time\s+[\d.]+ m?s", facts)
    assert re.search(r"Speed\s+[\d,]+ tokens/s", facts)
    assert re.search(r"Cut\s+nothing", facts)
    assert "3 ranked in" in page.locator("#announcement").inner_text()


def test_the_best_chunk_of_a_long_document_and_its_sentences_are_marked(page: Page, nano: Reranker) -> None:
    filler = "Llamas \U0001f999 eat grass \U0001f469\u200d\U0001f33e in the high Andes of Peru. " * 20
    long = filler + "Paris is the capital of France. " * 6 + filler
    documents = ["A short text. \U0001f600 With two sentences.", long]
    page.get_by_label("Read long documents in chunks").check()
    page.get_by_label("Score the sentences").check()
    rank(page, "capital of France", json.dumps(documents))
    shown(page)
    request = RerankRequest(query="capital of France", documents=tuple(documents), long_documents="chunk", spans=True)
    items = nano.submit(request).result()
    place = next(place for place, item in enumerate(items) if item.index == 1)
    chunk = items[place].best_chunk
    assert chunk is not None
    assert page.locator("mark.chunk").all_text_contents() == [documents[1][chunk.start : chunk.end]]
    for item, shown_item in zip(items, page.locator("li").all(), strict=True):
        sentences = sorted(item.spans or (), key=lambda span: span.start)
        found = shown_item.locator(".sentence")
        assert found.all_text_contents() == [item.document[span.start : span.end] for span in sentences]
        scores = [float(str(each.get_attribute("data-score")).lstrip("<>")) for each in found.all()]
        assert scores == pytest.approx([span.score for span in sentences], abs=1e-4)
    best = page.locator(".chunk .sentence", has_text="Paris is the capital of France.").first
    page.locator("li").nth(place).scroll_into_view_if_needed()
    expect(best).to_be_in_viewport()
    expect(page.locator(".meta").nth(place)).to_contain_text(f"best of {items[place].num_chunks} chunks")
    page.get_by_role("button", name="Show all").click()
    expect(page.locator(".before").first).to_be_visible()
    assert page.locator(".document").nth(place).text_content() == documents[1]


def titles(page: Page, selector: str) -> list[str]:
    return [str(found.get_attribute("title")) for found in page.locator(selector).all()]


def test_a_bar_is_as_long_as_its_score(page: Page) -> None:
    rank(page, QUERY, "\n".join(DOCUMENTS))
    shown(page)
    for score, bar in zip(page.locator("li .score").all(), page.locator("li .bar").all(), strict=True):
        filled, whole = bar.evaluate("b => [parseFloat(getComputedStyle(b).backgroundSize) / 100, b.clientWidth]")
        assert whole > 50
        assert filled == pytest.approx(float(str(score.get_attribute("title"))), abs=1e-3)


def test_the_request_has_the_fields_that_are_not_empty(page: Page) -> None:
    bodies = bodies_sent(page)
    rank(page, QUERY, "\n\n".join(DOCUMENTS))
    shown(page)
    names = page.get_by_label("Model").locator("option").all_inner_texts()
    assert names[0] == "local-rerank-nano"
    assert all(name.endswith(", an alias of local-rerank-nano") for name in names[1:])
    for note in ("#model-note", "#built-in"):
        assert str(page.locator(note).text_content()).startswith("local-rerank-nano")
    page.get_by_label("Model").select_option("qwen3-rerank")
    rank(page, QUERY, json.dumps([DOCUMENTS[0], {"text": "two\nlines"}, {"document": ""}]), Top_n="2")
    expect(page.locator("li")).to_have_count(2)
    page.get_by_label("Instruction what").fill("Find definitions")
    page.keyboard.press("Control+Enter")
    shown(page)
    expect(page.locator("dd").last).to_have_text("local-rerank-nano")
    own = {"query": QUERY, "model": "local-rerank-nano", "stream": True}
    aliased = {
        "query": QUERY,
        "model": "qwen3-rerank",
        "stream": True,
        "top_n": 2,
        "documents": [DOCUMENTS[0], "two\nlines", ""],
    }
    assert bodies == [own | {"documents": DOCUMENTS}, aliased, aliased | {"instruction": "Find definitions"}]


def test_two_instructions_are_compared_on_the_same_documents(page: Page, nano: Reranker) -> None:
    page.get_by_label("Compare two instructions").check()
    page.get_by_label("Second instruction").fill("Retrieve passages about physics")
    rank(page, QUERY, "\n".join(DOCUMENTS), Instruction_what="Find definitions")
    expect(page.locator(".ranking")).to_have_count(2)
    shown(page)
    assert page.locator("h3").all_inner_texts() == ["Find definitions", "Retrieve passages about physics"]
    for ranking, instruction in zip(page.locator(".ranking").all(), page.locator("h3").all_inner_texts(), strict=True):
        expected = nano.rank(QUERY, DOCUMENTS, instruction=instruction)
        assert ranking.locator(".document").all_inner_texts() == [item.document for item in expected]
    first, second = (ranking.locator("li .meta").all_inner_texts() for ranking in page.locator(".ranking").all())
    assert not any("log-odds" in text for text in first)
    assert all(re.search(r"(same place|higher|lower), log-odds", text) for text in second)
    left, right = (ranking.bounding_box() for ranking in page.locator(".ranking").all())
    assert left is not None
    assert right is not None
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    page.get_by_label("Compare two instructions").uncheck()
    expect(page.get_by_label("Second instruction")).to_be_hidden()


def test_a_comparison_shows_which_documents_moved_or_are_new(page: Page) -> None:
    """The instruction hardly changes the built-in model's scores, so that a route reorders the answers."""
    orders = {"first": [0, 1, 2], "second": [2, 3, 1]}

    def answer(route: Route) -> None:
        order = orders[json.loads(route.request.post_data or "")["instruction"]]
        body = json.loads(route.fetch().text().splitlines()[-1])
        by_index = {item["index"]: item | {"probability": 0.25} for item in body["results"]}  # of a calibration
        route.fulfill(json=body | {"results": [by_index[index] for index in order]})

    page.route("**/v1/local/rank", answer)
    page.get_by_label("Compare two instructions").check()
    page.get_by_label("Second instruction").fill("second")
    rank(page, "q", "a\nb\nc\nd", Instruction_what="first")
    expect(page.locator(".ranking")).to_have_count(2)
    assert page.locator("li .meta").first.inner_text().startswith("probability 0.2500 · index ")
    moved = page.locator(".ranking").last.locator(".moved").all_inner_texts()
    assert [text.split(",")[0] for text in moved] == ["↑ 2 higher", "not in the first ranking", "↓ 1 lower"]


BEST = {  # what the built-in model must put first; in the fourth example the right answer comes second
    "Web search": "Hold the small button",
    "Two instructions": "can upset your stomach",
    "网页搜索": "文本排序模型广泛用于",
}


def test_every_example_ranks_all_its_documents_and_is_marked_while_the_fields_hold_it(page: Page) -> None:
    bodies = bodies_sent(page)
    buttons = page.locator("#examples button")
    assert {button.get_attribute("lang") for button in buttons.all()} == {"en", "zh"}
    assert set(BEST) < set(buttons.all_inner_texts())
    for button in buttons.all():
        button.click()
        shown(page)
        results = page.locator(".ranking").first.locator("li")
        expect(results).to_have_count(len(bodies[-1]["documents"]))
        if button.inner_text() in BEST:
            expect(results.first).to_contain_text(BEST[button.inner_text()])
        assert len(bodies[-1]["documents"]) >= 3
        assert pressed(page) == [button.inner_text()]
    assert len(bodies) > buttons.count()  # one of them compares
    for label in ("Query", "Instruction what", "Documents"):
        field = page.get_by_label(label, exact=label != "Instruction what")
        before = field.input_value()
        field.fill(f"{before} x")
        assert pressed(page) == []
        field.fill(before)
        assert len(pressed(page)) == 1
    page.get_by_label("Compare two instructions").check()
    assert pressed(page) == []


def pressed(page: Page) -> list[str]:
    return page.locator("#examples [aria-pressed=true]").all_inner_texts()


def test_a_running_ranking_shows_its_time_and_cancelling_frees_the_server(chromium: Browser) -> None:
    with own_server() as (url, state), opened(chromium, url) as (page, _):
        futures = state.default.ranker.futures  # type: ignore[union-attr]
        expect(page.locator("#server-status")).to_have_attribute("data-status", "ready")
        page.clock.install()
        page.get_by_label("Compare two instructions").check()
        rank(page, "q", "a\nb")
        until(lambda: len(futures) == 2)
        progress, said = page.locator("#progress"), page.locator("#announcement")
        expect(progress).to_be_hidden()  # it would only flicker if the answer came now
        page.clock.run_for(1500)
        expect(progress).to_contain_text("Ranking 2 documents twice")
        expect(page.get_by_role("timer")).to_have_text("1.5 s")
        expect(said).to_have_text("Ranking 2 documents twice …")
        page.clock.run_for(11_000)
        expect(page.get_by_role("timer")).to_have_text(re.compile(r"1\d s"))
        expect(said).to_have_text("Ranking 2 documents twice: 10 s")
        assert faults(page) == []
        assert state.admission.num_requests == 2
        page.get_by_role("button", name="Cancel").press("Enter")
        until(lambda: statuses_of(state)[499] == 2)
        assert state.admission.num_requests == 0
        until(lambda: all(future.cancelled() for future in futures))
        expect(progress).to_have_text(re.compile(r"Cancelled after 1\d s\."))
        expect(page.get_by_role("button", name="Rank")).to_be_focused()
        expect(page.locator("#error")).to_be_hidden()
        page.keyboard.press("Enter")
        until(lambda: len(futures) == 4)
        expect(progress).to_be_hidden()
        page.clock.run_for(500)
        page.get_by_role("button", name="Cancel").focus()
        futures[-1].set_exception(ValueError)
        expect(page.locator("#error")).to_contain_text("internal error")
        expect(progress).to_be_hidden()
        assert page.evaluate("document.activeElement.id") == "results"


def test_a_long_list_fills_as_it_is_scored_and_a_failure_leaves_no_part_of_it(
    chromium: Browser, nano: Reranker
) -> None:
    texts = ["a", "b", "c", "d"]
    result = nano.rank("q", texts)
    by_index = {item.index: item for item in result}
    with own_server() as (url, state), opened(chromium, url) as (page, _):
        ranker: Any = state.default.ranker
        expect(page.locator("#server-status")).to_have_attribute("data-status", "ready")
        for outcome in (result, EngineFailure("the model failed")):
            num_before, shown_now = len(ranker.futures), page.locator(".document")
            rank(page, "q", "\n".join(texts))
            until(lambda num=num_before: len(ranker.futures) > num)  # type: ignore[misc]
            for part in ((0, 1), (2,)):
                ranker.on_scored([by_index[index] for index in part])
                expect(page.locator("#rankings.so-far li")).to_have_count(part[-1] + 1)
                in_order = [item.document for item in result if item.index <= part[-1]]
                assert shown_now.all_inner_texts() == in_order
            expect(page.locator("#results")).to_have_attribute("aria-busy", "true")
            expect(page.locator(".facts")).to_have_count(0)
            if isinstance(outcome, Exception):
                ranker.futures[-1].set_exception(outcome)
                expect(page.locator("#error")).to_contain_text("the model failed")
                expect(page.locator("#error")).to_contain_text("HTTP 500")
                expect(shown_now).to_have_count(0)
            else:
                ranker.futures[-1].set_result(outcome)
                assert shown(page) == [item.document for item in result]
                expect(page.locator(".facts")).to_have_count(1)


def test_a_long_document_is_collapsed_until_expanded(page: Page) -> None:
    rank(page, QUERY, json.dumps(["word " * 400, "short"]))
    shown(page)
    long = page.locator(".document").filter(has_text="word")
    before = long.evaluate("d => d.clientHeight")
    page.get_by_role("button", name="Show all").click()
    assert long.evaluate("d => d.clientHeight") > 2 * before
    page.get_by_role("button", name="Show less").click()
    assert long.evaluate("d => d.clientHeight") == before


def test_truncation_is_shown(open_page: Open, locked_url: str) -> None:
    page = open_locked(open_page, locked_url)
    rank(page, QUERY, f"{'long ' * 2 * MAX_DOCUMENT_TOKENS}\nshort")
    shown(page)
    cut = page.locator("li").filter(has_text="long").locator(".meta").inner_text()
    assert re.search(rf"{MAX_DOCUMENT_TOKENS} tokens · \d+ tokens cut off", cut)
    assert re.search(r"Cut\s+1 document", page.locator(".facts").inner_text())


def open_locked(open_page: Open, url: str) -> Page:
    page = open_page(url, status="locked")
    page.get_by_label("API key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#server-status")).to_have_attribute("data-status", "ready")
    return page


def test_a_key_is_requested_and_kept_in_memory_alone(open_page: Open, locked_url: str) -> None:
    page = open_page(locked_url, status="locked")
    expect(page.locator("#key-message")).to_have_text("This server needs an API key.")
    expect(page.get_by_label("API key", exact=True)).to_be_focused()
    rank(page, QUERY, "\n".join(DOCUMENTS))  # is refused, and done once there is a key
    page.get_by_label("API key", exact=True).fill("wrong")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#key-message")).to_have_text("The API key is wrong.")
    page.get_by_label("API key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    assert len(shown(page)) == 3
    expect(page.locator("#key-form")).to_be_hidden()
    assert "Authorization: Bearer YOUR_KEY" in page.locator("#snippet").inner_text()
    with page.context.expect_page() as opened_page:  # in this tab it would lose the key and the fields
        page.get_by_role("link", name="API documentation").click()
    expect(opened_page.value.get_by_text("press Authorize")).to_be_visible()
    opened_page.value.close()
    page.get_by_role("button", name="Rank").click()
    assert len(shown(page)) == 3
    assert KEY not in page.content()
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    assert page.context.cookies() == []
    page.reload()
    expect(page.locator("#key-message")).to_have_text("This server needs an API key.")


REFUSED = [  # query, documents, top n, the server's message, the field that it concerns
    (" ", "a", "", "query is empty; it must hold some text", "Query"),
    ("q", "", "", "0 documents; at least 1 is needed and at most 1000 are taken", "Documents"),
    ("q", json.dumps(["d"] * 1001), "", "1001 documents; at least 1 is needed and at most 1000", "Documents"),
    ("q", '["a", 5]', "", "documents.1: Input should be a valid string", "Documents"),
    ("q", "a", "0", "top_n is 0; it must be at least 1", "Top n"),
    ("q", "a", "2.5", "top_n: a whole number is expected, not 2.5", "Top n"),
    ("q", "a", "two", "top_n: a whole number is expected, not", "Top n"),
]


def test_an_error_is_shown_in_the_servers_words_and_marks_its_field(page: Page) -> None:
    for query, documents, top_n, message, field in REFUSED:
        rank(page, query, documents, Top_n=top_n)
        expect(page.locator("#error")).to_contain_text(message)
        expect(page.locator("#error")).to_contain_text("HTTP 400")
        marked = page.get_by_label(field, exact=True)
        expect(marked).to_have_attribute("aria-invalid", "true")
        expect(marked).to_be_focused()
        expect(marked).to_have_accessible_description(re.compile(re.escape(message)))
        assert page.locator("[aria-invalid]").count() == 1
        rank(page, "q", "a", Top_n="")
        assert shown(page) == ["a"]
        expect(page.locator("#error")).to_be_hidden()
        assert page.locator("[aria-invalid]").count() == 0


def test_a_stopped_server_is_distinguished_from_a_refusal(page: Page) -> None:
    page.context.set_offline(True)
    rank(page, "q", "a")
    expect(page.locator("#error")).to_contain_text("The server does not respond. Is it still running?")
    page.context.set_offline(False)
    page.get_by_role("button", name="Rank").click()
    assert shown(page) == ["a"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"status": 502, "body": "<h1>Bad gateway</h1>"}, "The response is not JSON: <h1>Bad gateway</h1>"),
        (
            {
                "status": 429,
                "headers": {"retry-after": "3"},
                "json": {"error": {"message": "full", "type": "Overloaded"}},
            },
            "full Try again in 3 s.",
        ),
    ],
    ids=["proxy", "overload"],
)
def test_errors_of_a_proxy_or_an_overloaded_server_are_shown(answer: dict[str, Any], message: str, page: Page) -> None:
    page.route("**/v1/local/rank", lambda route: route.fulfill(**answer))
    rank(page, "q", "a")
    expect(page.locator("#error")).to_contain_text(message)


def test_the_page_waits_for_a_server_that_is_loading(open_page: Open, base_url: str) -> None:
    answers = iter(["loading"])

    def ready(route: Route) -> None:
        status = next(answers, None)
        route.fulfill(status=503, json={"status": status}) if status else route.continue_()

    page = open_page(base_url, routes={"**/ready": ready}, status="loading")
    expect(page.locator("#server-status")).to_have_text("loading the model …")
    assert '"model": "qwen3-rerank"' in page.locator("#snippet").inner_text()
    expect(page.get_by_label("Model")).to_have_value("qwen3-rerank")
    expect(page.locator("#server-status")).to_have_text("local-rerank-nano")


def test_no_text_becomes_markup(page: Page) -> None:
    page.get_by_label("Compare two instructions").check()
    page.get_by_label("Second instruction").fill(EVIL)
    rank(page, EVIL, json.dumps([EVIL, "harmless"]), Instruction_what=EVIL)
    assert EVIL in shown(page)
    assert page.locator("h3").all_inner_texts() == [EVIL, EVIL]
    rank(page, EVIL, f'["{"x"}", 1]', Top_n=EVIL)
    expect(page.locator("#error")).to_be_visible()
    assert page.locator("img").count() == 1  # the page's own
    assert page.locator("script").count() == 1
    assert page.evaluate("window.pwned") is None
