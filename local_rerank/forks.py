"""Makes `os.fork` safe: a child has one thread, a copy of the parent's memory, and every lock in the state it was in.

Before a fork we wait until models that are being loaded are there and the thread that computes is between two layers,
because imports, oneDNN and MKL take locks that nobody could replace in the child. In the child, each object that has
threads or locks replaces them. Weights are shared until somebody writes to them.

We poll plain attributes: a lock of this module could itself be held while another thread forks.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  # as logging: its hook, which takes a lock, has to run after ours
import logging  # noqa: F401
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import NoReturn, Protocol, TypeVar
from weakref import WeakSet

from local_rerank.errors import UnusableAfterFork

LIMIT_SECONDS = 600.0  # after which a fork goes ahead: longer than loading a large model from a slow disk
POLL_SECONDS = 0.0005

T = TypeVar("T")


class Renewable(Protocol):
    """Has threads or locks, which a forked child must replace."""

    def renew(self) -> None:
        """Called in the child, as its only thread. Starts no thread: most children only exit or run a program."""


class _Gate:
    def __init__(self) -> None:
        self.forking: set[int] = set()  # threads
        self.loads: set[object] = set()
        self.is_computing = False
        self.is_whole = True  # in a child: nothing was half done as it was forked


class _Own(threading.local):
    """What each thread has for itself."""

    is_inside = False  # it computes or loads; a fork of its own does not wait for that
    is_whole = True  # of the fork that it makes


_gate, _own = _Gate(), _Own()
_renewables: WeakSet[Renewable] = WeakSet()


def renew_in_child(owner: Renewable) -> None:
    """Have `owner.renew` called in every child that this process forks, for as long as the owner lives."""
    _renewables.add(owner)


def check_whole() -> None:
    """Raises UnusableAfterFork in a child that was forked in the middle of an operator or of loading a model."""
    if not _gate.is_whole:
        raise UnusableAfterFork(f"the process was forked while a model was loaded or run for {LIMIT_SECONDS:.0f} s")


@contextmanager
def computing() -> Iterator[None]:
    """Around what the thread that computes runs: a fork waits for its end, or for the next `between_layers`."""
    _own.is_inside = True
    _take_turn()
    try:
        yield
    finally:
        _gate.is_computing = False
        _own.is_inside = False


def between_layers() -> None:
    """Lets a fork that waits go first. No operator runs in this thread as this is called."""
    if _gate.forking and _own.is_inside:
        _gate.is_computing = False
        _take_turn()


def load_beside(threads: Executor, load: Callable[[], T]) -> Future[T]:
    """What `load` returns or raises, run in one of `threads`. A fork waits for it."""
    token = object()
    while True:
        _gate.loads.add(token)
        if not _gate.forking:
            break
        _gate.loads.discard(token)
        _wait_while(lambda: bool(_gate.forking))
    try:
        outcome = threads.submit(_load, load)
    except BaseException:
        _gate.loads.discard(token)
        raise
    outcome.add_done_callback(lambda _: _gate.loads.discard(token))
    return outcome


def refuse_copies(self: object) -> NoReturn:
    """The `__reduce__` of what neither pickle nor copy can take along: threads, and a model of gigabytes."""
    name = type(self).__name__
    raise TypeError(
        f"a {name} holds threads and a loaded model, so it can be neither pickled nor copied. Pass the model's name "
        f"and create a {name} in each process, or create it before the processes are forked: they share its weights"
    )


def _load(load: Callable[[], T]) -> T:
    _own.is_inside = True
    try:
        return load()
    finally:
        _own.is_inside = False


def _take_turn() -> None:
    while True:
        _gate.is_computing = True
        if not _gate.forking:
            return
        _gate.is_computing = False
        _wait_while(lambda: bool(_gate.forking))


def _wait_while(holds: Callable[[], bool]) -> bool:
    """Whether it ended in time."""
    end = time.monotonic() + LIMIT_SECONDS
    while holds():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _before() -> None:
    thread = threading.get_ident()
    if _own.is_inside:
        return
    _own.is_whole = False  # should an interrupt end this function
    while ended := _wait_while(lambda: bool(_gate.loads)):  # which the thread that computes may have to work for
        _gate.forking.add(thread)
        if not _gate.loads:
            break
        _gate.forking.discard(thread)
    _gate.forking.add(thread)
    _own.is_whole = ended and _wait_while(lambda: _gate.is_computing)


def _after_in_parent() -> None:
    _own.is_whole = True
    _gate.forking.discard(threading.get_ident())


def _after_in_child() -> None:
    _Gate.__init__(_gate)
    _gate.is_whole, _own.is_whole, _own.is_inside = _own.is_whole, True, False
    if os.environ.get("TOKENIZERS_PARALLELISM"):  # it would wait for threads that are gone; unset, it sees to that
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for owner in list(_renewables):
        owner.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
