"""The parts of gpu.py: each measures one thing and returns what goes into the file of results."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_setup import (
    SHAPES,
    Texts,
    difference,
    gemm_flops_per_second,
    median,
    percentile,
    timed,
    useful_flops,
)
from local_rerank import Reranker, RerankRequest
from local_rerank.attention import KERNELS, is_installed
from local_rerank.errors import ConfigError, OutOfMemory
from local_rerank.packing import pack
from local_rerank.tokenization import Pair

Result = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where a part runs and how long its loops may be."""

    folder: Path
    shape: str
    device: torch.device
    quick: bool  # to see that it runs: a few tokens, one round

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
    """One batch of the budget: requests of ten pairs, each pair's prompt 300 tokens long."""
    texts, overhead = Texts(setting.folder), overhead_of(reranker)
    per_request = overhead + 15 + 10 * (300 - 15 - overhead + len(reranker.tokenizer.suffix_ids))
    num_requests = max(1, setting.batch_tokens // per_request)
    requests = texts.requests_of_300(num_requests, 10, overhead)
    return [pair for request in requests for pair in reranker.tokenizer.pairs(request).pairs]


def overhead_of(reranker: Reranker) -> int:
    """Tokens of a prompt beside query and document."""
    return len(reranker.explain("water", "water")[1]) - 2


def passages(setting: Setting, reranker: Reranker, num_documents: int) -> list[Pair]:
    return list(reranker.tokenizer.pairs(Texts(setting.folder).passages(num_documents)).pairs)


def seconds_of(setting: Setting, reranker: Reranker, pairs: list[Pair]) -> float:
    """Median of a whole pass, packing on the host and fetching the scores included."""
    for _ in range(3):  # compile, capture, warm up
        reranker._engine.forward(pack(pairs))
    return median([timed(lambda: reranker._engine.forward(pack(pairs)), setting.device) for _ in range(setting.rounds)])


def exact_log_odds(setting: Setting, pairs: list[Pair]) -> torch.Tensor:
    """The same weights in fp32 through SDPA on the same device."""
    with loaded(setting, dtype="fp32", attention="sdpa") as reranker:
        return reranker._engine.forward(pack(pairs))


def throughput(setting: Setting) -> Result:
    """Useful operations per second on 300-token pairs, and the ceiling, in turn."""
    shape = SHAPES[setting.shape]
    with loaded(setting) as reranker:
        pairs = pairs_of_300(setting, reranker)
        flops = useful_flops(shape, pairs)
        seconds_of(setting, reranker, pairs)
        rates, ceilings = [], []
        for _ in range(setting.rounds):
            ceilings.append(gemm_flops_per_second(shape, setting.batch_tokens, setting.device, rounds=2))
            rates.append(flops / timed(lambda: reranker._engine.forward(pack(pairs)), setting.device))
        ours = reranker._engine.forward(pack(pairs))
        info = reranker.info
    share = median([rate / ceiling for rate, ceiling in zip(rates, ceilings, strict=True)])
    return {
        "num_pairs": len(pairs),
        "kernel": info.kernel,
        "gemm_ceiling_tflops": median(ceilings) / 1e12,
        "useful_tflops": median(rates) / 1e12,
        "share_of_ceiling": share,
        "pairs_per_second": len(pairs) * median(rates) / flops,
        "load_seconds": info.load_seconds,
        **difference(ours, exact_log_odds(setting, pairs)),
    }


def variants(setting: Setting) -> Result:
    """Each attention row, and layers that are not compiled: time of a batch, difference to fp32."""
    rows = [
        name
        for name, row in KERNELS.items()
        if setting.device.type in row.device_types
        and torch.bfloat16 in row.dtypes
        and is_installed(row)
        and name != "dense"
    ]
    cases: dict[str, dict[str, Any]] = {f"attention {name}": {"attention": name} for name in rows}
    if setting.device.type == "cuda":
        cases["layers not compiled"] = {"no_compile": True}
    results: Result = {"not_installed": [name for name, row in KERNELS.items() if not is_installed(row)]}
    exact: dict[str, torch.Tensor] = {}
    for case, options in cases.items():
        try:
            with loaded(setting, **options) as reranker:
                loads = {"chunks": pairs_of_300(setting, reranker), "passages": passages(setting, reranker, 150)}
                results[case] = {}
                for load, pairs in loads.items():
                    if load not in exact:
                        exact[load] = exact_log_odds(setting, pairs)
                    results[case][f"{load}_ms"] = 1e3 * seconds_of(setting, reranker, pairs)
                    results[case][load] = difference(reranker._engine.forward(pack(pairs)), exact[load])
        except Exception as error:  # the other rows are measured all the same
            results[case] = {"failed": f"{type(error).__name__}: {error}"}
    return results


def serving(setting: Setting) -> Result:
    """Clients that ask one after the other, ten documents at 300 tokens a pair: pairs per second and latency."""
    results: Result = {}
    with loaded(setting) as reranker:
        texts = Texts(setting.folder)
        requests = texts.requests_of_300(4 if setting.quick else 128, 10, overhead_of(reranker))
        list(reranker.rank_batch(requests[:8]))  # compile and warm up
        for num_clients in (2,) if setting.quick else (1, 8, 16, 32, 64):
            results[f"{num_clients} clients"] = _closed_loop(
                reranker, requests, num_clients, seconds=1 if setting.quick else 6
            )
    return results


def _closed_loop(reranker: Reranker, requests: list[RerankRequest], num_clients: int, *, seconds: float) -> Result:
    latencies: list[float] = []
    start = time.perf_counter()
    end = start + seconds

    def ask(client: int) -> None:
        number = client
        while time.perf_counter() < end:
            before = time.perf_counter()
            reranker.submit(requests[number % len(requests)]).result()
            latencies.append(time.perf_counter() - before)
            number += num_clients

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    return {
        "pairs_per_second": 10 * len(latencies) / elapsed,
        "num_requests": len(latencies),
        "p50_ms": 1e3 * percentile(latencies, 50),
        "p99_ms": 1e3 * percentile(latencies, 99),
    }


def latency(setting: Setting) -> Result:
    """Ten passages in one request, from text to scores, with graphs and without."""
    results: Result = {}
    request = Texts(setting.folder).passages(10)
    cases: dict[str, dict[str, Any]] = {"default": {}}
    if setting.device.type == "cuda":
        cases |= {
            "no graphs": {"no_cuda_graphs": True},
            "no graphs, not compiled": {"no_cuda_graphs": True, "no_compile": True},
        }
    for case, options in cases.items():
        with loaded(setting, **options) as reranker:
            for _ in range(5):
                reranker.rank(request.query, request.documents)
            taken = []
            for _ in range(5 if setting.quick else 200):
                start = time.perf_counter()
                reranker.rank(request.query, request.documents)
                taken.append(time.perf_counter() - start)
            graphs = reranker._engine._graphs
            results[case] = {
                "p50_ms": 1e3 * percentile(taken, 50),
                "p99_ms": 1e3 * percentile(taken, 99),
                "num_graphs": 0 if graphs is None else graphs.num_graphs,
            }
    return results


def peer(setting: Setting) -> Result:
    """Passages through sentence-transformers' CrossEncoder and through ours, in turn, on the same device."""
    import sentence_transformers

    batch_sizes = (8,) if setting.quick else (32, 128)
    model = sentence_transformers.CrossEncoder(
        str(setting.folder), device=str(setting.device), max_length=8192, local_files_only=True,
        model_kwargs={"dtype": torch.bfloat16}, activation_fn=torch.nn.Identity(),
    )  # fmt: skip
    with loaded(setting) as reranker:
        request = Texts(setting.folder).passages(8 if setting.quick else 320)
        template = reranker.checkpoint.template
        shared = template.prefix + template.shared_body(reranker.config.instruction, request.query)
        texts = [(shared, document + template.suffix) for document in request.documents]
        ours: list[float] = []
        theirs: dict[int, list[float]] = {size: [] for size in batch_sizes}
        for number in range(1 + (1 if setting.quick else 5)):  # the first round warms up
            taken = timed(lambda: reranker.rank(request.query, request.documents), setting.device)
            their = {
                size: timed(
                    lambda size=size: model.predict(texts, batch_size=size, show_progress_bar=False), setting.device
                )
                for size in batch_sizes
            }
            if number:
                ours.append(taken)
                for size, seconds in their.items():
                    theirs[size].append(seconds)
        scores = (
            torch.tensor(model.predict(texts, batch_size=batch_sizes[0], show_progress_bar=False)).float().flatten()
        )
        result = reranker.rank(request.query, request.documents)
    log_odds = torch.tensor([item.log_odds for item in sorted(result, key=lambda item: item.index)])
    best = min(batch_sizes, key=lambda size: median(theirs[size]))
    return {
        "version": sentence_transformers.__version__,
        "num_passages": len(texts),
        "ours_seconds": median(ours),
        "theirs_seconds": {str(size): median(taken) for size, taken in theirs.items()},
        "best_batch_size": best,
        "ratio": median(theirs[best]) / median(ours),
        "largest_difference": float((scores - log_odds).abs().max()),
    }


def fp8(setting: Setting) -> Result:
    """bf16 and fp8 on 300-token pairs, on this shape and the difference in log-odds between them."""
    results: Result = {}
    exact: torch.Tensor | None = None
    for dtype in ("bf16", "fp8"):
        try:
            with loaded(setting, dtype=dtype) as reranker:
                pairs = pairs_of_300(setting, reranker)
                taken = seconds_of(setting, reranker, pairs)
                odds = reranker._engine.forward(pack(pairs))
        except ConfigError as error:
            return {"not_here": str(error)}
        results[f"{dtype}_pairs_per_second"] = len(pairs) / taken
        if exact is None:
            exact = odds
        else:
            results |= {f"to_bf16_{name}": value for name, value in difference(odds, exact).items()}
    return results | {"speedup": results["fp8_pairs_per_second"] / results["bf16_pairs_per_second"]}


def memory(setting: Setting) -> Result:
    """The fitted budget, the peak of a full batch beside the estimate, and a batch that cannot fit."""
    if setting.device.type != "cuda":
        return {"not_here": "the CPU's budget is fixed"}
    from transformers import Qwen3Config

    from local_rerank.memory import LayerShape, bytes_per_token

    with loaded(setting, max_batch_tokens=None) as reranker:
        pairs = pairs_of_300(setting, reranker)
        engine, batch = reranker._engine, pack(pairs)
        engine.forward(batch)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.forward(batch)
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.set_per_process_memory_fraction(0.05)
        try:
            engine.forward(pack(pairs * 40))
            refused = "nothing: it fitted"
        except OutOfMemory as error:
            refused = str(error)
        torch.cuda.set_per_process_memory_fraction(1.0)
        engine.forward(batch)
        budget = reranker.info.max_batch_tokens
    estimate = bytes_per_token(LayerShape.of(Qwen3Config(**SHAPES[setting.shape])), 2)
    return {
        "max_batch_tokens": budget,
        "peak_bytes_per_token": peak / batch.num_tokens,
        "estimated_bytes_per_token": estimate,
        "peak_bytes": peak,
        "too_large_a_batch": refused,
    }


PARTS: dict[str, tuple[Callable[[Setting], Result], int]] = {
    "throughput": (throughput, 90),
    "serving": (serving, 75),
    "latency": (latency, 75),
    "peer": (peer, 75),
    "variants": (variants, 120),
    "memory": (memory, 45),
    "fp8": (fp8, 100),
}
"""In order of importance, with the seconds that each may take."""
