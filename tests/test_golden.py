"""Published log-odds of known checkpoints; skipped unless their weights are in the local cache."""

from __future__ import annotations

import pytest

from local_rerank import Reranker
from local_rerank.checkpoints.hub_cache import find_snapshot, repository_of
from local_rerank.checkpoints.known_scores import PUBLISHED
from local_rerank.checkpoints.recipes import RECIPES
from local_rerank.selftest.self_test import self_test

NAMES = {name for row in PUBLISHED for name in row.names}
MODELS = [model for recipe in RECIPES for model in recipe.checkpoints if model.rpartition("/")[2].lower() in NAMES]


@pytest.mark.parametrize("model", MODELS)
def test_a_known_checkpoint_gives_its_published_log_odds(model: str) -> None:
    if find_snapshot(repository_of(model), None)[0] is None:
        pytest.skip(f"{model} is not in the local cache")
    with Reranker(model, device="cpu", dtype="fp32") as reranker:
        outcome = self_test(reranker)
    assert (outcome.basis, outcome.fault) == ("published", None), outcome.detail
    assert outcome.max_difference is not None
    assert outcome.max_difference < 1e-4 or not model.startswith("Qwen/")  # others are published with fewer digits
