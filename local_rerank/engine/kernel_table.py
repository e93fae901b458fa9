"""The one seam between attention kernels: each is a row of `KERNELS`, chosen once when the engine is made.

Every kernel computes the same thing. Tokens of a prefix attend causally to their prefix; tokens of a document attend to
the whole prefix of their group and causally to their own document, never to another document. With `last_tokens_only`
there is one query per document, its last token, in packed order.

A kernel is two functions: `layout` says once per batch what every layer needs to know, `attend` runs in each layer.
Layouts are built on the host, from the batch on the host; `layout_to` moves one to the device of a layer.

On a CPU query and key may be fp32 where values are 16-bit, which the result is then too.

Shapes: query (1, num_heads, num_queries, head_dim); key and value (1, num_kv_heads, num_tokens, head_dim), as
transformers hands them over; the result is (1, num_queries, num_heads, head_dim).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from local_rerank.engine.cpu.attention import attend_cpu_tiles, cpu_tiles_layout
from local_rerank.engine.cuda.attention import (
    attend_flash_attn,
    attend_merged,
    attend_tiles,
    attend_varlen,
    merged_layout,
    tile_layout,
    varlen_layout,
)
from local_rerank.engine.packing import Group, PackedBatch, copy_to
from local_rerank.errors import ConfigError

Layout = Any  # what a kernel's `layout` returns and its `attend` takes: each kernel's own


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """The groups of a batch, and whether all tokens ask or only each document's last."""

    groups: tuple[Group, ...]
    last_tokens_only: bool


def layout_to(layout: Layout, device: torch.device) -> Layout:
    """A layout with its tensors on `device`; from the host to a GPU without waiting."""
    if isinstance(layout, Tensor):
        return copy_to(layout, device)
    tensors = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
    moved = {name: copy_to(value, device) for name, value in tensors.items() if isinstance(value, Tensor)}
    return dataclasses.replace(layout, **moved) if moved else layout


def segment_layout(batch: PackedBatch, last_tokens_only: bool) -> SegmentLayout:
    return SegmentLayout(batch.groups, last_tokens_only)


def dense_layout(batch: PackedBatch, last_tokens_only: bool) -> Tensor:
    """The definition, as a mask (num_queries, num_tokens) bool: who may look at whom."""
    mask = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool)
    for group in batch.groups:
        _mask_group(mask, group)
    return mask[batch.last_token_index] if last_tokens_only else mask


def attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """One mask over all tokens, quadratic in the batch: what the other kernels are tested against."""
    out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).to(v.dtype)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, scale: float) -> Tensor:
    """Any device and dtype: torch's public SDPA by runs of equal length, keys of prefix and document joined."""
    out, v = torch.empty_like(q.transpose(1, 2), dtype=v.dtype), v.to(q.dtype)  # (1, num_queries, num_heads, head_dim)
    for group in layout.groups:
        prefix_k, prefix_v = (_segments(x, group.start, 1, group.prefix_length) for x in (k, v))
        if not layout.last_tokens_only:
            prefix_q = _segments(q, group.start, 1, group.prefix_length)
            prefix_out = F.scaled_dot_product_attention(
                prefix_q, prefix_k, prefix_v, is_causal=True, scale=scale, enable_gqa=True
            )
            _store(out, group.start, prefix_out)
        for run in group.runs:
            start, length = (run.first_document, 1) if layout.last_tokens_only else (run.start, run.length)
            mask = None if layout.last_tokens_only else _prefix_causal_mask(group.prefix_length, length, q.device)
            keys, values = (
                torch.cat([prefix.expand(run.count, -1, -1, -1), _segments(x, run.start, run.count, run.length)], dim=2)
                for prefix, x in ((prefix_k, k), (prefix_v, v))
            )
            queries = _segments(q, start, run.count, length)
            run_out = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
            )
            _store(out, start, run_out)
    return out


def _segments(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """`count` neighbouring segments of (1, heads, tokens, head_dim): (count, heads, length, head_dim), not copied."""
    tokens = x[0, :, start : start + count * length]  # (heads, count * length, head_dim)
    return tokens.view(tokens.shape[0], count, length, -1).transpose(0, 1)


def _store(out: Tensor, start: int, segments: Tensor) -> None:
    """Write (count, heads, length, head_dim) into out (1, num_queries, heads, head_dim) from query `start` on."""
    count, heads, length, head_dim = segments.shape
    target = out[0, start : start + count * length].view(count, length, heads, head_dim)
    target.copy_(segments.transpose(1, 2))


def _prefix_causal_mask(prefix_length: int, length: int, device: torch.device) -> Tensor:
    """(length, prefix_length + length) bool: all of the prefix, causal over the document."""
    return torch.ones(length, prefix_length + length, dtype=torch.bool, device=device).tril(prefix_length)


def _mask_group(mask: Tensor, group: Group) -> None:
    prefix = slice(group.start, group.start + group.prefix_length)
    mask[prefix, prefix] = torch.ones_like(mask[prefix, prefix]).tril()
    for run in group.runs:
        for start in range(run.start, run.start + run.count * run.length, run.length):
            own = slice(start, start + run.length)
            mask[own, prefix] = True
            mask[own, own] = torch.ones_like(mask[own, own]).tril()


@dataclass(frozen=True, slots=True)
class KernelRow:
    """A kernel, where it runs, and what it is."""

    layout: Callable[[PackedBatch, bool], Layout]
    attend: Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]
    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    about: str
    package: str | None = None  # a package beside torch that it needs


_HALF = (torch.bfloat16, torch.float16)
_ANY_DTYPE = (torch.float32, *_HALF)
_ANY_DEVICE = ("cpu", "cuda", "mps")

KERNELS: dict[str, KernelRow] = {
    "cpu-tiles": KernelRow(cpu_tiles_layout, attend_cpu_tiles, ("cpu",), _ANY_DTYPE, "tiles of queries, as products"),
    "cuda-tiles": KernelRow(tile_layout, attend_tiles, ("cuda",), _HALF, "our own kernel, in one pass", "triton"),
    "cuda-merged": KernelRow(merged_layout, attend_merged, ("cuda",), _HALF, "torch's varlen_attn, two parts merged"),
    "cuda-varlen": KernelRow(varlen_layout, attend_varlen, ("cuda",), _HALF, "torch's varlen_attn, keys gathered"),
    "flash-attn": KernelRow(merged_layout, attend_flash_attn, ("cuda",), _HALF, "as cuda-merged", "flash_attn"),
    "sdpa": KernelRow(segment_layout, attend_sdpa, _ANY_DEVICE, _ANY_DTYPE, "torch's SDPA, by equal lengths"),
    "dense": KernelRow(dense_layout, attend_dense, _ANY_DEVICE, _ANY_DTYPE, "one mask over the batch: the reference"),
}
"""In order of preference: `auto` takes the first row that runs on the device and dtype."""


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype, *, compiled: bool = True) -> tuple[str, str]:
    """The kernel's name and why it was taken; raises ConfigError for one that is unknown or cannot run here.

    `compiled`: whether `auto` may take one that is compiled here.
    """
    if name == "auto":
        for candidate, row in KERNELS.items():
            if _runs(row, device, dtype) and (compiled or row.package != "triton"):
                return candidate, f"first of the table that takes {device.type} and {_short(dtype)}"
        raise ConfigError(f"no attention kernel takes {device.type} and {_short(dtype)}")
    if name not in KERNELS:
        raise ConfigError(f"attention is {name!r}; it must be auto or one of {', '.join(KERNELS)}")
    if not is_installed(KERNELS[name]):
        raise ConfigError(
            f"attention kernel {name!r} needs the package {KERNELS[name].package}, which is not installed"
        )
    if not _runs(KERNELS[name], device, dtype):
        raise ConfigError(f"attention kernel {name!r} does not take {device.type} and {_short(dtype)}")
    return name, "asked for"


def _runs(row: KernelRow, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type in row.device_types and dtype in row.dtypes and is_installed(row)


def is_installed(row: KernelRow) -> bool:
    return row.package is None or importlib.util.find_spec(row.package) is not None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
