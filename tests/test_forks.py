"""Rerankers created before `os.fork` work in the child or raise an error that says why not. Nothing hangs."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from local_rerank import AsyncReranker, Reranker, RerankRequest, forks
from local_rerank.arguments import scores_of
from local_rerank.engine.cpu.compute_thread import compute
from local_rerank.errors import CheckpointError, ModelUnavailable, UnusableAfterFork
from tests.forked import Child, in_child
from tests.test_async_reranker import Gate

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python 3.12 and later
]
QUERY, DOCUMENTS = "a query", [f"document {number}" for number in range(5)]
CLOSE = 1e-4  # tolerance of fp32 log-odds in different batches


def log_odds(reranker: Reranker) -> list[float]:
    return scores_of(reranker.rank(QUERY, DOCUMENTS), logits=True)


@pytest.fixture
def fresh(tiny_checkpoint: Path) -> Iterator[Reranker]:
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32") as reranker:
        yield reranker


@pytest.fixture
def expected(fresh: Reranker) -> list[float]:
    """The log-odds of `fresh`, which starts its threads."""
    return log_odds(fresh)


def test_a_reranker_works_in_a_child_and_then_in_the_parent(fresh: Reranker, expected: list[float]) -> None:
    for _ in range(2):
        assert in_child(lambda: log_odds(fresh)) == pytest.approx(expected, abs=CLOSE)
        assert log_odds(fresh) == pytest.approx(expected, abs=CLOSE)


def test_an_unused_reranker_works_in_a_child(fresh: Reranker) -> None:
    assert in_child(lambda: log_odds(fresh)) == pytest.approx(log_odds(fresh), abs=CLOSE)


def test_a_child_of_a_child_works(fresh: Reranker, expected: list[float]) -> None:
    def child() -> list[list[float]]:
        return [in_child(lambda: log_odds(fresh)), log_odds(fresh), in_child(lambda: log_odds(fresh))]

    for scores in in_child(child):
        assert scores == pytest.approx(expected, abs=CLOSE)


def test_a_child_forked_by_a_thread_works(fresh: Reranker, expected: list[float]) -> None:
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(in_child, lambda: log_odds(fresh)).result() == pytest.approx(expected, abs=CLOSE)


def test_a_child_forked_by_the_compute_thread_works(fresh: Reranker, expected: list[float]) -> None:
    assert compute(lambda: in_child(lambda: log_odds(fresh))) == pytest.approx(expected, abs=CLOSE)


def test_a_new_thread_computes_in_the_child(fresh: Reranker, expected: list[float]) -> None:
    """libgomp's pool belongs to a thread. A thread that ran an operator before the fork has a pool of dead threads."""

    def child() -> bool:
        log_odds(fresh)
        return compute(threading.get_ident) == threading.get_ident()

    assert in_child(child) is False


@pytest.mark.skipif(sys.platform != "linux" or not torch._C._has_mkldnn, reason="counts oneDNN's threads in /proc")
def test_a_child_computes_with_the_number_of_threads_of_the_parent(tiny_checkpoint: Path) -> None:
    """A oneDNN operator does not ask torch for that number if it is a thread's first operator."""
    number = compute(torch.get_num_threads)
    x, weight = compute(lambda: (torch.ones(512, 512), torch.ones(512, 512).to_mkldnn()))

    def product() -> None:
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    def num_new_threads() -> int:
        before = set(Path("/proc/self/task").iterdir())  # other packages may start threads in the child
        compute(product)
        return len(set(Path("/proc/self/task").iterdir()) - before)

    try:
        for given in (1, 2):
            with Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32", threads=given):
                assert in_child(num_new_threads) == given  # one is the new compute thread
    finally:
        compute(lambda: torch.set_num_threads(number))


def test_children_work_while_the_parent_computes(fresh: Reranker, expected: list[float]) -> None:
    """Wherever the parent's threads are: in an operator, the queue, a future, the log or the tokenizer."""
    ended = threading.Event()

    def work(number: int) -> int:
        count = 0
        while not ended.is_set():
            fresh.rank(f"query {number}", ["text " * (count % 60 + 1), *DOCUMENTS])
            count += 1
        return count

    with ThreadPoolExecutor(4) as threads:
        working = [threads.submit(work, number) for number in range(4)]
        try:
            for _ in range(6):
                assert in_child(lambda: log_odds(fresh)) == pytest.approx(expected, abs=CLOSE)
        finally:
            ended.set()
        assert all(one.result(60) > 0 for one in working)


def test_a_fork_waits_until_the_parent_is_between_two_layers(fresh: Reranker, expected: list[float]) -> None:
    """Not while the request is held before the first layer, but before the last layer."""
    entered, gate, seen = threading.Event(), threading.Event(), []

    def hold(*_: object) -> None:
        if not seen:
            seen.append("held")
            entered.set()
            assert gate.wait(30)
            seen.append("goes on")

    backbone = fresh.engine.decoder
    backbone.rotary_emb.register_forward_hook(hold)
    fresh.engine.decoder.layers[-1].self_attn.o_proj.register_forward_hook(lambda *_: seen.append("last layer"))
    answer = fresh.submit(RerankRequest(query=QUERY, documents=tuple(DOCUMENTS)))
    assert entered.wait(30)
    threading.Timer(0.3, gate.set).start()
    assert in_child(lambda: (seen.copy(), log_odds(fresh))) == (["held", "goes on"], pytest.approx(expected, abs=CLOSE))
    assert [item.index for item in answer.result(30)] == [item.index for item in fresh.rank(QUERY, DOCUMENTS)]


def test_a_fork_waits_until_no_text_is_being_encoded() -> None:
    entered, gate, seen = threading.Event(), threading.Event(), []

    def encode() -> None:
        with forks.encoding():
            entered.set()
            assert gate.wait(30)
            seen.append("encoded")

    with ThreadPoolExecutor(1) as threads:
        encoding = threads.submit(encode)
        assert entered.wait(30)
        threading.Timer(0.1, gate.set).start()
        assert in_child(seen.copy) == ["encoded"]
        encoding.result(30)


def test_a_fork_that_stops_waiting_makes_a_child_that_raises(fresh: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate = threading.Event(), threading.Event()
    monkeypatch.setattr(forks, "MAX_WAIT_SECONDS", 0.05)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(compute, lambda: (entered.set(), gate.wait(30)))
        assert entered.wait(30)
        with pytest.raises(UnusableAfterFork, match="forked while a model was loaded or run"):
            in_child(lambda: fresh.rank(QUERY, DOCUMENTS))
        gate.set()
        running.result(30)
    assert in_child(lambda: log_odds(fresh)) == pytest.approx(log_odds(fresh), abs=CLOSE)


def test_the_child_has_an_empty_queue(fresh: Reranker, expected: list[float]) -> None:
    gate = Gate(fresh)
    waiting = [fresh.submit(RerankRequest(query=str(number), documents=tuple(DOCUMENTS))) for number in range(3)]
    assert gate.entered.wait(30)

    def child() -> tuple[int, list[float]]:
        gate.open.set()
        return fresh.num_queued_requests, log_odds(fresh)

    num_requests, scores = in_child(child)
    assert num_requests == 0
    assert scores == pytest.approx(expected, abs=CLOSE)
    assert not any(future.done() for future in waiting)
    gate.open.set()
    for future in waiting:
        assert len(future.result(30)) == len(DOCUMENTS)


def test_closing_in_the_child_does_not_close_the_parent(fresh: Reranker) -> None:
    def child() -> None:
        fresh.close()
        fresh.rank(QUERY, DOCUMENTS)

    with pytest.raises(ModelUnavailable):
        in_child(child)
    with pytest.raises(ModelUnavailable):
        in_child(lambda: (log_odds(fresh), child()))
    assert log_odds(fresh)
    fresh.close()
    with pytest.raises(ModelUnavailable):
        in_child(lambda: log_odds(fresh))


def test_a_child_that_only_exits_does_not_hang_and_the_parent_works(tiny_checkpoint: Path) -> None:
    """In a program of its own, because a child that calls sys.exit runs the parent's exit handlers."""
    code = f"""
import asyncio, os, sys, threading
from local_rerank import AsyncReranker, Reranker

reranker = Reranker({str(tiny_checkpoint)!r}, device="cpu")
other = AsyncReranker({str(tiny_checkpoint)!r}, device="cpu")
asyncio.run(other.rank("q", ["a"]))
before = reranker.rank("q", ["a", "b"])
ended = threading.Event()
working = threading.Thread(target=lambda: [reranker.rank("q", ["a"]) for _ in range(9999) if not ended.wait(0.05)])
working.start()
for leave in (os._exit, sys.exit):
    if (pid := os.fork()) == 0:
        leave(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
ended.set()
working.join()
assert [item.index for item in reranker.rank("q", ["a", "b"])] == [item.index for item in before]
asyncio.run(other.rank("q", ["a"]))
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_two_rerankers_work_in_one_child(fresh: Reranker, tiny_reranker: Reranker, expected: list[float]) -> None:
    def child() -> list[list[float]]:
        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(lambda number: log_odds((fresh, tiny_reranker)[number % 2]), range(8)))

    for scores in in_child(child):
        assert scores == pytest.approx(expected, abs=CLOSE)


of_workers: list[Reranker] = []


def log_odds_in_worker(_: int) -> tuple[int, list[float]]:
    return os.getpid(), log_odds(of_workers[0])


def test_multiprocessing_with_fork_works(fresh: Reranker, expected: list[float]) -> None:
    context = multiprocessing.get_context("fork")
    of_workers[:] = [fresh]
    with ProcessPoolExecutor(2, mp_context=context) as processes:
        for pid, scores in processes.map(log_odds_in_worker, range(4), timeout=60):
            assert pid != os.getpid()
            assert scores == pytest.approx(expected, abs=CLOSE)
    pool = context.Pool(2)
    results = pool.map_async(log_odds_in_worker, range(4))
    pool.close()
    for _, scores in results.get(60):
        assert scores == pytest.approx(expected, abs=CLOSE)
    pool.join()  # `with` sends SIGTERM, for which Ray may have set a handler in this process that ends no child


def test_an_async_reranker_works_in_a_new_event_loop_of_the_child(tiny_checkpoint: Path, expected: list[float]) -> None:
    async def scores(reranker: AsyncReranker) -> list[float]:
        results = await asyncio.gather(*(reranker.rank(QUERY, DOCUMENTS) for _ in range(8)))
        return scores_of(results[-1], logits=True)

    async def parent() -> None:
        async with AsyncReranker(str(tiny_checkpoint), device="cpu", dtype="fp32") as reranker:
            for _ in range(2):
                answers = [asyncio.create_task(scores(reranker)) for _ in range(4)]
                await asyncio.sleep(0)
                with ThreadPoolExecutor(1) as threads:  # not the event loop's thread
                    child = threads.submit(Child, lambda: asyncio.run(scores(reranker)))
                    assert await asyncio.to_thread(child.result(60).result) == pytest.approx(expected, abs=CLOSE)
                for answer in await asyncio.gather(*answers):
                    assert answer == pytest.approx(expected, abs=CLOSE)

    asyncio.run(parent())


def test_a_fork_waits_for_an_async_reranker_to_load(tiny_checkpoint: Path, expected: list[float]) -> None:
    async def scores() -> list[float]:
        async with reranker:
            return scores_of(await reranker.rank(QUERY, DOCUMENTS), logits=True)

    reranker = AsyncReranker(str(tiny_checkpoint), device="cpu", dtype="fp32")
    assert in_child(lambda: asyncio.run(scores())) == pytest.approx(expected, abs=CLOSE)
    assert asyncio.run(scores()) == pytest.approx(expected, abs=CLOSE)


def test_an_async_reranker_that_was_loading_too_long_raises_in_the_child(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, entered = threading.Event(), threading.Event()

    def load(**_: object) -> None:
        entered.set()
        assert gate.wait(30)

    monkeypatch.setattr("local_rerank.reranker.Reranker", load)
    monkeypatch.setattr(forks, "MAX_WAIT_SECONDS", 0.05)
    reranker = AsyncReranker(str(tiny_checkpoint))
    assert entered.wait(30)
    with pytest.raises(UnusableAfterFork, match="no model was loaded before the process was forked"):
        in_child(lambda: asyncio.run(reranker.rank(QUERY, DOCUMENTS)))
    gate.set()


def test_an_async_reranker_that_failed_to_load_raises_its_error_in_the_child(tmp_path: Path) -> None:
    reranker = AsyncReranker(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="nothing"):
        in_child(lambda: asyncio.run(reranker.rank(QUERY, DOCUMENTS)))
    asyncio.run(reranker.close())


@pytest.mark.parametrize(
    ("device", "device_map", "named"),
    [("cuda:0", None, "cuda:0"), ("mps", None, "mps"), ("cpu", "auto", "device_map 'auto'")],
)
def test_a_model_that_is_not_on_the_cpu_raises_in_the_child_at_once(
    fresh: Reranker, device: str, device_map: str | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = (fresh.engine, replace(fresh.info, device=device))
    monkeypatch.setattr("local_rerank.reranker.load", lambda *_, **__: elsewhere)
    monkeypatch.setattr("local_rerank.reranker.make_plan", lambda *_: None)
    fresh = Reranker(fresh.config.model, config=replace(fresh.config, device_map=device_map))
    for use in (lambda: fresh.rank(QUERY, DOCUMENTS), lambda: fresh.submit(RerankRequest(query="q", documents=("a",)))):
        began = time.monotonic()
        with pytest.raises(UnusableAfterFork, match=f"the model is on {named}, .* after the fork .*spawn"):
            in_child(use)
        assert time.monotonic() - began < 5
    fresh.close()


def test_parallel_tokenization_is_disabled_in_a_child(
    fresh: Reranker, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert log_odds(fresh) == pytest.approx(expected, abs=CLOSE)  # starts the tokenizer's threads
    assert in_child(lambda: log_odds(fresh)) == pytest.approx(expected, abs=CLOSE)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_shared_with_the_child(nano: Reranker) -> None:
    size = sum(weight.numel() * weight.element_size() for weight in nano.engine.decoder.parameters())

    def private_bytes() -> int:
        return int(psutil.Process().memory_full_info().uss)

    def child() -> int:
        gc.disable()  # a collection writes to the head of each object, and so copies most pages of Python's heap
        before = private_bytes()
        log_odds(nano)
        return private_bytes() - before

    log_odds(nano)
    assert in_child(child) < size / 2


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_pickle_and_copy_raise_and_say_what_to_do(
    fresh: Reranker, tiny_checkpoint: Path, copied: Callable[[object], object]
) -> None:
    with pytest.raises(TypeError, match=r"a Reranker holds threads .* Pass the model's name and create a Reranker in"):
        copied(fresh)
    reranker = AsyncReranker(str(tiny_checkpoint), device="cpu")
    with pytest.raises(TypeError, match=r"create an? AsyncReranker in each process"):
        copied(reranker)
    asyncio.run(reranker.close())


def test_spawning_a_process_with_a_reranker_raises_and_says_what_to_do(fresh: Reranker) -> None:
    with pytest.raises(TypeError, match="Pass the model's name"):
        multiprocessing.get_context("spawn").Process(target=log_odds, args=(fresh,)).start()
