"""config.json: the keys that an architecture needs, each checked. All others are dropped.

What transformers gets has only these keys, because others make it fetch or run code: `auto_map`, `_attn_implementation`
and `_experts_implementation` name repositories of code, `quantization_config` and `fusion_config` choose packages.
"""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_rerank.checkpoints.files import no_config, read_json
from local_rerank.checkpoints.recipes import ARCHITECTURES, require_no_code
from local_rerank.errors import CheckpointError
from local_rerank.types import MIN_CHUNK_TOKENS

DEFAULT_HEAD_DIM = 128  # of transformers' Qwen3Config, as all defaults here
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1000  # Qwen3-Reranker-8B has 36
MAX_NUMBER = 1e38  # of fp32
MAX_LABELS = 1000


@dataclass(frozen=True, slots=True)
class _Kind:
    """The values that a key may have."""

    allowed: str  # as in "it must be ..."
    fits: Callable[[Any], bool]


def _whole(least: int, most: int) -> _Kind:
    return _Kind(f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def _one_of(*names: str) -> _Kind:
    return _Kind(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= MAX_NUMBER


def _is_rotary(value: Any) -> bool:
    """Whether these are ModernBERT's rotary parameters by layer type, unscaled."""
    return isinstance(value, dict) and all(
        kind in _LAYER_TYPES
        and isinstance(each, dict)
        and each.get("rope_type", "default") == "default"
        and _is_positive(each.get("rope_theta"))
        for kind, each in value.items()
    )


def _are_layer_types(value: Any) -> bool:
    return isinstance(value, list) and all(each in _LAYER_TYPES for each in value)


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_SIZE.fits, value))


def _are_full(value: Any) -> bool:
    return isinstance(value, list) and all(each == "full_attention" for each in value)


def _are_named(value: Any) -> bool:
    ids = [str(id) for id in range(MAX_LABELS)]
    return isinstance(value, dict) and all(key in ids and isinstance(name, str) for key, name in value.items())


def _are_numbered(value: Any) -> bool:
    return isinstance(value, dict) and all(type(id) is int and 0 <= id < MAX_LABELS for id in value.values())


_SIZE = _whole(1, MAX_SIZE)
_NUMBER = _Kind("a positive number", _is_positive)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_TEXT = _Kind("a string", lambda value: isinstance(value, str))
_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
# longrope is left out: transformers picks its factors by the longest prompt of a batch, so that scores would depend on
# the other documents
_ROPE_TYPE = _one_of("default", "linear", "dynamic", "yarn", "llama3")

_ROPE: dict[str, _Kind] = {
    "rope_type": _ROPE_TYPE,
    "type": _ROPE_TYPE,
    "original_max_position_embeddings": _SIZE,
    "truncate": _FLAG,
    "partial_rotary_factor": _Kind("1", lambda value: type(value) in (int, float) and value == 1),
    **dict.fromkeys(
        ("rope_theta", "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
         "low_freq_factor", "high_freq_factor"),
        _NUMBER,
    ),
}  # fmt: skip
_REQUIRED = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
_FOR_TRANSFORMERS: dict[str, _Kind] = {
    **dict.fromkeys(_REQUIRED, _SIZE),
    "num_hidden_layers": _whole(1, MAX_LAYERS),
    "num_key_value_heads": _SIZE,
    "head_dim": _Kind(f"an even number from 2 to {MAX_SIZE}", lambda value: _SIZE.fits(value) and value % 2 == 0),
    "max_position_embeddings": _SIZE,
    "hidden_act": _one_of("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"),
    "rms_norm_eps": _NUMBER,
    "attention_bias": _FLAG,
    "tie_word_embeddings": _FLAG,
    "num_labels": _whole(1, MAX_LABELS),
    "rope_theta": _NUMBER,
    "rope_parameters": _OBJECT,
    "rope_scaling": _OBJECT,
}
_FOR_US: dict[str, _Kind] = {
    "id2label": _Kind("an object of labels by number", _are_named),
    "label2id": _Kind("an object of numbers by label", _are_numbered),
    "dtype": _TEXT,
    "torch_dtype": _TEXT,
    "use_sliding_window": _Kind("false: sliding-window attention is not supported", lambda value: value is False),
    "layer_types": _Kind("a list of full_attention: sliding-window attention is not supported", _are_full),
    "partial_rotary_factor": _ROPE["partial_rotary_factor"],
    "local_rerank": _OBJECT,
}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_ACTIVATION = _one_of("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
_OF_ALL_ENCODERS: dict[str, _Kind] = {
    **dict.fromkeys((*_REQUIRED, "max_position_embeddings"), _SIZE),
    "num_hidden_layers": _whole(1, MAX_LAYERS),
    "num_labels": _whole(1, MAX_LABELS),
    "pad_token_id": _whole(0, MAX_SIZE),
}
_OF_BERT = _OF_ALL_ENCODERS | {
    "type_vocab_size": _SIZE,
    "hidden_act": _ACTIVATION,
    "layer_norm_eps": _NUMBER,
    "position_embedding_type": _one_of("absolute"),
    "is_decoder": _Kind("false", lambda value: value is False),
}
_OF_ENCODERS: dict[str, dict[str, _Kind]] = {
    "BertForSequenceClassification": _OF_BERT,
    "XLMRobertaForSequenceClassification": _OF_BERT,
    "ModernBertForSequenceClassification": _OF_ALL_ENCODERS
    | {
        "hidden_activation": _ACTIVATION,
        "classifier_activation": _ACTIVATION,
        "classifier_pooling": _one_of("cls", "mean"),
        "norm_eps": _NUMBER,
        **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), _FLAG),
        "global_attn_every_n_layers": _SIZE,
        "local_attention": _SIZE,
        "global_rope_theta": _NUMBER,
        "local_rope_theta": _NUMBER,
        "layer_types": _Kind(f"a list of {' and '.join(_LAYER_TYPES)}", _are_layer_types),
        "rope_parameters": _Kind("an object with an unscaled rope_theta for each type of layer", _is_rotary),
    },
}
"""By architecture: the keys from which transformers makes an encoder."""
_OF_BOTH = ("id2label", "label2id", "dtype", "torch_dtype", "local_rerank")  # of `_FOR_US`
_LOCAL_RERANK: dict[str, _Kind] = {
    "long_documents": _one_of("truncate", "chunk"),
    "chunk_tokens": _whole(MIN_CHUNK_TOKENS, MAX_SIZE),
    "chunk_overlap_tokens": _whole(0, MAX_SIZE),
    "num_best_chunks": _whole(1, MAX_SIZE),
}
"""Defaults of the options of these names."""
_ACTIVATIONS = ("Sigmoid", "Identity")  # torch's, that sentence-transformers may apply to a classifier's one label
_QUANTIZATION = ("quantization_config", "compression_config")  # `tensors.py` refuses most of them, by name


def read_config(folder: Path) -> dict[str, Any]:
    """The keys of config.json that we use, without those that are null. Raises CheckpointError."""
    path = folder / "config.json"
    if not path.is_file():
        raise no_config(folder)
    config = read_json(path)
    architecture = _architecture(folder, config)
    kept: dict[str, Any] = {"architectures": [architecture]}
    kept |= {name: config[name] for name in _QUANTIZATION if config.get(name)}
    encoder = _OF_ENCODERS.get(architecture)
    ours = _FOR_US if encoder is None else {name: _FOR_US[name] for name in _OF_BOTH}
    kept |= _checked(path, "", config, (encoder or _FOR_TRANSFORMERS) | ours)
    if missing := [name for name in _REQUIRED if name not in kept]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; copy it again from where the weights are from")
    if unknown := sorted({*kept.get("local_rerank", {})} - {*_LOCAL_RERANK}):  # most likely misspelled
        what = f"{path} has local_rerank.{unknown[0]}, which is unknown"
        raise CheckpointError(f"{what}; known are {', '.join(_LOCAL_RERANK)}")
    kept["local_rerank"] = _checked(path, "local_rerank.", kept.get("local_rerank", {}), _LOCAL_RERANK)
    kept["num_labels"] = len(kept.get("id2label", ())) or kept.get("num_labels", 2)
    if encoder is not None:
        longest: Any = _beside(path, "tokenizer_config.json").get("model_max_length")  # some 1e30 if nobody set it
        kept |= {"activation": _activation(path, config)}
        return kept | ({"model_max_length": int(longest)} if _is_positive(longest) else {})
    for name in ("rope_parameters", "rope_scaling"):
        if name in kept:
            kept[name] = _checked(path, f"{name}.", kept[name], _ROPE)
    heads = kept["num_attention_heads"]
    if heads % kept.setdefault("num_key_value_heads", heads):
        what = f"{path} has num_key_value_heads {kept['num_key_value_heads']}"
        raise CheckpointError(f"{what}; it must be a divisor of num_attention_heads, {heads}")
    quantization = kept.get("quantization_config")
    if isinstance(quantization, dict):  # block-FP8, or refused by `tensors.py`
        block = _Kind("two whole numbers of at least 1", _is_block)
        _checked(path, "quantization_config.", quantization, {"weight_block_size": block})
    return kept


def for_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config from `read_config` from which transformers makes a model: not quantized."""
    names = _OF_ENCODERS.get(config["architectures"][0], _FOR_TRANSFORMERS)
    return {name: copy.deepcopy(config[name]) for name in names if name in config}


def _activation(path: Path, config: Mapping[str, Any]) -> str:
    """What sentence-transformers makes of an encoder's logit: "sigmoid" or "identity"; it stores the class's name.

    The place of its newest versions counts first, that of its oldest last.
    """
    own, former = _beside(path, "config_sentence_transformers.json"), config.get("sentence_transformers")
    name = own.get("activation_fn") or (former.get("activation_fn") if isinstance(former, dict) else None)
    name = name or config.get("sbert_ce_default_activation_function") or "torch.nn.Sigmoid"
    package, _, kind = str(name).rpartition(".")
    if not package.startswith("torch.nn") or kind not in _ACTIVATIONS:
        what = f"{path.parent} has the activation function {reprlib.repr(name)}"
        raise CheckpointError(f"{what}; it must be torch.nn.{' or torch.nn.'.join(_ACTIVATIONS)}")
    return kind.lower()


def _beside(path: Path, name: str) -> dict[str, Any]:
    """The JSON of another file in a folder; empty without it."""
    other = path.with_name(name)
    return read_json(other) if other.is_file() else {}


def _checked(path: Path, prefix: str, values: Mapping[str, Any], kinds: Mapping[str, _Kind]) -> dict[str, Any]:
    """The values of known keys, except nulls, which mean the default."""
    kept = {name: values[name] for name in kinds if values.get(name) is not None}
    for name, value in kept.items():
        if not kinds[name].fits(value):
            what = f"{path} has {prefix}{name} {reprlib.repr(value)}"
            raise CheckpointError(f"{what}; it must be {kinds[name].allowed}")
    return kept


def _architecture(folder: Path, config: Mapping[str, Any]) -> str:
    """The first entry of `architectures`, if we can run it."""
    names = config.get("architectures") or ["none"]
    first = names[0] if isinstance(names, list) else names
    require_no_code(folder, first if isinstance(first, str) else "none", config)
    if not isinstance(names, list) or not isinstance(first, str) or first not in ARCHITECTURES:
        shown = first if isinstance(first, str) else reprlib.repr(first)
        what = f"{folder} has architecture {shown[:200]}"
        if (folder / "modules.json").is_file():  # as in ettin-reranker-150m-v1
            what += " and a head in modules of sentence-transformers (modules.json), which are not read"
        raise CheckpointError(f"{what}; supported are {', '.join(ARCHITECTURES)}, in a list")
    return first
