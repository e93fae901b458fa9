"""More than the server can do, a thousand connections, slow and broken peers, and SIGTERM in the middle of it all."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from httpx2 import Client

from local_rerank import Reranker
from local_rerank.openmp import CACHES
from tests.server.load import PATH, Case, Tally, all_at_once, ask, make_cases, make_client, offer
from tests.server.test_process import WAIT_SECONDS, Server, options, started, until

MILLISECONDS_PER_1000_TOKENS = 110  # so that about 20 requests a second are served
MEMORY_MIB = 16  # that 800 requests may leave behind: buffers, not the requests
READ_NOTHING_BYTES = 8 << 20  # more than the kernel buffers for a connection


@pytest.fixture(scope="module")
def cases(tiny_reranker: Reranker) -> list[Case]:
    return make_cases(tiny_reranker, 60)


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Impatient with slow peers."""
    log = tmp_path_factory.mktemp("load") / "log"
    patience = ["--header-timeout-seconds", "1", "--body-timeout-seconds", "2", "--write-timeout-seconds", "1"]
    with started(log, "local_rerank", "serve", *options(tiny_checkpoint), "--port", "0", *patience) as running:
        running.wait_for("ready: ")
        yield running
        assert "Traceback" not in running.output
        assert running.stop() == 0


def slowed(checkpoint: Path) -> list[str]:
    return ["tests.server.slow_server", str(MILLISECONDS_PER_1000_TOKENS), *options(checkpoint), "--port", "0"]


def connect(server: Server) -> socket.socket:
    host, port = server.address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_SECONDS)


def read_to_end(connection: socket.socket) -> bytes:
    answer = b""
    while received := connection.recv(65536):
        answer += received
    return answer


def raw_request(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    return f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def test_ten_times_what_it_can_do_is_answered_in_full_by_200_and_429(
    tiny_checkpoint: Path, cases: list[Case], tmp_path: Path
) -> None:
    caches = dict.fromkeys(CACHES, "8")  # of code for the lengths that came, which would outweigh what requests leave
    with started(tmp_path / "log", *slowed(tiny_checkpoint), "--max-queued-tokens", "20000", **caches) as server:
        server.wait_for("ready: ")
        process = psutil.Process(server.process.pid)
        asyncio.run(offer(server.address, cases, per_second=200, seconds=2))
        before = process.memory_info().rss
        tally = asyncio.run(offer(server.address, cases, per_second=200, seconds=4))
        assert tally.lost == tally.wrong == []
        assert sum(tally.statuses.values()) == 800
        assert set(tally.statuses) == {200, 429}
        assert tally.statuses[429] > tally.statuses[200] > 0, "it was too much"
        assert all(1 <= seconds <= 60 for seconds in tally.retry_after)
        assert process.memory_info().rss - before < MEMORY_MIB << 20
        afterwards = asyncio.run(all_at_once(server.address, cases, 30))
        assert (afterwards.statuses, afterwards.wrong) == ({200: 30}, [])
        assert "Traceback" not in server.output


def test_a_thousand_connections_at_once_get_their_own_right_answers(server: Server, cases: list[Case]) -> None:
    tally = asyncio.run(all_at_once(server.address, cases, 1000))
    assert (tally.statuses, tally.wrong, tally.lost) == ({200: 1000}, [], [])


def test_sigterm_under_load_loses_no_request_that_was_let_in(
    tiny_checkpoint: Path, cases: list[Case], tmp_path: Path
) -> None:
    with started(tmp_path / "log", *slowed(tiny_checkpoint)) as server:
        server.wait_for("ready: ")

        async def load() -> Tally:
            tally = Tally()
            async with make_client(server.address, connections=100) as client:
                first = [asyncio.create_task(ask(client, case, tally)) for case in cases[:40]]
                async with make_client(server.address) as watcher:  # until the 40 are in, on connections of their own
                    while f"requests_in_flight {len(first) + 1}.0" not in (await watcher.get("/metrics")).text:
                        assert not any(task.done() for task in first), "the model is faster than the test"
                server.process.send_signal(signal.SIGTERM)
                late = [asyncio.create_task(ask(client, case, refused)) for case in cases[40:]]
                await asyncio.gather(*first, *late)
            return tally

        refused = Tally()
        accepted = asyncio.run(load())
        assert (accepted.statuses, accepted.wrong, accepted.lost) == ({200: 40}, [], [])
        assert set(refused.statuses) <= {200, 503}  # or the connection was refused: the port is closed
        assert server.process.wait(WAIT_SECONDS) == 0
        answered = len(re.findall(rf"POST {PATH} 200 ", server.output))
        assert answered == accepted.statuses[200] + refused.statuses[200]
        assert "Traceback" not in server.output


@pytest.mark.parametrize("sent", [b"", b"POST ", f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-Slow".encode()])
def test_a_head_that_does_not_come_is_not_waited_for(server: Server, sent: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the request's head did not come within 1 s" in answer


def test_a_second_head_on_a_connection_is_timed_too(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /hea")
        assert b"HTTP/1.1 408 " in read_to_end(connection)


def test_a_body_that_trickles_is_answered_408_and_its_connection_closed(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())
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
    assert b"did not come within 2 s" in answer


def test_an_answer_that_nobody_reads_is_given_up(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    before = len(process.net_connections())
    body = {"query": "q", "documents": ["x" * 1_000_000 + str(number) for number in range(READ_NOTHING_BYTES >> 20)]}
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(raw_request(body))
        until(lambda: f"POST {PATH} 200 " in server.output.rsplit("did not come", 1)[-1])
        until(lambda: len(process.net_connections()) <= before)


def test_connections_cut_at_every_stage_leave_nothing_behind(server: Server, cases: list[Case]) -> None:
    process = psutil.Process(server.process.pid)
    request = raw_request(cases[0].body)
    before = process.num_fds()
    for length in range(0, len(request) + 1, 7):
        with connect(server) as connection:
            connection.sendall(request[:length])
    for _ in range(20):  # cut while the answer is computed, and as it is sent
        with connect(server) as connection:
            connection.sendall(request)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
    until(lambda: process.num_fds() <= before)
    with Client(base_url=server.address, timeout=WAIT_SECONDS) as client:
        until(lambda: "local_rerank_requests_in_flight 1.0" in client.get("/metrics").text)
        assert "local_rerank_queued_tokens 0.0" in client.get("/metrics").text
        assert client.post(PATH, json=cases[0].body).status_code == 200
