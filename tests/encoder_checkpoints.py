"""Tiny random encoders in the real architectures, and their scores by transformers as sentence-transformers asks it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz,?é中"
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # large, so that log-odds differ by much more than any tolerance
}
OF: dict[str, dict[str, Any]] = {
    "Bert": {},
    "XLMRoberta": {"type_vocab_size": 1, "max_position_embeddings": 514, "pad_token_id": 1},
    "ModernBert": {"local_attention": 20, "global_attn_every_n_layers": 2, "initializer_cutoff_factor": 3.0},
}


def tokenizer_of(kind: str) -> Tokenizer:
    """A token for each letter, joined as the family joins a pair: with types, doubled separators, or neither."""
    if kind == "XLMRoberta":
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        vocabulary = [(text, 0.0) for text in special] + [(text, -3.0) for text in ("▁", *LETTERS, "the", "▁a")]
        tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        pieces = [*special, *LETTERS, *("##" + letter for letter in LETTERS), "the"]
        model = models.WordPiece({text: i for i, text in enumerate(pieces)}, unk_token="[UNK]")
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        first, second = ("0", "1") if kind == "Bert" else ("0", "0")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair=f"[CLS]:0 $A:{first} [SEP]:0 $B:{second} [SEP]:{second}",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    tokenizer.add_special_tokens(special)
    return tokenizer


def make_encoder(folder: Path, kind: str, *, activation: str | None = None, seed: int = 0, **changes: Any) -> Path:
    """Write a random checkpoint of `{kind}ForSequenceClassification`."""
    torch.manual_seed(seed)
    tokenizer = tokenizer_of(kind)
    shape = {"num_labels": 1, "pad_token_id": 0, "vocab_size": tokenizer.get_vocab_size(), **SHAPE, **OF[kind]}
    config = getattr(transformers, f"{kind}Config")(**shape | changes)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    for parameter in model.parameters():  # biases and norms start as 0 and 1
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored["sentence_transformers"] = {"version": "5"} | ({} if activation is None else {"activation_fn": activation})
    (folder / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    return folder


class DenseEncoder:
    """A checkpoint as `CrossEncoder.predict` runs it: pairs padded to the longest, an attention mask, fp32."""

    def __init__(self, folder: Path) -> None:
        kind = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.model = kind.eval()
        file = str(folder / "tokenizer.json")
        padding = "<pad>" if self.model.config.pad_token_id else "[PAD]"
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, pad_token=padding)

    @torch.inference_mode()
    def logits(self, query: str, documents: Sequence[str]) -> torch.Tensor:
        """(num_documents, num_labels) fp32."""
        inputs = self.tokenizer(
            [query] * len(documents), list(documents), padding=True, return_tensors="pt", return_token_type_ids=True
        )
        if self.model.config.model_type == "modernbert":
            del inputs["token_type_ids"]
        logits: torch.Tensor = self.model(**inputs).logits
        return logits
