"""What `GET /limits` answers: every limit that a client can run into, with its value here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from local_rerank.requests.tokenization import MAX_INSTRUCTION_TOKENS
from local_rerank.types import Limits

if TYPE_CHECKING:
    from local_rerank_server.state import ServerState


class RequestLimits(TypedDict):
    """Of one request; over them it is refused."""

    max_documents: int | None
    max_query_chars: int | None
    max_instruction_chars: int | None
    max_document_chars: int | None
    max_request_tokens: int | None
    allow_empty_documents: bool


class TextLimits(TypedDict):
    """In tokens. Queries and documents are cut to theirs; a longer instruction is refused."""

    max_query_tokens: int
    max_document_tokens: int
    max_instruction_tokens: int
    max_prompt_tokens: int


class AllLimits(TypedDict):
    dashscope: RequestLimits
    other_routes: RequestLimits
    texts: TextLimits
    max_body_bytes: int
    max_total_body_bytes: int
    max_queued_tokens: int
    max_queued_requests: int
    request_timeout_ms: int
    header_timeout_seconds: int
    body_timeout_seconds: int
    write_timeout_seconds: int
    key_requests_per_minute: int | None
    key_tokens_per_minute: int | None


def all_limits(state: ServerState) -> AllLimits:
    """Raises ModelUnavailable while the model loads: its maximum is not known yet."""
    config, engine = state.config, state.reranker.config
    return AllLimits(
        dashscope=_of(config.dashscope_limits),
        other_routes=_of(config.limits),
        texts=TextLimits(
            max_query_tokens=engine.max_query_tokens,
            max_document_tokens=engine.max_document_tokens,
            max_instruction_tokens=MAX_INSTRUCTION_TOKENS,
            max_prompt_tokens=state.reranker.info.max_length,
        ),
        max_body_bytes=config.max_body_bytes,
        max_total_body_bytes=config.max_total_body_bytes,
        max_queued_tokens=engine.max_queued_tokens,
        max_queued_requests=config.max_queued_requests,
        request_timeout_ms=config.request_timeout_ms,
        header_timeout_seconds=config.header_timeout_seconds,
        body_timeout_seconds=config.body_timeout_seconds,
        write_timeout_seconds=config.write_timeout_seconds,
        key_requests_per_minute=config.key_requests_per_minute,
        key_tokens_per_minute=config.key_tokens_per_minute,
    )


def _of(limits: Limits) -> RequestLimits:
    return RequestLimits(
        max_documents=limits.max_documents,
        max_query_chars=limits.max_query_chars,
        max_instruction_chars=limits.max_instruction_chars,
        max_document_chars=limits.max_document_chars,
        max_request_tokens=limits.max_request_tokens,
        allow_empty_documents=limits.allow_empty_documents,
    )
