"""What a checkpoint's weights must be, checked by the headers of its safetensors files, without reading weights."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_rerank.checkpoints.encoder_tensors import ENCODER_SHAPES, UNREAD
from local_rerank.checkpoints.files import require_kind
from local_rerank.checkpoints.model_config import DEFAULT_HEAD_DIM
from local_rerank.errors import CheckpointError

HEAD, EMBEDDINGS, CLASSIFIER = "lm_head.weight", "model.embed_tokens.weight", "score.weight"
SCALE = "_scale_inv"  # suffix of the tensor with the scales of a block-FP8 weight
ACTIVATION_SCALES = (".activation_scale", ".input_scale")  # of a block-FP8 layer; a dequantized layer needs none
_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")
_QUANTIZED = re.compile(r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_\w+|weight_(packed|scale|shape|format))")
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_UNQUANTIZED = (
    "use the checkpoint it was made from, in bf16, fp16 or fp32; --dtype int8 and --dtype fp8 quantize that when loaded"
)
_POSITIVE_OF = {  # labels without case, spaces, "_" and "-"
    "no": "yes",
    "false": "true",
    "0": "1",
    "label0": "label1",
    "irrelevant": "relevant",
    "notrelevant": "relevant",
    "nonrelevant": "relevant",
    "negative": "positive",
}
"""The positive label of each known negative one."""
_UNNAMED = {0: "label0", 1: "label1"}  # transformers' default, which says nothing beside other labels


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in the header of a safetensors file."""

    file: str
    dtype: str  # safetensors' name, such as BF16
    shape: tuple[int, ...]


def check_tensors(folder: Path, files: Iterable[str], config: dict[str, Any], architecture: str) -> None:
    """Raise CheckpointError unless the files have exactly the tensors that the architecture takes."""
    _refuse_quantized(folder, config)
    stored = stored_tensors(folder, files)
    expected = _expected_shapes(folder, config, architecture)
    found = {full_name(name, expected): name for name in stored}
    if twice := [name for name in stored if found[full_name(name, expected)] != name]:
        raise CheckpointError(f"{folder} has weights twice, with and without the prefix model: {_some(twice)}")
    is_tied = bool(config.get("tie_word_embeddings", False)) and HEAD in expected
    unknown = [
        name
        for full, name in found.items()
        if full not in expected and not _is_scale(full, found, stored) and not UNREAD.fullmatch(name)
    ]
    if unknown:
        quantized = any(map(_QUANTIZED.search, unknown))
        what = f"they are quantized; {_UNQUANTIZED}" if quantized else "use the config.json that belongs to the weights"
        raise CheckpointError(f"{folder} has weights that {architecture} does not take: {_some(unknown)}; {what}")
    optional = {EMBEDDINGS if HEAD in found else HEAD} if is_tied else set()
    if missing := sorted(expected.keys() - found.keys() - optional):
        raise CheckpointError(f"{folder} lacks weights: {_some(missing)}; use the config.json that belongs to them")
    for full, name in found.items():
        if full in expected:
            _check_tensor(folder, name, stored[name], expected[full])
            if stored[name].dtype in _FP8 and _is_block_fp8(config) and full + SCALE not in found:
                raise CheckpointError(f"{folder} lacks weights: {name}{SCALE}, the scales of an FP8 weight")


def stored_tensors(folder: Path, files: Iterable[str]) -> dict[str, StoredTensor]:
    """All tensors of the files, by name. Raises CheckpointError."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _header(folder / file).items():
            if name in tensors:
                other = tensors[name].file
                raise CheckpointError(f"{folder} has {name} twice, in {other} and {file}; remove the wrong file")
            tensors[name] = tensor
    return tensors


def full_name(name: str, expected: Iterable[str]) -> str:
    """The name that the architecture gives a tensor: checkpoints may leave out the prefix "model."."""
    return f"model.{name}" if f"model.{_weight_of(name)}" in expected else name


def _weight_of(name: str) -> str:
    """The FP8 weight that a scale belongs to; any other name is returned as it is."""
    if name.endswith(ACTIVATION_SCALES):
        return f"{name.rpartition('.')[0]}.weight"
    return name.removesuffix(SCALE)


def positive_label(folder: Path, config: dict[str, Any]) -> int:
    """Which of a classifier's two labels means relevant: 0 or 1. Raises CheckpointError if the labels do not tell."""
    stated: list[dict[int, str]] = []
    by_label = [(i, label) for label, i in config.get("label2id", {}).items()]
    for by_id in (config.get("id2label", {}).items(), by_label):
        labels = {int(i): _plain(label) for i, label in by_id if str(i) in ("0", "1")}
        if labels and labels != _UNNAMED and labels not in stated:
            stated.append(labels)
    if len(stated) <= 1:
        labels = stated[0] if stated else _UNNAMED
        for negative in (0, 1):
            if _POSITIVE_OF.get(labels.get(negative, ""), "") == labels.get(1 - negative):
                return 1 - negative
    raise CheckpointError(
        f"{folder} classifies into labels that do not tell which means relevant: "
        f"id2label is {config.get('id2label')}, label2id is {config.get('label2id')}; "
        'set both in config.json, for example {"0": "no", "1": "yes"} and {"no": 0, "yes": 1}'
    )


def _num_labels(folder: Path, config: dict[str, Any]) -> int:
    """Labels of a sequence classifier, 1 or 2."""
    number = config["num_labels"]
    if number not in (1, 2):
        raise CheckpointError(f"the classifier of {folder} has {number} labels; it must have 1 or 2")
    if number == 2:
        positive_label(folder, config)
    elif any(_plain(label) in _POSITIVE_OF.keys() - {"label0", "0"} for label in config.get("id2label", {}).values()):
        raise CheckpointError(
            f"{folder} has one label, {config['id2label']}, by whose name a high score means not relevant; "
            'set it in config.json if it means relevant, for example {"0": "yes"}'
        )
    return int(number)


def _plain(label: str) -> str:
    """A label as the keys of `_POSITIVE_OF` have it."""
    return re.sub(r"[\s_-]", "", label).lower()


def _refuse_quantized(folder: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization and not _is_block_fp8(config):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        shown = method if isinstance(method, str) else "an unknown method"
        raise CheckpointError(f"{folder} is quantized with {shown[:200]}; {_UNQUANTIZED}")


def _is_block_fp8(config: dict[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "fp8"


def _is_scale(full: str, found: dict[str, str], stored: dict[str, StoredTensor]) -> bool:
    """Whether a tensor belongs to an FP8 weight, and is a number: some checkpoints store exponents as bytes."""
    weight = _weight_of(full)
    is_number = stored[found[full]].dtype in (*_FLOATS, "F8_E8M0")
    return weight != full and is_number and weight in found and stored[found[weight]].dtype in _FP8


def _check_tensor(folder: Path, name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in (*_FLOATS, *_FP8):
        raise CheckpointError(f"{folder} has {name} in {tensor.dtype}, so it is quantized; {_UNQUANTIZED}")
    if tensor.shape != shape:
        hint = "; the rows of the embeddings must be vocab_size" if name in (EMBEDDINGS, HEAD) else ""
        raise CheckpointError(
            f"{folder} has {name} in shape {_text(tensor.shape)}, but config.json says {_text(shape)}{hint}; "
            "use the config.json that belongs to the weights"
        )


def _expected_shapes(folder: Path, config: dict[str, Any], architecture: str) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint with this config.json must have."""
    if architecture in ENCODER_SHAPES:
        return ENCODER_SHAPES[architecture](config, _num_labels(folder, config))
    hidden, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim", DEFAULT_HEAD_DIM)
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDINGS: (rows, hidden), "model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        products = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        for name, shape in (products | {"o_proj": (hidden, queries)}).items():
            shapes[f"{layer}.self_attn.{name}.weight"] = shape
            if config.get("attention_bias"):
                shapes[f"{layer}.self_attn.{name}.bias"] = shape[:1]
        shapes |= {f"{layer}.self_attn.{name}.weight": (head_dim,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{layer}.mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    if architecture.endswith("ForSequenceClassification"):
        return shapes | {CLASSIFIER: (_num_labels(folder, config), hidden)}
    return shapes | {HEAD: (rows, hidden)}


def _header(file: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file says it has. Raises CheckpointError if it is none or cut off."""
    require_kind(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        num_bytes = int.from_bytes(head, "little")
        text = stream.read(num_bytes) if num_bytes <= min(size, _MAX_HEADER_BYTES) else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(file.name, str(entry["dtype"]), tuple(map(operator.index, entry["shape"])))
            for name, entry in header.items()
        }
        end = 8 + num_bytes + max((operator.index(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        is_pickle = head.startswith((b"PK\3\4", b"\x80"))  # torch.save's new and old formats
        fix = "it looks like a pickle: save the model as safetensors" if is_pickle else "copy or download it again"
        raise CheckpointError(f"{file} is not a safetensors file, or damaged; {fix}") from error
    if size != end:
        raise CheckpointError(f"{file} has {size} bytes, but {end} by its header; copy or download it again")
    return tensors


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(name[:200] for name in names[:5])} ({len(names)} in all)"


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
