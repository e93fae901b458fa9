"""What every dialect but DashScope's shares: the options that clients send under several names, and what they mean.

Null, absent and, where a number is meant, 0 are the same. Where two names for one option are given, the first that is
named here counts.
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

CutTo = Annotated[CountOrAll | None, Field(description="Cut to this many tokens; 0 is the server's own limit.")]


class TemplateArguments(RequestBody):
    """vLLM's `chat_template_kwargs`."""

    instruction: String | None = None


class Options(RequestBody):
    """What any dialect may bring beside query and documents."""

    model: String | None = Field(default=None, description="Any name; it is sent back.")
    instruction: String | None = Field(default=None, description="What makes a document relevant, in one sentence.")
    instruct: String | None = Field(default=None, description="The same.")
    chat_template_kwargs: Annotated[TemplateArguments | None, IgnoredUnlessObject] = None
    max_tokens_per_query: CutTo = None
    max_tokens_per_doc: CutTo = None
    truncate_prompt_tokens: Annotated[StrictInt, Ge(-1)] | None = Field(
        default=None, description="Cut documents so that no prompt is longer than this; -1 is the model's own limit."
    )
    raw_scores: Flag | None = Field(default=None, description="Answer log-odds instead of scores between 0 and 1.")
    use_activation: Flag | None = Field(default=None, description="false: the same as raw_scores.")

    def given_instruction(self) -> str | None:
        """The first one that is not blank."""
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
    """The library's request; `top_n` 0 or None is all."""
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
    """The relevance score, or the log-odds where raw scores are asked for."""
    return item.log_odds if options.raw_scores or options.use_activation is False else item.relevance_score


def texts_of(
    documents: Sequence[str | dict[str, Any]], rank_fields: Sequence[str] | None = None, *, field: str = "documents"
) -> list[str]:
    """The text of each document: of an object its `text`, or what stands in `rank_fields`, a line for each.

    A name that stands there twice is taken once: a short body could ask for any amount of text else.
    """
    names = tuple(dict.fromkeys(rank_fields or ()))
    return [_text_of(document, names, f"{field}.{index}") for index, document in enumerate(documents)]


def _text_of(document: str | dict[str, Any], rank_fields: Sequence[str], place: str) -> str:
    if isinstance(document, str):
        return document
    if not rank_fields:
        text = document.get("text")
        if isinstance(text, str):
            return text
        raise InvalidField(place, "an object without rank_fields needs a text")
    given = [name for name in rank_fields if document.get(name) is not None]
    if not given:
        raise InvalidField(place, f"it has none of the {len(rank_fields)} rank_fields")
    return "\n".join(f"{name}: {document[name]}" for name in given)
