"""Rate limits per API key: requests and tokens per minute, in fixed windows that start with a key's first request.

A request's tokens are counted when it is answered, so a key can exceed its tokens once; its next request is refused.
"""

from __future__ import annotations

import time

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from local_rerank_server.config import ServerConfig
from local_rerank_server.errors import RequestRateExceeded, TokenRateExceeded

EVERYBODY = "everybody"  # clients without a key share one window


class RateLimiter:
    """Counts the requests and tokens of each key."""

    def __init__(self, config: ServerConfig) -> None:
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._requests = _per_minute(config.key_requests_per_minute, "requests")
        self._tokens = _per_minute(config.key_tokens_per_minute, "tokens")

    def count_request(self, key: str | None) -> None:
        """Count a request; raises RequestRateExceeded or TokenRateExceeded."""
        name = key or EVERYBODY
        if self._tokens is not None and not self._limiter.test(self._tokens, name):
            raise TokenRateExceeded(limit=self._tokens.amount, retry_after=self._seconds_left(self._tokens, name))
        if self._requests is not None and not self._limiter.hit(self._requests, name):
            raise RequestRateExceeded(limit=self._requests.amount, retry_after=self._seconds_left(self._requests, name))

    def count_tokens(self, key: str | None, num_tokens: int) -> None:
        """Count the tokens of an answered request."""
        if self._tokens is not None:
            self._limiter.hit(self._tokens, key or EVERYBODY, cost=num_tokens)

    def _seconds_left(self, item: RateLimitItem, name: str) -> float:
        return self._limiter.get_window_stats(item, name).reset_time - time.time()


def _per_minute(amount: int | None, what: str) -> RateLimitItem | None:
    return None if amount is None else RateLimitItemPerMinute(amount, namespace=what)
