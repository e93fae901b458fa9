"""Room for models on GPUs, which a stand-in simulates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from local_rerank import EngineConfig
from local_rerank.models.loader import EngineLoader
from tests.engine.cuda.test_choices import H200, gpus


@pytest.mark.parametrize(
    ("device", "name"),
    [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu:0", "cpu")],
)
def test_models_on_the_same_device_have_the_same_name_for_it_and_make_room_for_each_other(
    device: str, name: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, H200, H200)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    config = EngineConfig(model=str(tiny_checkpoint), device=device, dtype="fp32")
    assert EngineLoader(self_test=False).inspect(config)[1] == name
