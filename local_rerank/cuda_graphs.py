"""Batches as CUDA graphs: the kernels of a forward pass, a few hundred of them, are launched as one.

A graph replays a forward pass over buffers whose sizes never change. A batch is therefore put into the buffers of its
`GraphShape`, the next larger bucket in tokens, pairs and groups. What is left over is padding: no tile has queries
there, every other step treats tokens alone, and no score is read from it.

A shape is captured when it comes the second time, at most MAX_GRAPHS of them, in one pool of memory: a replay is done
before the next one begins, so they need room for the largest only.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from local_rerank.attention import layout_to
from local_rerank.cuda_attention import QUERIES_OF_LAST_TOKENS, QUERIES_PER_TILE, TileLayout, tile_layout
from local_rerank.memory import is_out_of_memory
from local_rerank.packing import PackedBatch, copy_to

logger = logging.getLogger(__name__)

TOKEN_BUCKETS = (64, 128, 256, 384, 512, 768, *range(1024, 4096, 512), *range(4096, 16384 + 1, 1024))
MAX_TOKENS = TOKEN_BUCKETS[-1]
MAX_GRAPHS = 64
CAPTURE_AT = 2  # times a shape has come: a capture takes as long as several passes, and most odd shapes come once

Inputs = tuple[PackedBatch, TileLayout, TileLayout]
"""A batch, the layout of all its tokens and that of each document's last."""
Compute = Callable[[PackedBatch, TileLayout, Callable[[], TileLayout]], Tensor]
"""(num_pairs,) fp32 from a batch and its layouts, all on the device."""
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""A pass to the function that replays it and the tensor that then holds its result."""


@dataclass(frozen=True, slots=True)
class GraphShape:
    """Sizes of a graph's buffers."""

    num_tokens: int
    num_pairs: int
    num_groups: int

    @property
    def num_tiles(self) -> int:
        """At most: a group begins two tiles, one of its prefix and one of its documents."""
        return self.num_tokens // QUERIES_PER_TILE + 2 * self.num_groups

    @property
    def num_last_tiles(self) -> int:
        return self.num_pairs // QUERIES_OF_LAST_TOKENS + self.num_groups


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    inputs: Inputs  # the buffers that a replay reads
    replay: Callable[[], None]
    output: Tensor  # (num_pairs,) fp32


def shape_of(batch: PackedBatch) -> GraphShape | None:
    """The smallest shape that holds a batch; None where it is too large for a graph."""
    if batch.num_tokens > MAX_TOKENS:
        return None
    return GraphShape(
        num_tokens=next(size for size in TOKEN_BUCKETS if size >= batch.num_tokens),
        num_pairs=_power_of_two(batch.num_pairs, at_least=QUERIES_OF_LAST_TOKENS),
        num_groups=_power_of_two(len(batch.groups), at_least=1),
    )


def padded(batch: PackedBatch, shape: GraphShape) -> Inputs:
    """The batch and its layouts in the sizes of `shape`, on the host."""
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
    """Runs batches through captured graphs; one thread at a time."""

    def __init__(self, compute: Compute, device: torch.device, capture: Capture | None = None) -> None:
        self._compute = compute
        self._device = device
        self._capture = capture or cuda_capture()
        self._graphs: dict[GraphShape, CapturedGraph] = {}
        self._seen: Counter[GraphShape] = Counter()
        self._broken = False

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def run(self, batch: PackedBatch) -> Tensor | None:
        """(num_pairs,) fp32 in packed order, on the device; None where the batch is not one for a graph."""
        shape = None if self._broken else shape_of(batch)
        if shape is None:
            return None
        graph = self._graphs.get(shape)
        if graph is None and not self._is_worth_it(shape):
            return None
        inputs = padded(batch, shape)
        graph = graph or self._captured(shape, inputs)
        if graph is None:
            return None
        for buffer, value in zip(_tensors(graph.inputs), _tensors(inputs), strict=True):
            buffer.copy_(copy_to(value, buffer.device), non_blocking=True)
        graph.replay()
        return graph.output[: batch.num_pairs]

    def clear(self) -> None:
        """Let go of all graphs and of their memory."""
        self._graphs.clear()
        self._seen.clear()

    def _is_worth_it(self, shape: GraphShape) -> bool:
        """Whether a shape has come often enough, and there is room for it."""
        self._seen[shape] += 1
        return self._seen[shape] >= CAPTURE_AT and len(self._graphs) < MAX_GRAPHS

    def _captured(self, shape: GraphShape, inputs: Inputs) -> CapturedGraph | None:
        batch, layout, last_layout = (
            inputs[0].to(self._device), layout_to(inputs[1], self._device), layout_to(inputs[2], self._device)
        )  # fmt: skip
        try:
            replay, output = self._capture(lambda: self._compute(batch, layout, lambda: last_layout))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            logger.warning("CUDA graphs are off from here on: a capture failed (%s)", error)
            self._broken = True
            return None
        self._graphs[shape] = graph = CapturedGraph((batch, layout, last_layout), replay, output)
        return graph


def _tensors(inputs: Inputs) -> list[Tensor]:
    batch, *layouts = inputs
    of_layouts = [tensor for layout in layouts for tensor in (layout.tiles, layout.first_own, layout.last_own)]
    return [batch.input_ids, batch.position_ids, batch.last_token_index, *of_layouts]


def cuda_capture() -> Capture:
    """Captures into one pool of memory that all its graphs share."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # workspaces and compiled code must exist before a capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = run()
        return graph.replay, output

    return capture


def _power_of_two(value: int, *, at_least: int) -> int:
    return max(at_least, 1 << (value - 1).bit_length())


def _zeros_after(tensor: Tensor, size: int) -> Tensor:
    """The last dimension padded with zeros up to `size`."""
    return F.pad(tensor, (0, size - tensor.shape[-1]))
