"""The README's screenshot: `make screenshot` retakes it; otherwise the test shows that one can be taken."""

from __future__ import annotations

import os
from pathlib import Path

from playwright.sync_api import expect

from tests.playground.conftest import Open, shown


def test_the_screenshot_of_the_readme(open_page: Open, base_url: str, tmp_path: Path) -> None:
    target = Path(os.environ.get("SCREENSHOT", tmp_path / "playground.png"))
    page = open_page(base_url, viewport={"width": 1280, "height": 980}, color_scheme="light")
    for _ in range(2):  # the first request also warms up the model, so that its time is not typical
        page.get_by_role("button", name="Web search").click()
        shown(page)
    expect(page.locator("li")).to_have_count(5)
    page.screenshot(path=target)
    assert target.stat().st_size < 300_000
