"""The arguments of calls as requests: documents and pairs from lists, arrays, columns and generators."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from local_rerank.errors import WrongType
from local_rerank.types import RerankRequest, RerankResult, check_text

_PAIR = 'a (query, document) pair, as in score([("a query", "a document")])'
_PAIRS = 'a list of (query, document) pairs, as in score([("a query", "a document")])'


def documents_of(documents: Iterable[str]) -> tuple[str, ...]:
    """The documents of a call as a tuple; one string is one document. Raises WrongType."""
    if isinstance(documents, str):
        return (documents,)
    if getattr(documents, "ndim", 1) > 1:  # a table, of which iteration gives column names
        raise WrongType(documents, field="documents", expected="one column of strings")
    return tuple(_items(documents, field="documents", expected="a list of strings"))


def first_stage_of(scores: Iterable[float] | None) -> tuple[float, ...] | None:
    """The first stage's scores of a call as a tuple. Raises WrongType, also for a dict: its keys would be scores."""
    return None if scores is None else tuple(_items(scores, field="first_stage_scores", expected="a list of numbers"))


def requests_of(pairs: Iterable[tuple[str, str]], instruction: str | None) -> Iterator[RerankRequest]:
    """Group consecutive (query, document) pairs with the same query into requests. Raises WrongType for anything else,
    also for one pair that is not in a list: its two texts could be pairs of letters.
    """
    all_pairs = enumerate(_items(pairs, field="pairs", expected=_PAIRS))
    checked = (_pair(pair, field=f"pairs[{index}]") for index, pair in all_pairs)
    for query, group in itertools.groupby(checked, key=lambda pair: pair[0]):
        yield RerankRequest(query=query, documents=tuple(document for _, document in group), instruction=instruction)


def _pair(pair: object, *, field: str) -> tuple[str, str]:
    texts = tuple(itertools.islice(_items(pair, field=field, expected=_PAIR), 3))
    if len(texts) != 2:
        raise WrongType(pair, field=field, expected=_PAIR)
    for position, text in enumerate(texts):
        check_text(f"{field}[{position}]", text)
    return texts


def _items(values: Any, *, field: str, expected: str) -> Iterator[Any]:
    """Iterate over a list, tuple, array, column or generator.

    Raises WrongType for what Python iterates too, but not as a list of texts: letters, bytes, a dict's keys, sets.
    """
    try:
        if isinstance(values, str | bytes | bytearray | memoryview | Mapping | set | frozenset):
            raise TypeError
        return iter(values)
    except TypeError:
        raise WrongType(values, field=field, expected=expected) from None


def scores_of(result: RerankResult, *, logits: bool) -> list[float]:
    """Relevance scores or log-odds in the order of the request's documents, which the result must have all."""
    in_order = sorted(result, key=lambda item: item.index)
    return [item.log_odds if logits else item.relevance_score for item in in_order]
