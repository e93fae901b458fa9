"""A pair of query and document as token ids, and the size of a batch of pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One query with one document, as token ids."""

    prefix_ids: tuple[int, ...]  # prompt up to and including `<Document>:`; pairs with equal prefixes share it
    document_ids: tuple[int, ...]  # " " + document + suffix

    @property
    def num_tokens(self) -> int:
        return len(self.prefix_ids) + len(self.document_ids)


def num_batch_tokens(pairs: Iterable[Pair]) -> int:
    """Tokens of a packed batch of `pairs`, in which each prefix counts once."""
    lengths: dict[tuple[int, ...], int] = {}
    for pair in pairs:
        lengths[pair.prefix_ids] = lengths.get(pair.prefix_ids, len(pair.prefix_ids)) + len(pair.document_ids)
    return sum(lengths.values())
