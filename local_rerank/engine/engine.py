"""A loaded model: pairs -> log-odds. It packs pairs, runs the decoder, and multiplies the head's two rows in fp32.

On a GPU nothing inside a forward pass blocks: layouts are built on the host and copied through pinned memory, and the
log-odds are fetched once, at the end. `launch` returns before that, so that the caller can launch the next batch.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from local_rerank.engine.attention import Layout
from local_rerank.engine.cpu.compute_thread import compute
from local_rerank.engine.cpu.int8 import Int8Linear
from local_rerank.engine.cpu.threads import Threads
from local_rerank.engine.cuda.graphs import GraphRunner, lock_of
from local_rerank.engine.decoder import Decoder
from local_rerank.engine.dtypes import name_of
from local_rerank.engine.kernel_table import KernelRow
from local_rerank.engine.out_of_memory import release_cached, unless_out_of_memory
from local_rerank.engine.packing import PackedBatch, pack
from local_rerank.errors import OutOfMemory
from local_rerank.requests.pair import Pair

LAST_LINEARS = ("down_proj", "down")  # of a layer of Qwen3, of an encoder


class Engine:
    """One thread at a time may call `launch`; on a CPU any thread may call `score`."""

    def __init__(
        self,
        decoder: Decoder,
        head: Tensor,
        *,
        kernel: KernelRow,
        device: torch.device,
        threads: Threads | None = None,
        max_graph_tokens: int | None = None,
        pack: Callable[[Sequence[Pair]], PackedBatch] = pack,
    ) -> None:
        """`head`: (2, hidden_size) fp32, the rows of "no" and "yes". `device`: where token ids enter the model.

        `max_graph_tokens`: run batches of at most this size as CUDA graphs; needs the GPU decoder and `cuda-tiles`.
        """
        self.decoder = decoder
        self.head = head
        self.kernel = kernel
        self.device = device
        self.threads = threads
        self._pack = pack
        self.graphs: GraphRunner | None = None
        if max_graph_tokens is not None:
            self.graphs = GraphRunner(self.run_decoder, device, max_tokens=max_graph_tokens)

    @property
    def weights_dtype(self) -> str:
        """The dtype that the linear layers have, whatever was requested."""
        if any(isinstance(module, Int8Linear) for module in self.decoder.modules()):
            return "int8"
        named = self.decoder.layers[-1].named_modules()
        return name_of(next(module for name, module in named if name.endswith(LAST_LINEARS)).weight.dtype)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every tensor that affects a score, by name."""
        return self.decoder.state_dict() | {"head": self.head}

    def with_kernel(self, kernel: KernelRow) -> Engine:
        """The same model with another attention kernel and without graphs."""
        other = copy.copy(self)
        other.kernel, other.graphs = kernel, None
        return other

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """Log-odds of "yes" over "no" for each pair, in order.

        Raises OutOfMemory if they do not fit on the device as one batch; the batch's memory is free by then.
        """
        return self.launch(pairs)()

    def launch(self, pairs: Sequence[Pair]) -> Callable[[], list[float]]:
        """Start a forward pass; the returned function waits for the log-odds that `score` returns.

        A GPU computes in the meantime; on other devices the pass is complete when this returns. If memory runs out
        while graphs hold some, they are dropped and the pass runs once more. Raises OutOfMemory.
        """
        batch = self._pack(pairs)
        if self.device.type == "cpu":
            fetch = compute(lambda: self._launch(batch))
        else:
            with lock_of(self.device):
                fetch = self._launch(batch)
        if fetch is None:
            raise OutOfMemory(num_tokens=batch.num_tokens)
        return fetch

    def is_alive(self) -> bool:
        """Whether the devices compute. After an illegal address or a failed assertion in a kernel, a launch failure or
        an uncorrectable memory error, every later CUDA call of the process fails.
        """
        try:
            for device in {tensor.device for tensor in self.weights.values() if tensor.is_cuda}:
                with lock_of(device):
                    torch.cuda.synchronize(device)
        except Exception:
            return False
        return True

    def capture_graphs(self) -> None:
        """Capture the CUDA graphs, so that no batch waits for one. Does nothing without graphs."""
        if self.graphs is not None:
            with torch.inference_mode(), self._on_device():
                self.graphs.capture_all()

    def run_decoder(self, batch: PackedBatch, layout: Layout, last_layout: Callable[[], Layout]) -> Tensor:
        """Decoder and head, for a batch on the device: (num_pairs,) fp32 log-odds in packed order.

        The result is on the last layer's device. See `Decoder` for the layouts.
        """
        last = self.decoder(batch, self.kernel, layout, last_layout)  # (num_pairs, hidden_size)
        logits = last.float() @ self.head.T.to(last.device)  # (num_pairs, 2)
        log_odds: Tensor = logits[:, 1] - logits[:, 0]
        return log_odds

    def _launch(self, batch: PackedBatch) -> Callable[[], list[float]] | None:
        """See `launch`; None if memory ran out."""

        def attempt(graphs: GraphRunner | None) -> Callable[[], list[float]] | None:
            return unless_out_of_memory(lambda: self._forward(batch, graphs))

        fetch = attempt(self.graphs)
        if fetch is None and self.graphs is not None and self.graphs.forget_all():
            release_cached()
            if (fetch := attempt(None)) is not None:
                self.graphs.halve()  # the pass needed their memory
        return fetch

    def _forward(self, batch: PackedBatch, graphs: GraphRunner | None) -> Callable[[], list[float]]:
        """Launch one pass, as a CUDA graph or kernel by kernel; the returned function waits for it."""
        if self.threads is not None:
            self.threads.begin_batch()
        with torch.inference_mode(), self._on_device():
            log_odds = None if graphs is None else graphs.run(batch)
            if log_odds is None:
                kernel = self.kernel
                # the last layer's layout is built while a GPU works on the layers before it
                log_odds = self.run_decoder(
                    batch.to(self.device), kernel.layout(batch, False), lambda: kernel.layout(batch, True)
                )
            return _fetch(log_odds, batch.pair_order)

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def _fetch(log_odds: Tensor, pair_order: Tensor) -> Callable[[], list[float]]:
    """Start copying (num_pairs,) to the host; the returned function waits for it and restores the caller's order."""
    on_host = torch.empty(log_odds.shape, dtype=log_odds.dtype, pin_memory=log_odds.is_cuda)
    # by default waiting for an event keeps a core busy
    done = torch.cuda.Event(blocking=True) if log_odds.is_cuda else None  # type: ignore[no-untyped-call]
    with _never_freed_after_an_error(on_host):
        on_host.copy_(log_odds, non_blocking=log_odds.is_cuda)  # without a CUDA event nothing signals completion
        if done is not None:
            done.record(torch.cuda.current_stream(log_odds.device))

    def wait() -> list[float]:
        if done is not None:
            with _never_freed_after_an_error(on_host):
                done.synchronize()  # the only place that blocks on the device
        in_order: list[float] = torch.empty_like(on_host).scatter_(0, pair_order, on_host).tolist()
        return in_order

    return wait


@contextmanager
def _never_freed_after_an_error(pinned: Tensor) -> Iterator[None]:
    """Keep a tensor beyond Python's exit if the block raises.

    torch frees pinned memory that a GPU used with a CUDA event; if that fails, as after an illegal address, it calls
    `std::terminate`, and the process would end before its requests have an error.
    """
    try:
        yield
    except BaseException:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pinned))
        raise
