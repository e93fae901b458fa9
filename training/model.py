"""A Qwen3 decoder for training, with transformers' parameter names. The prefix of a query is computed once.

The documents of a query share everything up to the document marker. Their tokens attend to the keys and values of that
prefix and to themselves, with positions that continue it, so the scores equal those of separate prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu


@dataclass(frozen=True)
class Shape:
    """The sizes of the decoder."""

    vocabulary: int
    hidden: int = 352
    layers: int = 6
    heads: int = 8
    head: int = 64
    inner: int = 512
    theta: float = 1e20  # makes nearly all rotary pairs slow, so that matching does not depend on distance
    eps: float = 1e-6

    def config(self, pad: int) -> dict[str, Any]:
        """Return the config.json of a Qwen3ForCausalLM."""
        return {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": self.vocabulary,
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads, "head_dim": self.head, "intermediate_size": self.inner,
            "rope_theta": self.theta, "rope_parameters": {"rope_theta": self.theta, "rope_type": "default"},
            "rms_norm_eps": self.eps, "hidden_act": "silu", "max_position_embeddings": 8192,
            "tie_word_embeddings": True, "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False,
            "sliding_window": None, "initializer_range": 0.02, "use_cache": True, "pad_token_id": pad,
            "eos_token_id": pad, "bos_token_id": None, "dtype": "bfloat16",
        }  # fmt: skip


@dataclass
class Batch:
    """Queries with the same number of documents each; ids are right-padded."""

    head_ids: Tensor  # (queries, head tokens)
    head_lengths: Tensor
    tail_ids: Tensor  # (queries * documents, tail tokens)
    tail_lengths: Tensor
    documents: int

    def to(self, device: str) -> Batch:
        """Move the batch to a device."""
        ids = (self.head_ids, self.head_lengths, self.tail_ids, self.tail_lengths)
        return Batch(*(t.to(device) for t in ids), self.documents)


class Nano(nn.Module):
    """Scores documents as the log-odds of "yes" over "no" at the last token."""

    def __init__(self, shape: Shape, yes: int, no: int) -> None:
        super().__init__()
        self.shape, self.yes, self.no = shape, yes, no
        width = shape.heads * shape.head
        sizes = {"self_attn.q_proj": (width, shape.hidden), "self_attn.k_proj": (width, shape.hidden),
                 "self_attn.v_proj": (width, shape.hidden), "self_attn.o_proj": (shape.hidden, width),
                 "self_attn.q_norm": (shape.head,), "self_attn.k_norm": (shape.head,),
                 "input_layernorm": (shape.hidden,), "post_attention_layernorm": (shape.hidden,),
                 "mlp.gate_proj": (shape.inner, shape.hidden), "mlp.up_proj": (shape.inner, shape.hidden),
                 "mlp.down_proj": (shape.hidden, shape.inner)}  # fmt: skip
        weights = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden), "model.norm.weight": (shape.hidden,)}
        weights |= {
            f"model.layers.{i}.{name}.weight": size for i in range(shape.layers) for name, size in sizes.items()
        }
        self.names = {name: name.replace(".", "_") for name in weights}
        for name, size in weights.items():
            self.register_parameter(self.names[name], nn.Parameter(torch.zeros(size)))
        frequencies = shape.theta ** (-torch.arange(0, shape.head, 2, dtype=torch.float64) / shape.head)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def weight(self, name: str) -> Tensor:
        """Return a parameter by its transformers name without ``.weight``."""
        return self.get_parameter(self.names[name + ".weight"])

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMS normalization."""
        return torch.nn.functional.rms_norm(hidden, (hidden.shape[-1],), weight, self.shape.eps)

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """Apply rotary embedding to states (rows, heads, tokens, head)."""
        angles = positions[:, None, :, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        a, b = states.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def project(self, layer: int, part: str, hidden: Tensor, positions: Tensor | None) -> Tensor:
        """Project to queries, keys or values (rows, heads, tokens, head)."""
        states = linear(hidden, self.weight(f"model.layers.{layer}.self_attn.{part}_proj"))
        states = states.view(*hidden.shape[:2], self.shape.heads, self.shape.head)
        if positions is not None:
            states = self.norm(states, self.weight(f"model.layers.{layer}.self_attn.{part}_norm"))
            return self.rotate(states.transpose(1, 2), positions)
        return states.transpose(1, 2)

    def finish(self, layer: int, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Apply the output projection and the MLP of a layer."""
        base = f"model.layers.{layer}."
        mixed = mixed.transpose(1, 2).reshape(*hidden.shape[:2], -1)
        hidden = hidden + linear(mixed, self.weight(base + "self_attn.o_proj"))
        inner = self.norm(hidden, self.weight(base + "post_attention_layernorm"))
        gate, up = linear(inner, self.weight(base + "mlp.gate_proj")), linear(inner, self.weight(base + "mlp.up_proj"))
        return hidden + linear(silu(gate) * up, self.weight(base + "mlp.down_proj"))

    def last_states(self, batch: Batch) -> Tensor:
        """Return the residual stream at each prompt's last token, before the final norm."""
        table = self.weight("model.embed_tokens")
        head, tail = embedding(batch.head_ids, table), embedding(batch.tail_ids, table)
        many, device = batch.documents, batch.head_ids.device
        head_positions = torch.arange(head.shape[1], device=device)[None]
        steps = torch.arange(tail.shape[1], device=device)[None]
        tail_positions = batch.head_lengths.repeat_interleave(many)[:, None] + steps
        seen_head = (head_positions < batch.head_lengths[:, None]).repeat_interleave(many, 0)[:, None, None, :]
        causal = (steps[0][None, :] <= steps[0][:, None])[None, None]
        mask = torch.cat([seen_head.expand(-1, -1, tail.shape[1], -1), causal.expand(tail.shape[0], -1, -1, -1)], -1)
        bias = torch.zeros(mask.shape, dtype=head.dtype, device=device).masked_fill(~mask, float("-inf"))
        last = (batch.tail_lengths - 1)[:, None, None]
        for layer in range(self.shape.layers):
            final = layer == self.shape.layers - 1
            gain = self.weight(f"model.layers.{layer}.input_layernorm")
            head_in, tail_in = self.norm(head, gain), self.norm(tail, gain)
            keys = self.project(layer, "k", head_in, head_positions)
            values = self.project(layer, "v", head_in, None)
            tail_keys = torch.cat(
                [keys.repeat_interleave(many, 0), self.project(layer, "k", tail_in, tail_positions)], 2
            )
            tail_values = torch.cat([values.repeat_interleave(many, 0), self.project(layer, "v", tail_in, None)], 2)
            if final:  # only the last token is read
                tail = tail.gather(1, last.expand(-1, 1, tail.shape[2]))
                tail_in = tail_in.gather(1, last.expand(-1, 1, tail.shape[2]))
                tail_positions = tail_positions.gather(1, last[..., 0])
                bias = bias.gather(2, last[..., None].expand(-1, 1, 1, bias.shape[3]))
            else:
                queries = self.project(layer, "q", head_in, head_positions)
                head = self.finish(layer, head, scaled_dot_product_attention(queries, keys, values, is_causal=True))
            queries = self.project(layer, "q", tail_in, tail_positions)
            mixed = scaled_dot_product_attention(queries, tail_keys, tail_values, attn_mask=bias)
            tail = self.finish(layer, tail, mixed)
        return tail[:, 0]

    def forward(self, batch: Batch) -> Tensor:
        """Return log-odds (queries, documents)."""
        hidden = self.norm(self.last_states(batch), self.weight("model.norm"))
        table = self.weight("model.embed_tokens")
        return (hidden @ (table[self.yes] - table[self.no])).view(-1, batch.documents)

    def save(self, file: Path, dtype: torch.dtype = torch.float32) -> None:
        """Save the weights under transformers' names."""
        state = {
            name: self.get_parameter(own).detach().cpu().to(dtype).contiguous() for name, own in self.names.items()
        }
        save_file(state, file, metadata={"format": "pt"})

    @classmethod
    def load(cls, file: Path, shape: Shape, yes: int, no: int) -> Nano:
        """Load weights written by `save`."""
        model = cls(shape, yes, no)
        for name, value in load_file(file).items():
            model.get_parameter(model.names[name]).data = value.float()
        return model


def collate(heads: list[list[int]], tails: list[list[list[int]]]) -> Batch:
    """Right-pad a batch."""

    def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(r) for r in rows])
        out = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row)
        return out, lengths

    head_ids, head_lengths = pad(heads)
    tail_ids, tail_lengths = pad([tail for group in tails for tail in group])
    return Batch(head_ids, head_lengths, tail_ids, tail_lengths, len(tails[0]))
