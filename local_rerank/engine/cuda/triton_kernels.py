"""Triton kernels for NVIDIA GPUs: everything between a layer's matrix products. torch's CUDA builds include Triton.

transformers runs each norm, rotary embedding and activation as several kernels that read and write whole tensors, and
torch's variable-length attention needs two calls and a merge if documents share a prefix. Each function here is one
kernel that reads its input once and writes its output once. Sums are in fp32.

Import this only if a GPU is used, or in tests under Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_FIELDS = tl.constexpr(6)  # columns of TileLayout.tiles
MASKED = tl.constexpr(-1.0e6)  # not -inf, which gives NaN if a row sees no key of a block
LOG2_E = 1.4426950408889634


@triton.jit
def _add_rms_norm(
    delta, residual, weight, out, eps, width,
    HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.load(residual + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        total += tl.load(delta + row * width + columns, mask=mask, other=0.0).to(tl.float32)
        total = total.to(residual.dtype.element_ty)
        tl.store(residual + row * width + columns, total, mask=mask)
        total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / width + eps)
    weights = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (total * scale * weights).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _norm_rotate(
    x, weight, cos, sin, eps, num_tokens, token_stride, cos_stride, sin_stride, num_heads,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, TOKENS * HEADS)
    token = tl.program_id(0) * TOKENS + rows // HEADS
    head = tl.program_id(1) * HEADS + rows % HEADS
    columns = tl.arange(0, BLOCK_HALF)
    mask = ((token < num_tokens) & (head < num_heads))[:, None] & (columns < HALF)[None, :]
    places = x + (token.to(tl.int64) * token_stride + head * (2 * HALF))[:, None] + columns[None, :]
    first = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=mask, other=0.0).to(tl.float32)
    square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    scale = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
    in_half = columns < HALF
    first *= scale * tl.load(weight + columns, mask=in_half, other=0.0).to(tl.float32)[None, :]
    second *= scale * tl.load(weight + HALF + columns, mask=in_half, other=0.0).to(tl.float32)[None, :]
    angles = token.to(tl.int64)[:, None]  # both halves of a head have the same angles
    cosine = tl.load(cos + angles * cos_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    sine = tl.load(sin + angles * sin_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(places, (first * cosine - second * sine).to(x.dtype.element_ty), mask=mask)
    tl.store(places + HALF, (second * cosine + first * sine).to(x.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_rows(x, out, scales, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    values = tl.load(x + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12) / LARGEST
    steps = tl.minimum(tl.maximum(values / scale, -LARGEST), LARGEST)
    tl.store(out + row * width + columns, steps.to(out.dtype.element_ty), mask=mask)
    # minimum and maximum drop NaN, which must not turn into a score
    is_number = tl.sum((values != values).to(tl.int32), axis=0) == 0
    tl.store(scales + row, tl.where(is_number, scale, float("nan")))


@triton.jit
def _attend_keys(
    acc, total, largest, q, k, v, k_stride, v_stride, first, end, first_seen, last_seen, scale,
    MASK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One pass of online softmax over keys `first` to `end`; with MASK a row sees only keys first_seen..last_seen."""
    dims = tl.arange(0, BLOCK_D)
    for start in range(first, end, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        inside = (keys < end)[:, None] & (dims < HEAD_DIM)[None, :]
        places = keys.to(tl.int64)[:, None]
        key = tl.load(k + places * k_stride + dims[None, :], mask=inside, other=0.0)
        logits = tl.dot(q, tl.trans(key)) * scale
        if MASK:
            seen = (keys[None, :] >= first_seen[:, None]) & (keys[None, :] <= last_seen[:, None])
        else:
            seen = (keys < end)[None, :]
        logits = tl.where(seen, logits, MASKED)
        now = tl.maximum(largest, tl.max(logits, axis=1))
        weights = tl.exp2(logits - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(weights, axis=1)
        value = tl.load(v + places * v_stride + dims[None, :], mask=inside, other=0.0)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None])
        largest = now
    return acc, total, largest


@triton.jit
def _attend_tiles(
    q, k, v, out, tiles, first_own, last_own,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, num_heads, scale,
    HEADS_PER_KEY_HEAD: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(1) * TILE_FIELDS
    first_query, num_queries = tl.load(tile), tl.load(tile + 1)
    if num_queries > 0:
        prefix, prefix_length = tl.load(tile + 2), tl.load(tile + 3)
        first_key, end_key = tl.load(tile + 4), tl.load(tile + 5)
        first_head = tl.program_id(0) * HEADS
        key_head = first_head // HEADS_PER_KEY_HEAD
        rows = tl.arange(0, QUERIES * HEADS)  # the heads of a query are adjacent, because they read the same keys
        number, head = rows // HEADS, first_head + rows % HEADS
        dims = tl.arange(0, BLOCK_D)
        here = number < num_queries
        query = first_query + number
        mask = here[:, None] & (dims < HEAD_DIM)[None, :]
        places = query.to(tl.int64)[:, None]
        queries = tl.load(q + places * q_stride + head[:, None] * q_head_stride + dims[None, :], mask=mask, other=0.0)
        first_seen = tl.load(first_own + query, mask=here, other=0)
        last_seen = tl.load(last_own + query, mask=here, other=-1)
        acc = tl.zeros([QUERIES * HEADS, BLOCK_D], dtype=tl.float32)
        total = tl.zeros([QUERIES * HEADS], dtype=tl.float32)
        largest = tl.full([QUERIES * HEADS], MASKED, dtype=tl.float32)
        k += key_head * k_head_stride
        v += key_head * v_head_stride
        acc, total, largest = _attend_keys(
            acc, total, largest, queries, k, v, k_stride, v_stride, prefix, prefix + prefix_length,
            first_seen, last_seen, scale, False, HEAD_DIM, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        acc, total, largest = _attend_keys(
            acc, total, largest, queries, k, v, k_stride, v_stride, first_key, end_key,
            first_seen, last_seen, scale, True, HEAD_DIM, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        result = acc / total[:, None]
        target = out + places * (num_heads * HEAD_DIM) + head[:, None] * HEAD_DIM + dims[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=mask)


def add_rms_norm_(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `delta` to `residual` in place and return the RMSNorm of the sum: all (tokens, hidden), contiguous."""
    num_tokens, width = residual.shape
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(width)
    _add_rms_norm[(num_tokens,)](
        residual if delta is None else delta, residual, weight, out, eps, width,
        HAS_DELTA=delta is not None, BLOCK=block, num_warps=_warps_for(block),
    )  # fmt: skip
    return out


def norm_rotate_(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    """RMSNorm and rotary embedding of each head, in place: x (tokens, heads, head_dim), cos and sin (tokens, head_dim).

    A token's heads are contiguous in x; the halves of cos and sin are equal.
    """
    num_tokens, num_heads, head_dim = x.shape
    heads, tokens = min(8, triton.next_power_of_2(num_heads)), 4
    _norm_rotate[(triton.cdiv(num_tokens, tokens), triton.cdiv(num_heads, heads))](
        x, weight, cos, sin, eps, num_tokens, x.stride(0), cos.stride(0), sin.stride(0), num_heads,
        HALF=head_dim // 2, BLOCK_HALF=triton.next_power_of_2(head_dim // 2), HEADS=heads, TOKENS=tokens, num_warps=4,
    )  # fmt: skip


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: (tokens, 2 * intermediate), gate first, to (tokens, intermediate)."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, width)
    _silu_mul[(num_tokens, triton.cdiv(width, 1024))](gate_up, out, width, BLOCK=1024, num_warps=4)
    return out


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, width) to the fp8 `dtype`, and a scale per row, (rows, 1) fp32."""
    num_rows, width = x.shape
    out, scales = torch.empty_like(x, dtype=dtype), x.new_empty(num_rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _quantize_rows[(num_rows,)](
        x, out, scales, width, LARGEST=torch.finfo(dtype).max, BLOCK=block, num_warps=_warps_for(block)
    )
    return out, scales


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, first_own: Tensor, last_own: Tensor, queries_per_tile: int,
    scale: float, **options: Any,
) -> Tensor:  # fmt: skip
    """q (queries, heads, head_dim), k and v (tokens, KV heads, head_dim): (queries, heads, head_dim).

    The last dimensions are contiguous. See `TileLayout` for the layout; `options` go to Triton's compiler.
    """
    num_queries, num_heads, head_dim = q.shape
    shared_by = num_heads // k.shape[1]
    heads = 2 if shared_by % 2 == 0 else 1
    out = q.new_empty(num_queries, num_heads, head_dim)
    options = {"BLOCK_K": 64, "num_warps": 8 if queries_per_tile > 32 else 4, "num_stages": 3} | options
    _attend_tiles[(num_heads // heads, tiles.shape[0])](
        q, k, v, out, tiles, first_own, last_own, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], num_heads,
        scale * LOG2_E,
        HEADS_PER_KEY_HEAD=shared_by, HEADS=heads, HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), QUERIES=queries_per_tile, **options,
    )  # fmt: skip
    return out


def _warps_for(block: int) -> int:
    return min(16, max(4, block // 512))
