"""What a loaded model runs on, and what each part would need to be faster: ModelInfo -> Machine.

The rows are what `local-rerank doctor` prints. Reads the machine, changes nothing, and knows nothing of scores.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import psutil
import torch

from local_rerank import __version__
from local_rerank.checkpoints.find import Checkpoint
from local_rerank.checkpoints.free_space import gigabytes
from local_rerank.engine.cpu.compute_thread import compute
from local_rerank.engine.cpu.cpu_limits import cpu_limits
from local_rerank.engine.cpu.int8_search import LINEARS_PER_LAYER
from local_rerank.engine.cpu.products import PRODUCTS, check
from local_rerank.engine.kernel_table import choose_kernel
from local_rerank.engine.plan import PLATFORMS
from local_rerank.errors import ConfigError
from local_rerank.types import ModelInfo

NOTHING = "nothing"
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "accelerate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One property of the machine."""

    value: str
    faster: str  # what it would take; "nothing" where there is nothing to gain


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    device: Row
    dtype: Row
    kernel: Row
    products: Row
    memory: Row
    threads: Row
    versions: dict[str, str]


def describe(info: ModelInfo, checkpoint: Checkpoint) -> Machine:
    """The machine as a loaded model uses it."""
    return Machine(
        device=_device(info),
        dtype=_dtype(info, checkpoint),
        kernel=_kernel(info),
        products=_products(info),
        memory=_memory(info),
        threads=_threads(info),
        versions=_versions(),
    )


def _device(info: ModelInfo) -> Row:
    device = torch.device(info.device)
    if device.type == "cuda":
        return Row(value=f"{info.device}: {torch.cuda.get_device_name(device)}", faster=NOTHING)
    name = f"{info.device}: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "mps":
        return Row(value=info.device, faster="a CUDA GPU")
    if torch.cuda.is_available():
        return Row(value=name, faster="--device cuda: this machine has a GPU")
    build = "this torch is a build without CUDA" if torch.version.cuda is None else "torch sees none"
    return Row(value=name, faster=f"a CUDA GPU ({build})")


def _dtype(info: ModelInfo, checkpoint: Checkpoint) -> Row:
    if info.dtype == "int8":
        num_linears = LINEARS_PER_LAYER * info.num_layers
        num_int8 = num_linears - len(info.unquantized)
        value = f"int8 weights and activations in {num_int8} of {num_linears} linear layers, the rest fp32"
        if info.unquantized:
            value += f"; so are linear layers that int8 would spoil: {', '.join(info.unquantized)}"
        return Row(value=value, faster=NOTHING)
    if checkpoint.needs_fp32:
        return Row(value=info.dtype, faster=f"{NOTHING}: this model's scores are off in lower precision")
    device = torch.device(info.device)
    value = (
        info.dtype if info.dtype == info.compute_dtype else f"{info.dtype} weights, multiplied in {info.compute_dtype}"
    )
    best = next(name for name, dtype in TORCH_DTYPES.items() if dtype == PLATFORMS[device.type].preferred_dtype()[0])
    if info.compute_dtype != "fp32":
        faster = "--dtype fp32: this device multiplies it faster" if best == "fp32" else NOTHING
    elif best != "fp32":
        faster = f"--dtype {best}: this device multiplies it natively"
    elif device.type == "cpu":
        faster = "--dtype int8, at the price of exactness (docs/performance.md)"
    else:
        faster = "a device that multiplies bf16 natively"
    return Row(value=value, faster=faster)


def _kernel(info: ModelInfo) -> Row:
    value = f"{info.kernel}: {info.reasons['kernel']}"
    device = torch.device(info.device)
    try:
        best, _ = choose_kernel("auto", device, TORCH_DTYPES.get(info.compute_dtype, torch.float32))
    except ConfigError:
        return Row(value=value, faster=NOTHING)
    if best != info.kernel:
        return Row(value=value, faster=f"--attention {best}")
    if device.type == "cuda" and info.dtype == "fp32":
        return Row(value=value, faster="--dtype bf16: the variable-length kernel takes no fp32")
    return Row(value=value, faster=NOTHING)


def _products(info: ModelInfo) -> Row:
    """Which kernels for products this CPU has, checked as where a model is loaded."""
    if not info.products:
        return Row(value="not checked: those of a whole model on a CPU are", faster=NOTHING)
    found = compute(lambda: {name: check(name) for name, product in PRODUCTS.items() if product.runs_here()})
    right = [name for name, outcome in found.items() if outcome.is_right and name not in info.products]
    wrong = {name: outcome for name, outcome in found.items() if not outcome.is_right}
    value = f"in use: {', '.join(info.products)}; also right: {', '.join(right)}"
    if wrong:
        value += f"; wrong, not used: {', '.join(f'{name} ({outcome})' for name, outcome in wrong.items())}"
    faults = [name for name in wrong if not PRODUCTS[name].is_often_wrong]
    return Row(value=value, faster=f"a torch that multiplies right by {', '.join(faults)}" if faults else NOTHING)


def _memory(info: ModelInfo) -> Row:
    device = torch.device(info.device)
    used = psutil.Process().memory_info().rss
    value = f"{gigabytes(used)} in this process, {gigabytes(psutil.virtual_memory().available)} available"
    if device.type != "cuda":
        return Row(value=value, faster=NOTHING)
    free, total = torch.cuda.mem_get_info(device)
    value += (
        f"; GPU: {gigabytes(torch.cuda.memory_allocated(device))} used, {gigabytes(free)} of {gigabytes(total)} free"
    )
    return Row(value=value, faster=f"a larger --max-batch-tokens (now {info.max_batch_tokens}) while memory is free")


def _threads(info: ModelInfo) -> Row:
    limits = cpu_limits()
    value = f"{info.threads} on {limits.num_cores} physical cores: {info.reasons['threads']}"
    if info.device != "cpu":
        return Row(value=value, faster=NOTHING)
    if info.threads < limits.num_threads:
        return Row(value=value, faster=f"--threads {limits.num_threads}, if no other work needs the cores")
    if limits.num_threads < limits.num_cores:
        return Row(value=value, faster=f"a wider limit: {limits.reason}")
    return Row(value=value, faster="more cores")


def _versions() -> dict[str, str]:
    versions = {"local-rerank": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions
