"""The attention kernels for CUDA against the dense definition; without a GPU, on a reference operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen

from local_rerank import Reranker
from local_rerank.engine.attention import layout_to
from local_rerank.engine.cuda import attention as cuda_attention
from local_rerank.engine.decoder import PackedAttention
from local_rerank.engine.encoder import pack_segments
from local_rerank.engine.kernel_table import KERNELS
from local_rerank.engine.packing import pack
from local_rerank.requests.pair import Pair
from tests.encoder_checkpoints import OF, DenseEncoder, make_encoder
from tests.engine.test_packing import agrees_with_dense, some_pairs
from tests.engine.test_scores import texts
from tests.gpu import needs_gpu
from tests.reference import FP32_TOLERANCE, ModelCard
from tests.varlen_reference import slow_varlen

# prefixes and documents just below and above a tile's 32 queries and a block's 64 keys; 17 documents, a tile holds 16
LONG_PAIRS = [Pair.of((1,) * 70, (2,) * length) for length in (*[1] * 15, 32, 75)] + [Pair.of((3,) * 64, (4,) * 33)]
CUDA_KERNELS = [
    pytest.param(name, marks=pytest.mark.slow) if name == "cuda-tiles" else name  # in Triton's interpreter
    for name, row in KERNELS.items()
    if row.device_types == ("cuda",)
]


@pytest.fixture(scope="class")  # per test; hypothesis refuses function scope
def on_cpu() -> Iterator[None]:
    """Replaces torch's operator by the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_attention, "torch_varlen", slow_varlen)
        yield


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("last_tokens_only", [False, True])
@pytest.mark.parametrize("kernel", CUDA_KERNELS)
@settings(max_examples=5)
@given(pairs=some_pairs, seed=st.integers(0, 9))
@example(pairs=LONG_PAIRS, seed=0)
def test_each_kernel_attends_as_the_dense_definition(
    kernel: str, last_tokens_only: bool, pairs: list[Pair], seed: int
) -> None:
    assert agrees_with_dense(kernel, pairs, last_tokens_only=last_tokens_only, seed=seed)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("window", "last_tokens_only"), [(None, False), (None, True), (6, False)])
@pytest.mark.parametrize("kernel", ["cuda-varlen", "sdpa"])
def test_an_encoders_tokens_see_their_pair_or_a_window_of_it(
    kernel: str, window: int | None, last_tokens_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local_rerank.engine.attention.QUERIES_PER_CALL", 16)
    pairs = [Pair.of((), (1,) * length) for length in (1, 5, 5, 16, 41)]
    encoder = {"is_causal": False, "window": window, "num_kv_heads": 4}
    assert agrees_with_dense(kernel, pairs, last_tokens_only=last_tokens_only, **encoder)


@pytest.mark.parametrize("last_tokens_only", [False, True])
def test_an_encoders_keys_are_not_copied(last_tokens_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, row = pack_segments([Pair.of((), (1,) * length) for length in (1, 5, 5)]), KERNELS["cuda-varlen"]
    read: list[int] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        read.extend([k.data_ptr(), v.data_ptr()])
        return slow_varlen(q, k, v, *rest, **options)

    monkeypatch.setattr(cuda_attention, "torch_varlen", watched)
    joined = torch.randn(batch.num_tokens, 3, 4, 16)  # the product of queries, keys and values
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in joined.unbind(1))
    q = q[:, :, batch.last_token_index] if last_tokens_only else q
    row.attend(q, k, v, row.layout(batch, last_tokens_only), 0.25)
    assert read == [k.data_ptr(), v.data_ptr()]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "kernel", ["cuda-merged", "cuda-varlen"]
)  # cuda-tiles only runs in our decoder: test_layers.py
def test_each_kernel_scores_as_the_model_card(kernel: str, tiny_reranker: Reranker, card: ModelCard) -> None:
    engine = tiny_reranker.engine
    before, engine.kernel = engine.kernel, KERNELS[kernel]
    try:
        result = tiny_reranker.rank("which one", [text[:30] for text in texts(5, 12)])
    finally:
        engine.kernel = before
    alone = [card.pair("which one", item.document) for item in result]
    tolerance = FP32_TOLERANCE * max(1.0, *map(abs, alone))  # rounding errors grow with the logits
    assert [item.log_odds for item in result] == pytest.approx(alone, abs=tolerance)


@pytest.mark.parametrize("hasgqa_option", [False, True], ids=["torch 2.11", "torch 2.12 and later"])
@pytest.mark.parametrize("lse_by_token", [False, True])
def test_torchs_operator_is_called_with_the_arguments_of_each_version(
    hasgqa_option: bool, lse_by_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both signatures, on the reference, and both layouts of the log-sum-exp: torch's docstring has the other one."""

    def run(q: Tensor, k: Tensor, v: Tensor, cu: Any, longest: Any, window: tuple[int, int], scale: float) -> Any:
        out, lse = slow_varlen(q, k, v, cu, longest, window=window, scale=scale)
        return out, lse.T if lse_by_token else lse

    def torch_2_11(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> Any:  # fmt: skip
        assert return_aux.lse
        assert scale is not None
        return run(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), window_size, scale)

    def torch_2_12(*positional: Any, enable_gqa: bool = False, **options: Any) -> Any:
        assert enable_gqa
        return torch_2_11(*positional, **options)

    monkeypatch.setattr(varlen, "varlen_attn", torch_2_12 if hasgqa_option else torch_2_11)
    cuda_attention.gqa_option.cache_clear()
    pairs = [Pair.of((1, 2, 3), tuple(range(n))) for n in (1, 4, 4, 9)]
    for kernel in ("cuda-merged", "cuda-varlen"):
        assert agrees_with_dense(kernel, pairs, last_tokens_only=False)
    monkeypatch.undo()
    cuda_attention.gqa_option.cache_clear()


def test_the_installed_torch_accepts_our_arguments() -> None:
    """On meta tensors, for which torch infers shapes without running the kernel."""
    q, k = torch.empty(5, 4, 16, device="meta"), torch.empty(5, 2, 16, device="meta")
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    out, lse = cuda_attention.torch_varlen(q, k, k, (cu, cu), (5, 5), window=(-1, 0), scale=1.0)
    assert (out.shape, lse.shape) == (q.shape, (4, 5))


def test_a_layout_is_made_on_the_host_and_moves_as_a_whole() -> None:
    batch = pack([Pair.of((1, 2), (3, 4)), Pair.of((1, 2), (5,)), Pair.of((6,), (7,))])
    for kernel, row in KERNELS.items():
        for last_tokens_only in (False, True):
            layout = row.layout(batch, last_tokens_only)
            moved = layout_to(layout, torch.device("meta"))
            for before, after in _tensors(layout, moved):
                assert (before.device.type, after.device.type) == ("cpu", "meta"), kernel
                assert before.shape == after.shape


def test_a_layout_is_copied_once_for_each_device_of_a_spread_model() -> None:
    row = KERNELS["cuda-merged"]
    packed_attention = PackedAttention(row, row.layout(pack([Pair.of((1, 2), (3, 4))]), False))
    first, again = (packed_attention.layout_on(torch.device("meta")) for _ in range(2))
    assert first is again
    assert first.cu_seqlens.device.type == "meta"
    assert packed_attention.layout_on(torch.device("cpu")).cu_seqlens.device.type == "cpu"


def _tensors(*layouts: Any) -> list[tuple[Tensor, ...]]:
    """The tensors of several layouts, field by field."""
    if isinstance(layouts[0], Tensor):
        return [layouts]
    values = [tuple(getattr(layout, f.name) for layout in layouts) for f in fields(layouts[0])]
    return [pair for pair in values if isinstance(pair[0], Tensor)]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last_tokens_only", [False, True])
@pytest.mark.parametrize("kernel", [*CUDA_KERNELS, "sdpa"])
def test_each_kernel_attends_as_the_dense_definition_on_a_gpu(
    kernel: str, last_tokens_only: bool, dtype: torch.dtype
) -> None:
    row, dense = KERNELS[kernel], KERNELS["dense"]
    cuda, tolerance = torch.device("cuda"), {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]  # of numbers up to 4.5
    for seed, lengths in enumerate(([1], [1, 1, 7, 40, 300], [128] * 5, [16] * 16, list(range(1, 64)))):
        torch.manual_seed(seed)
        pairs = [Pair.of(tuple(range(1 + i % 3 * 40)), tuple(range(n))) for i, n in enumerate(lengths)]
        batch = pack(pairs)
        q = torch.randn(1, batch.num_pairs if last_tokens_only else batch.num_tokens, 16, 128).transpose(1, 2)
        k, v = (torch.randn(1, batch.num_tokens, 8, 128).transpose(1, 2) for _ in range(2))
        exact = dense.attend(q, k, v, dense.layout(batch, last_tokens_only), 128**-0.5)
        layout = layout_to(row.layout(batch, last_tokens_only), cuda)
        ours = row.attend(*(x.to(cuda, dtype) for x in (q, k, v)), layout, 128**-0.5)
        assert torch.allclose(ours.cpu().float(), exact, atol=tolerance)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "kernel"), [("bf16", "cuda-varlen"), ("fp32", "sdpa")])
@pytest.mark.parametrize("kind", OF)
def test_an_encoder_on_a_gpu_scores_as_transformers(kind: str, dtype: str, kernel: str, tmp_path: Path) -> None:
    folder, documents = make_encoder(tmp_path / "model", kind), texts(5, 12)
    expected = DenseEncoder(folder).logits("which one", documents)[:, 0].tolist()
    with Reranker(str(folder), device="cuda", dtype=dtype) as reranker:
        assert reranker.info.kernel == kernel
        found = {item.index: item.log_odds for item in reranker.rank("which one", documents)}
    # on a CPU they differ by .038 and 3e-6; a GPU has other exponentials, and sums in other orders
    tolerance = (0.1 if dtype == "bf16" else 10 * FP32_TOLERANCE) * max(1.0, *map(abs, expected))
    assert [found[i] for i in range(len(documents))] == pytest.approx(expected, abs=tolerance)
