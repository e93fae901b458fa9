"""Which linear layers int8 multiplies: searched once, read from the cache folder by later starts."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from local_rerank import Reranker
from local_rerank.checkpoints.free_space import cache_folder
from local_rerank.engine.cpu import int8_search
from local_rerank.engine.cpu.int8 import Int8Linear
from local_rerank.engine.cpu.int8_search import (
    LANES,
    LINEARS_PER_LAYER,
    _ReusedLayer,
    checksum,
    facts_of,
    quantize_layers,
)
from local_rerank.engine.cpu.layers import CpuLayer
from local_rerank.engine.engine import Engine
from local_rerank.requests.tokenization import Pair
from local_rerank.selftest.machine_report import describe
from tests.tiny_checkpoints import make_checkpoint

FACTS = {"weights": "some"}
SPOILED = ["layers.0.self_attn.o_proj", "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO)
    return cache_folder() / "int8"


class Model:
    """A small decoder, and a scorer that is moved while one of `spoiled` is in int8; counts its calls."""

    def __init__(self, folder: Path, spoiled: Iterable[str] = SPOILED) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.spoiled = list(spoiled)
        self.num_passes = 0

    def log_odds(self) -> list[float]:
        self.num_passes += 1
        moved = any(name in self.spoiled for name in self.int8_names())
        return [value + 10.0 * moved for value in [1.0, 0.0] * 4]

    def int8_names(self) -> list[str]:
        names = [name for name, module in self.model.model.named_modules() if isinstance(module, Int8Linear)]
        return [name.replace(".layer.", ".") for name in names]  # while it is searched, layers are wrapped

    def choose(self, facts: dict[str, Any] | None = FACTS) -> list[str]:
        return quantize_layers(self.model.model.layers, self.log_odds, facts)


def only_file(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def test_a_second_start_searches_nothing_and_chooses_the_same(tiny_checkpoint: Path, cache: Path) -> None:
    first, second = Model(tiny_checkpoint), Model(tiny_checkpoint)
    assert first.choose() == second.choose() == SPOILED
    assert (first.num_passes > 8, second.num_passes) == (True, 0)
    assert len(first.int8_names()) == 2 * LINEARS_PER_LAYER - len(SPOILED)
    assert first.int8_names() == second.int8_names()
    assert json.loads(only_file(cache).read_text(encoding="utf-8"))["fp32_layers"] == SPOILED


def test_that_nothing_is_spoiled_is_kept_too(tiny_checkpoint: Path) -> None:
    first, second = Model(tiny_checkpoint, []), Model(tiny_checkpoint, [])
    assert first.choose() == second.choose() == []
    assert (first.num_passes, second.num_passes) == (2, 0)
    assert len(second.int8_names()) == 2 * LINEARS_PER_LAYER


def test_the_built_in_model_starts_again_with_equal_scores_and_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    score = Engine.score
    monkeypatch.setattr(Engine, "score", lambda *given: passes.append(1) or score(*given))  # type: ignore[func-returns-value]
    chosen, scores = [], []
    for _ in range(2):
        with Reranker(device="cpu", dtype="int8") as reranker:
            chosen.append((reranker.info.unquantized, len(passes)))
            scores.append([item.log_odds for item in reranker.rank("capital of France", ["Paris", "Rome", ""])])
        passes.clear()
    (first, num_first), (second, num_second) = chosen
    assert (first, scores[0]) == (second, scores[1])
    assert (num_first > 20, num_second) == (True, 0)


def test_what_changes_the_result_is_searched_anew(tmp_path: Path, tiny_checkpoint: Path, cache: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    for folder, options, num_files in (
        (tiny_checkpoint, {}, 1),
        (tiny_checkpoint, {}, 1),
        (tiny_checkpoint, {"threads": 1, "max_query_tokens": 2}, 1),
        (tiny_checkpoint, {"deterministic": True}, 2),
        (tiny_checkpoint, {"attention": "dense"}, 3),
        (other, {}, 4),
    ):
        with Reranker(str(folder), device="cpu", dtype="int8", **options):
            assert len(list(cache.iterdir())) == num_files, options


def changed(monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, Any]:
    weights, prompts, more = {"w": torch.arange(8.0)}, [Pair((1,), (2,))], {"values": "None"}
    match name:
        case "weights":
            weights["w"][3] += 1e-6
        case "prompts":
            prompts = [Pair((1,), (3,))]
        case "what the loader decided":
            more["values"] = "torch.bfloat16"
        case "limited pairs":
            limits = int8_search.saturates()
            monkeypatch.setattr(int8_search, "saturates", lambda: not limits)
        case "version":
            monkeypatch.setattr(int8_search, "__version__", "0.0.0")
        case "tolerance":
            monkeypatch.setattr(int8_search, "TOLERANCE", 0.2)
        case "a CPU":
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
        case _ if name:
            monkeypatch.setenv(name, "AVX2")
    return dict(facts_of(weights, prompts, **more))


@pytest.mark.parametrize(
    "name",
    [
        "weights", "prompts", "what the loader decided", "limited pairs", "version", "tolerance", "a CPU",
        "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS",
    ],
)  # fmt: skip
def test_the_key_changes_with(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = changed(monkeypatch, "")
    assert changed(monkeypatch, "") == before
    assert changed(monkeypatch, name) != before


def test_the_key_does_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    before = changed(monkeypatch, "")
    more_cores = {**capabilities, "num_physical_cores": 64, "num_logical_cores": 128}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: more_cores, raising=False)
    assert changed(monkeypatch, "") == before


def numbers() -> Tensor:
    """Three folded rows and a rest, no two values alike."""
    return torch.arange(3 * LANES * 2 + 5, dtype=torch.float32)


@pytest.mark.parametrize("index", [0, 1, 2 * LANES, -1])
def test_a_checksum_sees_every_value(index: int) -> None:
    other = numbers()
    other[index] += 1
    assert checksum({"w": other}) != checksum({"w": numbers()}) == checksum({"w": numbers()})


@pytest.mark.parametrize(
    "change",
    [
        lambda w: torch.cat([w[LANES * 2 : LANES * 4], w[: LANES * 2], w[LANES * 4 :]]),  # two rows exchanged
        lambda w: torch.cat([w[2:4], w[:2], w[4:]]),  # two numbers of a row
        lambda w: w.view(1, -1),
        lambda w: w.view(torch.int32),
    ],
)
def test_a_checksum_sees_order_shape_and_dtype(change: Callable[[Tensor], Tensor]) -> None:
    assert checksum({"w": change(numbers())}) != checksum({"w": numbers()})
    assert checksum({"v": numbers()}) != checksum({"w": numbers()})


def test_a_checksum_does_not_depend_on_where_a_tensor_lies() -> None:
    shifted = torch.cat([torch.zeros(1), numbers()])[1:]  # at an odd multiple of four bytes
    assert checksum({"w": shifted}) == checksum({"w": numbers()})
    assert checksum({"w": numbers()[:6].view(2, 3).T.contiguous().T}) == checksum({"w": numbers()[:6].view(2, 3)})


def stored(**changes: Any) -> str:
    return json.dumps({"fp32_layers": SPOILED, "facts": FACTS} | changes)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", "[" * 100_000, stored()[:-9], stored(fp32_layers=3), stored(fp32_layers=[[]]),
        stored(facts={}), stored(fp32_layers=["layers.9.mlp.down_proj"]), stored(fp32_layers=SPOILED[:2]), "\udcff",
    ],
)  # fmt: skip
def test_a_file_that_is_damaged_or_of_another_model_is_replaced(
    text: str, tiny_checkpoint: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Model(tiny_checkpoint).choose()
    good = only_file(cache).read_bytes()
    only_file(cache).write_bytes(text.encode("utf-8", "surrogateescape"))
    caplog.clear()
    model = Model(tiny_checkpoint)
    assert model.choose() == SPOILED
    assert model.num_passes > 8
    assert "cannot be used" in caplog.text
    assert only_file(cache).read_bytes() == good


def test_a_cache_that_cannot_be_written_costs_no_start(
    tiny_checkpoint: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def is_full(*given: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", is_full)
        assert Model(tiny_checkpoint).choose() == SPOILED
    assert list(cache.iterdir()) == []
    assert "cannot be kept" in caplog.text
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    caplog.clear()
    assert Model(tiny_checkpoint).choose() == SPOILED
    assert "cannot be kept" in caplog.text

    def no_home() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert Model(tiny_checkpoint).choose() == SPOILED
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_many_that_write_at_once_leave_one_whole_file(cache: Path, tiny_checkpoint: Path) -> None:
    groups = int8_search._groups(Model(tiny_checkpoint).model.model.layers)

    def write_and_read(_: int) -> set[str] | None:
        int8_search._write(FACTS, SPOILED)
        return int8_search._read(FACTS, groups)

    with ThreadPoolExecutor(8) as pool:
        assert all(names == set(SPOILED) for names in pool.map(write_and_read, range(80)))
    assert only_file(cache).suffix == ".json"


def test_without_facts_nothing_is_written(tiny_checkpoint: Path, cache: Path) -> None:
    assert Model(tiny_checkpoint).choose(None) == SPOILED
    assert not cache.exists()


def test_the_log_tells_what_a_search_does_and_what_it_found(
    tiny_checkpoint: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Model(tiny_checkpoint).choose()
    begin, end, kept = (record.message for record in caplog.records)
    assert begin.startswith("choosing which of 14 linear layers int8 multiplies, in at most 11 passes")
    assert end.startswith("int8 multiplies 11 of 14 linear layers (")
    assert kept.endswith(f"is kept in {only_file(cache)}")
    caplog.clear()
    Model(tiny_checkpoint).choose()
    (read,) = caplog.records
    assert read.message.endswith(f"was read from {only_file(cache)}: 3 linear layers stay in fp32")


def test_a_model_whose_layers_all_stay_in_fp32_is_warned_of_at_every_start(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    every = [name for name, _ in Model(tiny_checkpoint).model.model.named_modules() if name.endswith("_proj")]
    for _ in range(2):
        caplog.clear()
        assert sorted(Model(tiny_checkpoint, every).choose()) == sorted(every)
        (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
        assert "every linear layer" in warning.message


@pytest.mark.parametrize("owns", [True, False])
def test_a_command_in_a_terminal_shows_a_bar_and_a_library_shows_none(
    owns: bool, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(int8_search, "owns_process", lambda: owns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    Model(tiny_checkpoint).choose()
    out, err = capfd.readouterr()
    assert out == ""
    assert ("choosing layers for int8" in err) == owns
    assert ("8/8" in err) == owns
    assert owns or err == ""


def test_layers_before_the_changed_one_are_not_computed_again_and_scores_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_search, "MAX_MISORDERED", 4)
    monkeypatch.setattr(int8_search, "SHARE_OF_ALL", 0.0)  # so that every group is tried
    folder = make_checkpoint(tmp_path / "model", num_hidden_layers=4)
    scores: list[list[float]] = []
    layers: list[Any] = []
    score, layer_forward = Engine.score, CpuLayer.forward

    def scored(engine: Engine, pairs: Sequence[Pair]) -> list[float]:
        scores.append(score(engine, pairs))
        return scores[-1]

    def counted(layer: CpuLayer, hidden: Tensor, rotation: Any, attend: Any, layout: Any, *last: Tensor) -> Tensor:
        if not last:
            layers.append(layer)
        return layer_forward(layer, hidden, rotation, attend, layout, *last)

    monkeypatch.setattr(Engine, "score", scored)
    monkeypatch.setattr(CpuLayer, "forward", counted)
    with Reranker(str(folder), device="cpu", dtype="int8") as reranker:
        chosen = reranker.info.unquantized
        assert all(type(layer) is CpuLayer for layer in list(reranker.engine.decoder.layers)[:-1])
    # three passes through all layers but the last, then four for each layer, through it and those after it
    assert len(layers) == 3 * 3 + 4 * (3 + 2 + 1)
    reused = scores.copy()
    scores.clear()
    monkeypatch.setattr(_ReusedLayer, "forward", lambda self, x, *given: self.layer(x, *given))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another cache"))
    with Reranker(str(folder), device="cpu", dtype="int8") as reranker:
        assert reranker.info.unquantized == chosen
    assert scores == reused
    assert len({tuple(odds) for odds in scores}) == 1 + 1 + 16  # exact, all in int8, each group


def test_doctor_counts_the_layers_in_int8(tiny_checkpoint: Path) -> None:
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="int8") as reranker:
        row = describe(reranker.info, reranker.checkpoint).dtype
    num_int8 = 14 - len(reranker.info.unquantized)
    assert row.value.startswith(f"int8 weights and activations in {num_int8} of 14 linear layers, the rest fp32")
