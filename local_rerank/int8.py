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
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        rows = x.reshape(-1, self.in_features)
        operand = Int8Operand(rows.shape[0], self.in_features)
        operand.store(slice(None), rows)
        return operand.multiply(self).finish(slice(None)).view(*x.shape[:-1], self.out_features)

    def multiply(self, quantized: Tensor) -> Tensor:
        """(tokens, inputs) uint8 to (tokens, outputs) fp32, before the scale of each token and the bias."""
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantized, 1.0, ZERO, self.weight, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out


class Int8Operand:
    """What int8 layers multiply: (tokens, inputs) uint8 around `ZERO` and a scale for each token."""

    def __init__(self, num_tokens: int, num_inputs: int) -> None:
        self._quantized = torch.empty(num_tokens, num_inputs, dtype=torch.uint8)
        self._scales = torch.empty(num_tokens, 1)

    def store(self, rows: slice, x: Tensor) -> None:
        """Quantize (rows, inputs) fp32."""
        self._quantized[rows], self._scales[rows] = quantize(x)

    def multiply(self, linear: Int8Linear) -> Int8Product:
        return Int8Product(linear.multiply(self._quantized), self._scales, linear.bias)


class Int8Product:
    """What came of a multiplication, (tokens, outputs) fp32; each row is right once it is finished."""

    def __init__(self, values: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self.values = values
        self._scales = scales
        self._bias = bias

    def finish(self, rows: slice) -> Tensor:
        """Scale some rows, once; a view of them."""
        finished = self.values[rows].mul_(self._scales[rows])
        return finished if self._bias is None else finished.add_(self._bias)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, inputs) fp32 to uint8 around `ZERO`, and the scale of each token, (tokens, 1) fp32."""
    most = torch.maximum(x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True).neg_())
    scales = most.div_(LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
    return torch.mul(x, scales.reciprocal()).round_().add_(ZERO).to(torch.uint8), scales


def quantize_layers(layers: nn.ModuleList) -> None:
    """Replace every linear layer of the decoder's layers; raises ConfigError where torch has no oneDNN."""
    if not torch._C._has_mkldnn:
        raise ConfigError("dtype int8 needs a torch with oneDNN; this one has none")
    for layer in list[Any](layers):
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, Int8Linear(child))
