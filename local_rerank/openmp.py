"""The threads of torch's CPU operators: how they wait for one another, and which thread they work for.

libgomp keeps a pool of threads for every thread that ever ran an operator, and once the pools hold more threads than
there are cores none of them spins before it sleeps, which made short passes 1.6 times as slow. So one thread of the
process runs all that is computed on a CPU.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

VARIABLES = {  # read when torch is loaded
    "OMP_WAIT_POLICY": "passive",  # spinning without end made a request of 32 tokens take 350 ms beside other work
    "GOMP_SPINCOUNT": "20000",  # some ten microseconds: without them waking takes longer than a block of tokens
}

T = TypeVar("T")


def wait_briefly() -> None:
    """Let threads spin for a moment before they sleep, unless the environment says how they wait."""
    if not VARIABLES.keys() & os.environ.keys():
        os.environ.update(VARIABLES)


def compute(call: Callable[[], T]) -> T:
    """What `call` returns or raises, run in the one thread of this process that computes on the CPU."""
    return _compute_thread.run(call)


class _ComputeThread:
    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def run(self, call: Callable[[], T]) -> T:
        if threading.current_thread() is self._thread:
            return call()
        self._start()
        future: Future[T] = Future()
        self._calls.put((future, call))
        try:
            return future.result()
        finally:
            del future  # an exception's traceback would hold it, and it the exception

    def _start(self) -> None:
        """Starts the thread unless it runs; the child of a fork has none."""
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="local-rerank-compute", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del future, call  # what they hold is free while the next call is waited for


_compute_thread = _ComputeThread()
