"""Linear layers in int8: weights quantized per output channel, activations per token, both symmetric.

The products are oneDNN's through torch (`qlinear_pointwise`), which rescales by channel as it writes fp32: no int32
temporaries, whose page faults took a third of the time in a module on `torch._int_mm`. Its sources must be unsigned,
so that 128 stands for zero: signed ones fell back to a reference loop, 4.4 s instead of 1 ms. The head stays fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from local_rerank.errors import ConfigError

ZERO = 128  # of the unsigned activations
LARGEST = 127
_ZERO_AND_HALF = torch.tensor(ZERO + 0.5)


class Int8Linear(nn.Module):
    """Stands in for an nn.Linear; takes and gives fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()  # (outputs, inputs)
        self.out_features, self.in_features = weight.shape
        scales = (weight.abs().amax(dim=1) / LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
        quantized = (weight / scales.unsqueeze(1)).round_().to(torch.int8)
        self.weight: Tensor = torch.ops.onednn.qlinear_prepack(quantized, None)
        self._scales = scales
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self._bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return self.multiply(*quantize(x))

    def multiply(self, quantized: Tensor, scales: Tensor) -> Tensor:
        """What `quantize` made of (..., inputs): (..., outputs) fp32."""
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantized.flatten(0, -2), 1.0, ZERO, self.weight, self._scales, self._zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        out = out.view(*quantized.shape[:-1], self.out_features).mul_(scales)
        return out if self._bias is None else out.add_(self._bias)


def quantize(x: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """(..., inputs) fp32 to uint8 around `ZERO`, and the scale of each token, (..., 1) fp32; may overwrite x."""
    most = torch.maximum(x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True).neg_())
    scales = most.div_(LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
    # all are positive, so that the conversion, which cuts, rounds to the nearest
    steps = torch.addcmul(_ZERO_AND_HALF, x, scales.reciprocal(), out=x if in_place else None)
    return steps.to(torch.uint8), scales


def quantize_layers(layers: nn.ModuleList) -> None:
    """Replace every linear layer of the decoder's layers; raises ConfigError where torch has no oneDNN."""
    if not torch._C._has_mkldnn:
        raise ConfigError("dtype int8 needs a torch with oneDNN; this one has none")
    for layer in list[Any](layers):
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, Int8Linear(child))


def project(x: Tensor, *linears: Any) -> list[Tensor]:
    """`x` through several linear layers; where they are int8, it is quantized once and overwritten."""
    if isinstance(linears[0], Int8Linear):
        quantized, scales = quantize(x, in_place=True)
        return [linear.multiply(quantized, scales) for linear in linears]
    return [linear(x) for linear in linears]
