"""Which recipe a checkpoint has, and checkpoints that no recipe fits."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from local_rerank import Reranker
from local_rerank.checkpoints.bundles import open_bundle
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.errors import CheckpointError, ConfigError
from local_rerank.selftest.self_test import self_test
from tests.command_line import command
from tests.encoder_checkpoints import OF, make_encoder
from tests.reference import FP32_TOLERANCE

SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("bert") / "tiny", "Bert", activation=IDENTITY)


def copy_of(folder: Path, to: Path, **changes: Any) -> Path:
    """The checkpoint with other keys in its config.json; None removes one."""
    to.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (to / name).hardlink_to(folder / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (to / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return to


@pytest.mark.parametrize(("kind", "name"), [*zip(OF, ("bert", "xlm-roberta", "modernbert"), strict=True)])
def test_the_architecture_says_which_recipe_it_is(kind: str, name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_encoder(tmp_path / "some-model", kind)))
    assert checkpoint.recipe.name == name
    assert f"{kind}ForSequenceClassification" in checkpoint.recipe_reason
    assert checkpoint.max_length == (512 if kind != "ModernBert" else 8192)


def test_the_user_may_name_the_recipe_of_an_unmarked_model(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unmarked = str(copy_of(bert, tmp_path / "model", sentence_transformers=None))
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(unmarked, recipe="bert").recipe_reason == "set by the user"
        assert not caplog.text
        open_checkpoint(unmarked)
    assert "if it is one, set recipe to bert" in caplog.text
    with pytest.raises(CheckpointError, match=r"recipe is 'qwen3-reranker'; for architecture Bert.* must be bert"):
        open_checkpoint(unmarked, recipe="qwen3-reranker")


@pytest.mark.parametrize(
    "architecture",
    ["NewForSequenceClassification", "XLMRobertaForSequenceClassification", "BertForSequenceClassification"],
)
def test_a_checkpoint_that_needs_its_own_code_is_refused_by_name(architecture: str, bert: Path, tmp_path: Path) -> None:
    code = {"AutoModelForSequenceClassification": "modeling_flash.FlashRerankerModel"}
    folder = copy_of(bert, tmp_path / "model", architectures=[architecture], auto_map=code)
    with pytest.raises(CheckpointError, match=rf"\({architecture}\) computes with code .*modeling_flash\.Flash"):
        open_checkpoint(str(folder))


def test_the_activation_is_found_where_each_version_of_sentence_transformers_stores_it(
    bert: Path, tmp_path: Path
) -> None:
    old = {"sentence_transformers": None, "sbert_ce_default_activation_function": IDENTITY}
    assert open_checkpoint(str(bert)).activation == "identity"
    assert open_checkpoint(str(copy_of(bert, tmp_path / "3", **old))).activation == "identity"
    newest = copy_of(bert, tmp_path / "6", sentence_transformers={"activation_fn": SIGMOID})
    assert open_checkpoint(str(newest)).activation == "sigmoid"
    own = {"model_type": "CrossEncoder", "activation_fn": IDENTITY}
    (newest / "config_sentence_transformers.json").write_text(json.dumps(own), encoding="utf-8")
    assert open_checkpoint(str(newest)).activation == "identity"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, "activation function"),
        ({"type_vocab_size": 3}, "token_type_embeddings"),
        ({"num_labels": 3, "id2label": {"0": "a", "1": "b", "2": "c"}}, "3 labels"),
        ({"num_labels": 2, "id2label": {"0": "a", "1": "b"}}, "labels that do not tell"),
        ({"architectures": ["BertForMaskedLM"]}, "architecture BertForMaskedLM; supported are"),
    ],
)
def test_what_no_recipe_computes_is_refused(changes: dict[str, Any], message: str, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(copy_of(bert, tmp_path / "model", **changes)))


def test_a_head_in_modules_of_sentence_transformers_is_refused_by_name(bert: Path, tmp_path: Path) -> None:
    folder = copy_of(bert, tmp_path / "ettin", architectures=["ModernBertModel"])
    (folder / "modules.json").write_text("[]", encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"ModernBertModel and a head in modules .*modules\.json.*, which are not read"
    ):
        open_checkpoint(str(folder))


def test_tensors_that_the_architecture_does_not_read_are_ignored(tmp_path: Path) -> None:
    import torch

    folder = make_encoder(tmp_path / "model", "XLMRoberta")
    weights = load_file(folder / "model.safetensors")
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        expected = reranker.score([("a", "b")], logits=True)
    weights["roberta.embeddings.position_ids"] = torch.arange(514)
    weights["roberta.pooler.dense.bias"] = torch.ones(64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        assert reranker.score([("a", "b")], logits=True) == pytest.approx(expected, abs=FP32_TOLERANCE)


def test_a_bundle_of_an_encoder_with_bare_logits_is_packed_and_ranks(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, bundle = copy_of(bert, tmp_path / "model"), tmp_path / "model.zip"
    weights = load_file(bert / "model.safetensors")
    weights["classifier.bias"] += 12
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        packed = command("pack", str(folder), "-o", str(bundle), "--no-self-test")
        assert (packed.returncode, caplog.text) == (0, ""), packed.stderr
    assert open_bundle(bundle)[0].recipe == {"recipe": "bert"}
    ranked = command("rank", "q", "a", "b", "--model", str(bundle))
    _, *lines, _ = ranked.stdout.splitlines()
    assert [line.count("█") for line in lines] == [20, 20], ranked.stdout
    with Reranker(str(bundle), device="cpu", dtype="fp32") as reranker:
        assert self_test(reranker).detail == "the scores are those stored with the model"


@pytest.mark.parametrize("option", [{"attention": "cuda-tiles"}, {"device_map": "auto"}])
def test_an_option_that_no_encoder_has_is_refused(option: dict[str, Any], bert: Path) -> None:
    with pytest.raises(ConfigError, match="encoder"):
        Reranker(str(bert), device="cpu", **option)
