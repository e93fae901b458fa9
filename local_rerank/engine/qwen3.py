"""Qwen3's modules filled from safetensors files, for the CPU decoder, which calls none of transformers' code.

Importing transformers' Qwen3 classes takes twice the CPU time of importing torch. Attribute names are those of
transformers, because `cpu/layers.py` builds its layers from either and because the tensors of a checkpoint have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from local_rerank.checkpoints.find import Checkpoint
from local_rerank.checkpoints.tensors import full_name
from local_rerank.engine.stored_weights import stored_weights

SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "hidden_act", "attention_bias", "tie_word_embeddings",
)  # fmt: skip


class Qwen3Norm(nn.Module):
    """The parameters of an RMSNorm."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.variance_epsilon = epsilon


class Qwen3Attention(nn.Module):
    """The parameters of a layer's attention."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        queries, keys = (num * self.head_dim for num in (config.num_attention_heads, config.num_key_value_heads))
        bias = config.attention_bias
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=bias)
        self.q_norm = Qwen3Norm(self.head_dim, config.rms_norm_eps)
        self.k_norm = Qwen3Norm(self.head_dim, config.rms_norm_eps)
        self.scaling = self.head_dim**-0.5


class Qwen3Mlp(nn.Module):
    """The parameters of a layer's MLP."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.act_fn = nn.SiLU()
        self.config = config  # for its `hidden_act`


class Qwen3Layer(nn.Module):
    """The parameters of a decoder layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config)
        self.mlp = Qwen3Mlp(config)
        self.input_layernorm = Qwen3Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3Norm(config.hidden_size, config.rms_norm_eps)


class Qwen3Rotary(nn.Module):
    """Cosines and sines of rotary positions without scaling."""

    def __init__(self, theta: float, head_dim: int) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", 1.0 / theta**exponents, persistent=False)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (1, num_tokens) to two (1, num_tokens, head_dim), rounded to the dtype of `hidden`."""
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


class Qwen3Backbone(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: Any, theta: float) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        # a given weight, because random initialization on "meta" imports torch._dynamo, which takes as long as torch
        self.embed_tokens: nn.Module = nn.Embedding(*shape, _weight=torch.empty(shape))
        self.layers = nn.ModuleList(Qwen3Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Qwen3Norm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Qwen3Rotary(theta, config.head_dim)


class Qwen3(nn.Module):
    """A Qwen3ForCausalLM, or a Qwen3ForSequenceClassification with `num_labels`."""

    def __init__(self, config: Any, theta: float, num_labels: int | None) -> None:
        super().__init__()
        self.model = Qwen3Backbone(config, theta)
        if num_labels is not None:
            self.score = nn.Linear(config.hidden_size, num_labels, bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head if hasattr(self, "lm_head") else self.model.embed_tokens


def read_qwen3(checkpoint: Checkpoint, dtype: torch.dtype) -> Qwen3 | None:
    """Read a checkpoint as far as these modules compute what its config.json says; None is left to transformers."""
    config = checkpoint.config
    theta = _theta(config)
    if theta is None or config.get("hidden_act") != "silu" or any(config.get(name) is None for name in SHAPE):
        return None
    num_labels = None
    if checkpoint.architecture.endswith("ForSequenceClassification"):
        num_labels = len(config.get("id2label") or range(config.get("num_labels", 2)))
    with torch.device("meta"):  # neither allocates nor initializes weights
        model = Qwen3(SimpleNamespace(**config), theta, num_labels)
    expected = model.state_dict().keys()
    with stored_weights(checkpoint, dtype) as weights:
        named = {full_name(name, expected): weight for name, weight in weights.items()}
        if named.keys() != expected:  # for example a head beside tied embeddings
            return None
        model.load_state_dict({name: weight[...].to(dtype) for name, weight in named.items()}, assign=True)
    return model


def _theta(config: Mapping[str, Any]) -> float | None:
    """The base of the rotary frequencies; None if they are scaled, or if it is not stated."""
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    is_plain = rotary.keys() <= {"rope_theta", "rope_type"} and rotary.get("rope_type", "default") == "default"
    theta = rotary.get("rope_theta", config.get("rope_theta"))
    return float(theta) if is_plain and theta is not None else None
