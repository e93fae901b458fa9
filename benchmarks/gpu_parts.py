"""The parts of gpu.py: each measures one thing and returns what goes into the file of results."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
    synchronize,
    timed,
)
from local_rerank import Reranker, RerankRequest
from local_rerank.bench.flops import Shape, useful_flops
from local_rerank.engine.cuda.attention import tile_layout
from local_rerank.engine.cuda.fp8 import FP8
from local_rerank.engine.kernel_table import KERNELS, is_installed, layout_to
from local_rerank.engine.packing import pack
from local_rerank.errors import ConfigError, OutOfMemory
from local_rerank.requests.tokenization import Pair

Result = dict[str, Any]
BATCHES = 8  # one behind the other, in a round of a measurement


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
        reranker.engine.score(pairs)
    return median([timed(lambda: reranker.engine.score(pairs), setting.device) for _ in range(setting.rounds)])


def run_batches(reranker: Reranker, pairs: list[Pair], number: int) -> None:
    """The same batch again and again, each launched before the scores of the one before are fetched, as in a server."""
    engine = reranker.engine
    running = engine.launch(pairs)
    for _ in range(number - 1):
        following = engine.launch(pairs)
        running()
        running = following
    running()


def exact_log_odds(setting: Setting, pairs: list[Pair]) -> torch.Tensor:
    """The same weights in fp32 through SDPA on the same device."""
    with loaded(setting, dtype="fp32", attention="sdpa") as reranker:
        return reranker.engine.score(pairs)


def throughput(setting: Setting) -> Result:
    """Useful operations per second on 300-token pairs, packing included, and the ceiling, in turn."""
    shape = SHAPES[setting.shape]
    with loaded(setting) as reranker:
        pairs = pairs_of_300(setting, reranker)
        flops = useful_flops(Shape.from_config(shape), pairs)
        seconds_of(setting, reranker, pairs)
        rates, ceilings = [], []
        for _ in range(setting.rounds):
            ceilings.append(gemm_flops_per_second(shape, setting.batch_tokens, setting.device, rounds=2))
            taken = timed(lambda: run_batches(reranker, pairs, BATCHES), setting.device)
            rates.append(BATCHES * flops / taken)
        ours = reranker.engine.score(pairs)
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


def breakdown(setting: Setting) -> Result:
    """Where a batch of 300-token pairs spends its time: packing, launching, and the device's kernels by kind."""
    with loaded(setting) as reranker:
        pairs, engine = pairs_of_300(setting, reranker), reranker.engine
        whole = seconds_of(setting, reranker, pairs)
        packing, launching = [], []
        for _ in range(setting.rounds):
            start = time.perf_counter()
            batch = pack(pairs)
            packed = time.perf_counter()
            with torch.inference_mode():
                engine._odds(batch)
            launching.append(time.perf_counter() - packed)
            packing.append(packed - start)
            synchronize(setting.device)
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


def attention(setting: Setting) -> Result:
    """Each attention row by itself, in one layer: milliseconds and the largest difference to the definition in fp32."""
    shape, device = SHAPES[setting.shape], setting.device
    heads, key_heads, width = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    texts = Texts(setting.folder)
    with loaded(setting) as reranker:
        loads = {
            "chunks": pairs_of_300(setting, reranker),
            "passages": passages(setting, reranker, setting.batch_tokens // 80),
            "titles": list(reranker.tokenizer.pairs(texts.request(15, [11] * (setting.batch_tokens // 32))).pairs),
        }
    results: Result = {"not_installed": [name for name, row in KERNELS.items() if not is_installed(row)]}
    for load, pairs in loads.items():
        batch = pack(pairs)
        joined = torch.randn(batch.num_tokens, (heads + 2 * key_heads), width, device=device)
        parts = joined.bfloat16().tensor_split((-2 * key_heads, -key_heads), dim=1)
        exact: torch.Tensor | None = None
        for name, row in reversed(KERNELS.items()):  # the last two are for any device
            if name == "dense" or device.type not in row.device_types or not is_installed(row):
                continue
            layout = layout_to(row.layout(batch, False), device)
            q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in parts)
            with torch.inference_mode():
                if exact is None:
                    exact = row.attend(q.float(), k.float(), v.float(), layout, width**-0.5)
                ours = row.attend(q, k, v, layout, width**-0.5)
                attend = partial(row.attend, q, k, v, layout, width**-0.5)
                taken = [timed(attend, device) for _ in range(3 if setting.quick else 50)]
            results[f"{name} {load}"] = [round(1e3 * median(taken), 4), float((ours - exact).abs().max())]
    return results


def tuning(setting: Setting) -> Result:
    """Kernels alone: microseconds of attention by tile, block, warps and stages; bytes a second of the rest."""
    if setting.device.type != "cuda":
        return {"not_here": "kernels are compiled for a GPU only"}
    import triton

    from local_rerank.engine.cuda import triton_kernels

    shape, device = SHAPES[setting.shape], setting.device
    heads, key_heads, width = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    num_tokens, hidden, inner = setting.batch_tokens, shape["hidden_size"], shape["intermediate_size"]
    results: Result = {}

    def microseconds(run: Callable[[], object]) -> float | None:
        """None where the card has no room for a kernel's blocks."""
        try:
            for _ in range(3):
                run()
        except triton.runtime.errors.OutOfResources:
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # without the time of launching
            for _ in range(10):
                run()
        return round(1e5 * median([timed(graph.replay, device) for _ in range(10)]), 1)

    with torch.inference_mode():
        for load, lengths in {"chunks": [213] * 70, "passages": [75] * 210, "titles": [22] * 700}.items():
            batch = pack([Pair((number // 10,) * 97, (1,) * length) for number, length in enumerate(lengths)])
            joined = torch.randn(batch.num_tokens, heads + 2 * key_heads, width, device=device).bfloat16()
            parts = joined.tensor_split((-2 * key_heads, -key_heads), dim=1)
            for queries in (32, 64, 128):
                layout = layout_to(tile_layout(batch, False, queries_per_tile=queries), device)
                own = (layout.tiles, layout.first_own, layout.last_own, queries, width**-0.5)
                for block, warps, stages in itertools.product((32, 64), (4, 8), (2, 3)):
                    options = {"BLOCK_K": block, "num_warps": warps, "num_stages": stages}
                    name = f"{load}: {queries} queries, {block} keys, {warps} warps, {stages} stages"
                    results[name] = microseconds(partial(triton_kernels.attend_tiles, *parts, *own, **options))
        x, residual = (torch.randn(num_tokens, hidden, device=device).bfloat16() for _ in range(2))
        weight, angles = torch.ones(hidden, device=device).bfloat16(), torch.ones(num_tokens, width, device=device)
        gate_up = torch.randn(num_tokens, 2 * inner, device=device).bfloat16()
        q = torch.randn(num_tokens, heads, width, device=device).bfloat16()
        norm = torch.ones(width, device=device).bfloat16()
        runs: dict[str, tuple[Callable[[], object], int]] = {
            "add_rms_norm": (partial(triton_kernels.add_rms_norm_, x, residual, weight, 1e-6), 4 * x.nbytes),
            "norm_rotate": (
                partial(triton_kernels.norm_rotate_, q, norm, angles.bfloat16(), angles.bfloat16(), 1e-6), 2 * q.nbytes
            ),
            "silu_mul": (partial(triton_kernels.silu_mul, gate_up), 3 * gate_up.nbytes // 2),
            "quantize_rows": (partial(triton_kernels.quantize_rows, gate_up, FP8), 3 * gate_up.nbytes // 2),
        }  # fmt: skip
        for name, (run, num_bytes) in runs.items():
            taken = microseconds(run)
            results[f"{name}, TB/s"] = taken and round(num_bytes / taken / 1e6, 2)
    return results


def serving(setting: Setting) -> Result:
    """Clients that ask one after the other, ten documents at 300 tokens a pair: pairs per second and latency."""
    results: Result = {}
    with loaded(setting) as reranker:
        texts = Texts(setting.folder)
        requests = texts.requests_of_300(4 if setting.quick else 128, 10, overhead_of(reranker))
        for num_clients in (2,) if setting.quick else (1, 8, 16, 32, 64):
            _closed_loop(
                reranker, requests, num_clients, seconds=1 if setting.quick else 2
            )  # compile, capture, warm up
            results[f"{num_clients} clients"] = _closed_loop(
                reranker, requests, num_clients, seconds=1 if setting.quick else 5
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
                "p50_ms": 1e3 * percentile(taken, 50),
                "p99_ms": 1e3 * percentile(taken, 99),
                "num_graphs": 0 if graphs is None else len(graphs.sizes),
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
    """The fitted budget, the peak of a full batch beside the estimate, what graphs hold, a batch that cannot fit."""
    if setting.device.type != "cuda":
        return {"not_here": "the CPU's budget is fixed"}
    from transformers import Qwen3Config

    from local_rerank.engine.cuda.graphs import CAPTURE_AT
    from local_rerank.engine.out_of_memory import LayerShape, bytes_per_token, release_cached

    with loaded(setting, max_batch_tokens=None) as reranker:
        pairs = pairs_of_300(setting, reranker)
        budget, with_graphs = reranker.info.max_batch_tokens, reranker.engine
        engine, batch = with_graphs.with_kernel(with_graphs._kernel), pack(pairs)
        engine.forward(batch)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.forward(batch)
        peak = torch.cuda.max_memory_allocated() - before
        assert with_graphs._graphs is not None
        with_graphs._graphs.forget_all()  # the largest, captured at the start
        release_cached()
        before = torch.cuda.memory_reserved()
        for number in range(1, len(pairs) + 1, 4):  # from the smallest graph to the largest
            for _ in range(CAPTURE_AT):
                with_graphs.forward(pack(pairs[:number]))
        release_cached()
        held_by_graphs = torch.cuda.memory_reserved() - before
        torch.cuda.set_per_process_memory_fraction(0.05)
        try:
            with_graphs.forward(pack(pairs * 40))
            refused = "nothing: it fitted"
        except OutOfMemory as error:
            refused = str(error)
        torch.cuda.set_per_process_memory_fraction(1.0)
        with_graphs.forward(batch)
    estimate = bytes_per_token(LayerShape.of(Qwen3Config(**SHAPES[setting.shape])), 2)
    return {
        "max_batch_tokens": budget,
        "peak_bytes_per_token": peak / batch.num_tokens,
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
"""In order of importance, with the seconds that each may take."""
