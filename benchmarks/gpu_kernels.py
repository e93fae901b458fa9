"""The parts of gpu.py that run kernels without the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch

from benchmarks.gpu_setup import SHAPES, RandomTexts, Result, Setting, loaded, pairs_of_300, timed
from local_rerank.engine.attention import layout_to
from local_rerank.engine.cuda.attention import tile_layout
from local_rerank.engine.cuda.fp8 import FP8, LEAST_CAPABILITY
from local_rerank.engine.cuda.layers import MAX_COMPILERS
from local_rerank.engine.kernel_table import KERNELS, is_installed
from local_rerank.engine.packing import pack
from local_rerank.requests.pair import Pair


def attention(setting: Setting) -> Result:
    """Measure each attention kernel in one layer: milliseconds and the largest difference from fp32."""
    shape, device = SHAPES[setting.shape], setting.device
    heads, key_heads, width = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    texts = RandomTexts(setting.folder)
    with loaded(setting) as reranker:
        loads = {
            "chunks": pairs_of_300(setting, reranker),
            "passages": list(reranker.tokenizer.pairs(texts.passages(setting.batch_tokens // 80)).pairs),
            "titles": list(reranker.tokenizer.pairs(texts.request(15, [11] * (setting.batch_tokens // 32))).pairs),
        }
    results: Result = {"not_installed": [name for name, row in KERNELS.items() if not is_installed(row)]}
    for load, pairs in loads.items():
        batch = pack(pairs)
        joined = torch.randn(batch.num_tokens, (heads + 2 * key_heads), width, device=device)
        parts = joined.bfloat16().tensor_split((-2 * key_heads, -key_heads), dim=1)
        exact: torch.Tensor | None = None
        for name, row in reversed(KERNELS.items()):  # the last two run on any device
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


def tuning(setting: Setting) -> Iterator[Result]:
    """Measure single kernels: microseconds of attention by tile, of fp8's by whether they quantize; bandwidths."""
    if setting.device.type != "cuda":
        yield {"not_here": "kernels are only compiled for a GPU"}
        return
    import triton

    from benchmarks.compiled_kernels import TILES
    from local_rerank.engine.cuda import triton_kernels

    shape, device = SHAPES[setting.shape], setting.device
    heads, key_heads, width = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    num_tokens, hidden, inner = setting.batch_tokens, shape["hidden_size"], shape["intermediate_size"]

    def microseconds(run: Callable[[], object]) -> float | None:
        """Return None if a kernel exceeds the resources of the GPU."""
        try:
            for _ in range(3):
                run()
        except triton.runtime.errors.OutOfResources:
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # excludes launch time
            for _ in range(10):
                run()
        return round(1e5 * median([timed(graph.replay, device) for _ in range(10)]), 1)

    attends: dict[str, Callable[[], object]] = {}
    for load, lengths in {"chunks": [213] * 70, "passages": [75] * 210, "titles": [22] * 700}.items():
        batch = pack([Pair.of((number // 10,) * 97, (1,) * length) for number, length in enumerate(lengths)])
        joined = torch.randn(batch.num_tokens, heads + 2 * key_heads, width, device=device).bfloat16()
        parts = joined.tensor_split((-2 * key_heads, -key_heads), dim=1)
        for tile in TILES:
            layout = layout_to(tile_layout(batch, False, queries_per_tile=tile["queries"]), device)
            own = (layout.tiles, layout.first_own, layout.last_own, layout.queries_per_tile, width**-0.5)
            options = {name: value for name, value in tile.items() if name != "queries"}
            said = ", ".join(f"{name} {value}" for name, value in tile.items() if value is not None)
            attends[f"{load}: {said}"] = partial(triton_kernels.attend_tiles, *parts, *own, **options)
    # each of the ten tiles takes three seconds
    triton_kernels.compile_in_parallel(lambda: [attend() for attend in attends.values()], MAX_COMPILERS)
    with torch.inference_mode():
        x, residual = (torch.randn(num_tokens, hidden, device=device).bfloat16() for _ in range(2))
        weight, angles = torch.ones(hidden, device=device).bfloat16(), torch.ones(num_tokens, width, device=device)
        gate_up = torch.randn(num_tokens, 2 * inner, device=device).bfloat16()
        qk = torch.randn(num_tokens, heads + key_heads, width, device=device).bfloat16()
        norms = torch.ones(2, width, device=device).bfloat16()
        cos = angles.bfloat16()
        runs: dict[str, tuple[Callable[[], object], int]] = {
            "add_rms_norm": (partial(triton_kernels.add_rms_norm_, x, residual, weight, 1e-6), 4 * x.nbytes),
            "norm_rotate": (
                partial(triton_kernels.norm_rotate_, qk, norms, cos, cos, 1e-6, num_query_heads=heads), 2 * qk.nbytes
            ),
            "silu_mul": (partial(triton_kernels.silu_mul, gate_up), 3 * gate_up.nbytes // 2),
        }  # fmt: skip
        for name, (run, num_bytes) in runs.items():
            taken = microseconds(run)
            yield {f"{name}, TB/s": taken and round(num_bytes / taken / 1e6, 2)}
        for said, attend in attends.items():
            yield {said: microseconds(attend)}
        if torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY:
            normed, product = (torch.randn(num_tokens, size, device=device).bfloat16() for size in (hidden, inner))
            quantizing: dict[str, tuple[Callable[[], object], ...]] = {
                "norm and quantize": (
                    runs["add_rms_norm"][0],
                    partial(triton_kernels.quantize_rows, normed, FP8),
                    partial(triton_kernels.add_rms_norm_quantized_, x, residual, weight, 1e-6, FP8),
                ),
                "silu and quantize": (
                    runs["silu_mul"][0],
                    partial(triton_kernels.quantize_rows, product, FP8),
                    partial(triton_kernels.silu_mul_quantized, gate_up, FP8),
                ),
            }
            for name, kernels in quantizing.items():
                yield {f"{name}: first, second, both in one, us": [microseconds(run) for run in kernels]}
