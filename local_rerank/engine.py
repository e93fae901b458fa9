"""Holds the model: PackedBatch -> log-odds. One thread at a time may call `forward`.

All but the last decoder layer run through transformers' own forward, with our attention plugged in. The last layer is
driven by hand, because there only each document's last token needs a query, an output projection and an MLP. The head
is two rows, "yes" and "no", multiplied in fp32: the logits over the vocabulary are never formed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from local_rerank.attention import KERNELS, KernelRow, Layout, choose_kernel
from local_rerank.config import EngineConfig
from local_rerank.cpu_layers import replace_layers
from local_rerank.download import silence_telemetry
from local_rerank.errors import CheckpointError, ConfigError
from local_rerank.int8 import quantize_layers
from local_rerank.models import ATTENTION_NAME, Checkpoint, load_model
from local_rerank.packing import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What was loaded, and what was chosen for it."""

    model_id: str
    source: str  # embedded, folder, bundle or hub
    revision: str | None
    device: str
    dtype: str
    kernel: str
    kernel_reason: str
    threads: int
    num_parameters: int
    num_layers: int
    hidden_size: int
    max_length: int  # tokens of a prompt
    max_batch_tokens: int
    load_seconds: float


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """What travels through transformers' forward to our attention function."""

    row: KernelRow
    layout: Layout


class Engine:
    """A loaded model that scores packed batches."""

    def __init__(self, model: PreTrainedModel, head: Tensor, *, kernel: KernelRow, device: torch.device) -> None:
        """`head`: (2, hidden_size) fp32, the rows of "no" and "yes"; `device`: where batches enter the model."""
        self._backbone: Any = model.model
        self._head = head
        self._kernel = kernel
        self._device = device
        self._last_layer: Any = self._backbone.layers[-1]
        self._final_norm: nn.Module = self._backbone.norm
        # transformers' forward ends with the final norm; ours comes after the last layer
        self._backbone.norm = nn.Identity()
        self._backbone.config.num_hidden_layers = len(self._backbone.layers) - 1

    @property
    def weights_dtype(self) -> str:
        """Precision of the weights that are there, whatever was asked for."""
        dtype = self._last_layer.mlp.down_proj.weight.dtype
        names = _DTYPES | {"int8": torch.int8}
        return next((name for name, value in names.items() if value == dtype), str(dtype))

    @torch.inference_mode()
    def forward(self, batch: PackedBatch) -> Tensor:
        """Log-odds of "yes" over "no", (num_pairs,) fp32 on the CPU, in the order of the pairs that were packed."""
        on_device = batch.to(self._device)
        hidden = self._backbone(
            input_ids=on_device.input_ids,
            position_ids=on_device.position_ids,
            attention_mask={"full_attention": None},  # a dict keeps transformers from building masks
            use_cache=False,
            packed_attention=PackedAttention(self._kernel, self._kernel.layout(on_device, False)),
        ).last_hidden_state  # (1, num_tokens, hidden_size)
        last = self._final_norm(self._run_last_layer(hidden, on_device))[0]  # (num_pairs, hidden_size)
        logits = last.float() @ self._head.T.to(last.device)  # (num_pairs, 2)
        packed = (logits[:, 1] - logits[:, 0]).cpu()
        return torch.empty_like(packed).scatter_(0, batch.pair_order, packed)

    def _run_last_layer(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """The decoder layer of transformers, step by step, for the last tokens: (1, num_pairs, hidden_size)."""
        layer, attention = self._last_layer, self._last_layer.self_attn
        hidden = hidden.to(layer.input_layernorm.weight.device)
        last = batch.last_token_index.to(hidden.device)
        cos, sin = self._backbone.rotary_emb(hidden, batch.position_ids.to(hidden.device))  # (1, num_tokens, head_dim)
        x = layer.input_layernorm(hidden)
        heads = (1, -1, attention.head_dim)
        q = attention.q_norm(attention.q_proj(x[:, last]).unflatten(-1, heads[1:])).transpose(1, 2)
        k = attention.k_norm(attention.k_proj(x).unflatten(-1, heads[1:])).transpose(1, 2)
        v = attention.v_proj(x).unflatten(-1, heads[1:]).transpose(1, 2)
        q = _rotate(q, cos[:, last], sin[:, last])
        k = _rotate(k, cos, sin)
        out = self._kernel.attend(q, k, v, self._kernel.layout(batch, True), attention.scaling)
        hidden = hidden[:, last] + attention.o_proj(out.flatten(2))
        result: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return result


def load_engine(config: EngineConfig, checkpoint: Checkpoint, *, yes_id: int, no_id: int) -> tuple[Engine, ModelInfo]:
    """Load the checkpoint's weights; raises CheckpointError or ConfigError."""
    start = time.perf_counter()
    _register_attention()
    device = choose_device(config.device)
    dtype = choose_dtype("fp32" if config.dtype == "auto" and checkpoint.needs_fp32 else config.dtype, device)
    if config.dtype == "int8" and (device.type != "cpu" or config.device_map is not None):
        raise ConfigError(f"dtype int8 runs on a CPU; the device is {config.device_map or device}")
    kernel, reason = choose_kernel(config.attention, device, dtype)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = load_model(checkpoint, dtype=dtype, device=device, device_map=config.device_map)
    head = _head_rows(model, checkpoint, yes_id=yes_id, no_id=no_id)
    if config.dtype == "int8":
        quantize_layers(model.model.layers)
    if device.type == "cpu" and config.device_map is None:
        replace_layers(model.model, _packed_attention)
    first_device = next(model.parameters()).device  # the embeddings come first
    default_budget = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    info = ModelInfo(
        model_id=checkpoint.model_id,
        source=checkpoint.source,
        revision=checkpoint.revision,
        device=str(device),
        dtype="int8" if config.dtype == "int8" else _name(dtype),
        kernel=kernel,
        kernel_reason=reason,
        threads=torch.get_num_threads(),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=model.config.num_hidden_layers,
        hidden_size=model.config.hidden_size,
        max_length=min(config.max_length, checkpoint.max_length),
        max_batch_tokens=config.max_batch_tokens or default_budget,
        load_seconds=time.perf_counter() - start,
    )
    return Engine(model, head, kernel=KERNELS[kernel], device=first_device), info


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one; raises ConfigError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device is 'mps', but torch sees none")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of what is not quantized. `auto`: bf16 where a GPU multiplies it natively or this CPU multiplies it faster."""
    if name in _DTYPES:
        return _DTYPES[name]
    if name == "int8":
        return torch.float32
    if name != "auto":
        raise ConfigError(f"dtype is {name!r}; it must be auto, {', '.join(_DTYPES)} or int8")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_multiplies_bf16_faster() else torch.float32


@cache
def _cpu_multiplies_bf16_faster() -> bool:
    """Measured, a few milliseconds: of two CPUs with the same AVX512-BF16, Zen 4 ran bf16 2.5x as fast as fp32 and a
    Sapphire Rapids whose AMX a hypervisor hides .54x. bf16 costs exactness, so that it has to be clearly faster."""
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    fp32, bf16 = (_seconds_of_product(dtype) for dtype in (torch.float32, torch.bfloat16))
    return bf16 * 1.2 < fp32


def _seconds_of_product(dtype: torch.dtype) -> float:
    """The best of five, which is not the one in which other work had the cores."""
    x, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        nn.functional.linear(x, weight)
        times.append(time.perf_counter() - start)
    return min(times)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in _DTYPES.items() if value == dtype)


def _head_rows(model: PreTrainedModel, checkpoint: Checkpoint, *, yes_id: int, no_id: int) -> Tensor:
    """The rows of "no" and "yes", (2, hidden_size) fp32; a one-row classifier is their difference."""
    head = getattr(model, "score", None)
    if head is None:
        weight: Tensor = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]  # transformers is untyped
        if max(yes_id, no_id) >= weight.shape[0]:
            raise CheckpointError(f"the head of {checkpoint.folder} has {weight.shape[0]} rows; no row for yes and no")
        return weight.detach()[[no_id, yes_id]].float()
    rows = head.weight.detach().float()
    if rows.shape[0] == 1:
        return torch.cat([torch.zeros_like(rows), rows])
    if rows.shape[0] != 2:
        raise CheckpointError(
            f"the classifier of {checkpoint.folder} has {rows.shape[0]} labels; 1 or 2 are understood"
        )
    return rows  # type: ignore[no-any-return]  # transformers is untyped


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (1, heads, tokens, head_dim) by (1, tokens, head_dim), as transformers' Qwen3 does it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed_attention: PackedAttention,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' attention modules call; see `attention.py` for the shapes."""
    return packed_attention.row.attend(query, key, value, packed_attention.layout, scaling), None


def _register_attention() -> None:
    silence_telemetry()
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _packed_attention)
