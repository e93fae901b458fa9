"""Servers for tests: `local-rerank serve`, and other modules, as processes on free ports of this machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NATIVE = "/api/v1/services/rerank/text-rerank/text-rerank"
WAIT_SECONDS = 240  # importing torch alone takes ten on a busy machine with a cold disk
LENGTH = re.compile(rb"content-length: (\d+)\r\n.*?\r\n\r\n", re.DOTALL)


class Server:
    """A running server and its output."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    @property
    def address(self) -> str:
        found = re.search(r"listening on (\S+),", self.output)
        assert found, self.output
        return found[1]

    def connect(self) -> socket.socket:
        host, port = self.address.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=WAIT_SECONDS)

    def wait_for(self, text: str) -> None:
        until(lambda: text in self.output or self.process.poll() is not None)
        assert text in self.output, self.output

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_SECONDS)


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


@contextmanager
def started(log: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """`python -m ARGUMENTS`, killed when the block ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        )
    try:
        yield Server(process, log)
    finally:
        process.kill()
        process.wait()


@contextmanager
def serving(log: Path, *options: str) -> Iterator[Server]:
    """A ready `local-rerank serve`, which ends with status 0 and without a traceback."""
    with started(log, "local_rerank", "serve", "--port", "0", *options) as server:
        server.wait_for("ready: ")
        yield server
        assert server.stop() == 0, server.output
        assert "Traceback" not in server.output


def options(checkpoint: Path) -> list[str]:
    """Without the self-test, which random weights fail."""
    return ["--model", str(checkpoint), "--device", "cpu", "--dtype", "fp32", "--threads", "1", "--no-self-test"]


def exchange(connection: socket.socket, request: bytes) -> bytes:
    """Send raw bytes; what the server sends until its answer or the connection ends."""
    connection.sendall(request)
    answer = b""
    while (found := LENGTH.search(answer)) is None or len(answer) < found.end() + int(found[1]):
        try:
            received = connection.recv(65536)
        except ConnectionResetError:  # the server did not read all of the request
            break
        if not received:
            break
        answer += received
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split()[1])
