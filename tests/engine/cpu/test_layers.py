"""The CPU's decoder layer compared with transformers' layer, both on the same int8 linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from local_rerank.engine.cpu.int8 import Int8Linear
from local_rerank.engine.cpu.layers import CpuLayer
from local_rerank.engine.cpu.products import saturates
from local_rerank.engine.decoder import linear_layers

pytestmark = pytest.mark.numeric

NUM_TOKENS = 24


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: None, scale: float) -> torch.Tensor:
    """Causal attention over one sequence; shapes as in `engine/attention.py`."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize(
    "exact", [(), ("down_proj",), ("o_proj",), ("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")]
)
@pytest.mark.parametrize("size", [1.0, 1e-4])  # of q and k: epsilon matters in the norms of small ones
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("values", "largest", "median"), [(None, 2e-2, 1e-3), (torch.bfloat16, 5e-2, 1e-2)])
def test_pending_scales_are_applied_exactly_once(
    exact: tuple[str, ...], size: float, bias: bool, values: torch.dtype | None, largest: float, median: float
) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=1, attention_bias=bias,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer: Any = Qwen3DecoderLayer(config, 0).eval()
    with torch.no_grad():
        layer.self_attn.q_proj.weight.mul_(size)
        layer.self_attn.k_proj.weight.mul_(size)
    for parent, name in linear_layers(layer):
        if name not in exact:
            setattr(parent, name, Int8Linear(getattr(parent, name), limit_pairs=saturates()))
    hidden = torch.randn(1, NUM_TOKENS, 64) * torch.logspace(-3, 2, NUM_TOKENS).unsqueeze(1)
    hidden[:, 0] = 0
    rotation = Qwen3RotaryEmbedding(config)(hidden, torch.arange(NUM_TOKENS).unsqueeze(0))
    mask = torch.full((NUM_TOKENS, NUM_TOKENS), -torch.inf).triu(1)[None, None]
    with torch.inference_mode():
        expected = layer(hidden.clone(), position_embeddings=rotation, attention_mask=mask)
        by_token = (rotation[0][0].unsqueeze(1), rotation[1][0].unsqueeze(1))
        actual = CpuLayer(layer, values)(hidden[0].clone(), by_token, attend, None)
    error = (actual - expected).abs().amax(-1) / expected.abs().amax(-1).clamp_min(1e-9)
    assert error.max() < largest  # a value between two steps may be rounded either way
    assert error.median() < median
