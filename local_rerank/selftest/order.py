"""Whether reranking changes the order of a small list, in words: a broken model may fail in no other visible way."""

from __future__ import annotations

from dataclasses import dataclass

from local_rerank.checkpoints.known_scores import PUBLISHED
from local_rerank.errors import LocalRerankError
from local_rerank.reranker import Reranker

_PAIRS = PUBLISHED[0].pairs  # one query; the second document answers it
ANSWER = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderCheck:
    """The order of a list before and after reranking; empty after an error."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    is_constant: bool
    detail: str  # a sentence


def check_order(reranker: Reranker) -> OrderCheck:
    """Rank the list. An error of the ranking is in the sentence."""
    before = tuple(range(len(_PAIRS)))
    try:
        result = reranker.rank(_PAIRS[0].query, [pair.document for pair in _PAIRS])
    except LocalRerankError as error:
        return OrderCheck(before=before, after=(), is_constant=False, detail=f"a list could not be reranked: {error}")
    after, score = tuple(item.index for item in result), result[0].log_odds
    if result.is_constant:
        detail = f"reranking changes nothing: all {len(after)} documents of a list get the same log-odds, {score:+.4f}"
    elif after == before:
        detail = f"reranking left a list in its order, although document {ANSWER} answers the query"
    else:
        was, now = (" ".join(map(str, order)) for order in (before, after))
        detail = f"reranking changed the order of a list from {was} to {now}; document {ANSWER} answers the query"
    return OrderCheck(before=before, after=after, is_constant=result.is_constant, detail=detail)
