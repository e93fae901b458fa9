"""The table of attention kernels. To add a kernel, add a row: its `layout` and `attend`, and where it runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from local_rerank.engine.attention import Attend, Layout, attend_dense, attend_sdpa, dense_layout, segment_layout
from local_rerank.engine.cpu.attention import attend_cpu_tiles, cpu_tiles_layout
from local_rerank.engine.cuda.attention import (
    attend_merged,
    attend_tiles,
    attend_varlen,
    merged_layout,
    tile_layout,
    varlen_layout,
)
from local_rerank.engine.cuda.gpu import Capability, Gpu, dotted
from local_rerank.engine.dtypes import name_of
from local_rerank.engine.packing import PackedBatch
from local_rerank.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KernelRow:
    """A kernel and where it runs; `attention.py` describes its two functions."""

    layout: Callable[[PackedBatch, bool], Layout]  # (batch, last_tokens_only)
    attend: Attend
    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    package: str | None = None  # that it needs besides torch
    least_capability: Capability = (0, 0)  # of a GPU
    head_dims: range | None = None  # None: any
    runs_encoders: bool = False  # whether its layout can be other than causal


_AMPERE = (8, 0)
_HALF = (torch.bfloat16, torch.float16)
_ANY_DTYPE = (torch.float32, *_HALF)
_ANY_DEVICE = ("cpu", "cuda", "mps")
_FLASH_HEADS = range(8, 256 + 1, 8)  # Flash Attention 2 raises an error for others

KERNELS: dict[str, KernelRow] = {
    # tiles as matrix products; not for encoders, on which sdpa is as fast: they share no prefix
    "cpu-tiles": KernelRow(cpu_tiles_layout, attend_cpu_tiles, ("cpu",), _ANY_DTYPE),
    # our Triton kernel, one pass; compiled for Turing (7.5) it spills and has no tensor-core instruction
    "cuda-tiles": KernelRow(tile_layout, attend_tiles, ("cuda",), _HALF, "triton", _AMPERE),
    # varlen_attn is Flash Attention 2, which needs Ampere: two calls, merged, or one call, keys gathered
    "cuda-merged": KernelRow(merged_layout, attend_merged, ("cuda",), _HALF, None, _AMPERE, _FLASH_HEADS),
    "cuda-varlen": KernelRow(
        varlen_layout, attend_varlen, ("cuda",), _HALF, None, _AMPERE, _FLASH_HEADS, runs_encoders=True
    ),
    "sdpa": KernelRow(
        segment_layout, attend_sdpa, _ANY_DEVICE, _ANY_DTYPE, runs_encoders=True
    ),  # torch's SDPA, by document length
    "dense": KernelRow(
        dense_layout, attend_dense, _ANY_DEVICE, _ANY_DTYPE, runs_encoders=True
    ),  # one mask for the batch: the reference
}
"""In order of preference: `auto` picks the first row that runs on the device and dtype."""


def choose_kernel(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    gpu: Gpu | None = None,
    head_dim: int | None = None,
    compiled: bool = True,
    is_encoder: bool = False,
) -> tuple[str, str]:
    """The kernel's name and the reason for it. Raises ConfigError if `name` is unknown or cannot run here.

    `gpu`: what `device` is, if it is CUDA. `head_dim`: the model's, if known. `compiled`: whether
    `auto` may pick a kernel that Triton compiles.
    """
    if name == "auto":
        passed_over: list[str] = []
        for candidate, row in KERNELS.items():
            if (
                not _runs(row, device, dtype)
                or (is_encoder and not row.runs_encoders)
                or (row.package == "triton" and not compiled)
            ):
                continue
            if gpu is not None and gpu.why_too_old(row.least_capability) is not None:
                passed_over.append(f"{candidate} needs {dotted(row.least_capability)}")
            elif (needs := _needed_heads(row, head_dim)) is not None:
                passed_over.append(f"{candidate} needs {needs}")
            else:
                reason = f"the fastest for {name_of(dtype)} on {gpu or device.type}"
                return candidate, "; ".join([reason, *passed_over])
        raise ConfigError(f"no attention kernel runs {name_of(dtype)} on {device.type}")
    if name not in KERNELS:
        raise ConfigError(f"attention is {name!r}; it must be auto or one of {', '.join(KERNELS)}")
    row = KERNELS[name]
    if is_encoder and not row.runs_encoders:
        others = ", ".join(name for name, row in KERNELS.items() if row.runs_encoders)
        raise ConfigError(f"attention kernel {name!r} is for decoders; for this encoder it must be auto or {others}")
    if not is_installed(row):
        raise ConfigError(f"attention kernel {name!r} needs the package {row.package}, which is not installed")
    if not _runs(row, device, dtype):
        raise ConfigError(f"attention kernel {name!r} does not run {name_of(dtype)} on {device.type}")
    needs = None if gpu is None else gpu.why_too_old(row.least_capability)
    if (needs := needs or _needed_heads(row, head_dim)) is not None:
        raise ConfigError(f"attention kernel {name!r} needs {needs}; use auto or sdpa")
    return name, "set by the user"


def _runs(row: KernelRow, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type in row.device_types and dtype in row.dtypes and is_installed(row)


def _needed_heads(row: KernelRow, head_dim: int | None) -> str | None:
    """Which head dimensions a kernel needs, if the model has another."""
    if row.head_dims is None or head_dim is None or head_dim in row.head_dims:
        return None
    which = f"a multiple of {row.head_dims.step}, at most {row.head_dims[-1]}"
    return f"a head dimension that is {which}, and the model's is {head_dim}"


def is_installed(row: KernelRow) -> bool:
    return row.package is None or importlib.util.find_spec(row.package) is not None
