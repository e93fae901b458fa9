"""`rank --server`: our command as a client of our application, which listens on a socket in this process."""

from __future__ import annotations

import http.server
import json
import os
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import uvicorn

from local_rerank import Reranker
from local_rerank.errors import DeadlineExceeded, Overloaded
from local_rerank_server.app import create_app
from local_rerank_server.config import ServerConfig
from local_rerank_server.keys import ApiKeys
from local_rerank_server.state import ServerState
from tests.command_line import Done, command
from tests.server.conftest import HeldRanker
from tests.serving import until

DOCUMENTS = ["Rome is the capital of Italy", "巴黎 is \udcff a city", "x " * 300, ""]
CUT = (
    "note: 1 of 4 documents and the query exceeded a limit in tokens and lost the rest; --long-documents chunk scores "
    "long documents whole\n"
)
CPU_SECONDS = 1.5  # 0.25 on two AVX2 cores; importing torch takes 2 more


@contextmanager
def listening(ranker: Reranker | HeldRanker | None, *, uds: str | None = None, **options: Any) -> Iterator[str]:
    """The application on a free port or a Unix socket; None: it is still loading its model. Yields the address."""
    tls = {name: options.pop(name) for name in ("ssl_certfile", "ssl_keyfile") if name in options}
    config = ServerConfig(**options)
    state = ServerState(config)
    if ranker is not None:
        state.serve(ranker)  # type: ignore[arg-type]
    app = create_app(state, ApiKeys.from_config(config))
    server = uvicorn.Server(uvicorn.Config(app, port=0, uds=uds, log_config=None, ws="none", lifespan="off", **tls))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    port = None if uds else server.servers[0].sockets[0].getsockname()[1]
    yield f"http+unix://{uds}" if uds else f"{'https' if tls else 'http'}://127.0.0.1:{port}{config.root_path}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def keyed(tiny_reranker: Reranker) -> Iterator[str]:
    with listening(tiny_reranker, api_key=("schlüssel",), root_path="/rerank") as address:
        yield address


def rank(address: str, *arguments: str, key: str = "schlüssel and others") -> Done:
    with mock.patch.dict("os.environ", {"LOCAL_RERANK_API_KEY": key, "LOCAL_RERANK_DEVICE": "cuda"}):
        return command("rank", "capital", *DOCUMENTS, "--server", address, *arguments)


def without_figures(output: str) -> str:
    """A command's output without times, and without the last digits of scores, which depend on the batch."""
    output = re.sub(r'"(tokenize|queue|total)_ms": [\d.e-]+', "", output)
    return re.sub(r"(\d\.\d{3})\d+", r"\1", re.sub(r"in \d+ ms", "", output))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--top-n", "3"),
        ("--blend", "bm25=0.5", "--top-n", "2"),
        ("--blend", "bm25-ranks=0.5", "--min-score", "0.5"),
        ("--instruction", "Find cities", "--max-query-tokens", "2", "--max-length", "330", "--json"),
        ("--long-documents", "chunk", "--chunk-tokens", "16", "--spans", "--json"),
    ],
)
def test_the_output_is_that_of_a_model_in_this_process(
    arguments: tuple[str, ...], keyed: str, tiny_checkpoint: Path
) -> None:
    remote = rank(keyed, *arguments)
    engine = ("--model", str(tiny_checkpoint), "--device", "cpu", "--dtype", "fp32")
    local = command("rank", "capital", *DOCUMENTS, *engine, *arguments)
    assert (remote.returncode, remote.stderr) == (0, CUT if "--max-length" in arguments else "")
    assert without_figures(remote.stdout) == without_figures(local.stdout)


@pytest.mark.parametrize("arguments", [(), ("--json", "--top-n", "1")])
def test_an_order_that_says_nothing_is_not_shown_without_a_warning(
    arguments: tuple[str, ...], keyed: str, tiny_reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_reranker.engine, "score", lambda pairs: [0.5] * len(pairs))
    remote = rank(keyed, *arguments)
    assert "warning: all documents have the same log-odds, so the model does not order them" in remote.stderr
    assert not arguments or json.loads(remote.stdout)["status"] == "constant"


def test_a_built_in_model_at_a_server_is_not_exchanged_here(keyed: str, tiny_reranker: Reranker) -> None:
    with mock.patch("local_rerank.commands.rank.EMBEDDED_MODEL", tiny_reranker.model_id):
        assert "start the server with --model for another" in rank(keyed).stdout


def test_neither_torch_nor_a_web_framework_is_imported(keyed: str) -> None:
    script = (
        "import atexit, json, sys, time\n"
        "atexit.register(lambda: print(json.dumps([time.process_time(), list(sys.modules)]), file=sys.stderr))\n"
        "from local_rerank.commands.app import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "rank", "q", "a", "b", "--json", "--server", keyed],
        env=os.environ | {"LOCAL_RERANK_API_KEY": "schlüssel"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(json.loads(done.stdout)["results"]) == 2
    seconds, modules = json.loads(done.stderr)
    assert {"torch", "transformers", "fastapi", "uvicorn"} & set(modules) == set()
    assert seconds < CPU_SECONDS


@pytest.mark.parametrize(
    ("ranker", "options", "key", "words"),
    [
        (HeldRanker(), {"api_key": ("k",)}, "", "wants an API key (401: the API key is missing; send it as"),
        (HeldRanker(), {"api_key": ("k",)}, "S3", "refuses the key in LOCAL_RERANK_API_KEY (401: the API key is wrong"),
        (HeldRanker(), {"max_body_bytes": 9}, "", "refuses the request (413: the request body is too large; at most 9"),
        (HeldRanker(), {"max_documents": 1}, "", "refuses the request (400: 4 documents; at least 1 is needed"),
        (HeldRanker(Overloaded("the queue is full", retry_after=2.5)), {}, "", "full); try again in 3 s"),
        (HeldRanker(DeadlineExceeded(timeout_ms=5)), {}, "", "did not rank in time (504: not answered within 5 ms)"),
        (None, {}, "", "cannot rank now (503: "),
    ],
    ids=["no key", "wrong key", "body", "documents", "overload", "deadline", "loading"],
)
def test_what_the_server_refuses_is_one_line(
    ranker: HeldRanker | None, options: dict[str, Any], key: str, words: str
) -> None:
    with listening(ranker, **options) as address:
        check(rank(address, key=key), words, address)


def check(done: Done, words: str, address: str) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert address in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "S3" not in done.stderr


class _Canned(http.server.BaseHTTPRequestHandler):
    """Other servers: each path says what to answer."""

    answers = {  # noqa: RUF012
        "/422": (422, '{"detail": [{"loc": ["body"]}]}', {}),
        "/moved": (301, "", {"Location": "https://elsewhere.example/"}),
        "/html": (200, "<html>hello", {}),
        "/rerank": (200, '{"results": [{"index": 0, "relevance_score": 0.5}]}', {}),
        "/index": (200, '{"results": [{"index": 9}]}', {}),
        "/deep": (200, "[" * 100_000, {}),
        "/500": (500, "<html>" + "x" * 999, {}),
        "/502": (502, "", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        "/429": (429, '{"error": {"message": "slow down"}}', {"Retry-After": "soon"}),
    }

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        status, body, headers = self.answers.get(self.path.removesuffix("/v1/local/rank"), (404, "", {}))
        if self.path.startswith("/close"):
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def other() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Canned) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/422", "refuses the request (422)"),
        ("/moved", "points to https://elsewhere.example/; give that one"),
        ("/html", "is no local-rerank server of this version"),
        ("/rerank", "is no local-rerank server of this version"),
        ("/index", "is no local-rerank server of this version"),
        ("/deep", "is no local-rerank server of this version"),
        ("/nowhere", "has no route /v1/local/rank (404); give the address of a local-rerank server"),
        ("/500", "failed (500); its log says more"),
        ("/502", "cannot rank now (502); try again later"),
        ("/429", "is busy (429: slow down); try again later"),
        ("/close", "which closed the connection without an answer"),
    ],
)
def test_other_servers_are_recognized(path: str, words: str, other: str) -> None:
    check(rank(other + path), words, other + path)
    if path == "/422":
        tls = other.replace("http", "https")
        check(rank(tls), "which does not speak TLS as it should", tls)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--server", "http://127.0.0.1:1"), "where no server listens; start one with `local-rerank serve`"),
        (("--server", "http+unix:///nowhere.sock"), "where no server listens"),
        (("--server", "127.0.0.1:8000"), "server is '127.0.0.1:8000'; give http://HOST:PORT"),
        (("--server", "http://127.0.0.1:x"), "server is no URL"),
        (("--server", "http://a b"), "which is no URL; give http://HOST:PORT"),
        (("--server", "http://me:S3@127.0.0.1:8000"), "server has more than an address"),
        (("--server", "http://127.0.0.1:8000?key=S3"), "the key in LOCAL_RERANK_API_KEY"),
        (("--server", "http://127.0.0.1:1", "--dtype", "bf16"), "dtype cannot be combined with --server"),
        (("--server", "http://127.0.0.1:1", "--model", "./m"), "model cannot be combined with --server"),
        (("--server", "http://127.0.0.1:1", "--show-prompt"), "show_prompt cannot be combined with --server"),
    ],
)
def test_a_wrong_address_or_option_is_named(arguments: tuple[str, ...], words: str) -> None:
    check(command("rank", "q", "d", *arguments), words, "")


def test_unix_sockets_and_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(None, uds=str(tmp_path / "socket")) as address:
        check(rank(address), "cannot rank now (503: ", address)
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make.split(), *files], check=True, capture_output=True)
    with listening(None, ssl_certfile=str(certificate), ssl_keyfile=str(key)) as address:
        check(rank(address), "certificate is not trusted (self-signed certificate); name its CA's file", address)
        monkeypatch.setenv(ssl.get_default_verify_paths().openssl_cafile_env, str(certificate))
        check(rank(address), "cannot rank now (503: ", address)
