"""A ranking as lines of JSON: each document as soon as its score is known, then the whole answer.

An error before the first line is an ordinary one. After it the status is sent, so the error is the last line.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from local_rerank.errors import ModelUnavailable
from local_rerank.types import RankedDocument, RerankResult
from local_rerank_server.dialects._route import Dialect, to_known_error
from local_rerank_server.errors import STATUS

if TYPE_CHECKING:
    from local_rerank.requests.pending import OnScored


class LineStream(StreamingResponse):
    """Starlette's class without its wait for the client to leave, which ends the ranking and so the lines."""

    media_type = "application/x-ndjson"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.stream_response(send)


async def stream(
    http: Request,
    rank: Callable[[OnScored], Awaitable[RerankResult]],
    *,
    dialect: Dialect,
    render_item: Callable[[RankedDocument], object],
    render: Callable[[RerankResult], object],
) -> LineStream:
    """The response, as soon as there is a line. Raises what `rank` raises before that."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[list[RankedDocument] | None] = asyncio.Queue()  # None: there is a result or an error

    def on_scored(documents: list[RankedDocument]) -> None:  # in the engine's thread
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(arrived.put_nowait, documents)

    async def lines() -> AsyncIterator[bytes]:
        ranking = asyncio.ensure_future(rank(on_scored))
        ranking.add_done_callback(lambda _: arrived.put_nowait(None))
        try:
            while (documents := await arrived.get()) is not None:
                yield _encoded(map(render_item, documents))
            yield _encoded([render(await ranking)])
        finally:
            ranking.cancel()

    async def lines_and_error(first: bytes) -> AsyncIterator[bytes]:
        yield first
        try:
            async for line in rest:
                yield line
        except (Exception, asyncio.CancelledError) as error:
            stopped = ModelUnavailable("the server was stopped before this request was answered")
            known = to_known_error(error, http) if isinstance(error, Exception) else stopped
            http.state.error = type(known).__name__  # for the access log and the metrics
            yield _encoded([dialect.render_error(known, STATUS[type(known)], http.state.request_id)])

    rest = lines()
    return LineStream(lines_and_error(await anext(rest)))


def _encoded(values: Iterable[object]) -> bytes:
    return b"".join(msgspec.json.encode(value) + b"\n" for value in values)
