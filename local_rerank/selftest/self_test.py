"""Check the scores of a loaded `Reranker` on known pairs and diagnose what is wrong with them.

`self_test` scores the pairs like any request and compares with `checkpoints.known_scores`. If they differ, it looks for
the cause: it inspects the head's rows, rebuilds the prompt in ways that are known to go wrong, and runs the reference
attention kernel, and reports which of these explains the scores. It uses the engine directly, so it must run while no
request does: before a server is ready, or in `local-rerank doctor`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from local_rerank.checkpoints.known_scores import (
    MAX_MISORDERED,
    Basis,
    KnownPair,
    KnownScores,
    known_scores,
    num_misordered,
)
from local_rerank.engine.cpu import int8
from local_rerank.engine.engine import Engine
from local_rerank.engine.kernel_table import KERNELS
from local_rerank.errors import CheckpointError, ConfigError, EngineFailure, InvalidRequest
from local_rerank.requests.pair import Pair
from local_rerank.requests.scores import ScoreScale
from local_rerank.reranker import Reranker
from local_rerank.selftest.prompts import WRONG_PROMPTS, Fault, prompt_of
from local_rerank.types import RerankRequest

TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.06, "int8": int8.TOLERANCE, "fp8": 0.25}
"""Allowed difference of log-odds, relative to the spread of the known ones (at least 1). fp32 may sum in another
order; fp16 has 11 bits of mantissa, bf16 8, int8 7 bits of a row's largest value and fp8 4 (derived, not measured)."""
LOW_PRECISION = "bf16"  # a difference within its tolerance looks like rounding

REFERENCE_KERNEL = "dense"
MAX_RELOADED_PARAMETERS = 1_000_000_000  # 4 GB in fp32; a larger model is not loaded again in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPairScore:
    """One known pair and its score here."""

    query: str
    document: str
    expected: float | None  # log-odds; None if only the order is known
    log_odds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """The outcome of the self-test."""

    basis: Basis  # where the known scores come from
    scores: tuple[KnownPairScore, ...]
    tolerance: float | None  # of log-odds; None if only the order is known
    max_difference: float | None  # likewise
    fault: Fault | None
    detail: str  # a sentence
    seconds: float

    @property
    def passed(self) -> bool:
        return self.fault is None


def self_test(reranker: Reranker) -> SelfTest:
    """Score the known pairs; raises ConfigError if they exceed the configured limits."""
    start = time.perf_counter()
    known = known_scores(reranker.checkpoint)
    examination = _Examination(reranker, known, _live_scores(reranker, known.pairs))
    fault, detail = examination.verdict()
    expected = examination.expected
    return SelfTest(
        basis=known.basis,
        scores=tuple(
            KnownPairScore(query=pair.query, document=pair.document, expected=pair.log_odds, log_odds=value)
            for pair, value in zip(known.pairs, examination.seen, strict=True)
        ),
        tolerance=None if expected is None else examination.tolerance_of(examination.dtype),
        max_difference=None if expected is None else _difference(expected, examination.seen),
        fault=fault,
        detail=detail,
        seconds=time.perf_counter() - start,
    )


def require_self_test(reranker: Reranker) -> SelfTest:
    """Like `self_test`, but raises CheckpointError that names the fault."""
    outcome = self_test(reranker)
    if outcome.fault is not None:
        raise CheckpointError(f"the self-test failed: {outcome.fault}: {outcome.detail}")
    return outcome


def log_odds_of(reranker: Reranker, pairs: Sequence[KnownPair]) -> list[float]:
    """Score pairs like any request; raises EngineFailure or ConfigError."""
    log_odds: list[float] = []
    for (query, instruction), group in itertools.groupby(pairs, key=lambda pair: (pair.query, pair.instruction)):
        request = _whole(query, instruction, *(pair.document for pair in group))
        try:
            result = reranker.submit(request, scale=ScoreScale()).result()  # the model's scores, with any instruction
        except InvalidRequest as error:
            raise ConfigError(f"the self-test's pairs exceed the configured limits: {error}") from error
        if result.num_truncated_documents or result.num_query_truncated_tokens:
            raise ConfigError("the configured limits truncate the self-test's pairs; raise them or skip the self-test")
        log_odds += [item.log_odds for item in sorted(result, key=lambda item: item.index)]
    return log_odds


def _live_scores(reranker: Reranker, pairs: Sequence[KnownPair]) -> list[float]:
    """Like `log_odds_of`, but returns infinities and NaN too, which indicate an overflow."""
    try:
        return log_odds_of(reranker, pairs)
    except EngineFailure:
        seen = _forward_live(reranker, reranker.engine, pairs)
        if all(map(math.isfinite, seen)):
            raise
        return seen


class _Examination:
    """The scores of one model, the known ones, and the checks that explain a difference."""

    def __init__(self, reranker: Reranker, known: KnownScores, seen: list[float]) -> None:
        self.reranker = reranker
        self.known = known
        self.seen = seen
        self.expected = _expected(known)
        self.dtype = _rougher(reranker.info.dtype, known.dtype)
        self.template = reranker.checkpoint.recipe.template
        self._tokenizer = Tokenizer.from_file(str(reranker.checkpoint.folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def verdict(self) -> tuple[Fault | None, str]:
        """Return the fault and a sentence about it. A check relies on what earlier ones have excluded."""
        for check in (self._overflow, self._head, self._prompt, self._claimed_dtype, self._scores):
            if (found := check()) is not None:
                return found
        return None, _PASSED[self.known.basis]

    def tolerance_of(self, dtype: str) -> float:
        scores = self.expected or self.seen
        return TOLERANCE[dtype] * max(1.0, max(scores) - min(scores))

    def _overflow(self) -> tuple[Fault, str] | None:
        if bad := [value for value in self.seen if not math.isfinite(value)]:
            return "wrong dtype", f"log-odds of {bad[0]}: {self.reranker.info.dtype} overflows; use --dtype fp32"
        return None

    def _head(self) -> tuple[Fault, str] | None:
        """A classifier with one label has no "no" row, so there zeros are correct."""
        no, yes = self.reranker.engine.head
        missing = [name for name, row in (("yes", yes), ("no", no)) if not row.any()]
        if missing == ["no"] and self.reranker.checkpoint.architecture.endswith("ForSequenceClassification"):
            return None
        if missing or bool((yes == no).all()):
            rows = " and ".join(f'"{name}"' for name in missing) or '"yes" and "no", which are equal,'
            return "missing head rows", f"the head's row of {rows} has no weights; they are missing from the checkpoint"
        return None

    def _prompt(self) -> tuple[Fault, str] | None:
        """Compare the token ids with those of the whole prompt encoded at once, and find out why they differ."""
        live = [_live_ids(self.reranker, pair) for pair in self.known.pairs]
        right = [self._right_ids(pair) for pair in self.known.pairs]
        if live == right:
            return None
        if (template := self.template) is None:
            return "other prompt", f"the pair differs from the tokenizer's ({self._ends(live[0], right[0])})"
        distances = {
            (fault, number): _difference(
                self.seen,
                _forward(self.reranker.engine, [self._ids(build(template, pair)) for pair in self.known.pairs]),
            )
            for fault, builders in WRONG_PROMPTS.items()
            for number, build in enumerate(builders)
        }
        (fault, _), distance = min(distances.items(), key=lambda item: item[1])
        if distance <= TOLERANCE[self.dtype] * max(1.0, max(self.seen) - min(self.seen)):
            return fault, f"{_ABOUT[fault]} ({self._ends(live[0], right[0])})"
        return "other prompt", f"the prompt differs from the model card's ({self._ends(live[0], right[0])})"

    def _claimed_dtype(self) -> tuple[Fault, str] | None:
        claimed, actual = self.reranker.info.dtype, self.reranker.engine.weights_dtype
        if claimed != actual:
            return "wrong dtype", f"the weights are {actual}, but {claimed} was requested"
        return None

    def _scores(self) -> tuple[Fault, str] | None:
        """Check attention, precision and weights, after the prompt was found correct."""
        if (fault := self._misfit(self.seen, self.dtype)) is None and self.expected is not None:
            return None
        pairs = self.known.pairs if fault else self.known.pairs[:2]  # two are enough to confirm
        reference = self.reranker.engine.with_kernel(KERNELS[REFERENCE_KERNEL])
        if _difference(self.seen[: len(pairs)], self._right_scores(reference, pairs)) > self.tolerance_of(self.dtype):
            kernel = self.reranker.info.kernel
            return "wrong attention kernel", f"{kernel} disagrees with {REFERENCE_KERNEL}; try another --attention"
        return fault and self._or_wrong_dtype(*fault)

    def _misfit(self, scores: Sequence[float], dtype: str) -> tuple[Fault, str] | None:
        """What is wrong with scores in `dtype`: their order, or if some are known their values."""
        if self.expected is None:
            return _unordered(scores)
        difference = _difference(self.expected, scores)
        if difference <= self.tolerance_of(dtype):
            return None
        worst = max(range(len(scores)), key=lambda i: abs(scores[i] - self.expected[i]))  # type: ignore[index]
        pair = self.known.pairs[worst]
        off = f"log-odds are off by up to {difference:.3g} ({pair.query!r}, {pair.document!r})"
        if difference <= self.tolerance_of(LOW_PRECISION):
            return "wrong dtype", f"{off}: the size of rounding in a lower precision than {dtype}"
        return (
            "other scores",
            f"{off}, but prompt, head and attention are correct, so the weights differ from the known ones",
        )

    def _or_wrong_dtype(self, fault: Fault, detail: str) -> tuple[Fault, str]:
        """The fault, or a wrong dtype if a 16-bit model has none in fp32."""
        info = self.reranker.info
        if info.dtype not in ("bf16", "fp16"):
            return fault, detail
        if info.num_parameters > MAX_RELOADED_PARAMETERS:
            return fault, f"{detail}; or {info.dtype} is too inexact for this model: try --dtype fp32"
        config = dataclasses.replace(
            self.reranker.config, dtype="fp32", attention=REFERENCE_KERNEL, calibration=None, scores="model"
        )
        try:
            with Reranker(config=config) as exact:
                scores = self._right_scores(exact.engine, self.known.pairs)
        except (CheckpointError, EngineFailure):  # no memory for a second model
            return fault, detail
        if self._misfit(scores, "fp32") is not None:
            return fault, detail
        size = "" if self.expected is None else f" by up to {_difference(self.expected, self.seen):.3g}"
        return "wrong dtype", f"wrong{size} in {info.dtype} but correct in fp32: this model needs --dtype fp32"

    def _right_scores(self, engine: Engine, pairs: Sequence[KnownPair]) -> list[float]:
        """Score the model card's prompts with an engine."""
        if self.template is None:
            return _forward_live(self.reranker, engine, pairs)
        return _forward(engine, [self._right_ids(pair) for pair in pairs])

    def _right_ids(self, pair: KnownPair) -> list[int]:
        if self.template is None:
            return list(self._tokenizer.encode(pair.query, pair.document).ids)
        return self._ids(prompt_of(self.template, pair))

    def _ids(self, prompt: str) -> list[int]:
        return list(self._tokenizer.encode(prompt, add_special_tokens=False).ids)

    def _ends(self, live: list[int], right: list[int]) -> str:
        def end(ids: list[int]) -> str:
            return repr(self._tokenizer.decode(ids[-1:], skip_special_tokens=False))

        return f"{len(live)} tokens ending in {end(live)}; correct are {len(right)} ending in {end(right)}"


def _expected(known: KnownScores) -> list[float] | None:
    values = [pair.log_odds for pair in known.pairs if pair.log_odds is not None]
    return values if len(values) == len(known.pairs) else None


def _unordered(seen: Sequence[float]) -> tuple[Fault, str] | None:
    """Check that scores differ and that relevant documents (at even positions) outrank irrelevant ones."""
    if max(seen) - min(seen) == 0:
        return "no reranker", f"every pair gets the same log-odds, {seen[0]:.3g}"
    if (num_wrong := num_misordered(seen)) > MAX_MISORDERED:
        return "no reranker", (
            f"in {num_wrong} of {len(seen) // 2} plain questions an irrelevant document outranks a relevant one, "
            "as with a chat model or an untrained one"
        )
    return None


def _rougher(first: str, second: str) -> str:
    return max(first, second, key=lambda dtype: TOLERANCE[dtype])


def _difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the largest difference, or infinity if a value is NaN."""
    differences = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return max(value if math.isfinite(value) else math.inf for value in differences)


def _whole(query: str, instruction: str | None, *documents: str) -> RerankRequest:
    """A request that no default of the model or the user reads in chunks: scores are known of whole documents."""
    return RerankRequest(query=query, documents=documents, instruction=instruction, long_documents="truncate")


def _live_ids(reranker: Reranker, known: KnownPair) -> list[int]:
    pair = reranker.tokenizer.pairs(_whole(known.query, known.instruction, known.document)).pairs[0]
    return [*pair.prefix_ids, *pair.document_ids]


def _forward_live(reranker: Reranker, engine: Engine, pairs: Sequence[KnownPair]) -> list[float]:
    """Score pairs as a request has them, one at a time, to exclude a fault in packing."""
    requests = [_whole(pair.query, pair.instruction, pair.document) for pair in pairs]
    return [score for request in requests for score in engine.score(reranker.tokenizer.pairs(request).pairs)]


def _forward(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Score prompts one at a time, to exclude a fault in packing."""
    scores: list[float] = []
    for ids in prompts:
        scores += engine.score([Pair.of(ids[:1], ids[1:])])
    return scores


_ABOUT = {
    "no template": "the scores are those of query and document without the prompt template",
    "wrong last token": "the scores are read at another token than in the model card",
    "empty query and document": "the scores are those of a prompt without query and document",
}
_PASSED: dict[Basis, str] = {
    "stored": "the scores are those stored with the model",
    "published": "the scores are those published for this checkpoint",
    "properties": "no scores are known for this checkpoint; prompt, head and order of relevance are correct",
}
