"""Listening sockets, and connections: uvicorn's h11 protocol with timeouts, stricter heads, answers without a route.

uvicorn itself has no limit for the first head on a connection, for a body, and for a peer that does not read. The
application answers a late body with 408 in its dialect; the timer here closes the connection if that did not end it.
TLS on a plain port and plain HTTP on a TLS port get a 400 that names the scheme; without that the first sees "wrong
version number" and the second an empty reply. A request that is not HTTP gets a 400, a head over 64 KiB a 431.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import socket
import ssl
import stat
import uuid
from http import HTTPStatus
from pathlib import Path
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from local_rerank.errors import ConfigError
from local_rerank_server.browsers import SECURITY_HEADERS
from local_rerank_server.config import ServerConfig
from local_rerank_server.errors import quoted

logger = logging.getLogger(__name__)

MAX_FILES = 65_536  # open file descriptors, which include connections
GRACE_SECONDS = 5  # after the body's timeout, for sending the 408 and for skipping the rest of a refused body

TLS_RECORD = b"\x16"  # the first byte of a TLS handshake; no HTTP request begins with it
FOLDED_LINE = re.compile(rb"\n[ \t]")  # a header that goes on in the next line (RFC 9112, section 5.2)
END_OF_HEAD = re.compile(rb"\n\r?\n")
PLAIN_REQUEST = re.compile(rb"[A-Za-z]{3,10} ")  # the start of a request line
USE_HTTP = (
    "this port speaks plain HTTP, and the request came over TLS; use http://, or start the server with --ssl-certfile"
)
USE_HTTPS = "this port speaks TLS, and the request came in plain HTTP; use https://"


def make_protocol(config: ServerConfig) -> type[H11Protocol]:
    """The protocol class with the client timeout of `config`."""
    timeout = config.client_timeout_seconds
    read_timeouts = {h11.IDLE: timeout, h11.SEND_BODY: timeout + GRACE_SECONDS}

    class TimedProtocol(H11Protocol):
        """One connection."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.conn: _StrictConnection = _StrictConnection(h11.SERVER)
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
            if data.startswith(TLS_RECORD) and not self.cycle and not self.conn.trailing_data[0]:
                logger.warning("400 to %s: %s", self.client[0] if self.client else "-", USE_HTTP)
                return self._answer(400, USE_HTTP)
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
                self._answer(408, f"the request head was not received within {timeout} s")
            else:
                self.transport.abort()

        def send_400_response(self, msg: str) -> None:
            """Answer a request that is not HTTP and close the connection, unless the request was answered before."""
            error = self.conn.refused
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or error is None:
                return self.transport.close()
            status = 431 if error.error_status_hint == 431 else 400
            self._answer(status, f"the request is not valid HTTP: {quoted(str(error))}")

        def _answer(self, status: int, text: str) -> None:
            """Answer in plain text, because without a head the dialect is unknown."""
            response = h11.Response(status_code=status, headers=_headers(text), reason=HTTPStatus(status).phrase)
            for event in (response, h11.Data(data=text.encode()), h11.EndOfMessage()):
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


class _StrictConnection(h11.Connection):
    """Refuses folded headers, which proxies read in different ways, and keeps the error of a refused request."""

    refused: h11.RemoteProtocolError | None = None

    def next_event(self) -> Any:
        try:
            if self.their_state is h11.IDLE:
                received = self.trailing_data[0]
                end = END_OF_HEAD.search(received)
                if FOLDED_LINE.search(received, 0, end.start() + 1 if end else len(received)):
                    raise h11.RemoteProtocolError("a header is folded into several lines")
            return super().next_event()
        except h11.RemoteProtocolError as error:
            self.refused = error
            raise


def _headers(text: str) -> list[tuple[str, str]]:
    kind = ("content-type", "text/plain; charset=utf-8")
    own = [kind, ("content-length", str(len(text))), ("connection", "close"), ("x-request-id", str(uuid.uuid4()))]
    return own + list(SECURITY_HEADERS.items())


def make_tls_context(config: ServerConfig) -> ssl.SSLContext:
    """The context for the certificate of `config`; raises OSError or ssl.SSLError if that cannot be used."""
    assert config.ssl_certfile is not None
    context = _TlsContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    return context


class _TlsObject(ssl.SSLObject):
    """Answers plain HTTP in plain HTTP, before the handshake fails."""

    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    begun = False

    def do_handshake(self) -> None:
        if not self.begun and self.incoming.pending:
            head = self.incoming.read()
            self.incoming.write(head)
            self.begun = True
            if PLAIN_REQUEST.match(head):
                logger.warning("400: %s", USE_HTTPS)
                lines = [
                    "HTTP/1.1 400 Bad Request",
                    *(": ".join(header) for header in _headers(USE_HTTPS)),
                    "",
                    USE_HTTPS,
                ]
                self.outgoing.write("\r\n".join(lines).encode())
                raise ssl.SSLWantReadError  # the event loop now sends the answer; the next bytes end the handshake
        super().do_handshake()


class _TlsContext(ssl.SSLContext):
    sslobject_class = _TlsObject

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        wrapped = super().wrap_bio(incoming, outgoing, *args, **kwargs)
        assert isinstance(wrapped, _TlsObject)
        wrapped.incoming, wrapped.outgoing = incoming, outgoing
        return wrapped


def allow_many_connections() -> None:
    """Raise the soft limit of open files, often 1,024, because each connection takes one."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MAX_FILES) if hard > 0 else MAX_FILES, hard))


def listen(config: ServerConfig) -> socket.socket:
    """A listening socket; connections wait in its backlog until the server accepts them."""
    where = str(config.uds) if config.uds else f"{config.host}:{config.port}"
    try:
        return _listen_unix(config.uds) if config.uds else _listen_tcp(config.host, config.port)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]  # Python adds the address in brackets
        taken = "; stop the process that uses it, or choose another" if error.errno == errno.EADDRINUSE else ""
        option = "--uds" if config.uds else "--port"
        raise ConfigError(f"cannot listen on {where}: {reason}{taken and f'{taken} {option}'}") from None


def _listen_tcp(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address, family=family)


def _listen_unix(path: Path) -> socket.socket:
    """Replaces the socket of a dead process, never that of a running one."""
    if not hasattr(socket, "AF_UNIX"):
        raise ConfigError("uds is set, but Python has no Unix sockets on this system; set host and port instead")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:  # a regular file refuses too, and must not be removed
            if stat.S_ISSOCK(path.stat().st_mode):
                path.unlink()
        except OSError:
            pass  # usually there is no file
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def file_id(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from another one at the same path; None if there is none."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def address_of(listener: socket.socket, config: ServerConfig) -> str:
    scheme = "https" if config.ssl_certfile else "http"
    if config.uds:
        return f"{scheme}+unix://{config.uds}"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{config.prefix}"
