"""config.json: every key that is used is checked, and every other one is dropped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from local_rerank import Reranker, RerankRequest
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.checkpoints.model_config import read_config
from local_rerank.engine.stored_weights import model_config
from local_rerank.errors import CheckpointError

GOOD = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 285,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NAN, INFINITY = float("nan"), float("inf")  # JSON as Python reads it has both
FLAGS = ("attention_bias", "tie_word_embeddings")
SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_labels",
)


def refusal(folder: Path, **changes: object) -> str:
    (folder / "config.json").write_text(json.dumps(GOOD | changes), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        read_config(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", ["x", "64", -5, 0, True, 64.0, 10**30, NAN, INFINITY, [64], {"a": 1}])
def test_a_size_that_is_no_whole_number_is_refused_with_file_and_key(value: object, tmp_path: Path) -> None:
    for name in SIZES:
        assert f"{tmp_path}/config.json has {name} " in refusal(tmp_path, **{name: value})


@pytest.mark.parametrize("value", ["x", "1e-6", -1e-6, 0, True, NAN, INFINITY, 10**400, [1]])
def test_a_number_that_is_not_positive_is_refused_with_file_and_key(value: object, tmp_path: Path) -> None:
    for name in ("rms_norm_eps", "rope_theta"):
        assert f"/config.json has {name} " in refusal(tmp_path, **{name: value})
    for group in ("rope_parameters", "rope_scaling"):
        assert f"/config.json has {group}.factor " in refusal(tmp_path, **{group: {"factor": value}})


@pytest.mark.parametrize("value", ["true", "", 0, 1, [], {}, NAN])
def test_a_flag_that_is_neither_true_nor_false_is_refused_with_file_and_key(value: object, tmp_path: Path) -> None:
    for name in FLAGS:
        assert f"/config.json has {name} " in refusal(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": "Qwen3ForCausalLM"}, "has architecture Qwen3ForCausalLM; supported are "),
        ({"architectures": {"a": 1}}, "has architecture {'a': 1}; supported are"),
        ({"architectures": [["Qwen3ForCausalLM"]]}, "has architecture ['Qwen3ForCausalLM']; supported are"),
        ({"architectures": [None]}, "has architecture None; supported are"),
        ({"hidden_size": None}, "config.json lacks hidden_size; copy it again"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3; it must be a divisor of num_attention_heads, 4"),
        ({"head_dim": 15}, "head_dim 15; it must be an even number"),
        ({"num_hidden_layers": 10**9}, "it must be a whole number from 1 to 1000"),
        ({"hidden_act": "evil/kernel"}, "hidden_act 'evil/kernel'; it must be one of silu, "),
        ({"hidden_act": ["silu"]}, "hidden_act ['silu']; it must be one of silu, "),
        ({"use_sliding_window": True}, "use_sliding_window True; it must be false: sliding-window attention"),
        ({"layer_types": ["sliding_attention"]}, "layer_types ['sliding_attention']; it must be a list of full"),
        ({"rope_scaling": "x"}, "rope_scaling 'x'; it must be an object"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type 'longrope'; it must be one of default"),
        ({"rope_parameters": {"type": 1}}, "rope_parameters.type 1; it must be one of default"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5; it must be 1"),
        ({"dtype": 16}, "dtype 16; it must be a string"),
        ({"id2label": ["no"]}, "id2label ['no']; it must be an object of labels by number"),
        ({"id2label": {"x": "no"}}, "id2label {'x': 'no'}; it must be"),
        ({"id2label": {"0": 1}}, "id2label {'0': 1}; it must be"),
        ({"label2id": {"no": "0"}}, "label2id {'no': '0'}; it must be an object of numbers by label"),
        ({"quantization_config": {"weight_block_size": [128, 0]}}, "weight_block_size [128, 0]; it must be"),
        ({"hidden_size": "x" * 10_000}, "hidden_size 'xxx"),
        ({"local_rerank": []}, "local_rerank []; it must be an object"),
        ({"local_rerank": {"chunk_tokens": 15}}, "local_rerank.chunk_tokens 15; it must be a whole number from 16 to"),
        ({"local_rerank": {"long_documents": "split"}}, "local_rerank.long_documents 'split'; it must be one of trunc"),
        ({"local_rerank": {"chunk_token": 96}}, "local_rerank.chunk_token, which is unknown; known are long_documents"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    error = refusal(tmp_path, **changes)
    assert says in error
    assert len(error) < 600


EVIL: dict[str, Any] = {
    "_attn_implementation": "evil/kernel",
    "_attn_implementation_internal": "evil/kernel",
    "attn_implementation": "evil/kernel",
    "_experts_implementation": "evil/kernel",
    "experts_implementation": "evil/kernel",
    "auto_map": {"AutoConfig": "evil--config.Evil", "AutoModelForCausalLM": "evil--model.Evil"},
    "fusion_config": {"evil": True},
    "per_layer_config": {"0": {"_attn_implementation": "evil/kernel"}},
    "transformers_weights": "evil.bin",
    "name_or_path": "evil/model",
    "output_attentions": True,
    "text_config": {"_attn_implementation": "evil/kernel"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "evil": "evil/kernel"},
}


def test_transformers_gets_only_the_keys_that_a_checkpoint_needs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "tiny-reranker")
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(written | EVIL), encoding="utf-8")
    for name in ("generation_config.json", "tokenizer_config.json"):  # which nobody reads
        (folder / name).write_text(json.dumps(EVIL | {"tokenizer_class": "evil"}), encoding="utf-8")
    made = model_config(open_checkpoint(str(folder)))
    assert "evil" not in repr(vars(made)).lower()
    assert made._attn_implementation is None
    assert made.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        assert "evil" not in repr(reranker.checkpoint)
        reranker.score([("q", "a")])


def test_what_transformers_refuses_in_the_config_is_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "tiny-reranker")
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = written | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json is refused by transformers: .*'factor'"):
        Reranker(str(folder), device="cpu", dtype="fp32")


def test_config_json_states_how_long_documents_are_read_by_default(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "tiny-reranker")
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stated = {"long_documents": "chunk", "chunk_tokens": 100, "chunk_overlap_tokens": 0}
    (folder / "config.json").write_text(json.dumps(written | {"local_rerank": stated}), encoding="utf-8")
    document = "Some words in a line.\n" * 40  # 880 tokens
    with Reranker(str(folder), device="cpu", dtype="fp32", chunk_overlap_tokens=50) as reranker:
        config = reranker.config
        default = reranker.rank("q", [document])[0].num_chunks
        asked = RerankRequest(query="q", documents=(document,), chunk_tokens=220, chunk_overlap_tokens=0)
        assert reranker.submit(asked).result()[0].num_chunks == 5, "nine lines each"
        assert reranker.rank("q", [document], long_documents="truncate")[0].num_chunks is None
    assert (config.long_documents, config.chunk_tokens, config.chunk_overlap_tokens) == ("chunk", 100, 50)
    assert config.num_best_chunks == 1
    assert default is not None
    assert default > 10, "an option wins over config.json"
