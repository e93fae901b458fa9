"""Memory: what is free, how many tokens fit beside the weights on a GPU, and how to recognize that memory ran out.

The estimate of a token is the peak of one layer, because a forward pass without a KV cache keeps only a layer's output.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from local_rerank.engine.cpu.cpu_limits import ROOT, cgroup_folders

logger = logging.getLogger(__name__)

T = TypeVar("T")

USABLE_SHARE = 0.8  # of free memory; the rest is for fragmentation, cuBLAS workspaces and other processes
MIN_BATCH_TOKENS = 512  # below that a forward pass is mostly overhead
NO_POOL = (0, 0)  # the pool id of segments that any allocation may use
MAX_CHAINED = 16  # errors that are looked at behind the one that was caught

# limit and usage of a cgroup's memory, and the name in memory.stat of file cache that the kernel takes back first
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")

# "CUDA error:", "CUDA driver error:" and "Triton Error [CUDA]: out of memory", NCCL's "Cuda failure 'out of memory'";
# torch's allocator for the CPU, and the system's error 12 if a file cannot be mapped; CUBLAS_STATUS_ALLOC_FAILED,
# CUDNN_STATUS_ALLOC_FAILED, in cuDNN 9 ..._ALLOCATION_FAILED
OUT_OF_MEMORY = re.compile(r"out of memory|can('t|not) allocate memory|_ALLOC(ATION)?_FAILED", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Widths of a layer's activations, in elements per token."""

    hidden: int
    queries: int  # heads x head_dim
    keys: int  # KV heads x head_dim; values are as wide
    intermediate: int

    @classmethod
    def of(cls, config: Any) -> LayerShape:
        """From a transformers config, of a decoder or an encoder."""
        num_key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            queries=config.num_attention_heads * head_dim,
            keys=num_key_heads * head_dim,
            intermediate=config.intermediate_size,
        )


def bytes_per_token(shape: LayerShape, element_size: int) -> int:
    """Peak bytes per token of a forward pass; `element_size`: bytes of an activation."""
    residual = 2 * shape.hidden
    projected = shape.hidden + shape.queries + 2 * shape.keys  # the normed input and its projections
    rotated = 2 * (shape.queries + shape.keys)  # the result and the swapped halves
    merged = 3 * shape.queries + 2 * shape.keys  # own part, prefix part and their sum; gathered keys and values
    sdpa = 4 * shape.queries  # keys and values of each query head, the result of a call and that of all
    attended = max(merged, sdpa)
    norm_of_queries = 2 * 4 * shape.queries  # bytes: transformers computes norms in fp32
    attention = (projected + rotated + attended) * element_size + norm_of_queries
    mlp = (2 * shape.hidden + 4 * shape.intermediate) * element_size
    return residual * element_size + max(attention, mlp)


def fitted_budget(free_bytes: int, per_token_bytes: int, *, at_most: int) -> int:
    """The token budget of a batch if `free_bytes` are free, between MIN_BATCH_TOKENS and `at_most`."""
    fits = int(free_bytes * USABLE_SHARE) // per_token_bytes
    if fits < MIN_BATCH_TOKENS:
        message = "%d bytes are free, enough for about %d tokens; trying batches of %d anyway"
        logger.warning(message, free_bytes, fits, MIN_BATCH_TOKENS)
    return max(MIN_BATCH_TOKENS, min(at_most, fits))


def free_bytes(devices: set[torch.device]) -> int:
    """Free bytes on the fullest of some CUDA devices, including torch's cached blocks.

    Free blocks in a pool of CUDA graphs do not count, because nothing but those graphs can use them.
    """
    cuda = torch.cuda
    free = {device: cuda.mem_get_info(device)[0] for device in devices}  # initializes CUDA
    if cuda.get_allocator_backend() != "native":  # only that one has segments
        return min(free[d] + cuda.memory_reserved(d) - cuda.memory_allocated(d) for d in devices)
    segments = cuda.memory_snapshot(include_traces=False)  # type: ignore[no-untyped-call]
    shared = [each for each in segments if each["segment_pool_id"] == NO_POOL]
    for device in devices:
        index = cuda.current_device() if device.index is None else device.index
        free[device] += sum(each["total_size"] - each["allocated_size"] for each in shared if each["device"] == index)
    return min(free.values())


def available_bytes(device: torch.device) -> int:
    """Free bytes on a GPU, or in RAM."""
    return free_bytes({device}) if device.type == "cuda" else available_ram()


def available_ram(root: Path = ROOT) -> int:
    """Bytes that this process can still use, as far as its cgroups and its limit of address space (`ulimit -v`) allow.

    `root` replaces / in the paths of /proc and /sys.
    """
    available: int = psutil.virtual_memory().available
    if (limit := address_space_limit()) is not None:
        available = min(available, max(0, limit - psutil.Process().memory_info().vms))
    for folder, is_v2 in cgroup_folders(root, "memory"):
        limit_name, usage_name, cache_name = _V2 if is_v2 else _V1
        limit, used = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and used is not None:
            available = min(available, max(0, limit - used + _cache(folder / "memory.stat", cache_name)))
    return available


def address_space_limit() -> int | None:
    """Bytes that the process may map (`ulimit -v`); None without a limit, and beside Linux."""
    if sys.platform != "linux":
        return None
    limit: int = psutil.Process().rlimit(psutil.RLIMIT_AS)[0]
    return None if limit < 0 else limit


def _number(path: Path) -> int | None:
    """None without a limit ("max") or without the file."""
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def _cache(path: Path, name: str) -> int:
    try:
        lines = dict(line.split(" ", 1) for line in path.read_text().splitlines() if " " in line)
    except (OSError, UnicodeDecodeError):
        return 0
    return int(lines[name]) if lines.get(name, "").isdecimal() else 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which the text of the error says or of one behind it (its cause and its context).

    Only torch's own allocator for CUDA raises a typed error, and Python one without a text. A capture that ends because
    memory ran out raises another one, while the first is handled.
    """
    chain = [error]
    for each in chain:  # grows
        if isinstance(each, torch.OutOfMemoryError | MemoryError) or OUT_OF_MEMORY.search(str(each)):
            return True
        behind = (each.__cause__, each.__context__)
        chain += [more for more in behind if more is not None and more not in chain][: MAX_CHAINED - len(chain)]
    return False


def unless_out_of_memory(attempt: Callable[[], T]) -> T | None:
    """The result of `attempt`; or None if memory ran out, after releasing torch's cached blocks."""
    try:
        return attempt()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release_cached()  # outside the except block: there the traceback still refers to the failed pass's tensors
    return None


def release_cached() -> None:
    """Return torch's cached blocks to the driver, so that a smaller batch does not fail because of fragmentation."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
