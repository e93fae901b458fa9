"""Linear layers in int8: weights quantized per output channel, activations per token, both symmetric.

The products are oneDNN's through torch (`qlinear_pointwise`), which rescales by channel as it writes fp32: no int32
temporaries, whose page faults took a third of the time in a module on `torch._int_mm`. Its sources must be unsigned,
so that 128 stands for zero: signed ones fell back to a reference loop, 4.4 s instead of 1 ms. The head stays fp32.

Without VNNI, x86 adds two neighbouring products of 8 bits in 16 (`vpmaddubsw`), which saturates from 255 * 129 on.
Weights are then scaled so that no two neighbours of one sign add up to more than 127 steps (`pair_sums`): the kernel's
sums are exact at the same speed, and a step grows by about 1.3 on normally distributed weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ZERO = 128  # of the unsigned activations
LARGEST = 127
SMALLEST = 1e-12  # scale of a token: a bias divided by it, and its square, are still numbers
TOLERANCE = 0.15  # of log-odds, times their range where that is above 1


class Int8Linear(nn.Module):
    """Stands in for an nn.Linear; takes and gives fp32."""

    def __init__(self, linear: nn.Linear, *, limit_pairs: bool) -> None:
        """`limit_pairs`: for kernels that saturate; see `products.saturates`."""
        super().__init__()
        weight = linear.weight.detach().float()  # (outputs, inputs)
        self.out_features, self.in_features = weight.shape
        largest = pair_sums(weight) if limit_pairs else weight.abs().amax(dim=1)
        scales = (largest / LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
        quantized = (weight / scales.unsqueeze(1)).round_().to(torch.int8)
        self.weight: Tensor = torch.ops.onednn.qlinear_prepack(quantized, None)
        self._scales = scales
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self._bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        quantized, scales = quantize(x)
        return self.multiply(quantized, scales).mul_(scales)

    def multiply(self, quantized: Tensor, scales: Tensor) -> Tensor:
        """What `quantize` made of (..., inputs): (..., outputs) fp32, still to be multiplied by the tokens' scales."""
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantized.flatten(0, -2), 1.0, ZERO, self.weight, self._scales, self._zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        out = out.view(*quantized.shape[:-1], self.out_features)
        return out if self._bias is None else out.add_(self._bias / scales)


def pair_sums(weight: Tensor) -> Tensor:
    """The largest sum of the values of one sign in a pair of neighbours: (outputs, inputs) to (outputs,).

    Divided by it and rounded to 127 steps, a pair holds 128 at most, of which 255 times as much fits into 16 bits.
    """
    pairs = F.pad(weight, (0, weight.shape[1] % 2)).view(weight.shape[0], -1, 2)
    above, below = pairs.clamp_min(0).sum(-1), pairs.clamp_max(0).sum(-1).neg_()  # (outputs, inputs / 2)
    return torch.maximum(above, below).amax(dim=1)


def quantize(x: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """(..., inputs) fp32 to uint8 around `ZERO`, and the scale of each token, (..., 1) fp32; may overwrite x."""
    most = torch.maximum(x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True).neg_())
    scales = most.div_(LARGEST).clamp_min_(SMALLEST)
    steps = torch.mul(x, scales.reciprocal(), out=x if in_place else None).round_()
    # torch converts to int8 twice as fast as to uint8; turning the highest bit adds 128
    return steps.to(torch.int8).view(torch.uint8).bitwise_xor_(ZERO), scales


def project(x: Tensor, *linears: Any, scales: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
    """(tokens, inputs) through several linear layers, and the scales of the tokens, (tokens, 1), where these are still
    to be multiplied by them: a pass over memory that what follows may not need. x may be overwritten.

    `scales`: those that x is still to be multiplied by. int8 quantizes x once, whatever its tokens' scales.
    """
    if isinstance(linears[0], Int8Linear):
        quantized, own = quantize(x, in_place=True)
        if scales is not None:
            own = own.mul_(scales).clamp_min_(SMALLEST)
        return [linear.multiply(quantized, own) for linear in linears], own
    x = x if scales is None else x.mul_(scales)
    return [linear(x) for linear in linears], None
