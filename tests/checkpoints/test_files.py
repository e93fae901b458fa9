"""Which files of a checkpoint count, and each reason for refusing what is not a whole checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from local_rerank import Reranker
from local_rerank.checkpoints.download import fetch
from local_rerank.checkpoints.files import INDEX, checkpoint_files
from local_rerank.checkpoints.find import EMBEDDED_MODEL, open_checkpoint
from local_rerank.checkpoints.manifest import FORMAT, MANIFEST
from local_rerank.checkpoints.tensors import EMBEDDINGS
from local_rerank.errors import CheckpointError
from tests.command_line import command
from tests.fake_hub import fake_hub
from tests.tiny_checkpoints import make_checkpoint

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PAIRS = [("q", "a"), ("q", "bb")]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("files") / "tiny-reranker", max_shard_size="200KB")
    assert [path.name for path in sorted(folder.glob("model-*"))] == list(SHARDS)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("files") / "tiny-reranker")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "tiny-reranker")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-Reranker-0.6B", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"base_model.model.model.layers.0.x": torch.ones(2)}, folder / "adapter_model.safetensors")


def refusal(model: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("lost", [(), ("model.safetensors.index.json",), SHARDS])
def test_a3_two_sets_of_weights_are_refused_by_every_command(
    lost: tuple[str, ...], sharded: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sharded, tmp_path / "tiny-reranker")
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "model.safetensors")
    for name in lost:
        (folder / name).unlink()
    assert "two sets of weights: model.safetensors, and " in refusal(folder)
    done = command("pack", str(folder), "-o", str(tmp_path / "x"), "--no-self-test")
    assert (done.returncode, "two sets of weights" in done.stderr) == (1, True)
    with pytest.raises(CheckpointError, match="two sets of weights"):
        checkpoint_files(folder)


def test_a3_the_weights_that_are_read_are_those_that_are_packed(folder: Path) -> None:
    """Also if an index names the single file, or config.json another one, which transformers would read."""
    weights = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, folder / "zeros.safetensors")
    edit(folder / "config.json", transformers_weights="zeros.safetensors")
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        assert reranker.checkpoint.weights == ("model.safetensors",)
        assert 0.0 not in reranker.score(PAIRS, logits=True)
    assert "zeros.safetensors" not in checkpoint_files(folder)


def test_a3_a_weight_in_two_shards_is_refused(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / "tiny-reranker")
    first, second = (folder / name for name in SHARDS)
    twice = next(iter(load_file(first)))
    save_file(load_file(second) | {twice: load_file(first)[twice]}, second)
    assert f"{twice} twice, in {first.name} and {second.name}" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights.update({"score.bias": torch.ones(1)}), "does not take: score.bias (1 in all)"),
        (lambda weights: weights.pop("model.norm.weight"), "lacks weights: model.norm.weight (1 in all)"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(3)}),
            "has model.norm.weight in shape 3, but config.json says 64",
        ),
        (
            lambda weights: weights.update({"model.embed_tokens.weight": torch.ones(300, 64)}),
            "in shape 300 x 64, but config.json says 285 x 64; the rows of the embeddings must be vocab_size",
        ),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "in I8, so it is"),
        (
            lambda weights: weights.update({"model.layers.0.self_attn.q_proj.qweight": torch.ones(1)}),
            "q_proj.qweight (1 in all); they are quantized; use the checkpoint it was made from",
        ),
    ],
)
def test_a5_weights_that_the_architecture_does_not_take_are_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], object], says: str, folder: Path
) -> None:
    edit_weights(folder, change)
    assert says in refusal(folder)


def test_a5_a_classifier_with_a_bias_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny-reranker", num_labels=1)
    edit_weights(folder, lambda weights: weights.update({"score.bias": torch.ones(1)}))
    assert "Qwen3ForSequenceClassification does not take: score.bias" in refusal(folder)


def test_a5_weights_with_and_without_their_prefix_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"norm.weight": torch.ones(64)}))
    assert "twice, with and without the prefix model: norm.weight" in refusal(folder).replace("model.norm", "norm")


def test_names_without_the_prefix_model_are_taken(folder: Path, whole: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file(plain, folder / "model.safetensors")
    scores = []
    for each in (folder, whole):
        with Reranker(str(each), device="cpu", dtype="fp32", deterministic=True) as reranker:
            scores.append(reranker.score(PAIRS))
    assert scores[0] == scores[1]


def test_a6_an_adapter_beside_a_whole_model_is_ignored_and_not_packed(
    folder: Path, whole: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(folder)
    for module in ("integrations.peft", "models.auto.auto_factory"):  # as if the package peft were installed
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: True)
    scores = []
    for each in (folder, whole):
        with Reranker(str(each), device="cpu", dtype="fp32", deterministic=True) as reranker:
            scores.append(reranker.score(PAIRS))
    assert scores[0] == scores[1]
    assert "ignoring the adapter in" in caplog.text
    assert not any("adapter" in name for name in checkpoint_files(folder))


def test_c6_the_weights_of_an_adapter_without_its_config_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path / "tuned")
    (tmp_path / "tuned" / "adapter_config.json").unlink()
    assert "a LoRA adapter without a model: merge it into its base" in refusal(tmp_path / "tuned")


@pytest.mark.parametrize("with_config", [False, True])
def test_c6_an_adapter_alone_is_named(with_config: bool, whole: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "tuned")
    if with_config:
        shutil.copy(whole / "config.json", tmp_path / "tuned")
    error = refusal(tmp_path / "tuned")
    assert "a LoRA adapter without a model: merge it into its base" in error
    assert "from_pretrained('Qwen/Qwen3-Reranker-0.6B')" in error


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(LFS), "model.safetensors is a Git LFS pointer"),
        (lambda folder: (folder / "config.json").write_bytes(LFS), "config.json is a Git LFS pointer"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(LFS), "tokenizer.json is a Git LFS pointer"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\n<!DOCTYPE html>"), "tokenizer.json is a web page"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"<html>"), "model.safetensors is a web page"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is empty; copy or"),
        (lambda folder: (folder / "model.safetensors").write_bytes(bytes(99)), "is not a safetensors file, or damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"GGUF\3"), "model.safetensors is a GGUF file"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"PK\3\4"),
            "model.safetensors is not a safetensors file, or damaged; it looks like a pickle",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "m.GGUF"),
            "m.GGUF is a GGUF file for llama.cpp",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors"),
            "consolidated.safetensors has Mistral's names",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / SHARDS[0]),
            "has shards (model-00001-of-00002.safetensors) but no model.safetensors.index.json",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model.fp16.safetensors"),
            "model.fp16.safetensors is not read; rename a file with all weights to model.safetensors",
        ),
        *(
            (
                lambda folder, method=method: edit(
                    folder / "config.json", quantization_config={"quant_method": method}
                ),
                f"is quantized with {method}; use the checkpoint it was made from",
            )
            for method in ("awq", "gptq", "bitsandbytes", "compressed-tensors")
        ),
    ],
)
def test_c7_what_is_no_checkpoint_is_named(damage: Callable[[Path], object], says: str, folder: Path) -> None:
    damage(folder)
    assert says in refusal(folder)


def test_c7_a_tokenizer_of_more_ids_than_the_embeddings_have_rows_is_refused(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=280)
    edit_weights(folder, lambda weights: weights.update({EMBEDDINGS: weights[EMBEDDINGS][:280].clone()}))
    with pytest.raises(CheckpointError, match="has 285 ids, but vocab_size is 280; use the tokenizer"):
        Reranker(str(folder), device="cpu", dtype="fp32")


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_c7_json_files_may_have_a_bom(codec: str, folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text, encoding=codec)
    Reranker(str(folder), device="cpu", dtype="fp32").close()


@pytest.mark.parametrize("bundled", [False, True])
@pytest.mark.parametrize(
    "shard",
    ["pytorch_model.bin", "weights.json", "../x.safetensors", "/x.safetensors", "a/x.safetensors", ".x.safetensors",
     "x.safetensors.bin", "x.safetensors\n", "C:\\x.safetensors", "", 1, None, ["x.safetensors"]],
)  # fmt: skip
def test_an_index_that_names_anything_but_safetensors_in_its_folder_is_refused(
    shard: object, bundled: bool, folder: Path
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {EMBEDDINGS: shard}}), encoding="utf-8")
    if bundled:
        listed = {"files": {INDEX: {"size": (folder / INDEX).stat().st_size, "sha256": ""}}}
        manifest = {"format": FORMAT, "format_version": 1, "model_id": "x", "revision": None, "licence": None,
                    "made_by": "x", "recipe": {}, "expected": {}} | listed  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert f"{INDEX} names {shard!r}; only safetensors files in the same folder are read" in refusal(folder)


@pytest.mark.parametrize("weight_map", [["a", 1], "a", 1, None, {}, True])
def test_a_weight_map_of_another_kind_is_refused_by_name(weight_map: object, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert "model.safetensors.index.json has no weight_map, which names the file of each" in refusal(folder)


def test_c7_a_cut_off_file_is_named_with_both_sizes(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    assert f"has {len(whole) - 1000} bytes, but {len(whole)} by its header" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.gguf", b"GGUF\3", "is a GGUF file for llama.cpp"),
        ("bundle.zip", LFS, "is a Git LFS pointer"),
        ("model.safetensors", b"0123456789", "is one file of a checkpoint; pass its folder"),
    ],
)
def test_c7_a_file_in_place_of_a_folder_is_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert says in refusal(tmp_path / name)


def test_c7_pull_into_a_file_blames_the_file(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with fake_hub(whole) as hub, pytest.MonkeyPatch.context() as patched:
        patched.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        with pytest.raises(CheckpointError, match="cannot be written: "):
            fetch("owner/tiny", None, tmp_path / "file")


def test_c7_a_gguf_folder_and_a_folder_of_models_are_named(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-q4.gguf").write_bytes(b"GGUF")
    assert "model-q4.gguf is a GGUF file" in refusal(tmp_path / "gguf")
    shutil.copytree(whole, tmp_path / "run" / "checkpoint-500")
    assert "no config.json: not a model folder; models in it: checkpoint-500" in refusal(tmp_path / "run")


def test_c7_files_may_be_links_and_the_path_relative(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "linked").mkdir()
    for path in whole.iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("linked/", "./linked", "~/linked"):
        assert open_checkpoint(name).model_id == "linked"
    shutil.copytree("linked", EMBEDDED_MODEL)
    assert open_checkpoint(f"./{EMBEDDED_MODEL}").source == "folder"
    with pytest.raises(CheckpointError, match="'~nobody-here/x' is no folder"):
        open_checkpoint("~nobody-here/x")
    (tmp_path / "linked" / "model.safetensors").unlink()
    (tmp_path / "linked" / "model.safetensors").symlink_to("nowhere")
    assert "is incomplete: model.safetensors (its link leads nowhere) missing" in refusal(tmp_path / "linked")


@pytest.mark.parametrize(
    ("config", "yes_row"),
    [
        ({}, 1),
        ({"id2label": {"0": "yes", "1": "no"}}, 0),
        ({"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}, 1),
        ({"id2label": {"0": "Relevant", "1": "not relevant"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}, 0),
        ({"label2id": {"true": 0, "false": 1}}, 0),
        ({"id2label": {"0": "LABEL_1", "1": "LABEL_0"}}, 0),
        ({"id2label": {"0": "cat", "1": "dog"}}, None),
        ({"id2label": {"0": "yes", "1": "no"}, "label2id": {"no": 0, "yes": 1}}, None),
        ({"id2label": {"0": "yes", "1": "yes"}}, None),
    ],
)
def test_a4_the_labels_of_a_classifier_decide_the_order(
    config: dict[str, dict[str, object]], yes_row: int | None, classifier: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(classifier, tmp_path / "tiny-reranker")
    edit(folder / "config.json", **config)
    if yes_row is None:
        error = refusal(folder)
        assert "do not tell which means relevant" in error
        assert str(config["id2label"]) in error
        return
    with Reranker(str(folder), device="cpu", dtype="fp32") as reranker:
        head = load_file(folder / "model.safetensors")["score.weight"]
        assert torch.equal(reranker.engine.head, head[[1 - yes_row, yes_row]])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("files") / "classifier", num_labels=2)


@pytest.mark.parametrize("number", [2, 3])
def test_a4_a_classifier_of_other_labels_than_its_weights_is_refused(
    number: int, classifier: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(classifier, tmp_path / "tiny-reranker")
    edit_weights(folder, lambda weights: weights.update({"score.weight": torch.ones(1, 64)}))
    edit(folder / "config.json", id2label={str(i): f"LABEL_{i}" for i in range(number)})
    says = {2: "score.weight in shape 1 x 64, but config.json says 2 x 64", 3: "has 3 labels; it must have 1 or 2"}
    assert says[number] in refusal(folder)
    edit(folder / "config.json", id2label={"0": "Not_relevant"})
    assert "a high score means not relevant" in refusal(folder)
