"""Holds the model: PackedBatch -> log-odds. One thread at a time may call `forward`.

All but the last decoder layer run through transformers' own forward, with our attention plugged in. The last layer is
driven by hand, because there only each document's last token needs a query, an output projection and an MLP. A GPU in
half precision has a decoder of its own for all of that (`cuda_layers.py`). The head is two rows, "yes" and "no",
multiplied in fp32: the logits over the vocabulary are never formed.

On a GPU nothing inside a forward pass waits for the device: layouts are built on the host and go there through pinned
memory, and the scores are fetched once, at the end. `launch` returns before, so that the next batch can follow at once.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from local_rerank import forks
from local_rerank.checkpoints.download import silence_telemetry
from local_rerank.checkpoints.find import ATTENTION_NAME, Checkpoint, load_model
from local_rerank.config import EngineConfig
from local_rerank.engine.cpu import prepare as cpu
from local_rerank.engine.cpu.compute_thread import compute
from local_rerank.engine.cpu.int8 import Int8Linear
from local_rerank.engine.cpu.int8_search import MAX_SEARCHED_PARAMETERS, facts_of, quantize_layers
from local_rerank.engine.cpu.malloc import keep_freed_memory
from local_rerank.engine.cpu.threads import Threads
from local_rerank.engine.cuda import prepare as cuda
from local_rerank.engine.cuda.graphs import GraphRunner
from local_rerank.engine.cuda.layers import FusedDecoder
from local_rerank.engine.dtypes import QUANTIZED_DTYPES, choose_dtypes, name_of
from local_rerank.engine.kernel_table import KERNELS, KernelRow, Layout, choose_kernel, layout_to
from local_rerank.engine.out_of_memory import is_out_of_memory, release_cached
from local_rerank.engine.packing import PackedBatch, pack
from local_rerank.errors import CheckpointError, ConfigError, OutOfMemory
from local_rerank.requests.tokenization import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_BATCH_TOKENS = 2560
GPU_BATCH_TOKENS = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What was loaded, and what was chosen for it."""

    model_id: str
    source: str  # embedded, folder, bundle or hub
    revision: str | None
    device: str
    dtype: str  # of the weights
    compute_dtype: str  # of the matrix products
    kernel: str
    kernel_reason: str
    threads: int
    threads_reason: str  # what decided their number
    num_parameters: int
    num_layers: int
    hidden_size: int
    max_length: int  # tokens of a prompt
    max_batch_tokens: int
    load_seconds: float
    unquantized: tuple[str, ...] = ()  # with int8: linear layers that stay in fp32, because int8 would spoil the scores
    products: tuple[str, ...] = ()  # on a CPU: the kernels that multiply matrices, by their names in `products.py`


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """What travels through transformers' forward to our attention function."""

    row: KernelRow
    layout: Layout
    moved: dict[torch.device, Layout] = field(default_factory=dict)

    def layout_on(self, device: torch.device) -> Layout:
        """The layout on a layer's device: copied once for each, where a model is spread over several."""
        if device not in self.moved:
            self.moved[device] = layout_to(self.layout, device)
        return self.moved[device]


class Engine:
    """A loaded model that scores packed batches."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: Tensor,
        *,
        kernel: KernelRow,
        device: torch.device,
        graph_tokens: int | None = None,
        threads: Threads | None = None,
    ) -> None:
        """`head`: (2, hidden_size) fp32, the rows of "no" and "yes"; `device`: where batches enter the model.

        `graph_tokens`: batches up to so many run as CUDA graphs; the decoder must be fused then and the kernel's layout
        that of tiles.
        """
        self._backbone: Any = model.model
        self._head = head
        self._kernel = kernel
        self._device = device
        self._threads = threads
        self._last_layer: Any = self._backbone.layers[-1]
        self._final_norm: nn.Module = self._backbone.norm
        self._is_fused = isinstance(self._backbone, FusedDecoder)
        if not self._is_fused:
            # transformers' forward ends with the final norm; ours comes after the last layer
            self._backbone.norm = nn.Identity()
            self._backbone.config.num_hidden_layers = len(self._backbone.layers) - 1
            if threads is not None:
                threads.watch(self._backbone.layers[:-1])
        self._graphs = None if graph_tokens is None else GraphRunner(self._odds_of, device, max_tokens=graph_tokens)

    @property
    def weights_dtype(self) -> str:
        """Precision of the weights that are there, whatever was asked for."""
        if any(isinstance(module, Int8Linear) for module in self._backbone.modules()):
            return "int8"
        layer = self._last_layer if self._is_fused else self._last_layer.mlp
        return name_of(layer.down_proj.weight.dtype)

    @property
    def weights(self) -> dict[str, Tensor]:
        """All that a score is computed with, by name."""
        backbone: dict[str, Tensor] = self._backbone.state_dict()
        return backbone | self._final_norm.state_dict(prefix="final_norm.") | {"head": self._head}

    def with_kernel(self, kernel: KernelRow) -> Engine:
        """The same model behind another kernel and without graphs."""
        other = copy.copy(self)
        other._kernel, other._graphs = kernel, None
        return other

    def forward(self, batch: PackedBatch) -> Tensor:
        """Log-odds of "yes" over "no", (num_pairs,) fp32 on the CPU, in the order of the pairs that were packed.

        Any thread may call it. Raises OutOfMemory where the device has no room for the batch; what it had taken is free
        again by then.
        """
        return compute(lambda: self._compute(batch)) if self._device.type == "cpu" else self.launch(batch)()

    def _compute(self, batch: PackedBatch) -> Tensor:
        """As `forward`, in the thread that computes on the CPU."""
        if self._threads is not None:
            self._threads.begin_batch()
        return self.launch(batch)()

    def launch(self, batch: PackedBatch) -> Callable[[], Tensor]:
        """Starts a forward pass; what is returned waits for its log-odds, as `forward` gives them.

        A GPU works on meanwhile; elsewhere the pass is done by then. Where memory runs out and graphs hold some,
        they are let go and the pass is tried once more. Raises OutOfMemory.
        """
        if (wait := self._launch_if_it_fits(batch)) is not None:
            return wait
        if self._graphs is not None and self._graphs.forget_all():
            release_cached()
            if (wait := self._launch_if_it_fits(batch)) is not None:
                self._graphs.halve()  # theirs was what lacked
                return wait
        raise OutOfMemory(num_tokens=batch.num_tokens)

    def _launch_if_it_fits(self, batch: PackedBatch) -> Callable[[], Tensor] | None:
        try:
            with torch.inference_mode(), self._on_device():
                return self._launch(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        release_cached()  # out here nothing holds the failed pass's tensors any more
        return None

    def capture_largest_graph(self) -> None:
        """Where batches run as graphs: before the first of them, which would wait for it."""
        if self._graphs is not None:
            with torch.inference_mode(), self._on_device():
                self._graphs.capture_largest()

    def _launch(self, batch: PackedBatch) -> Callable[[], Tensor]:
        odds = self._odds(batch)
        on_host = torch.empty(odds.shape, dtype=odds.dtype, pin_memory=odds.is_cuda)
        on_host.copy_(odds, non_blocking=odds.is_cuda)  # elsewhere nothing would say when it is done
        done = torch.cuda.Event() if odds.is_cuda else None  # type: ignore[no-untyped-call]
        if done is not None:
            done.record(torch.cuda.current_stream(odds.device))  # of the last layer, where a model is spread

        def wait() -> Tensor:
            if done is not None:
                done.synchronize()  # the one place that waits for the device
            return torch.empty_like(on_host).scatter_(0, batch.pair_order, on_host)

        return wait

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _odds(self, batch: PackedBatch) -> Tensor:
        """(num_pairs,) fp32 in packed order, on the device of the last layer."""
        if self._graphs is not None and (odds := self._graphs.run(batch)) is not None:
            return odds
        # the last layer's layout is built while a GPU works on the layers before
        return self._odds_of(
            batch.to(self._device), self._kernel.layout(batch, False), lambda: self._kernel.layout(batch, True)
        )

    def _odds_of(self, batch: PackedBatch, layout: Layout, last_layout: Callable[[], Layout]) -> Tensor:
        """As `_odds`, of a batch on the device."""
        if self._is_fused:
            to_device = partial(layout_to, device=self._device)
            last = self._backbone(batch, self._kernel.attend, to_device(layout), lambda: to_device(last_layout()))
        else:
            last = self._run_last_layer(self._run_layers(batch, layout), batch, last_layout())
        logits = last.float() @ self._head.T.to(last.device)  # (num_pairs, 2)
        odds: Tensor = logits[:, 1] - logits[:, 0]
        return odds

    def _run_layers(self, batch: PackedBatch, layout: Layout) -> Tensor:
        """All but the last layer: (1, num_tokens, hidden_size)."""
        hidden: Tensor = self._backbone(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask={"full_attention": None},  # a dict keeps transformers from building masks
            use_cache=False,
            packed_attention=PackedAttention(self._kernel, layout),
        ).last_hidden_state
        return hidden

    def _run_last_layer(self, hidden: Tensor, batch: PackedBatch, layout: Layout) -> Tensor:
        """transformers' decoder layer, step by step, and the final norm, for the last tokens: (num_pairs, hidden).

        Only they have a query, which is what `layout` must say too.
        """
        layer, attention = self._last_layer, self._last_layer.self_attn
        x = layer.input_layernorm(hidden)  # where accelerate spread the model, on the device of this layer
        hidden = hidden.to(x.device)
        last = batch.last_token_index.to(x.device)
        rotation = self._backbone.rotary_emb(hidden, batch.position_ids.to(x.device))
        cos, sin = (part.to(x.device) for part in rotation)  # (1, num_tokens, head_dim)
        heads = (1, -1, attention.head_dim)
        q = attention.q_norm(attention.q_proj(x[:, last]).unflatten(-1, heads[1:])).transpose(1, 2)
        k = attention.k_norm(attention.k_proj(x).unflatten(-1, heads[1:])).transpose(1, 2)
        v = attention.v_proj(x).unflatten(-1, heads[1:]).transpose(1, 2)
        q = _rotate(q, cos[:, last], sin[:, last])
        k = _rotate(k, cos, sin)
        out = self._kernel.attend(q, k, v, layout_to(layout, q.device), attention.scaling)
        hidden = hidden[:, last] + attention.o_proj(out.flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        normed: Tensor = self._final_norm(hidden)[0]
        return normed


def load_engine(
    config: EngineConfig, checkpoint: Checkpoint, *, yes_id: int, no_id: int, known: Callable[[], list[Pair]]
) -> tuple[Engine, ModelInfo]:
    """Load the checkpoint's weights; raises CheckpointError or ConfigError.

    `known`: pairs whose scores tell int8 which layers it would spoil, a relevant and an irrelevant one in turn.
    """
    start = time.perf_counter()
    _register_attention()
    device = choose_device(config.device)
    follows_load = device.type == "cpu" and config.device_map is None and not config.deterministic
    threads = Threads.choose(config.threads, is_fixed=not follows_load)
    threads.begin_batch()
    weights, arithmetic = choose_dtypes(config, checkpoint, device)
    if config.dtype == "fp8":
        cuda.check_fp8(config, device)
    cpu.check(config, device, arithmetic)
    kernel, reason = choose_kernel(config.attention, device, arithmetic)
    model = load_model(checkpoint, dtype=weights, device=device, device_map=config.device_map)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_layers = model.config.num_hidden_layers
    head = _head_rows(model, checkpoint, yes_id=yes_id, no_id=no_id)
    first_device = _entry_device(model)
    products: tuple[str, ...] = ()
    if device.type == "cuda" and not cuda.prepare(model, config, device) and config.attention == "auto":
        kernel, reason = choose_kernel("auto", device, arithmetic, compiled=False)
    if device.type == "cpu" and config.device_map is None:
        products = cpu.prepare(model, config, checkpoint, weights, arithmetic, _packed_attention)
    graphs = cuda.uses_graphs(config, KERNELS[kernel], model.model)
    # by the memory that is free now
    max_batch_tokens = config.max_batch_tokens or _default_budget(model, device, graphs=graphs)
    graph_tokens = max_batch_tokens if graphs else None
    engine = Engine(
        model, head, kernel=KERNELS[kernel], device=first_device, graph_tokens=graph_tokens, threads=threads
    )
    engine.capture_largest_graph()
    unquantized = []
    if config.dtype == "int8":
        unquantized = _quantize(engine, num_parameters, known, cpu.choices(config, checkpoint, kernel))
    if device.type == "cpu":
        keep_freed_memory()
    info = ModelInfo(
        model_id=checkpoint.model_id,
        source=checkpoint.source,
        revision=checkpoint.revision,
        device=str(device),
        dtype=config.dtype if config.dtype in QUANTIZED_DTYPES else name_of(weights),
        compute_dtype=config.dtype if config.dtype in QUANTIZED_DTYPES else name_of(arithmetic),
        kernel=kernel,
        kernel_reason=reason,
        threads=threads.count,
        threads_reason=threads.reason,
        num_parameters=num_parameters,
        num_layers=num_layers,
        hidden_size=model.config.hidden_size,
        max_length=min(config.max_length, checkpoint.max_length),
        max_batch_tokens=max_batch_tokens,
        load_seconds=time.perf_counter() - start,
        unquantized=tuple(unquantized),
        products=products,
    )
    return engine, info


def _quantize(
    engine: Engine, num_parameters: int, known: Callable[[], list[Pair]], choices: dict[str, Any]
) -> list[str]:
    """Decoder layers to int8; the names of the linear layers that stay. `choices`: see `cpu.choices`."""
    layers = engine._backbone.layers
    if num_parameters > MAX_SEARCHED_PARAMETERS:
        return quantize_layers(layers)
    batch = pack(known())
    facts = facts_of(engine.weights, batch.input_ids, **choices)
    return quantize_layers(layers, lambda: engine.forward(batch), facts)


def _default_budget(model: PreTrainedModel, device: torch.device, *, graphs: bool) -> int:
    if device.type == "cuda":
        return cuda.token_budget(model, device, at_most=GPU_BATCH_TOKENS, graphs=graphs)
    return CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS


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


def _head_rows(model: PreTrainedModel, checkpoint: Checkpoint, *, yes_id: int, no_id: int) -> Tensor:
    """The rows of "no" and "yes", (2, hidden_size) fp32; a one-row classifier is their difference."""
    head = getattr(model, "score", None)
    if head is None:
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers is untyped
        num_rows = head.weight.shape[0]
        if max(yes_id, no_id) >= num_rows:
            raise CheckpointError(f"the head of {checkpoint.folder} has {num_rows} rows; no row for yes and no")
        with _weights_present(head):
            return head.weight.detach()[[no_id, yes_id]].float()  # type: ignore[no-any-return]  # likewise
    with _weights_present(head):
        rows = head.weight.detach().float()
    if rows.shape[0] == 1:
        return torch.cat([torch.zeros_like(rows), rows])
    if rows.shape[0] != 2:
        raise CheckpointError(
            f"the classifier of {checkpoint.folder} has {rows.shape[0]} labels; 1 or 2 are understood"
        )
    return rows  # type: ignore[no-any-return]  # transformers is untyped


def _weights_present(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, a module has its weights, wherever accelerate keeps them; loads accelerate only where it was used."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    context: AbstractContextManager[None] = align_module_device(module)
    return context


def _entry_device(model: PreTrainedModel) -> torch.device:
    """Where token ids enter: at the embeddings, whose weights accelerate may keep elsewhere."""
    embeddings: Any = model.get_input_embeddings()
    device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device(embeddings.weight.device if device is None else device)


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
    forks.between_layers()
    layout = packed_attention.layout_on(key.device)
    return packed_attention.row.attend(query, key, value, layout, scaling), None


def _register_attention() -> None:
    silence_telemetry()
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _packed_attention)
