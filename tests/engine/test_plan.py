"""What a load plan decides, given options, the checkpoint and the platform."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from local_rerank import EngineConfig
from local_rerank.checkpoints.find import Checkpoint, open_checkpoint
from local_rerank.engine.cpu import choices
from local_rerank.engine.plan import LoadPlan, Platform, choose_device, make_plan
from local_rerank.errors import ConfigError
from tests.tiny_checkpoints import make_checkpoint

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SLOW_BF16 = {"fp32": 1.0, "blocked fp32": 2.0, "bf16": math.inf}  # seconds of a product


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Checkpoint]:
    """Checkpoints by the dtype of the stored weights."""
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    made = {dtype: make_checkpoint(folder / str(dtype), dtype=dtype) for dtype in (FP32, BF16)}
    return {dtype: open_checkpoint(str(path)) for dtype, path in made.items()}


def plan_on_cpu(checkpoint: Checkpoint, preferred: torch.dtype, **options: object) -> LoadPlan:
    platform = Platform(lambda _: (preferred, "measured"), max_batch_tokens=100)
    return make_plan(EngineConfig(device="cpu", **options), checkpoint, {"cpu": platform})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "stored", "preferred", "weights", "arithmetic"),
    [
        ("auto", FP32, FP32, FP32, FP32),
        ("auto", BF16, FP32, BF16, FP32),  # loaded as stored, multiplied in fp32
        ("auto", FP32, BF16, BF16, BF16),
        ("bf16", FP32, BF16, BF16, BF16),
        ("bf16", FP32, FP32, BF16, FP32),
        ("fp16", FP32, BF16, FP16, FP32),
        ("fp32", BF16, BF16, FP32, FP32),
        ("int8", BF16, FP32, BF16, FP32),
    ],
)
def test_dtypes_on_a_cpu(
    dtype: str,
    stored: torch.dtype,
    preferred: torch.dtype,
    weights: torch.dtype,
    arithmetic: torch.dtype,
    checkpoints: dict[torch.dtype, Checkpoint],
) -> None:
    plan = plan_on_cpu(checkpoints[stored], preferred, dtype=dtype)
    assert (plan.weights, plan.arithmetic) == (weights, arithmetic)
    assert plan.quantization == ("int8" if dtype == "int8" else None)


def test_the_built_in_model_stays_in_fp32() -> None:
    plan = plan_on_cpu(open_checkpoint(None), BF16)
    assert (plan.weights, plan.arithmetic) == (FP32, FP32)
    assert "lower precision" in plan.reasons["weights"]


@pytest.mark.parametrize(("options", "decoder"), [({}, "cpu"), ({"device_map": "auto"}, "transformers")])
def test_the_decoder_follows_the_platform(
    options: dict[str, str], decoder: str, checkpoints: dict[torch.dtype, Checkpoint]
) -> None:
    plan = plan_on_cpu(checkpoints[BF16], FP32, **options)
    assert plan.decoder == decoder
    assert plan.weights == (BF16 if decoder == "cpu" else FP32)  # only the CPU decoder widens weights
    assert not plan.cuda_graphs


@pytest.mark.parametrize("options", [{"dtype": "fp32"}, {"dtype": "bf16"}, {"dtype": "int8", "deterministic": True}])
def test_a_cpu_with_slow_bf16_computes_in_fp32(
    options: dict[str, object], checkpoints: dict[torch.dtype, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "seconds_of_products", lambda: SLOW_BF16)
    plan = plan_on_cpu(checkpoints[FP32], FP32, **options)
    assert not plan.pads_attention
    assert plan.products[-2:] == ("fp32", "attention fp32")
    assert (plan.values, plan.routes_fp32) == (None, False)


NO_DRIVER = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by ..."


@pytest.mark.parametrize(
    ("cuda", "num_gpus", "device", "says"),
    [
        (
            None,
            0,
            "cuda",
            f"'cuda', but torch {torch.__version__} is a build without CUDA; for a GPU install a build with CUDA (h",
        ),
        ("13.0", 0, "cuda:0", "sees no GPU: The NVIDIA driver on your system is too old (found version 11040); n"),
        ("13.0", 2, "cuda:2", "device is 'cuda:2'; torch sees cuda:0, cuda:1"),
    ],
)
def test_a_missing_gpu_raises_an_error_that_says_why_torch_sees_none(
    cuda: str | None, num_gpus: int, device: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise RuntimeError(NO_DRIVER)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError, match=re.escape(says)):
        choose_device(device)
    if not num_gpus:
        chosen, why = choose_device("auto")
        assert chosen.type == "cpu"
        assert says.split("; ")[0].removeprefix("'cuda', but ") in why


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "fp8"}, "dtype is 'fp8', which needs a GPU of compute capability 8.9; the device is cpu"),
        ({"dtype": "fp8", "device_map": "auto"}, "device_map is set; fp8 needs a model on one GPU"),
        ({"dtype": "int8", "device_map": "auto"}, "dtype int8 runs on a CPU; the device is auto"),
        ({"attention": "cuda-tiles", "dtype": "fp32"}, "attention kernel 'cuda-tiles' does not run fp32 on cpu"),
        ({"attention": "fast"}, "attention is 'fast'; it must be auto or one of"),
        ({"device": "tpu"}, "device is 'tpu'; it must be auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_an_impossible_option_raises_an_error_that_names_it(
    options: dict[str, str], says: str, checkpoints: dict[torch.dtype, Checkpoint]
) -> None:
    config = EngineConfig(**{"device": "cpu"} | options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=says):
        make_plan(config, checkpoints[FP32])
