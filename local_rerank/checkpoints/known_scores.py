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


@dataclass(frozen=True, slots=True)
class _Published:
    """Values that others published for a checkpoint."""

    names: tuple[str, ...]  # last part of the hub id or name of the folder, in lower case
    hidden_size: int
    num_layers: int
    pairs: tuple[KnownPair, ...]
    dtype: str = "fp32"  # in which they were computed, or fp16 for about as rough: probabilities of five digits


def _known(query: str, log_odds: dict[str, float]) -> tuple[KnownPair, ...]:
    return tuple(KnownPair(query=query, document=document, log_odds=value) for document, value in log_odds.items())


def _planets(*log_odds: float) -> tuple[KnownPair, ...]:
    return _known(_PLANET, dict(zip((_VENUS, _MARS, _JUPITER, _SATURN), log_odds, strict=True)))


def _planets_of(*probabilities: float) -> tuple[KnownPair, ...]:
    return _planets(*(math.log(p / (1 - p)) for p in probabilities))


# of model cards; the last two computed in fp16
_POPULATION = "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers."
_BERLIN = {_POPULATION: 8.607138, "Berlin is well known for its museums.": -4.320078}
_GIANT = "The giant panda (Ailuropoda melanoleuca), sometimes called a panda bear or simply panda,"
_PANDA = {"hi": -8.1875, f"{_GIANT} is a bear species endemic to China.": 5.26171875}
_SORT = {"Introduction of quick sort": 2.4609, "The weather is nice today": -1.6729}
# planets: sentence-transformers, tests/cross_encoder/test_model.py (Qwen3) and test_pretrained.py, which allows 0.01
PUBLISHED = (
    _Published(
        ("qwen3-reranker-0.6b",), 1024, 28, _planets(-3.109297752, 7.120389938, -0.378754616, 3.541637421)
    ),
    _Published(
        ("ms-marco-minilm-l6-v2", "ms-marco-minilm-l-6-v2"), 384, 6,
        _planets(-6.52474, 9.69094, 6.92376, 6.66822) + _known("How many people live in Berlin?", _BERLIN),
    ),
    _Published(
        ("ms-marco-minilm-l12-v2", "ms-marco-minilm-l-12-v2"), 384, 12, _planets(-7.18467, 9.50125, 5.7218, 6.84708)
    ),
    _Published(("mmarco-mminilmv2-l12-h384-v1",), 384, 12, _planets(-3.27741, 10.19737, 3.39716, 7.45499)),
    _Published(("bge-reranker-base",), 768, 12, _planets_of(0.8755, 0.99813, 0.99625, 0.04914), "fp16"),
    _Published(("bge-reranker-large",), 1024, 24, _planets_of(0.69539, 0.99861, 0.97439, 0.81449), "fp16"),
    _Published(
        ("bge-reranker-v2-m3",), 1024, 24,
        _planets_of(0.01928, 0.9987, 0.78573, 0.98696) + _known("what is panda?", _PANDA), "fp16",
    ),
    _Published(
        ("gte-reranker-modernbert-base",), 768, 22,
        _planets_of(0.80808, 0.95359, 0.88026, 0.91676) + _known("how to implement quick sort in python?", _SORT),
        "fp16",
    ),
    _Published(
        ("granite-embedding-reranker-english-r2",), 768, 22, _planets_of(0.78749, 0.96672, 0.88993, 0.94344), "fp16"
    ),
)  # fmt: skip


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
            return KnownScores(basis="published", dtype=row.dtype, pairs=row.pairs)
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
