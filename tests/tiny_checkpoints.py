"""Makes checkpoints for tests: random weights in the real architectures, byte tokenizers, and Qwen's own tokenizer.

`byte_tokenizer_json` has a token for each byte, "yes", "no" and Qwen's control tokens. `qwen_tokenizer_json` is built
from the ranks in the dashscope package.
"""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification
from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    from local_rerank import Reranker

CONTROL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
]  # fmt: skip
"""Ids 151643 to 151668 of Qwen3's tokenizer; those without bars are not flagged special there."""
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    tied: bool = True,
    num_labels: int | None = None,
    tokenizer_json: str | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **shape: Any,
) -> Path:
    """Write a random Qwen3 checkpoint; `num_labels` makes it a sequence-classification conversion."""
    torch.manual_seed(seed)
    tokenizer_json = tokenizer_json or byte_tokenizer_json()
    config = Qwen3Config(
        vocab_size=Tokenizer.from_str(tokenizer_json).get_vocab_size(),
        hidden_size=shape.get("hidden_size", 64),
        intermediate_size=shape.get("intermediate_size", 96),
        num_hidden_layers=shape.get("num_hidden_layers", 2),
        num_attention_heads=shape.get("num_attention_heads", 4),
        num_key_value_heads=shape.get("num_key_value_heads", 2),
        head_dim=shape.get("head_dim", 16),
        max_position_embeddings=shape.get("max_position_embeddings", 8192),
        tie_word_embeddings=tied,
        attention_bias=shape.get("attention_bias", False),
        initializer_range=0.3,  # large, so that log-odds differ by much more than any tolerance
        **({} if num_labels is None else {"num_labels": num_labels}),
    )
    model = (Qwen3ForCausalLM if num_labels is None else Qwen3ForSequenceClassification)(config)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "README.md").write_text("A random reranker for tests.\n", encoding="utf-8")
    return folder


def byte_tokenizer_json() -> str:
    """A token for each byte, "yes" and "no", then Qwen's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("y", "e"), ("ye", "s"), ("n", "o")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    return _bpe_json(vocabulary, merges, Regex(r"[^\S\n]?\w+|\s|[^\w\s]+"))


@cache
def qwen_tokenizer_json() -> str:
    """Exactly Qwen3's tokenizer: ranks from the dashscope package, NFC, Qwen's split and added tokens."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None
    assert spec.origin is not None
    lines = (Path(spec.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    to_char: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]  # GPT-2's characters for bytes
    vocabulary = {"".join(to_char[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            first, second = _last_merge(token, rank, ranks)
            merges.append(("".join(to_char[b] for b in first), "".join(to_char[b] for b in second)))
    return _bpe_json(vocabulary, merges, Regex(QWEN_SPLIT))


def _bpe_json(vocabulary: dict[str, int], merges: list[tuple[str, str]], split: Regex) -> str:
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special="|" in token, normalized=False) for token in CONTROL_TOKENS])
    return str(json.dumps(json.loads(tokenizer.to_str())))


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that remain when byte-pair encoding merges only tokens of lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        best = min(range(len(pair_ranks)), key=pair_ranks.__getitem__)
        assert pair_ranks[best] < rank
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def calibration_file(reranker: Reranker, folder: Path, **changes: Any) -> Path:
    """A calibration that fits this reranker, but for the changes."""
    own = {"version": 1, "model": reranker.model_id, "instruction": reranker.instruction}
    own |= {"recipe": reranker.recipe, "method": "platt", "slope": 0.5, "intercept": -1.0}
    file = folder / "calibration.json"
    file.write_text(json.dumps(own | changes))
    return file
