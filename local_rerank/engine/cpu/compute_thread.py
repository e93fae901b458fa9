"""The process's one thread that runs CPU operators.

libgomp keeps a thread pool for every thread that ever ran an operator. Once the pools hold more threads than there are
cores, libgomp's threads no longer spin before they sleep, which made short passes 1.6 times as slow.
"""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from local_rerank import forks
from local_rerank.engine.cpu.process_setup import use_one_arena

POLL_SECONDS = 1.0  # how often a waiting caller wakes up: Python misses an interrupt just before a thread sleeps

T = TypeVar("T")


def compute(call: Callable[[], T]) -> T:
    """Run `call` in the compute thread; returns its result or raises its error."""
    return _compute_thread.run(call)


class _ComputeThread:
    def __init__(self) -> None:
        self._reset()
        forks.renew_in_child(self)

    def _reset(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()  # held while a call begins, ends or is interrupted
        self._running: Future[Any] | None = None

    def renew(self) -> None:
        """After a fork: the first call in the child starts its thread."""
        self._reset()
        if (torch := sys.modules.get("torch")) is not None:
            self._calls.put((Future(), torch.get_num_threads))  # applies torch's thread count, which oneDNN does not

    def run(self, call: Callable[[], T]) -> T:
        if threading.current_thread() is self._thread:
            return call()
        self._start()
        future: Future[T] = Future()
        ended = threading.Lock()  # interrupting a wait on the future's own lock could leave it locked
        ended.acquire()
        future.add_done_callback(lambda _: ended.release())
        try:
            self._calls.put((future, call))  # inside the try: an interrupt may come as soon as the call runs
            while not ended.acquire(timeout=POLL_SECONDS):
                pass
            return future.result()
        except KeyboardInterrupt:  # in the main thread: also end the call that it waits for
            if not future.cancel():
                self._interrupt(future)
            raise
        finally:
            del future  # breaks a reference cycle between the future and its exception's traceback

    def _interrupt(self, future: Future[Any]) -> None:
        """Raise KeyboardInterrupt in the call of `future` if it still runs."""
        with self._turn:
            if self._running is future:
                self._raise(ctypes.py_object(KeyboardInterrupt))

    def _raise(self, error: Any) -> None:
        """Make the compute thread raise `error` at its next bytecode; None cancels an error not raised yet."""
        assert self._thread is not None
        assert self._thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), error)

    def _start(self) -> None:
        """Start the thread unless it exists."""
        with self._starting:
            if self._thread is None:  # not is_alive(), which an interrupt can turn false while the thread runs
                use_one_arena()
                threading.Thread(target=self._work, name="local-rerank-compute", daemon=True).start()

    def _stop(self, thread: threading.Thread) -> None:
        """At exit, wait for the running call: a process that exits inside an operator is aborted."""
        if thread is self._thread:
            self._calls.put(None)
            thread.join()

    def _work(self) -> None:
        with self._starting:  # an interrupted caller may have started a second thread
            if self._thread is not None:
                return
            self._thread = threading.current_thread()
        atexit.register(self._stop, self._thread)
        while (item := self._calls.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                with forks.computing():
                    result, error = self._attempt(future, call)
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
                del result, error
            del item, future, call  # free what they refer to before waiting

    def _attempt(self, future: Future[Any], call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        """The result or error of `call`. A late interrupt is consumed here, so that it does not hit the next call."""
        result, error = None, None
        try:
            with self._turn:
                self._running = future
            result = call()
        except BaseException as caught:
            error = caught
        try:
            while True:
                try:
                    with self._turn:
                        self._running = None
                        self._raise(None)
                    return result, error
                except KeyboardInterrupt as late:
                    error = late
        finally:
            del result, error  # breaks a reference cycle through the traceback


_compute_thread = _ComputeThread()
