"""Which web pages may use the server, and the headers of its responses; tests/playground has a real browser."""

from __future__ import annotations

from typing import Any

import pytest

from local_rerank.errors import ConfigError
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects import ROWS, dialect_at
from tests.server.conftest import HeldRanker, Serve, message_of
from tests.server.test_errors import check_shape
from tests.server.test_middleware import status_of_target
from tests.serving import NATIVE

pytestmark = pytest.mark.anyio
LOCAL = "/v1/local/rank"
SERVED = "127.0.0.1:8000"
Headers = list[tuple[str, str]]
NAVIGATION = [("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "navigate"), ("Sec-Fetch-Dest", "document")]


def origins(*origins: str, host: str = SERVED) -> Headers:
    return [("Host", host), *(("Origin", origin) for origin in origins)]


TAKEN: list[Headers] = [
    [],
    origins("http://127.0.0.1:8000"),
    origins("https://127.0.0.1:8000"),
    origins("HTTP://LOCALHOST:8000", host="localhost:8000"),
    origins("http://localhost:8000", host="LocalHost:8000"),
    origins("http://[::1]:8000", host="[::1]:8000"),
    origins("http://localhost", host="localhost:80"),
    origins("https://localhost", host="localhost:443"),
    origins("https://localhost", host="localhost"),
    origins("http://rerank.localhost:8000", host="rerank.localhost:8000"),
    origins("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
    [("Sec-Fetch-Site", "same-origin")],
    [("Sec-Fetch-Site", "none"), ("Sec-Fetch-Mode", "navigate")],
    [*origins("http://127.0.0.1:8000"), ("Sec-Fetch-Site", "same-origin")],
]
FOREIGN: list[Headers] = [
    origins("http://evil.test"),
    origins("null"),
    origins(""),
    origins("http://127.0.0.1:8001"),
    origins("http://127.0.0.1"),
    origins("http://localhost:8000"),
    origins("http://localhost", host="localhost:443"),
    origins("https://localhost", host="localhost:80"),
    origins("http://127.0.0.1:8000.evil.test"),
    origins("http://127.0.0.1:8000@evil.test"),
    origins("http://evil.test#127.0.0.1:8000"),
    origins("http://127.0.0.1:8000/"),
    origins("127.0.0.1:8000"),
    origins("file://127.0.0.1:8000"),
    origins("http://127.0.0.1:8000 http://evil.test"),
    origins("http://127.0.0.1:8000", "http://evil.test"),
    origins("http://evil.test", "http://127.0.0.1:8000"),
    [*origins("http://evil.test"), ("X-Forwarded-Host", "evil.test")],
    [*origins("http://evil.test"), ("Sec-Fetch-Site", "same-origin")],
    [*origins("http://evil.test"), *NAVIGATION],
    [("Sec-Fetch-Site", "cross-site")],
    [("Sec-Fetch-Site", "same-site")],
    [("Sec-Fetch-Site", "Cross-Site")],
    [("Sec-Fetch-Site", "none"), ("Sec-Fetch-Site", "cross-site")],
    [("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "no-cors"), ("Sec-Fetch-Dest", "image")],
    [*NAVIGATION[:2], ("Sec-Fetch-Dest", "iframe")],
]
SERVED_HOSTS = [
    "localhost", "LOCALHOST:8000", "localhost.", "a.b.localhost:1", "127.0.0.1:8000", "127.1", "0x7f000001",
    "2130706433", "[::1]:8000", "[0:0:0:0:0:0:0:1]", "[fe80::1%25eth0]", "192.168.1.5", "8.8.8.8:53",
]  # fmt: skip
OTHER_HOSTS = [
    "evil.test:8000", "evil.test", "evil.test.", "localhost.evil.test", "evillocalhost", "127.0.0.1.evil.test",
    "localhost:8000@evil.test", "localhost:x", "localhost..", "1.2.3.4.5", "evil.test:8000, localhost", "[evil.test]",
    "::1", "a b", "",
]  # fmt: skip


@pytest.mark.parametrize("headers", TAKEN, ids=str)
async def test_a_page_of_the_server_and_a_client_that_is_no_browser_are_served(headers: Headers, serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        for method, path in (("GET", "/v1/models"), ("POST", LOCAL), ("POST", NATIVE)):
            assert (await client.request(method, path, headers=headers)).status_code in (200, 400)


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
async def test_a_page_of_another_origin_is_refused_on_every_route_in_its_dialects_shape(
    headers: Headers, serve: Serve
) -> None:
    headers = headers if any(name == "Host" for name, _ in headers) else [("Host", SERVED), *headers]
    async with serve(HeldRanker()) as client:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
            assert (await client.request(method, LOCAL, headers=headers)).status_code == 403, method
        for path in ("/", "/docs", "/docs/", "/health", "/openapi.json", "/playground/main.js", "/nothing", NATIVE):
            answer = await client.get(path, headers=headers)
            assert answer.status_code == 403, path
            assert "--cors-origins" in message_of(answer.json())
            body = {"Access-Control-Request-Method": "POST"}
            assert (await client.options(path, headers=[*headers, *body.items()])).status_code == 403


async def test_a_link_on_another_page_may_be_followed(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        for path in ("/", "/docs", "/v1/models"):
            assert (await client.get(path, headers=NAVIGATION)).status_code == 200
        for method in ("HEAD", "POST"):
            assert (await client.request(method, LOCAL, headers=NAVIGATION)).status_code == 403


async def test_origins_of_the_option_are_taken_on_every_host_also_null_and_all(serve: Serve) -> None:
    evil, null = {"Origin": "http://evil.test"}, {"Origin": "null"}
    for origins, statuses in ((("http://evil.test",), (200, 403)), (("null",), (403, 200)), (("*",), (200, 200))):
        async with serve(HeldRanker(), cors_origins=origins) as client:
            answers = [await client.get("/v1/models", headers=headers) for headers in (evil, null)]
            assert tuple(answer.status_code for answer in answers) == statuses


@pytest.mark.parametrize(("hosts", "status"), [(SERVED_HOSTS, 200), (OTHER_HOSTS, 421)])
async def test_on_loopback_without_keys_only_this_machines_names_are_served(
    hosts: list[str], status: int, serve: Serve
) -> None:
    async with serve(HeldRanker()) as client:
        for host in hosts:
            for path in ("/v1/models", "/", "/health"):
                assert (await client.get(path, headers={"Host": host})).status_code == status, host
            headers = {"Host": host, "X-Forwarded-Host": "localhost", "Origin": f"http://{host}"}
            if status == 421:
                for method in ("GET", "POST", "OPTIONS"):
                    assert (await client.request(method, NATIVE, headers=headers)).status_code == 421


async def test_another_host_is_refused_in_the_shape_of_every_dialect(serve: Serve) -> None:
    async with serve(HeldRanker()) as client:
        for path in [prefix for dialect, _ in ROWS for prefix in dialect.prefixes] + ["/nothing"]:
            answer = await client.post(path, headers={"Host": "evil.test"})
            assert answer.status_code == 421
            check_shape(dialect_at(path), answer.json())
            assert "--allowed-hosts" in message_of(answer.json())


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({}, 421),
        ({"host": "::1"}, 421),
        ({"host": "127.0.0.2"}, 421),
        ({"insecure": True}, 421),
        ({"host": "", "insecure": True}, 421),  # as in gunicorn: the address of the connection counts
        ({"api_key": ("k",)}, 401),
        ({"host": "0.0.0.0", "insecure": True}, 200),
        ({"host": "0.0.0.0", "insecure": True, "allowed_hosts": ("a.example",)}, 421),
        ({"api_key": ("k",), "allowed_hosts": ("a.example",)}, 421),
        ({"uds": "/tmp/socket"}, 200),
        ({"allowed_hosts": ("Evil.test",)}, 200),
        ({"allowed_hosts": ("*.test",)}, 200),
        ({"allowed_hosts": ("*",)}, 200),
        ({"allowed_hosts": ("*.evil.test",)}, 421),
    ],
    ids=str,
)
async def test_which_servers_check_the_host(options: dict[str, Any], status: int, serve: Serve) -> None:
    async with serve(HeldRanker(), **options) as client:
        assert (await client.get("/v1/models", headers={"Host": "evil.test:8000"})).status_code == status
        assert (await client.get("/health", headers={"Host": "10.0.0.7:8000"})).status_code == 200


async def test_the_host_of_a_target_that_is_a_whole_url_counts(serve: Serve) -> None:
    async with serve(HeldRanker(), root_path="/rerank") as client:
        app = client._transport.app  # type: ignore[attr-defined]
        local, evil = (b"host", b"127.0.0.1:8000"), (b"origin", b"http://evil.test")
        assert await status_of_target(app, "GET", "http://evil.test/v1/models", local) == 421
        assert await status_of_target(app, "GET", "http://127.0.0.1@evil.test/v1/models", local) == 421
        assert await status_of_target(app, "GET", "http://localhost/rerank/v1/models", (b"host", b"evil.test")) == 200
        assert await status_of_target(app, "GET", "http://localhost/", local, evil) == 403
        assert await status_of_target(app, "OPTIONS", "*", local, evil) == 403
        assert await status_of_target(app, "GET", "/v1/models") == 200, "HTTP/1.0 needs no Host"
        assert await status_of_target(app, "GET", "/v1/models", local, (b"host", b"evil.test")) == 421


@pytest.mark.parametrize(
    "options",
    [{"allowed_hosts": ("http://a",)}, {"allowed_hosts": ("a:80",)}, {"allowed_hosts": ("",)},
     {"cors_origins": ("a.example",)}, {"cors_origins": ("https://a.example/",)}, {"cors_origins": ("https://A",)}],
    ids=str,
)  # fmt: skip
def test_a_host_or_an_origin_that_would_never_match_stops_the_start(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is '.*such as"):
        ServerConfig(**options)


async def test_every_answer_has_the_security_headers(serve: Serve) -> None:
    seen = set()
    async with serve(HeldRanker(), api_key=("k",), max_body_bytes=10) as client:
        for path in ("/", "/docs", "/docs/", "/health", "/metrics", "/v1/models", "/nothing", NATIVE, "/openapi.json"):
            for method in ("GET", "HEAD", "POST", "PUT", "OPTIONS"):
                for key in ({}, {"Authorization": "Bearer k"}, {"Origin": "http://a"}, {"Accept": "text/html"}):
                    answer = await client.request(method, path, headers=key, content=b"{" * 11 * (method == "POST"))
                    seen.add(answer.status_code)
                    assert answer.headers["x-content-type-options"] == "nosniff"
                    assert answer.headers["referrer-policy"] == "no-referrer"
                    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
                    assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
                    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
                    page = answer.status_code == 200 and path in ("/", "/docs")
                    assert answer.headers["cache-control"] == ("no-cache" if page else "no-store")
    assert seen >= {200, 204, 307, 401, 403, 404, 405, 413}


async def test_what_an_error_or_the_log_quotes_is_cut(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    long = "x" * 50_000
    async with serve(HeldRanker(), strict_models=True) as client:
        for method, path, headers, body in (
            ("GET", f"/{long}", {}, {}),
            ("GET", "/%00" * 15_000, {}, {}),
            ("GET", f"/models/{long}", {}, {}),
            (long, "/version", {}, {}),
            ("POST", LOCAL, {"Content-Type": f"a/{long}"}, {}),
            ("POST", LOCAL, {"Content-Encoding": long}, {}),
            ("GET", "/version", {"Host": long}, {}),
            ("GET", "/version", {"Origin": long}, {}),
            ("GET", "/version", {"X-Request-ID": long}, {}),
            ("POST", LOCAL, {}, {"model": long, "query": "q", "documents": ["a"]}),
            ("POST", LOCAL, {}, {long: 1, "query": "q", "documents": 7}),
            ("POST", LOCAL, {}, {"query": "q", "documents": ["a"], "truncation": long}),
            ("POST", LOCAL, {}, {"query": "q", "documents": ["a"], "top_n": long}),
            ("POST", "/v1/rerank", {}, {"query": "q", "documents": [{"a": "b"}], "rank_fields": [long]}),
            ("POST", "/v1/rerank", {}, {"query": "q", "documents": ["a"], "parameters": {long: 1, "top_n": "x"}}),
        ):  # fmt: skip
            answer = await client.request(method, path, headers=headers, **({"json": body} if body else {}))
            if answer.status_code != 200:
                assert len(message_of(answer.json())) < 500, (method[:9], path[:9], headers, body)
                assert len(str(answer.headers)) < 2000
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("local_rerank")]
    assert max(map(len, lines)) < 800
