"""The kernels of a fused layer in plain torch, for tests of their callers: Triton's interpreter takes seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from local_rerank.engine.cuda import triton_kernels


def in_torch(patch: pytest.MonkeyPatch) -> None:
    """Replace the kernels of a layer except that for fp8."""
    for function in (add_rms_norm_, norm_rotate_, silu_mul, attend_tiles):
        patch.setattr(triton_kernels, function.__name__, function)


def add_rms_norm_(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    if delta is not None:
        residual += delta
    return F.rms_norm(residual, residual.shape[-1:], weight, eps)


def norm_rotate_(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    first, second = F.rms_norm(x, x.shape[-1:], weight, eps).chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    x.copy_(torch.cat([first, second], dim=-1) * cos.unsqueeze(1) + turned * sin.unsqueeze(1))


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


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
