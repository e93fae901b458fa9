"""How much faster is a packed, prefix-shared batch than the model card's padded code?

Random weights in the shape of Qwen3-Reranker-0.6B, the same pairs through both, in turn (A B A B ...), on the CPU:

    python benchmarks/packed_vs_card.py --dtype bf16 --workload passages --rounds 3

The last line fits docs/log.md: medians, their ratio, and the largest difference in log-odds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from local_rerank.attention import KERNELS, choose_kernel
from local_rerank.engine import Engine, _register_attention
from local_rerank.models import ATTENTION_NAME
from local_rerank.packing import pack
from local_rerank.tokenization import Pair

# (query tokens, documents, mean document tokens); 76 tokens of a prompt are the same for every pair of a request
WORKLOADS = {"titles": (7, 64, 11), "passages": (15, 32, 67), "chunks": (14, 12, 345)}
NUM_FIXED_PREFIX_TOKENS, NUM_SUFFIX_TOKENS = 67, 9
CARD_BATCH = 8
SHAPE = {
    "vocab_size": 151_669, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
YES, NO = 9693, 2152


def make_pairs(workload: str, seed: int = 0) -> list[Pair]:
    """Pairs of one request, document lengths spread by a third around the mean."""
    generator = random.Random(seed)
    query, documents, mean = WORKLOADS[workload]
    prefix = tuple(generator.choices(range(1000, 100_000), k=NUM_FIXED_PREFIX_TOKENS + query))
    lengths = [max(1, round(generator.gauss(mean, mean / 3))) for _ in range(documents)]
    return [Pair(prefix, tuple(generator.choices(range(1000, 100_000), k=n + NUM_SUFFIX_TOKENS))) for n in lengths]


@torch.inference_mode()
def card_log_odds(model: torch.nn.Module, pairs: list[Pair]) -> torch.Tensor:
    """The model card's way: batches of 8, left padding, all logits of the last position."""
    odds = []
    for start in range(0, len(pairs), CARD_BATCH):
        prompts = [[*pair.prefix_ids, *pair.document_ids] for pair in pairs[start : start + CARD_BATCH]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -1].float()
        odds.append(logits[:, YES] - logits[:, NO])
    return torch.cat(odds)


def seconds(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="passages")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer for a quick look")
    options = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    pairs = make_pairs(options.workload)

    torch.manual_seed(0)
    _register_attention()
    config = Qwen3Config(**(SHAPE | {"num_hidden_layers": options.layers}))
    with tempfile.TemporaryDirectory() as folder:
        Qwen3ForCausalLM(config).to(dtype).save_pretrained(Path(folder))
        card = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION_NAME).eval()
    head = ours.get_output_embeddings().weight.detach()[[NO, YES]].float()
    kernel, _ = choose_kernel("auto", torch.device("cpu"), dtype)
    engine = Engine(ours, head, kernel=KERNELS[kernel], device=torch.device("cpu"))

    times: dict[str, list[float]] = {"card": [], "packed": []}
    for _ in range(options.rounds):
        card_seconds, expected = seconds(lambda: card_log_odds(card, pairs))
        packed_seconds, packed = seconds(lambda: engine.forward(pack(pairs)))
        times["card"].append(card_seconds)
        times["packed"].append(packed_seconds)
        print(f"card {card_seconds:.2f} s, packed {packed_seconds:.2f} s", flush=True)
    a, b = (statistics.median(times[name]) for name in ("card", "packed"))
    print(
        f"{options.workload}, {options.dtype}, {options.layers} layers, {torch.get_num_threads()} threads: "
        f"card {a:.2f} s, packed {b:.2f} s, {a / b:.2f}x; "
        f"log-odds differ by at most {float((expected - packed).abs().max()):.3g}"
    )


if __name__ == "__main__":
    main()
