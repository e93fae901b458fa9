"""Small batches as CUDA graphs: their kernels, a few hundred of them, are launched as one.

A graph replays a forward pass over buffers whose sizes never change. A batch is therefore put into the buffers of its
`GraphShape`, the next larger bucket in tokens, segments, groups and longest segment. What is left over is padding that
no segment holds: no attention reads it, every other step treats tokens alone, and no score is read from it.

A shape is captured when it comes the second time, at most MAX_GRAPHS of them, in one pool of memory: a replay is done
before the next one begins, so they need room for the largest only. Batches over MAX_TOKENS gain nothing, because there
the GPU is the slower of the two.
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
from local_rerank.cuda_attention import MergedLayout, merged_layout
from local_rerank.packing import PackedBatch, copy_to

logger = logging.getLogger(__name__)

TOKEN_BUCKETS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
MAX_TOKENS = TOKEN_BUCKETS[-1]
MAX_SEGMENTS = 128
MAX_GRAPHS = 32
CAPTURE_AT = 2  # times a shape has come: a capture takes as long as several passes, and most odd shapes come once

Compute = Callable[[PackedBatch, MergedLayout], Tensor]
"""(num_pairs,) fp32 from a batch and its layout, all on the device."""
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""A pass to the function that replays it and the tensor that then holds its result."""


@dataclass(frozen=True, slots=True)
class GraphShape:
    """Sizes of a graph's buffers; pairs have room for as many as segments."""

    num_tokens: int
    num_segments: int
    num_groups: int
    max_seqlen: int


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    batch: PackedBatch  # the buffers that a replay reads
    layout: MergedLayout
    replay: Callable[[], None]
    output: Tensor  # (num_segments,) fp32


def shape_of(batch: PackedBatch, layout: MergedLayout) -> GraphShape | None:
    """The smallest shape that holds a batch; None where it is too large for a graph."""
    num_segments = layout.cu_seqlens.shape[0] - 1
    if batch.num_tokens > MAX_TOKENS or num_segments > MAX_SEGMENTS:
        return None
    return GraphShape(
        num_tokens=next(size for size in TOKEN_BUCKETS if size >= batch.num_tokens),
        num_segments=_power_of_two(num_segments, at_least=8),
        num_groups=_power_of_two(layout.cu_seqlens_group.shape[0] - 1, at_least=1),
        max_seqlen=_power_of_two(layout.max_seqlen, at_least=128),  # rows of a block of the kernel
    )


def padded(batch: PackedBatch, layout: MergedLayout, shape: GraphShape) -> tuple[PackedBatch, MergedLayout]:
    """The batch and its layout in the sizes of `shape`, on the host."""
    tokens = shape.num_tokens
    return (
        replace(
            batch,
            input_ids=_zeros_after(batch.input_ids, tokens),
            position_ids=_zeros_after(batch.position_ids, tokens),
            last_token_index=_zeros_after(batch.last_token_index, shape.num_segments),
            groups=(),
        ),
        MergedLayout(
            cu_seqlens=_last_repeated(layout.cu_seqlens, shape.num_segments + 1),
            max_seqlen=shape.max_seqlen,
            prefix_index=_zeros_after(layout.prefix_index, tokens),
            cu_seqlens_group=_last_repeated(layout.cu_seqlens_group, shape.num_groups + 1),
            cu_seqlens_prefix=_last_repeated(layout.cu_seqlens_prefix, shape.num_groups + 1),
            max_seqlen_group=tokens,
            max_seqlen_prefix=tokens,
            is_document=_zeros_after(layout.is_document, tokens),
        ),
    )


class GraphRunner:
    """Runs small batches through captured graphs; one thread at a time."""

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
        if self._broken or batch.num_tokens > MAX_TOKENS:
            return None
        layout = merged_layout(batch, last_tokens_only=False)
        assert isinstance(layout, MergedLayout)
        shape = shape_of(batch, layout)
        if shape is None:
            return None
        inputs = padded(batch, layout, shape)
        graph = self._graphs.get(shape) or self._captured(shape, *inputs)
        if graph is None:
            return None
        _load(graph, *inputs)
        graph.replay()
        return graph.output[: batch.num_pairs]

    def _captured(self, shape: GraphShape, batch: PackedBatch, layout: MergedLayout) -> CapturedGraph | None:
        """Capture a shape that has come often enough, while there is room for it."""
        self._seen[shape] += 1
        if self._seen[shape] < CAPTURE_AT or len(self._graphs) >= MAX_GRAPHS:
            return None
        on_device, layout_on_device = batch.to(self._device), layout_to(layout, self._device)
        try:
            replay, output = self._capture(lambda: self._compute(on_device, layout_on_device))
        except RuntimeError as error:
            logger.warning("CUDA graphs are off from here on: a capture failed (%s)", error)
            self._broken = True
            return None
        self._graphs[shape] = graph = CapturedGraph(on_device, layout_on_device, replay, output)
        return graph


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


def _load(graph: CapturedGraph, batch: PackedBatch, layout: MergedLayout) -> None:
    """Fill the buffers of a graph from the host, without waiting."""
    pairs = [(getattr(graph.batch, name), getattr(batch, name)) for name in _BATCH_BUFFERS]
    pairs += [(getattr(graph.layout, name), getattr(layout, name)) for name in _LAYOUT_BUFFERS]
    for buffer, value in pairs:
        buffer.copy_(copy_to(value, buffer.device), non_blocking=True)


_BATCH_BUFFERS = ("input_ids", "position_ids", "last_token_index")
_LAYOUT_BUFFERS = ("cu_seqlens", "prefix_index", "cu_seqlens_group", "cu_seqlens_prefix", "is_document")


def _power_of_two(value: int, *, at_least: int) -> int:
    return max(at_least, 1 << (value - 1).bit_length())


def _zeros_after(tensor: Tensor, size: int) -> Tensor:
    """The last dimension padded with zeros up to `size`."""
    return F.pad(tensor, (0, size - tensor.shape[-1]))


def _last_repeated(sums: Tensor, size: int) -> Tensor:
    """Cumulative lengths padded with segments of no length."""
    return torch.cat([sums, sums[-1:].expand(size - sums.shape[0])])
