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
NO_FABRIC = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that "
    "might have already set an error? Error 802: system not yet initialized"
)
TAKEN = "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be asynchronously ..."


@pytest.mark.parametrize(
    ("cuda", "is_available", "torch_says", "device", "says"),
    [
        (None, False, "", "cuda", "is a build without CUDA; for a GPU install a build with CUDA (h"),
        ("13.0", False, NO_DRIVER, "cuda:0", "sees no GPU: The NVIDIA driver on your system is too old (found versi"),
        ("13.0", False, NO_FABRIC, "cuda", "cudaGetDeviceCount(): Error 802: system not yet initialized; nvidia-smi"),
        ("13.0", True, TAKEN, "cuda", "cannot use cuda: CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
        ("13.0", True, "", "cuda:2", "; torch sees cuda:0, cuda:1"),
    ],
)
def test_a_missing_gpu_raises_an_error_that_says_why_torch_sees_none(
    cuda: str | None, is_available: bool, torch_says: str, device: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError(torch_says)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # of NVML, which needs no driver that torch can use
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    for name in ("init", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, fails)
    with pytest.raises(ConfigError, match=re.escape(f"device is {device!r}") + ".*" + re.escape(says)):
        choose_device(device)
    if device != "cuda:2":
        chosen, why = choose_device("auto")
        assert chosen.type == "cpu"
        assert says in why


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
