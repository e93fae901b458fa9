"""Score blocks of rows: deduplicate their pairs, look them up in the cache, and rank the rest.

A block is any list of rows that fits in memory. The caller decides where rows come from, where they go and how a killed
run resumes. `local-rerank batch` runs one `BlockScorer` over a file; any other system can run one per worker:

    scorer = BlockScorer(Reranker())                # once per worker, because it loads the model
    for records in blocks:                          # dicts as described in `local_rerank.batch.rows`
        outcomes = scorer.score_records(records)    # in the same order: records to write, or errors

Rows are independent of each other. Splitting the input into other blocks changes which pairs are batched together, and
therefore scores only by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from local_rerank.batch.rows import Record, Row, ScoredRow, to_record, try_parse
from local_rerank.batch.score_cache import CachedScore, PairKey, ScoreCache
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.blending import Blend, Bm25
from local_rerank.requests.scores import best_first, blend
from local_rerank.reranker import Reranker
from local_rerank.types import Limits, RankedDocument, RerankRequest, RerankResult, ScoredSpan

MAX_REQUEST_DOCUMENTS = 128  # per request, so that scores reach the cache and the progress bar early
LIMITS = Limits(max_request_chunks=None)  # requests are made here, and a record may have any number of documents

Advance = Callable[[int, int, int], None]
"""Called with the number of pairs just scored, of the tokens computed for them (0 for cached pairs) and of those of
their documents."""


class BlockScorer:
    """Scores blocks of rows with one reranker. Keeps no state between blocks except the given cache."""

    def __init__(
        self,
        reranker: Reranker,
        *,
        cache: ScoreCache | None = None,
        blend: Blend | None = None,
        min_score: float | None = None,
        advance: Advance | None = None,
    ) -> None:
        self._reranker = reranker
        self._cache = cache
        self._blend = blend
        self._min_score = min_score
        self._advance = advance or (lambda num_pairs, num_tokens, num_document_tokens: None)

    def score(self, rows: Sequence[Row | InvalidRequest]) -> Iterator[ScoredRow | InvalidRequest]:
        """Yield one outcome per row, in order, as they come: the ranked documents, or why the row cannot be ranked.

        An error among `rows` is returned as it is. Raises EngineFailure or ModelUnavailable if the model fails, and
        ConfigError if a row lacks the scores to blend.
        """
        wanted = {pair: None for row in rows if isinstance(row, Row) for pair in self._pairs(row)}
        known = {} if self._cache is None else self._cache.get(wanted)
        self._advance(len(known), 0, sum(score.num_tokens for score in known.values()))
        refused: dict[tuple[str, str], InvalidRequest] = {}
        requests = _requests(pair for pair in wanted if pair not in known)
        results = zip(requests, self._reranker.rank_batch(requests, return_errors=True), strict=True)
        for row in rows:
            if isinstance(row, InvalidRequest):
                yield row
                continue
            for pair in self._pairs(row):
                while pair not in known and pair[:2] not in refused:
                    request, result = next(results)
                    assert request.instruction is not None
                    if isinstance(result, InvalidRequest):
                        refused[request.instruction, request.query] = result
                    else:
                        known |= self._keep(request.instruction, request.query, result)
            yield self._outcome(row, known, refused)

    def score_records(
        self, records: Iterable[object], *, with_documents: bool = False
    ) -> list[Record | InvalidRequest]:
        """Like `score`, from input records to output records."""
        return [
            outcome if isinstance(outcome, InvalidRequest) else to_record(outcome, with_documents=with_documents)
            for outcome in self.score([try_parse(record) for record in records])
        ]

    def _pairs(self, row: Row) -> list[PairKey]:
        instruction = self._reranker.config.instruction if row.instruction is None else row.instruction
        return [(instruction, row.query, document) for document in row.documents]

    def _keep(self, instruction: str, query: str, result: RerankResult) -> dict[PairKey, CachedScore]:
        scores = {(instruction, query, item.document): _cached(item) for item in result}
        if self._cache is not None:
            self._cache.put(scores)
        self._advance(len(scores), result.num_computed_tokens, sum(item.num_tokens for item in result))
        return scores

    def _outcome(
        self, row: Row, known: dict[PairKey, CachedScore], refused: dict[tuple[str, str], InvalidRequest]
    ) -> ScoredRow | InvalidRequest:
        pairs = self._pairs(row)
        if (error := refused.get(pairs[0][:2])) is not None:
            return error
        is_default = pairs[0][0] == self._reranker.config.instruction
        try:
            self._reranker.scale.check_instruction(has_default_instruction=is_default)  # of cached pairs, too
        except InvalidRequest as refusal:
            return refusal
        items = [self._ranked(index, pair[2], known[pair], is_default) for index, pair in enumerate(pairs)]
        blended = _blended(row, [item.log_odds for item in items], self._blend)
        if blended is not None:
            items = [replace(item, blended_score=score) for item, score in zip(items, blended, strict=True)]
        order = [items[index] for index in best_first(blended or [item.log_odds for item in items])]
        if self._min_score is None or row.is_pair:
            return ScoredRow(row=row, results=tuple(order))
        kept = tuple(item for item in order if item.relevance_score >= self._min_score)
        num_left_out_tokens = sum(item.num_tokens for item in order) - sum(item.num_tokens for item in kept)
        return ScoredRow(
            row=row,
            results=kept,
            num_below_min_score=len(order) - len(kept),
            num_left_out_tokens=num_left_out_tokens,
        )

    def _ranked(self, index: int, document: str, score: CachedScore, is_default: bool) -> RankedDocument:
        relevance_score, probability = self._reranker.scale.of(score.log_odds, has_default_instruction=is_default)
        return RankedDocument(
            index=index,
            relevance_score=relevance_score,
            probability=probability,
            log_odds=score.log_odds,
            document=document,
            num_tokens=score.num_tokens,
            num_truncated_tokens=score.num_truncated_tokens,
            num_chunks=score.num_chunks,
            best_chunk=_best_chunk(score),
        )


def _requests(pairs: Iterable[PairKey]) -> list[RerankRequest]:
    """Group pairs by instruction and query, in order of first appearance."""
    documents: dict[tuple[str, str], list[str]] = {}
    for instruction, query, document in pairs:
        documents.setdefault((instruction, query), []).append(document)
    return [
        RerankRequest(
            query=query,
            instruction=instruction,
            documents=tuple(texts[i : i + MAX_REQUEST_DOCUMENTS]),
            max_chunks_per_document=LIMITS.max_document_chunks,  # an error would refuse all records with this query
            limits=LIMITS,
        )
        for (instruction, query), texts in documents.items()
        for i in range(0, len(texts), MAX_REQUEST_DOCUMENTS)
    ]


def _blended(row: Row, log_odds: list[float], how: Blend | None) -> list[float] | None:
    """Return the blended scores by position, if there is something to blend."""
    if how is None or row.is_pair:
        return None
    weight = how.weight
    if how.source == "bm25":
        bm25 = Bm25(row.documents)
        others: Sequence[float] = bm25.scores(row.query, row.documents)
        weight *= bm25.matched(row.query, others)
    elif row.first_stage_scores is None:
        raise ConfigError(f"blend is {how}, but the documents of query {row.query[:60]!r} have no scores")
    else:
        others = row.first_stage_scores
    return blend(log_odds, others, weight, how.method)


def _cached(item: RankedDocument) -> CachedScore:
    best = item.best_chunk
    where = () if best is None else (item.num_chunks, best.start, best.end, best.score)
    return CachedScore(item.log_odds, item.num_tokens, item.num_truncated_tokens, *where)


def _best_chunk(score: CachedScore) -> ScoredSpan | None:
    if score.best_chunk_start is None or score.best_chunk_end is None or score.best_chunk_score is None:
        return None
    return ScoredSpan(start=score.best_chunk_start, end=score.best_chunk_end, score=score.best_chunk_score)
