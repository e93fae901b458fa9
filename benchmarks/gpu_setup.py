"""Shared code of the parts of gpu.py: random checkpoints, requests of given lengths, timing and the GEMM ceiling."""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.gpu_pack import TOKENIZER
from benchmarks.host_path import Texts
from benchmarks.peer_process import CHAT_TEMPLATE
from local_rerank import Reranker, RerankRequest
from local_rerank.bench.shapes import COMMON
from local_rerank.bench.shapes import SHAPES as MODEL_SHAPES
from local_rerank.requests.pair import Pair

Result = dict[str, Any]
_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
).split()
SHAPES: dict[str, dict[str, int]] = {
    name: {size: (COMMON | shape)[size] for size in _SIZES} for name, shape in MODEL_SHAPES.items()
}
SHAPES["tiny"] = dict(zip(_SIZES, (151_669, 64, 192, 3, 4, 2, 16), strict=True))
SHARED_TOKENS, OWN_TOKENS = 85, 215
"""A pair of 300 tokens: the prompt up to the document, with a query of 22 tokens, and the rest."""
DOCUMENTS = 10  # of a request, in parts that say nothing else


def make_checkpoint(folder: Path, shape: str, device: torch.device) -> None:
    """Write random bf16 weights, made on the device, with Qwen's tokenizer."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPES[shape], tie_word_embeddings=True)).to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(qwen_tokenizer(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "README.md").write_text("Random weights for a benchmark of a reranker.\n", encoding="utf-8")


def qwen_tokenizer() -> str:
    """Qwen's tokenizer.json: from the pack, or of the ranks in the dashscope package."""
    if TOKENIZER.is_file():
        return gzip.decompress(TOKENIZER.read_bytes()).decode()
    from tests.tiny_checkpoints import qwen_tokenizer_json

    return qwen_tokenizer_json()


class RandomTexts:
    """Makes requests with given lengths in tokens, of words as frequent as a language's and of unknown names."""

    def __init__(self, folder: Path) -> None:
        self._texts = Texts((folder / "tokenizer.json").read_text(encoding="utf-8"))
        self._random = random.Random(0)

    def request(self, query_tokens: int, document_tokens: Sequence[int]) -> RerankRequest:
        query, *documents = (self._texts.text(self._random, length) for length in (query_tokens, *document_tokens))
        return RerankRequest(query=query, documents=tuple(documents))

    def requests_of_300(self, num_requests: int, reranker: Reranker) -> list[RerankRequest]:
        """Make requests of ten pairs of SHARED_TOKENS + OWN_TOKENS with the model's prompt around the texts."""
        word = RerankRequest(query="water", documents=("water",))
        pair, length = reranker.tokenizer.pairs(word).pairs[0], reranker.tokenizer.count_tokens("water")
        query = SHARED_TOKENS - pair.num_prefix_tokens + length
        document = OWN_TOKENS - pair.num_document_tokens + length
        return [self.request(query, [document] * DOCUMENTS) for _ in range(num_requests)]

    def passages(self, num_documents: int) -> RerankRequest:
        lengths = [max(1, round(self._random.gauss(67, 22))) for _ in range(num_documents)]
        return self.request(15, lengths)


def gemm_flops_per_second(shape: dict[str, int], num_tokens: int, device: torch.device, rounds: int = 5) -> float:
    """Measure the ceiling: bf16 matrix products of a layer's shapes, one after the other."""
    pairs = [
        tuple(torch.randn(size, device=device).bfloat16() for size in ((num_tokens, k), (n, k)))
        for k, n in product_shapes(shape)
    ]
    repeats = 20 if device.type == "cuda" else 1

    def run() -> None:
        for _ in range(repeats):
            for x, weight in pairs:
                torch.nn.functional.linear(x, weight)

    flops = repeats * sum(2.0 * num_tokens * k * n for k, n in product_shapes(shape))
    return flops / min(timed(run, device) for _ in range(rounds))


def product_shapes(shape: dict[str, int]) -> list[tuple[int, int]]:
    """(in_features, out_features) of a layer's products, with those joined that share an input."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    q, kv = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    return [(hidden, q + 2 * kv), (q, hidden), (hidden, 2 * inner), (inner, hidden)]


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


def difference(ours: Sequence[float], exact: Sequence[float]) -> tuple[float, float]:
    """Return the largest and the mean difference of log-odds."""
    gaps = [abs(a - b) for a, b in zip(ours, exact, strict=True)]
    return max(gaps), sum(gaps) / len(gaps)


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


def batch_of_requests(setting: Setting, reranker: Reranker, *, num_batches: int = 1) -> list[RerankRequest]:
    """Make as many requests of ten pairs of 300 tokens as fill a number of batches, at least one for each."""
    num_requests = num_batches * max(1, setting.batch_tokens // (SHARED_TOKENS + DOCUMENTS * OWN_TOKENS))
    return RandomTexts(setting.folder).requests_of_300(num_requests, reranker)


def pairs_of_300(setting: Setting, reranker: Reranker) -> list[Pair]:
    """Fill one batch with requests of ten pairs of 300 tokens."""
    return [
        pair for request in batch_of_requests(setting, reranker) for pair in reranker.tokenizer.pairs(request).pairs
    ]


def run_batches(reranker: Reranker, pairs: list[Pair], number: int) -> None:
    """Run a batch repeatedly, and launch each before fetching the scores of the one before, like a server."""
    engine = reranker.engine
    running = engine.launch(pairs)
    for _ in range(number - 1):
        following = engine.launch(pairs)
        running()
        running = following
    running()
