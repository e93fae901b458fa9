"""`/docs` in the browser: its examples can be sent, and it loads nothing from other servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Locator, Page, expect

from tests.client_servers import DOCUMENTED_KEY
from tests.playground.conftest import Watched


@contextmanager
def opened_docs(chromium: Browser, url: str) -> Iterator[Page]:
    context = chromium.new_context()
    watched = Watched(context, url)
    page = context.new_page()
    page.goto(f"{url}/docs")
    yield page
    context.close()
    watched.check()


def operation(page: Page, path: str) -> Locator:
    """The opened section of a route."""
    section = page.locator(".opblock", has=page.locator(f'[data-path="{path}"]')).first
    section.locator(".opblock-summary-control").click()
    return section


def status_after_sending(section: Locator) -> str:
    section.get_by_role("button", name="Execute").click()
    return section.locator(".live-responses-table .response-col_status").last.inner_text().split()[0]


def test_each_example_of_a_shared_path_can_be_sent(chromium: Browser, base_url: str) -> None:
    with opened_docs(chromium, base_url) as page:
        section = operation(page, "/v1/rerank")
        examples = section.locator(".examples-select-element")
        names = examples.locator("option").all_inner_texts()
        assert {"Jina", "Voyage", "Text Embeddings Inference"} <= set(names)
        for name in names:
            examples.select_option(label=name)
            assert status_after_sending(section) == "200", name
            section.get_by_role("button", name="Clear").click()


def test_a_key_entered_through_authorize_is_sent(chromium: Browser, locked_url: str) -> None:
    with opened_docs(chromium, locked_url) as page:
        section = operation(page, "/v2/rerank")
        assert status_after_sending(section) == "401"
        page.get_by_role("button", name="Authorize").first.click()
        page.locator(".modal-ux input").fill(DOCUMENTED_KEY)
        page.locator(".modal-ux").get_by_role("button", name="Apply credentials").click()
        page.locator(".modal-ux").get_by_role("button", name="Close").click()
        section.get_by_role("button", name="Clear").click()
        expect(section.locator(".live-responses-table")).to_have_count(0)
        assert status_after_sending(section) == "200"
