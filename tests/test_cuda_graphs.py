"""Small batches in the buffers of a graph: the same scores, through a stand-in for the capture alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from torch import Tensor

from local_rerank import EngineConfig, Reranker, cuda, cuda_attention, cuda_graphs
from local_rerank.attention import KERNELS
from local_rerank.cuda_attention import MergedLayout, merged_layout
from local_rerank.cuda_graphs import CAPTURE_AT, MAX_GRAPHS, MAX_SEGMENTS, MAX_TOKENS, GraphRunner, padded, shape_of
from local_rerank.engine import Engine
from local_rerank.packing import PackedBatch, pack
from local_rerank.tokenization import Pair
from tests.test_packing import some_pairs
from tests.test_scores import FP32_TOLERANCE
from tests.varlen_reference import slow_varlen

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def rerun(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """In place of a capture: a replay runs the pass again over the same buffers, into the same output."""
    output = run()
    output.fill_(float("nan"))  # nothing is computed by capturing

    def replay() -> None:
        output.copy_(run())

    return replay, output


@pytest.fixture
def engine(tiny_reranker: Reranker) -> Iterator[Engine]:
    """The tiny model behind the merged kernel, whose operator is the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_attention, "torch_varlen", slow_varlen)
        yield tiny_reranker._engine.with_kernel(KERNELS["cuda-merged"])


def runner(engine: Engine, capture: cuda_graphs.Capture = rerun) -> GraphRunner:
    return GraphRunner(engine._unpruned_odds, CPU, capture)


def run(graphs: GraphRunner, batch: PackedBatch) -> Tensor | None:
    with torch.inference_mode():
        return graphs.run(batch)


def pairs_of(*lengths: int, prefix: int = 5) -> list[Pair]:
    return [Pair(tuple(range(1, 1 + prefix)), tuple(range(7, 7 + n))) for n in lengths]


def captured(graphs: GraphRunner, batch: PackedBatch) -> Tensor:
    """The scores of a batch whose shape is captured by then."""
    for _ in range(CAPTURE_AT - 1):
        run(graphs, batch)
    scores = run(graphs, batch)
    assert scores is not None
    return scores


def layout_of(batch: PackedBatch) -> MergedLayout:
    layout = merged_layout(batch, False)
    assert isinstance(layout, MergedLayout)
    return layout


def test_a_shape_is_captured_when_it_comes_again_and_its_scores_are_the_same(engine: Engine) -> None:
    graphs = runner(engine)
    batch = pack([*pairs_of(3, 9, 9), Pair((4, 4), (5, 6, 7))])
    assert run(graphs, batch) is None
    assert graphs.num_graphs == 0
    scores = run(graphs, batch)
    assert graphs.num_graphs == 1
    assert scores is not None
    packed = torch.empty_like(scores).scatter_(0, batch.pair_order, scores)
    assert torch.allclose(packed, engine.forward(batch), atol=FP32_TOLERANCE * max(1.0, float(scores.abs().max())))


def test_other_batches_of_one_shape_share_a_graph_and_leave_nothing_of_the_one_before(engine: Engine) -> None:
    graphs = runner(engine)
    batches = [pack(pairs_of(*lengths)) for lengths in ([20, 20, 10], [1], [2, 2, 2, 2, 2], [20, 20, 10], [40])]
    for batch in batches:
        scores = captured(graphs, batch)
        packed = torch.empty_like(scores).scatter_(0, batch.pair_order, scores)
        assert torch.allclose(packed, engine.forward(batch), atol=FP32_TOLERANCE * max(1.0, float(packed.abs().max())))
    assert graphs.num_graphs == 1


@given(pairs=some_pairs)
def test_padding_changes_sizes_and_nothing_that_a_segment_holds(pairs: list[Pair]) -> None:
    batch = pack(pairs)
    layout = layout_of(batch)
    shape = shape_of(batch, layout)
    assert shape is not None
    wide_batch, wide = padded(batch, layout, shape)
    assert wide_batch.num_tokens == shape.num_tokens >= batch.num_tokens
    assert torch.equal(wide_batch.input_ids[:, : batch.num_tokens], batch.input_ids)
    assert torch.equal(wide_batch.last_token_index[: batch.num_pairs], batch.last_token_index)
    for name in ("cu_seqlens", "cu_seqlens_group", "cu_seqlens_prefix"):
        before, after = getattr(layout, name), getattr(wide, name)
        assert after[: len(before)].tolist() == before.tolist()
        assert set(after[len(before) :].tolist()) <= {before[-1].item()}  # segments of no length
        assert after.dtype == torch.int32
    assert layout.max_seqlen <= wide.max_seqlen
    assert layout.max_seqlen_group <= wide.max_seqlen_group
    assert layout.max_seqlen_prefix <= wide.max_seqlen_prefix
    assert int(wide.is_document.sum()) == int(layout.is_document.sum())


@pytest.mark.parametrize(
    "batch",
    [pack(pairs_of(MAX_TOKENS)), pack(pairs_of(*[1] * (MAX_SEGMENTS + 1), prefix=1))],
    ids=["many tokens", "many segments"],
)
def test_a_batch_that_is_too_large_is_left_to_the_plain_way(engine: Engine, batch: PackedBatch) -> None:
    graphs = runner(engine)
    assert [run(graphs, batch) for _ in range(3)] == [None] * 3
    assert graphs.num_graphs == 0


def test_no_more_graphs_are_captured_than_there_is_room_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    assert MAX_GRAPHS > 2
    graphs = runner(engine)
    for num_tokens in (30, 100, 200, 300):
        for _ in range(CAPTURE_AT):
            run(graphs, pack(pairs_of(num_tokens)))
    assert graphs.num_graphs == 2
    assert run(graphs, pack(pairs_of(30))) is not None
    assert run(graphs, pack(pairs_of(300))) is None


def test_a_capture_that_fails_turns_graphs_off_and_the_batch_is_scored(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = runner(engine, fails)
    with caplog.at_level(logging.WARNING):
        assert [run(graphs, pack(pairs_of(3))) for _ in range(5)] == [None] * 5
    assert caplog.text.count("CUDA graphs are off") == 1


def test_the_engine_takes_a_graph_where_there_is_one(engine: Engine) -> None:
    batch = pack(pairs_of(4, 4, 11))
    expected = engine.forward(batch)
    engine._graphs = runner(engine)
    for _ in range(3):
        scores = engine.forward(batch)
        assert torch.allclose(scores, expected, atol=FP32_TOLERANCE * max(1.0, float(expected.abs().max())))
    assert engine._graphs.num_graphs == 1


def test_graphs_are_for_one_gpu_and_a_layout_that_can_be_padded() -> None:
    device, merged = torch.device("cuda"), KERNELS["cuda-merged"]
    assert cuda.uses_graphs(EngineConfig(), merged, device)
    assert cuda.uses_graphs(EngineConfig(), KERNELS["flash-attn"], device)
    assert not cuda.uses_graphs(EngineConfig(), KERNELS["cuda-varlen"], device)
    assert not cuda.uses_graphs(EngineConfig(), KERNELS["sdpa"], device)
    assert not cuda.uses_graphs(EngineConfig(no_cuda_graphs=True), merged, device)
    assert not cuda.uses_graphs(EngineConfig(device_map="auto"), merged, device)
    assert not cuda.uses_graphs(EngineConfig(), merged, CPU)


@needs_gpu
@pytest.mark.gpu
def test_a_graph_on_a_gpu_gives_the_scores_of_the_plain_way(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.checkpoints import make_checkpoint

    folder = make_checkpoint(tmp_path_factory.mktemp("graphs") / "model", head_dim=64, hidden_size=128, seed=13)
    with Reranker(str(folder), device="cuda", dtype="bf16") as reranker:
        engine = reranker._engine
        assert engine._graphs is not None
        plain = engine.with_kernel(engine._kernel)
        for lengths in ([3, 9, 9], [200, 10], [1] * 20, [3, 9, 9]):
            batch = pack(pairs_of(*lengths))
            expected = plain.forward(batch)
            for _ in range(CAPTURE_AT + 1):
                scores = engine.forward(batch)
            assert torch.allclose(scores, expected, atol=0.05 * float(expected.abs().max()))
        assert engine._graphs.num_graphs > 0
