"""Compile our kernels for GPUs that need not be here, and print what each takes of a streaming multiprocessor (SM).

    python -m benchmarks.compiled_kernels --cards 8.0,9.0

Registers and spilled bytes are per thread, shared memory per block. `--tiles` adds variants of the attention kernel,
which gpu.py's part `tuning` measures. The exit status is 1 if a kernel of a load exceeds what the GPU has or spills, or
if two blocks of attention do not fit on an SM; attention on 7.5 is only shown: `KERNELS` does not offer it there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from local_rerank.bench.shapes import COMMON, SHAPES
from local_rerank.engine.cuda import triton_kernels
from local_rerank.engine.cuda.fp8 import LEAST_CAPABILITY
from local_rerank.engine.cuda.layers import compare_attention, kernel_differences, make_random

REGISTERS_PER_SM = 65_536
REGISTER_GRANULE = 8  # registers of a thread are given out in multiples of it
RESERVED_BYTES = 1024  # of shared memory, which the system takes for each block since 8.0
MAX_BLOCKS = {(7, 5): 16, (8, 6): 16, (8, 9): 24, (12, 0): 24}  # per SM; 32 on others


@dataclass(frozen=True)
class Card:
    """Limits of a compute capability, from the CUDA C++ Programming Guide."""

    shared_kib: int  # per block
    shared_per_sm_kib: int
    threads_per_sm: int


CARDS = {
    (7, 5): Card(64, 64, 1024),
    (8, 0): Card(163, 164, 2048),
    (8, 6): Card(99, 100, 1536),
    (8, 9): Card(99, 100, 1536),
    (9, 0): Card(227, 228, 2048),
    (10, 0): Card(227, 228, 2048),
    (12, 0): Card(99, 100, 1536),
}
TILES: tuple[dict[str, int | None], ...] = tuple(
    {"queries": queries, "BLOCK_K": keys, "num_warps": warps, "num_stages": stages, "maxnreg": registers}
    for queries, keys, warps, stages, registers in (
        (32, 64, 4, 3, None), (32, 64, 4, 2, None), (32, 32, 4, 3, None), (32, 32, 4, 2, None), (32, 64, 8, 3, 128),
        (64, 64, 8, 3, None), (64, 64, 8, 2, None), (64, 32, 8, 2, None), (64, 32, 8, 3, 128), (64, 32, 8, 2, 128),
    )
)  # fmt: skip
"""Variants of the attention kernel: those of `tile_options`, the first with 64 queries, which was the default until two
blocks had to fit on an SM of Hopper, and others. With 128 queries every variant spills 96 bytes or more."""


@dataclass(frozen=True)
class CompiledKernel:
    """What a kernel takes."""

    kernel: str
    constants: dict[str, float]  # that it was compiled with
    registers: int  # per thread
    spilled_bytes: int  # per thread
    shared_bytes: int  # per block
    num_warps: int

    def blocks_per_sm(self, capability: tuple[int, int]) -> int:
        """How many blocks run on an SM at once; 0 if not one fits."""
        card = CARDS[capability]
        if self.shared_bytes > 1024 * card.shared_kib:
            return 0
        registers = -(-self.registers // REGISTER_GRANULE) * REGISTER_GRANULE * 32 * self.num_warps
        shared = self.shared_bytes + (RESERVED_BYTES if capability >= (8, 0) else 0)
        limits = [REGISTERS_PER_SM // registers, card.threads_per_sm // (32 * self.num_warps)]
        if shared:
            limits.append(1024 * card.shared_per_sm_kib // shared)
        return min(*limits, MAX_BLOCKS.get(capability, 32))


class NoDevice:
    """Stands in for Triton's driver, and names the GPU to compile for."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._capability = 10 * capability[0] + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(capability: tuple[int, int], call: Callable[[], object]) -> list[CompiledKernel]:
    """The kernels that `call` would launch on a GPU of this capability."""
    triton.runtime.driver.set_active(NoDevice(capability))
    with torch.inference_mode():
        return [resources(kernel) for kernel in triton_kernels.compile_in_parallel(call, os.cpu_count() or 1)]


def resources(kernel: Any) -> CompiledKernel:
    """Read with NVIDIA's cuobjdump, which Triton includes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK):(\d+)", text))
    function = kernel.src.fn
    return CompiledKernel(
        kernel=function.fn.__name__,
        constants={
            name: value
            for (place, *_), value in kernel.src.constants.items()
            if (name := function.arg_names[place]).isupper()
        },
        registers=int(found["REG"]),
        spilled_bytes=int(found["STACK"]),
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
    )


def of_a_load(capability: tuple[int, int], shape: str) -> Callable[[], object]:
    """Launches what `why_not_fused` launches for a model of this shape, with fp8 where the GPU has it."""
    config, dtype = SimpleNamespace(**COMMON | SHAPES[shape]), dtype_of(capability)
    return lambda: kernel_differences(config, torch.device("cpu"), dtype, fp8=capability >= LEAST_CAPABILITY)


def dtype_of(capability: tuple[int, int]) -> torch.dtype:
    return torch.float16 if capability < (8, 0) else torch.bfloat16


def attention_kernels(capability: tuple[int, int], shape: str) -> list[CompiledKernel]:
    """Those of all tokens and of last tokens, as a load compiles them."""
    config, random = SimpleNamespace(**COMMON | SHAPES[shape]), make_random(torch.device("cpu"), dtype_of(capability))
    return compiled(capability, lambda: list(compare_attention(config, random)))


def of_tiles(shape: str, tiles: Iterable[dict[str, int | None]], dtype: torch.dtype) -> Callable[[], object]:
    """Launches variants of the attention kernel."""
    sizes = COMMON | SHAPES[shape]
    heads, key_heads, width = (sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    q, k, v = torch.zeros(1, heads + 2 * key_heads, width, dtype=dtype).tensor_split((-2 * key_heads, -key_heads), 1)
    layout, own = torch.zeros(1, 6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def launch() -> None:
        for tile in tiles:
            options = {name: value for name, value in tile.items() if name != "queries"}
            triton_kernels.attend_tiles(q, k, v, layout, own, own, int(tile["queries"] or 0), 1.0, **options)

    return launch


def is_good(kernel: CompiledKernel, capability: tuple[int, int]) -> bool:
    """Whether a kernel that `KERNELS` offers for this capability runs well there."""
    if kernel.kernel == "_attend_tiles":
        return capability < (8, 0) or (kernel.blocks_per_sm(capability) >= 2 and not kernel.spilled_bytes)
    return kernel.blocks_per_sm(capability) > 0 and not kernel.spilled_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", default=",".join(f"{major}.{minor}" for major, minor in CARDS))
    parser.add_argument("--shape", default="qwen3-reranker-0.6b", choices=SHAPES)
    parser.add_argument("--tiles", action="store_true", help="variants of the attention kernel too")
    options = parser.parse_args()
    all_good = True
    for card in options.cards.split(","):
        major, minor = map(int, card.split("."))
        capability = (major, minor)
        start = time.perf_counter()
        kernels = compiled(capability, of_a_load(capability, options.shape))
        print(f"\n{card}: {len(kernels)} kernels, {time.perf_counter() - start:.1f} s")
        all_good &= all(is_good(kernel, capability) for kernel in kernels)
        if options.tiles:
            kernels += compiled(capability, of_tiles(options.shape, TILES, dtype_of(capability)))
        print("registers  spilled  shared  warps  blocks per SM")
        for row in kernels:
            constants = " ".join(f"{name}={value:g}" for name, value in row.constants.items())
            figures = (row.registers, row.spilled_bytes, row.shared_bytes, row.num_warps, row.blocks_per_sm(capability))
            print("{:9} {:8} {:7} {:6} {:14}".format(*figures), f" {row.kernel} {constants}")
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
