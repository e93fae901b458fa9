"""The kernels of a fused layer in plain torch, for tests of their callers: Triton's interpreter takes seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from local_rerank.engine.cuda import fp8, triton_kernels


def in_torch(patch: pytest.MonkeyPatch) -> None:
    """Replace the kernels of a layer; those that quantize return what torch rounds, as a GPU rounds."""
    for function in (
        add_rms_norm_, add_rms_norm_quantized_, norm_rotate_, silu_mul, silu_mul_quantized, quantize_rows, attend_tiles
    ):  # fmt: skip
        patch.setattr(triton_kernels, function.__name__, function)


def add_rms_norm_(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    if delta is not None:
        residual += delta
    return F.rms_norm(residual, residual.shape[-1:], weight, eps)


def add_rms_norm_quantized_(
    delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return quantize_rows(add_rms_norm_(delta, residual, weight, eps), dtype)


def norm_rotate_(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, num_query_heads: int | None = None
) -> None:
    weights = (
        weight
        if num_query_heads is None
        else weight[(torch.arange(x.shape[1], device=x.device) >= num_query_heads).long()]
    )
    first, second = (F.rms_norm(x, x.shape[-1:], None, eps) * weights).chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    x.copy_(torch.cat([first, second], dim=-1) * cos.unsqueeze(1) + turned * sin.unsqueeze(1))


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul_quantized(gate_up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return quantize_rows(silu_mul(gate_up), dtype)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert dtype == fp8.FP8
    return fp8.quantize(x)


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, first_own: Tensor, last_own: Tensor, queries_per_tile: int,
    scale: float, **options: Any,
) -> Tensor:  # fmt: skip
    """Queries outside all tiles get NaN, because no score may depend on them."""
    out = torch.full_like(q, torch.nan)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    for first, count, prefix, prefix_length, first_key, end_key in tiles.tolist():
        assert count <= queries_per_tile
        rows = slice(first, first + count)
        keys = torch.cat([torch.arange(prefix, prefix + prefix_length), torch.arange(first_key, end_key)])
        seen = (keys >= first_own[rows, None]) & (keys <= last_own[rows, None])
        seen[:, :prefix_length] = True
        logits = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * scale
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v[keys])
    return out
