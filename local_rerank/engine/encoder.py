"""Encoders: every token of a pair sees the whole pair, and a head on the pair's first token gives its score.

The linear layers, norms and embeddings are transformers' modules; what is between them is ours, on a packed batch in
which each pair is a segment of its own. Queries, keys and values are one product, and the last layer computes only each
pair's first token where nothing else is read. Every head ends in a linear layer, which `Engine` multiplies in fp32
like a decoder's rows of "no" and "yes"; what comes before it in the head is here, also in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local_rerank import forks
from local_rerank.checkpoints.find import Checkpoint
from local_rerank.checkpoints.tensors import positive_label
from local_rerank.engine.attention import Attend, Layout, layout_to
from local_rerank.engine.cpu.int8 import project
from local_rerank.engine.cpu.layers import Rotation, rotate_, scaled
from local_rerank.engine.cpu.linears import BlockedLinear
from local_rerank.engine.kernel_table import KernelRow
from local_rerank.engine.packing import PackedBatch, pack
from local_rerank.requests.pair import Pair


class EncoderLayer(nn.Module):
    """A layer of BERT or XLM-RoBERTa, or one of ModernBERT, whose norms are before the linear layers and not after."""

    def __init__(
        self,
        *linears: Any,
        norms: tuple[nn.Module, nn.Module],
        activate: Callable[[Tensor], Tensor],
        num_heads: int,
        norms_first: bool = False,
        is_local: bool = False,
    ) -> None:
        """`linears`: for queries, keys and values; attention's output; the MLP's first and last.

        `is_local`: whether tokens see the window only.
        """
        super().__init__()
        self.qkv, self.out, self.up, self.down = linears
        self.attention_norm, self.mlp_norm = norms
        self.activate, self.is_local = activate, is_local
        self._num_heads, self._norms_first = num_heads, norms_first

    def join_activation(self) -> None:
        """Let oneDNN apply a GELU as it writes the product."""
        if self.activate is F.gelu and isinstance(self.up, BlockedLinear):
            self.up.activation, self.activate = "gelu", nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation | None,
        attend: Attend,
        layout: Layout,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """(num_tokens, hidden) to (num_queries, hidden). Without `query_positions` every token is a query."""
        x = self.attention_norm(hidden) if self._norms_first else hidden
        (joined,), scales = project(x, self.qkv, keeps=True)
        # (num_tokens, num_heads, head_dim) each
        q, k, v = scaled(joined, scales).view(x.shape[0], 3, self._num_heads, -1).unbind(1)
        if rotation is not None:
            q, k = (rotate_(part, *rotation) for part in (q, k))
        if query_positions is not None:
            q, hidden = q[query_positions], hidden[query_positions]
        scale = q.shape[-1] ** -0.5
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))  # (1, heads, tokens, head_dim)
        (out,), scales = project(attend(q, k, v, layout, scale)[0].flatten(1), self.out)
        hidden = scaled(out, scales).add_(hidden)
        del x, joined, q, k, v  # the MLP needs their memory
        hidden = hidden if self._norms_first else self.attention_norm(hidden)
        (up,), scales = project(self.mlp_norm(hidden) if self._norms_first else hidden, self.up, keeps=True)
        (out,), scales = project(self.activate(scaled(up, scales)), self.down)
        hidden = scaled(out, scales).add_(hidden)
        return hidden if self._norms_first else self.mlp_norm(hidden)


@dataclass(frozen=True, kw_only=True)
class EncoderParts:
    """What differs between architectures."""

    embeddings: Any
    layers: nn.ModuleList  # of EncoderLayer
    features: nn.Module  # from a pair's pooled state to what the last linear layer reads
    classifier: nn.Linear  # the last linear layer
    norm: nn.Module | None = None  # after the last layer
    first_position: int = 0
    rotary: Any = None  # ModernBERT has it instead of embeddings of positions and token types
    window: int | None = None  # tokens to each side that a token sees in the layers with a sliding window
    pools_mean: bool = False  # over all tokens of the pair, instead of its first


def _layer_of_bert(layer: Any) -> EncoderLayer:
    attention, output = layer.attention.self, layer.attention.output
    parts = (attention.query, attention.key, attention.value)
    qkv = nn.Linear(1, 1, device="meta")
    qkv.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    qkv.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return EncoderLayer(
        *(qkv, output.dense, layer.intermediate.dense, layer.output.dense),
        norms=(output.LayerNorm, layer.output.LayerNorm),
        activate=F.gelu if attention.config.hidden_act == "gelu" else layer.intermediate.intermediate_act_fn,
        num_heads=attention.num_attention_heads,
    )


def _layer_of_modernbert(layer: Any) -> EncoderLayer:
    attention, mlp = layer.attn, layer.mlp

    def activate(x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=1)
        product: Tensor = mlp.act(x).mul_(gate)
        return product

    return EncoderLayer(
        *(attention.Wqkv, attention.Wo, mlp.Wi, mlp.Wo),
        norms=(layer.attn_norm, layer.mlp_norm),
        activate=activate,
        num_heads=attention.config.num_attention_heads,
        norms_first=True,
        is_local=attention.sliding_window is not None,
    )


def _replaced(layers: nn.ModuleList, make: Callable[[Any], EncoderLayer]) -> nn.ModuleList:
    """One at a time, so that the model is not in memory twice."""
    for index, layer in enumerate(layers):
        layers[index] = make(layer)
    return layers


def _parts_of_bert(model: Any, dense: nn.Module, classifier: nn.Linear, first_position: int = 0) -> EncoderParts:
    return EncoderParts(
        embeddings=model.base_model.embeddings,
        layers=_replaced(model.base_model.encoder.layer, _layer_of_bert),
        features=nn.Sequential(dense, nn.Tanh()),
        classifier=classifier,
        first_position=first_position,
    )


def _xlm_roberta(model: Any) -> EncoderParts:
    head = model.classifier
    return _parts_of_bert(model, head.dense, head.out_proj, model.roberta.embeddings.padding_idx + 1)


def _modernbert(model: Any) -> EncoderParts:
    return EncoderParts(
        embeddings=model.model.embeddings,
        layers=_replaced(model.model.layers, _layer_of_modernbert),
        norm=model.model.final_norm,
        features=model.head,
        classifier=model.classifier,
        rotary=model.model.rotary_emb,
        window=model.config.sliding_window,
        pools_mean=model.config.classifier_pooling == "mean",
    )


PARTS: dict[str, Callable[[Any], EncoderParts]] = {
    "BertForSequenceClassification": lambda model: _parts_of_bert(model, model.bert.pooler.dense, model.classifier),
    "XLMRobertaForSequenceClassification": _xlm_roberta,
    "ModernBertForSequenceClassification": _modernbert,
}
"""By architecture."""


class Encoder(nn.Module):
    """A `Decoder` of encoders, for any device."""

    def __init__(self, model: Any, architecture: str) -> None:
        """`model`: of that class of transformers; its layers are replaced."""
        super().__init__()
        self.parts = parts = PARTS[architecture](model)
        self.embeddings, self.norm = parts.embeddings, parts.norm or nn.Identity()
        self.layers: Any = parts.layers
        self.features = parts.features.float()
        self._prunes = not parts.pools_mean and not self.layers[-1].is_local

    def forward(
        self, batch: PackedBatch, kernel: KernelRow, layout: Layout, last_layout: Callable[[], Layout]
    ) -> Tensor:
        """(num_pairs, hidden_size + 1) fp32, packed order. The last feature is 1: the head's last column is a bias."""
        others = {
            "token_type_ids": batch.token_type_ids,
            "position_ids": batch.position_ids + self.parts.first_position,
        }
        hidden = self.embeddings(batch.input_ids, **({} if self.parts.rotary else others))[0]  # (num_tokens, hidden)
        layouts = {False: layout}  # by whether a layer has a window
        if self.parts.window is not None:
            layouts[True] = kernel.layout(replace(batch, window=self.parts.window), False)
        arguments = {
            is_local: (self._rotation(hidden, batch, is_local), kernel.attend, layout_to(layout, hidden.device))
            for is_local, layout in layouts.items()
        }
        last = len(self.layers) - 1 if self._prunes else len(self.layers)
        for layer in self.layers[:last]:
            forks.between_layers()
            hidden = layer(hidden, *arguments[layer.is_local])
        lengths = batch.position_ids[0, batch.last_token_index] + 1
        first = batch.last_token_index + 1 - lengths
        if self._prunes:
            rotation, attend, _ = arguments[False]
            hidden = self.layers[-1](hidden, rotation, attend, layout_to(last_layout(), hidden.device), first)
        hidden = self.norm(hidden).float()
        if self.parts.pools_mean:
            segment = torch.repeat_interleave(lengths, output_size=batch.num_tokens)
            sums = hidden.new_zeros(batch.num_pairs, hidden.shape[1]).index_add_(0, segment, hidden)
            hidden = sums / lengths.unsqueeze(1)
        features = self.features(hidden if self._prunes or self.parts.pools_mean else hidden[first])
        return torch.cat([features, features.new_ones(features.shape[0], 1)], dim=1)

    def _rotation(self, hidden: Tensor, batch: PackedBatch, is_local: bool) -> Rotation | None:
        if self.parts.rotary is None:
            return None
        kind = "sliding_attention" if is_local else "full_attention"
        cos, sin = self.parts.rotary(hidden.unsqueeze(0).float(), batch.position_ids, kind)
        return cos[0].unsqueeze(1), sin[0].unsqueeze(1)


def encoder_head(classifier: nn.Linear, checkpoint: Checkpoint) -> Tensor:
    """The rows of "not relevant" and "relevant", (2, hidden_size + 1) fp32, the bias in the last column.

    A single label is the row of "relevant", beside zeros.
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
