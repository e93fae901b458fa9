"""Routes each request to the replica with the fewest outstanding tokens.

Requests differ a thousandfold in length, so balancing by request count would queue short ones behind a long one. Each
sending process has its own router, which counts what it sent and what was answered.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from local_rerank.types import RerankRequest

BYTES_PER_TOKEN = 4  # of UTF-8: about right for English and, at three bytes a character, for Chinese
TEMPLATE_TOKENS = 60  # system text, default instruction and labels, once per request
SUFFIX_TOKENS = 9  # after each document
MAX_RANKS = 3  # replicas to try before the router backs off


def estimate_tokens(request: RerankRequest) -> int:
    """Estimate a request's tokens without a tokenizer."""
    texts = (request.instruction or "", request.query, *request.documents)
    num_bytes = sum(len(text) if text.isascii() else len(text.encode("utf-8", "replace")) for text in texts)
    return TEMPLATE_TOKENS + SUFFIX_TOKENS * len(request.documents) + num_bytes // BYTES_PER_TOKEN


class TokenLoad:
    """Outstanding tokens of each replica."""

    def __init__(self) -> None:
        self._tokens: dict[Hashable, dict[str, int]] = {}  # by replica, then by request
        self._early: set[str] = set()  # requests reported as answered before they were reported as sent

    def of(self, replica: Hashable) -> int:
        return sum(self._tokens.get(replica, {}).values())

    def sent(self, replica: Hashable, request_id: str, num_tokens: int) -> None:
        if request_id in self._early:
            self._early.discard(request_id)
        else:
            self._tokens.setdefault(replica, {})[request_id] = num_tokens

    def answered(self, replica: Hashable, request_id: str) -> None:
        if self._tokens.get(replica, {}).pop(request_id, None) is None:
            self._early.add(request_id)

    def keep_only(self, replicas: Iterable[Hashable]) -> None:
        """Forget all other replicas."""
        alive = set(replicas)
        self._tokens = {replica: tokens for replica, tokens in self._tokens.items() if replica in alive}


class FewestTokensRouter(RequestRouter):
    """Ranks a deployment's replicas by their outstanding tokens from this router."""

    def initialize_state(self, **_: object) -> None:
        self._load = TokenLoad()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._load.keep_only(replica.replica_id for replica in replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        ranked = heapq.nsmallest(MAX_RANKS, candidate_replicas, key=lambda replica: self._load.of(replica.replica_id))
        return [[replica] for replica in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        num_tokens = pending_request.kwargs.get("num_tokens", 0)
        self._load.sent(replica_id, pending_request.metadata.internal_request_id, num_tokens)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._load.answered(replica_id, internal_request_id)
