"""The attention kernel compiled for GPUs that are not here: it fits, spills next to nothing, and shares its SM."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from benchmarks.compiled_kernels import CARDS, CompiledKernel, attention_kernels, is_good
from local_rerank.engine.cuda.attention import QUERIES_OF_LAST_TOKENS, QUERIES_PER_TILE


def test_two_blocks_of_attention_fit_on_an_sm_of_hopper(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m benchmarks.compiled_kernels` shows all kernels on all cards, which takes a minute."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # a process of its own compiles, because this one interprets
    monkeypatch.setenv("TRITON_CACHE_DIR", str(pytestconfig.cache.mkdir("triton")))  # type: ignore[union-attr]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        kernels = process.submit(attention_kernels, (9, 0), "qwen3-reranker-0.6b").result()
    assert [kernel.constants["QUERIES"] for kernel in kernels] == [QUERIES_PER_TILE, QUERIES_OF_LAST_TOKENS]
    assert [kernel.blocks_per_sm((9, 0)) for kernel in kernels] == [2, 2]
    assert all(is_good(kernel, (9, 0)) for kernel in kernels)


@pytest.mark.parametrize(
    ("kernel", "registers", "spilled_bytes", "capability", "good"),
    [
        ("_attend_tiles", 196, 0, (9, 0), True),
        ("_attend_tiles", 196, 8, (9, 0), False),
        ("_attend_tiles", 255, 0, (8, 6), False),
        ("_attend_tiles", 255, 5320, (7, 5), True),
        ("_silu_mul", 255, 0, (8, 6), True),
        ("_silu_mul", 40, 8, (7, 5), False),
    ],
)
def test_a_kernel_is_good_if_it_fits_and_spills_nothing(
    kernel: str, registers: int, spilled_bytes: int, capability: tuple[int, int], good: bool
) -> None:
    compiled = CompiledKernel(kernel, {}, registers, spilled_bytes, 53_248, 4)
    assert is_good(compiled, capability) == good


def test_blocks_are_limited_by_what_runs_out_first() -> None:
    """Registers, shared memory, threads, the number of blocks; 0 blocks if one alone takes too much."""

    def blocks(registers: int, shared_bytes: int, num_warps: int, capability: tuple[int, int]) -> int:
        return CompiledKernel("any", {}, registers, 0, shared_bytes, num_warps).blocks_per_sm(capability)

    assert blocks(196, 114_688, 4, (9, 0)) == 2
    assert blocks(188, 131_072, 8, (9, 0)) == 1
    assert blocks(128, 1024, 8, (9, 0)) == 2
    assert blocks(32, 0, 4, (9, 0)) == 16
    assert blocks(32, 0, 4, (8, 6)) == 12
    assert blocks(32, 0, 1, (9, 0)) == 32
    assert blocks(32, 98_304, 4, (7, 5)) == 0
    assert all(blocks(255, 1024 * card.shared_kib, 8, capability) == 1 for capability, card in CARDS.items())
