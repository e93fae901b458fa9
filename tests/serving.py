"""A server for tests: `local-rerank serve` as a process, on a free port of this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 240  # importing torch alone takes ten on a busy machine with a cold disk
STOP_SECONDS = 40  # the server itself gives accepted requests 30


@contextmanager
def serving(log: Path, *options: str) -> Iterator[str]:
    """Yields the base URL of a ready server, which logs to `log` and must end with status 0."""
    command = [sys.executable, "-m", "local_rerank", "serve", "--port", "0", *options]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        )
    try:
        yield _wait_until_ready(process, log)
    finally:
        process.terminate()
        status = process.wait(STOP_SECONDS)
    assert status == 0, f"the server ended with {status}:\n{log.read_text()}"


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if (address := re.search(r"listening on (\S+?),? ", log.read_text())) and _is_ready(address[1]):
            return address[1]
        time.sleep(0.1)
    raise AssertionError(f"the server is not ready, its exit status is {process.poll()}:\n{log.read_text()}")


def _is_ready(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/ready", timeout=10) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False
