"""uvicorn's h11 protocol with timeouts for reading the request head, reading the body, and writing the response.

uvicorn itself has no limit for the first head on a connection, for a body, and for a peer that does not read. The
application answers a late body with 408 in its dialect; the timer here closes the connection if that did not end it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from local_rerank_server.config import ServerConfig

GRACE_SECONDS = 5  # after the body's timeout, for sending the 408 and for skipping the rest of a refused body


def make_protocol(config: ServerConfig) -> type[H11Protocol]:
    """The protocol class with the client timeout of `config`."""
    timeout = config.client_timeout_seconds
    read_timeouts = {h11.IDLE: timeout, h11.SEND_BODY: timeout + GRACE_SECONDS}

    class TimedProtocol(H11Protocol):
        """One connection."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._read_timer: asyncio.TimerHandle | None = None
            self._timed_state: Any = None  # the client's h11 state that the read timer is for
            self._write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            # call pause_writing as soon as any byte is buffered; with 0 the TLS transport pauses on an empty buffer
            transport.set_write_buffer_limits(high=1)
            self._start_read_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._read_timer, self._write_timer):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._start_read_timer()

        def _start_read_timer(self) -> None:
            """Time the part that the client is sending; more bytes of the same part do not extend its time."""
            state = self.conn.their_state
            if state is self._timed_state:
                return
            if self._read_timer is not None:
                self._read_timer.cancel()
            self._timed_state = state
            seconds = read_timeouts.get(state)
            self._read_timer = None if seconds is None else self.loop.call_later(seconds, self._read_timed_out)

        def _read_timed_out(self) -> None:
            if self.conn.their_state is not self._timed_state or self.transport.is_closing():
                return
            if self._timed_state is h11.IDLE and self.conn.our_state is h11.IDLE:
                self._answer_408()
            else:
                self.transport.abort()

        def _answer_408(self) -> None:
            """Answer in plain text, because without a head the dialect is unknown."""
            text = f"the request head was not received within {timeout} s".encode()
            headers = [("content-type", "text/plain"), ("content-length", str(len(text))), ("connection", "close")]
            for event in (h11.Response(status_code=408, headers=headers), h11.Data(data=text), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._write_timer is None:
                self._start_write_timer(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        def _start_write_timer(self, num_unsent: int) -> None:
            self._write_timer = self.loop.call_later(timeout, self._check_progress, num_unsent)

        def _check_progress(self, num_unsent_before: int) -> None:
            num_unsent = self.transport.get_write_buffer_size()
            if num_unsent >= num_unsent_before:
                self.transport.abort()
            else:
                self._start_write_timer(num_unsent)

    return TimedProtocol
