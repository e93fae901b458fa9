"""Forked children for tests: what a call gives in one, within a deadline."""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
from collections.abc import Callable
from typing import Any

DEADLINE_SECONDS = 60.0


class Child:
    """A child of `os.fork` that runs `call`, sends back what it returns or raises, and ends."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._end = time.monotonic() + DEADLINE_SECONDS
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(write)
            return
        try:
            answer: object = (True, call())
        except BaseException as error:
            answer = (False, error)
        try:
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)

    def result(self) -> Any:
        """What the call returned; raises what it raised, and AssertionError where the child hangs."""
        sent = bytearray()
        while select.select([self._read], [], [], max(0.0, self._end - time.monotonic()))[0]:
            if not (part := os.read(self._read, 65536)):
                break
            sent += part
        os.close(self._read)
        assert wait_for(self.pid, self._end) == 0
        is_good, answer = pickle.loads(sent)
        if not is_good:
            raise answer
        return answer


def in_child(call: Callable[[], object]) -> Any:
    """What `call` returns or raises in a forked child."""
    return Child(call).result()


def wait_for(pid: int, end: float | None = None) -> int:
    """The exit status of a child; one that hangs is killed, and that fails the test."""
    end = time.monotonic() + DEADLINE_SECONDS if end is None else end
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")
