"""The threads of torch's CPU operators: how they wait for one another, and which thread they work for.

libgomp keeps a pool of threads for every thread that ever ran an operator, and once the pools hold more threads than
there are cores none of them spins before it sleeps, which made short passes 1.6 times as slow. So one thread of the
process runs all that is computed on a CPU.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from local_rerank.malloc import share_one_arena

VARIABLES = {  # read when torch is loaded
    "OMP_WAIT_POLICY": "passive",  # spinning without end made a request of 32 tokens take 350 ms beside other work
    "GOMP_SPINCOUNT": "20000",  # some ten microseconds: without them waking takes longer than a block of tokens
}

LOOK = 1.0  # seconds after which a caller looks up: Python misses an interrupt that comes just before a thread sleeps

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
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def run(self, call: Callable[[], T]) -> T:
        if threading.current_thread() is self._thread:
            return call()
        self._start()
        future: Future[T] = Future()
        ended = threading.Lock()  # an interrupt while the future's own lock is held would leave it held
        ended.acquire()
        future.add_done_callback(lambda _: ended.release())
        try:
            self._calls.put((future, call))  # within the try: an interrupt may come as soon as the call runs
            while not ended.acquire(timeout=LOOK):
                pass
            return future.result()
        except KeyboardInterrupt:  # the main thread's, which loads models: what it waits for ends too, at its next step
            if not (future.cancel() or future.done()):
                self._interrupt()
            raise
        finally:
            del future  # an exception's traceback would hold it, and it the exception

    def _interrupt(self) -> None:
        """Raises KeyboardInterrupt in the call that runs."""
        assert self._thread is not None
        assert self._thread.ident is not None
        error = ctypes.py_object(KeyboardInterrupt)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), error)

    def _start(self) -> None:
        """Starts the thread unless it runs; the child of a fork has none."""
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                share_one_arena()
                self._thread = threading.Thread(target=self._work, name="local-rerank-compute", daemon=True)
                self._thread.start()
                atexit.register(self._stop, self._thread)

    def _stop(self, thread: threading.Thread) -> None:
        """Lets the call that runs come to its end: a process that ends below an operator is aborted."""
        if thread.is_alive():
            self._calls.put(None)
            thread.join()

    def _work(self) -> None:
        while (given := self._calls.get()) is not None:
            future, call = given
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del given, future, call  # what they hold is free while the next call is waited for


_compute_thread = _ComputeThread()
