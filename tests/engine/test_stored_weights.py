"""Reading weights: block-FP8 checkpoints are dequantized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from local_rerank import Reranker
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.engine.stored_weights import dequantized
from local_rerank.errors import CheckpointError
from tests.command_line import command
from tests.tiny_checkpoints import make_checkpoint

BLOCK = (48, 40)  # divides neither side of the tiny model's weights
PAIRS = [("q", "a"), ("q", "bb"), ("r", "a")]


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 values and a scale per block; the scales are powers of two, so that the test can dequantize exactly."""
    rows, columns = (-(-size // length) for size, length in zip(weight.shape, BLOCK, strict=True))
    scale = torch.empty(rows, columns)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            place = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            scale[i, j] = 2.0 ** (i - j - 6)
            values[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A block-FP8 checkpoint, and the same weights in fp32."""
    plain = make_checkpoint(tmp_path_factory.mktemp("fp8") / "plain-reranker", dtype=torch.bfloat16)
    fp8 = shutil.copytree(plain, plain.parent / "fp8-reranker")
    weights = load_file(plain / "model.safetensors")
    stored = dict(weights)
    for name, weight in weights.items():
        if "_proj." in name:
            stored[name], stored[name + "_scale_inv"] = quantized(weight.float())
            stored[name.replace("weight", "activation_scale")] = torch.ones(1)
            weights[name] = dequantized(stored[name], stored[name + "_scale_inv"], BLOCK, name)
    save_file(stored, fp8 / "model.safetensors")
    save_file({name: weight.float() for name, weight in weights.items()}, plain / "model.safetensors")
    config = json.loads((fp8 / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    (fp8 / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return fp8, plain


@pytest.mark.parametrize("offsets", [[0, 1], [-8, 4], [0.0, 4]])
def test_a_file_whose_offsets_are_wrong_is_named(
    offsets: list[float], checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints[1], tmp_path / "tiny-reranker")
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["model.layers.0.input_layernorm.weight"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is .*damaged"):
        Reranker(str(folder), device="cpu", dtype="fp32")


@pytest.mark.parametrize("scale", [torch.ones(2, 3, 4), torch.ones(7)])
def test_scales_of_another_shape_are_named(scale: Tensor, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints[0], tmp_path / "tiny-reranker")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight_scale_inv"] = scale
    save_file(weights, folder / "model.safetensors")
    for block in (list(BLOCK), None):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"]["weight_block_size"] = block
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(CheckpointError, match="scales"):
            Reranker(str(folder), device="cpu", dtype="fp32")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_b5_a_block_fp8_checkpoint_scores_as_its_dequantized_weights(
    dtype: str, checkpoints: tuple[Path, Path]
) -> None:
    scores = []
    for folder in checkpoints:
        with Reranker(str(folder), device="cpu", dtype=dtype, threads=1, deterministic=True) as reranker:
            scores.append(reranker.score(PAIRS, logits=True))
    assert scores[0] == pytest.approx(scores[1], rel=1e-5 if dtype == "fp32" else 0.1)


def test_b5_a_block_fp8_checkpoint_can_be_packed(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("--no-self-test", "--device", "cpu", "--threads", "1")
    done = command("pack", str(checkpoints[0]), "-o", str(tmp_path / "packed"), *options)
    assert done.returncode == 0, done.stderr
    assert open_checkpoint(str(tmp_path / "packed")).source == "bundle"


def test_dequantized_multiplies_each_block_by_its_scale() -> None:
    weight, scale = torch.ones(5, 4).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rows = [[1, 1, 1, 2]] * 3 + [[3, 3, 3, 4]] * 2
    assert dequantized(weight, scale, (3, 3), "w").tolist() == rows
    assert dequantized(weight, torch.tensor(2.0), None, "w").tolist() == [[2] * 4] * 5
    assert dequantized(weight, torch.arange(5.0), None, "w")[:, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(CheckpointError, match="weight_block_size in config"):
        dequantized(weight, scale, (2, 2), "w")


def test_b5_scales_that_are_no_numbers_are_refused(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints[0], tmp_path / "fp8-reranker")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file(weights | {name: weights[name].to(torch.uint8)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"does not take: {name}"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("lost", ["model.layers.0.mlp.up_proj.weight_scale_inv", "model.layers.0.mlp.up_proj.weight"])
def test_b5_an_fp8_weight_without_scales_and_scales_without_a_weight_are_refused(
    lost: str, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints[0], tmp_path / "fp8-reranker")
    weights = load_file(folder / "model.safetensors")
    del weights[lost]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="up_proj"):
        open_checkpoint(str(folder))
