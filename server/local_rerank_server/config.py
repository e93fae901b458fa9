"""All options of the server: name, default, unit and help text (`local_rerank.config` has those of the engine).

Command-line flags, `LOCAL_RERANK_*` variables and `docs/options.md` are derived from these fields. `ServerConfig`
validates its values when it is created; it reads no file and opens no socket.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from local_rerank.config import ENGINE, LIMITS, MODEL, EngineConfig
from local_rerank.errors import ConfigError
from local_rerank.models.options import seconds_of
from local_rerank.requests.scores import read_calibration
from local_rerank.types import Limits
from local_rerank_server.ray_serve.replica_range import ReplicaRange

HOSTED_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query."
"""The hosted DashScope service's documented default; unlike the model card's it ends with a full stop."""

DASHSCOPE_MODELS = ("qwen3-rerank", "gte-rerank-v2", "gte-rerank", "qwen3.7-text-rerank")
"""Model names that DashScope clients send; some of these clients cannot be configured to send another."""

MAX_DOCUMENTS = 100_000
"""Upper bound of `max_documents`. Validating that many takes a tenth of a second."""

MAX_QUERY_CHARS = 300_000
MAX_INSTRUCTION_CHARS = 50_000
MAX_DOCUMENT_CHARS = 2_000_000  # about a second of tokenization; documents are cut to max_document_tokens anyway
BODIES_HELD = 8  # bodies of the maximum size that may be in memory at once

ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^A-Z/?#@\s]+")  # as browsers send it
HOST_NAME = re.compile(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*")

ADDRESS = Group("Address and keys", sort_key=2)
MODELS = Group("Several models", sort_key=8)
PROXIES = Group("Proxies, TLS and browsers", sort_key=3)
APIS = Group("Rerank APIs", sort_key=5)
LOGS = Group("Logs", sort_key=7)

DashScopeLimits = Literal["hosted", "server"]
DocumentEcho = Literal["object", "string"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["human", "json"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens, who may use it, and how much one request may contain."""

    model: Annotated[
        tuple[str, ...],
        Parameter(group=MODEL,
                  help="Hub id, alias (qwen3-reranker-0.6b|4b|8b), local folder or bundle, or NAME=one of them. May be "
                       "repeated (its variable holds one); the first is the default of requests. Default: the built-in "
                       "local-rerank-nano.", env_var_split=lambda _, text, **__: [text]),
    ] = ()  # fmt: skip
    config: Annotated[
        Path | None,
        Parameter(group=MODELS, help="TOML file of options, with a section for each model (docs/several-models.md)."),
    ] = None
    keep_alive: Annotated[
        str | None,
        Parameter(group=MODELS,
                  help="Unload a model after that time without a request, such as 90s, 10m or 1h, or never. Default: "
                       "10m with several models, never with one."),
    ] = None  # fmt: skip
    max_model_bytes: Annotated[int | None, Parameter(group=MODELS, help="Maximum bytes of all loaded models.")] = None
    host: Annotated[str, Parameter(group=ADDRESS, help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Parameter(group=ADDRESS, help="Port to listen on; 0 picks a free one.")] = 8000
    uds: Annotated[
        Path | None, Parameter(group=PROXIES, help="Listen on this Unix socket instead of host and port.")
    ] = None
    root_path: Annotated[
        str, Parameter(group=PROXIES, help="Path prefix under which a reverse proxy publishes the server.")
    ] = ""
    ssl_certfile: Annotated[
        Path | None, Parameter(group=PROXIES, help="TLS certificate (PEM); needs --ssl-keyfile.")
    ] = None
    ssl_keyfile: Annotated[
        Path | None, Parameter(group=PROXIES, help="TLS private key (PEM); needs --ssl-certfile.")
    ] = None
    api_key: Annotated[
        tuple[str, ...],
        Parameter(group=ADDRESS,
                  help="API key that clients send as `Authorization: Bearer KEY`; all of the value is the key. May be "
                       "repeated. Other users of the machine can see it in the process list.",
                  allow_leading_hyphen=True),
    ] = field(default=(), repr=False)  # fmt: skip
    api_key_file: Annotated[
        Path | None,
        Parameter(group=ADDRESS,
                  help="File of API keys: `NAME:KEY` lines, split at the first colon (# starts a comment line), or a "
                       "single key without a colon. The name is in the log."),
    ] = None  # fmt: skip
    insecure: Annotated[
        bool, Parameter(group=ADDRESS, help="Allow listening on a public address without an API key.", negative="")
    ] = False  # fmt: skip
    key_requests_per_minute: Annotated[
        int | None,
        Parameter(group=LIMITS, help="Requests per minute of each API key; without keys, of all clients together."),
    ] = None
    key_tokens_per_minute: Annotated[
        int | None,
        Parameter(group=LIMITS, help="Tokens per minute of each API key; without keys, of all clients together."),
    ] = None
    cors_origins: Annotated[
        tuple[str, ...],
        Parameter(group=PROXIES, help="Origin whose web pages may call this server, or * for all. May be repeated."),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        Parameter(group=PROXIES,
                  help="Name under which clients reach this server besides localhost and IP addresses; *.NAME for all "
                       "names below one, * for all. May be repeated. Other names get 421; by default that holds "
                       "only on loopback without a key."),
    ] = ()  # fmt: skip
    max_body_bytes: Annotated[
        int,
        Parameter(
            group=LIMITS,
            help="Maximum bytes of a request body; larger ones get 413. All bodies may total 8 times that.",
        ),
    ] = 64 * 1024 * 1024
    max_queued_requests: Annotated[
        int, Parameter(group=LIMITS, help="Maximum requests in flight, queued or running; further requests get 429.")
    ] = 2048
    client_timeout_seconds: Annotated[
        int,
        Parameter(group=LIMITS,
                  help="Seconds a client has for sending the request head, for sending the body, and for reading any "
                       "part of the response; then it gets 408 or the connection is closed."),
    ] = 60  # fmt: skip
    request_timeout_ms: Annotated[
        int,
        Parameter(group=LIMITS, help="Milliseconds a request may take; the header X-Request-Timeout-Ms can lower it."),
    ] = 55_000  # many clients give up after 60 s; before that, the answer says why
    drain_seconds: Annotated[
        int, Parameter(group=LIMITS, help="Seconds that accepted requests have to finish after SIGTERM or Ctrl-C.")
    ] = 30
    max_documents: Annotated[
        int,
        Parameter(
            group=LIMITS, help="Maximum documents of a request; --dashscope-limits has those of the DashScope routes."
        ),
    ] = 1000
    max_request_tokens: Annotated[
        int,
        Parameter(
            group=LIMITS,
            help="Maximum tokens of a request after truncation: query tokens x documents + document tokens.",
        ),
    ] = 500_000
    max_document_chunks: Annotated[int, Parameter(group=LIMITS, help="Maximum chunks of a long document.")] = 256
    max_request_chunks: Annotated[int, Parameter(group=LIMITS, help="Maximum chunks of a request.")] = 10_000
    dashscope_limits: Annotated[
        DashScopeLimits,
        Parameter(group=APIS,
                  help="Limits on the DashScope routes: those of the hosted service (500 documents, 300,000 "
                       "characters each, 120,000 tokens), or the server's own."),
    ] = "hosted"  # fmt: skip
    dashscope_instruction: Annotated[
        str, Parameter(group=APIS, help="Default instruction on the DashScope routes, used when a request has none.")
    ] = HOSTED_INSTRUCTION
    model_aliases: Annotated[
        tuple[str, ...],
        Parameter(group=APIS,
                  help="Model name that the DashScope routes accept besides the first model's own. May be repeated; "
                       "replaces the default names."),
    ] = DASHSCOPE_MODELS  # fmt: skip
    strict: Annotated[
        bool, Parameter(group=APIS, help="Answer 400 to an empty document, as the hosted service does.", negative="")
    ] = False  # fmt: skip
    strict_models: Annotated[
        bool, Parameter(group=APIS, help="Answer 404 to an unknown model name on every route.", negative="")
    ] = False  # fmt: skip
    document_echo: Annotated[
        DocumentEcho,
        Parameter(group=APIS,
                  help="How /rerank and /v1/rerank return a document: as an object with its text or, for clients of "
                       "Qianfan and Zhipu and LiteLLM's infinity/, as a string."),
    ] = "object"  # fmt: skip
    no_self_test: Annotated[
        bool, Parameter(group=ENGINE,
                        help="Skip the self-test at start, which compares scores with known ones.", negative="")
    ] = False  # fmt: skip
    ray: Annotated[
        bool,
        Parameter(group=ENGINE,
                  help="Run the engines as Ray Serve replicas, on this machine or on the cluster at RAY_ADDRESS.",
                  negative=""),
    ] = False  # fmt: skip
    replicas: Annotated[
        str,
        Parameter(group=ENGINE,
                  help="Number of engines of each model with --ray: a number, a range such as 1-8 that scales with the "
                       "queue, or auto, which scales from one up to the size of the cluster, one per GPU."),
    ] = "auto"  # fmt: skip
    log_level: Annotated[LogLevel, Parameter(group=LOGS, help="Lowest severity to log.")] = "info"
    log_format: Annotated[LogFormat, Parameter(group=LOGS, help="Log plain lines, or one JSON object per line.")] = (
        "human"
    )
    no_access_log: Annotated[bool, Parameter(group=LOGS, help="Do not log a line per request.", negative="")] = False
    log_texts: Annotated[
        bool, Parameter(group=LOGS,
                        help="Log queries and documents; by default no text of a request is logged.", negative="")
    ] = False  # fmt: skip
    otlp_endpoint: Annotated[
        str | None,
        Parameter(group=LOGS,
                  help="URL of an OpenTelemetry collector (OTLP over HTTP) that receives a span per request, such as "
                       "http://localhost:4318/v1/traces; needs local-rerank[otel]."),
    ] = None  # fmt: skip

    def __post_init__(self) -> None:
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"{name} is {value}; it must be at least {minimum}")
        seconds_of(self.keep_alive, several=False)
        for name, maximum in _MAXIMUM.items():
            if (value := getattr(self, name)) > maximum:
                raise ConfigError(f"{name} is {value}; it must be at most {maximum}")
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path is {self.root_path!r}; it must start with /")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("only one of ssl_certfile and ssl_keyfile is set; set both or neither")
        if not self.ray and self.replicas != "auto":
            raise ConfigError(f"replicas is {self.replicas!r}, which needs --ray")
        ReplicaRange.parse(self.replicas)
        if self.ray and (self.keep_alive or self.max_model_bytes):
            raise ConfigError("ray keeps every model loaded; leave out keep_alive and max_model_bytes")
        if not isinstance(self.api_key, tuple):  # a text would be a key per character
            raise ConfigError("api_key must be a tuple of texts")
        if any(not key.strip() for key in self.api_key):
            raise ConfigError("api_key is empty; leave it out to serve without a key")
        for origin in self.cors_origins:
            if not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"cors_origins is {origin!r}; an origin is SCHEME://HOST or SCHEME://HOST:PORT in lower case, such "
                    "as https://a.example, and * means all"
                )
        for name in self.allowed_hosts:
            if not HOST_NAME.fullmatch(name):
                raise ConfigError(
                    f"allowed_hosts is {name!r}; give a name without scheme and port, such as rerank.example, *.NAME "
                    "for all names below one, or * for all"
                )
        if not (self.has_keys or self.insecure or self.uds or is_loopback(self.host)):
            raise ConfigError(
                f"host {self.host} can be reached from other machines and no api_key is set; "
                "set --api-key-file or --api-key, or allow this with --insecure"
            )

    def check_scores(self, engine: EngineConfig) -> None:
        """Raise ConfigError if requests without an instruction could have no probability, but scores are to be one."""
        if engine.scores == "model" or engine.calibration is None:
            return
        fitted_with = read_calibration(Path(engine.calibration)).instruction
        if fitted_with not in (None, self.dashscope_instruction):
            raise ConfigError(
                "scores is calibrated, but the default instruction of the DashScope routes is not the calibration's; "
                f"set --dashscope-instruction {shlex.quote(fitted_with)}"
            )

    @property
    def prefix(self) -> str:
        """The root path without a slash at its end."""
        return self.root_path.rstrip("/")

    @property
    def has_keys(self) -> bool:
        """Whether clients must send an API key."""
        return bool(self.api_key) or self.api_key_file is not None

    @property
    def replica_range(self) -> ReplicaRange:
        return ReplicaRange.parse(self.replicas)

    @property
    def max_total_body_bytes(self) -> int:
        """Maximum bytes of all request bodies in memory; a request beyond that gets 429."""
        return BODIES_HELD * self.max_body_bytes

    @cached_property
    def limits(self) -> Limits:
        """Limits of one request on every route but DashScope's."""
        return Limits(
            max_documents=self.max_documents,
            max_query_chars=MAX_QUERY_CHARS,
            max_instruction_chars=MAX_INSTRUCTION_CHARS,
            max_document_chars=MAX_DOCUMENT_CHARS,
            max_request_tokens=self.max_request_tokens,
            max_document_chunks=self.max_document_chunks,
            max_request_chunks=self.max_request_chunks,
            allow_empty_documents=not self.strict,
        )

    @cached_property
    def dashscope_route_limits(self) -> Limits:
        """Limits of one request on the DashScope routes."""
        if self.dashscope_limits == "server":
            return self.limits
        return replace(self.limits, max_documents=500, max_document_chars=300_000, max_request_tokens=120_000)


_AT_LEAST_1 = (
    *("max_model_bytes", "key_requests_per_minute", "key_tokens_per_minute", "max_body_bytes", "max_queued_requests"),
    *("client_timeout_seconds", "request_timeout_ms", "max_documents", "max_request_tokens", "max_document_chunks"),
    "max_request_chunks",
)
_MINIMUM = {"port": 0, "drain_seconds": 0} | dict.fromkeys(_AT_LEAST_1, 1)
_MAXIMUM = {"port": 65535, "max_documents": MAX_DOCUMENTS}


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host == "localhost"
