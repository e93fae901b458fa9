"""CUDA graphs: launch the few hundred kernels of a forward pass at once.

A graph replays a forward pass on buffers of fixed sizes, its `GraphShape`. A batch is padded to the smallest shape that
holds it. No tile has queries in the padding, all other steps treat each token by itself, and no score is read from it.

All shapes are captured at load. They depend on the number of tokens only: pairs and tiles have room in proportion. What
a batch leaves unused costs little, because pairs matter to one layer and a tile without queries ends at once. A batch
with many short documents or small groups takes a larger shape; the largest exists a second time, with room for more.

All graphs share one memory pool, because a replay ends before the next one starts, so the pool only needs room for the
largest. The largest is captured first, because a pool cannot merge blocks for graphs that grow.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from local_rerank.engine.cuda.attention import (
    QUERIES_OF_LAST_TOKENS,
    QUERIES_PER_TILE,
    TILE_FIELDS,
    TileLayout,
    tile_layout,
)
from local_rerank.engine.out_of_memory import is_out_of_memory, release_cached
from local_rerank.engine.packing import Field, PackedBatch, block_bytes, stage, views

logger = logging.getLogger(__name__)

TOKEN_BUCKETS = (64, 128, 256, 384, 512, 768, *range(1024, 16384 + 1, 512))
MIN_TOKENS, MAX_TOKENS = TOKEN_BUCKETS[0], TOKEN_BUCKETS[-1]
CAPTURE_SECONDS = 3.0  # at load; a capture takes an estimated 60 to 150 ms
MAX_PADDING = 2  # times the tokens of a batch; a pass kernel by kernel is faster than a graph with more

Compute = Callable[[PackedBatch, TileLayout, Callable[[], TileLayout]], Tensor]
"""Computes (num_pairs,) fp32 from a batch and its layouts, all on the device."""
Capture = Callable[[Callable[[], Tensor], bool], tuple[Callable[[], None], Tensor]]
"""Takes a pass, and whether no graph is held; returns the function that replays it and the tensor of its result."""


class DeviceLock:
    """Held while an engine launches a batch, captures one graph or waits for the whole device; not reentrant.

    Batches take turns, because the kernels of two would alternate on the stream, and both would end late. Waiting for a
    device, with which a capture starts, fails while another thread captures there, and breaks that capture, too,
    whatever its `capture_error_mode` is. A thread that releases this lock and acquires it again comes after a waiting
    one; with a `threading.Lock` all captures of a load may come first.
    """

    def __init__(self) -> None:
        self._next, self._running = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._running.acquire()

    def __exit__(self, *_: object) -> None:
        self._running.release()


_locks: dict[tuple[str, int], DeviceLock] = {}  # by type and index of the device


def lock_of(device: torch.device) -> DeviceLock:
    """The device's lock in this process."""
    return _locks.setdefault((device.type, device.index or 0), DeviceLock())


@dataclass(frozen=True, slots=True, order=True)
class GraphShape:
    """The sizes of a graph's buffers."""

    num_tokens: int
    num_pairs: int
    num_tiles: int  # of all tokens, and as many of last tokens

    @classmethod
    def of(cls, num_tokens: int, *, tokens_per_pair: int = 16, tokens_per_group: int = 512) -> GraphShape:
        """The shape for batches whose documents and groups have at least so many tokens on average."""
        num_groups = num_tokens // tokens_per_group + 4  # each has at most two partial tiles: prefix and documents
        return cls(
            num_tokens=num_tokens,
            num_pairs=max(QUERIES_OF_LAST_TOKENS, num_tokens // tokens_per_pair),
            num_tiles=num_tokens // QUERIES_PER_TILE + 2 * num_groups,
        )

    @property
    def fields(self) -> list[Field]:
        """The buffers, in the order of `tensors_of`."""
        sizes = (self.num_tokens, self.num_pairs)
        of_layouts = [((self.num_tiles, TILE_FIELDS), (size,), (size,)) for size in sizes]
        of_batch = ((1, self.num_tokens), (1, self.num_tokens), (self.num_pairs,))
        return [
            *((shape, torch.int64) for shape in of_batch),
            *((shape, torch.int32) for layout in of_layouts for shape in layout),
        ]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether each of the tensors of a batch is at most as large as its buffer."""
        return all(
            size <= room
            for tensor, (shape, _) in zip(tensors, self.fields, strict=True)
            for size, room in zip(tensor.shape, shape, strict=True)
        )


def shapes_up_to(max_tokens: int) -> list[GraphShape]:
    """The shapes for batches of at most `max_tokens`, in the order in which they are captured.

    The largest, then powers of two, then those between them: the more are captured, the less padding a batch has. The
    very first is for many short documents and small groups. It holds every batch with 8 tokens a document and 60 a
    group, and Qwen's prompt alone has 9 after the document and 50 before it.
    """
    largest = min(MAX_TOKENS, -(-max_tokens // MIN_TOKENS) * MIN_TOKENS)
    if largest == 0:
        return []
    smaller = sorted((size for size in TOKEN_BUCKETS if size < largest), key=lambda size: (_odd_part(size), -size))
    many = GraphShape.of(largest, tokens_per_pair=8, tokens_per_group=60)
    return [many, *map(GraphShape.of, (largest, *smaller))]


def tensors_of(batch: PackedBatch) -> list[Tensor]:
    """What a graph reads of a batch, on the host: its tensors and those of its two layouts."""
    layouts = tile_layout(batch, False), tile_layout(batch, True)
    of_layouts = [tensor for layout in layouts for tensor in (layout.tiles, layout.first_own, layout.last_own)]
    return [batch.input_ids, batch.position_ids, batch.last_token_index, *of_layouts]


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    shape: GraphShape
    replay: Callable[[], None]
    output: Tensor  # (num_pairs,) fp32


class GraphRunner:
    """Runs batches as captured graphs. One thread at a time may use it."""

    def __init__(
        self, compute: Compute, device: torch.device, *, max_tokens: int = MAX_TOKENS, capture: Capture | None = None
    ) -> None:
        """`max_tokens`: larger batches do not run as graphs."""
        self._compute = compute
        self._device = device
        self._capture = capture or cuda_capture(device)
        self._max_tokens = max_tokens
        self._graphs: list[CapturedGraph] = []
        self._waiting = shapes_up_to(max_tokens)  # to be captured
        num_bytes = block_bytes(self._waiting[0].fields)
        self._inputs = torch.zeros(num_bytes, dtype=torch.uint8, device=device)  # of all graphs: they run in turn

    @property
    def sizes(self) -> list[int]:
        """Token counts of the captured graphs, oldest first."""
        return [graph.shape.num_tokens for graph in self._graphs]

    def run(self, batch: PackedBatch) -> Tensor | None:
        """(num_pairs,) fp32 in packed order, on the device; None if no graph runs this batch.

        Captures one shape if some are waiting, as after memory ran out. The caller holds the device's lock.
        """
        if self._waiting:
            self._capture_next()
        most = MAX_PADDING * max(batch.num_tokens, MIN_TOKENS)
        graphs = [graph for graph in self._graphs if batch.num_tokens <= graph.shape.num_tokens <= most]
        tensors = tensors_of(batch) if graphs else []
        graphs.sort(key=lambda graph: graph.shape)
        graph = next((graph for graph in graphs if graph.shape.holds(tensors)), None)
        if graph is None:
            return None
        staged = stage(tensors, graph.shape.fields, pinned=self._device.type == "cuda")
        self._inputs[: len(staged)].copy_(staged, non_blocking=True)
        graph.replay()
        return graph.output[: batch.num_pairs]

    def capture_all(self, *, seconds: float = CAPTURE_SECONDS) -> None:
        """Capture all shapes, so that no batch waits for it; after `seconds` only those whose absence would cost most.

        Batches of the others run as the next larger graph. Acquires the device's lock for each capture, so that other
        engines launch batches in between.
        """
        start = time.perf_counter()
        while self._waiting:
            is_power = _odd_part(self._waiting[0].num_tokens) == 1
            if self._graphs and not is_power and time.perf_counter() - start > seconds:
                break
            with lock_of(self._device):
                self._capture_next()
        self._waiting = []
        logger.info("captured %d CUDA graphs in %.1f s", len(self._graphs), time.perf_counter() - start)

    def forget_all(self) -> bool:
        """Drop all graphs and free their memory; later batches capture them again. Returns whether there were any.

        The caller holds the device's lock.
        """
        had_any = bool(self._graphs)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a replay may be running
        self._graphs = []
        self._waiting = shapes_up_to(self._max_tokens)
        return had_any

    def halve(self) -> None:
        """Halve the maximum size of graphs, because memory is short."""
        half = min(self._max_tokens, MAX_TOKENS) // 2
        self._max_tokens = half if half >= MIN_TOKENS else 0
        self._waiting = shapes_up_to(self._max_tokens)
        to = f"have at most {self._max_tokens} tokens" if self._max_tokens else "are off"
        logger.warning("memory is short: CUDA graphs %s from here on", to)

    def _capture_next(self) -> None:
        """Capture the next shape. If memory runs out, drop all graphs and halve them; any other error ends them."""
        try:
            self._graphs.append(self._captured(self._waiting.pop(0)))
            return
        except Exception as error:  # Triton's errors have no type of their own
            # the end of a capture may fail because of an error in it, and then that of the end arrives here
            first = error.__context__
            is_too_large = is_out_of_memory(error) or (first is not None and is_out_of_memory(first))
            reason = str(error) if first is None else f"{error}; before that: {first}"
            del first
        # outside the except block: there the traceback still refers to the failed pass's tensors
        self.forget_all()
        release_cached()
        if is_too_large:
            self.halve()
        else:
            logger.warning("CUDA graphs are off from here on: a capture failed (%s)", reason)
            self._max_tokens, self._waiting = 0, []

    def _captured(self, shape: GraphShape) -> CapturedGraph:
        self._inputs.zero_()  # valid values: an earlier batch in the buffers of another shape could be any index
        ids, positions, last, *of_layouts = views(self._inputs, shape.fields)
        batch = PackedBatch(input_ids=ids, position_ids=positions, last_token_index=last, pair_order=last, groups=())
        layout, last_layout = (
            TileLayout(*of_layouts[at : at + 3], queries_per_tile=queries)  # type: ignore[misc, arg-type]
            for at, queries in ((0, QUERIES_PER_TILE), (3, QUERIES_OF_LAST_TOKENS))
        )
        replay, output = self._capture(lambda: self._compute(batch, layout, lambda: last_layout), not self._graphs)
        return CapturedGraph(shape, replay, output)


def cuda_capture(device: torch.device) -> Capture:
    """Make a function that captures graphs into a shared memory pool.

    A pool ends with its last graph and cannot be reused, so the first capture makes a new one.
    """
    pool: Any = None
    side = capture_stream(torch.device(device.type, device.index or 0))

    def capture(run: Callable[[], Tensor], is_first: bool) -> tuple[Callable[[], None], Tensor]:
        nonlocal pool
        pool = torch.cuda.graph_pool_handle() if is_first else pool
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            run()  # warm-up: workspaces and compiled kernels must exist before a capture
            try:
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    output = run()
            except BaseException:
                _close(pool, graph)
                raise
        torch.cuda.current_stream(device).wait_stream(side)
        return graph.replay, output

    return capture


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device, one at a time. torch keeps a cuBLAS workspace for each stream that has
    multiplied, 32 MiB on Hopper, as long as the process lives.

    torch's default capture stream belongs to the device that was used first, and stays current if a capture fails.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


INVALID: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture did not end. torch's allocator of pinned memory refers to them as long as the process lives."""


def _close(pool: Any, graph: torch.cuda.CUDAGraph) -> None:
    """End and release a pool that a failed capture left open.

    If the end of a capture fails, torch's `CUDAGraph::capture_end` returns before it closes the pool, and its allocator
    believes that the capture goes on: `empty_cache` fails from then on, and the pool's memory is never freed.
    """
    bindings: Any = torch._C  # they are what `torch.cuda.use_mem_pool` calls at its end
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # the pool is closed: the capture itself ended well
        bindings._cuda_endAllocateToPool(device, pool)
        INVALID.append(graph)
        bindings._cuda_releasePool(device, pool)


def _odd_part(number: int) -> int:
    """1 for powers of two, and small for their small multiples."""
    return number // (number & -number)
