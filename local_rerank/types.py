"""The library's input and output: a `RerankRequest` goes in and a `RerankResult` comes out.

A `RerankRequest` checks itself when it is created, except for limits in tokens, which need the tokenizer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args, overload

from local_rerank.errors import (
    DocumentTooLong,
    EmptyDocument,
    EmptyQuery,
    InvalidDocumentCount,
    InvalidRequest,
    InvalidTopN,
    NoDocuments,
    TooManyCharacters,
    WrongType,
)

Truncation = Literal["end", "start", "error"]
"""Which end of a text beyond its limit is cut off; "error" refuses the request instead."""

LongDocuments = Literal["truncate", "chunk"]
"""Whether a long document is cut off, or scored by the best of its overlapping chunks."""

OnDeadline = Literal["error", "partial"]
"""What a request gets whose timeout passes: DeadlineExceeded, or the documents that are scored by then."""

BlendMethod = Literal["z-scores", "reciprocal-ranks"]
"""What log-odds and first-stage scores are converted to, within a request, before they are added."""

STATUS_KINDS = ("truncated", "partial", "below", "constant")

MAX_TIMEOUT = 1_000_000_000  # seconds; threads can wait nine times as long
MIN_CHUNK_TOKENS = 16  # a single character can have twelve


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request; None means no limit. The server has its own for each route."""

    max_documents: int | None = None
    max_query_chars: int | None = None
    max_instruction_chars: int | None = None
    max_document_chars: int | None = None
    max_request_tokens: int | None = None  # query tokens x documents + document tokens, after truncation or in chunks
    max_document_chunks: int | None = 256  # some 115,000 tokens of the default chunks
    max_request_chunks: int | None = 10_000
    allow_empty_documents: bool = True  # the hosted DashScope service refuses them


@dataclass(frozen=True, kw_only=True)
class RerankRequest:
    """A query and its documents, checked when created. Raises a leaf of InvalidRequest.

    >>> RerankRequest(query="capital of France", documents=("Paris", "Rome")).top_n is None
    True
    """

    query: str
    documents: tuple[str, ...]
    instruction: str | None = None  # None: the engine's default
    top_n: int | None = None  # None: all
    max_query_tokens: int | None = None  # None: the engine's setting; a request may only lower it
    max_document_tokens: int | None = None  # likewise
    max_prompt_tokens: int | None = None  # likewise; the whole prompt, with the model's template
    truncation: Truncation = "end"
    long_documents: LongDocuments | None = None  # None: the engine's setting
    chunk_tokens: int | None = None  # likewise; the most tokens of a chunk
    chunk_overlap_tokens: int | None = None  # likewise; at most half of a chunk is used
    num_best_chunks: int | None = None  # likewise; whose mean log-odds a document gets
    max_chunks_per_document: int | None = None  # what is beyond them is cut off; None: all are scored
    spans: bool = False  # whether to score the sentences of each document's best chunk as well
    timeout: float | None = None  # seconds from the start of tokenization; None: no limit
    on_deadline: OnDeadline = "error"  # "partial": an error only if no document is scored by then
    min_score: float | None = None  # leaves out documents whose relevance score is lower; None: none
    first_stage_scores: tuple[float, ...] | None = None  # one for each document, which changes the order; None: none
    first_stage_weight: float = 1.0  # of those, where that of the log-odds is 1
    first_stage_method: BlendMethod = "z-scores"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._check_types()
        check_text("query", self.query, self.limits.max_query_chars)
        if self.instruction is not None:
            check_text("instruction", self.instruction, self.limits.max_instruction_chars)
        if not self.query.strip():
            raise EmptyQuery()
        limit = self.limits.max_documents
        if not self.documents:
            raise NoDocuments(limit=limit)
        if limit is not None and len(self.documents) > limit:
            raise InvalidDocumentCount(limit=limit, value=len(self.documents))
        if self.top_n is not None and self.top_n < 1:
            raise InvalidTopN(value=self.top_n)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                what = f"{name} is {value}; it must be at least {least}"
                raise InvalidRequest(what, field=name, limit=least, value=value)
        for index, document in enumerate(self.documents):
            self._check_document(index, document)
        if self.first_stage_scores is not None:
            self._check_first_stage(self.first_stage_scores)

    def _check_types(self) -> None:
        if not isinstance(self.documents, tuple | list):  # a string would be ranked letter by letter
            raise WrongType(self.documents, field="documents", expected="a tuple of strings")
        for name in ("top_n", *_LEAST):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise WrongType(value, field=name, expected="an integer or None")
        for name, choices in (("truncation", get_args(Truncation)), ("on_deadline", get_args(OnDeadline))):
            if (value := getattr(self, name)) not in choices:
                raise WrongType(value, field=name, expected=f"one of {', '.join(choices)}")
        if self.timeout is not None:
            _check_timeout(self.timeout)
        if self.long_documents not in (None, *get_args(LongDocuments)):
            expected = f"one of {', '.join(get_args(LongDocuments))} or None"
            raise WrongType(self.long_documents, field="long_documents", expected=expected)
        if not isinstance(self.spans, bool):
            raise WrongType(self.spans, field="spans", expected="True or False")
        if self.min_score is not None:
            check_number("min_score", self.min_score)
        check_number("first_stage_weight", self.first_stage_weight, least=0)
        if self.first_stage_method not in get_args(BlendMethod):
            expected = f"one of {', '.join(get_args(BlendMethod))}"
            raise WrongType(self.first_stage_method, field="first_stage_method", expected=expected)
        if not isinstance(self.first_stage_scores, tuple | list | None):
            raise WrongType(self.first_stage_scores, field="first_stage_scores", expected="a tuple of numbers or None")
        if not isinstance(self.limits, Limits):
            raise WrongType(self.limits, field="limits", expected="a Limits")

    def _check_document(self, index: int, document: str) -> None:
        check_text(f"documents[{index}]", document)
        limit = self.limits.max_document_chars
        if limit is not None and len(document) > limit:
            raise DocumentTooLong(index=index, limit=limit, value=len(document))
        if not self.limits.allow_empty_documents and not document.strip():
            raise EmptyDocument(index=index)

    def _check_first_stage(self, scores: Sequence[float]) -> None:
        field, limit = "first_stage_scores", len(self.documents)
        if len(scores) != limit:
            what = f"{field} has length {len(scores)}; it must have one number for each of the {limit} documents"
            raise InvalidRequest(what, field=field, limit=limit, value=len(scores))
        for index, score in enumerate(scores):
            check_number(f"{field}[{index}]", score)
        if len(scores) > 1 and len(set(scores)) == 1:
            what = (
                f"{field} are all {scores[0]:g}, which orders nothing; send the first stage's scores, or leave it out"
            )
            raise InvalidRequest(what, field=field, value=float(scores[0]))


@dataclass(frozen=True, kw_only=True)
class ScoredSpan:
    """A part of a document, scored as a document of this text."""

    start: int  # code points of the document as it was sent
    end: int
    score: float  # as relevance_score


@dataclass(frozen=True, kw_only=True)
class RankedDocument:
    """A document of the result."""

    index: int  # position in the request
    relevance_score: float  # 0...1: sigmoid(log_odds); log_odds itself for classifiers whose config says identity
    log_odds: float  # logit of "yes" minus logit of "no", float32; documents are sorted by it, if not blended
    document: str
    num_tokens: int  # tokens of the document that were scored; those in two chunks count twice
    num_truncated_tokens: int  # tokens of the document that were cut off
    num_chunks: int | None = None  # None, as below: the request asked for neither chunks nor spans
    best_chunk: ScoredSpan | None = None  # all of a document that fits
    spans: tuple[ScoredSpan, ...] | None = None  # sentences of the best chunk, best first; None: not asked for, or late
    probability: float | None = None  # 0...1, that it is relevant; None without calibration or with another instruction
    blended_score: float | None = None  # documents are sorted by it, within a request; None without first_stage_scores


@dataclass(frozen=True, kw_only=True)
class RerankResult(Sequence[RankedDocument]):
    """The ranked documents, most relevant first; ties keep the order of the request. A sequence of RankedDocument."""

    results: tuple[RankedDocument, ...]
    model: str  # id of the model that scored
    num_query_tokens: int  # after truncation
    num_query_truncated_tokens: int
    num_document_tokens: int  # of all documents of the request with duplicates, after truncation
    num_truncated_documents: int
    unwrapped: bool  # whether the texts were parts of rendered prompts, whose template was removed
    total_tokens: int  # as the hosted service bills: instruction, query and text of each document, chunk and span
    num_computed_tokens: int  # tokens the model processed: shared prefixes and duplicates count once
    tokenize_ms: float
    queue_ms: float  # from the end of tokenization to the start of the request's first batch
    total_ms: float  # from the start of tokenization to the last score
    is_constant: bool = False  # two or more distinct documents were scored, and all have the same log-odds, to 1e-5
    not_scored: tuple[int, ...] = ()  # positions in the request of documents without a score at the deadline
    num_without_spans: int = 0  # documents with a score whose spans were not scored by the deadline
    num_below_min_score: int | None = None  # documents left out by min_score; None without it

    @property
    def status(self) -> str:
        """`ok`, or what a caller must know about the ranking, as `truncated=2; constant`."""
        return status_of([self])

    @property
    def status_counts(self) -> dict[str, int]:
        """The number of each of STATUS_KINDS that is not 0: texts that were cut off (the query is one), documents
        without a score or spans at the deadline, documents below `min_score`, and 1 if all scores are the same.
        """
        counts = {
            "truncated": self.num_truncated_documents + (self.num_query_truncated_tokens > 0),
            "partial": len(self.not_scored) + self.num_without_spans,
            "below": self.num_below_min_score or 0,
            "constant": int(self.is_constant),
        }
        return {kind: counts[kind] for kind in STATUS_KINDS if counts[kind]}

    def __len__(self) -> int:
        return len(self.results)

    @overload
    def __getitem__(self, index: int) -> RankedDocument: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[RankedDocument, ...]: ...

    def __getitem__(self, index: int | slice) -> RankedDocument | tuple[RankedDocument, ...]:
        return self.results[index]

    def __iter__(self) -> Iterator[RankedDocument]:
        return iter(self.results)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A loaded model: its source, its size, and the choices of the load plan with their reasons."""

    model_id: str
    source: str  # embedded, folder, bundle or hub
    revision: str | None
    device: str
    dtype: str  # of the weights
    compute_dtype: str  # of the matrix products
    decoder: str  # transformers, cpu or cuda
    kernel: str  # of attention
    threads: int
    reasons: Mapping[str, str]  # by field of the load plan, and for threads
    num_parameters: int
    num_layers: int
    hidden_size: int
    max_length: int  # tokens of a prompt
    max_batch_tokens: int
    load_seconds: float
    unquantized: tuple[str, ...] = ()  # with int8: linear layers kept in fp32, because int8 would change the scores
    products: tuple[str, ...] = ()  # on a CPU: names of the matrix-product kernels
    cuda_graphs: bool = False  # whether batches run as CUDA graphs
    recipe: str = "qwen3-reranker"  # how pairs are written and scored


_LEAST = {
    "max_query_tokens": 1, "max_document_tokens": 1, "max_prompt_tokens": 1, "chunk_tokens": MIN_CHUNK_TOKENS,
    "chunk_overlap_tokens": 0, "num_best_chunks": 1, "max_chunks_per_document": 1,
}  # fmt: skip
_REQUEST = 'a RerankRequest, as in RerankRequest(query="a query", documents=("a document",))'


def check_text(field: str, value: object, limit: int | None = None) -> None:
    if not isinstance(value, str):
        raise WrongType(value, field=field, expected="a string")
    if limit is not None and len(value) > limit:
        raise TooManyCharacters(field=field, limit=limit, value=len(value))


def _check_timeout(seconds: Any) -> None:
    is_number = isinstance(seconds, Real) and not isinstance(seconds, bool)
    if not is_number:
        raise WrongType(seconds, field="timeout", expected="a number of seconds or None")
    if not 0 < seconds <= MAX_TIMEOUT:  # true for NaN as well
        what = f"timeout is {seconds}; give a positive number of seconds, at most {MAX_TIMEOUT:,}"
        raise InvalidRequest(what, field="timeout")


def check_number(field: str, value: object, *, least: float = -math.inf) -> None:
    """NumPy's numbers are real numbers, too; booleans are not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise WrongType(value, field=field, expected="a number")
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        number = math.inf
    if not (math.isfinite(number) and number >= least):
        allowed = "a finite number" if least == -math.inf else f"a finite number of at least {least:g}"
        limit = None if least == -math.inf else least
        raise InvalidRequest(f"{field} is {number:g}; it must be {allowed}", field=field, limit=limit, value=number)


def check_request(value: object) -> None:
    """Raises WrongType for anything but a RerankRequest, such as a dict of its fields."""
    if not isinstance(value, RerankRequest):
        raise WrongType(value, field="request", expected=_REQUEST)


def status_of(results: Iterable[RerankResult]) -> str:
    """The status of results that are answered together."""
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result.status_counts)
    kinds = (kind if kind == "constant" else f"{kind}={counts[kind]}" for kind in STATUS_KINDS if counts[kind])
    return "; ".join(kinds) or "ok"
