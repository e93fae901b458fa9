"""One thread runs all CPU operators, so that libgomp keeps a single thread pool."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from local_rerank import Reranker
from local_rerank.engine.cpu.compute_thread import compute

COUNT_THREADS = """
import os
import torch
from local_rerank.engine.packing import pack
from local_rerank.requests.pair import Pair

torch.set_num_threads(2)
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
pack([Pair(prefix_ids=(1, 2, 3), document_ids=tuple(range(2000)))] * 100)
between = threads()
torch.repeat_interleave(torch.ones(1000, dtype=torch.int64))  # an operator that starts a pool for its caller
print(between - before, threads() - between)
"""


@contextmanager
def running(code: str) -> Iterator[Any]:
    """A Python process that runs `code` and is killed at the end.

    It handles SIGINT even if the test process ignores it, as background jobs of a shell do.
    """
    program = [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_all_rerankers_compute_in_one_thread(tiny_checkpoint: Path) -> None:
    seen: list[int] = []
    with Reranker(str(tiny_checkpoint)) as first, Reranker(str(tiny_checkpoint)) as second:
        for reranker in (first, second):
            layer: Any = reranker.engine.decoder.layers[-1].self_attn.o_proj
            layer.register_forward_hook(lambda *_: seen.append(threading.get_ident()))
        with ThreadPoolExecutor(4) as callers:
            list(callers.map(lambda i: (first, second)[i % 2].rank("a query", [f"document {i}"]), range(8)))
    assert seen
    assert set(seen) == {compute(threading.get_ident)}


def test_an_interrupted_program_exits_soon_and_cleanly() -> None:
    """It must wait for the running operator, because a process that exits inside one is aborted."""
    code = (
        "import torch; from local_rerank.engine.cpu.compute_thread import compute; x = torch.ones(200, 200)\n"
        "compute(lambda: [print('computing', flush=True), [x @ x for _ in range(10**7)]])"  # a quarter of an hour
    )
    with running(code) as process:
        assert process.stdout.readline() == "computing\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, said
    assert "KeyboardInterrupt" in said


def test_an_interrupt_does_not_affect_the_call_of_another_thread() -> None:
    code = """
import threading, time
from local_rerank.engine.cpu.compute_thread import compute

started, answers = threading.Event(), []
call = lambda: (started.set(), [time.sleep(0.01) for _ in range(200)], "done")[-1]
other = threading.Thread(target=lambda: answers.append(compute(call)))
other.start()
started.wait()
print("waiting", flush=True)
try:
    compute(lambda: answers.append("never"))
except KeyboardInterrupt:
    answers.append("interrupted")
other.join()
print(answers, compute(lambda: 3))
"""
    with running(code) as process:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.5)  # until it waits
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert said == "['interrupted', 'done'] 3\n", errors


def test_an_interrupt_as_a_call_begins_or_ends_does_not_hit_another_call() -> None:
    code = """
import random, threading, time
from local_rerank.engine.cpu.compute_thread import compute

signal.signal(signal.SIGALRM, signal.default_int_handler)
answers, interrupts = [], 0

def call_often():
    for number in range(5000):
        answers.append(compute(lambda: number) == number)

others = [threading.Thread(target=call_often, daemon=True) for _ in range(2)]
for other in others:
    other.start()
while any(other.is_alive() for other in others) and len(answers) < 10000:
    try:
        signal.setitimer(signal.ITIMER_REAL, random.random() * 6e-4)
        compute(lambda: sum(range(random.randrange(20000))))
        time.sleep(0.001)
    except KeyboardInterrupt:
        interrupts += 1
print(sum(answers), interrupts > 25)
"""
    with running(code) as process:
        said, errors = process.communicate(timeout=120)
    assert said == "10000 True\n", errors


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_packing_starts_no_threads() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_THREADS], capture_output=True, text=True, check=True)
    by_packing, by_torch = map(int, done.stdout.split())
    assert by_torch > 0  # otherwise the count proves nothing
    assert by_packing == 0
