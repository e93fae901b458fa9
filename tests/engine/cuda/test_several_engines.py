"""Engines that share a device: one captures graphs, others launch batches. Without a GPU the device is simulated."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from local_rerank import Reranker
from local_rerank.engine.cuda.graphs import DeviceLock, GraphRunner, capture_stream, cuda_capture, shapes_up_to
from local_rerank.engine.engine import Engine
from local_rerank.engine.kernel_table import KERNELS
from local_rerank.models.room import release_memory
from local_rerank.requests.pair import Pair
from tests.gpu import needs_gpu
from tests.tiny_checkpoints import make_checkpoint

DEVICE, OTHER = torch.device("meta:0"), torch.device("meta:1")
PAIRS = [Pair.of((1,), (2,))]


class OnGpu(Tensor):
    is_cuda = True
    device = DEVICE


def engine_on(device: torch.device) -> Engine:
    decoder: Any = SimpleNamespace(state_dict=lambda: {"weight": torch.ones(1).as_subclass(OnGpu)})
    return Engine(decoder, torch.ones(2, 1).as_subclass(OnGpu), kernel=KERNELS["sdpa"], device=device)


class SlowCapture:
    """Takes the time in which another thread does something."""

    def __init__(self) -> None:
        self.num_done, self.is_open, self.first_may_end = 0, threading.Event(), threading.Event()

    def __call__(self, run: object, is_first: bool) -> tuple[Callable[[], None], Tensor]:
        self.is_open.set()
        self.first_may_end.wait(5)
        time.sleep(0.02)
        self.is_open.clear()
        self.num_done += 1
        return lambda: None, torch.zeros(1)


class Graphs:
    """Those of an engine whose batch does not fit beside them."""

    def __init__(self, note: Callable[[], None]) -> None:
        self.note = note

    def forget_all(self) -> bool:
        time.sleep(0.01)  # in which the next capture would begin
        self.note()
        return True

    def halve(self) -> None:
        self.note()


def test_while_an_engine_captures_others_wait_for_one_capture_and_only_on_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capturing, launching, elsewhere = engine_on(DEVICE), engine_on(DEVICE), engine_on(OTHER)
    capture, seen = SlowCapture(), list[tuple[bool, int]]()

    def note(*_: object) -> Any:
        seen.append((capture.is_open.is_set(), capture.num_done))
        return list

    def forward(batch: object, graphs: Graphs | None) -> Any:
        if graphs is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return note()

    def noted(run: Callable[[], object]) -> list[int]:
        """The captures that were done whenever `run`, which starts within a capture, used the device."""
        seen.clear()
        assert capture.is_open.wait(10)
        before = capture.num_done
        run()
        assert not any(is_open for is_open, _ in seen)
        return [done - before for _, done in seen]

    monkeypatch.setattr(torch.cuda, "synchronize", note)
    for engine in (launching, elsewhere):
        monkeypatch.setattr(engine, "_forward", forward)
    launching.graphs = Graphs(note)  # type: ignore[assignment]
    capturing.graphs = GraphRunner(capturing.run_decoder, DEVICE, max_tokens=1024, capture=capture)
    thread = threading.Thread(target=capturing.capture_graphs)
    thread.start()
    try:
        assert capture.is_open.wait(10)
        elsewhere.launch(PAIRS)
        assert seen == [(True, 0)]
        capture.first_may_end.set()
        drops_graphs, runs_again, makes_them_smaller = noted(lambda: launching.launch(PAIRS))
        assert drops_graphs == runs_again == makes_them_smaller <= 2  # 1 if this thread is not late
        (waits,) = noted(launching.is_alive)
        assert waits <= 2
    finally:
        thread.join()
    assert capturing.graphs.sizes == [shape.num_tokens for shape in shapes_up_to(1024)]


def test_a_thread_that_wants_the_lock_again_comes_after_one_that_waits() -> None:
    lock, came = DeviceLock(), list[str]()

    def wait() -> None:
        with lock:
            came.append("waiting")

    with lock:
        thread = threading.Thread(target=wait)
        thread.start()
        end = time.monotonic() + 10
        while not lock._next.locked() and time.monotonic() < end:
            time.sleep(0.001)
    with lock:
        came.append("again")
    thread.join()
    assert came == ["waiting", "again"]


def test_all_captures_of_a_device_have_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", made.append)
    capture_stream.cache_clear()
    for device in (torch.device(DEVICE.type), DEVICE, OTHER):
        cuda_capture(device)
    capture_stream.cache_clear()
    assert made == [DEVICE, OTHER]


@needs_gpu
@pytest.mark.gpu
def test_a_gpu_scores_while_another_model_captures_and_has_the_memory_of_a_closed_one_back(tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path / "model", head_dim=64, hidden_size=128, seed=13))
    options: dict[str, Any] = {"device": "cuda", "dtype": "bf16", "max_batch_tokens": 2048}
    texts, reserved = [("a query", "word " * length) for length in range(1, 20)], []
    with Reranker(folder, **options) as serving, ThreadPoolExecutor(1) as threads:
        scores = serving.score(texts, logits=True)
        expected = pytest.approx(scores, abs=0.05 * max(map(abs, scores)))
        for _ in range(3):
            loading = threads.submit(Reranker, folder, **options)
            while not loading.done():
                assert serving.score(texts, logits=True) == expected
            with loading.result() as other:
                assert other.engine.graphs is not None
                assert other.engine.graphs.sizes  # a capture that another thread breaks turns graphs off
                assert other.score(texts, logits=True) == expected
            del loading, other
            release_memory()
            reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] - reserved[1] < 4 * 2**20  # the first load leaves cuBLAS's workspaces
