"""The residual stream of the compiled decoder, and the weights of a layer as they are written by hand."""

from __future__ import annotations

import math

import numpy as np
from encoder import HEADS, OTHERS, OWN, SEGMENT, SEGMENT_SIZE, SINK, TEMPERATURE, UNITS
from model import Shape
from pieces import CODE
from teach import WIDTH

PART, PARTS = 48, 5  # dimensions and number of the heads that compare means; WIDTH = PART * PARTS
# Slices of the residual stream (semantic, stem code, previous token's code), then single dimensions.
S, L, P = slice(0, WIDTH), slice(WIDTH, WIDTH + CODE), slice(WIDTH + CODE, WIDTH + CODE * 3 // 2)
NAMES = (
    "ONE IDF PAIR PREVIOUS_PAIR IN_QUERY IN_DOCUMENT QUERY_MARK DOCUMENT_MARK FIRST LAST MATCH NEW GAIN SHORT LONG "
    "PEAK QUERY_IDF QUERY_HAN LENGTH HAN SOFT SOFT_SUM SOFT_PEAK RARITY SCORE PAD BIAS"
).split()
D = {name: P.stop + index for index, name in enumerate(NAMES)}
NEAR = range(P.stop + len(NAMES), P.stop + len(NAMES) + PARTS)
FEATURES = [D[n] for n in ("ONE", "QUERY_IDF", "QUERY_HAN", "LENGTH", "SHORT", "LONG", "PEAK", "SOFT_SUM", "SOFT_PEAK")]
FEATURES += list(NEAR)  # inputs of the last MLP
FILLED = 11.5  # squared norm of the lexical half of a row
# Dimensions of a head: rotary pairs 8-31 are slow (codes), pair 7 holds sink and segment, pairs 0-5 are fast.
SLOTS = [*range(8, 32), *range(40, 64)]
WASTE = 6


class Weights:
    """The weights of one layer, set entry by entry."""

    def __init__(self, shape: Shape, before: float, after: float = OTHERS + OWN) -> None:
        """Start with zeros; `before` and `after` are the squared norms that the two RMS norms preserve."""
        self.shape, width = shape, shape.heads * shape.head
        self.q, self.k, self.v = (np.zeros((width, shape.hidden)) for _ in range(3))
        self.o = np.zeros((shape.hidden, width))
        self.gate, self.up = (np.zeros((shape.inner, shape.hidden)) for _ in range(2))
        self.down = np.zeros((shape.hidden, shape.inner))
        self.gain, self.gain_after = (np.full(shape.hidden, math.sqrt(x / shape.hidden)) for x in (before, after))

    def head(self, index: int) -> Head:
        """Return an attention head to fill."""
        return Head(self, index * self.shape.head)

    def encode(self, layer: int, trained: dict[str, np.ndarray]) -> None:
        """Copy the encoder's heads and units of a layer; each token attends only to its own segment."""
        size = self.shape.head
        for index in range(HEADS[layer] if layer < len(HEADS) else 0):
            rows = slice(index * size, (index + 1) * size)
            for matrix, part in ((self.q, "q"), (self.k, "k"), (self.v, "v")):
                matrix[rows, S] = trained[f"{part}{layer}"][rows]
            self.o[S, rows] = trained[f"o{layer}"][:, rows]
            for matrix in (self.q, self.k):
                matrix[[rows.start + SINK, rows.start + SEGMENT]] = 0
                matrix[rows.start + SEGMENT, [D["IN_QUERY"], D["IN_DOCUMENT"]]] = SEGMENT_SIZE, -SEGMENT_SIZE
            self.q[rows.start + SINK, D["LAST"]] = 10 * SEGMENT_SIZE  # excludes the last token
            self.k[rows.start + SINK, D["FIRST"]] = SEGMENT_SIZE
        self.gate[:UNITS, S] = trained[f"gate{layer}"][:, :WIDTH]
        self.gate[:UNITS, D["ONE"]] = trained[f"gate{layer}"][:, WIDTH]
        self.up[:UNITS, S] = trained[f"up{layer}"]
        self.down[S, :UNITS] = trained[f"down{layer}"]

    def unit(self, index: int, gate: dict[int, float], up: dict[int, float], down: dict[int, float]) -> None:
        """Set a gated unit: silu(gate) * up, written to `down`."""
        for matrix, entries in ((self.gate, gate), (self.up, up)):
            for dim, value in entries.items():
                matrix[index, dim] = value
        for dim, value in down.items():
            self.down[dim, index] = value

    def state(self, layer: int) -> dict[str, np.ndarray]:
        """Return the layer's parameters by their names in transformers."""
        base, norm = f"model.layers.{layer}.", np.full(self.shape.head, math.sqrt(TEMPERATURE / 8))
        return {f"{base}self_attn.q_proj.weight": self.q, f"{base}self_attn.k_proj.weight": self.k,
                f"{base}self_attn.v_proj.weight": self.v, f"{base}self_attn.o_proj.weight": self.o,
                f"{base}self_attn.q_norm.weight": norm, f"{base}self_attn.k_norm.weight": norm,
                f"{base}input_layernorm.weight": self.gain, f"{base}post_attention_layernorm.weight": self.gain_after,
                f"{base}mlp.gate_proj.weight": self.gate, f"{base}mlp.up_proj.weight": self.up,
                f"{base}mlp.down_proj.weight": self.down}  # fmt: skip


class Head:
    """The weights of one attention head; `dim` counts within the head."""

    def __init__(self, weights: Weights, start: int) -> None:
        self.weights, self.start = weights, start
        self.values = 0

    def query(self, dim: int, source: int, value: float) -> None:
        """Let query dimension `dim` read residual dimension `source`."""
        self.weights.q[self.start + dim, source] += value

    def key(self, dim: int, source: int, value: float = 1.0) -> None:
        """Let key dimension `dim` read residual dimension `source`."""
        self.weights.k[self.start + dim, source] += value

    def carry(self, source: int, target: int, value: float = 1.0) -> None:
        """Move residual `source` of the attended tokens to residual `target`."""
        self.weights.v[self.start + self.values, source] = 1
        self.weights.o[target, self.start + self.values] = value
        self.values += 1

    def norm(self, parts: list[float], source: int) -> None:
        """Extend the query to unit length in a dimension that no key uses, which fixes its temperature."""
        self.query(WASTE, source, math.sqrt(max(0.0, 1 - sum(p * p for p in parts))))
