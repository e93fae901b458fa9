"""Encoders: every token of a pair sees the whole pair, and a head on the pair's first token gives its score.

transformers' layers run with our attention on a packed batch, each pair a segment of its own. All dialects of heads end
in one linear layer. `Engine` multiplies that in fp32, like a decoder's rows of "no" and "yes"; what comes before it is
here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from local_rerank.checkpoints.find import Checkpoint
from local_rerank.checkpoints.tensors import positive_label
from local_rerank.engine.attention import Layout
from local_rerank.engine.decoder import PackedAttention
from local_rerank.engine.kernel_table import KernelRow
from local_rerank.engine.packing import PackedBatch, pack
from local_rerank.requests.pair import Pair


@dataclass(frozen=True, kw_only=True)
class EncoderParts:
    """Where an architecture has what all have."""

    layers: nn.ModuleList
    features: nn.Module  # from a pair's pooled state to what the last linear layer reads
    classifier: nn.Linear  # the last linear layer
    first_position: int = 0
    has_types: bool = True  # whether there are embeddings of token types
    window: int | None = None  # tokens to each side that a token sees in the layers with a sliding window
    pools_mean: bool = False  # over all tokens of the pair, instead of its first


def _bert(model: Any) -> EncoderParts:
    pooler, model.bert.pooler = model.bert.pooler, None
    features = nn.Sequential(pooler.dense, nn.Tanh())
    return EncoderParts(layers=model.bert.encoder.layer, features=features, classifier=model.classifier)


def _xlm_roberta(model: Any) -> EncoderParts:
    backbone, head = model.roberta, model.classifier
    return EncoderParts(
        layers=backbone.encoder.layer,
        features=nn.Sequential(head.dense, nn.Tanh()),
        classifier=head.out_proj,
        first_position=backbone.embeddings.padding_idx + 1,
    )


def _modernbert(model: Any) -> EncoderParts:
    return EncoderParts(
        layers=model.model.layers,
        features=model.head,
        classifier=model.classifier,
        has_types=False,
        window=model.config.sliding_window,
        pools_mean=model.config.classifier_pooling == "mean",
    )


PARTS: dict[str, Callable[[Any], EncoderParts]] = {
    "BertForSequenceClassification": _bert,
    "XLMRobertaForSequenceClassification": _xlm_roberta,
    "ModernBertForSequenceClassification": _modernbert,
}
"""By architecture."""


class TransformersEncoder(nn.Module):
    """A `Decoder` of encoders; it never calls `last_layout`, because the last layer is not pruned."""

    def __init__(self, model: Any, architecture: str) -> None:
        """`model`: of that class of transformers, loaded with `ATTENTION_NAME`."""
        super().__init__()
        parts = PARTS[architecture](model)
        self.backbone = model.base_model
        self.layers: Any = parts.layers
        self.features = parts.features
        self._parts = parts

    @property
    def classifier(self) -> nn.Linear:
        """The last linear layer, which `Engine` multiplies."""
        return self._parts.classifier

    def forward(
        self, batch: PackedBatch, kernel: KernelRow, layout: Layout, last_layout: Callable[[], Layout]
    ) -> Tensor:
        """(num_pairs, hidden_size + 1) fp32, packed order. The last feature is 1: the head's last column is a bias."""
        parts = self._parts
        local = None if parts.window is None else kernel.layout(replace(batch, window=parts.window), False)
        none = {"full_attention": None, "sliding_attention": None}  # a dict keeps ModernBERT from building masks
        hidden: Tensor = self.backbone(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids + parts.first_position,
            attention_mask=None if parts.has_types else none,
            packed_attention=PackedAttention(kernel, layout, local),
            **({"token_type_ids": batch.token_type_ids} if parts.has_types else {}),
        ).last_hidden_state
        features = self.features(self._pooled(hidden[0], batch)).float()
        return torch.cat([features, features.new_ones(features.shape[0], 1)], dim=1)

    def _pooled(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """(num_tokens, hidden) to (num_pairs, hidden)."""
        lengths = batch.position_ids[0, batch.last_token_index] + 1
        if not self._parts.pools_mean:
            return hidden[batch.last_token_index + 1 - lengths]
        segment = torch.repeat_interleave(lengths, output_size=batch.num_tokens)
        sums = hidden.new_zeros(batch.num_pairs, hidden.shape[1], dtype=torch.float32)
        return (sums.index_add_(0, segment, hidden.float()) / lengths.unsqueeze(1)).to(hidden.dtype)


def encoder_head(classifier: nn.Linear, checkpoint: Checkpoint) -> Tensor:
    """The rows of "not relevant" and "relevant", (2, hidden_size + 1) fp32, the bias in the last column. The row of a
    single label is the difference of both.
    """
    rows = torch.cat([classifier.weight.detach(), classifier.bias.detach().unsqueeze(1)], dim=1).float()
    if rows.shape[0] == 1:
        return torch.cat([torch.zeros_like(rows), rows])
    relevant = positive_label(checkpoint.folder, checkpoint.config)
    return rows[[1 - relevant, relevant]]


def pack_segments(pairs: Sequence[Pair]) -> PackedBatch:
    """Pack an encoder's pairs, each a segment whose tokens see each other, with token types."""
    batch = pack(pairs)
    in_order = [pairs[index] for index in batch.pair_order.tolist()]
    lengths = [pair.num_tokens for pair in in_order]
    types = batch.position_ids[0].numpy() >= np.repeat([pair.first_typed for pair in in_order], lengths)
    return replace(batch, is_causal=False, token_type_ids=torch.from_numpy(types.astype(np.int64)).unsqueeze(0))
