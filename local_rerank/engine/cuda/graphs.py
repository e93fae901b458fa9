"""CUDA graphs: launch the few hundred kernels of a forward pass at once.

A graph replays a forward pass on buffers of fixed sizes. We copy a batch into the buffers of its `GraphShape`, the next
larger bucket in tokens, pairs and groups. The rest is padding: no tile has queries there, all other steps treat each
token by itself, and no score is read from it.

A shape is captured when it occurs for the second time. All graphs share one memory pool, because a replay ends before
the next one starts, so the pool only needs room for the largest. The largest is captured first, because a pool cannot
merge blocks for graphs that grow. Beyond MAX_GRAPHS, a new shape evicts one that occurs less than half as often.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from local_rerank.engine.attention import layout_to
from local_rerank.engine.cuda.attention import QUERIES_OF_LAST_TOKENS, QUERIES_PER_TILE, TileLayout, tile_layout
from local_rerank.engine.out_of_memory import is_out_of_memory, release_cached
from local_rerank.engine.packing import PackedBatch, copy_to, pack
from local_rerank.requests.pair import Pair

logger = logging.getLogger(__name__)

TOKEN_BUCKETS = (64, 128, 256, 384, 512, 768, *range(1024, 4096, 512), *range(4096, 16384 + 1, 1024))
MAX_TOKENS = TOKEN_BUCKETS[-1]
MAX_GRAPHS = 64
FORGET_AFTER = 1000  # batches after which all counts are halved
CHANCE = 8  # difference between the counts of two equally frequent shapes that chance may explain
CAPTURE_AT = 2  # occurrences: a capture takes as long as several passes, and most rare shapes occur once

Inputs = tuple[PackedBatch, TileLayout, TileLayout]
"""A batch, the layout of all its tokens and that of each document's last token."""
Compute = Callable[[PackedBatch, TileLayout, Callable[[], TileLayout]], Tensor]
"""Computes (num_pairs,) fp32 from a batch and its layouts, all on the device."""
Capture = Callable[[Callable[[], Tensor], bool], tuple[Callable[[], None], Tensor]]
"""Takes a pass, and whether no graph is held; returns the function that replays it and the tensor of its result."""


@dataclass(frozen=True, slots=True)
class GraphShape:
    """The sizes of a graph's buffers."""

    num_tokens: int
    num_pairs: int
    num_groups: int

    @property
    def num_tiles(self) -> int:
        """Maximum number of tiles: a group has at most two partial ones, of its prefix and of its documents."""
        return self.num_tokens // QUERIES_PER_TILE + 2 * self.num_groups

    @property
    def num_last_tiles(self) -> int:
        return self.num_pairs // QUERIES_OF_LAST_TOKENS + self.num_groups


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    inputs: Inputs  # buffers that a replay reads
    replay: Callable[[], None]
    output: Tensor  # (num_pairs,) fp32


def shape_of(batch: PackedBatch, *, max_tokens: int = MAX_TOKENS) -> GraphShape | None:
    """The smallest shape that holds a batch; None if the batch has more than `max_tokens`."""
    if batch.num_tokens > max_tokens:
        return None
    return GraphShape(
        num_tokens=next(size for size in TOKEN_BUCKETS if size >= batch.num_tokens),
        num_pairs=_power_of_two(batch.num_pairs, at_least=QUERIES_OF_LAST_TOKENS),
        num_groups=_power_of_two(len(batch.groups), at_least=1),
    )


def padded(batch: PackedBatch, shape: GraphShape) -> Inputs:
    """The batch and its layouts, padded to `shape`, on the host."""
    wide = replace(
        batch,
        input_ids=_zeros_after(batch.input_ids, shape.num_tokens),
        position_ids=_zeros_after(batch.position_ids, shape.num_tokens),
        last_token_index=_zeros_after(batch.last_token_index, shape.num_pairs),
        groups=(),
    )
    layout, last_layout = tile_layout(batch, False), tile_layout(batch, True)
    return (
        wide,
        _padded_layout(layout, shape.num_tiles, shape.num_tokens),
        _padded_layout(last_layout, shape.num_last_tiles, shape.num_pairs),
    )


def _padded_layout(layout: TileLayout, num_tiles: int, num_queries: int) -> TileLayout:
    return replace(
        layout,
        tiles=F.pad(layout.tiles, (0, 0, 0, num_tiles - layout.tiles.shape[0])),
        first_own=_zeros_after(layout.first_own, num_queries),
        last_own=_zeros_after(layout.last_own, num_queries),
    )


class GraphRunner:
    """Runs batches as captured graphs. One thread at a time may use it."""

    def __init__(
        self, compute: Compute, device: torch.device, *, max_tokens: int = MAX_TOKENS, capture: Capture | None = None
    ) -> None:
        """`max_tokens`: larger batches do not run as graphs."""
        self._compute = compute
        self._device = device
        self._capture = capture or cuda_capture(device)
        self._max_tokens = next((size for size in TOKEN_BUCKETS if size >= max_tokens), MAX_TOKENS)
        self._graphs: dict[GraphShape, CapturedGraph] = {}
        self._seen: Counter[GraphShape] = Counter()
        self._num_counted = 0

    @property
    def sizes(self) -> list[int]:
        """Token counts of the captured graphs, oldest first."""
        return [shape.num_tokens for shape in self._graphs]

    def run(self, batch: PackedBatch) -> Tensor | None:
        """(num_pairs,) fp32 in packed order, on the device; None if no graph runs this batch."""
        shape = shape_of(batch, max_tokens=self._max_tokens)
        if shape is None:
            return None
        self._count(shape)
        if shape not in self._graphs and not (self._earns_a_graph(shape) and self._capture_shape(shape)):
            return None
        graph, inputs = self._graphs[shape], padded(batch, shape)
        for buffer, value in zip(_tensors(graph.inputs), _tensors(inputs), strict=True):
            buffer.copy_(copy_to(value, buffer.device), non_blocking=True)
        graph.replay()
        return graph.output[: batch.num_pairs]

    def capture_largest(self) -> None:
        """Allocate the memory that graphs need, so that no batch waits for it."""
        self._capture_shape(GraphShape(self._max_tokens, QUERIES_OF_LAST_TOKENS, 1))

    def forget_all(self) -> bool:
        """Evict all graphs and free their memory; returns whether there were any."""
        had_any = bool(self._graphs)
        self._forget(list(self._graphs))
        self._seen.clear()
        return had_any

    def halve(self) -> None:
        """Halve the maximum size of graphs, because memory is short."""
        self._max_tokens = max((size for size in TOKEN_BUCKETS if size <= self._max_tokens // 2), default=0)
        to = f"have at most {self._max_tokens} tokens" if self._max_tokens else "are off"
        logger.warning("memory is short: CUDA graphs %s from here on", to)

    def _count(self, shape: GraphShape) -> None:
        self._seen[shape] += 1
        self._num_counted += 1
        if self._num_counted % FORGET_AFTER == 0:
            self._seen = Counter({seen: times // 2 for seen, times in self._seen.items()})

    def _earns_a_graph(self, shape: GraphShape) -> bool:
        times = self._seen[shape]
        if len(self._graphs) < MAX_GRAPHS:
            return times >= CAPTURE_AT
        return times > 2 * self._seen[self._rarest()] + CHANCE

    def _rarest(self) -> GraphShape:
        return min(self._graphs, key=lambda shape: self._seen[shape])

    def _forget(self, shapes: list[GraphShape]) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a replay may be running
        for shape in shapes:
            del self._graphs[shape]

    def _capture_shape(self, shape: GraphShape) -> bool:
        """Capture a shape, and the largest one before the first; returns whether that succeeded."""
        shapes = [shape] if self._graphs else [replace(shape, num_tokens=self._max_tokens), shape]
        if len(self._graphs) >= MAX_GRAPHS:
            self._forget([self._rarest()])
        try:
            for each in dict.fromkeys(shapes):
                self._graphs[each] = self._captured(each)
            return True
        except Exception as error:  # Triton's errors have no type of their own
            is_too_large, reason = is_out_of_memory(error), str(error)
        # outside the except block: there the traceback still refers to the failed pass's tensors
        self.forget_all()
        release_cached()
        if is_too_large:
            self.halve()
        else:
            logger.warning("CUDA graphs are off from here on: a capture failed (%s)", reason)
            self._max_tokens = 0
        return False

    def _captured(self, shape: GraphShape) -> CapturedGraph:
        wide, *layouts = padded(pack([Pair((0,), (0,))]), shape)  # any values: a replay overwrites them
        batch, (layout, last_layout) = wide.to(self._device), (layout_to(each, self._device) for each in layouts)
        replay, output = self._capture(lambda: self._compute(batch, layout, lambda: last_layout), not self._graphs)
        return CapturedGraph((batch, layout, last_layout), replay, output)


def _tensors(inputs: Inputs) -> list[Tensor]:
    batch, *layouts = inputs
    of_layouts = [tensor for layout in layouts for tensor in (layout.tiles, layout.first_own, layout.last_own)]
    return [batch.input_ids, batch.position_ids, batch.last_token_index, *of_layouts]


def cuda_capture(device: torch.device) -> Capture:
    """Make a function that captures graphs into a shared memory pool, on one stream.

    A pool ends with its last graph and cannot be reused, so the first capture makes a new one. We use our own stream:
    torch's default capture stream belongs to the device that was used first, and stays current if a capture fails.
    """
    pool: Any = None
    side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(run: Callable[[], Tensor], is_first: bool) -> tuple[Callable[[], None], Tensor]:
        nonlocal pool
        pool = torch.cuda.graph_pool_handle() if is_first else pool
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            run()  # warm-up: workspaces and compiled kernels must exist before a capture
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                output = run()
        torch.cuda.current_stream(device).wait_stream(side)
        return graph.replay, output

    return capture


def _power_of_two(value: int, *, at_least: int) -> int:
    return max(at_least, 1 << (value - 1).bit_length())


def _zeros_after(tensor: Tensor, size: int) -> Tensor:
    """(..., n) to (..., size), padded with zeros."""
    return F.pad(tensor, (0, size - tensor.shape[-1]))
