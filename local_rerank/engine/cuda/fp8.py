"""`--dtype fp8`: the decoder's linear layers in fp8 (e4m3), for GPUs that multiply it.

Weights have a scale per output channel, computed at load; activations have a scale per token, computed in each pass.
Products are bf16. Embeddings, norms, attention, the last hidden state and the head are not quantized.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local_rerank.engine.decoder import linear_layers
from local_rerank.errors import ConfigError

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
LEAST_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
NUM_CHECKED_ROWS = 35
SIZE_MULTIPLE = 16  # for both dimensions of a weight, required by the tensor cores


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., width) to fp8 and a scale per row, (..., 1) fp32; a row's largest magnitude becomes 448."""
    amax = x.abs().amax(dim=-1, keepdim=True).float()
    scale = amax.clamp(min=1e-12) / FP8_MAX
    # a rounded scale could put a value beyond 448, which the conversion to e4m3 turns into NaN
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def scaled_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    """(m, k) fp8 times the transpose of (n, k) fp8, with scales (m, 1) and (n, 1) fp32, and bias (n,): (m, n) bf16.

    torch has no public function for it.
    """
    return torch._scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


class Fp8Linear(nn.Module):
    """Replaces an nn.Linear; its output is bf16, its input bf16 or quantized."""

    weight: Tensor  # (out_features, in_features) fp8
    scale: Tensor  # (out_features, 1) fp32
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """(tokens, in_features) bf16, or fp8 and (tokens, 1) fp32 scales, to (tokens, out_features) bf16."""
        from local_rerank.engine.cuda.triton_kernels import quantize_rows

        values, scale = quantize_rows(x, FP8) if isinstance(x, Tensor) else x
        return scaled_matmul(values, scale, self.weight, self.scale, self.bias)


def quantize_model(backbone: Any, *, fused: bool = True) -> None:
    """Quantize every linear layer of the decoder, one at a time. Raises ConfigError if a layer's size is unsuitable.

    `fused`: a layer's norms and activation quantize what they return, so that only o_proj quantizes its own input.
    """
    places = linear_layers(backbone.layers)
    for parent, name in places:
        _check_size(name, getattr(parent, name))
    for parent, name in places:
        setattr(parent, name, Fp8Linear(getattr(parent, name)))
    for layer in backbone.layers:
        layer.quantizes = fused


def product_and_exact(in_features: int, out_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`Fp8Linear` and the same product in fp32, of random rows of different sizes, which need different scales."""
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device, generator=generator)

    x, weight = (random(rows, in_features) * random(rows, 1) for rows in (NUM_CHECKED_ROWS, out_features))
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    return Fp8Linear(linear)(quantize(x.bfloat16())), F.linear(x.bfloat16().float(), linear.weight.float())


def _check_size(name: str, linear: nn.Linear) -> None:
    if linear.in_features % SIZE_MULTIPLE or linear.out_features % SIZE_MULTIPLE:
        size = f"{linear.out_features} x {linear.in_features}"
        raise ConfigError(f"dtype is 'fp8', but {name} is {size}; fp8 needs multiples of {SIZE_MULTIPLE}")


def require_fp8(device: torch.device) -> None:
    """Raise ConfigError, with the reason, if `device` cannot multiply fp8 with a scale per row."""
    if device.type != "cuda":
        raise ConfigError(f"dtype is 'fp8', which needs a GPU of compute capability 8.9; the device is {device}")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"dtype is 'fp8', which needs compute capability 8.9 or newer; {name} has {major}.{minor}")
    try:
        ones, scale = quantize(torch.ones(16, 16, dtype=torch.bfloat16, device=device))
        scaled_matmul(ones, scale, ones, scale, None)
        torch.cuda.current_stream(device).synchronize()  # not the device, on which another model may capture graphs
    except RuntimeError as error:  # some torch builds have no kernel for per-row scales on some GPUs
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"dtype is 'fp8', but this torch cannot multiply it on this GPU: {reason}") from error
