"""Linear layers in int8: symmetric quantization, per output channel for weights and per token for activations.

oneDNN multiplies, through torch's `qlinear_pointwise`. It applies the per-channel scale as it writes fp32, so there
are no int32 temporaries; in a module on `torch._int_mm` their page faults took a third of the time. Activations must
be unsigned, with zero point 128: signed ones fell back to a reference loop, 4.4 s instead of 1 ms. The head stays fp32.

Without VNNI, x86 adds two adjacent 8-bit products in 16 bits (`vpmaddubsw`), which saturates from 255 * 129 on. We
then scale weights so that no two neighbours of one sign add up to more than 127 steps (`pair_sums`). The sums are
exact at the same speed, and a step is about 1.3 times as large for normally distributed weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ZERO = 128  # zero point of the unsigned activations
LARGEST = 127
SMALLEST = 1e-12  # scale of a token; the square of its reciprocal is finite
TOLERANCE = 0.15  # in log-odds, times their range if that is above 1


class Int8Linear(nn.Module):
    """Replaces an nn.Linear; input and output are fp32."""

    def __init__(self, linear: nn.Linear, *, limit_pairs: bool) -> None:
        """`limit_pairs`: scale weights for a kernel that saturates; see `products.saturates`."""
        super().__init__()
        weight = linear.weight.detach().float()  # (outputs, inputs)
        self.out_features, self.in_features = weight.shape
        largest = pair_sums(weight) if limit_pairs else weight.abs().amax(dim=1)
        scales = (largest / LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
        quantized = (weight / scales.unsqueeze(1)).round_().to(torch.int8)
        self.weight: Tensor = torch.ops.onednn.qlinear_prepack(quantized, None)
        self.scales = scales  # (outputs,) fp32
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        (out,), scales = project(x, self, keeps=True)
        return out if scales is None else out.mul_(scales)

    def multiply(self, quantized: Tensor, scales: Tensor) -> Tensor:
        """(..., inputs) from `quantize` to (..., outputs) fp32; without a bias the caller multiplies by `scales`."""
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantized.flatten(0, -2), 1.0, ZERO, self.weight, self.scales, self._zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        out = out.view(*quantized.shape[:-1], self.out_features)
        return out if self.bias is None else torch.addcmul(self.bias, out, scales, out=out)


def pair_sums(weight: Tensor) -> Tensor:
    """Per output channel, the largest sum of equal-sign weights in a pair: (outputs, inputs) to (outputs,).

    If this is 127 steps, a rounded pair holds 128 steps at most, and 255 * 128 fits in 16 bits.
    """
    pairs = F.pad(weight, (0, weight.shape[1] % 2)).view(weight.shape[0], -1, 2)
    above, below = pairs.clamp_min(0).sum(-1), pairs.clamp_max(0).sum(-1).neg_()  # (outputs, inputs / 2)
    return torch.maximum(above, below).amax(dim=1)


def quantize(x: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """(..., inputs) fp32 to uint8 with zero point `ZERO`, and the scale of each token, (..., 1) fp32.

    `in_place`: x may be overwritten.
    """
    largest = torch.maximum(x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True).neg_())
    scales = largest.div_(LARGEST).clamp_min_(SMALLEST)
    steps = torch.mul(x, scales.reciprocal(), out=x if in_place else None).round_()
    # torch converts to int8 twice as fast as to uint8; flipping the highest bit adds 128
    return steps.to(torch.int8).view(torch.uint8).bitwise_xor_(ZERO), scales


def project(
    x: Tensor, *linears: Any, scales: Tensor | None = None, keeps: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """Multiply x, (tokens, inputs), by several linear layers: their outputs, (tokens, outputs), and pending scales.

    Pending scales, (tokens, 1), are factors that have not been applied to a tensor yet, because a later step may make
    that pass over memory unnecessary. `scales`: those pending on x. Unless `keeps`, x may be overwritten. int8
    quantizes it once.
    """
    if isinstance(linears[0], Int8Linear):
        quantized, pending = quantize(x, in_place=not keeps)
        if scales is not None:
            pending = pending.mul_(scales).clamp_min_(SMALLEST)
        outs = [linear.multiply(quantized, pending) for linear in linears]
        return outs, pending if linears[0].bias is None else None
    x = x if scales is None else x.mul_(scales)
    return [linear(x) for linear in linears], None
