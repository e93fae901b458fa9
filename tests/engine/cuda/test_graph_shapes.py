"""The shapes of CUDA graphs: which one a batch takes, and that padding has no queries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from local_rerank.engine.cuda.attention import tile_layout
from local_rerank.engine.cuda.graphs import MAX_TOKENS, shapes_up_to, tensors_of
from local_rerank.engine.packing import block_bytes, pack, ranges, stage, views
from local_rerank.requests.pair import Pair

ASCENDING = sorted(shapes_up_to(MAX_TOKENS))
groups_of_a_prompt = st.lists(
    st.tuples(st.integers(50, 200), st.lists(st.integers(10, 120), min_size=1, max_size=40)), min_size=1, max_size=40
)


@settings(max_examples=40)
@given(groups=groups_of_a_prompt)
@example(groups=[(65, [10])] * 218)  # each with as many partial tiles as can be: 16,350 tokens, 654 tiles
@example(groups=[(50, [10])] * 273)  # the least that a prompt has
@example(groups=[(50, [10] * 1633)])
def test_a_padded_batch_has_each_query_once_and_stays_within_its_buffers(groups: list[tuple[int, list[int]]]) -> None:
    """All that a kernel reads by index: no bound is exceeded, also where the padding is."""
    batch = pack([Pair.of([number] * prefix, [1] * n) for number, (prefix, ns) in enumerate(groups) for n in ns])
    shape = next((shape for shape in ASCENDING if shape.holds(tensors_of(batch))), None)
    assert (shape is None) == (batch.num_tokens > MAX_TOKENS)
    if shape is None:
        return
    staged = stage(tensors_of(batch), shape.fields, pinned=False)
    ids, positions, last, *of_layouts = views(staged, shape.fields)
    assert torch.equal(ids[:, : batch.num_tokens], batch.input_ids)
    assert torch.equal(positions[:, : batch.num_tokens], batch.position_ids)
    assert torch.equal(last[: batch.num_pairs], batch.last_token_index)
    assert int(last.max()) < batch.num_tokens
    num_queries = (batch.num_tokens, batch.num_pairs)
    for (tiles, first_own, last_own), number, last_tokens_only in zip(
        (of_layouts[:3], of_layouts[3:]), num_queries, (False, True), strict=True
    ):
        first, count, prefix, prefix_length, first_key, end_key = tiles.T.long()
        used = count > 0
        covered = ranges(first[used].numpy(), count[used].numpy())
        assert torch.equal(covered.sort().values, torch.arange(number))
        assert not tiles[~used].any()
        assert max(int((prefix + prefix_length).max()), int(end_key.max())) <= batch.num_tokens
        assert bool((first_key <= end_key).all())
        assert bool((tiles >= 0).all())
        layout = tile_layout(batch, last_tokens_only)
        for ours, before in ((first_own, layout.first_own), (last_own, layout.last_own)):
            assert torch.equal(ours[:number], before)
            assert not ours[number:].any()
            assert int(ours.max()) < batch.num_tokens


@pytest.mark.parametrize(
    ("max_tokens", "largest"), [(1, 64), (64, 64), (100, 128), (9000, 9024), (16_000, 16_000), (90_000, MAX_TOKENS)]
)
def test_the_largest_graph_is_that_of_the_token_budget(max_tokens: int, largest: int) -> None:
    shapes = shapes_up_to(max_tokens)
    assert [shape.num_tokens for shape in shapes[:2]] == [largest, largest]
    assert shapes[0] == max(shapes)  # so that the buffers of all others fit into its own
    assert all(block_bytes(shape.fields) <= block_bytes(shapes[0].fields) for shape in shapes)


def test_the_usual_shape_has_few_tiles_without_queries() -> None:
    """70 pairs of 300 tokens from seven requests: each empty tile is a block for every two heads."""
    batch = pack([Pair.of([number // 10] * 85, [1] * 215) for number in range(70)])
    shape = next(shape for shape in ASCENDING if shape.holds(tensors_of(batch)))
    assert shape.num_tokens - batch.num_tokens < 512
    assert (len(tile_layout(batch, False).tiles), shape.num_tiles) == (497, 566)
