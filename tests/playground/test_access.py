"""Accessibility: the keyboard alone, screen readers, dark mode, small screens."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.playground.conftest import Open, rank, shown

WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
Scheme = Literal["light", "dark"]

FOCUSED = """() => {
    const focused = document.activeElement;
    const marked = [focused, focused.closest("label")].filter(Boolean);
    return {
        name: focused.id || focused.textContent.trim() || focused.name,
        visible: marked.some((each) => getComputedStyle(each).outlineStyle === "solid"),
    };
}"""


def tab_to(page: Page, name: str) -> list[str]:
    """Press Tab until that control has the focus; the names on the way, each of which must show its focus."""
    names: list[str] = []
    while name not in names:
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED)
        assert focused["visible"], f"{focused['name']} does not show its focus"
        assert len(names) < 40, f"{name} is not reached: {names}"
        names.append(focused["name"])
    return names


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    on_the_way = tab_to(page, "query")
    assert on_the_way[:2] == ["Skip to the results", "API documentation (new tab)"]
    page.keyboard.type("capital of France")
    assert tab_to(page, "instruction") == ["instruction"]
    page.keyboard.type("Find the answer")
    assert tab_to(page, "compare") == ["compare"]
    page.keyboard.press("Space")
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("Find other cities")
    assert tab_to(page, "documents") == ["compare", "file", "documents"]
    page.keyboard.insert_text("Rome is the capital of Italy\nParis is the capital of France")
    assert tab_to(page, "top-n") == ["in-chunks", "spans", "model", "top-n"]
    page.keyboard.type("1")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".ranking")).to_have_count(2)
    assert shown(page) == ["Paris is the capital of France"] * 2
    tab_to(page, "client")
    page.keyboard.press("ArrowRight")
    assert "dashscope" in page.locator("#snippet").inner_text()
    assert tab_to(page, "copy") == ["copy"]


def test_the_button_and_enter_in_a_one_line_field_rank_too(page: Page) -> None:
    page.get_by_label("Query").fill("q")
    page.get_by_label("Documents", exact=True).fill("a")
    page.get_by_label("Top n").press("Enter")
    assert shown(page) == ["a"]
    page.get_by_label("Documents", exact=True).fill("b")
    page.get_by_role("button", name="Rank").press("Space")
    expect(page.locator(".document")).to_have_text("b")


def test_a_skip_link_leads_to_the_results(page: Page) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "results"


def test_the_page_has_roles_and_labels_for_assistive_technology(page: Page) -> None:
    rank(page, "q", "a\nb")
    shown(page)
    expect(page.get_by_role("status").filter(has_text="2 ranked in")).to_have_count(1)
    item = page.get_by_role("region", name="Results").get_by_role("listitem").first
    assert "relevance" in str(item.text_content())
    assert "log-odds" in str(item.text_content())
    rank(page, " ", "a")
    expect(page.get_by_role("alert").filter(has_text="query is empty")).to_have_count(1)


def faults(page: Page) -> list[dict[str, Any]]:
    """Violations of WCAG and best practices that axe-core finds, contrast included."""
    found = Axe().run(page).response["violations"]
    return [{"rule": each["id"], "where": [node["html"] for node in each["nodes"]]} for each in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault_in_any_state(scheme: Scheme, open_page: Open, base_url: str, locked_url: str) -> None:
    page = open_page(base_url, color_scheme=scheme)
    page.get_by_label("Compare two instructions").check()
    page.get_by_label("Read long documents in chunks").check()
    page.get_by_label("Score the sentences").check()
    rank(page, "q", json.dumps(["A word. " * 200, ""]))
    expect(page.locator("mark.chunk")).to_have_count(2)
    shown(page)
    assert faults(page) == []
    rank(page, "", "a")
    expect(page.locator("#error")).to_be_visible()
    assert faults(page) == []
    assert faults(open_page(locked_url, status="locked", color_scheme=scheme)) == []


def test_the_page_follows_the_readers_colour_scheme(open_page: Open, base_url: str) -> None:
    def brightness(scheme: Scheme) -> tuple[float, float]:
        page = open_page(base_url, color_scheme=scheme)
        read = "name => getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3).map(Number)"
        return sum(page.evaluate(read, "backgroundColor")) / 765, sum(page.evaluate(read, "color")) / 765

    paper, ink = brightness("light")
    assert paper > 0.9
    assert ink < 0.2
    paper, ink = brightness("dark")
    assert paper < 0.15
    assert ink > 0.8


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_nothing_is_wider_than_the_window(viewport: Any, open_page: Open, base_url: str) -> None:
    page = open_page(base_url, viewport=viewport)
    page.get_by_label("Compare two instructions").check()
    rank(page, "q" * 200, "\n".join(["x" * 500, "two words"]))
    expect(page.locator(".ranking")).to_have_count(2)
    shown(page)
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    first, second = (ranking.bounding_box() for ranking in page.locator(".ranking").all())
    assert first is not None
    assert second is not None
    assert (first["y"] == second["y"]) is (viewport is WIDE)
