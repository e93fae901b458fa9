"""Serving the files of the playground; tests/playground runs them in a browser."""

from __future__ import annotations

import re

import pytest

from local_rerank_server.dialects._files import MEDIA_TYPES
from local_rerank_server.dialects.playground import FILES, FOLDER
from tests.server.conftest import HeldRanker, Serve

pytestmark = pytest.mark.anyio
OWN_ASSETS = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "


async def test_every_file_is_served_without_a_key_and_with_the_policy(serve: Serve) -> None:
    async with serve(HeldRanker(), api_key=("secret",)) as client:
        for path, file in FILES.items():
            answer, head = await client.get(path), await client.head(path)
            assert answer.content == file.read_bytes()
            assert answer.headers["content-type"].split(";")[0] == MEDIA_TYPES[file.suffix]
            policy = answer.headers["content-security-policy"]
            assert policy.startswith(OWN_ASSETS)
            assert "require-trusted-types-for 'script'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert (head.status_code, head.content) == (200, b"")
        assert (await client.get("/playground/other.js")).status_code == 401
        assert (await client.get("/playground/../errors.py")).status_code == 401


async def test_every_file_of_the_folder_is_served(serve: Serve) -> None:
    assert set(FILES.values()) == set(FOLDER.iterdir())


async def test_the_page_works_under_a_root_path_and_names_no_other_server(serve: Serve) -> None:
    async with serve(HeldRanker(), root_path="/rerank") as client:
        page = (await client.get("/rerank/")).text
        names = re.findall(r"""(?:src|href)="([^"#/][^"#]*)""", page)
        assert len(names) >= 4
        for name in names:
            assert (await client.get(f"/rerank/{name}")).status_code == 200
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|\burl\(|@import|innerHTML|outerHTML|insertAdjacentHTML|localStorage", text), (
            path
        )


async def test_b9_everything_that_the_pages_link_to_opens_without_a_key(serve: Serve) -> None:
    async with serve(HeldRanker(), api_key=("secret",), root_path="/prefix") as client:
        for page in ("/prefix/", "/prefix/docs"):
            opened = await client.get(page)
            links = re.findall(r"""(?:src|href)="([^"#]+)""", opened.text)
            assert links
            for link in links:
                assert (await client.get(opened.url.join(link))).status_code == 200, link
        icon = await client.get("/favicon.ico")
        assert (icon.status_code, icon.headers["content-type"]) == (200, "image/svg+xml")


async def test_b9_a_browser_without_a_key_is_told_in_a_page(serve: Serve) -> None:
    async with serve(HeldRanker(), api_key=("secret",), root_path="/prefix") as client:
        shown = await client.get("/metrics", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
        asked = await client.get("/metrics", headers={"Accept": "*/*"})
    assert (shown.status_code, shown.headers["content-type"]) == (401, "text/html; charset=utf-8")
    assert 'href="/prefix/"' in shown.text
    assert "This address needs an API key" in shown.text
    assert shown.headers["www-authenticate"] == "Bearer"
    assert asked.json()["error"]["type"] == "MissingApiKey"
