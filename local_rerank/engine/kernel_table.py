"""The table of attention kernels. A new kernel is one row: its `layout` and `attend`, and where it runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from local_rerank.engine.attention import (
    Attend,
    Layout,
    attend_dense,
    attend_sdpa,
    dense_layout,
    segment_layout,
)
from local_rerank.engine.cpu.attention import attend_cpu_tiles, cpu_tiles_layout
from local_rerank.engine.cuda.attention import (
    attend_merged,
    attend_tiles,
    attend_varlen,
    merged_layout,
    tile_layout,
    varlen_layout,
)
from local_rerank.engine.packing import PackedBatch
from local_rerank.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KernelRow:
    """A kernel and where it runs; `attention.py` says what its two functions take."""

    layout: Callable[[PackedBatch, bool], Layout]  # (batch, last_tokens_only)
    attend: Attend
    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    about: str
    package: str | None = None  # a package that it needs, other than torch


_HALF = (torch.bfloat16, torch.float16)
_ANY_DTYPE = (torch.float32, *_HALF)
_ANY_DEVICE = ("cpu", "cuda", "mps")

KERNELS: dict[str, KernelRow] = {
    "cpu-tiles": KernelRow(cpu_tiles_layout, attend_cpu_tiles, ("cpu",), _ANY_DTYPE, "tiles of queries, as products"),
    "cuda-tiles": KernelRow(tile_layout, attend_tiles, ("cuda",), _HALF, "our own kernel, in one pass", "triton"),
    "cuda-merged": KernelRow(merged_layout, attend_merged, ("cuda",), _HALF, "torch's varlen_attn, two parts merged"),
    "cuda-varlen": KernelRow(varlen_layout, attend_varlen, ("cuda",), _HALF, "torch's varlen_attn, keys gathered"),
    "sdpa": KernelRow(segment_layout, attend_sdpa, _ANY_DEVICE, _ANY_DTYPE, "torch's SDPA, by equal lengths"),
    "dense": KernelRow(dense_layout, attend_dense, _ANY_DEVICE, _ANY_DTYPE, "one mask over the batch: the reference"),
}
"""In order of preference: `auto` picks the first row that runs on the device and dtype."""


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype, *, compiled: bool = True) -> tuple[str, str]:
    """The kernel's name and the reason for it. Raises ConfigError if `name` is unknown or cannot run here.

    `compiled`: whether `auto` may pick a kernel that Triton compiles on this machine.
    """
    if name == "auto":
        for candidate, row in KERNELS.items():
            if _runs(row, device, dtype) and (compiled or row.package != "triton"):
                return candidate, f"the fastest one for {device.type} and {_short(dtype)}"
        raise ConfigError(f"no attention kernel runs {_short(dtype)} on {device.type}")
    if name not in KERNELS:
        raise ConfigError(f"attention is {name!r}; it must be auto or one of {', '.join(KERNELS)}")
    if not is_installed(KERNELS[name]):
        raise ConfigError(
            f"attention kernel {name!r} needs the package {KERNELS[name].package}, which is not installed"
        )
    if not _runs(KERNELS[name], device, dtype):
        raise ConfigError(f"attention kernel {name!r} does not run {_short(dtype)} on {device.type}")
    return name, "set by the user"


def _runs(row: KernelRow, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type in row.device_types and dtype in row.dtypes and is_installed(row)


def is_installed(row: KernelRow) -> bool:
    return row.package is None or importlib.util.find_spec(row.package) is not None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
