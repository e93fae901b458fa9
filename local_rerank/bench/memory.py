"""Measure the peak memory of a block of code over what was in use before it."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

import psutil
import torch

from local_rerank.engine.out_of_memory import NO_POOL

SAMPLE_SECONDS = 0.005


def graph_bytes() -> int:
    """Bytes of the memory pools of all CUDA graphs in this process, from which a replay takes its activations."""
    if not torch.cuda.is_initialized() or torch.cuda.get_allocator_backend() != "native":  # type: ignore[no-untyped-call]
        return 0  # no other backend has segments
    segments: list[dict[str, Any]] = torch.cuda.memory_snapshot(include_traces=False)  # type: ignore[no-untyped-call]
    return sum(each["total_size"] for each in segments if each["segment_pool_id"] != NO_POOL)


class PeakMemory:
    """A context manager that sets `peak_bytes`: from the CUDA allocator, or from RSS sampled every 5 ms on a CPU."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._before = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = psutil.Process().memory_info().rss
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss - self._before)
            if self._done.wait(SAMPLE_SECONDS):
                return
