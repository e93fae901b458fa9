"""What the parts of gpu.py share: a checkpoint of random weights, requests of a given length, clocks and operations."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from local_rerank import RerankRequest

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, dict[str, int]] = {
    "qwen3-reranker-0.6b": {
        "vocab_size": 151_669, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
    "qwen3-reranker-4b": {
        "vocab_size": 151_669, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 151_669, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    },
}  # fmt: skip
WORDS = (
    "water river city music history science market energy letter garden winter animal engine planet doctor window "
    "school people number question answer country language building method result system value matter reason"
).split()
CHAT_TEMPLATE = (
    "{%- set t = namespace(query='', document='') -%}{%- for m in messages -%}"
    "{%- if m.role == 'query' -%}{%- set t.query = m.content -%}"
    "{%- elif m.role == 'document' -%}{%- set t.document = m.content -%}{%- endif -%}{%- endfor -%}"
    "{{- t.query + ' ' + t.document -}}"
)
"""For sentence-transformers: the query carries the whole prompt up to the document, the document the suffix."""


def make_checkpoint(folder: Path, shape: str, device: torch.device) -> None:
    """Random bf16 weights with the built-in model's tokenizer, which the shape's vocabulary contains."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPES[shape], tie_word_embeddings=True)).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer = (ROOT / "local_rerank" / "nano" / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "README.md").write_text("Random weights for a benchmark of a reranker.\n", encoding="utf-8")


class Texts:
    """Requests of random words, as long as asked for in the tokens of the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._random = random.Random(0)

    def text(self, num_tokens: int) -> str:
        words = " ".join(self._random.choices(WORDS, k=2 * num_tokens + 8))
        encoding = self._tokenizer.encode(words, add_special_tokens=False)
        return words[: encoding.offsets[num_tokens - 1][1]]

    def request(self, query_tokens: int, document_tokens: Sequence[int]) -> RerankRequest:
        return RerankRequest(
            query=self.text(query_tokens), documents=tuple(self.text(length) for length in document_tokens)
        )

    def requests_of_300(self, num_requests: int, num_documents: int, prompt_overhead: int) -> list[RerankRequest]:
        """Every pair's whole prompt has 300 tokens; `prompt_overhead`: all of it but query and document."""
        return [self.request(15, [300 - 15 - prompt_overhead] * num_documents) for _ in range(num_requests)]

    def passages(self, num_documents: int) -> RerankRequest:
        lengths = [max(1, round(self._random.gauss(67, 22))) for _ in range(num_documents)]
        return self.request(15, lengths)


def gemm_flops_per_second(shape: dict[str, int], num_tokens: int, device: torch.device, rounds: int = 5) -> float:
    """What bf16 matrix products of a layer's shapes reach, all of them one after the other: the ceiling."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    q, kv = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    sizes = [(hidden, q + 2 * kv), (q, hidden), (hidden, 2 * inner), (inner, hidden)]
    pairs = [tuple(torch.randn(size, device=device).bfloat16() for size in ((num_tokens, k), (n, k))) for k, n in sizes]

    def run() -> None:
        for x, weight in pairs:
            torch.nn.functional.linear(x, weight)

    flops = sum(2.0 * num_tokens * k * n for k, n in sizes)
    repeats = 20 if device.type == "cuda" else 1

    def repeated() -> None:
        for _ in range(repeats):
            run()

    return repeats * flops / min(timed(repeated, device) for _ in range(rounds))


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has done what `run` asks of it."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent of the values do not pass."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def difference(ours: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Log-odds beside those of fp32."""
    return {
        "largest_difference": float((ours - exact).abs().max()),
        "mean_difference": float((ours - exact).abs().mean()),
        "spread_of_fp32": float(exact.max() - exact.min()),
    }
