"""Pairs with known log-odds, which the self-test compares with.

They come from the model's folder (a bundle's manifest, or `golden.json` of the built-in model), else from a table of
published values by hub name and shape. For any other checkpoint only the order of some pairs is known.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from local_rerank.checkpoints.bundles import read_manifest
from local_rerank.checkpoints.manifest import MANIFEST
from local_rerank.config import DEFAULT_INSTRUCTION
from local_rerank.errors import CheckpointError
from local_rerank.requests.pair import Pair
from local_rerank.requests.parts import PromptLimits
from local_rerank.types import RerankRequest

if TYPE_CHECKING:
    from local_rerank.checkpoints.find import Checkpoint

GOLDEN = "golden.json"  # in the folder of the built-in model

Basis = Literal["stored", "published", "properties"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPair:
    """A query with a document, and their log-odds if known."""

    query: str
    document: str
    instruction: str = DEFAULT_INSTRUCTION
    log_odds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownScores:
    """The pairs for a checkpoint. With the basis "properties", relevant and irrelevant documents alternate."""

    basis: Basis
    dtype: str  # in which the log-odds were computed
    pairs: tuple[KnownPair, ...]


_PLANET = "Which planet is known as the Red Planet?"
_VENUS = "Venus is often called Earth's twin because of its similar size and proximity."
_MARS = "Mars, known for its reddish appearance, is often referred to as the Red Planet."
_JUPITER = "Jupiter, the largest planet in our solar system, has a prominent red spot."
_SATURN = "Saturn, famous for its rings, is sometimes mistaken for the Red Planet."

ORDERED = tuple(
    KnownPair(query=query, document=document)
    for query, relevant, irrelevant in (
        (_PLANET, _MARS, "The recipe needs two eggs, a cup of flour and a pinch of salt."),
        ("What is the capital of China?", "The capital of China is Beijing.", "Gravity attracts two bodies."),
        ("how to boil an egg", "To boil an egg, put it in boiling water for eight minutes.", "The train is late."),
        ("中国的首都是哪里？", "中国的首都是北京。", "香蕉是黄色的水果。"),
    )
    for document in (relevant, irrelevant)
)
"""A relevant and an irrelevant document for each query."""

MAX_MISORDERED = 1  # queries of `ORDERED`: a model need not know every language


def num_misordered(log_odds: Sequence[float]) -> int:
    """The number of queries of `ORDERED` whose irrelevant document does not score below the relevant one."""
    return sum(bad >= good for good, bad in zip(log_odds[::2], log_odds[1::2], strict=True))


STORED = (
    *ORDERED,
    *(KnownPair(query=_PLANET, document=document) for document in (_VENUS, _JUPITER, _SATURN, "")),
    KnownPair(query=_PLANET, document=_MARS, instruction="Find a passage that contradicts the query"),
)
"""The pairs whose log-odds are stored in a bundle when it is packed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Published:
    """fp32 values that others published for a checkpoint."""

    names: tuple[str, ...]  # last part of the hub id or name of the folder, in lower case
    hidden_size: int
    num_layers: int
    pairs: tuple[KnownPair, ...]


PUBLISHED = (
    _Published(
        names=("qwen3-reranker-0.6b",),
        hidden_size=1024,
        num_layers=28,
        pairs=(  # sentence-transformers, tests/cross_encoder/test_model.py
            KnownPair(query=_PLANET, document=_VENUS, log_odds=-3.109297752),
            KnownPair(query=_PLANET, document=_MARS, log_odds=7.120389938),
            KnownPair(query=_PLANET, document=_JUPITER, log_odds=-0.378754616),
            KnownPair(query=_PLANET, document=_SATURN, log_odds=3.541637421),
        ),
    ),
)


def known_scores(checkpoint: Checkpoint) -> KnownScores:
    """The known scores of a checkpoint, from the most specific source. Raises CheckpointError."""
    if (checkpoint.folder / MANIFEST).is_file():
        return from_json(read_manifest(checkpoint.folder).expected, MANIFEST)
    if (checkpoint.folder / GOLDEN).is_file():
        return from_json({"scores": _read(checkpoint.folder / GOLDEN)}, GOLDEN)
    name = checkpoint.model_id.rpartition("/")[2].lower()
    shape = (checkpoint.config.get("hidden_size"), checkpoint.config.get("num_hidden_layers"))
    for row in PUBLISHED:
        if name in row.names and shape == (row.hidden_size, row.num_layers):
            return KnownScores(basis="published", dtype="fp32", pairs=row.pairs)
    return KnownScores(basis="properties", dtype="fp32", pairs=ORDERED)


def to_json(pairs: Sequence[KnownPair], log_odds: Sequence[float], dtype: str) -> dict[str, Any]:
    """Known scores as stored in a bundle's manifest."""
    scores = [asdict(pair) | {"log_odds": value} for pair, value in zip(pairs, log_odds, strict=True)]
    return {"dtype": dtype, "scores": scores}


def from_json(stored: dict[str, Any], where: str) -> KnownScores:
    """The inverse of `to_json`. Raises CheckpointError if a part is missing."""
    try:
        pairs = tuple(
            KnownPair(
                query=str(item["query"]),
                document=str(item["document"]),
                instruction=str(item.get("instruction") or DEFAULT_INSTRUCTION),
                log_odds=float(item["log_odds"]),
            )
            for item in stored["scores"]
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"the known scores in {where} cannot be read: {error!r}") from error
    if any(pair.log_odds is None or not math.isfinite(pair.log_odds) for pair in pairs):
        raise CheckpointError(f"the known scores in {where} contain a log-odds that is no finite number")
    if not pairs:
        raise CheckpointError(f"{where} contains no known scores")
    return KnownScores(basis="stored", dtype=str(stored.get("dtype", "fp32")), pairs=pairs)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def known_pairs(checkpoint: Checkpoint) -> list[Pair]:
    """The tokenized pairs of `ORDERED`. The user's limits do not apply."""
    limit = checkpoint.max_length
    tokenizer = checkpoint.tokenizer(
        limits=PromptLimits(max_length=limit, max_query_tokens=limit, max_document_tokens=limit),
        default_instruction=DEFAULT_INSTRUCTION,
    )
    requests = [RerankRequest(query=pair.query, documents=(pair.document,)) for pair in ORDERED]
    pairs = [pair for request in requests for pair in tokenizer.pairs(request).pairs]
    # share the system prompt and instruction of all queries: 284 tokens a pass instead of 428
    equal = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*(pair.prefix_ids for pair in pairs), strict=False))
    if (shared := sum(1 for _ in equal)) == 0:  # an encoder's
        return pairs
    return [Pair.of(pair.prefix_ids[:shared], pair.prefix_ids[shared:] + pair.document_ids) for pair in pairs]
