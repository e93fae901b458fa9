"""Makes `os.fork` safe. A child has one thread, a copy of the parent's memory, and locks in the state they were in.

Before a fork we wait until no model is loading, no text is being encoded and the compute thread is between two layers,
because imports, fastokens, oneDNN and MKL hold locks that the child cannot replace. In the child, each object that owns
threads or locks replaces them. Parent and child share the weights (copy-on-write).

We poll plain attributes, because another thread could fork while it holds a lock of this module.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  # its fork hook takes a lock and must run after ours
import logging  # noqa: F401  # likewise
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import NoReturn, Protocol, TypeVar
from weakref import WeakSet

from local_rerank.errors import UnusableAfterFork

MAX_WAIT_SECONDS = 600.0  # a fork waits no longer; loading a large model from a slow disk takes less
POLL_SECONDS = 0.0005

T = TypeVar("T")


class Renewable(Protocol):
    """Owns threads or locks that a forked child must replace."""

    def renew(self) -> None:
        """Called in the child. Must not start a thread, because most children only exit or run a program."""


class _ProcessState:
    def __init__(self) -> None:
        self.forking: set[int] = set()  # ids of threads
        self.loads: set[object] = set()
        self.encodings: set[object] = set()
        self.is_computing = False
        self.is_usable = True  # False in a child forked while a model was loading or an operator was running


class _ThreadState(threading.local):
    is_busy = False  # the thread computes or loads, so its own fork must not wait for it
    is_safe = True  # the fork that the thread makes


_process, _thread = _ProcessState(), _ThreadState()
_renewables: WeakSet[Renewable] = WeakSet()


def renew_in_child(owner: Renewable) -> None:
    """Call `owner.renew` in every child that this process forks while the owner is alive."""
    _renewables.add(owner)


def check_usable() -> None:
    """Raises UnusableAfterFork in a child that was forked while a model was loading or an operator was running."""
    if not _process.is_usable:
        raise UnusableAfterFork(f"the process was forked while a model was loaded or run for {MAX_WAIT_SECONDS:.0f} s")


@contextmanager
def computing() -> Iterator[None]:
    """The compute thread is busy: a fork waits for the end of this block or for the next `between_layers`."""
    _thread.is_busy = True
    _take_turn()
    try:
        yield
    finally:
        _process.is_computing = False
        _thread.is_busy = False


def between_layers() -> None:
    """Let a waiting fork go ahead. Call it where this thread runs no operator."""
    if _process.forking and _thread.is_busy:
        _process.is_computing = False
        _take_turn()


@contextmanager
def encoding() -> Iterator[None]:
    """A tokenizer holds locks: a fork waits for the end of this block."""
    token, was_busy = object(), _thread.is_busy
    try:
        _process.encodings.add(token)
        while _process.forking and not was_busy:
            _process.encodings.discard(token)
            _wait_while(lambda: bool(_process.forking))
            _process.encodings.add(token)
        _thread.is_busy = True
        yield
    finally:
        _thread.is_busy = was_busy
        _process.encodings.discard(token)


def load_in_thread(threads: Executor, load: Callable[[], T]) -> Future[T]:
    """Run `load` in one of `threads`; forks wait until it is done."""
    token = object()
    while True:
        _process.loads.add(token)
        if not _process.forking:
            break
        _process.loads.discard(token)
        _wait_while(lambda: bool(_process.forking))
    try:
        outcome = threads.submit(_load, load)
    except BaseException:
        _process.loads.discard(token)
        raise
    outcome.add_done_callback(lambda _: _process.loads.discard(token))
    return outcome


def refuse_copies(self: object) -> NoReturn:
    """`__reduce__` of an object that can be neither pickled nor copied, because it holds threads and a model."""
    name = type(self).__name__
    raise TypeError(
        f"a {name} holds threads and a loaded model, so it can be neither pickled nor copied. Pass the model's name "
        f"and create a {name} in each process, or create it before the processes are forked: they share its weights"
    )


def _load(load: Callable[[], T]) -> T:
    _thread.is_busy = True
    try:
        return load()
    finally:
        _thread.is_busy = False


def _take_turn() -> None:
    while True:
        _process.is_computing = True
        if not _process.forking:
            return
        _process.is_computing = False
        _wait_while(lambda: bool(_process.forking))


def _wait_while(holds: Callable[[], bool]) -> bool:
    """Poll until `holds` is false; False if it still holds after `MAX_WAIT_SECONDS`."""
    end = time.monotonic() + MAX_WAIT_SECONDS
    while holds():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _before() -> None:
    if _thread.is_busy:
        return
    thread = threading.get_ident()
    _thread.is_safe = False  # in case an interrupt ends this function
    # not marked as forking while we wait, because a load may need the compute thread
    while ended := _wait_while(lambda: bool(_process.loads)):
        _process.forking.add(thread)
        if not _process.loads:
            break
        _process.forking.discard(thread)
    _process.forking.add(thread)
    _thread.is_safe = ended and _wait_while(lambda: _process.is_computing or bool(_process.encodings))


def _after_in_parent() -> None:
    _thread.is_safe = True
    _process.forking.discard(threading.get_ident())


def _after_in_child() -> None:
    _ProcessState.__init__(_process)
    _process.is_usable, _thread.is_safe, _thread.is_busy = _thread.is_safe, True, False
    if os.environ.get("TOKENIZERS_PARALLELISM"):  # tokenizers would wait for threads of the parent; unset, it does not
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for owner in list(_renewables):
        owner.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
