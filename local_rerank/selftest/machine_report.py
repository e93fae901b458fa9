"""Describe the machine as a loaded model uses it, and what would make each part faster, for `local-rerank doctor`."""

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
from local_rerank.engine.cpu.int8_search import GROUPS_OF_ENCODERS, LINEARS_PER_LAYER
from local_rerank.engine.cpu.products import PRODUCTS, check
from local_rerank.engine.cuda.gpu import gpu_of, why_no_gpu, why_unusable
from local_rerank.engine.kernel_table import choose_kernel
from local_rerank.engine.plan import PLATFORMS
from local_rerank.errors import ConfigError
from local_rerank.types import ModelInfo

NOTHING = "nothing"
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "accelerate")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineProperty:
    """One property of the machine."""

    value: str
    faster: str  # what would make it faster, or "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    device: MachineProperty
    dtype: MachineProperty
    kernel: MachineProperty
    products: MachineProperty
    decoder: MachineProperty
    memory: MachineProperty
    threads: MachineProperty
    versions: dict[str, str]


def describe(info: ModelInfo, checkpoint: Checkpoint) -> Machine:
    """Describe the machine as a loaded model uses it."""
    return Machine(
        device=_device(info),
        dtype=_dtype(info, checkpoint),
        kernel=_kernel(info, checkpoint),
        products=_products(info),
        decoder=_decoder(info, checkpoint),
        memory=_memory(info),
        threads=_threads(info),
        versions=_versions(),
    )


def _device(info: ModelInfo) -> MachineProperty:
    device = torch.device(info.device)
    if device.type == "cuda":
        return MachineProperty(value=f"{info.device}: {gpu_of(device)}", faster=NOTHING)
    name = f"{info.device}: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "mps":
        return MachineProperty(value=info.device, faster="a CUDA GPU")
    if not torch.cuda.is_available():
        return MachineProperty(value=name, faster=f"a CUDA GPU ({why_no_gpu()})")
    cuda = torch.device("cuda")
    faster = why_unusable(cuda) or f"--device cuda: this machine has a GPU, {gpu_of(cuda)}"
    return MachineProperty(value=name, faster=faster)


def _dtype(info: ModelInfo, checkpoint: Checkpoint) -> MachineProperty:
    if info.dtype == "int8":
        num_linears = info.num_layers * (len(GROUPS_OF_ENCODERS) if info.decoder == "encoder" else LINEARS_PER_LAYER)
        num_int8 = num_linears - len(info.unquantized)
        value = f"int8 weights and activations in {num_int8} of {num_linears} linear layers, the rest fp32"
        if info.unquantized:
            value += f"; int8 is too inexact for {', '.join(info.unquantized)}"
        return MachineProperty(value=value, faster=NOTHING)
    if checkpoint.needs_fp32:
        return MachineProperty(value=info.dtype, faster=f"{NOTHING}: lower precision is too inexact for this model")
    device = torch.device(info.device)
    value = (
        info.dtype if info.dtype == info.compute_dtype else f"{info.dtype} weights, multiplied in {info.compute_dtype}"
    )
    best = _best_dtype(device)
    if info.compute_dtype != "fp32":
        faster = "--dtype fp32: this device multiplies it faster" if best == "fp32" else NOTHING
    elif best != "fp32":
        faster = f"--dtype {best}: this device multiplies it faster"
    elif device.type == "cpu":
        faster = "--dtype int8, which is less exact (docs/performance.md)"
    else:
        faster = "a device that multiplies bf16 natively"
    return MachineProperty(value=value, faster=faster)


def _kernel(info: ModelInfo, checkpoint: Checkpoint) -> MachineProperty:
    value = f"{info.kernel}: {info.reasons['kernel']}"
    device, compiled, is_encoder = torch.device(info.device), info.decoder == "cuda", info.decoder == "encoder"
    try:
        dtype = TORCH_DTYPES.get(info.compute_dtype, torch.float32)
        best, _ = choose_kernel(
            "auto",
            device,
            dtype,
            gpu=gpu_of(device),
            head_dim=checkpoint.head_dim,
            compiled=compiled,
            is_encoder=is_encoder,
        )
    except ConfigError:
        return MachineProperty(value=value, faster=NOTHING)
    if best != info.kernel:
        return MachineProperty(value=value, faster=f"--attention {best}")
    is_choice = device.type == "cuda" and info.dtype == "fp32" and not checkpoint.needs_fp32
    if is_choice and _best_dtype(device) == "bf16":
        return MachineProperty(value=value, faster="--dtype bf16: the kernels that share a prefix do not support fp32")
    return MachineProperty(value=value, faster=NOTHING)


def _best_dtype(device: torch.device) -> str:
    preferred, _ = PLATFORMS[device.type].preferred_dtype(gpu_of(device))
    return next(name for name, dtype in TORCH_DTYPES.items() if dtype == preferred)


def _decoder(info: ModelInfo, checkpoint: Checkpoint) -> MachineProperty:
    value = f"{info.decoder}: {info.reasons['decoder']}"
    if torch.device(info.device).type != "cuda":
        return MachineProperty(value=value, faster=NOTHING)
    value += f"; CUDA graphs {'on' if info.cuda_graphs else 'off'}: {info.reasons['cuda_graphs']}"
    is_best = info.cuda_graphs or info.decoder == "encoder" or checkpoint.needs_fp32
    return MachineProperty(value=value, faster=NOTHING if is_best else "the decoder for GPUs, with CUDA graphs")


def _products(info: ModelInfo) -> MachineProperty:
    """List the matrix-product kernels of this CPU, checked as when a model is loaded."""
    if not info.products:
        return MachineProperty(value="not checked; only checked for a model that runs on a CPU", faster=NOTHING)
    found = compute(lambda: {name: check(name) for name, product in PRODUCTS.items() if product.runs_here()})
    right = [name for name, outcome in found.items() if outcome.is_right and name not in info.products]
    wrong = {name: outcome for name, outcome in found.items() if not outcome.is_right}
    value = f"in use: {', '.join(info.products)}; also correct: {', '.join(right)}"
    if wrong:
        value += f"; wrong, not used: {', '.join(f'{name} ({outcome})' for name, outcome in wrong.items())}"
    faults = [name for name in wrong if not PRODUCTS[name].is_often_wrong]
    return MachineProperty(
        value=value, faster=f"a torch version whose {', '.join(faults)} is correct" if faults else NOTHING
    )


def _memory(info: ModelInfo) -> MachineProperty:
    device = torch.device(info.device)
    used = psutil.Process().memory_info().rss
    value = f"{gigabytes(used)} in this process, {gigabytes(psutil.virtual_memory().available)} available"
    if device.type != "cuda":
        return MachineProperty(value=value, faster=NOTHING)
    free, total = torch.cuda.mem_get_info(device)
    value += (
        f"; GPU: {gigabytes(torch.cuda.memory_allocated(device))} used, {gigabytes(free)} of {gigabytes(total)} free"
    )
    return MachineProperty(
        value=value, faster=f"a larger --max-batch-tokens (now {info.max_batch_tokens}) while memory is free"
    )


def _threads(info: ModelInfo) -> MachineProperty:
    limits = cpu_limits()
    value = f"{info.threads} on {limits.num_cores} physical cores: {info.reasons['threads']}"
    if info.device != "cpu":
        return MachineProperty(value=value, faster=NOTHING)
    if info.threads < limits.num_threads:
        return MachineProperty(value=value, faster=f"--threads {limits.num_threads}, if no other work needs the cores")
    if limits.num_threads < limits.num_cores:
        return MachineProperty(value=value, faster=f"a wider limit: {limits.reason}")
    return MachineProperty(value=value, faster="more cores")


def _versions() -> dict[str, str]:
    versions = {"local-rerank": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions
