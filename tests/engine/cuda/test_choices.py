"""What a load plan chooses on a GPU, each choice with its reason; a stand-in answers for the GPU."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from local_rerank import EngineConfig
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.checkpoints.free_space import gigabytes
from local_rerank.engine.cuda import choices
from local_rerank.engine.cuda.gpu import Gpu
from local_rerank.engine.cuda.graphs import GraphRunner
from local_rerank.engine.dtypes import name_of
from local_rerank.engine.load import load, load_model
from local_rerank.engine.plan import LoadPlan, choose_device, make_plan
from local_rerank.errors import CheckpointError, ConfigError
from local_rerank.selftest.machine_report import NOTHING, _kernel
from tests.encoder_checkpoints import make_encoder

BUILDS = {  # what torch's builds for CUDA 12.6 and 13.0 are compiled for
    "12.6": ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"],
    "13.0": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"],
}


def gpus(patch: pytest.MonkeyPatch, *found: Gpu, build: str | None = "13.0") -> None:
    """What torch says of a machine with these GPUs."""
    patch.setattr(torch.cuda, "is_available", lambda: bool(found))
    patch.setattr(torch.cuda, "device_count", lambda: len(found))
    patch.setattr(torch.cuda, "get_device_name", lambda device: found[device.index or 0].name)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: found[device.index or 0].capability)
    patch.setattr(torch.cuda, "get_arch_list", lambda: BUILDS.get(build or "", []))
    patch.setattr(torch.version, "cuda", build)


H200, T4, V100 = Gpu("NVIDIA H200", (9, 0)), Gpu("Tesla T4", (7, 5)), Gpu("Tesla V100", (7, 0))


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that multiplies fp8 and runs our decoder."""
    gpus(monkeypatch, H200)
    monkeypatch.setattr("local_rerank.engine.plan.require_fp8", lambda device: None)
    monkeypatch.setattr(choices, "why_not_fused", lambda *_, **__: None)


def plan(checkpoint: Path, **options: object) -> LoadPlan:
    return make_plan(EngineConfig(**{"dtype": "bf16"} | options), open_checkpoint(str(checkpoint)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device_map": "auto"}, "the model is spread over devices"),
        ({"no_compile": True}, "no_compile is set"),
        ({"dtype": "fp32"}, "the model is in fp32"),
    ],
)
def test_a_model_that_our_decoder_cannot_run_gets_transformers(
    options: dict[str, object], reason: str, tiny_checkpoint: Path
) -> None:
    planned = plan(tiny_checkpoint, **options)
    assert (planned.decoder, planned.cuda_graphs) == ("transformers", False)
    assert planned.reasons["decoder"] == reason
    assert planned.kernel != "cuda-tiles"
    with pytest.raises(
        ConfigError, match=f"attention is 'cuda-tiles', which needs the GPU decoder; it cannot be used: {reason}"
    ):
        plan(tiny_checkpoint, attention="cuda-tiles", **options)


@pytest.mark.parametrize("no_compile", [False, True])
def test_a_wrong_kernel_and_no_compile_keep_the_model_out_of_our_decoder(
    no_compile: bool, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = None if no_compile else "the kernels are wrong"
    monkeypatch.setattr(choices, "why_not_fused", lambda *_, **__: reason)
    planned = plan(tiny_checkpoint, no_compile=no_compile)
    assert (planned.decoder, planned.kernel) == ("transformers", "cuda-merged")
    needs = f"dtype is 'fp8', which needs the GPU decoder; it cannot be used: {reason or 'no_compile is set'}"
    with pytest.raises(ConfigError, match=needs):
        plan(tiny_checkpoint, dtype="fp8", no_compile=no_compile)


@pytest.mark.parametrize(
    ("options", "has_graphs"),
    [
        ({}, True),
        ({"dtype": "fp8"}, True),
        ({"attention": "cuda-merged"}, False),
        ({"no_cuda_graphs": True}, False),
        ({"deterministic": True}, False),
    ],
)
def test_graphs_need_a_layout_that_can_be_padded_and_scores_that_may_differ(
    options: dict[str, object], has_graphs: bool, tiny_checkpoint: Path
) -> None:
    planned = plan(tiny_checkpoint, **options)
    assert (planned.decoder, planned.cuda_graphs) == ("cuda", has_graphs)


@pytest.mark.parametrize(("rope_type", "has_graphs"), [("default", True), ("dynamic", False)])
def test_graphs_need_positions_that_do_not_depend_on_the_batch(
    rope_type: str, has_graphs: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    planned = plan(folder)
    assert planned.cuda_graphs == has_graphs
    assert (rope_type in planned.reasons["cuda_graphs"]) != has_graphs


@pytest.mark.parametrize(
    ("capability", "build", "dtype", "decoder", "kernel"),
    [
        ((6, 1), "12.6", "fp32", "transformers", "sdpa"),
        ((7, 0), "12.6", "fp16", "transformers", "sdpa"),
        ((7, 5), "13.0", "fp16", "transformers", "sdpa"),
        ((8, 0), "13.0", "bf16", "cuda", "cuda-tiles"),
        ((8, 6), "13.0", "bf16", "cuda", "cuda-tiles"),
        ((8, 9), "13.0", "bf16", "cuda", "cuda-tiles"),
        ((9, 0), "13.0", "bf16", "cuda", "cuda-tiles"),
        ((10, 0), "13.0", "bf16", "cuda", "cuda-tiles"),
        ((12, 0), "13.0", "bf16", "cuda", "cuda-tiles"),
        ((13, 0), "13.0", "bf16", "cuda", "cuda-tiles"),  # the driver compiles the build's PTX
    ],
)
def test_auto_takes_what_each_generation_of_gpus_runs(
    capability: tuple[int, int], build: str, dtype: str, decoder: str, kernel: str,
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gpus(monkeypatch, Gpu("a GPU", capability), build=build)
    planned = plan(tiny_checkpoint, dtype="auto")
    assert planned.device.type == "cuda"
    assert (name_of(planned.weights), name_of(planned.arithmetic)) == (dtype, dtype)
    assert (planned.decoder, planned.kernel, planned.cuda_graphs) == (decoder, kernel, decoder == "cuda")


def test_the_plan_says_what_an_older_gpu_lacks(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, T4)
    reasons = plan(tiny_checkpoint, dtype="auto").reasons
    assert reasons["device"] == "torch sees a GPU: Tesla T4 (compute capability 7.5)"
    assert reasons["weights"].startswith("Tesla T4 (compute capability 7.5) has no bf16; fp16 rounds less")
    assert "overflows beyond 65,504; if it does, use --dtype fp32" in reasons["weights"]
    assert reasons["decoder"] == "its kernels need compute capability 8.0 or newer; Tesla T4 has 7.5"
    assert reasons["kernel"] == (
        "the fastest for fp16 on Tesla T4 (compute capability 7.5); cuda-merged needs 8.0; cuda-varlen needs 8.0"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attention": "cuda-tiles"}, "attention is 'cuda-tiles', .* its kernels need compute capability 8.0 or newer"),
        ({"attention": "cuda-merged"}, "'cuda-merged' needs compute capability 8.0 or newer; Tesla T4 has 7.5; use "),
        ({"attention": "cuda-varlen"}, "'cuda-varlen' needs compute capability 8.0 or newer; Tesla T4 has 7.5; use "),
        ({"dtype": "bf16"}, "'bf16', which needs compute capability 8.0 or newer; Tesla T4 has 7.5, where torch only "),
    ],
)
def test_what_an_older_gpu_cannot_do_is_refused_with_the_least_capability(
    options: dict[str, object], says: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, T4)
    with pytest.raises(ConfigError, match=says):
        plan(tiny_checkpoint, **{"dtype": "auto"} | options)


@pytest.mark.parametrize("width", [4 * 26, 4 * 264])
def test_heads_that_flash_attention_refuses_get_sdpa(width: int, tmp_path: Path) -> None:
    """TinyBERT-L-4 has a width of 312 in 12 heads."""
    folder = make_encoder(tmp_path, "Bert", hidden_size=width, num_hidden_layers=1)
    planned = plan(folder)
    assert planned.kernel == "sdpa"
    needs = f"cuda-varlen needs a head dimension that is a multiple of 8, at most 256, and the model's is {width // 4}"
    assert planned.reasons["kernel"] == f"the fastest for bf16 on NVIDIA H200 (compute capability 9.0); {needs}"
    with pytest.raises(ConfigError, match=f"'cuda-varlen' needs a .* is {width // 4}; use auto or sdpa"):
        plan(folder, attention="cuda-varlen")
    info: Any = SimpleNamespace(
        **{name: getattr(planned, name) for name in ("kernel", "reasons", "decoder")}, device="cuda"
    )
    info.dtype = info.compute_dtype = "bf16"
    assert _kernel(info, planned.checkpoint).faster == NOTHING  # what `doctor` advises
    assert plan(make_encoder(tmp_path, "Bert", hidden_size=4 * 24)).kernel == "cuda-varlen"


@pytest.mark.parametrize("is_encoder", [False, True])
def test_batches_fit_in_free_memory_unless_the_user_sets_their_tokens(
    is_encoder: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = make_encoder(tmp_path, "Bert") if is_encoder else tiny_checkpoint
    assert plan(folder).fits_memory
    assert not plan(folder, max_batch_tokens=100).fits_memory


@pytest.mark.parametrize(("gpu", "may_add_in_fp16"), [(T4, False), (H200, True)])
def test_products_of_an_fp16_model_are_summed_in_fp32(
    gpu: Gpu, may_add_in_fp16: bool, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, gpu)
    settings = SimpleNamespace(allow_fp16_reduced_precision_reduction=True)  # torch's default
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    monkeypatch.setattr("local_rerank.engine.load.load_model", Mock(side_effect=CheckpointError("no GPU")))
    with pytest.raises(CheckpointError, match="no GPU"):
        load(plan(tiny_checkpoint, dtype="auto"), (5, 6), known=list)
    assert settings.allow_fp16_reduced_precision_reduction == may_add_in_fp16


def test_a_model_on_several_gpus_takes_what_the_oldest_runs(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, H200, T4)
    assert plan(tiny_checkpoint, dtype="auto").weights == torch.bfloat16
    assert plan(tiny_checkpoint, dtype="auto", device="cuda:1").weights == torch.float16
    spread = plan(tiny_checkpoint, dtype="auto", device_map="auto")
    assert (spread.weights, spread.kernel) == (torch.float16, "sdpa")


@pytest.mark.parametrize(
    ("found", "build", "device", "says"),
    [
        ([], None, "cuda", "is a build without CUDA; for a GPU install a build with CUDA .*; or set device to cpu"),
        ([], "13.0", "cuda", "sees no GPU: .*; nvidia-smi must list one, its driver must support CUDA 13.0"),
        ([H200], "13.0", "cuda:1", "device is 'cuda:1'; torch sees cuda:0"),
        (
            [V100],
            "13.0",
            "cuda",
            r"no kernels for Tesla V100 \(compute capability 7.0\), only for 7.5, .*; install its build for CUDA 12.6 ",
        ),
        (
            [Gpu("a new GPU", (10, 3))],
            "12.6",
            "cuda",
            "only for 5.0, 6.0, .*; install a newer one .*; or set device to",
        ),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_refused_with_what_to_install(
    found: list[Gpu], build: str | None, device: str, says: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, *found, build=build)
    with pytest.raises(ConfigError, match=says):
        plan(tiny_checkpoint, device=device)
    if device == "cuda":
        chosen, reason = choose_device("auto")
        assert chosen.type == "cpu"
        assert re.search(says.rpartition(";")[0], reason)


@pytest.mark.parametrize(
    ("device", "dtype", "moved_to"),
    [
        ("cuda:1", torch.float16, torch.device("cuda:1")),
        ("cuda:1", torch.float32, None),  # the file's
        ("cpu", torch.float16, None),
    ],
)
def test_a_tensor_whose_dtype_changes_goes_to_a_gpu_when_it_is_read(
    device: str,
    dtype: torch.dtype,
    moved_to: torch.device | None,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the host holds a copy of the model."""
    read, device_maps = Qwen3ForCausalLM.from_pretrained, []

    def on_meta(*args: Any, device_map: Any, **options: Any) -> Any:
        device_maps.append(device_map)
        return read(*args, device_map=torch.device("meta"), **options)

    monkeypatch.setattr(Qwen3ForCausalLM, "from_pretrained", on_meta)
    monkeypatch.setattr(Qwen3ForCausalLM, "to", lambda model, device: model)
    model: Any = load_model(open_checkpoint(str(tiny_checkpoint)), dtype=dtype, device=torch.device(device))
    assert device_maps == [moved_to]
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(module.training or hasattr(module, "_hf_hook") for module in model.modules())


@pytest.mark.parametrize(
    ("options", "free", "advice"),
    [
        ({}, 12_345_678, "a smaller model, set device_map to auto, which leaves layers in RAM, or set device to cpu"),
        (
            {"dtype": "fp32", "device_map": "auto"},
            12_345_678,
            "a smaller model, set dtype to bf16 or fp16, or set device to cpu",
        ),
        (
            {"dtype": "fp8"},
            RuntimeError("CUDA error: out of memory"),
            "free memory there, use a smaller model, or set device to cpu",
        ),
    ],
)
def test_a_load_that_runs_out_of_memory_says_what_it_needs_and_what_to_do(
    options: dict[str, object],
    free: int | Exception,
    advice: str,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = plan(tiny_checkpoint, **options)
    failed = CheckpointError("cannot be loaded: CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has ...")
    monkeypatch.setattr("local_rerank.engine.load.load_model", Mock(side_effect=failed))
    monkeypatch.setattr("local_rerank.engine.out_of_memory.free_bytes", Mock(side_effect=[free]))
    size = sum(weight.numel() for weight in load_file(tiny_checkpoint / "model.safetensors").values())
    says = f"its weights take {gigabytes(size * planned.weights.itemsize)} in {name_of(planned.weights)}"
    shown = "0 bytes" if isinstance(free, Exception) else "0.0123 GB"
    with pytest.raises(ConfigError, match=f"on cuda: {says}, and {shown} are free; .*{advice}$") as caught:
        load(planned, (5, 6), known=list)
    assert caught.value.__context__ is None  # a chained error would keep the failed load's tensors alive


@pytest.mark.parametrize("works", [True, False])
def test_a_model_whose_graphs_could_not_be_captured_says_that_it_has_none(
    works: bool, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = Mock(return_value=(list, torch.zeros(1)), side_effect=None if works else RuntimeError("no"))
    monkeypatch.setattr("local_rerank.engine.engine.GraphRunner", partial(GraphRunner, capture=capture))
    planned = replace(plan(tiny_checkpoint, device="cpu", dtype="fp32"), cuda_graphs=True)
    _, info = load(planned, (5, 6), known=list)
    assert info.cuda_graphs is works
    assert (info.reasons["cuda_graphs"] == "none could be captured, as the log says") is not works
