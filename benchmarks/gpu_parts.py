"""The parts of gpu.py that run the engine in their own process; each yields its figures as they come.

A figure of the same name replaces the one before, so that a part that is cut off leaves medians of what it measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_setup import (
    OWN_TOKENS,
    SHAPES,
    SHARED_TOKENS,
    RandomTexts,
    Result,
    Setting,
    batch_of_requests,
    difference,
    gemm_flops_per_second,
    loaded,
    make_checkpoint,
    pairs_of_300,
    run_batches,
    timed,
)
from benchmarks.peer_process import Card
from local_rerank import Reranker
from local_rerank.bench.flops import DecoderShape, useful_flops
from local_rerank.bench.measure import percentile
from local_rerank.engine.packing import pack
from local_rerank.errors import ConfigError
from local_rerank.requests.pair import Pair, num_batch_tokens

BATCHES = 8  # per round, launched one after the other


def checkpoint(setting: Setting) -> Iterator[Result]:
    """Make the checkpoint of the other parts, and say what runs them."""
    from importlib import metadata

    device = setting.device
    yield {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"}
    for name in ("torch", "transformers", "sentence-transformers", "triton"):
        try:
            yield {name: metadata.version(name)}
        except metadata.PackageNotFoundError:
            yield {name: "not installed"}
    make_checkpoint(setting.folder, setting.shape, device)


def warm_up(reranker: Reranker, pairs: list[Pair]) -> None:
    for _ in range(3):  # compile, capture, replay
        reranker.engine.score(pairs)


def throughput(setting: Setting) -> Iterator[Result]:
    """Measure useful operations per second on 300-token pairs and the ceiling, in alternation."""
    shape = SHAPES[setting.shape]
    with loaded(setting) as reranker:
        info = reranker.info
        yield {"decoder": info.decoder, "kernel": info.kernel, "load_seconds": info.load_seconds}
        pairs = pairs_of_300(setting, reranker)
        lengths = (pairs[0].num_prefix_tokens, pairs[0].num_document_tokens)
        yield {"num_pairs": len(pairs), "num_tokens": num_batch_tokens(pairs), "shared_and_own_tokens": lengths}
        if max(map(abs, (lengths[0] - SHARED_TOKENS, lengths[1] - OWN_TOKENS))) > 3:
            yield {"warning": f"pairs should have {SHARED_TOKENS} and {OWN_TOKENS} tokens"}
        flops = useful_flops(DecoderShape.from_config(shape), pairs)
        warm_up(reranker, pairs)
        rates, ceilings = [], []
        for _ in range(setting.rounds):
            ceilings.append(gemm_flops_per_second(shape, setting.batch_tokens, setting.device, rounds=2))
            rates.append(BATCHES * flops / timed(lambda: run_batches(reranker, pairs, BATCHES), setting.device))
            yield {
                "gemm_ceiling_tflops": median(ceilings) / 1e12,
                "useful_tflops": median(rates) / 1e12,
                "share_of_ceiling": median([rate / top for rate, top in zip(rates, ceilings, strict=True)]),
                "pairs_per_second": len(pairs) * median(rates) / flops,
            }


def breakdown(setting: Setting) -> Iterator[Result]:
    """Measure where a batch spends its time: packing, launching, and the device's kernels by kind."""
    with loaded(setting) as reranker:
        pairs, engine = pairs_of_300(setting, reranker), reranker.engine
        warm_up(reranker, pairs)
        whole = [timed(lambda: engine.score(pairs), setting.device) for _ in range(setting.rounds)]
        yield {"batch_ms": 1e3 * median(whole)}
        packing, launching = [], []
        for _ in range(setting.rounds):
            start = time.perf_counter()
            pack(pairs)
            packing.append(time.perf_counter() - start)
            start = time.perf_counter()
            fetch = engine.launch(pairs)  # packs, too
            launching.append(time.perf_counter() - start - packing[-1])
            fetch()
        yield {"packing_ms": 1e3 * median(packing), "launching_ms": 1e3 * median(launching)}
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
    yield {f"{kind}_ms": round(milliseconds, 3) for kind, milliseconds in kinds.items()}
    for name, milliseconds in sorted(kernels.items(), key=lambda item: -item[1])[:18]:
        yield {f"{name}, ms": round(milliseconds, 3)}


def precision(setting: Setting) -> Iterator[Result]:
    """Compare bf16 with the model card's code in fp32, beside that code in bf16, on the same pairs."""
    with loaded(setting) as reranker:
        requests = batch_of_requests(setting, reranker, num_batches=1 if setting.quick else 4)
        template, instruction = reranker.checkpoint.template, reranker.config.instruction
        prompts = [
            {
                "shared": template.prefix + template.shared_body(instruction, request.query),
                "documents": request.documents,
            }
            for request in requests
        ]
        pairs = [pair for request in requests for pair in reranker.tokenizer.pairs(request).pairs]
        size = len(pairs_of_300(setting, reranker))
        ours = [
            odds for start in range(0, len(pairs), size) for odds in reranker.engine.score(pairs[start : start + size])
        ]

    def card(dtype: str) -> list[float]:
        return [odds for row in Card(str(setting.folder), dtype).score(prompts, template.suffix) for odds in row]

    exact = card("float32")
    yield {"num_pairs": len(exact), "range_of_fp32": max(exact) - min(exact)}
    for name, odds in (("ours", ours), ("card", card("bfloat16"))):
        largest, mean = difference(odds, exact)
        yield {f"{name}_largest": largest, f"{name}_mean": mean}


def latency(setting: Setting) -> Iterator[Result]:
    """Measure the latency of a request with ten passages, with and without CUDA graphs."""
    request = RandomTexts(setting.folder).passages(10)
    cases: dict[str, dict[str, Any]] = {"": {}}
    if setting.device.type == "cuda":
        cases["without graphs "] = {"no_cuda_graphs": True}
    for case, options in cases.items():
        with loaded(setting, **options) as reranker:
            for _ in range(5):
                reranker.rank(request.query, request.documents)
            taken = []
            for _ in range(5 if setting.quick else 50 if case else 200):
                start = time.perf_counter()
                reranker.rank(request.query, request.documents)
                taken.append(1e3 * (time.perf_counter() - start))
            yield {f"{case}p50_ms": percentile(sorted(taken), 50), f"{case}p99_ms": percentile(sorted(taken), 99)}


def peer(setting: Setting) -> Iterator[Result]:
    """Compare with sentence-transformers' CrossEncoder on passages, in alternation on the same device."""
    try:
        import sentence_transformers
    except ImportError as error:
        yield {"not_here": str(error)}
        return
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
        yield {"version": sentence_transformers.__version__, "num_passages": len(texts)}

        def predict(size: int) -> Any:
            return model.predict(texts, batch_size=size, show_progress_bar=False)

        result = reranker.rank(request.query, request.documents)
        log_odds = [item.log_odds for item in sorted(result, key=lambda item: item.index)]
        theirs_odds = torch.tensor(predict(batch_sizes[0])).float().flatten().tolist()
        yield {"largest_difference": difference(log_odds, theirs_odds)[0]}
        rank = partial(reranker.rank, request.query, request.documents)
        yield from beside(rank, {size: partial(predict, size) for size in batch_sizes}, setting)


def encoders(setting: Setting) -> Iterator[Result]:
    """Compare an encoder in the shape of bge-reranker-v2-m3 with sentence-transformers on pairs of 20 to 400 tokens."""
    from benchmarks.encoders import make_encoder, request_of

    try:
        import sentence_transformers
    except ImportError as error:
        yield {"not_here": str(error)}
        return
    folder = make_encoder(setting.folder.parent / "encoder", "minilm-l6" if setting.quick else "v2-m3")
    request = request_of(8 if setting.quick else 640)
    model = sentence_transformers.CrossEncoder(
        str(folder), device=str(setting.device), local_files_only=True, model_kwargs={"dtype": torch.bfloat16}
    )
    texts = [(request.query, document) for document in request.documents]

    def predict(size: int) -> Any:
        return model.predict(texts, batch_size=size, show_progress_bar=False)

    def rank(reranker: Reranker) -> list[float]:
        result = reranker.rank(request.query, request.documents)
        return [item.log_odds for item in sorted(result, key=lambda item: item.index)]

    options: dict[str, Any] = {"device": str(setting.device), "max_queued_tokens": 10**7}
    with Reranker(str(folder), dtype="fp32", **options) as reranker:
        exact = rank(reranker)
    with Reranker(str(folder), dtype="bf16", **options) as reranker:
        yield {"version": sentence_transformers.__version__, "kernel": reranker.info.kernel, "num_pairs": len(texts)}
        batch_sizes = (8,) if setting.quick else (32, 128)
        yield from beside(lambda: rank(reranker), {size: partial(predict, size) for size in batch_sizes}, setting)
        ours = rank(reranker)
    yield {"range_of_fp32": max(exact) - min(exact)}
    for name, odds in (("ours", ours), ("theirs", torch.tensor(predict(batch_sizes[0])).float().flatten().tolist())):
        largest, mean = difference(odds, exact)
        yield {f"{name}_largest": largest, f"{name}_mean": mean}


def beside(ours: Callable[[], Any], theirs: dict[int, Callable[[], Any]], setting: Setting) -> Iterator[Result]:
    """Time `ours` and, by batch size, `theirs`, in alternation; yields the medians and their ratio so far."""
    own: list[float] = []
    other: dict[int, list[float]] = {size: [] for size in theirs}
    for number in range(1 + (1 if setting.quick else 5)):
        taken = timed(ours, setting.device)
        their = {size: timed(predict, setting.device) for size, predict in theirs.items()}
        if not number:
            continue  # the first round warms up
        own.append(taken)
        for size, seconds in their.items():
            other[size].append(seconds)
        best = min(theirs, key=lambda size: median(other[size]))
        yield {
            "ours_seconds": median(own),
            "theirs_seconds": median(other[best]),
            "best_batch_size": best,
            "ratio": median(other[best]) / median(own),
        }


def fp8(setting: Setting) -> Iterator[Result]:
    """Compare bf16 and fp8 on 300-token pairs, in alternation: throughput, and log-odds beside fp32's."""
    dtypes = {"bf16": "bf16", "fp8": "fp8" if setting.device.type == "cuda" else "int8"}  # a trial on a CPU
    with ExitStack() as stack:
        try:
            rerankers = {name: stack.enter_context(loaded(setting, dtype=dtype)) for name, dtype in dtypes.items()}
        except ConfigError as error:
            yield {"not_here": str(error)}
            return
        pairs = pairs_of_300(setting, rerankers["bf16"])
        for reranker in rerankers.values():
            warm_up(reranker, pairs)
        rates: dict[str, list[float]] = {dtype: [] for dtype in rerankers}
        for _ in range(setting.rounds // 2):
            for dtype, reranker in rerankers.items():
                taken = timed(lambda reranker=reranker: run_batches(reranker, pairs, BATCHES // 2), setting.device)
                rates[dtype].append(BATCHES // 2 * len(pairs) / taken)
            quotients = [b / a for a, b in zip(*rates.values(), strict=True)]
            yield {f"{dtype}_pairs_per_second": median(each) for dtype, each in rates.items()}
            yield {"speedup": median(quotients)}
        odds = {dtype: reranker.engine.score(pairs) for dtype, reranker in rerankers.items()}
    with loaded(setting, dtype="fp32", attention="sdpa") as reranker:
        exact = reranker.engine.score(pairs)
    yield {"range_of_fp32": max(exact) - min(exact)}
    for dtype, each in odds.items():
        largest, mean = difference(each, exact)
        yield {f"{dtype}_largest": largest, f"{dtype}_mean": mean}
