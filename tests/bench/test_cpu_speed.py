"""`local-rerank plan` for this machine's CPU: measured once, kept, and told before a download."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from local_rerank import EngineConfig
from local_rerank.bench import cpu_speed, kept_speeds
from local_rerank.bench.kept_speeds import CpuSpeed, before_download
from local_rerank.engine.cpu.thread_policy import Load
from local_rerank.errors import CheckpointError
from local_rerank.models.options import models_of
from local_rerank_server.config import ServerConfig
from local_rerank_server.process import _load
from local_rerank_server.state import ServerState
from tests.command_line import command

MODELS = ("qwen3-reranker-0.6b", "qwen3-reranker-4b", "qwen3-reranker-8b")
ROW = CpuSpeed(arithmetic="fp32", tokens_per_second=100.0, seconds=26.0)
INT8 = CpuSpeed(arithmetic="int8", tokens_per_second=250.0, seconds=4.25)
WORDS = "20 passages of 100 words: 26 s with qwen3-reranker-0.6b in fp32 (auto), 4.2 s in int8"
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, no network, and a tiny decoder instead of layers of the 0.6B shape."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(cpu_speed, "CONFIG", cpu_speed.CONFIG | TINY)
    monkeypatch.setattr(cpu_speed, "MAX_SECONDS", 0.0)
    monkeypatch.setattr("local_rerank.engine.cpu.threads.default_count", lambda: 1)  # tests share the cores
    return tmp_path / "local-rerank/cpu-speed"


def keep() -> None:
    kept_speeds.write({model: {"auto": ROW, "int8": INT8} for model in MODELS}, was_busy=False)


def planned(*arguments: str) -> tuple[str, str]:
    done = command("plan", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


class BusySensor:
    """Takes the place of a `LoadSensor` whose threads wait half of the time."""

    def read(self, *, with_idle: bool) -> Load:
        return Load(waited=0.5, idle_cpus=None)


def test_the_first_plan_measures_this_cpu_and_later_ones_read_the_figures(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, note = planned()
    assert note.startswith("measuring this CPU once")
    for model in MODELS:
        assert f"s with {model} in " in first
    assert "tokens/s per cpu: measured; " in first
    assert planned() == (first, "")
    (path,) = cache.iterdir()
    path.write_text(path.read_text()[:-5])
    monkeypatch.setattr(cpu_speed, "LoadSensor", BusySensor)
    again, note = planned()
    assert note.startswith("measuring"), "the file was damaged"
    assert "other processes used the CPU: estimated from CPU time" in again
    assert planned() == (again, "")


def test_the_figures_are_scaled_by_useful_operations(cache: Path) -> None:
    models, _ = cpu_speed.measure_speeds()
    assert tuple(models) == MODELS
    small, large = models[MODELS[0]]["auto"], models[MODELS[2]]["auto"]
    assert large.seconds / small.seconds == pytest.approx(small.tokens_per_second / large.tokens_per_second, rel=0.01)
    assert 14 < large.seconds / small.seconds < 17  # 15.8 times the parameters
    tokens = kept_speeds.PASSAGES * cpu_speed.DOCUMENT_TOKENS + cpu_speed.PREFIX_TOKENS
    assert small.seconds == pytest.approx(tokens / small.tokens_per_second, rel=0.01)
    assert models[MODELS[0]]["int8"].arithmetic == "int8"


def test_a_plan_on_this_cpu_follows_from_the_kept_rate(cache: Path) -> None:
    keep()
    said, _ = planned(
        "--pairs", "36e3", "--tokens", "200", "--shared-tokens", "100", "--documents", "100", "--gpus", "2xCPU"
    )
    for part in (WORDS, "measured; ", "fp32 (auto)", "1.98 pairs/s with 2", "time      5.0 hours", "machines  2\n"):
        assert part in said
    shown = json.loads(planned("--json")[0])
    assert shown["this_cpu"]["models"]["qwen3-reranker-8b"]["int8"]["seconds"] == 4.25


def stored(dtype: str = "auto", **figures: float) -> dict[str, Any]:
    return {"models": {model: {dtype: {"arithmetic": "fp32", **figures}} for model in MODELS}}


@pytest.mark.parametrize(
    "damage",
    [
        {"facts": {}},
        {"models": {}},
        {"models": 5},
        stored("int8", tokens_per_second=1.0, seconds=1.0),
        stored(tokens_per_second=1.0, seconds=0),
        stored(tokens_per_second=1.0),
    ],
)
def test_a_damaged_file_is_not_used(damage: dict[str, Any], cache: Path) -> None:
    keep()
    (path,) = cache.iterdir()
    assert kept_speeds.read() is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    assert kept_speeds.read() is None


def test_other_threads_or_variables_are_measured_for_themselves(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert kept_speeds.read() is None


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.parent.write_text("a file where the folder would be")
    keep()
    assert kept_speeds.read() is None


def test_a_plan_for_other_devices_measures_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_speed, "measure_speeds", lambda: pytest.fail("measured"))
    assert "this CPU" not in planned("--gpus", "8xH200")[0]
    assert "this CPU" not in planned("--tokens-per-second", "900")[0]
    done = command("plan", "--model", "other")
    assert "model is 'other'; on this CPU it must be qwen3-reranker-0.6b" in done.stderr
    assert not cache.exists()


def test_a_kept_speed_is_told_before_a_download(
    cache: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(model="Qwen/Qwen3-Reranker-0.6B", device="cpu")
    assert before_download(config) == ""
    keep()
    line = f"on this CPU, {WORDS}"
    assert before_download(config).startswith(line)
    for other in ({"model": None}, {"model": "a/b"}, {"device": "cuda"}, {"threads": 64}):
        assert before_download(dataclasses.replace(config, **other)) == ""  # type: ignore[arg-type]
    for arguments in (["pull", MODELS[0]], ["rank", "q", "d", "--model", MODELS[0], "--device", "cpu"]):
        done = command(*arguments)
        assert done.returncode == 1, "there is no network"
        assert done.stderr.startswith(line)
    with caplog.at_level(logging.INFO), pytest.raises(CheckpointError):
        _load(models_of((), config), ServerState(ServerConfig()))
    assert any(message.startswith(line) for message in caplog.messages)
    shutil.copytree(tiny_checkpoint, cache.parents[1] / "hub/models--Qwen--Qwen3-Reranker-0.6B/snapshots/0")
    assert before_download(config) == "", "it is in the hub's cache"
