"""The pipeline of a batch job, a block of rows at a time: rows -> pairs not yet known -> requests -> scored rows.

A block is any list of rows that fits in memory. What surrounds it (which file rows come from, where they go, how a
killed run goes on, on how many machines) is the caller's: `local-rerank batch` runs one `BlockScorer` over a file, and
any other system that hands out blocks of records can run one per worker:

    scorer = BlockScorer(Reranker())                # once per worker: loads the model
    for records in blocks:                          # dicts as `local_rerank.batch.rows` describes them
        outcomes = scorer.score_records(records)    # in their order: the records to write, and errors

Rows do not depend on each other: cutting the input into other blocks changes what is shared and batched together, not
what is written, up to the rounding that batches make. Pairs that occur several times in a block, or that the cache
knows, are not scored again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from local_rerank.batch.rows import Record, Row, ScoredRow, parse_record, to_record
from local_rerank.batch.score_cache import PairKey, PairScore, ScoreCache
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.blending import Blend, Bm25, best_first, blend
from local_rerank.requests.pending import sigmoid
from local_rerank.reranker import Reranker
from local_rerank.types import RankedDocument, RerankRequest, RerankResult

MAX_REQUEST_DOCUMENTS = 128  # of one query at a time: scores reach cache and progress bar as they come

Advance = Callable[[int, int], None]
"""Told of pairs that are known now, and of the tokens that went through the model for them."""


class BlockScorer:
    """Scores blocks of rows with one reranker. Keeps nothing between blocks but the cache that it is given."""

    def __init__(
        self,
        reranker: Reranker,
        *,
        cache: ScoreCache | None = None,
        blend: Blend | None = None,
        advance: Advance | None = None,
    ) -> None:
        self._reranker = reranker
        self._cache = cache
        self._blend = blend
        self._advance = advance or (lambda num_pairs, num_tokens: None)

    def score(self, rows: Sequence[Row]) -> list[ScoredRow | InvalidRequest]:
        """One outcome for each row, in their order: its documents best first, or why it cannot be ranked.

        Raises EngineFailure or ModelUnavailable where the model fails, ConfigError where a row lacks what is to be
        blended.
        """
        wanted = {pair: None for row in rows for pair in self._pairs(row)}
        known = {} if self._cache is None else self._cache.get(wanted)
        self._advance(len(known), 0)
        refused: dict[tuple[str, str], InvalidRequest] = {}
        requests = _requests(pair for pair in wanted if pair not in known)
        for request, result in zip(requests, self._reranker.rank_batch(requests, return_errors=True), strict=True):
            assert request.instruction is not None
            if isinstance(result, InvalidRequest):
                refused[request.instruction, request.query] = result
            else:
                known |= self._keep(request.instruction, request.query, result)
        return [self._outcome(row, known, refused) for row in rows]

    def score_records(
        self, records: Iterable[object], *, with_documents: bool = False
    ) -> list[Record | InvalidRequest]:
        """As `score`, from records to the records that are written."""
        parsed = [_parse(record) for record in records]
        scored = iter(self.score([row for row in parsed if isinstance(row, Row)]))
        outcomes = [next(scored) if isinstance(row, Row) else row for row in parsed]
        return [
            outcome if isinstance(outcome, InvalidRequest) else to_record(outcome, with_documents=with_documents)
            for outcome in outcomes
        ]

    def _pairs(self, row: Row) -> list[PairKey]:
        instruction = self._reranker.config.instruction if row.instruction is None else row.instruction
        return [(instruction, row.query, document) for document in row.documents]

    def _keep(self, instruction: str, query: str, result: RerankResult) -> dict[PairKey, PairScore]:
        scores = {
            (instruction, query, item.document): PairScore(item.log_odds, item.num_tokens, item.num_truncated_tokens)
            for item in result
        }
        if self._cache is not None:
            self._cache.put(scores)
        self._advance(len(scores), result.num_computed_tokens)
        return scores

    def _outcome(
        self, row: Row, known: dict[PairKey, PairScore], refused: dict[tuple[str, str], InvalidRequest]
    ) -> ScoredRow | InvalidRequest:
        pairs = self._pairs(row)
        if (error := refused.get(pairs[0][:2])) is not None:
            return error
        scores = [known[pair] for pair in pairs]
        order, blended = _order(row, [score.log_odds for score in scores], self._blend)
        return ScoredRow(
            row=row,
            results=tuple(_ranked(index, row.documents[index], scores[index]) for index in order),
            blended_scores=None if blended is None else tuple(blended[index] for index in order),
        )


def _requests(pairs: Iterable[PairKey]) -> list[RerankRequest]:
    """Pairs of the same instruction and query together, in the order of their first."""
    documents: dict[tuple[str, str], list[str]] = {}
    for instruction, query, document in pairs:
        documents.setdefault((instruction, query), []).append(document)
    return [
        RerankRequest(query=query, instruction=instruction, documents=tuple(texts[i : i + MAX_REQUEST_DOCUMENTS]))
        for (instruction, query), texts in documents.items()
        for i in range(0, len(texts), MAX_REQUEST_DOCUMENTS)
    ]


def _order(row: Row, log_odds: list[float], how: Blend | None) -> tuple[list[int], list[float] | None]:
    """Positions best first, ties in the row's order, and the blended scores by position."""
    if how is None or row.is_pair:
        return best_first(log_odds), None
    if how.source == "bm25":
        others: Sequence[float] = Bm25(row.documents).scores(row.query, row.documents)
    elif row.first_stage_scores is None:
        raise ConfigError(f"blend is {how}, but the documents of query {row.query[:60]!r} bring no scores")
    else:
        others = row.first_stage_scores
    blended = blend(log_odds, others, how.weight)
    return best_first(blended), blended


def _ranked(index: int, document: str, score: PairScore) -> RankedDocument:
    return RankedDocument(
        index=index,
        relevance_score=sigmoid(score.log_odds),
        log_odds=score.log_odds,
        document=document,
        num_tokens=score.num_tokens,
        num_truncated_tokens=score.num_truncated_tokens,
    )


def _parse(record: object) -> Row | InvalidRequest:
    try:
        return parse_record(record)
    except InvalidRequest as error:
        return error
