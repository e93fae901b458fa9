"""The names and shapes of an encoder's weights, by architecture."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Shapes = dict[str, tuple[int, ...]]

UNREAD = re.compile(r"(bert|roberta)\.embeddings\.position_ids|roberta\.pooler\.dense\.(weight|bias)")
"""Tensors that checkpoints may have and the architecture does not read."""


def _linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if bias else weight


def _norm(name: str, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.{part}": (width,) for part in (("weight", "bias") if bias else ("weight",))}


def _bert_backbone(config: dict[str, Any], name: str) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    positions = config.get("max_position_embeddings", 512)
    rows = {"word": config["vocab_size"], "position": positions, "token_type": config.get("type_vocab_size", 2)}
    shapes: Shapes = {f"{name}.embeddings.{kind}_embeddings.weight": (number, hidden) for kind, number in rows.items()}
    shapes |= _norm(f"{name}.embeddings.LayerNorm", hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"{name}.encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _linear(f"{layer}.attention.{part}", hidden, hidden)
        shapes |= _linear(f"{layer}.intermediate.dense", inner, hidden) | _linear(
            f"{layer}.output.dense", hidden, inner
        )
        shapes |= _norm(f"{layer}.attention.output.LayerNorm", hidden) | _norm(f"{layer}.output.LayerNorm", hidden)
    return shapes


def _bert(config: dict[str, Any], num_labels: int) -> Shapes:
    hidden = config["hidden_size"]
    head = _linear("bert.pooler.dense", hidden, hidden) | _linear("classifier", num_labels, hidden)
    return _bert_backbone(config, "bert") | head


def _xlm_roberta(config: dict[str, Any], num_labels: int) -> Shapes:
    hidden = config["hidden_size"]
    head = _linear("classifier.dense", hidden, hidden) | _linear("classifier.out_proj", num_labels, hidden)
    return _bert_backbone(config, "roberta") | head


def _modernbert(config: dict[str, Any], num_labels: int) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    norm, attention, mlp = (config.get(f"{name}_bias", False) for name in ("norm", "attention", "mlp"))
    shapes: Shapes = {"model.embeddings.tok_embeddings.weight": (config["vocab_size"], hidden)}
    shapes |= _norm("model.embeddings.norm", hidden, norm) | _norm("model.final_norm", hidden, norm)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= _linear(f"{layer}.attn.Wqkv", 3 * hidden, hidden, attention)
        shapes |= _linear(f"{layer}.attn.Wo", hidden, hidden, attention)
        shapes |= _linear(f"{layer}.mlp.Wi", 2 * inner, hidden, mlp) | _linear(f"{layer}.mlp.Wo", hidden, inner, mlp)
        shapes |= _norm(f"{layer}.mlp_norm", hidden, norm) | (_norm(f"{layer}.attn_norm", hidden, norm) if i else {})
    shapes |= _linear("head.dense", hidden, hidden, config.get("classifier_bias", False))
    return shapes | _norm("head.norm", hidden, norm) | _linear("classifier", num_labels, hidden)


ENCODER_SHAPES: dict[str, Callable[[dict[str, Any], int], Shapes]] = {
    "BertForSequenceClassification": _bert,
    "XLMRobertaForSequenceClassification": _xlm_roberta,
    "ModernBertForSequenceClassification": _modernbert,
}
"""From the checked config.json and the number of labels, by architecture."""
