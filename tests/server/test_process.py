"""The server process over real sockets: start, limits, disconnecting clients, and shutdown."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from httpx2 import Client, HTTPTransport

from tests.command_line import Done, command
from tests.serving import NATIVE, WAIT_SECONDS, Server, exchange, options, serving, started, status_of, until


@contextmanager
def held(folder: Path, checkpoint: Path, *more: str) -> Iterator[tuple[Server, Path, Client]]:
    """A ready server whose model blocks while the yielded file exists, and a client."""
    hold = folder / "hold"
    arguments = ["tests.server.held_server", str(hold), *options(checkpoint), "--port", "0", *more]
    with started(folder / "log", *arguments) as server:
        server.wait_for("ready: ")
        with Client(base_url=server.address, timeout=WAIT_SECONDS) as client:
            yield server, hold, client
        hold.unlink(missing_ok=True)


def body(num_documents: int = 1) -> dict[str, Any]:
    return {"model": "qwen3-rerank", "query": "q", "documents": [f"document {i}" for i in range(num_documents)]}


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that listens but may still load its model."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["local_rerank", "serve", *options(tiny_checkpoint), "--port", "0", "--max-body-bytes", "100000"]
    with started(log, *arguments) as running:
        running.wait_for("listening on")
        yield running


def test_health_answers_before_and_ready_after_the_model_is_loaded(server: Server) -> None:
    with Client(base_url=server.address, timeout=WAIT_SECONDS) as client:
        assert client.get("/health").status_code == 200
        assert (client.get("/ready").status_code, client.get("/ready").json()) == (503, {"status": "loading"})
        refused = client.post(NATIVE, json=body())
        assert (refused.status_code, refused.json()["code"]) == (503, "ModelUnavailable")
        until(lambda: client.get("/ready").status_code == 200)
        assert client.post(NATIVE, json=body()).status_code == 200


def test_the_console_shows_the_model_and_a_working_curl_command(server: Server) -> None:
    server.wait_for("curl ")
    assert "model: tiny-reranker (folder), cpu, fp32" in server.output
    line = next(line for line in server.output.splitlines() if line.startswith("curl "))
    answer = subprocess.run(f"{line} --silent --fail", shell=True, capture_output=True, check=True, timeout=60)
    assert b'"relevance_score"' in answer.stdout


def test_a_client_that_sends_too_large_a_body_can_read_the_error(server: Server) -> None:
    with Client(base_url=server.address, timeout=WAIT_SECONDS) as client:
        for content in (b"[" * 5_000_000, iter([b"[" * 50_000] * 100)):
            answer = client.post(NATIVE, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413
            assert "at most 100000 bytes" in answer.json()["message"]


def test_one_connection_serves_many_requests_including_errors(server: Server) -> None:
    server.wait_for("ready: ")
    requests = [
        f"POST {NATIVE} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n{content}".encode()
        for content in ('{"model":"qwen3-rerank","query":"q","documents":["d"]}', "{", '{"model":"x"}') * 3
    ]
    with server.connect() as connection:
        statuses = [status_of(exchange(connection, request)) for request in requests]
    assert statuses == [200, 400, 400] * 3


def test_an_incomplete_body_does_not_affect_other_requests(server: Server) -> None:
    server.wait_for("ready: ")
    with server.connect() as connection:
        connection.sendall(f"POST {NATIVE} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{{".encode())
    until(lambda: f"POST {NATIVE} 499" in server.output)
    with Client(base_url=server.address, timeout=WAIT_SECONDS) as client:
        assert client.post(NATIVE, json=body()).status_code == 200


def test_an_upgrade_to_http_2_is_ignored_and_the_body_is_read(server: Server) -> None:
    """Java's HttpClient sends `Upgrade: h2c`; some parsers lose the body then."""
    server.wait_for("ready: ")
    content = '{"model":"qwen3-rerank","query":"q","documents":["d"]}'
    offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    request = f"POST {NATIVE} HTTP/1.1\r\nHost: localhost\r\n{offer}Content-Length: {len(content)}\r\n\r\n{content}"
    with server.connect() as connection:
        assert status_of(exchange(connection, request.encode())) == 200


@pytest.mark.parametrize(
    ("line", "status"),
    [(f"POST http://127.0.0.1:8106{NATIVE}", 200), ("OPTIONS *", 204), ("CONNECT a.example:443", 405)],
)
def test_b8_a_target_in_another_form_is_answered(line: str, status: int, server: Server) -> None:
    server.wait_for("ready: ")
    content = '{"model":"qwen3-rerank","query":"q","documents":["d"]}' if status == 200 else ""
    head = f"{line} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    with server.connect() as connection:
        answer = exchange(connection, f"{head}{content}".encode())
    assert status_of(answer) == status
    assert (b"allow: GET, HEAD, OPTIONS, POST\r\n" in answer) is (status != 200)


def test_e8_tls_on_the_plain_port_is_told(server: Server) -> None:
    for _ in range(2):
        with server.connect() as connection:
            hello = b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"
            answer = exchange(connection, hello)
        assert (status_of(answer), b"use http://" in answer) == (400, True)
    assert server.output.count("400 to 127.0.0.1: this port speaks plain HTTP") == 1


def test_a_port_in_use_is_reported_in_one_line(server: Server) -> None:
    port = server.address.rpartition(":")[2]
    arguments = [sys.executable, "-m", "local_rerank", "serve", "--port", port]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=WAIT_SECONDS)
    reason = f"cannot listen on 127.0.0.1:{port}: Address already in use"
    check_one_line(ended, f"{reason}; stop the process that uses it, or choose another --port")


def test_a_model_that_cannot_be_loaded_is_reported_in_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_one_line("serve", "--port", "0", "--model", str(empty), says="empty")


def test_an_invalid_option_is_reported_in_one_line(tmp_path: Path) -> None:
    assert_one_line("serve", "--host", "0.0.0.0", says="set --api-key-file or --api-key, or allow this with --insecure")
    assert_one_line("serve", "--port", "0", "--api-key-file", "nowhere", says="api_key_file nowhere")
    key = tmp_path / "key.pem"
    key.write_text("no key", encoding="utf-8")
    tls = ("--ssl-certfile", str(key), "--ssl-keyfile", str(key))
    assert_one_line("serve", "--port", "0", *tls, says="cannot be used")


def test_a_disconnect_cancels_its_work_and_sigterm_finishes_admitted_requests(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with held(tmp_path, tiny_checkpoint) as (server, hold, client), ThreadPoolExecutor() as pool:
        hold.touch()
        first = pool.submit(client.post, NATIVE, json=body(1))
        server.wait_for("forward 1\n")
        with Client(base_url=server.address, timeout=0.5) as impatient, pytest.raises(Exception, match="timed out"):
            impatient.post(NATIVE, json=body(7))
        server.wait_for(f"POST {NATIVE} 499")
        late = client.post(NATIVE, json=body(5), headers={"X-Request-Timeout-Ms": "100"})
        assert (late.status_code, late.json()["code"]) == (500, "RequestTimeOut")
        assert late.headers["x-should-retry"] == "false"
        assert client.get("/health").elapsed.total_seconds() < 1  # the event loop is free while the model blocks
        hold.unlink()
        assert first.result(WAIT_SECONDS).status_code == 200
        assert client.post(NATIVE, json=body(3)).status_code == 200
        assert re.findall(r"^forward (\d+)$", server.output, re.MULTILINE) == ["1", "3"]

        hold.touch()
        accepted = pool.submit(client.post, NATIVE, json=body(2))
        server.wait_for("forward 2\n")
        server.process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/ready").json() == {"status": "draining"})
        assert client.get("/ready").status_code == 503
        refused = client.post(NATIVE, json=body())
        assert (refused.status_code, refused.json()["code"]) == (503, "ModelUnavailable")
        hold.unlink()
        assert accepted.result(WAIT_SECONDS).status_code == 200
        assert server.process.wait(WAIT_SECONDS) == 0
        assert "Traceback" not in server.output


@pytest.mark.parametrize(("signals", "drain_seconds"), [(2, 600), (1, 1)])
def test_b3_a_second_signal_or_the_drain_timeout_answers_503(
    signals: int, drain_seconds: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with held(tmp_path, tiny_checkpoint, "--drain-seconds", str(drain_seconds)) as (server, hold, client):
        hold.touch()
        with ThreadPoolExecutor() as pool:
            cut_off = pool.submit(client.post, NATIVE, json=body())
            server.wait_for("forward 1\n")
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.5)
            assert server.process.wait(20) == 1
            answer = cut_off.result(WAIT_SECONDS)
            assert (answer.status_code, answer.json()["code"]) == (503, "ModelUnavailable")
            assert answer.headers["connection"] == "close"
        assert f"stopping: 1 in flight, up to {drain_seconds} s to finish" in server.output
        assert "stopped with 1 requests unanswered" in server.output
        assert "Traceback" not in server.output


def test_a_gpu_that_fails_for_good_answers_503_and_ends_the_process(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with held(tmp_path, tiny_checkpoint) as (server, hold, client), ThreadPoolExecutor() as pool:
        hold.touch()
        asked = [pool.submit(client.post, NATIVE, json=body())]
        server.wait_for("forward 1\n")
        asked.append(pool.submit(client.post, "/v2/rerank", json=body()))
        until(lambda: 'local_rerank_queued_requests{model="tiny-reranker"} 1' in client.get("/metrics").text)
        with server.connect() as connection:  # a client that still sends its body
            content = json.dumps(body())
            head = f"POST {NATIVE} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall((head + content[:-1]).encode())
            until(lambda: "local_rerank_requests_in_flight 4" in client.get("/metrics").text)  # with this one
            hold.write_text("failed")
            answers = [each.result(WAIT_SECONDS) for each in asked]
            assert (client.get("/ready").status_code, client.get("/health").status_code) == (503, 200)
            assert status_of(exchange(connection, b"}")) == 503
        assert server.process.wait(WAIT_SECONDS) == 1
    assert [answer.status_code for answer in answers] == [503, 503]
    assert answers[0].json()["code"] == "ModelUnavailable"
    failed = "cpu failed: RuntimeError: CUDA error: an illegal memory access was encountered; this process cannot use"
    assert answers[1].json()["message"].startswith(failed)
    (line,) = (line for line in server.output.splitlines() if " CRITICAL " in line)
    assert failed in line
    assert line.endswith(f"; requests: {answers[0].headers['x-request-id']}")
    assert "Traceback" not in server.output


def test_b4_c16_a_unix_socket_a_root_path_a_key_and_json_logs_work_together(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    abandoned = socket.socket(socket.AF_UNIX)
    abandoned.bind(str(path))
    abandoned.close()
    arguments = ["--uds", str(path), "--root-path", "/rerank", "--api-key", "secret:colon", "--log-format", "json"]
    with serving(tmp_path / "log", *options(tiny_checkpoint), *arguments) as server:
        with Client(transport=HTTPTransport(uds=str(path)), base_url="http://local", timeout=WAIT_SECONDS) as client:
            assert client.post(NATIVE, json=body()).status_code == 401
            headers = {"Authorization": "Bearer secret:colon", "X-Forwarded-For": "203.0.113.7"}
            for prefix in ("", "/rerank"):  # a proxy that strips it, and one that does not
                assert client.post(prefix + NATIVE, json=body(), headers=headers).status_code == 200
            document = client.get("/openapi.json").json()
            assert document["servers"] == [{"url": "/rerank"}]
        assert_one_line("serve", "--uds", str(path), says="Address already in use")
    assert not path.exists()
    lines = [json.loads(line) for line in server.output.splitlines()]
    printed = next(line["message"] for line in lines if line["message"].startswith("curl "))
    assert f"--unix-socket {path} http://localhost/rerank{NATIVE} " in printed
    ranked = [(line["client"], line["path"]) for line in lines if line.get("status") == 200]
    assert ranked == [("203.0.113.7", NATIVE)] * 2
    assert lines[0]["message"].startswith("listening on ")
    assert lines[-1]["message"] == "stopping: no requests in flight"
    assert "secret" not in server.output


def test_what_another_process_puts_at_the_sockets_path_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with started(tmp_path / "log", "local_rerank", "serve", "--uds", str(path)) as server:
        server.wait_for("listening on ")
        path.unlink()
        path.write_text("theirs")
        server.stop()
    assert path.read_text() == "theirs"


def test_a_system_without_unix_sockets_refuses_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")  # as on Windows
    assert_one_line("serve", "--uds", str(tmp_path / "socket"), says="Python has no Unix sockets")


def test_a_regular_file_is_not_replaced_by_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert_one_line("serve", "--uds", str(path), says="cannot listen on")
    assert path.read_text() == "mine"


def test_e8_tls_uses_the_given_certificate_and_plain_http_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make.split(), *files], check=True, capture_output=True)
    arguments = ["--port", "0", "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    with started(tmp_path / "log", "local_rerank", "serve", *options(tiny_checkpoint), *arguments) as server:
        server.wait_for("listening on https://127.0.0.1:")
        trust = ssl.create_default_context(cafile=str(certificate))
        with Client(base_url=server.address, verify=trust, timeout=WAIT_SECONDS) as client:
            assert client.get("/health").status_code == 200
            plain = server.address.replace("https", "http")
            for _ in range(2):
                refused = client.get(plain)
                assert (refused.status_code, "use https://" in refused.text) == (400, True)
            server.process.send_signal(signal.SIGTERM)  # the model may still be loading, and a connection is open
            assert server.process.wait(20) == 0  # without waiting --drain-seconds for the idle connection
        assert server.output.count("use https://") == 1, "a port scanner must not flood the log"


def assert_one_line(*arguments: str, says: str) -> None:
    """`local-rerank ARGUMENTS`, run in this process, fails with one line on standard error."""
    with mock.patch("local_rerank_server.process.set_up_logging"):  # logging here is pytest's
        check_one_line(command(*arguments), says)


def check_one_line(ended: Done | subprocess.CompletedProcess[str], says: str) -> None:
    assert ended.returncode not in (0, None)
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("local-rerank: ")
    assert says in lines[0]
