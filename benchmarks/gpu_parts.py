"""The parts of gpu.py that run the whole engine; each measures one thing and returns its results."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_kernels import attention, tuning
from benchmarks.gpu_setup import (
    SHAPES,
    RandomTexts,
    Result,
    Setting,
    difference,
    gemm_flops_per_second,
    loaded,
    overhead_of,
    pairs_of_300,
    timed,
)
from local_rerank import Reranker, RerankRequest
from local_rerank.bench.flops import DecoderShape, useful_flops
from local_rerank.bench.measure import percentile
from local_rerank.engine.packing import pack
from local_rerank.errors import ConfigError, OutOfMemory
from local_rerank.requests.pair import Pair, num_batch_tokens

BATCHES = 8  # per round, launched one after the other


def seconds_of(setting: Setting, reranker: Reranker, pairs: list[Pair]) -> float:
    """Return the median time of a pass, including packing and fetching the scores."""
    for _ in range(3):  # compile, capture, warm up
        reranker.engine.score(pairs)
    return median([timed(lambda: reranker.engine.score(pairs), setting.device) for _ in range(setting.rounds)])


def run_batches(reranker: Reranker, pairs: list[Pair], number: int) -> None:
    """Run a batch repeatedly, and launch each before fetching the scores of the one before, like a server."""
    engine = reranker.engine
    running = engine.launch(pairs)
    for _ in range(number - 1):
        following = engine.launch(pairs)
        running()
        running = following
    running()


def throughput(setting: Setting) -> Result:
    """Measure useful operations per second on 300-token pairs and the ceiling, in alternation."""
    shape = SHAPES[setting.shape]
    with loaded(setting) as reranker:
        pairs = pairs_of_300(setting, reranker)
        flops = useful_flops(DecoderShape.from_config(shape), pairs)
        seconds_of(setting, reranker, pairs)
        rates, ceilings = [], []
        for _ in range(setting.rounds):
            ceilings.append(gemm_flops_per_second(shape, setting.batch_tokens, setting.device, rounds=2))
            taken = timed(lambda: run_batches(reranker, pairs, BATCHES), setting.device)
            rates.append(BATCHES * flops / taken)
        ours = reranker.engine.score(pairs)
        info = reranker.info
    with loaded(setting, dtype="fp32", attention="sdpa") as reference:
        exact = reference.engine.score(pairs)
    share = median([rate / ceiling for rate, ceiling in zip(rates, ceilings, strict=True)])
    return {
        "num_pairs": len(pairs),
        "kernel": info.kernel,
        "gemm_ceiling_tflops": median(ceilings) / 1e12,
        "useful_tflops": median(rates) / 1e12,
        "share_of_ceiling": share,
        "pairs_per_second": len(pairs) * median(rates) / flops,
        "load_seconds": info.load_seconds,
        **difference(ours, exact),
    }


def breakdown(setting: Setting) -> Result:
    """Measure where a batch spends its time: packing, launching, and the device's kernels by kind."""
    with loaded(setting) as reranker:
        pairs, engine = pairs_of_300(setting, reranker), reranker.engine
        whole = seconds_of(setting, reranker, pairs)
        packing, launching = [], []
        for _ in range(setting.rounds):
            start = time.perf_counter()
            pack(pairs)
            packing.append(time.perf_counter() - start)
            start = time.perf_counter()
            fetch = engine.launch(pairs)  # packs, too
            launching.append(time.perf_counter() - start - packing[-1])
            fetch()
        with torch.profiler.profile() as profile:
            for _ in range(3):
                engine.score(pairs)
    kernels: dict[str, float] = {}
    for event in profile.key_averages():
        if event.self_device_time_total and event.device_type != torch.autograd.DeviceType.CPU:
            kernels[event.key[:60]] = kernels.get(event.key[:60], 0.0) + event.self_device_time_total / 3e3
    kinds = dict.fromkeys(("products", "attention", "other"), 0.0)
    for name, milliseconds in kernels.items():
        is_product = any(part in name.lower() for part in ("gemm", "nvjet", "cutlass", "cublas"))
        kinds[
            "attention" if "flash" in name.lower() or "attend" in name else "products" if is_product else "other"
        ] += milliseconds
    return {
        "batch_ms": 1e3 * whole,
        "packing_ms": 1e3 * median(packing),
        "launching_ms": 1e3 * median(launching),
        **{f"{kind}_ms": round(milliseconds, 3) for kind, milliseconds in kinds.items()},
        "kernels_ms": {
            name: round(milliseconds, 3)
            for name, milliseconds in sorted(kernels.items(), key=lambda item: -item[1])[:18]
        },
    }


def serving(setting: Setting) -> Result:
    """Measure throughput and latency of closed-loop clients with ten documents of 300 tokens per pair."""
    results: Result = {}
    with loaded(setting) as reranker:
        texts = RandomTexts(setting.folder)
        requests = texts.requests_of_300(4 if setting.quick else 128, 10, overhead_of(reranker))
        for num_clients in (2,) if setting.quick else (1, 8, 16, 32, 64):
            _closed_loop(reranker, requests, num_clients, seconds=1 if setting.quick else 2)  # warm-up
            seconds = 1 if setting.quick else 5
            results[f"{num_clients} clients"] = _closed_loop(reranker, requests, num_clients, seconds=seconds)
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
        "p50_ms": 1e3 * percentile(sorted(latencies), 50),
        "p99_ms": 1e3 * percentile(sorted(latencies), 99),
    }


def latency(setting: Setting) -> Result:
    """Measure the latency of a request with ten passages, with and without CUDA graphs."""
    results: Result = {}
    request = RandomTexts(setting.folder).passages(10)
    cases: dict[str, dict[str, Any]] = {"default": {}}
    if setting.device.type == "cuda":
        cases |= {
            "no graphs": {"no_cuda_graphs": True},
            "transformers' own layers": {"no_compile": True},
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
            graphs = reranker.engine.graphs
            results[case] = {
                "p50_ms": 1e3 * percentile(sorted(taken), 50),
                "p99_ms": 1e3 * percentile(sorted(taken), 99),
                "num_graphs": 0 if graphs is None else len(graphs.sizes),
            }
    return results


def peer(setting: Setting) -> Result:
    """Compare with sentence-transformers' CrossEncoder on passages, in alternation on the same device."""
    import sentence_transformers

    batch_sizes = (8,) if setting.quick else (32, 128)
    model = sentence_transformers.CrossEncoder(
        str(setting.folder), device=str(setting.device), max_length=8192, local_files_only=True,
        model_kwargs={"dtype": torch.bfloat16}, activation_fn=torch.nn.Identity(),
    )  # fmt: skip
    with loaded(setting) as reranker:
        request = RandomTexts(setting.folder).passages(8 if setting.quick else 320)
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
    """Compare bf16 and fp8 on 300-token pairs: throughput and log-odds."""
    results: Result = {}
    exact: list[float] | None = None
    for dtype in ("bf16", "fp8"):
        try:
            with loaded(setting, dtype=dtype) as reranker:
                pairs = pairs_of_300(setting, reranker)
                taken = seconds_of(setting, reranker, pairs)
                odds = reranker.engine.score(pairs)
        except ConfigError as error:
            return {"not_here": str(error)}
        results[f"{dtype}_pairs_per_second"] = len(pairs) / taken
        if exact is None:
            exact = odds
        else:
            results |= {f"to_bf16_{name}": value for name, value in difference(odds, exact).items()}
    return results | {"speedup": results["fp8_pairs_per_second"] / results["bf16_pairs_per_second"]}


def memory(setting: Setting) -> Result:
    """Measure the token budget, the peak of a full batch and its estimate, the memory of graphs, and an OOM."""
    if setting.device.type != "cuda":
        return {"not_here": "the CPU's budget is fixed"}
    from transformers import Qwen3Config

    from local_rerank.engine.out_of_memory import LayerShape, bytes_per_token, release_cached

    with loaded(setting, max_batch_tokens=None) as reranker:
        pairs = pairs_of_300(setting, reranker)
        budget, with_graphs = reranker.info.max_batch_tokens, reranker.engine
        engine = with_graphs.with_kernel(with_graphs.kernel)
        engine.score(pairs)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.score(pairs)
        peak = torch.cuda.max_memory_allocated() - before
        assert with_graphs.graphs is not None
        with_graphs.graphs.forget_all()  # those of the start
        release_cached()
        before = torch.cuda.memory_reserved()
        with_graphs.capture_graphs()
        release_cached()
        held_by_graphs = torch.cuda.memory_reserved() - before
        torch.cuda.set_per_process_memory_fraction(0.05)
        try:
            with_graphs.score(pairs * 40)
            refused = "nothing: it fitted"
        except OutOfMemory as error:
            refused = str(error)
        torch.cuda.set_per_process_memory_fraction(1.0)
        with_graphs.score(pairs)
    estimate = bytes_per_token(LayerShape.of(Qwen3Config(**SHAPES[setting.shape])), 2)
    return {
        "max_batch_tokens": budget,
        "peak_bytes_per_token": peak / num_batch_tokens(pairs),
        "estimated_bytes_per_token": estimate,
        "peak_bytes": peak,
        "bytes_held_by_graphs": held_by_graphs,
        "too_large_a_batch": refused,
    }


PARTS: dict[str, tuple[Callable[[Setting], Result], int]] = {
    "throughput": (throughput, 90),
    "breakdown": (breakdown, 60),
    "serving": (serving, 75),
    "latency": (latency, 75),
    "peer": (peer, 75),
    "attention": (attention, 60),
    "memory": (memory, 45),
    "fp8": (fp8, 100),
    "tuning": (tuning, 100),
}
"""In order of importance, with the time limit of each in seconds."""
