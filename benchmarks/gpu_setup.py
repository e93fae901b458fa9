"""Shared code of the parts of gpu.py: random checkpoints, requests of a given length, timing and the GEMM ceiling."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.peer_process import CHAT_TEMPLATE
from local_rerank import Reranker, RerankRequest
from local_rerank.bench.shapes import COMMON
from local_rerank.bench.shapes import SHAPES as MODEL_SHAPES
from local_rerank.requests.pair import Pair

ROOT = Path(__file__).parents[1]
Result = dict[str, Any]
_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
).split()
SHAPES: dict[str, dict[str, int]] = {
    name: {size: (COMMON | shape)[size] for size in _SIZES} for name, shape in MODEL_SHAPES.items()
}
SHAPES["tiny"] = dict(zip(_SIZES, (151_669, 64, 192, 3, 4, 2, 16), strict=True))
WORDS = (
    "water river city music history science market energy letter garden winter animal engine planet doctor window "
    "school people number question answer country language building method result system value matter reason"
).split()


def make_checkpoint(folder: Path, shape: str, device: torch.device) -> None:
    """Write random bf16 weights, made on the device, with the built-in model's tokenizer."""
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


class RandomTexts:
    """Makes requests of random words with given lengths in tokens."""

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
        """Make pairs of 300 tokens, of which `prompt_overhead` are neither query nor document."""
        return [self.request(15, [300 - 15 - prompt_overhead] * num_documents) for _ in range(num_requests)]

    def passages(self, num_documents: int) -> RerankRequest:
        lengths = [max(1, round(self._random.gauss(67, 22))) for _ in range(num_documents)]
        return self.request(15, lengths)


def gemm_flops_per_second(shape: dict[str, int], num_tokens: int, device: torch.device, rounds: int = 5) -> float:
    """Measure the ceiling: bf16 matrix products of a layer's shapes, one after the other."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    q, kv = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    sizes = [(hidden, q + 2 * kv), (q, hidden), (hidden, 2 * inner), (inner, hidden)]
    pairs = [tuple(torch.randn(size, device=device).bfloat16() for size in ((num_tokens, k), (n, k))) for k, n in sizes]
    repeats = 20 if device.type == "cuda" else 1

    def run() -> None:
        for _ in range(repeats):
            for x, weight in pairs:
                torch.nn.functional.linear(x, weight)

    flops = repeats * sum(2.0 * num_tokens * k * n for k, n in sizes)
    return flops / min(timed(run, device) for _ in range(rounds))


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds until the device has finished `run`."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def difference(ours: Sequence[float], exact: Sequence[float]) -> dict[str, float]:
    """Compare log-odds with those in fp32."""
    gaps = [abs(a - b) for a, b in zip(ours, exact, strict=True)]
    return {
        "largest_difference": max(gaps),
        "mean_difference": sum(gaps) / len(gaps),
        "spread_of_fp32": max(exact) - min(exact),
    }


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and the size of its loops."""

    folder: Path
    shape: str
    device: torch.device
    quick: bool  # few tokens and rounds, to see that the script runs

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 10

    @property
    def batch_tokens(self) -> int:
        return 1024 if self.quick else 16384


@contextmanager
def loaded(setting: Setting, **options: Any) -> Iterator[Reranker]:
    options = {"dtype": "bf16", "max_batch_tokens": setting.batch_tokens, "max_queued_tokens": 10**7} | options
    with Reranker(str(setting.folder), device=str(setting.device), **options) as reranker:
        yield reranker


def pairs_of_300(setting: Setting, reranker: Reranker) -> list[Pair]:
    """Fill one batch with requests of ten pairs of 300 tokens."""
    texts, overhead = RandomTexts(setting.folder), overhead_of(reranker)
    per_request = overhead + 15 + 10 * (300 - 15 - overhead + len(reranker.tokenizer.suffix_ids))
    num_requests = max(1, setting.batch_tokens // per_request)
    requests = texts.requests_of_300(num_requests, 10, overhead)
    return [pair for request in requests for pair in reranker.tokenizer.pairs(request).pairs]


def overhead_of(reranker: Reranker) -> int:
    """Return the tokens of a prompt that are neither query nor document."""
    return len(reranker.explain("water", "water")[1]) - 2
