"""The one seam between attention kernels: each is a row of `KERNELS`, chosen once when the engine is made.

Every kernel computes the same thing. Tokens of a prefix attend causally to their prefix; tokens of a document attend to
the whole prefix of their group and causally to their own document, never to another document. With `last_tokens_only`
there is one query per document, its last token, in packed order.

A kernel is two functions: `layout` says once per batch what every layer needs to know, `attend` runs in each layer.

Shapes: query (1, num_heads, num_queries, head_dim); key and value (1, num_kv_heads, num_tokens, head_dim), as
transformers hands them over; the result is (1, num_queries, num_heads, head_dim).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from local_rerank.errors import ConfigError
from local_rerank.packing import Group, PackedBatch

Layout = Any  # what a kernel's `layout` returns and its `attend` takes: each kernel's own


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """The groups of a batch, and whether all tokens ask or only each document's last."""

    groups: tuple[Group, ...]
    last_tokens_only: bool


def segment_layout(batch: PackedBatch, last_tokens_only: bool) -> SegmentLayout:
    return SegmentLayout(batch.groups, last_tokens_only)


def dense_layout(batch: PackedBatch, last_tokens_only: bool) -> Tensor:
    """The definition, as a mask (num_queries, num_tokens) bool: who may look at whom."""
    mask = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool, device=batch.input_ids.device)
    for group in batch.groups:
        _mask_group(mask, group)
    return mask[batch.last_token_index] if last_tokens_only else mask


def attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """One mask over all tokens, quadratic in the batch: what the other kernels are tested against."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.device), scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, scale: float) -> Tensor:
    """Any device and dtype: torch's public SDPA by runs of equal length, keys of prefix and document joined."""
    out = torch.empty_like(q.transpose(1, 2))  # (1, num_queries, num_heads, head_dim)
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


def attend_cpu(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, scale: float) -> Tensor:
    """CPU: the prefix part of all documents of a group in one call, the own parts by runs, merged by log-sum-exp.

    Nothing is gathered or padded. torch's flash operator for CPUs is the only one there that returns the log-sum-exp;
    it is private, so it is used in `_flash_cpu` alone.
    """
    out = torch.empty_like(q.transpose(1, 2))  # (1, num_queries, num_heads, head_dim)
    for group in layout.groups:
        prefix_k, prefix_v = (_segments(x, group.start, 1, group.prefix_length) for x in (k, v))
        if layout.last_tokens_only:
            start, end = group.first_document, group.first_document + group.num_documents
        else:
            prefix_q = _segments(q, group.start, 1, group.prefix_length)
            _store(out, group.start, _flash_cpu(prefix_q, prefix_k, prefix_v, scale, causal=True)[0])
            start, end = group.start + group.prefix_length, group.end
        shared, shared_lse = _flash_cpu(_segments(q, start, 1, end - start), prefix_k, prefix_v, scale, causal=False)
        own_lse = torch.empty_like(shared_lse)  # (1, num_heads, queries of the group)
        for run in group.runs:
            run_start, length = (run.first_document, 1) if layout.last_tokens_only else (run.start, run.length)
            run_k, run_v = (_segments(x, run.start, run.count, run.length) for x in (k, v))
            run_q = _segments(q, run_start, run.count, length)
            run_out, run_lse = _flash_cpu(run_q, run_k, run_v, scale, causal=not layout.last_tokens_only)
            _store(out, run_start, run_out)
            first = run_start - start
            own_lse[0, :, first : first + run.count * length] = run_lse.transpose(0, 1).flatten(1)
        # softmax over both parts = the parts weighted by their share of the joint normaliser
        weight = torch.sigmoid(shared_lse - own_lse).transpose(1, 2).unsqueeze(-1).to(out.dtype)
        own = out[:, start:end]
        own.lerp_(shared.transpose(1, 2), weight.expand_as(own))
    return out


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """Segments of a batch as variable-length attention wants them; a prefix is a segment whose keys are itself."""

    key_index: Tensor  # (num_keys,) int64: tokens whose keys each segment reads, in order
    cu_seqlens_q: Tensor  # (num_segments + 1,) int32
    cu_seqlens_k: Tensor  # (num_segments + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int


def varlen_layout(batch: PackedBatch, last_tokens_only: bool) -> VarlenLayout:
    index: list[int] = []
    lengths_q: list[int] = []
    lengths_k: list[int] = []
    for group in batch.groups:
        prefix = range(group.start, group.start + group.prefix_length)
        if not last_tokens_only:
            index += prefix
            lengths_q.append(len(prefix))
            lengths_k.append(len(prefix))
        for run in group.runs:
            for start in range(run.start, run.start + run.count * run.length, run.length):
                index += prefix
                index += range(start, start + run.length)
                lengths_q.append(1 if last_tokens_only else run.length)
                lengths_k.append(len(prefix) + run.length)
    device = batch.input_ids.device
    return VarlenLayout(
        key_index=torch.tensor(index, dtype=torch.int64).to(device, non_blocking=True),
        cu_seqlens_q=_cumulative(lengths_q, device),
        cu_seqlens_k=_cumulative(lengths_k, device),
        max_seqlen_q=max(lengths_q),
        max_seqlen_k=max(lengths_k),
    )


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
    """CUDA, bf16 and fp16: torch's variable-length attention over keys gathered as prefix + document.

    Its causal mask is aligned to the last key, which is what a document behind its prefix needs.
    """
    queries = q[0].transpose(0, 1).contiguous()  # (num_queries, num_heads, head_dim)
    key_index = layout.key_index.to(k.device)  # a later layer may be on another GPU
    keys, values = (x[0].transpose(0, 1)[key_index] for x in (k, v))  # (num_keys, num_kv_heads, head_dim)
    cu_seqlens_q, cu_seqlens_k = (x.to(k.device) for x in (layout.cu_seqlens_q, layout.cu_seqlens_k))
    lengths = (cu_seqlens_q, cu_seqlens_k, layout.max_seqlen_q, layout.max_seqlen_k)
    return _varlen_attn(queries, keys, values, *lengths, scale=scale).unsqueeze(0)


def _varlen_attn(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, scale: float) -> Tensor:
    """torch's varlen_attn: `is_causal` in torch 2.10 became `window_size`; `enable_gqa` came later."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    if "enable_gqa" in names:
        options["enable_gqa"] = True
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, *lengths, scale=scale, **options)
    assert isinstance(out, Tensor)  # a pair only where return_aux asks for more
    return out


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    sums = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return sums.to(device, non_blocking=True)


def _segments(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """`count` neighbouring segments of (1, heads, tokens, head_dim): (count, heads, length, head_dim), not copied."""
    tokens = x[0, :, start : start + count * length]  # (heads, count * length, head_dim)
    return tokens.view(tokens.shape[0], count, length, -1).transpose(0, 1)


def _store(out: Tensor, start: int, segments: Tensor) -> None:
    """Write (count, heads, length, head_dim) into out (1, num_queries, heads, head_dim) from query `start` on."""
    count, heads, length, head_dim = segments.shape
    target = out[0, start : start + count * length].view(count, length, heads, head_dim)
    target.copy_(segments.transpose(1, 2))


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Output as q, and the log-sum-exp of the logits, (count, heads, length) fp32; heads of q may share those of k."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


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


_HALF = (torch.bfloat16, torch.float16)
_ANY_DTYPE = (torch.float32, *_HALF)
_ANY_DEVICE = ("cpu", "cuda", "mps")

KERNELS: dict[str, KernelRow] = {
    "cpu-flash": KernelRow(segment_layout, attend_cpu, ("cpu",), _ANY_DTYPE, "two parts, merged by log-sum-exp"),
    "cuda-varlen": KernelRow(varlen_layout, attend_varlen, ("cuda",), _HALF, "torch's variable-length attention"),
    "sdpa": KernelRow(segment_layout, attend_sdpa, _ANY_DEVICE, _ANY_DTYPE, "torch's SDPA, by equal lengths"),
    "dense": KernelRow(dense_layout, attend_dense, _ANY_DEVICE, _ANY_DTYPE, "one mask over the batch: the reference"),
}
"""In order of preference: `auto` takes the first row that runs on the device and dtype."""


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The kernel's name and why it was taken; raises ConfigError for one that is unknown or cannot run here."""
    if name == "auto":
        for candidate, row in KERNELS.items():
            if _runs(row, device, dtype):
                return candidate, f"first of the table that takes {device.type} and {_short(dtype)}"
        raise ConfigError(f"no attention kernel takes {device.type} and {_short(dtype)}")
    if name not in KERNELS:
        raise ConfigError(f"attention is {name!r}; it must be auto or one of {', '.join(KERNELS)}")
    if not _runs(KERNELS[name], device, dtype):
        raise ConfigError(f"attention kernel {name!r} does not take {device.type} and {_short(dtype)}")
    return name, "asked for"


def _runs(row: KernelRow, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type in row.device_types and dtype in row.dtypes


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
