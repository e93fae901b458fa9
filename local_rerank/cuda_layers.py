"""Decoder layers for a GPU in bf16 or fp16: GEMMs that share an input are joined, the work between GEMMs is fused.

transformers runs each RMSNorm, rotary embedding and activation as several kernels that read and write whole tensors. On
a fast GPU that traffic takes longer than the GEMMs: for Qwen3-0.6B about 4 GB a layer at 16,384 tokens, 30 ms in all
at 4 TB/s against 20 ms of GEMMs at 700 TFLOP/s (arithmetic, not measured). `torch.compile` makes one kernel of each
function below; where it cannot (it needs a C compiler on the machine), torch's own operators run one after the other.

`fuse` replaces all layers but the last, which the engine drives by hand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum (..., hidden) and its RMSNorm."""
    total = x + residual
    return total, F.rms_norm(total, weight.shape, weight, eps)


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm and rotary embedding of each head, (1, tokens, heads, head_dim); cos and sin (1, tokens, 1, head_dim)."""
    normed = F.rms_norm(x, weight.shape, weight, eps)
    first, second = normed.chunk(2, dim=-1)
    return normed * cos + torch.cat([-second, first], dim=-1) * sin


def silu_mul(gate_up: Tensor) -> Tensor:
    """(..., 2 * intermediate), gate first: (..., intermediate)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@dataclass(frozen=True, slots=True)
class Pointwise:
    """The functions between the GEMMs, compiled or as they are."""

    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_rms_norm
    norm_rotate: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = norm_rotate
    silu_mul: Callable[[Tensor], Tensor] = silu_mul


class FusedLayer(nn.Module):
    """Stands in for a Qwen3DecoderLayer, with its weights; called as transformers calls one."""

    def __init__(self, layer: Any, attend: Callable[..., tuple[Tensor, None]], pointwise: Pointwise) -> None:
        """`attend`: the function that transformers' attention modules call."""
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv_proj = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj: Any = attention.o_proj
        self.gate_up_proj = _joined(mlp.gate_proj, mlp.up_proj)
        self.down_proj: Any = mlp.down_proj
        self.input_layernorm: Any = layer.input_layernorm
        self.post_attention_layernorm: Any = layer.post_attention_layernorm
        self.q_norm: Any = attention.q_norm
        self.k_norm: Any = attention.k_norm
        self._head_dim = int(attention.head_dim)
        self._widths = [p.out_features for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self._scaling = float(attention.scaling)
        self._eps = float(layer.input_layernorm.variance_epsilon)
        self._attend = attend
        self._pointwise = pointwise

    def forward(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **options: Any) -> Tensor:
        """(1, tokens, hidden) to the same."""
        cos, sin = (x.unsqueeze(2) for x in position_embeddings)  # (1, tokens, 1, head_dim)
        norm = self.input_layernorm.weight
        x = F.rms_norm(hidden_states, norm.shape, norm, self._eps)
        parts = self.qkv_proj(x).split(self._widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self._head_dim)) for part in parts)  # (1, tokens, heads, head_dim)
        q = self._pointwise.norm_rotate(q, self.q_norm.weight, cos, sin, self._eps)
        k = self._pointwise.norm_rotate(k, self.k_norm.weight, cos, sin, self._eps)
        by_head = (part.transpose(1, 2) for part in (q, k, v))
        attended, _ = self._attend(self, *by_head, scaling=self._scaling, **options)
        out = self.o_proj(attended.flatten(2))
        hidden, x = self._pointwise.add_rms_norm(out, hidden_states, self.post_attention_layernorm.weight, self._eps)
        result: Tensor = hidden + self.down_proj(self._pointwise.silu_mul(self.gate_up_proj(x)))
        return result


def fuse(backbone: Any, attend: Callable[..., tuple[Tensor, None]], *, compiled: bool, device: torch.device) -> str:
    """Replace all layers but the last by fused ones; says what was done, for the log."""
    if backbone.config.hidden_act != "silu":
        return f"layers are transformers' own: the activation is {backbone.config.hidden_act}"
    pointwise, how = _choose_pointwise(compiled, device)
    for index in range(len(backbone.layers) - 1):
        backbone.layers[index] = FusedLayer(backbone.layers[index], attend, pointwise)
    return f"layers are fused, {how}"


def _choose_pointwise(compiled: bool, device: torch.device) -> tuple[Pointwise, str]:
    if not compiled:
        return Pointwise(), "not compiled, as asked for"
    if not can_compile(device):
        return Pointwise(), "not compiled: torch.compile does not work here"
    return Pointwise(torch.compile(add_rms_norm), torch.compile(norm_rotate), torch.compile(silu_mul)), "compiled"


@cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works for a device, tried once: it needs a C compiler, and Triton on a GPU."""
    try:
        with torch.inference_mode():
            torch.compile(silu_mul)(torch.ones(32, 64, device=device))
    except Exception as error:  # whatever compilers, their back ends and the linker raise
        reason = (str(error).strip().splitlines() or [""])[0]
        logger.warning("torch.compile does not work here (%s: %s)", type(error).__name__, reason)
        return False
    return True


def _joined(*layers: nn.Linear) -> nn.Linear:
    """One linear layer whose output is that of `layers`, side by side."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=layers[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if layers[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
    return joined
