"""Published log-odds of Qwen3-Reranker-0.6B; skipped unless its weights are in the local cache."""

from __future__ import annotations

import pytest

from local_rerank import Reranker
from local_rerank.checkpoints.find import ALIASES
from local_rerank.checkpoints.hub_cache import find_snapshot, repository_of
from local_rerank.checkpoints.known_scores import PUBLISHED

MODEL = ALIASES["qwen3-reranker-0.6b"]


@pytest.mark.skipif(find_snapshot(repository_of(MODEL), None)[0] is None, reason=f"{MODEL} is not in the local cache")
def test_the_0_6b_model_gives_its_published_log_odds() -> None:
    expected = {pair.document: pair.log_odds for pair in PUBLISHED[0].pairs}
    with Reranker(MODEL, device="cpu", dtype="fp32") as reranker:
        for item in reranker.rank(PUBLISHED[0].pairs[0].query, list(expected)):
            assert item.log_odds == pytest.approx(expected[item.document], abs=1e-4)
