"""Carry out a load plan: LoadPlan -> Engine and ModelInfo."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from local_rerank.checkpoints.download import silence_telemetry
from local_rerank.checkpoints.find import Checkpoint
from local_rerank.checkpoints.free_space import gigabytes, require_temporary_folder
from local_rerank.checkpoints.tensors import positive_label
from local_rerank.engine.cpu import prepare as cpu
from local_rerank.engine.cpu.attention import cpu_tiles_layout
from local_rerank.engine.cpu.process_setup import keep_freed_memory
from local_rerank.engine.cpu.threads import Threads
from local_rerank.engine.cuda import prepare as cuda
from local_rerank.engine.decoder import ATTENTION_NAME, Decoder, TransformersDecoder, register_attention
from local_rerank.engine.dtypes import name_of
from local_rerank.engine.encoder import Encoder, encoder_head, pack_segments
from local_rerank.engine.engine import Engine
from local_rerank.engine.kernel_table import KERNELS, KernelRow
from local_rerank.engine.out_of_memory import address_space_limit, available_bytes, release_cached, unless_out_of_memory
from local_rerank.engine.packing import pack
from local_rerank.engine.plan import LoadPlan
from local_rerank.engine.qwen3 import read_qwen3
from local_rerank.engine.stored_weights import model_config, stored_weights
from local_rerank.errors import CheckpointError, ConfigError
from local_rerank.requests.pair import Pair
from local_rerank.types import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

DECODERS: dict[str, Callable[[Any, LoadPlan], Decoder]] = {
    "transformers": lambda model, plan: TransformersDecoder(model.model),
    "cpu": cpu.prepare,
    "cuda": cuda.prepare,
    "encoder": cpu.prepare_encoder,
}
"""How to make a plan's decoder from a model."""


def load(
    plan: LoadPlan, answer_ids: tuple[int, int] | None, *, known: Callable[[], list[Pair]]
) -> tuple[Engine, ModelInfo]:
    """Load the weights and prepare them as planned. Raises CheckpointError, or ConfigError if memory runs out.

    `answer_ids`: the ids of "yes" and "no"; None for an encoder.
    `known`: makes pairs with known answers, relevant and irrelevant in turn; int8 leaves those layers in fp32 whose
    quantization changes the scores of these pairs too much.
    """
    loaded = unless_out_of_memory(lambda: _load(plan, answer_ids, known))
    if loaded is None:
        raise ConfigError(_does_not_fit(plan))
    return loaded


def _load(
    plan: LoadPlan, answer_ids: tuple[int, int] | None, known: Callable[[], list[Pair]]
) -> tuple[Engine, ModelInfo]:
    start = time.perf_counter()
    config, checkpoint = plan.config, plan.checkpoint
    logger.info("Loading %s. %s", checkpoint.model_id, plan)
    follows_load = plan.decoder in ("cpu", "encoder") and plan.device.type == "cpu" and not config.deterministic
    threads = Threads.choose(config.threads, is_fixed=not follows_load)
    threads.begin_batch()
    cuda.keep_sums_in_fp32(plan)
    model: Any = read_qwen3(checkpoint, plan.weights) if plan.decoder == "cpu" else None
    if model is None:
        model = load_model(checkpoint, dtype=plan.weights, device=plan.device, device_map=config.device_map)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    device = entry_device(model)
    if answer_ids is not None:
        head = head_rows(model, checkpoint, yes_id=answer_ids[0], no_id=answer_ids[1])
    decoder = DECODERS[plan.decoder](model, plan)
    if isinstance(decoder, Encoder):
        head = encoder_head(decoder.parts.classifier, checkpoint)
    max_batch_tokens = plan.max_batch_tokens
    if plan.fits_memory:
        max_batch_tokens = cuda.token_budget(model, plan.device, at_most=max_batch_tokens, graphs=plan.cuda_graphs)
    if follows_load:
        threads.watch(decoder.layers[:-1])
    engine = Engine(
        decoder,
        head,
        kernel=kernel_of(plan),
        device=device,
        threads=threads,
        max_graph_tokens=max_batch_tokens if plan.cuda_graphs else None,
        pack=pack_segments if plan.decoder == "encoder" else pack,
    )
    engine.capture_graphs()
    reasons = {**plan.reasons, "threads": threads.reason}
    has_graphs = engine.graphs is not None and bool(engine.graphs.sizes)
    if plan.cuda_graphs and not has_graphs:
        reasons["cuda_graphs"] = "none could be captured, as the log says"
    unquantized = cpu.quantize(engine, plan, num_parameters, known) if plan.quantization == "int8" else []
    if plan.device.type == "cpu":
        keep_freed_memory()
    return engine, ModelInfo(
        model_id=checkpoint.model_id,
        source=checkpoint.source,
        revision=checkpoint.revision,
        device=str(plan.device),
        dtype=plan.quantization or name_of(plan.weights),
        compute_dtype=plan.quantization or name_of(plan.arithmetic),
        decoder=plan.decoder,
        kernel=plan.kernel,
        threads=threads.count,
        reasons=reasons,
        num_parameters=num_parameters,
        num_layers=len(decoder.layers),
        hidden_size=checkpoint.config["hidden_size"],
        max_length=min(config.max_length, checkpoint.max_length),
        max_batch_tokens=max_batch_tokens,
        load_seconds=time.perf_counter() - start,
        unquantized=tuple(unquantized),
        products=plan.products,
        cuda_graphs=has_graphs,
        recipe=plan.recipe,
    )


def _does_not_fit(plan: LoadPlan) -> str:
    """What the weights need, what is free now that the failed load is forgotten, and what to do."""
    gc.collect()  # an error may be part of a cycle, and refers to the tensors
    release_cached()
    checkpoint, on_gpu = plan.checkpoint, plan.device.type == "cuda"
    # a process that has not used the GPU may not even have room to ask
    free = unless_out_of_memory(lambda: available_bytes(plan.device)) or 0
    needed = checkpoint.num_parameters * plan.weights.itemsize
    remedies = ["free memory there"] if on_gpu else ["free memory"]
    if not on_gpu and address_space_limit() is not None:
        remedies.append("raise the limit of this process (ulimit -v)")
    remedies.append("use a smaller model")
    if plan.weights == torch.float32 and not checkpoint.needs_fp32:
        remedies.append("set dtype to bf16 or fp16")
    if on_gpu:  # fp8 is no remedy, because it quantizes what was read
        can_spread = not checkpoint.recipe.is_encoder and plan.quantization is None and plan.config.device_map is None
        remedies += ["set device_map to auto, which leaves layers in RAM"] * can_spread + ["set device to cpu"]
    what = f"its weights take {gigabytes(needed)} in {name_of(plan.weights)}, and {gigabytes(free)} are free"
    advice = f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
    return f"out of memory while loading {checkpoint.model_id} on {plan.device}: {what}; {advice}"


def load_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, device_map: str | None = None
) -> PreTrainedModel:
    """The transformers model in evaluation mode, with our attention; raises CheckpointError."""
    silence_telemetry()
    require_temporary_folder()
    import transformers

    register_attention()
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its report of tied keys misleads
    if checkpoint.source == "embedded" or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # its loading threads save no time, and their thread pools may slow down libgomp (see `compute_thread.py`)
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
    model_class = getattr(transformers, checkpoint.architecture)
    # Tensors of the files' dtype are mapped, but converted ones would all be in RAM until the model is moved. Those
    # that transformers moves share one block of GPU memory, from which torch cannot return what fp8 frees.
    converts = checkpoint.stored_dtype != str(dtype).removeprefix("torch.")
    moves_each = device_map is None and device.type == "cuda" and converts
    try:
        offload_folder = None if device_map is None else tempfile.mkdtemp(prefix="local-rerank-offload-")
        with stored_weights(checkpoint, dtype) as weights:
            model, report = model_class.from_pretrained(
                None,  # given a folder, transformers picks the files, and puts an adapter on top
                config=model_config(checkpoint),
                state_dict=weights,
                dtype=dtype,
                device_map=device if moves_each else device_map,
                offload_folder=offload_folder,
                attn_implementation=ATTENTION_NAME,
                output_loading_info=True,
            )
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers, safetensors or torch raise on a broken folder
        raise CheckpointError(f"{checkpoint.folder} cannot be loaded: {' '.join(str(error).split())}") from error
    if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])}):
        what = f"{checkpoint.folder} has other weights than {checkpoint.architecture}"
        raise CheckpointError(f"{what}: {', '.join(wrong[:5])} ({len(wrong)} in all)")
    if offload_folder is not None:
        weakref.finalize(model.model, shutil.rmtree, offload_folder, ignore_errors=True)
    return (model if device_map else model.to(device)).eval()  # type: ignore[no-any-return]  # transformers is untyped


def head_rows(model: Any, checkpoint: Checkpoint, *, yes_id: int, no_id: int) -> Tensor:
    """The head's rows of "no" and "yes", (2, hidden_size) fp32. A classifier's single row is their difference."""
    head = getattr(model, "score", None)
    if head is None:
        head = model.get_output_embeddings()
        num_rows = head.weight.shape[0]
        if max(yes_id, no_id) >= num_rows:
            raise CheckpointError(
                f"the head of {checkpoint.folder} has {num_rows} rows; token ids {no_id} and {yes_id} have none"
            )
        with _weights_present(head):
            return head.weight.detach()[[no_id, yes_id]].float()  # type: ignore[no-any-return]  # transformers is untyped
    with _weights_present(head):
        rows = head.weight.detach().float()
    if rows.shape[0] == 1:
        return torch.cat([torch.zeros_like(rows), rows])
    yes_row = positive_label(checkpoint.folder, checkpoint.config)
    return rows[[1 - yes_row, yes_row]]  # type: ignore[no-any-return]  # likewise


def entry_device(model: PreTrainedModel) -> torch.device:
    """The device that token ids must be on: the embeddings', even if accelerate keeps their weights elsewhere."""
    embeddings: Any = model.get_input_embeddings()
    device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device(embeddings.weight.device if device is None else device)


def _weights_present(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which the module has its weights, even if accelerate offloads them."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    context: AbstractContextManager[None] = align_module_device(module)
    return context


def kernel_of(plan: LoadPlan) -> KernelRow:
    """The plan's row. CPU tiles are padded if oneDNN multiplies them."""
    row = KERNELS[plan.kernel]
    if plan.kernel != "cpu-tiles":
        return row
    return replace(row, layout=partial(cpu_tiles_layout, pads=plan.pads_attention))
