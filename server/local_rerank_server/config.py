"""Every option of the server, once: name, default, unit, help (the engine's own stand in `local_rerank.config`).

Flags, `LOCAL_RERANK_*` variables and `docs/options.md` come from these fields. A `ServerConfig` is checked as it is
made; it reads no file and opens no socket.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from local_rerank.errors import ConfigError
from local_rerank.types import Limits

HOSTED_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query."
"""The hosted DashScope service's documented default; unlike the model card's it ends in a full stop."""

DASHSCOPE_MODELS = ("qwen3-rerank", "gte-rerank-v2", "gte-rerank", "qwen3.7-text-rerank")
"""The names that DashScope clients send; several of them cannot be told to send another."""

MOST_DOCUMENTS = 100_000
"""To which the number of documents may be set. A tenth of a second is spent on looking at so many."""

DocumentEcho = Literal["object", "string"]

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["human", "json"]


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many engines there may be. `most` is None where the cluster's size decides."""

    least: int
    most: int | None

    @property
    def fixed(self) -> int | None:
        """The number, where there is only one."""
        return self.least if self.least == self.most else None

    @classmethod
    def parse(cls, text: str) -> Replicas:
        """`auto`, `4` or `1-8`; raises ConfigError."""
        if text == "auto":
            return cls(1, None)
        least, _, most = text.partition("-")
        if least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least):
            return cls(int(least), int(most or least))
        raise ConfigError(f"replicas is {text!r}; it must be auto, a number from 1, or a range such as 1-8")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens, whom it answers, and what one request may hold."""

    host: Annotated[str, Parameter(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Parameter(help="Port to listen on; 0 takes a free one.")] = 8000
    uds: Annotated[Path | None, Parameter(help="Listen on this Unix socket instead of host and port.")] = None
    root_path: Annotated[str, Parameter(help="Path under which a reverse proxy publishes the server.")] = ""
    ssl_certfile: Annotated[Path | None, Parameter(help="TLS certificate (PEM); needs --ssl-keyfile.")] = None
    ssl_keyfile: Annotated[Path | None, Parameter(help="TLS private key (PEM); needs --ssl-certfile.")] = None
    api_key: Annotated[
        tuple[str, ...],
        Parameter(help="A key that clients must send as `Authorization: Bearer KEY`, as KEY or NAME:KEY; may be "
                       "repeated."),
    ] = ()  # fmt: skip
    api_key_file: Annotated[
        Path | None, Parameter(help="File of keys, one `name:key` a line; empty lines and # comments are skipped.")
    ] = None
    insecure: Annotated[
        bool, Parameter(help="Allow listening beyond this machine without a key.", negative="")
    ] = False  # fmt: skip
    key_requests_per_minute: Annotated[
        int | None, Parameter(help="Requests a minute of each key (without keys: of all clients together).")
    ] = None
    key_tokens_per_minute: Annotated[
        int | None,
        Parameter(help="Tokens a minute of each key, as `usage` counts them (without keys: of all together)."),
    ] = None
    cors_origins: Annotated[
        tuple[str, ...],
        Parameter(help="Origin whose pages may call this server from a browser, * for all; may be repeated."),
    ] = ()
    max_body_bytes: Annotated[int, Parameter(help="Bytes of a request body; more are refused.")] = 64 * 1024 * 1024
    max_total_body_bytes: Annotated[
        int, Parameter(help="Bytes of all request bodies held at once; a request beyond that is refused as overload.")
    ] = 512 * 1024 * 1024
    max_queued_requests: Annotated[
        int, Parameter(help="Requests held at once, running ones too; one beyond that is refused as overload.")
    ] = 2048
    header_timeout_seconds: Annotated[int, Parameter(help="Seconds a client may take to send a request's head.")] = 10
    body_timeout_seconds: Annotated[int, Parameter(help="Seconds a client may take to send a request's body.")] = 60
    write_timeout_seconds: Annotated[
        int, Parameter(help="Seconds a client may read nothing of its answer; then the connection is cut.")
    ] = 60
    request_timeout_ms: Annotated[
        int, Parameter(help="Milliseconds a request may take; the header X-Request-Timeout-Ms can lower it.")
    ] = 60_000
    drain_seconds: Annotated[
        int, Parameter(help="Seconds that accepted requests get to finish after SIGTERM or Ctrl-C.")
    ] = 30
    max_query_chars: Annotated[int, Parameter(help="Characters of a query, on every route.")] = 300_000
    max_instruction_chars: Annotated[int, Parameter(help="Characters of an instruction, on every route.")] = 50_000
    max_documents: Annotated[int, Parameter(help="Documents of a request, on routes other than DashScope's.")] = 1000
    max_document_chars: Annotated[
        int, Parameter(help="Characters of a document, on routes other than DashScope's.")
    ] = 2_000_000
    max_request_tokens: Annotated[
        int,
        Parameter(help="Tokens of a request after cutting (query tokens x documents + document tokens), on routes "
                       "other than DashScope's."),
    ] = 500_000  # fmt: skip
    dashscope_max_documents: Annotated[int, Parameter(help="Documents of a request, on the DashScope routes.")] = 500
    dashscope_max_document_chars: Annotated[
        int, Parameter(help="Characters of a document, on the DashScope routes.")
    ] = 300_000
    dashscope_max_request_tokens: Annotated[
        int, Parameter(help="Tokens of a request after cutting, on the DashScope routes.")
    ] = 120_000
    dashscope_instruction: Annotated[
        str, Parameter(help="Instruction of requests on the DashScope routes that bring none.")
    ] = HOSTED_INSTRUCTION
    model_aliases: Annotated[
        tuple[str, ...],
        Parameter(help="Names beside the model's own that the DashScope routes answer to; may be repeated. "
                       "Given at all, they replace the default."),
    ] = DASHSCOPE_MODELS  # fmt: skip
    strict: Annotated[
        bool, Parameter(help="Answer 400 to an empty document, as the hosted service does.", negative="")
    ] = False  # fmt: skip
    strict_models: Annotated[
        bool, Parameter(help="Answer 404 to an unknown model name on every route.", negative="")
    ] = False  # fmt: skip
    document_echo: Annotated[
        DocumentEcho,
        Parameter(help="How /rerank and /v1/rerank send a document back: an object with its text, or, for clients of "
                       "Infinity, the string alone."),
    ] = "object"  # fmt: skip
    no_self_test: Annotated[
        bool, Parameter(help="Become ready without scoring the pairs whose scores are known.", negative="")
    ] = False  # fmt: skip
    ray: Annotated[
        bool,
        Parameter(help="Score in engines of their own, which Ray Serve keeps, on this machine or on the cluster at "
                       "RAY_ADDRESS.", negative=""),
    ] = False  # fmt: skip
    replicas: Annotated[
        str,
        Parameter(help="With --ray, how many engines: a number, a range such as 1-8 that follows the queue, or auto: "
                       "from one to as many as the cluster holds, one per GPU."),
    ] = "auto"  # fmt: skip
    log_level: Annotated[LogLevel, Parameter(help="Least severe message that is logged.")] = "info"
    log_format: Annotated[LogFormat, Parameter(help="Lines for people, or a JSON object a line.")] = "human"
    log_texts: Annotated[
        bool, Parameter(help="Log queries and documents too; without it no text of a request is logged.", negative="")
    ] = False  # fmt: skip
    otlp_endpoint: Annotated[
        str | None,
        Parameter(help="URL of an OpenTelemetry collector (OTLP over HTTP) that gets a span of each request, for "
                       "example http://localhost:4318/v1/traces; needs local-rerank[otel]."),
    ] = None  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        for name, most in _MOST.items():
            if (value := getattr(self, name)) > most:
                raise ConfigError(f"{name} is {value}; it must be at most {most}")
        if self.max_total_body_bytes < self.max_body_bytes:
            what = f"max_total_body_bytes is {self.max_total_body_bytes}"
            raise ConfigError(f"{what}; it must be at least max_body_bytes, which is {self.max_body_bytes}")
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path is {self.root_path!r}; it must begin with /")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile go together; only one of them is set")
        if not self.ray and self.replicas != "auto":
            raise ConfigError(f"replicas is {self.replicas!r}; several engines need --ray")
        Replicas.parse(self.replicas)
        if any(not key.rpartition(":")[2].strip() for key in self.api_key):
            raise ConfigError("api_key is empty; leave it out to serve without a key")
        if not (self.has_keys or self.insecure or self.uds or _is_loopback(self.host)):
            raise ConfigError(
                f"host {self.host} can be reached from other machines and no api_key is set; "
                "set one, or allow that with --insecure"
            )

    @property
    def has_keys(self) -> bool:
        """Whether clients must send a key."""
        return bool(self.api_key) or self.api_key_file is not None

    @property
    def num_replicas(self) -> Replicas:
        """How many engines `replicas` asks for."""
        return Replicas.parse(self.replicas)

    @property
    def limits(self) -> Limits:
        """What one request may hold on every route but DashScope's."""
        return Limits(
            max_documents=self.max_documents,
            max_query_chars=self.max_query_chars,
            max_instruction_chars=self.max_instruction_chars,
            max_document_chars=self.max_document_chars,
            max_request_tokens=self.max_request_tokens,
            allow_empty_documents=not self.strict,
        )

    @property
    def dashscope_limits(self) -> Limits:
        """What one request may hold on the DashScope routes: the hosted service's limits by default."""
        return Limits(
            max_documents=self.dashscope_max_documents,
            max_query_chars=self.max_query_chars,
            max_instruction_chars=self.max_instruction_chars,
            max_document_chars=self.dashscope_max_document_chars,
            max_request_tokens=self.dashscope_max_request_tokens,
            allow_empty_documents=not self.strict,
        )


_LEAST = {
    "port": 0,
    "key_requests_per_minute": 1,
    "key_tokens_per_minute": 1,
    "max_body_bytes": 1,
    "max_total_body_bytes": 1,
    "max_queued_requests": 1,
    "header_timeout_seconds": 1,
    "body_timeout_seconds": 1,
    "write_timeout_seconds": 1,
    "request_timeout_ms": 1,
    "drain_seconds": 0,
    "max_query_chars": 1,
    "max_instruction_chars": 1,
    "max_documents": 1,
    "max_document_chars": 1,
    "max_request_tokens": 1,
    "dashscope_max_documents": 1,
    "dashscope_max_document_chars": 1,
    "dashscope_max_request_tokens": 1,
}


_MOST = {"port": 65535, "max_documents": MOST_DOCUMENTS, "dashscope_max_documents": MOST_DOCUMENTS}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
