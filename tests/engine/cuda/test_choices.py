"""What a load plan chooses on a GPU, each choice with its reason; a stand-in answers for the GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from local_rerank import EngineConfig
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.engine.cuda import choices
from local_rerank.engine.plan import LoadPlan, make_plan
from local_rerank.errors import ConfigError


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that multiplies fp8 and runs our decoder."""
    monkeypatch.setattr("local_rerank.engine.plan.choose_device", lambda name: (torch.device("cuda"), "a GPU"))
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
