"""Triton kernels for NVIDIA GPUs: everything between a layer's matrix products. torch's CUDA builds include Triton.

transformers runs each norm, rotary embedding and activation as several kernels that read and write whole tensors, and
torch's variable-length attention needs two calls and a merge if documents share a prefix. Each function here is one
kernel that reads its input once and writes its output once. Sums are in fp32.

Import this only if a GPU is used, or in tests under Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

TILE_FIELDS = tl.constexpr(6)  # columns of TileLayout.tiles
MASKED = tl.constexpr(-1.0e6)  # not -inf, which gives NaN if a row sees no key of a block
LOG2_E = 1.4426950408889634

_compiled: ContextVar[list[Any] | None] = ContextVar("_compiled", default=None)  # set while kernels are only compiled


@triton.jit
def _store_row(values, out, scales, row, width, columns, mask, LARGEST: tl.constexpr):
    """Store part of a row; with LARGEST, the largest number of fp8, `values` is the whole row and is quantized."""
    if LARGEST == 0:
        tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=mask)
    else:
        values = values.to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12) / LARGEST
        steps = tl.minimum(tl.maximum(values / scale, -LARGEST), LARGEST)
        tl.store(out + row * width + columns, steps.to(out.dtype.element_ty), mask=mask)
        # minimum and maximum drop NaN, which must not turn into a score
        is_number = tl.sum((values != values).to(tl.int32), axis=0) == 0
        tl.store(scales + row, tl.where(is_number, scale, float("nan")))


@triton.jit
def _add_rms_norm(
    delta, residual, weight, out, scales, eps, width,
    HAS_DELTA: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
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
    normed = (total * scale * weights).to(residual.dtype.element_ty)
    _store_row(normed, out, scales, row, width, columns, mask, LARGEST)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "num_query_heads"])
def _norm_rotate(
    x, weight, cos, sin, eps, num_tokens, token_stride, cos_stride, sin_stride, num_heads, num_query_heads,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, TOKENS * HEADS)
    token = tl.program_id(0) * TOKENS + rows // HEADS
    first_head = tl.program_id(1) * HEADS
    head = first_head + rows % HEADS
    weight += (first_head >= num_query_heads).to(tl.int32) * (2 * HALF)
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
def _silu_mul(gate_up, out, scales, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=mask, other=0.0).to(tl.float32)
    product = (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty)
    _store_row(product, out, scales, row, width, columns, mask, LARGEST)


@triton.jit
def _quantize_rows(x, out, scales, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    values = tl.load(x + row * width + columns, mask=mask, other=0.0)
    _store_row(values, out, scales, row, width, columns, mask, LARGEST)


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


def tile_options(capability: tuple[int, int]) -> dict[str, Any]:
    """How `attend_tiles` is compiled for a GPU: keys per block, warps and stages.

    In each case two blocks fit on an SM, so that one multiplies while the other computes its softmax. 64 keys take 196
    registers and 112 KiB of shared memory on Hopper, whose tensor cores read it. Older and consumer GPUs have 99 to 163
    KiB and keep operands in registers: 64 keys spill there, 32 do not.
    """
    if capability[0] in (9, 10):  # Hopper and Blackwell for data centres: 227 KiB of shared memory
        return {"BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


def add_rms_norm_(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `delta` to `residual` in place and return the RMSNorm of the sum: all (tokens, hidden), contiguous."""
    out = torch.empty_like(residual)
    _launch_add_rms_norm(delta, residual, weight, eps, out, out, None)
    return out


def add_rms_norm_quantized_(
    delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`quantize_rows(add_rms_norm_(...), dtype)` in one kernel."""
    out, scales = _empty_quantized(residual, residual.shape[1], dtype)
    _launch_add_rms_norm(delta, residual, weight, eps, out, scales, dtype)
    return out, scales


def _launch_add_rms_norm(
    delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor, scales: Tensor,
    dtype: torch.dtype | None,
) -> None:  # fmt: skip
    num_tokens, width = residual.shape
    delta, has_delta = (residual, False) if delta is None else (delta, True)
    options = {"HAS_DELTA": has_delta} | _whole_row(width, dtype)
    _launch(_add_rms_norm, (num_tokens,), delta, residual, weight, out, scales, eps, width, **options)


def norm_rotate_(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, num_query_heads: int | None = None
) -> None:
    """RMSNorm and rotary embedding of each head, in place: x (tokens, heads, head_dim), cos and sin (tokens, head_dim).

    A token's heads are contiguous in x; the halves of cos and sin are equal. `weight`: (head_dim,), or (2, head_dim)
    for queries and keys, of which the first `num_query_heads` heads are queries.
    """
    num_tokens, num_heads, head_dim = x.shape
    heads, tokens = min(8, triton.next_power_of_2(num_heads)), 4
    if num_query_heads is None:
        num_query_heads = num_heads
    else:
        heads = min(heads, num_query_heads & -num_query_heads)  # a program has queries or keys: it reads one weight
    _launch(
        _norm_rotate, (triton.cdiv(num_tokens, tokens), triton.cdiv(num_heads, heads)),
        x, weight, cos, sin, eps, num_tokens, x.stride(0), cos.stride(0), sin.stride(0), num_heads, num_query_heads,
        HALF=head_dim // 2, BLOCK_HALF=triton.next_power_of_2(head_dim // 2), HEADS=heads, TOKENS=tokens, num_warps=4,
    )  # fmt: skip


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: (tokens, 2 * intermediate), gate first, to (tokens, intermediate)."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, width)
    grid = (num_tokens, triton.cdiv(width, 1024))
    _launch(_silu_mul, grid, gate_up, out, out, width, LARGEST=0.0, BLOCK=1024, num_warps=4)
    return out


def silu_mul_quantized(gate_up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantize_rows(silu_mul(gate_up), dtype)` in one kernel."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out, scales = _empty_quantized(gate_up, width, dtype)
    _launch(_silu_mul, (num_tokens, 1), gate_up, out, scales, width, **_whole_row(width, dtype))
    return out, scales


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, width) to the fp8 `dtype`, and a scale per row, (rows, 1) fp32."""
    num_rows, width = x.shape
    out, scales = _empty_quantized(x, width, dtype)
    _launch(_quantize_rows, (num_rows,), x, out, scales, width, **_whole_row(width, dtype))
    return out, scales


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, first_own: Tensor, last_own: Tensor, queries_per_tile: int,
    scale: float, **options: Any,
) -> Tensor:  # fmt: skip
    """q (queries, heads, head_dim), k and v (tokens, KV heads, head_dim): (queries, heads, head_dim).

    The last dimensions are contiguous. See `TileLayout` for the layout; `options` replace those of `tile_options`, and
    go to Triton's compiler.
    """
    num_queries, num_heads, head_dim = q.shape
    shared_by = num_heads // k.shape[1]
    heads = 2 if shared_by % 2 == 0 else 1
    out = q.new_empty(num_queries, num_heads, head_dim)
    options = tile_options(_capability()) | options
    _launch(
        _attend_tiles, (num_heads // heads, tiles.shape[0]),
        q, k, v, out, tiles, first_own, last_own, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], num_heads,
        scale * LOG2_E,
        HEADS_PER_KEY_HEAD=shared_by, HEADS=heads, HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), QUERIES=queries_per_tile, **options,
    )  # fmt: skip
    return out


def compile_in_parallel(call: Callable[[], object], num_threads: int) -> list[Any]:
    """Compile the kernels that `call` launches, or read them from Triton's cache; returns each of them once.

    `call` runs and launches nothing, so the results of the functions above have arbitrary values. Raises what the
    compiler raises.
    """

    def run() -> list[Any]:
        kernels: list[Any] = []
        _compiled.set(kernels)
        with ThreadPoolExecutor(num_threads) as threads, triton.AsyncCompileMode(threads):
            call()
        return [each.result() if isinstance(each, triton.FutureKernel) else each for each in kernels]

    # Triton leaves its mode set if a kernel cannot be compiled; this context ends here
    return list({kernel.hash: kernel for kernel in copy_context().run(run)}.values())


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    compiled = _compiled.get()
    if compiled is None:
        kernel[grid](*arguments, **options)
    else:
        compiled.append(kernel.warmup(*arguments, grid=grid, **options))


def _empty_quantized(x: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For a row of `width` numbers for each row of x: the numbers, and the scales, (rows, 1)."""
    return x.new_empty(len(x), width, dtype=dtype), x.new_empty(len(x), 1, dtype=torch.float32)


def _whole_row(width: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """Options of a kernel whose programs each have a row; `dtype` is that of fp8 if it quantizes."""
    block = triton.next_power_of_2(width)
    largest = 0.0 if dtype is None else torch.finfo(dtype).max
    return {"LARGEST": largest, "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def _capability() -> tuple[int, int]:
    """Of the GPU that Triton compiles for; (0, 0) for AMD's. The interpreter gets that of Hopper."""
    if triton.knobs.runtime.interpret:
        return (9, 0)
    arch = driver.active.get_current_target().arch  # 90, or a name
    return divmod(arch, 10) if isinstance(arch, int) else (0, 0)
