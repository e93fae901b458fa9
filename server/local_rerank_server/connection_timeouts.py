"""uvicorn's h11 protocol with patience that ends: for a request's head, for its body, for an answer nobody reads.

uvicorn itself waits without end for the first head on a connection, for a body, and for a peer that does not read. A
body that is late is answered by the application in its dialect; the time here is only for what goes on after that.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from local_rerank_server.config import ServerConfig

GRACE_SECONDS = (
    5  # after the body's time is over: for the answer that says so, and for a refused body to be passed over
)


def make_protocol(config: ServerConfig) -> type[H11Protocol]:
    """The protocol class with the timeouts of `config`."""
    waits = {h11.IDLE: config.header_timeout_seconds, h11.SEND_BODY: config.body_timeout_seconds + GRACE_SECONDS}

    class TimedProtocol(H11Protocol):
        """One connection."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._reading: asyncio.TimerHandle | None = None
            self._waits_for: Any = None  # h11's state of the client while a timer runs for it
            self._writing: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            # pause_writing comes as soon as bytes have to wait; at 0 the TLS transport would pause an empty buffer
            transport.set_write_buffer_limits(high=1)
            self._watch_reading()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._reading, self._writing):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_reading()

        def _watch_reading(self) -> None:
            """Time the part of the request that the client is at; more of the same part does not give it more time."""
            state = self.conn.their_state
            if state is self._waits_for:
                return
            if self._reading is not None:
                self._reading.cancel()
            self._waits_for = state
            seconds = waits.get(state)
            self._reading = None if seconds is None else self.loop.call_later(seconds, self._too_slow)

        def _too_slow(self) -> None:
            if self.conn.their_state is not self._waits_for or self.transport.is_closing():
                return
            if self._waits_for is h11.IDLE and self.conn.our_state is h11.IDLE:
                self._refuse()
            else:
                self.transport.abort()

        def _refuse(self) -> None:
            """408 without a dialect: the path is not known."""
            text = f"the request's head did not come within {waits[h11.IDLE]} s".encode()
            headers = [("content-type", "text/plain"), ("content-length", str(len(text))), ("connection", "close")]
            for event in (h11.Response(status_code=408, headers=headers), h11.Data(data=text), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._writing is None:
                self._watch_writing(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._writing is not None:
                self._writing.cancel()
                self._writing = None

        def _watch_writing(self, unsent: int) -> None:
            self._writing = self.loop.call_later(config.write_timeout_seconds, self._check_progress, unsent)

        def _check_progress(self, unsent_before: int) -> None:
            unsent = self.transport.get_write_buffer_size()
            if unsent >= unsent_before:
                self.transport.abort()
            else:
                self._watch_writing(unsent)

    return TimedProtocol
