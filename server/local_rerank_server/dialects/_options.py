"""The options that all dialects but DashScope's share, under the names that their clients send.

Null means absent, and so does 0 for a number. If an option is sent under two names, the first one in the order of this
module wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import Field, StrictInt

from local_rerank.types import RankedDocument, RerankRequest, Truncation
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._field_types import CountOrAll, Flag, IgnoredUnlessObject, RequestBody, String, Text
from local_rerank_server.errors import InvalidField

CutTo = Annotated[CountOrAll | None, Field(description="Truncate to this many tokens; 0 means the server's limit.")]


class TemplateArguments(RequestBody):
    """vLLM's `chat_template_kwargs`."""

    instruction: String | None = None


class Options(RequestBody):
    """Fields that every dialect accepts besides query and documents."""

    model: String | None = Field(default=None, description="Any name; the response repeats it.")
    instruction: String | None = Field(default=None, description="What makes a document relevant, in one sentence.")
    instruct: String | None = Field(default=None, description="Alias of instruction.")
    chat_template_kwargs: Annotated[TemplateArguments | None, IgnoredUnlessObject] = None
    max_tokens_per_query: CutTo = None
    max_tokens_per_doc: CutTo = None
    truncate_prompt_tokens: Annotated[StrictInt, Ge(-1)] | None = Field(
        default=None, description="Truncate documents so that no prompt is longer; -1 means the model's limit."
    )
    raw_scores: Flag | None = Field(default=None, description="Return log-odds instead of scores between 0 and 1.")
    use_activation: Flag | None = Field(default=None, description="false means raw_scores.")

    def given_instruction(self) -> str | None:
        """The first instruction that is not blank."""
        template = self.chat_template_kwargs
        names = (self.instruction, self.instruct, template.instruction if template else None)
        return next((given for given in names if given and given.strip()), None)


class CommonRequest(Options):
    query: Text


def make_request(
    query: str,
    documents: Sequence[str],
    options: Options,
    config: ServerConfig,
    *,
    top_n: int | None = None,
    truncation: Truncation = "end",
) -> RerankRequest:
    """The library's request; `top_n` 0 or None means all documents."""
    prompt_tokens = options.truncate_prompt_tokens or 0
    return RerankRequest(
        query=query,
        documents=tuple(documents),
        instruction=options.given_instruction(),
        top_n=top_n or None,
        max_query_tokens=options.max_tokens_per_query or None,
        max_document_tokens=options.max_tokens_per_doc or None,
        max_prompt_tokens=prompt_tokens if prompt_tokens > 0 else None,
        truncation=truncation,
        limits=config.limits,
    )


def score_of(item: RankedDocument, options: Options) -> float:
    """The relevance score, or the log-odds if the request asks for raw scores."""
    return item.log_odds if options.raw_scores or options.use_activation is False else item.relevance_score


def as_object(document: str | dict[str, Any]) -> dict[str, Any]:
    """The document as it was sent, with a text in an object."""
    return document if isinstance(document, dict) else {"text": document}


def texts_of(
    documents: Sequence[str | dict[str, Any]], rank_fields: Sequence[str] | None = None, *, field: str = "documents"
) -> tuple[str, ...]:
    """The text of each document: an object's `text` or, with `rank_fields`, one line per field.

    Duplicates in `rank_fields` are ignored, because repeating a field could expand a short body without limit.
    """
    names = tuple(dict.fromkeys(rank_fields or ()))
    return tuple(_text_of(document, names, f"{field}.{index}") for index, document in enumerate(documents))


def _text_of(document: str | dict[str, Any], rank_fields: Sequence[str], field: str) -> str:
    if isinstance(document, str):
        return document
    if not rank_fields:
        text = document.get("text")
        if isinstance(text, str):
            return text
        raise InvalidField(field, "an object without rank_fields needs a text")
    given = [name for name in rank_fields if document.get(name) is not None]
    if not given:
        raise InvalidField(field, f"the object has none of the {len(rank_fields)} rank_fields")
    return "\n".join(f"{name}: {document[name]}" for name in given)
