"""Admission control: which requests may enter, and how many requests and body bytes the process holds.

A request that does not fit is refused before its body is read, as far as its headers tell the body's length.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from starlette.types import Message, Receive

from local_rerank.errors import Overloaded
from local_rerank_server.config import ServerConfig
from local_rerank_server.errors import BodyTooLarge, BodyTooSlow
from local_rerank_server.rate_limits import RateLimiter


class Admission:
    """Counts the admitted requests of one process, and refuses more than `config` allows."""

    def __init__(self, config: ServerConfig, *, retry_after: Callable[[], float]) -> None:
        """`retry_after` estimates the seconds until the engine's queue has room."""
        self.config = config
        self.rates = RateLimiter(config)
        self.num_models = 1  # each may have `max_queued_requests`; `ServerState.rank` knows whose a request is
        self.num_requests = 0  # admitted and not answered yet
        self.num_body_bytes = 0  # of the bodies of those requests
        self._retry_after = retry_after

    def check(self, num_body_bytes: int, key: str | None) -> None:
        """Raise `BodyTooLarge` or `Overloaded` unless a request with such a body may enter; counts it for its key."""
        self.check_size(num_body_bytes)
        limit = self.config.max_queued_requests * self.num_models
        if self.num_requests >= limit:
            raise self._overloaded(f"{self.num_requests} requests are in flight; at most {limit} are allowed")
        self.check_total(num_body_bytes)
        self.rates.count_request(key)

    def check_size(self, num_bytes: int) -> None:
        """Raise `BodyTooLarge` if one body may not have that many bytes."""
        if num_bytes > self.config.max_body_bytes:
            raise BodyTooLarge(limit=self.config.max_body_bytes)

    def check_total(self, num_more_bytes: int) -> None:
        """Raise `Overloaded` if the bodies held and `num_more_bytes` are over the limit; one body always fits."""
        limit, held = self.config.max_total_body_bytes, self.num_body_bytes
        if held and held + num_more_bytes > limit:
            raise self._overloaded(
                f"request bodies hold {held} bytes and {num_more_bytes} more would exceed the limit of {limit}"
            )

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request as in flight while the block runs."""
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    def _overloaded(self, message: str) -> Overloaded:
        return Overloaded(message, retry_after=self._retry_after())


class BodyReader:
    """Receives one request's body within the client timeout, and counts its bytes while the request is in flight."""

    def __init__(self, receive: Receive, admission: Admission, *, num_declared_bytes: int) -> None:
        self._receive = receive
        self._admission = admission
        self._more = True
        self._num_counted = num_declared_bytes  # its share of `admission.num_body_bytes`
        self._num_received = 0
        self._deadline = time.monotonic() + admission.config.client_timeout_seconds

    def __enter__(self) -> Self:
        self._admission.num_body_bytes += self._num_counted
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.num_body_bytes -= self._num_counted

    async def receive(self) -> Message:
        if not self._more:  # all that can still come is the disconnect, which has no deadline
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlow(limit_seconds=self._admission.config.client_timeout_seconds) from None
        self._more = message.get("more_body", False)
        self._count(len(message.get("body", b"")))
        return message

    def _count(self, num_bytes: int) -> None:
        """Check the sizes again, because a chunked body declares no length."""
        self._num_received += num_bytes
        self._admission.check_size(self._num_received)
        if (more := self._num_received - self._num_counted) > 0:
            self._admission.check_total(more)
            self._num_counted += more
            self._admission.num_body_bytes += more
