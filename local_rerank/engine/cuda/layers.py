"""The decoder for GPUs in bf16 or fp16: linear layers that share an input are merged, the rest is Triton kernels.

transformers runs each RMSNorm, rotary embedding and activation as several kernels that read and write whole tensors.
Launching a layer's kernels takes 2 ms of CPU time, longer than an H200 takes to run them. Here a layer is four matrix
products and five launches of our kernels, which also run in a CUDA graph.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local_rerank.engine.attention import Attend, Layout, layout_to
from local_rerank.engine.cuda.fp8 import FP8, product_and_exact, quantize
from local_rerank.engine.kernel_table import KERNELS, KernelRow
from local_rerank.engine.out_of_memory import is_out_of_memory
from local_rerank.engine.packing import PackedBatch, pack
from local_rerank.requests.pair import Pair

logger = logging.getLogger(__name__)

LARGEST_DIFFERENCE = 0.03  # of a bf16 kernel from fp32, relative to the largest value; bf16 rounds each by 0.004
NUM_CHECKED_ROWS = 35  # for kernels that work row by row; not a multiple of 4, the rows per program
EPSILON = 1e-6
LIMITS = dict.fromkeys(("add_rms_norm_quantized", "silu_mul_quantized", "fp8_linear"), 0.05)
"""Of results in fp8, whose three bits are off by .026 on average, .037 in a product of two; a wrong scale by more."""
MAX_COMPILERS = 8  # threads


class FusedLayer(nn.Module):
    """A decoder layer whose residual stream is updated in place."""

    qk_norm: Tensor  # (2, head_dim): weights of the norms of queries and of keys
    quantizes = False  # whether norms and activation return fp8 and a scale per token, which Fp8Linear takes

    def __init__(self, layer: Any, *, is_last: bool) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        q, kv = [attention.q_proj], [attention.k_proj, attention.v_proj]
        # in the last layer few tokens have a query, so queries have a product of their own
        self.projections = nn.ModuleList(map(join_linears, [q, kv] if is_last else [q + kv]))
        self.o_proj: Any = attention.o_proj
        self.gate_up_proj: Any = join_linears([mlp.gate_proj, mlp.up_proj])
        self.down_proj: Any = mlp.down_proj
        self.input_layernorm: Any = layer.input_layernorm
        self.post_attention_layernorm: Any = layer.post_attention_layernorm
        weights = torch.stack([norm.weight.detach() for norm in (attention.q_norm, attention.k_norm)])
        self.register_buffer("qk_norm", weights, persistent=False)
        self.head_dim = int(attention.head_dim)
        self.num_key_heads = attention.k_proj.out_features // self.head_dim
        self.scaling = float(attention.scaling)
        self.eps = float(layer.input_layernorm.variance_epsilon)

    def forward(
        self,
        delta: Tensor | None,
        residual: Tensor,
        rotation: tuple[Tensor, Tensor],
        query_positions: Tensor | None,
        attend: Attend,
        layout: Layout,
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns `delta`, which is still to be added, and `residual`: (num_tokens, hidden) each.

        `rotation`: cos and sin, (num_tokens, head_dim) each. With `query_positions`, (num_queries,), only these tokens
        are queries and have a result.
        """
        from local_rerank.engine.cuda import triton_kernels

        x = self._normed(delta, residual, self.input_layernorm)
        if query_positions is None:
            heads = self.projections[0](x).unflatten(-1, (-1, self.head_dim))
            q, k, v = heads.tensor_split((-2 * self.num_key_heads, -self.num_key_heads), dim=1)
            queries_and_keys, num_query_heads = heads[:, : -self.num_key_heads], q.shape[1]
            triton_kernels.norm_rotate_(
                queries_and_keys, self.qk_norm, *rotation, self.eps, num_query_heads=num_query_heads
            )
        else:
            q = self.projections[0](_rows(x, query_positions)).unflatten(-1, (-1, self.head_dim))
            k, v = self.projections[1](x).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=1)
            residual = residual[query_positions]
            q_rotation = (rotation[0][query_positions], rotation[1][query_positions])
            triton_kernels.norm_rotate_(q, self.qk_norm[0], *q_rotation, self.eps)
            triton_kernels.norm_rotate_(k, self.qk_norm[1], *rotation, self.eps)
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))  # (1, heads, tokens, head_dim)
        attended = self.o_proj(attend(q, k, v, layout, self.scaling)[0].flatten(1))
        gate_up = self.gate_up_proj(self._normed(attended, residual, self.post_attention_layernorm))
        quantizes = self.quantizes
        product = triton_kernels.silu_mul_quantized(gate_up, FP8) if quantizes else triton_kernels.silu_mul(gate_up)
        out: Tensor = self.down_proj(product)
        return out, residual

    def _normed(self, delta: Tensor | None, residual: Tensor, norm: Any) -> Tensor | tuple[Tensor, Tensor]:
        """The input of the next product; adds `delta` to `residual`."""
        from local_rerank.engine.cuda.triton_kernels import add_rms_norm_, add_rms_norm_quantized_

        if self.quantizes:
            return add_rms_norm_quantized_(delta, residual, norm.weight, self.eps, FP8)
        return add_rms_norm_(delta, residual, norm.weight, self.eps)


class FusedDecoder(nn.Module):
    """Embedding, layers and final norm of a bf16 or fp16 model on one GPU."""

    def __init__(self, backbone: Any) -> None:
        """`backbone`: a Qwen3Model. We replace its layers one by one, so only one layer's weights exist twice."""
        super().__init__()
        self.embed_tokens: Any = backbone.embed_tokens
        self.rotary_emb: Any = backbone.rotary_emb
        self.norm: Any = backbone.norm
        last = len(backbone.layers) - 1
        for index, layer in enumerate(backbone.layers):
            backbone.layers[index] = FusedLayer(layer, is_last=index == last)
        self.layers: Any = backbone.layers

    def forward(
        self, batch: PackedBatch, kernel: KernelRow, layout: Layout, last_layout: Callable[[], Layout]
    ) -> Tensor:
        """See `Decoder`."""
        from local_rerank.engine.cuda.triton_kernels import add_rms_norm_

        residual = F.embedding(batch.input_ids[0], self.embed_tokens.weight)
        cos, sin = (part[0] for part in self.rotary_emb(residual, batch.position_ids))
        delta: Tensor | None = None
        layout = layout_to(layout, residual.device)
        for layer in self.layers[:-1]:
            delta, residual = layer(delta, residual, (cos, sin), None, kernel.attend, layout)
        last, layout = self.layers[-1], layout_to(last_layout(), residual.device)
        delta, residual = last(delta, residual, (cos, sin), batch.last_token_index, kernel.attend, layout)
        return add_rms_norm_(delta, residual, self.norm.weight, last.eps)


def why_not_fused(config: Any, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> str | None:
    """Why our decoder cannot run a model here; None if it can.

    Runs each kernel once, in the model's widths, and compares it with torch's operators, because the compiler, its
    back end or the GPU may be faulty, and a wrong score is worse than a slow one.
    """
    if config.hidden_act != "silu":
        return f"the activation is {config.hidden_act}"
    try:
        with torch.inference_mode(), torch.cuda.device_of(torch.empty(0, device=device)):  # type: ignore[no-untyped-call]
            if device.type == "cuda":
                compile_kernels(config, device, dtype, fp8=fp8)
            differences = kernel_differences(config, device, dtype, fp8=fp8)
    except Exception as error:  # whatever the compiler, its back end and the linker raise
        said = (str(error).strip().splitlines() or [""])[0]
        is_short = is_out_of_memory(error)
        reason = "memory ran out while its kernels were checked" if is_short else "Triton does not work here"
        logger.warning("%s (%s: %s)", reason, type(error).__name__, said)
        return reason
    wrong = {name: value for name, value in differences.items() if not value < LIMITS.get(name, LARGEST_DIFFERENCE)}
    if wrong:
        logger.warning("kernels compute something else here: %s", wrong)
        return f"kernels compute something else here: {', '.join(wrong)}"
    return None


def compile_kernels(config: Any, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> list[Any]:
    """Compile the kernels that `kernel_differences` runs, in parallel; returns them."""
    from local_rerank.engine.cuda.triton_kernels import compile_in_parallel

    num_threads = min(MAX_COMPILERS, os.cpu_count() or 1)
    return compile_in_parallel(lambda: kernel_differences(config, device, dtype, fp8=fp8), num_threads)


def kernel_differences(config: Any, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> dict[str, float]:
    """The largest difference of each kernel from torch's operators in fp32, relative to the largest value.

    `fp8`: include the kernels that quantize, and the products of the model's four shapes, which need a GPU with fp8.
    For what `LIMITS` names, the difference is the norm of all errors relative to the norm, because fp8 rounds coarsely.
    """
    differences: dict[str, float] = {}
    for compare in (compare_rows, compare_quantized, compare_attention) if fp8 else (compare_rows, compare_attention):
        for name, ours, exact in compare(config, make_random(device, dtype)):
            order = 2.0 if name in LIMITS else math.inf
            error, size = (torch.linalg.vector_norm(numbers, order) for numbers in (ours.float() - exact, exact))
            difference, before = float(error / size), differences.get(name, 0.0)
            differences[name] = before if before >= difference or math.isnan(before) else difference  # NaN stays
    return differences


Random = Callable[..., Tensor]
"""Makes a tensor of a shape with normally distributed numbers."""
Comparisons = Iterator[tuple[str, Tensor, Tensor]]
"""Name of a kernel, its result, and that of torch's operators in fp32."""


def make_random(device: torch.device, dtype: torch.dtype) -> Random:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)


def compare_rows(config: Any, random: Random) -> Comparisons:
    """The kernels that work row by row."""
    from local_rerank.engine.cuda import triton_kernels

    width, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    delta, residual, weight = random(NUM_CHECKED_ROWS, width), random(NUM_CHECKED_ROWS, width), random(width)
    total = (delta + residual).float()
    normed = triton_kernels.add_rms_norm_(delta, residual, weight, EPSILON)
    yield "add_rms_norm", normed, F.rms_norm(total, (width,), weight.float(), EPSILON)
    yield "add_rms_norm", residual, total
    normed = triton_kernels.add_rms_norm_(None, residual, weight, EPSILON)
    yield "add_rms_norm", normed, F.rms_norm(residual.float(), (width,), weight.float(), EPSILON)

    weights, angles = random(2, head_dim), random(NUM_CHECKED_ROWS, head_dim // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def rotated(part: Tensor, weight: Tensor) -> Tensor:
        first, second = F.rms_norm(part.float(), (head_dim,), weight.float(), EPSILON).chunk(2, dim=-1)
        swapped = torch.cat([-second, first], dim=-1)
        return torch.cat([first, second], dim=-1) * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)

    for is_last in (False, True):  # in the last layer queries and keys are different tokens
        both = random(NUM_CHECKED_ROWS, heads + 2 * key_heads, head_dim)[:, :-key_heads]
        q, k = both[:, :heads], both[:, heads:]
        exact = torch.cat([rotated(q, weights[0]), rotated(k, weights[1])], dim=1)
        if is_last:
            triton_kernels.norm_rotate_(q, weights[0], cos, sin, EPSILON)
            triton_kernels.norm_rotate_(k, weights[1], cos, sin, EPSILON)
        else:
            triton_kernels.norm_rotate_(both, weights, cos, sin, EPSILON, num_query_heads=heads)
        yield "norm_rotate", both, exact

    gate_up = random(NUM_CHECKED_ROWS, 2 * inner)
    gate, up = gate_up.float().chunk(2, dim=-1)
    yield "silu_mul", triton_kernels.silu_mul(gate_up), F.silu(gate) * up


def compare_quantized(config: Any, random: Random) -> Comparisons:
    """The kernels that quantize rows, each in the width that it has in a layer, and the layer's four products."""
    from local_rerank.engine.cuda import triton_kernels

    width, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    attended = random(NUM_CHECKED_ROWS, heads * head_dim)  # what o_proj reads
    steps, _ = quantize(attended)  # values that fp8 represents exactly, so that rounding does not matter
    exact = steps.float() / 2.0 ** (torch.arange(len(steps), device=steps.device) % 9).unsqueeze(1)
    values, scale = triton_kernels.quantize_rows(exact.to(attended.dtype), FP8)
    yield "quantize_rows", values.float() * scale, exact

    delta, residual, weight = random(NUM_CHECKED_ROWS, width), random(NUM_CHECKED_ROWS, width), random(width)
    for added in (delta, None):
        total = (residual if added is None else residual + added).float()
        values, scale = triton_kernels.add_rms_norm_quantized_(added, residual, weight, EPSILON, FP8)
        yield "add_rms_norm_quantized", values.float() * scale, F.rms_norm(total, (width,), weight.float(), EPSILON)
    gate_up = random(NUM_CHECKED_ROWS, 2 * inner)
    gate, up = gate_up.float().chunk(2, dim=-1)
    values, scale = triton_kernels.silu_mul_quantized(gate_up, FP8)
    yield "silu_mul_quantized", values.float() * scale, F.silu(gate) * up

    qkv, attended_width = (heads + 2 * key_heads) * head_dim, heads * head_dim
    for shape in ((width, qkv), (attended_width, width), (width, 2 * inner), (inner, width)):
        yield "fp8_linear", *product_and_exact(*shape, steps.device)


def compare_attention(config: Any, random: Random) -> Comparisons:
    """Our attention kernel, over all tokens and over last tokens."""
    heads, key_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    lengths = (1, 1, 7, 7, 40, 130)
    batch = pack([Pair.of((1,) * (70 + number % 2), (2,) * length) for number, length in enumerate(lengths)])
    merged = random(batch.num_tokens, heads + 2 * key_heads, head_dim)  # queries, keys and values, as in a layer
    by_token = merged.tensor_split((-2 * key_heads, -key_heads), dim=1)
    by_head = [part.transpose(0, 1).unsqueeze(0) for part in by_token]
    tiles, dense = KERNELS["cuda-tiles"], KERNELS["dense"]
    for last_tokens_only in (False, True):
        if last_tokens_only:
            by_head[0] = by_head[0][:, :, batch.last_token_index.to(merged.device)].contiguous()
        ours, exact = (
            row.attend(q, k, v, layout_to(row.layout(batch, last_tokens_only), merged.device), head_dim**-0.5)
            for row, (q, k, v) in ((tiles, by_head), (dense, [part.float() for part in by_head]))
        )
        yield "attend_tiles", ours, exact


def _rows(x: Tensor | tuple[Tensor, Tensor], index: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Some rows of a tensor, or of fp8 numbers and their scales."""
    if isinstance(x, Tensor):
        return x[index]
    return x[0].view(torch.uint8)[index].view(x[0].dtype), x[1][index]  # torch need not index fp8


def join_linears(layers: list[Any]) -> nn.Module:
    """One linear layer that returns the concatenated outputs of `layers`."""
    if len(layers) == 1:
        return layers[0]  # type: ignore[no-any-return]  # transformers is untyped
    weight = torch.cat([layer.weight.detach() for layer in layers])
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=layers[0].bias is not None, device="meta")
    merged.weight = nn.Parameter(weight, requires_grad=False)
    if layers[0].bias is not None:
        merged.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
    return merged
