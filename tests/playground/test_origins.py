"""Web pages of other servers against this one, in a real browser: nothing is ranked, and nothing can be read."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlsplit

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect

from local_rerank_server.app import create_app
from local_rerank_server.config import ServerConfig
from local_rerank_server.keys import ApiKeys
from local_rerank_server.state import ServerState
from tests.playground.conftest import EVIL_NAME, rank, shown
from tests.server.conftest import HeldRanker
from tests.serving import until

ATTACKS = """async url => {
    const json = JSON.stringify({query: "q", documents: ["stolen"]});
    const target = url + "/v1/local/rank", blob = new Blob([json]);
    const tried = promise => promise.then(answer => answer.status, error => error.name);
    const form = document.createElement("form"), frame = document.createElement("iframe"), img = new Image();
    frame.name = "answer";
    Object.assign(form, {method: "POST", action: target, target: "answer", enctype: "text/plain"});
    form.innerHTML = `<input name='{"query":"q","documents":["stolen"],"x":"' value='"}'>`;
    document.body.append(frame, form);
    const loaded = new Promise(done => img.onload = img.onerror = event => done(event.type));
    img.src = url + "/playground/icon.svg";
    form.submit();
    navigator.sendBeacon(target, blob);
    return [
        await tried(fetch(target, {method: "POST", mode: "no-cors", body: blob})),
        await tried(fetch(target, {method: "POST", body: blob})),
        await tried(fetch(target, {method: "POST", body: json, headers: {"content-type": "application/json"}})),
        await tried(fetch(url + "/v1/models")),
        await tried(fetch(url + "/v1/models", {mode: "no-cors"})),
        await loaded,
    ];
}"""
READ = """async () => {
    const answers = [await fetch("/v1/models"), await fetch("/v1/local/rank", {method: "POST", body: "{}"})];
    return answers.map(answer => answer.status);
}"""
EVIL_PAGE = "<title>evil</title><body></body>"


def statuses_of(state: ServerState) -> Counter[int]:
    """How many requests the server has answered with each status."""
    found = re.findall(r'^local_rerank_requests_total{.*status="(\d+)".*} (\S+)', state.render_metrics().decode(), re.M)
    counts: Counter[int] = Counter()
    for status, number in found:
        counts[int(status)] += int(float(number))
    return counts


@contextmanager
def page_of_another_server() -> Iterator[int]:
    """The port of a server whose one page is empty."""

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(EVIL_PAGE.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@contextmanager
def opened(chromium: Browser, url: str) -> Iterator[tuple[Page, list[tuple[str, int]]]]:
    """A page, and method and status of each response that it gets."""
    with chromium.new_context() as context:
        page = context.new_page()
        answers: list[tuple[str, int]] = []
        context.on("response", lambda response: answers.append((response.request.method, response.status)))
        page.goto(url)
        yield page, answers


@contextmanager
def own_server(root_path: str = "") -> Iterator[tuple[str, ServerState]]:
    """The address of a server of this process whose model answers nothing, and the server's state."""
    state = ServerState(ServerConfig(root_path=root_path))
    state.serve(HeldRanker())  # type: ignore[arg-type]
    app = create_app(state, ApiKeys({}))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}{root_path}", state
    server.should_exit = server.force_exit = True
    thread.join()


@pytest.mark.parametrize("name", ["127.0.0.1", EVIL_NAME])
def test_a_page_of_another_origin_can_neither_rank_nor_read(name: str, chromium: Browser) -> None:
    with own_server() as (url, state), page_of_another_server() as port:
        with opened(chromium, f"http://{name}:{port}/") as (page, _):
            assert page.evaluate(ATTACKS, url) == ["TypeError"] * 5 + ["error"]
            until(lambda: sum(statuses_of(state).values()) == 8)  # the form and the beacon report nothing to the page
        assert statuses_of(state) == {403: 8}
        assert not state.default.ranker.futures  # type: ignore[union-attr]


def test_a_page_whose_name_was_rebound_to_this_machine_gets_nothing(chromium: Browser, base_url: str) -> None:
    rebound = base_url.replace("127.0.0.1", EVIL_NAME)
    with opened(chromium, rebound) as (page, answers):
        page.route(rebound, lambda route: route.fulfill(body=EVIL_PAGE, content_type="text/html"))
        page.goto(rebound)
        assert page.title() == "evil", "as served before the name was rebound"
        del answers[:]
        assert page.evaluate(READ) == [421, 421]
        assert answers == [("GET", 421), ("POST", 421)]


def test_a_link_on_another_page_opens_the_page(chromium: Browser, base_url: str) -> None:
    with page_of_another_server() as port, opened(chromium, f"http://{EVIL_NAME}:{port}/") as (page, _):
        page.evaluate("url => { location.href = url }", base_url)
        expect(page.locator("#server-status")).to_have_attribute("data-status", "ready")


def test_the_servers_own_pages_work_under_localhost(chromium: Browser, base_url: str) -> None:
    url = f"http://localhost:{urlsplit(base_url).port}"
    with opened(chromium, url) as (page, answers):
        rank(page, "q", "a\nb")
        assert sorted(shown(page)) == ["a", "b"]
        assert {status for _, status in answers} == {200}


def test_the_servers_own_pages_work_below_a_root_path(chromium: Browser) -> None:
    with own_server("/rerank") as (url, _), opened(chromium, url) as (page, answers):
        expect(page.locator("#server-status")).to_have_attribute("data-status", "ready")
        assert page.evaluate("fetch('v1/local/rank', {method: 'POST'}).then(each => each.status)") == 400
        page.goto(f"{url}/docs/")
        expect(page.locator(".opblock").first).to_be_visible()
        assert {status for _, status in answers} == {200, 307, 400}
