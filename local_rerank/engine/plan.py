"""Decide how a checkpoint will run: EngineConfig + Checkpoint -> LoadPlan. Loads no weights; `load.py` carries it out.

`cpu/choices.py` and `cuda/choices.py` answer what depends on the hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from local_rerank.checkpoints.find import Checkpoint
from local_rerank.config import EngineConfig
from local_rerank.engine.cpu import choices as cpu
from local_rerank.engine.cuda import choices as cuda
from local_rerank.engine.cuda.fp8 import require_fp8
from local_rerank.engine.cuda.gpu import Gpu, gpu_of, why_unusable
from local_rerank.engine.dtypes import choose_dtypes, name_of
from local_rerank.engine.kernel_table import choose_kernel
from local_rerank.engine.stored_weights import model_config
from local_rerank.errors import ConfigError

DecoderName = Literal["transformers", "cpu", "cuda", "encoder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """Every choice about a load; `reasons` says why, by field name."""

    config: EngineConfig
    checkpoint: Checkpoint
    device: torch.device
    weights: torch.dtype  # dtype of the loaded weights, before quantization
    arithmetic: torch.dtype  # dtype in which unquantized layers compute
    quantization: Literal["int8", "fp8"] | None
    decoder: DecoderName
    kernel: str  # attention kernel, a row of KERNELS
    linear: str | None  # kernel of the CPU's linear layers, a row of PRODUCTS
    values: torch.dtype | None  # dtype of values in the CPU's attention; None: that of the hidden states
    routes_fp32: bool  # whether oneDNN multiplies the fp32 matrices of the CPU's attention
    cuda_graphs: bool
    max_batch_tokens: int
    fits_memory: bool  # whether loading lowers max_batch_tokens to what fits in free memory
    reasons: Mapping[str, str]

    @property
    def products(self) -> tuple[str, ...]:
        """The kernels that multiply matrices on the CPU, rows of PRODUCTS."""
        if self.linear is None:
            return ()
        others = ["fp32"] if self.quantization == "int8" else []  # for the layers that stay in fp32
        attention = "routed fp32" if self.routes_fp32 else "attention fp32"
        return (self.linear, *others, attention, *(["attention bf16"] if self.rounds_values else []))

    @property
    def rounds_values(self) -> bool:
        """Whether attention computes its weighted sum in 16 bits."""
        return (self.values or self.arithmetic) != torch.float32

    @property
    def pads_attention(self) -> bool:
        """Whether the CPU's attention pads tiles to recurring shapes, because oneDNN generates code for each shape."""
        return self.rounds_values or self.routes_fp32

    def __str__(self) -> str:
        """One line per choice, with its reason."""
        return "\n".join(f"{name}: {_text(getattr(self, name))} ({why})" for name, why in self.reasons.items())

    @property
    def recipe(self) -> str:
        return self.checkpoint.recipe.name


@dataclass(frozen=True, slots=True)
class Platform:
    """What depends on the hardware; a row per device type."""

    preferred_dtype: Callable[[Gpu | None], tuple[torch.dtype, str]]  # that it multiplies fastest, and the reason
    max_batch_tokens: int
    fits_memory: bool = False  # whether free memory limits the tokens of a batch


PLATFORMS = {
    "cpu": Platform(lambda _: cpu.preferred_dtype(), max_batch_tokens=2560),
    "cuda": Platform(cuda.preferred_dtype, max_batch_tokens=16384, fits_memory=True),
    "mps": Platform(lambda _: (torch.float32, "bf16 is not tested on mps"), max_batch_tokens=16384),
}


def make_plan(config: EngineConfig, checkpoint: Checkpoint, platforms: Mapping[str, Platform] = PLATFORMS) -> LoadPlan:
    """Decide how to run `checkpoint` here. Raises ConfigError if this machine cannot do what an option says."""
    reasons: dict[str, str] = {"recipe": checkpoint.recipe_reason}
    is_encoder = checkpoint.recipe.is_encoder
    device, reasons["device"] = choose_device(config.device)
    platform, is_spread = platforms[device.type], config.device_map is not None
    on_cpu = device.type == "cpu" and not is_spread
    gpu = gpu_of(device, is_spread=is_spread)
    weights, arithmetic, reasons["weights"] = choose_dtypes(
        config.dtype, checkpoint, lambda: platform.preferred_dtype(gpu), can_widen=on_cpu
    )
    quantization = _quantization(config, device)
    if device.type == "cpu":
        cpu.check(config, arithmetic)
    elif gpu is not None:
        cuda.check(arithmetic, gpu)
    decoder, reasons["decoder"] = _decoder(config, checkpoint, device, gpu, arithmetic)
    compiled = decoder == "cuda"
    kernel, reasons["kernel"] = choose_kernel(
        config.attention,
        device,
        arithmetic,
        gpu=gpu,
        head_dim=checkpoint.head_dim,
        compiled=compiled,
        is_encoder=is_encoder,
    )
    linear = None
    if decoder == "cpu" or (is_encoder and on_cpu):
        linear, reasons["linear"] = cpu.choose_linear(config, weights, arithmetic)
    graphs, reasons["cuda_graphs"] = _cuda_graphs(config, checkpoint, decoder, kernel)
    tokens, reasons["max_batch_tokens"] = config.max_batch_tokens, "set by the user"
    if tokens is None:
        tokens, reasons["max_batch_tokens"] = platform.max_batch_tokens, "default"
    return LoadPlan(
        config=config,
        checkpoint=checkpoint,
        device=device,
        weights=weights,
        arithmetic=arithmetic,
        quantization=quantization,
        decoder=decoder,
        kernel=kernel,
        linear=linear,
        values=cpu.values_dtype(config, checkpoint) if decoder == "cpu" else None,
        routes_fp32=decoder == "cpu" and cpu.routes_fp32(config, arithmetic),
        cuda_graphs=graphs,
        max_batch_tokens=tokens,
        fits_memory=platform.fits_memory and config.max_batch_tokens is None,
        reasons=reasons,
    )


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device and the reason for it; `auto` takes a GPU that this torch can use. Raises ConfigError without it."""
    if name == "auto":
        device = torch.device("cuda")
        why_not = why_unusable(device)
        return (device, f"torch sees a GPU: {gpu_of(device)}") if why_not is None else (torch.device("cpu"), why_not)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in PLATFORMS:
        raise ConfigError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        if torch.cuda.is_available() and (device.index or 0) >= (count := torch.cuda.device_count()):
            raise ConfigError(f"device is {name!r}; torch sees {', '.join(f'cuda:{index}' for index in range(count))}")
        if (why_not := why_unusable(device)) is not None:
            raise ConfigError(f"device is {name!r}, but {why_not}; or set device to cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device is 'mps', but torch sees none; it needs a Mac with Apple silicon. Set device to cpu")
    return device, "set by the user"


def _quantization(config: EngineConfig, device: torch.device) -> Literal["int8", "fp8"] | None:
    if config.dtype == "fp8":
        if config.device_map is not None:
            raise ConfigError("dtype is 'fp8' and device_map is set; fp8 needs a model on one GPU")
        require_fp8(device)
        return "fp8"
    if config.dtype == "int8":
        if device.type != "cpu" or config.device_map is not None:
            raise ConfigError(f"dtype int8 runs on a CPU; the device is {config.device_map or device}")
        return "int8"
    return None


def _decoder(
    config: EngineConfig, checkpoint: Checkpoint, device: torch.device, gpu: Gpu | None, dtype: torch.dtype
) -> tuple[DecoderName, str]:
    if checkpoint.recipe.is_encoder:
        for option, value in (("dtype", "fp8"), ("device_map", config.device_map)):
            if value is not None and getattr(config, option) == value:
                raise ConfigError(f"{option} is {value!r}, but {checkpoint.model_id} is an encoder, which runs without")
        return "encoder", f"the recipe {checkpoint.recipe.name} is an encoder"
    if config.device_map is not None:
        why_not = "the model is spread over devices"
    elif device.type == "cpu":
        return "cpu", "the whole model is on the CPU"
    elif gpu is not None:
        if (reason := cuda.why_not_fused_here(config, checkpoint, device, gpu, dtype)) is None:
            return "cuda", "each kernel agrees with torch's operators on this GPU"
        why_not = reason
    else:
        why_not = f"there is no other decoder for {device.type}"
    for option, value in (("dtype", "fp8"), ("attention", "cuda-tiles")):
        if getattr(config, option) == value:
            raise ConfigError(f"{option} is {value!r}, which needs the GPU decoder; it cannot be used: {why_not}")
    return "transformers", why_not


def _cuda_graphs(config: EngineConfig, checkpoint: Checkpoint, decoder: DecoderName, kernel: str) -> tuple[bool, str]:
    """Whether to use CUDA graphs, and why. They need the GPU decoder and the only kernel whose layout can be padded.

    `deterministic` excludes them: a larger batch is no graph, and padded products sum in another order. So does a
    rotary embedding that changes with the batch: transformers reads its longest position back from the GPU.
    """
    if decoder != "cuda":
        return False, "graphs need the GPU decoder"
    if kernel != "cuda-tiles":
        return False, f"the layout of {kernel} cannot be padded"
    if (rope_type := model_config(checkpoint).rope_parameters["rope_type"]) != "default":
        return False, f"rope_type {rope_type} may wait for the GPU within a pass"
    if config.no_cuda_graphs or config.deterministic:
        return False, "set by the user" if config.no_cuda_graphs else "deterministic is set"
    return True, "one launch for a whole batch"


def _text(value: object) -> str:
    return name_of(value) if isinstance(value, torch.dtype) else str(value)
