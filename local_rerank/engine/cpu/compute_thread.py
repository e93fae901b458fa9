"""The threads of torch's CPU operators: how they wait, which thread they work for, and whether the process is ours.

libgomp keeps a pool of threads for every thread that ever ran an operator, and once the pools hold more threads than
there are cores none of them spins before it sleeps, which made short passes 1.6 times as slow. So one thread of the
process runs all that is computed on a CPU.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from local_rerank import forks
from local_rerank.engine.cpu.malloc import share_one_arena

VARIABLES = {  # read when torch is loaded
    "OMP_WAIT_POLICY": "passive",  # spinning without end made a request of 32 tokens take 350 ms beside other work
    "GOMP_SPINCOUNT": "20000",  # some ten microseconds: without them waking takes longer than a block of tokens
}

CACHES = {  # shapes of products whose code is kept, by themselves 1,024, half a megabyte each; 8,192 tokens have 190
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "16",  # torch's own in front of it
}

LOOK = 1.0  # seconds after which a caller looks up: Python misses an interrupt that comes just before a thread sleeps

T = TypeVar("T")

_is_owned = False


def own_process() -> None:
    """What commands call first, before torch is loaded: this process is ours, and is set up as we like it.

    Its threads spin for a moment before they sleep, and code for shapes that do not come again is let go, unless the
    environment says otherwise. All threads that are started from now on allocate from one arena: later, the thread that
    computes may be given that of another.
    """
    global _is_owned
    _is_owned = True
    share_one_arena()
    if not VARIABLES.keys() & os.environ.keys():
        os.environ.update(VARIABLES)
    for name, value in CACHES.items():
        os.environ.setdefault(name, value)


def owns_process() -> bool:
    """False where the library serves another program, whose settings are its own."""
    return _is_owned


def compute(call: Callable[[], T]) -> T:
    """What `call` returns or raises, run in the one thread of this process that computes on the CPU."""
    return _compute_thread.run(call)


class _ComputeThread:
    def __init__(self) -> None:
        self._set_up()
        forks.renew_in_child(self)

    def _set_up(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()  # held while a call begins, ends or is interrupted
        self._running: Future[Any] | None = None

    def renew(self) -> None:
        """A child's thread is started by the first call there."""
        self._set_up()
        if (torch := sys.modules.get("torch")) is not None:
            self._calls.put((Future(), torch.get_num_threads))  # gives it the number that was set, oneDNN does not

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
            if not future.cancel():
                self._interrupt(future)
            raise
        finally:
            del future  # an exception's traceback would hold it, and it the exception

    def _interrupt(self, future: Future[Any]) -> None:
        """Raises KeyboardInterrupt in the call that `future` stands for, if it still runs."""
        with self._turn:
            if self._running is future:
                self._raise(ctypes.py_object(KeyboardInterrupt))

    def _raise(self, error: Any) -> None:
        """Has the thread raise `error` at its next step; None takes back what it has not raised yet."""
        assert self._thread is not None
        assert self._thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), error)

    def _start(self) -> None:
        """Starts the thread unless there is one."""
        with self._starting:
            if self._thread is None:  # an interrupt of is_alive() would mark a thread that runs as ended
                share_one_arena()
                threading.Thread(target=self._work, name="local-rerank-compute", daemon=True).start()

    def _stop(self, thread: threading.Thread) -> None:
        """Lets the call that runs come to its end: a process that ends below an operator is aborted."""
        if thread is self._thread:
            self._calls.put(None)
            thread.join()

    def _work(self) -> None:
        with self._starting:  # whoever started it may have been interrupted and have started another
            if self._thread is not None:
                return
            self._thread = threading.current_thread()
        atexit.register(self._stop, self._thread)
        while (given := self._calls.get()) is not None:
            future, call = given
            if future.set_running_or_notify_cancel():
                with forks.computing():
                    result, error = self._attempt(future, call)
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
                del result, error
            del given, future, call  # what they hold is free while the next call is waited for

    def _attempt(self, future: Future[Any], call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        """What `call` returns or raises. An interrupt that comes after its end is met here, not by the next call."""
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
            del result, error  # else an error's traceback would hold itself


_compute_thread = _ComputeThread()
