"""A variable-length attention operator for any device, which replaces those for GPUs in tests."""

from __future__ import annotations

import torch
from torch import Tensor


def slow_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    *,
    window: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, one segment at a time in fp32. Queries beyond the last segment stay zero.

    Asserts what the real operators rely on: int32 cumulative lengths, and no segment over the longest.
    """
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), torch.inf)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    assert all(sums.dtype == torch.int32 and sums.device == q.device for sums in cu)
    starts_q, starts_k = (sums.tolist() for sums in cu)
    assert len(starts_q) == len(starts_k)
    for segment in range(len(starts_q) - 1):
        rows, keys = (slice(*starts[segment : segment + 2]) for starts in (starts_q, starts_k))
        num_q, num_k = rows.stop - rows.start, keys.stop - keys.start
        assert num_q <= longest[0]
        assert num_k <= longest[1]
        if not num_q or not num_k:
            continue
        logits = torch.einsum("qhd,khd->hqk", q[rows].float(), k[keys].float()) * scale
        visible = torch.ones(num_q, num_k, dtype=torch.bool)
        before, after = (num_q + num_k if size < 0 else size for size in window)
        visible = visible.tril(num_k - num_q + after).triu(num_k - num_q - before)
        logits.masked_fill_(~visible, -torch.inf)
        lse[:, rows] = logits.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[keys].float()).to(q.dtype)
    return out, lse
