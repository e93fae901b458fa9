"""What `doctor` says of a model on a GPU, which a stand-in answers for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from local_rerank import EngineConfig, Reranker
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.commands.doctor import _print_tables
from local_rerank.engine.cuda import choices
from local_rerank.engine.cuda.gpu import BUILDS
from local_rerank.engine.plan import make_plan
from local_rerank.selftest.machine_report import MachineProperty, describe
from tests.engine.cuda.test_choices import H200, gpus

GRAPHS = "the decoder for GPUs, with CUDA graphs"


@pytest.mark.parametrize(
    ("options", "decoder", "faster"),
    [
        ({"dtype": "bf16"}, "cuda: .*; CUDA graphs on: one launch for a whole batch", ("nothing", "nothing")),
        ({"dtype": "bf16", "no_cuda_graphs": True}, "cuda: .*; CUDA graphs off: set by the user", (GRAPHS, "nothing")),
        (
            {"dtype": "fp32"},
            "transformers: the model is in fp32; CUDA graphs off: graphs need the GPU decoder",
            (GRAPHS, "--dtype bf16: the kernels that share a prefix do not support fp32"),
        ),
        ({"model": None}, "transformers: the model is in fp32; CUDA graphs off: .*", ("nothing", "nothing")),
    ],
)
def test_the_decoder_and_its_reason_are_shown_and_no_dtype_is_advised_that_is_too_inexact(
    options: dict[str, object],
    decoder: str,
    faster: tuple[str, str],
    tiny_checkpoint: Path,
    nano: Reranker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus(monkeypatch, H200)
    monkeypatch.setattr(choices, "why_not_fused", lambda *_, **__: None)
    for name, value in {"mem_get_info": (2**34, 2**35), "memory_allocated": 2**30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    config = EngineConfig(**{"model": str(tiny_checkpoint), "device": "cuda"} | options)  # type: ignore[arg-type]
    checkpoint = open_checkpoint(config.model)
    plan = make_plan(config, checkpoint)
    dtype = "fp32" if plan.weights == torch.float32 else "bf16"
    chosen = {name: getattr(plan, name) for name in ("decoder", "kernel", "cuda_graphs")}
    info = dataclasses.replace(
        nano.info, **chosen, device="cuda", dtype=dtype, compute_dtype=dtype, products=(),
        reasons={**plan.reasons, "threads": ""},
    )  # fmt: skip
    machine = describe(info, checkpoint)
    assert re.fullmatch(decoder, machine.decoder.value)
    assert (machine.decoder.faster, machine.kernel.faster) == faster


def test_a_gpu_that_another_process_has_is_no_fault_of_a_model_on_the_cpu(
    nano: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, H200)
    monkeypatch.setattr(torch.cuda, "get_device_name", Mock(side_effect=RuntimeError("CUDA error: out of memory\n...")))
    faster = describe(nano.info, nano.checkpoint).device.faster
    assert faster.endswith("cannot use cuda: CUDA error: out of memory; nvidia-smi must list it as free")


def test_an_address_is_printed_whole_on_a_narrow_terminal(
    nano: Reranker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = MachineProperty(value="cpu", faster=f"a build with CUDA ({BUILDS})")
    machine = dataclasses.replace(describe(nano.info, nano.checkpoint), device=row)
    nothing: Any = SimpleNamespace(scores=(), passed=True, is_constant=False, detail="")
    _print_tables(nano.info, nothing, nothing, machine)
    assert BUILDS in "".join(capsys.readouterr().out.split())
