"""Forked children for tests: run a call in one, with a timeout."""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
from collections.abc import Callable
from typing import Any

DEADLINE_SECONDS = 120.0


class Child:
    """A child of `os.fork` that runs `call`, sends its result or exception to the parent, and exits."""

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
        """The result of the call; raises its exception, or AssertionError if the child hangs."""
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
    """Run `call` in a forked child; its result or exception."""
    return Child(call).result()


def wait_for(pid: int, end: float | None = None) -> int:
    """The exit status of a child. A child that hangs is killed, and the test fails."""
    end = time.monotonic() + DEADLINE_SECONDS if end is None else end
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")
