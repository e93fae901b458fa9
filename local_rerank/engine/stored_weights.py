"""Read a checkpoint's weights: its safetensors files -> tensors by name, block-FP8 weights dequantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from local_rerank.checkpoints.encoder_tensors import UNREAD
from local_rerank.checkpoints.find import Checkpoint
from local_rerank.checkpoints.model_config import for_transformers
from local_rerank.checkpoints.tensors import ACTIVATION_SCALES, SCALE
from local_rerank.errors import CheckpointError

DEFAULT_BLOCK = (128, 128)  # of transformers, if config.json has no weight_block_size


def model_config(checkpoint: Checkpoint) -> Any:
    """transformers' config of the model as we load it. Raises CheckpointError."""
    import transformers  # not at the top: telemetry is switched off before its first import

    config_class = getattr(transformers, checkpoint.architecture).config_class
    try:
        return config_class(**for_transformers(checkpoint.config))
    except Exception as error:  # whatever transformers raises, such as KeyError for a missing factor of a rope_type
        what = f"{checkpoint.folder / 'config.json'} is refused by transformers"
        raise CheckpointError(f"{what}: {' '.join(str(error).split())}") from error


@contextmanager
def stored_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The weights by name, as safetensors' slices, which are read when indexed, or as tensors of `dtype`.

    Valid within the block. The files are those that `checkpoints/files.py` names, and no others.
    Raises CheckpointError.
    """
    with ExitStack() as files:
        slices: dict[str, Any] = {}
        for name in checkpoint.weights:
            path = checkpoint.folder / name
            try:
                file = files.enter_context(safe_open(path, framework="pt"))
                slices |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
            except SafetensorError as error:  # it checks each offset, we only the last
                raise CheckpointError(f"{path} is damaged: {error}; copy or download it again") from error
        scales = {key.removesuffix(SCALE): slices.pop(key) for key in list(slices) if key.endswith(SCALE)}
        slices = {
            key: value
            for key, value in slices.items()
            if not (key.endswith(ACTIVATION_SCALES) or UNREAD.fullmatch(key))
        }
        block = (checkpoint.config.get("quantization_config") or {}).get("weight_block_size", DEFAULT_BLOCK)
        for key, scale in scales.items():
            try:
                slices[key] = dequantized(slices[key][...], scale[...], block, key).to(dtype)
            except (RuntimeError, ValueError) as error:  # of shapes that do not fit
                raise CheckpointError(f"{checkpoint.folder} has scales that do not fit {key}: {error}") from error
        yield slices


def dequantized(weight: Tensor, scale: Tensor, block: Sequence[int] | None, name: str) -> Tensor:
    """An FP8 weight, (rows, columns), in fp32.

    `scale`: one per `block` of rows and columns; without `block` one for all, or one per row.
    """
    wide, scale = weight.float(), scale.float()
    if block is not None:
        shape = tuple(-(-size // length) for size, length in zip(wide.shape, block, strict=True))
        if scale.shape != shape:
            what = f"{name} has scales in shape {tuple(scale.shape)}; blocks of {list(block)} need {shape}"
            raise CheckpointError(f"{what}: weight_block_size in config.json does not belong to the weights")
        for axis, length in enumerate(block):
            scale = scale.repeat_interleave(length, dim=axis).narrow(axis, 0, wide.shape[axis])
    return wide.mul_(scale if scale.ndim == 2 else scale.reshape(-1, 1))
