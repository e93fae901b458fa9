"""Make checkpoints of random weights in the shapes of the official models, to measure speed without a download.

Weights are bf16, normal with a standard deviation of 0.02; norms are ones, biases zeros. The tokenizer is the built-in
model's; its ids are a subset of the official vocabulary's. One layer of a decoder is in memory at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from local_rerank.checkpoints.encoder_tensors import ENCODER_SHAPES, Shapes
from local_rerank.checkpoints.free_space import require_free_space
from local_rerank.errors import ConfigError

VOCABULARY = 151_669
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-reranker-0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "tie_word_embeddings": True,
    },
    "qwen3-reranker-4b": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "tie_word_embeddings": True,
    },
    "qwen3-reranker-8b": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Entries of config.json that differ between the models."""
COMMON = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCABULARY, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "attention_bias": False,
    "use_sliding_window": False, "dtype": "bfloat16", "eos_token_id": 37931, "pad_token_id": 37931,
}  # fmt: skip
BERT = {
    "architectures": ["BertForSequenceClassification"], "model_type": "bert", "vocab_size": 31_229,
    "type_vocab_size": 2, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "pad_token_id": 0, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "dtype": "bfloat16",
}  # fmt: skip
"""The vocabulary is the built-in model's: its size costs memory, but no time."""
XLM_ROBERTA = BERT | {
    "architectures": ["XLMRobertaForSequenceClassification"], "model_type": "xlm-roberta", "type_vocab_size": 1,
    "max_position_embeddings": 514, "layer_norm_eps": 1e-5, "pad_token_id": 1,
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "minilm-l6": BERT | {
        "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
    },
    "bge-reranker-base": XLM_ROBERTA | {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    },
    "bge-reranker-v2-m3": XLM_ROBERTA | {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "max_position_embeddings": 8194,
    },
}  # fmt: skip
DEVIATION = 0.02
NANO = Path(__file__).parents[1] / "nano"


def make_checkpoint(folder: Path, name: str, *, num_layers: int | None = None) -> Path:
    """Write a checkpoint, or reuse the one in `folder`; raises ConfigError, or CheckpointError if the disk is full."""
    known = {shape: COMMON | config for shape, config in SHAPES.items()} | ENCODERS
    if name not in known:
        raise ConfigError(f"shape is {name!r}; it must be one of {', '.join(known)}")
    config = dict(known[name])
    if num_layers is not None:
        config["num_hidden_layers"] = num_layers
    if (folder / "config.json").is_file():
        if json.loads((folder / "config.json").read_text(encoding="utf-8")) == config:
            return folder
        raise ConfigError(f"{folder} contains another model, not random weights in the shape of {name}")
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(config))
    require_free_space(folder, 2 * sum(math.prod(shape) for shard in shards for shape in shard.values()))
    _write_weights(folder, shards)
    if name in ENCODERS:
        _write_pair_template(folder, has_types=config["type_vocab_size"] == 2)
    else:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(NANO / file, folder / file)
    (folder / "README.md").write_text(f"Random weights of a reranker, in the shape of {name}.\n", encoding="utf-8")
    (folder / "config.json").write_text(
        json.dumps(config), encoding="utf-8"
    )  # last, because it marks the folder as complete
    return folder


def _write_pair_template(folder: Path, *, has_types: bool) -> None:
    """Write the built-in model's tokenizer with the pair template of BERT or of XLM-RoBERTa."""
    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    join = processors.BertProcessing if has_types else processors.RobertaProcessing
    tokenizer.post_processor = join(("[SEP]", 1), ("[CLS]", 0))
    tokenizer.save(str(folder / "tokenizer.json"))


def _shards(config: dict[str, Any]) -> Iterator[Shapes]:
    """Yield the weight shapes of each file."""
    if make_shapes := ENCODER_SHAPES.get(config["architectures"][0]):
        yield make_shapes(config, 1)
        return
    hidden, mlp, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    ends: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        ends["lm_head.weight"] = (config["vocab_size"], hidden)
    yield ends
    for i in range(config["num_hidden_layers"]):
        layer: Shapes = {
            "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q), "self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,),
            "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        yield {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}


def _write_weights(folder: Path, shards: list[Shapes]) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        weights = {name: _random(name, shape, generator) for name, shape in shard.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:  # of a norm or a bias
        return torch.full(shape, float(not name.endswith("bias")), dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=DEVIATION, generator=generator)
