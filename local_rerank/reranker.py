"""The main path: RerankRequest -> pairs -> scheduler -> packed batch -> engine -> RerankResult.

`submit` tokenizes in the caller's thread and queues; one thread owns the model (`worker.py`) and works off batches, in
which pairs of several requests may share a forward pass. Every request that was taken gets an answer, if only an error.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal, Self, overload

from local_rerank import forks
from local_rerank.checkpoints.find import Checkpoint, open_checkpoint
from local_rerank.checkpoints.known_scores import ORDERED
from local_rerank.config import DEFAULT_INSTRUCTION, EngineConfig, merged
from local_rerank.engine.cpu.compute_thread import compute
from local_rerank.engine.engine import Engine, ModelInfo, load_engine
from local_rerank.errors import InvalidRequest, Overloaded
from local_rerank.requests.pending import Job
from local_rerank.requests.tokenization import Pair, PairTokenizer
from local_rerank.requests.worker import BatchReport, Worker
from local_rerank.types import RerankRequest, RerankResult, requests_of, scores_of


class Reranker:
    """Ranks documents by their relevance to a query, with a Qwen3-Reranker model on this machine.

    `model` is a hub id, a local folder, a bundle or None for the embedded local-rerank-nano; options are those of
    `EngineConfig`. Raises CheckpointError where the model cannot be loaded, ConfigError where an option cannot hold.

    >>> reranker = Reranker()
    >>> result = reranker.rank("capital of France", ["Rome is in Italy", "Paris is the capital of France"], top_n=1)
    >>> [(item.index, item.document) for item in result]
    [(1, 'Paris is the capital of France')]
    """

    def __init__(self, model: str | None = None, *, config: EngineConfig | None = None, **options: Any) -> None:
        self.config = merged(config or EngineConfig(), model, options)
        self.checkpoint = checkpoint = open_checkpoint(self.config.model, self.config.revision)
        self.tokenizer = PairTokenizer.from_folder(
            checkpoint.folder,
            checkpoint.template,
            max_length=min(self.config.max_length, checkpoint.max_length),
            max_query_tokens=self.config.max_query_tokens,
            max_document_tokens=self.config.max_document_tokens,
            default_instruction=self.config.instruction,
        )
        ids = {"yes_id": self.tokenizer.yes_id, "no_id": self.tokenizer.no_id}
        engine, self.info = compute(
            lambda: load_engine(self.config, checkpoint, **ids, known=lambda: _known_pairs(checkpoint))
        )
        self._start(engine, self.info)

    def _start(self, engine: Engine, info: ModelInfo) -> None:
        self._engine = engine
        self._worker = Worker(
            lambda batch: self._engine.forward(batch),
            max_batch_tokens=info.max_batch_tokens,
            max_queued_tokens=self.config.max_queued_tokens,
            one_pair_at_a_time=self.config.deterministic,
            launch=(lambda batch: self._engine.launch(batch)) if info.device.startswith("cuda") else None,
            device=info.device if self.config.device_map is None else f"device_map {self.config.device_map!r}",
        )

    @property
    def model_id(self) -> str:
        return self.info.model_id

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that wait for the model; those of the batch that runs do not."""
        return self._worker.num_queued_tokens

    @property
    def num_queued_requests(self) -> int:
        return self._worker.num_queued_requests

    @property
    def max_batch_tokens(self) -> int:
        """The budget of a batch; smaller than it was set to while memory is short."""
        return self._worker.max_batch_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """How fast the queue is worked off, as measured over the last batches; None before the first."""
        return self._worker.tokens_per_second

    def retry_after(self) -> float:
        """Seconds until one of the requests that wait will be done, as measured."""
        return self._worker.retry_after()

    def observe_batches(self, observer: Callable[[BatchReport], None]) -> None:
        """Have every batch reported to `observer`, in the model's thread; it must be quick and must not raise."""
        self._worker.on_batch = observer

    def rank(
        self, query: str, documents: Sequence[str], *, instruction: str | None = None, top_n: int | None = None
    ) -> RerankResult:
        """Rank documents, most relevant first; raises a leaf of InvalidRequest, Overloaded or EngineFailure."""
        documents = (documents,) if isinstance(documents, str) else tuple(documents)
        return self.submit(
            RerankRequest(query=query, documents=documents, instruction=instruction, top_n=top_n)
        ).result()

    def score(
        self, pairs: Iterable[tuple[str, str]], *, instruction: str | None = None, logits: bool = False
    ) -> list[float]:
        """Relevance scores of (query, document) pairs in their order; log-odds with `logits=True`.

        Neighbouring pairs with the same query share its tokens.
        """
        results = self.rank_batch(requests_of(pairs, instruction))
        return [score for result in results for score in scores_of(result, logits=logits)]

    @overload
    def rank_batch(
        self, requests: Iterable[RerankRequest], *, return_errors: Literal[False] = False
    ) -> Iterator[RerankResult]: ...

    @overload
    def rank_batch(
        self, requests: Iterable[RerankRequest], *, return_errors: bool
    ) -> Iterator[RerankResult | InvalidRequest]: ...

    def rank_batch(
        self, requests: Iterable[RerankRequest], *, return_errors: bool = False
    ) -> Iterator[RerankResult | InvalidRequest]:
        """Rank many requests, sharing batches; yields results in the order of the requests, a bounded number ahead.

        A request that cannot be ranked ends the iteration with its InvalidRequest or, with `return_errors=True`, is
        answered with it; whatever else goes wrong is raised.
        """
        in_flight: deque[Future[RerankResult] | Future[RerankResult | InvalidRequest]] = deque()
        try:
            for request in requests:
                while (future := self.submit_if_room(request, not in_flight, return_errors)) is None:
                    yield in_flight.popleft().result()
                in_flight.append(future)
                while in_flight and in_flight[0].done():
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        finally:  # a request that cannot be ranked, or a caller who stops, leaves nothing running
            for future in in_flight:
                future.cancel()

    def submit_if_room(
        self, request: RerankRequest, must: bool, return_errors: bool
    ) -> Future[RerankResult] | Future[RerankResult | InvalidRequest] | None:
        """As `submit`, but None where the queue is full, unless it `must` go in now; perhaps an error as the result."""
        try:
            return self.submit(request)
        except Overloaded:
            if must:
                raise
            return None
        except InvalidRequest as error:
            if not return_errors:
                raise
            refused: Future[RerankResult | InvalidRequest] = Future()
            refused.set_result(error)  # keeps its place behind the requests before it
            return refused

    def submit(self, request: RerankRequest, *, name: str | None = None) -> Future[RerankResult]:
        """Tokenize in this thread and queue; cancelling the future frees its place before the next forward pass.

        `name` is what the log calls the request. Raises a leaf of InvalidRequest, Overloaded, ModelUnavailable or
        UnusableAfterFork; the future may fail with EngineFailure.
        """
        started = time.perf_counter()
        self._worker.check_room()  # before the work of tokenizing
        job = Job(request, self.tokenizer.pairs(request), model_id=self.model_id, started=started, name=name)
        self._worker.submit(job)
        return job.future

    def explain(self, query: str, document: str, *, instruction: str | None = None) -> tuple[str, list[int]]:
        """The exact prompt of one pair and its token ids."""
        request = RerankRequest(query=query, documents=(document,), instruction=instruction)
        pair = self.tokenizer.pairs(request).pairs[0]
        ids = [*pair.prefix_ids, *pair.document_ids]
        return self.tokenizer.decode(ids), ids

    def close(self) -> None:
        """Finish the batch that runs, fail what waits with ModelUnavailable, and stop the thread."""
        self._worker.close()

    __reduce__ = forks.refuse_copies

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _known_pairs(checkpoint: Checkpoint) -> list[Pair]:
    """The pairs of the self-test's plain questions, whatever limits are set."""
    limit = checkpoint.max_length
    limits = {"max_length": limit, "max_query_tokens": limit, "max_document_tokens": limit}
    tokenizer = PairTokenizer.from_folder(
        checkpoint.folder, checkpoint.template, **limits, default_instruction=DEFAULT_INSTRUCTION
    )
    requests = [RerankRequest(query=pair.query, documents=(pair.document,)) for pair in ORDERED]
    pairs = [pair for request in requests for pair in tokenizer.pairs(request).pairs]
    # instruction and system prompt are theirs in common: 284 tokens of a pass in place of 428
    equal = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*(pair.prefix_ids for pair in pairs), strict=False))
    shared = sum(1 for _ in equal)
    return [Pair(pair.prefix_ids[:shared], pair.prefix_ids[shared:] + pair.document_ids) for pair in pairs]
