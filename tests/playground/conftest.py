"""A headless Chromium and two real servers; every page that a test opens is checked for errors and requests."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, Route, expect, sync_playwright

from tests.client_servers import OTHER_NAME  # resolves to this machine; browsers offer no clipboard for it
from tests.client_servers import TYPED_KEY as KEY

__all__ = ["KEY", "OTHER_NAME"]

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "the tests of the page need Chromium: apt-get install --no-install-recommends chromium"
QUIET = [  # no requests other than the page's
    "--no-sandbox",  # root has no sandbox
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-features=LocalNetworkAccessChecks",  # so that requests of other pages reach the server
]
EVIL_NAME = "evil.test"  # resolves to this machine, as an attacker's name server can arrange
expect.set_options(timeout=60_000)


@pytest.fixture(scope="package")  # no other event loop can run in this thread meanwhile
def chromium() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None and os.environ.get("CI"):
        pytest.fail(MISSING)
    if program is None:
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        rules = f"--host-resolver-rules=MAP {OTHER_NAME} 127.0.0.1,MAP {EVIL_NAME} 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=program, args=[*QUIET, rules])
        yield browser
        browser.close()


@pytest.fixture
def base_url(client_servers: tuple[str, str]) -> str:
    """A server that requires no key and has the dtype of the fixture `nano`."""
    return client_servers[1]


@pytest.fixture
def locked_url(client_servers: tuple[str, str]) -> str:
    """A server that requires `KEY` and truncates long documents."""
    return client_servers[0]


@dataclass
class Watched:
    """The requests and errors of a browser context, from now until `check`."""

    context: BrowserContext
    origin: str
    requests: list[Request] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.listeners: dict[Any, Any] = {
            "request": lambda request: self.requests.append(request),
            "weberror": lambda error: self.faults.append(str(error.error)),
            "console": lambda line: self.faults.append(line.text) if is_fault(line) else None,
        }
        for event, listener in self.listeners.items():
            self.context.on(event, listener)

    def check(self) -> None:
        for event, listener in self.listeners.items():
            self.context.remove_listener(event, listener)
        assert self.faults == []
        asked = {"{0.scheme}://{0.netloc}".format(urlsplit(request.url)) for request in self.requests}
        assert asked == {self.origin}


def is_fault(line: ConsoleMessage) -> bool:
    """Whether a console line is more than the browser's note about a status or network that a test provokes."""
    return not line.text.startswith("Failed to load resource: ")


Open = Callable[..., Page]


@pytest.fixture(scope="package")
def context(chromium: Browser) -> Iterator[BrowserContext]:
    """The profile of all tests that need no other one: the page keeps nothing in it."""
    with chromium.new_context() as context:
        yield context


@pytest.fixture
def open_page(chromium: Browser, context: BrowserContext) -> Iterator[Open]:
    """`open_page(url, **context options)`: the page, when it shows `status` for its server."""
    with ExitStack() as stack:

        def open_(
            url: str, *, status: str = "ready", routes: Mapping[str, Callable[[Route], None]] = {}, **options: Any
        ) -> Page:
            used = stack.enter_context(chromium.new_context(**options)) if options else context
            stack.callback(Watched(used, url).check)
            page = stack.enter_context(used.new_page())
            for pattern, handler in routes.items():
                page.route(pattern, handler)
            page.goto(url)
            expect(page.locator("#server-status")).to_have_attribute("data-status", status)
            return page

        yield open_


@pytest.fixture
def page(open_page: Open, base_url: str) -> Page:
    return open_page(base_url)


def rank(page: Page, query: str, documents: str, **fields: str) -> None:
    """Fill in the form and press the button; `fields` are further fields by label."""
    page.get_by_label("Query", exact=True).fill(query)
    page.get_by_label("Documents", exact=True).fill(documents)
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " ")).fill(value)
    page.get_by_role("button", name="Rank").click()


def shown(page: Page) -> list[str]:
    """Wait for the ranking; its documents, best first."""
    expect(page.locator("#results")).not_to_have_attribute("aria-busy", "true")
    expect(page.locator(".ranking").first).to_be_visible()
    return page.locator(".document").all_inner_texts()


def bodies_sent(page: Page) -> list[dict[str, Any]]:
    """The bodies of ranking requests that the page sends from now on."""
    bodies: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.url.endswith("/v1/local/rank"):
            bodies.append(json.loads(request.post_data or ""))

    page.on("request", note)
    return bodies
