"""The README's screenshot: `make screenshot` retakes it; otherwise the test checks the size of one."""

from __future__ import annotations

import os
from pathlib import Path

from playwright.sync_api import expect

from tests.playground.conftest import Open, shown

KEPT = Path(__file__).parents[2] / "docs" / "playground.png"
MAX_BYTES = 300_000
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_the_screenshot_of_the_readme(open_page: Open, base_url: str, tmp_path: Path) -> None:
    target = Path(os.environ.get("SCREENSHOT", tmp_path / "playground.png"))
    page = open_page(base_url, viewport={"width": 1280, "height": 980}, color_scheme="light")
    page.get_by_role("button", name="Web search").click()
    shown(page)
    expect(page.locator("li")).to_have_count(5)
    page.screenshot(path=target)
    for picture in (target, KEPT):
        content = picture.read_bytes()
        assert content.startswith(SIGNATURE)
        assert len(content) < MAX_BYTES
