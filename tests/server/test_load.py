"""Overload, hundreds of connections, slow and broken clients, and SIGTERM under load."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from httpx2 import Client

from local_rerank import Reranker
from local_rerank.engine.cpu.process_setup import CACHE_VARIABLES
from tests.server.load import PATH, Case, Tally, all_at_once, ask, fault_of, make_cases, make_client, offer
from tests.serving import WAIT_SECONDS, Server, options, serving, started, until

MILLISECONDS_PER_1000_TOKENS = 220  # about 10 requests a second
MEMORY_MIB = 8  # growth that 300 requests may cause: buffers, not the requests themselves
NUM_CONNECTIONS = 200
TIMEOUT_SECONDS = 5  # more than a busy machine needs to open these connections and send on each
UNREAD_BYTES = 8 << 20  # more than the kernel buffers for a connection


@pytest.fixture(scope="module")
def cases(tiny_reranker: Reranker) -> list[Case]:
    return make_cases(tiny_reranker, 30)


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with short timeouts."""
    log = tmp_path_factory.mktemp("load") / "log"
    with serving(log, *options(tiny_checkpoint), "--client-timeout-seconds", str(TIMEOUT_SECONDS)) as running:
        yield running


@pytest.fixture(scope="module")
def slow_server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a slow model and a short queue. The last test that uses it stops it."""
    log = tmp_path_factory.mktemp("slow") / "log"
    command = ["tests.server.slow_server", str(MILLISECONDS_PER_1000_TOKENS), *options(tiny_checkpoint), "--port", "0"]
    caches = dict.fromkeys(CACHE_VARIABLES, "8")  # kernels for new lengths would outweigh what requests leave behind
    with started(log, *command, "--max-queued-tokens", "20000", **caches) as running:
        running.wait_for("ready: ")
        yield running
        assert "Traceback" not in running.output


def read_to_end(connection: socket.socket) -> bytes:
    answer = b""
    while received := connection.recv(65536):
        answer += received
    return answer


def raw_request(body: dict[str, object], more: str = "") -> bytes:
    content = json.dumps(body).encode()
    return f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n{more}Content-Length: {len(content)}\r\n\r\n".encode() + content


def test_ten_times_its_capacity_is_answered_with_200_and_429(slow_server: Server, cases: list[Case]) -> None:
    process = psutil.Process(slow_server.process.pid)
    asyncio.run(offer(slow_server.address, cases, per_second=100, seconds=1))
    before = process.memory_info().rss
    tally = asyncio.run(offer(slow_server.address, cases, per_second=100, seconds=3))
    assert tally.lost == tally.wrong == []
    assert sum(tally.statuses.values()) == 300
    assert set(tally.statuses) == {200, 429}
    assert tally.statuses[429] > tally.statuses[200] > 0, "the load was too small"
    assert all(1 <= seconds <= 60 for seconds in tally.retry_after)
    assert process.memory_info().rss - before < MEMORY_MIB << 20
    afterwards = asyncio.run(all_at_once(slow_server.address, cases, 10))
    assert (afterwards.statuses, afterwards.wrong) == ({200: 10}, [])


def test_sigterm_under_load_loses_no_accepted_request(slow_server: Server, cases: list[Case]) -> None:
    before = len(slow_server.output)
    num_first = len(cases) // 2

    async def load() -> Tally:
        tally = Tally()
        async with make_client(slow_server.address, connections=100) as client:
            first = [asyncio.create_task(ask(client, case, tally)) for case in cases[:num_first]]
            async with make_client(slow_server.address) as watcher:  # late requests use other connections
                while f"requests_in_flight {len(first) + 1}.0" not in (await watcher.get("/metrics")).text:
                    assert not any(task.done() for task in first), "the model is faster than the test"
            slow_server.process.send_signal(signal.SIGTERM)
            late = [asyncio.create_task(ask(client, case, refused)) for case in cases[num_first:]]
            await asyncio.gather(*first, *late)
        return tally

    refused = Tally()
    accepted = asyncio.run(load())
    assert (accepted.statuses, accepted.wrong, accepted.lost) == ({200: num_first}, [], [])
    assert set(refused.statuses) <= {200, 503}  # or the connection was refused: the port is closed
    assert slow_server.process.wait(WAIT_SECONDS) == 0
    answered = len(re.findall(rf"POST {PATH} 200 ", slow_server.output[before:]))
    assert answered == accepted.statuses[200] + refused.statuses[200]


def test_hundreds_of_connections_at_once_get_their_own_right_answers(server: Server, cases: list[Case]) -> None:
    """All are open before the first request is sent, on plain sockets, because an HTTP client would send too slowly."""
    asked = [cases[number % len(cases)] for number in range(NUM_CONNECTIONS)]
    host, port = server.address.removeprefix("http://").split(":")

    async def exchange() -> list[bytes]:
        connections = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in asked))
        for (_, writer), case in zip(connections, asked, strict=True):
            writer.write(raw_request(case.body, "Connection: close\r\n"))
        async with asyncio.timeout(WAIT_SECONDS):
            answers = await asyncio.gather(*(reader.read() for reader, _ in connections))
        for _, writer in connections:
            writer.close()
        return answers

    for answer, case in zip(asyncio.run(exchange()), asked, strict=True):
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), answer
        assert fault_of(case, json.loads(body)) is None


def test_a_head_that_does_not_come_is_answered_408(server: Server) -> None:
    """The first one of a connection and the second one."""
    beginnings = [b"", b"POST ", f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nX-Slow".encode()]
    with ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in (*beginnings, "second")]
        connections[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connections[-1].recv(65536).startswith(b"HTTP/1.1 200 ")
        for connection, sent in zip(connections, (*beginnings, b"GET /hea"), strict=True):
            connection.sendall(sent)
        for connection in connections:
            answer = read_to_end(connection)
            assert b"HTTP/1.1 408 " in answer
            assert f"the request head was not received within {TIMEOUT_SECONDS} s".encode() in answer


def test_a_body_that_trickles_is_answered_408_and_its_connection_closed(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{".encode())
        connection.settimeout(0.1)
        answer = b""
        for _ in range(200):  # a byte every tenth of a second
            try:
                if not (received := connection.recv(65536)):
                    break
                answer += received
            except TimeoutError:
                connection.sendall(b" ")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert f"was not received within {TIMEOUT_SECONDS} s".encode() in answer


def test_the_connection_of_an_answer_that_nobody_reads_is_closed(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    before = len(process.net_connections())
    body = {"query": "q", "documents": ["x" * 1_000_000 + str(number) for number in range(UNREAD_BYTES >> 20)]}
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(raw_request(body))
        until(lambda: f"POST {PATH} 200 " in server.output.rsplit("not received", 1)[-1])
        until(lambda: len(process.net_connections()) <= before)


def test_connections_cut_at_every_stage_leave_nothing_behind(server: Server, cases: list[Case]) -> None:
    process = psutil.Process(server.process.pid)
    request = raw_request(cases[0].body)
    before = process.num_fds()
    for length in range(0, len(request) + 1, 29):
        with server.connect() as connection:
            connection.sendall(request[:length])
    for _ in range(5):  # cut while the answer is computed or sent
        with server.connect() as connection:
            connection.sendall(request)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
    until(lambda: process.num_fds() <= before)
    with Client(base_url=server.address, timeout=WAIT_SECONDS) as client:
        until(lambda: "local_rerank_requests_in_flight 1.0" in client.get("/metrics").text)
        assert 'local_rerank_queued_tokens{model="tiny-reranker"} 0.0' in client.get("/metrics").text
        assert client.post(PATH, json=cases[0].body).status_code == 200
