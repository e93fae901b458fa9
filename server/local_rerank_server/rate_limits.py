"""How many requests and tokens a minute each API key may have: name of a key -> let in, or an error with a time.

A minute begins with a key's first request and is counted anew when it is over. Tokens are known when a request is
answered, so a key that has used its tokens up is refused from its next request on.
"""

from __future__ import annotations

import time

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from local_rerank_server.config import ServerConfig
from local_rerank_server.errors import RequestRateExceeded, TokenRateExceeded

EVERYBODY = "everybody"  # who has no key shares one allowance


class KeyRates:
    """What each key has used of its minute."""

    def __init__(self, config: ServerConfig) -> None:
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._requests = _per_minute(config.key_requests_per_minute, "requests")
        self._tokens = _per_minute(config.key_tokens_per_minute, "tokens")

    def take_request(self, key: str | None) -> None:
        """Count a request of a key; raises RequestRateExceeded or TokenRateExceeded."""
        name = key or EVERYBODY
        if self._tokens is not None and not self._limiter.test(self._tokens, name):
            raise TokenRateExceeded(limit=self._tokens.amount, retry_after=self._seconds_left(self._tokens, name))
        if self._requests is not None and not self._limiter.hit(self._requests, name):
            raise RequestRateExceeded(limit=self._requests.amount, retry_after=self._seconds_left(self._requests, name))

    def add_tokens(self, key: str | None, num_tokens: int) -> None:
        """Count the tokens of a request that was answered."""
        if self._tokens is not None:
            self._limiter.hit(self._tokens, key or EVERYBODY, cost=num_tokens)

    def _seconds_left(self, item: RateLimitItem, name: str) -> float:
        return self._limiter.get_window_stats(item, name).reset_time - time.time()


def _per_minute(amount: int | None, what: str) -> RateLimitItem | None:
    return None if amount is None else RateLimitItemPerMinute(amount, namespace=what)
