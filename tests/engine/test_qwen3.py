"""Checkpoints that are read without transformers, and those that are left to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from local_rerank import Reranker
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.engine.load import head_rows, load_model
from local_rerank.engine.qwen3 import read_qwen3
from tests.reference import ModelCard
from tests.tiny_checkpoints import make_checkpoint

OLD_CONFIG = {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": None}  # as transformers 4 writes it
SCALED = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}


def configure(folder: Path, **values: Any) -> Path:
    """Change entries of a folder's config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("arguments", "values", "dtype"),
    [
        ({}, {}, torch.float32),
        ({"tied": False, "dtype": torch.bfloat16}, {}, torch.float32),
        ({"num_labels": 2, "max_shard_size": "40KB"}, {}, torch.bfloat16),
        ({"attention_bias": True}, OLD_CONFIG, torch.float32),
    ],
    ids=["tied", "untied, widened", "classifier in shards, rounded", "biases, old config"],
)
def test_d3_a_checkpoint_read_without_transformers_is_the_one_that_transformers_reads(
    arguments: dict[str, Any], values: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(configure(make_checkpoint(tmp_path / "model", **arguments), **values)))
    ours = read_qwen3(checkpoint, dtype)
    theirs: Any = load_model(checkpoint, dtype=dtype, device=torch.device("cpu"))
    assert ours is not None
    for a, b in ((ours.model.state_dict(), theirs.model.state_dict()), head_and_rotation(ours, theirs, checkpoint)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def head_and_rotation(ours: Any, theirs: Any, checkpoint: Any) -> tuple[dict[str, torch.Tensor], ...]:
    positions, hidden = torch.tensor([[0, 1, 77, 8000]]), torch.empty(1, 4, 1)
    return tuple(
        {"head": head_rows(model, checkpoint, yes_id=5, no_id=6)}
        | dict(zip(("cos", "sin"), model.model.rotary_emb(hidden, positions), strict=True))
        for model in (ours, theirs)
    )


@pytest.mark.parametrize("values", [SCALED, {"hidden_act": "gelu"}, {"rms_norm_eps": None}], ids=str)
def test_d3_a_checkpoint_that_is_not_plain_is_left_to_transformers(values: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    assert read_qwen3(open_checkpoint(str(configure(folder, **values))), torch.float32) is None


def test_d3_scaled_rotary_positions_score_as_in_transformers(tmp_path: Path) -> None:
    folder = configure(make_checkpoint(tmp_path / "model"), **SCALED)
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        item = reranker.rank("q", ["a long document " * 20])[0]
    assert item.log_odds == pytest.approx(ModelCard(folder).pair("q", item.document), abs=1e-4)


def test_d3_names_without_a_prefix_are_known_and_a_head_beside_tied_embeddings_is_not(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, file)
    assert read_qwen3(open_checkpoint(str(folder)), torch.float32) is not None
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert read_qwen3(open_checkpoint(str(folder)), torch.float32) is None
