"""The instruction sets of a CPU, and the choices on an architecture other than x86."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from local_rerank import Reranker
from local_rerank.engine.cpu import choices, products
from local_rerank.engine.cpu.linears import can_block
from tests.isa import LEVELS, levels_of, main, older_levels_of
from tests.reference import ModelCard
from tests.tiny_checkpoints import make_checkpoint


@pytest.mark.parametrize(
    ("cpuinfo", "names", "older"),
    [
        ("flags\t\t: fpu sse4_1 avx avx2 fma\nflags\t\t: fpu", ["sse41", "avx2"], ["sse41"]),
        ("flags\t\t: sse4_1 avx2 avx_vnni", ["sse41", "avx2"], ["sse41", "avx2"]),
        ("flags\t\t: sse4_1 avx2 avx512bw avx512_vnni", list(LEVELS), ["sse41", "avx2", "avx512"]),
        ("flags\t\t: sse4_1 avx2 avx512bw avx512_vnni avx512_bf16", list(LEVELS), list(LEVELS)),
        ("Features\t: fp asimd bf16 i8mm", [], []),
    ],
)
def test_levels_follow_the_flags_of_the_cpu(cpuinfo: str, names: list[str], older: list[str]) -> None:
    assert levels_of(cpuinfo) == names
    assert older_levels_of(cpuinfo) == older


def test_an_unknown_level_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["avx3"]) == 2
    assert "ISA is 'avx3'" in capsys.readouterr().err


def test_an_arm_cpu_computes_in_fp32_with_correct_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's capabilities of a Graviton, which has bf16 but no x86 features."""
    arm = {"architecture": "aarch64", "neon": True, "bf16": True, "i8mm": True, "sve": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: arm)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    products.seconds_of_products.cache_clear()
    assert not can_block()
    assert choices.preferred_dtype()[0] == torch.float32
    folder = make_checkpoint(tmp_path / "model", seed=12)
    pairs = [("q", "a"), ("q", "bb"), ("r", "a")]
    with Reranker(str(folder), device="cpu") as reranker:
        assert reranker.info.products == ("fp32", "attention fp32")
        scores = reranker.score(pairs, logits=True)
    assert scores == pytest.approx([ModelCard(folder).pair(*pair) for pair in pairs], abs=1e-5)
    products.seconds_of_products.cache_clear()
