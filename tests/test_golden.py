"""Published log-odds of Qwen3-Reranker-0.6B; skipped unless its weights are in the local cache.

Log-odds from the test suite of sentence-transformers (tests/cross_encoder/test_model.py): fp32, default instruction.
"""

from __future__ import annotations

import pytest

from local_rerank import Reranker
from local_rerank.checkpoints.find import ALIASES, cached_folder

GOLDEN = {
    "Venus is often called Earth's twin because of its similar size and proximity.": -3.109297752,
    "Mars, known for its reddish appearance, is often referred to as the Red Planet.": 7.120389938,
    "Jupiter, the largest planet in our solar system, has a prominent red spot.": -0.378754616,
    "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.": 3.541637421,
}
MODEL = ALIASES["qwen3-reranker-0.6b"]


@pytest.mark.skipif(cached_folder(MODEL, None) is None, reason=f"{MODEL} is not in the local cache")
def test_the_0_6b_model_gives_its_published_log_odds() -> None:
    with Reranker(MODEL, device="cpu", dtype="fp32") as reranker:
        for item in reranker.rank("Which planet is known as the Red Planet?", list(GOLDEN)):
            assert item.log_odds == pytest.approx(GOLDEN[item.document], abs=1e-4)
