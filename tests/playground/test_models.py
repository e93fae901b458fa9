"""Several models on the page: their states, loading one, and two side by side."""

from __future__ import annotations

import re
import urllib.request

from playwright.sync_api import expect

from local_rerank import Reranker
from tests.client_servers import TWIN
from tests.playground.conftest import KEY, Open, bodies_sent, rank, shown
from tests.playground.test_ranking import DOCUMENTS, QUERY, open_locked


def unload(url: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}".encode().decode("latin-1"), "Content-Type": "application/json"}
    body = f'{{"model": "{TWIN}"}}'.encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/v1/models/unload", body, headers)).close()


def test_a_model_is_loaded_and_compared_with_another(open_page: Open, locked_url: str, nano: Reranker) -> None:
    unload(locked_url)
    page = open_locked(open_page, locked_url)
    names = page.get_by_label("Model", exact=True).locator("option").all_inner_texts()
    assert names[:2] == ["local-rerank-nano (loaded)", f"{TWIN} (on demand)"]
    assert names[2].endswith(", an alias of local-rerank-nano (loaded)")
    expect(page.locator("#state")).to_have_text(re.compile(r"^loaded, [\d.]+ GB$"))
    expect(page.get_by_role("button", name="Load")).to_be_hidden()
    page.get_by_label("Model", exact=True).select_option(TWIN)
    expect(page.locator("#state")).to_have_text(re.compile("^on demand, "))
    page.get_by_role("button", name="Load").click()
    expect(page.locator("#state")).to_have_text(re.compile("^loaded, "))
    expect(page.get_by_label("Model", exact=True)).to_have_value(TWIN)

    unload(locked_url)
    bodies = bodies_sent(page)
    page.get_by_label("Compare two instructions or models").check()
    page.get_by_label("Model", exact=True).select_option("local-rerank-nano")
    expect(page.get_by_label("Compared with")).to_have_value(TWIN)
    rank(page, QUERY, "\n".join(DOCUMENTS), Instruction_what="Find definitions")
    expect(page.locator(".ranking")).to_have_count(2)
    shown(page)
    assert [(body["model"], body["instruction"]) for body in bodies] == [
        ("local-rerank-nano", "Find definitions"), (TWIN, "Find definitions"),
    ]  # fmt: skip
    assert page.locator("h3").all_inner_texts() == ["local-rerank-nano", TWIN]
    expected = [item.document for item in nano.rank(QUERY, DOCUMENTS, instruction="Find definitions")]
    for ranking in page.locator(".ranking").all():
        assert ranking.locator(".document").all_inner_texts() == expected
    assert page.locator(".moved").all_inner_texts() == ["same place"] * 3, "two models have no common log-odds"
    expect(page.locator(f"option[value={TWIN}]").first).to_have_text(f"{TWIN} (loaded)")
