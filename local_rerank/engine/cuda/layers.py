"""The decoder for GPUs in bf16 or fp16: linear layers that share an input are merged, the rest is Triton kernels.

transformers runs each RMSNorm, rotary embedding and activation as several kernels that read and write whole tensors.
Launching a layer's kernels takes 2 ms of CPU time, longer than an H200 takes to run them. Here a layer is four matrix
products and six launches of our kernels, which also run in a CUDA graph.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local_rerank.engine.attention import Attend, Layout, layout_to
from local_rerank.engine.cuda.fp8 import FP8, quantize
from local_rerank.engine.kernel_table import KERNELS, KernelRow
from local_rerank.engine.packing import PackedBatch, pack
from local_rerank.requests.pair import Pair

logger = logging.getLogger(__name__)

LARGEST_DIFFERENCE = 0.03  # of a bf16 kernel from fp32, relative to the largest value; bf16 rounds each by 0.004
NUM_CHECKED_ROWS = 35  # for kernels that work row by row; not a multiple of 4, the rows per program
EPSILON = 1e-6


class FusedLayer(nn.Module):
    """A decoder layer whose residual stream is updated in place."""

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
        self.q_norm: Any = attention.q_norm
        self.k_norm: Any = attention.k_norm
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
        from local_rerank.engine.cuda.triton_kernels import add_rms_norm_, norm_rotate_, silu_mul

        x = add_rms_norm_(delta, residual, self.input_layernorm.weight, self.eps)
        q_rotation = rotation
        if query_positions is None:
            heads = self.projections[0](x).unflatten(-1, (-1, self.head_dim))
            q, k, v = heads.tensor_split((-2 * self.num_key_heads, -self.num_key_heads), dim=1)
        else:
            q = self.projections[0](x[query_positions]).unflatten(-1, (-1, self.head_dim))
            k, v = self.projections[1](x).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=1)
            residual = residual[query_positions]
            q_rotation = (rotation[0][query_positions], rotation[1][query_positions])
        norm_rotate_(q, self.q_norm.weight, *q_rotation, self.eps)
        norm_rotate_(k, self.k_norm.weight, *rotation, self.eps)
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))  # (1, heads, tokens, head_dim)
        attended = self.o_proj(attend(q, k, v, layout, self.scaling)[0].flatten(1))
        x = add_rms_norm_(attended, residual, self.post_attention_layernorm.weight, self.eps)
        out: Tensor = self.down_proj(silu_mul(self.gate_up_proj(x)))
        return out, residual


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
            differences = kernel_differences(config, device, dtype, fp8=fp8)
    except Exception as error:  # whatever the compiler, its back end and the linker raise
        reason = (str(error).strip().splitlines() or [""])[0]
        logger.warning("Triton does not work here (%s: %s)", type(error).__name__, reason)
        return "Triton does not work here"
    wrong = {name: value for name, value in differences.items() if not value < LARGEST_DIFFERENCE}
    if wrong:
        logger.warning("kernels compute something else here: %s", wrong)
        return f"kernels compute something else here: {', '.join(wrong)}"
    return None


def kernel_differences(config: Any, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> dict[str, float]:
    """The largest difference of each kernel from torch's operators in fp32, relative to the largest value.

    `fp8`: include the quantization kernel, which compiles only on GPUs with fp8.
    """
    from local_rerank.engine.cuda import triton_kernels

    width, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    lengths = (1, 1, 7, 7, 40, 130)
    batch = pack([Pair((1,) * (70 + number % 2), (2,) * length) for number, length in enumerate(lengths)])
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    differences: dict[str, float] = {}

    def compare(name: str, ours: Tensor, exact: Tensor) -> None:
        difference = float((ours.float() - exact).abs().max() / exact.abs().max())
        before = differences.get(name, 0.0)
        differences[name] = before if before >= difference or math.isnan(before) else difference  # NaN stays

    delta, residual, weight = random(NUM_CHECKED_ROWS, width), random(NUM_CHECKED_ROWS, width), random(width)
    total = (delta + residual).float()
    normed = triton_kernels.add_rms_norm_(delta, residual, weight, EPSILON)
    compare("add_rms_norm", normed, F.rms_norm(total, (width,), weight.float(), EPSILON))
    compare("add_rms_norm", residual, total)
    normed = triton_kernels.add_rms_norm_(None, residual, weight, EPSILON)
    compare("add_rms_norm", normed, F.rms_norm(residual.float(), (width,), weight.float(), EPSILON))

    def heads_of(num_tokens: int) -> tuple[Tensor, ...]:
        """Queries, keys and values, (num_tokens, heads, head_dim), as views of one tensor as in a layer."""
        merged = random(num_tokens, heads + 2 * key_heads, head_dim)
        return merged.tensor_split((-2 * key_heads, -key_heads), dim=1)

    weight, angles = random(head_dim), random(NUM_CHECKED_ROWS, head_dim // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    for part in heads_of(NUM_CHECKED_ROWS)[:2]:
        first, second = F.rms_norm(part.float(), (head_dim,), weight.float(), EPSILON).chunk(2, dim=-1)
        swapped = torch.cat([-second, first], dim=-1)
        exact = torch.cat([first, second], dim=-1) * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)
        triton_kernels.norm_rotate_(part, weight, cos, sin, EPSILON)
        compare("norm_rotate", part, exact)

    gate_up = random(NUM_CHECKED_ROWS, 2 * inner)
    gate, up = gate_up.float().chunk(2, dim=-1)
    compare("silu_mul", triton_kernels.silu_mul(gate_up), F.silu(gate) * up)
    if fp8:
        for rows in (residual, up):  # both widths
            steps, _ = quantize(rows)  # values that fp8 represents exactly, so that rounding does not matter
            exact = steps.float() / 2.0 ** (torch.arange(len(rows), device=device) % 9).unsqueeze(1)
            values, scale = triton_kernels.quantize_rows(exact.to(dtype), FP8)
            compare("quantize_rows", values.float() * scale, exact)

    tiles, dense = KERNELS["cuda-tiles"], KERNELS["dense"]
    by_head = [part.transpose(0, 1).unsqueeze(0) for part in heads_of(batch.num_tokens)]
    for last_tokens_only in (False, True):
        if last_tokens_only:
            by_head[0] = by_head[0][:, :, batch.last_token_index.to(device)].contiguous()
        ours, exact = (
            row.attend(q, k, v, layout_to(row.layout(batch, last_tokens_only), device), head_dim**-0.5)
            for row, (q, k, v) in ((tiles, by_head), (dense, [part.float() for part in by_head]))
        )
        compare("attend_tiles", ours, exact)
    return differences


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
