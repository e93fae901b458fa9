"""`doctor` says in words when reranking changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from local_rerank import Reranker
from local_rerank.checkpoints.known_scores import PUBLISHED
from local_rerank.requests.pair import Pair
from local_rerank.selftest.order import check_order


@pytest.mark.parametrize(
    ("log_odds", "is_constant", "detail"),
    [
        ([0.25] * 4, True, "reranking changes nothing: all 4 documents of a list get the same log-odds, +0.2500"),
        ([4.0, 3.0, 2.0, 1.0], False, "reranking left a list in its order, although document 1 answers the query"),
        ([1.0, 4.0, 2.0, 3.0], False, "reranking changed the order of a list from 0 1 2 3 to 1 3 2 0; document 1 "),
        ([math.nan] * 4, False, "a list could not be reranked: the model gave nan as log-odds"),
    ],
)
def test_whether_reranking_changes_an_order_is_said_in_words(
    log_odds: list[float], is_constant: bool, detail: str, tiny_reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    value_of = dict(zip([pair.document for pair in PUBLISHED[0].pairs], log_odds, strict=True))

    def score(pairs: Sequence[Pair]) -> list[float]:
        texts = [tiny_reranker.tokenizer.decode(list(pair.document_ids)) for pair in pairs]
        return [next(value for text, value in value_of.items() if text in whole) for whole in texts]

    monkeypatch.setattr(tiny_reranker.engine, "score", score)
    order = check_order(tiny_reranker)
    assert order.detail.startswith(detail)
    assert order.is_constant is is_constant
