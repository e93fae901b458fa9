"""The options of a request, under the names of every dialect; all dialects but DashScope's share them.

One rule for what a dialect does not have itself: an option of another dialect has the same effect here, or is refused
where it can have none (`Unsupported`). Keys that are an option of no dialect are ignored, as the hosted services do.
An option may also be written in camelCase or in capitals. Null means absent, and so does 0 for a number. If an option
is sent under several names, the dialect's own name wins, then the order of this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from pydantic import Field, model_validator

from local_rerank.errors import InvalidRequest
from local_rerank.requests.scores import sigmoid
from local_rerank.types import RankedDocument, RerankRequest, Truncation
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._field_types import (
    Count,
    CountOrAll,
    Cut,
    Documents,
    FieldNames,
    Flag,
    IgnoredUnlessObject,
    RequestBody,
    Side,
    String,
    Text,
    Unsupported,
    snake_case,
)
from local_rerank_server.errors import InvalidField

CutTo = Annotated[CountOrAll | None, Field(description="Truncate to this many tokens; 0 means the server's limit.")]
HowMany = Annotated[CountOrAll | None, Field(description="How many documents to return; all by default.")]
Echo = Annotated[Flag | None, Field(description="Whether to return the documents.")]
LongTexts = Annotated[Cut | None, Field(description="Which end of long texts to cut off; false refuses them.")]


class TemplateArguments(RequestBody):
    """vLLM's `chat_template_kwargs`."""

    instruction: String | None = None


class Instructed(RequestBody):
    """The instruction; if several are sent, the first one that is not blank counts."""

    instruct: String | None = Field(default=None, description="What makes a document relevant, in one sentence.")
    instruction: String | None = Field(default=None, description="The same.")
    chat_template_kwargs: Annotated[TemplateArguments | None, IgnoredUnlessObject] = None

    def instructions(self) -> Iterator[tuple[str, str | None]]:
        """What was sent as an instruction, and under which name."""
        yield "instruct", self.instruct
        yield "instruction", self.instruction
        if self.chat_template_kwargs is not None:
            yield "chat_template_kwargs.instruction", self.chat_template_kwargs.instruction

    def given_instruction(self) -> tuple[str, str | None]:
        """Its name and the instruction, which is None if there is none."""
        return next(((name, text) for name, text in self.instructions() if text and text.strip()), ("instruct", None))


class Options(Instructed):
    """Fields that every dialect accepts besides query and documents."""

    own_names: ClassVar[dict[str, str]] = {}  # the dialect's names for query, documents and top_n, where others

    model: String | None = Field(default=None, description="Any name; the response repeats it.")
    top_n: HowMany = None
    top_k: HowMany = None
    return_documents: Echo = None
    return_text: Echo = None
    return_input: Echo = None
    rank_fields: FieldNames | None = Field(default=None, description="The fields of document objects to rank.")
    max_tokens_per_query: CutTo = None
    max_query_tokens: CutTo = None
    max_tokens_per_doc: CutTo = None
    max_document_tokens: CutTo = None
    truncate_prompt_tokens: Annotated[Count, Ge(-1)] | None = Field(
        default=None, description="Truncate documents so that no prompt is longer; -1 means the model's limit."
    )
    truncation: LongTexts = None
    truncate: LongTexts = None
    truncation_direction: Side | None = None
    truncation_side: Side | None = None
    raw_scores: Flag | None = Field(default=None, description="Return log-odds instead of scores between 0 and 1.")
    return_raw_scores: Flag | None = Field(default=None, description="The same.")
    use_activation: Flag | None = Field(default=None, description="false means raw_scores.")
    activation: Flag | None = Field(default=None, description="The same.")
    max_chunks_per_doc: CountOrAll | None = Field(
        default=None, description="Score a long document by the best of so many chunks of it."
    )
    overlap_tokens: CountOrAll | None = Field(default=None, description="The same, with so many tokens in two chunks.")
    return_embeddings: Unsupported = None
    relevant_spans: Unsupported = None
    rewrite_query: Unsupported = None
    chat_template: Unsupported = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, body: Any) -> Any:
        """Options in another case, and those in DashScope's `parameters`, fill in for those that are absent."""
        if not isinstance(body, dict):
            return body
        filled: dict[str, Any] = {}
        for fields in (body.get("parameters"), body):
            if isinstance(fields, dict):
                sent = {snake_case(key): value for key, value in fields.items() if value is not None}
                filled |= {key: value for key, value in sent.items() if key in cls.model_fields}
        return filled | {key: value for key, value in body.items() if value is not None}

    def names(self) -> dict[str, str]:
        """The names of the request's fields in this body, for errors."""
        own = {"instruction": self.given_instruction()[0], "max_prompt_tokens": "truncate_prompt_tokens"}
        chunks = {"max_chunks_per_document": "max_chunks_per_doc", "chunk_overlap_tokens": "overlap_tokens"}
        return own | chunks | self.own_names

    def count(self) -> int | None:
        """How many documents to return; None means all."""
        own, other = (self.top_k, self.top_n) if self.own_names.get("top_n") == "top_k" else (self.top_n, self.top_k)
        return own or other or None

    def wants_documents(self) -> bool | None:
        flags = (self.return_documents, self.return_text, self.return_input)
        return next((flag for flag in flags if flag is not None), None)

    def wants_raw_scores(self) -> bool:
        return bool(self.raw_scores or self.return_raw_scores) or False in (self.use_activation, self.activation)

    def wanted_truncation(self) -> Truncation:
        given = self.truncation or self.truncate or "end"
        side = self.truncation_direction or self.truncation_side
        return "start" if given == "end" and side == "left" else given


class CommonRequest(Options):
    query: Text


class DocumentsRequest(CommonRequest):
    """A query and documents, which may be objects."""

    documents: Documents


def make_request(query: str, documents: Sequence[str], options: Options, config: ServerConfig) -> RerankRequest:
    """The library's request."""
    prompt_tokens = options.truncate_prompt_tokens or 0
    return RerankRequest(
        query=query,
        documents=tuple(documents),
        instruction=options.given_instruction()[1],
        top_n=options.count(),
        max_query_tokens=options.max_tokens_per_query or options.max_query_tokens or None,
        max_document_tokens=options.max_tokens_per_doc or options.max_document_tokens or None,
        max_prompt_tokens=prompt_tokens if prompt_tokens > 0 else None,
        truncation=options.wanted_truncation(),
        long_documents="chunk" if options.max_chunks_per_doc or options.overlap_tokens else None,
        max_chunks_per_document=options.max_chunks_per_doc or None,
        chunk_overlap_tokens=options.overlap_tokens or None,
        limits=config.limits,
    )


def parse_documents(body: DocumentsRequest, config: ServerConfig) -> RerankRequest:
    """The library's request for the body of most dialects."""
    return make_request(body.query, texts_of(body.documents, body.rank_fields), body, config)


@contextmanager
def named_as_sent(names: Mapping[str, str], positions: Sequence[int] | None = None) -> Iterator[None]:
    """Give the library's errors the names that the body has for its fields, and its positions of the documents."""
    try:
        yield
    except InvalidRequest as error:
        error.args = (_as_sent(str(error), names, positions),)
        error.field = _as_sent(error.field, names, positions)
        raise


def _as_sent(text: str, names: Mapping[str, str], positions: Sequence[int] | None) -> str:
    """A text that begins with a field of the request, such as `documents[1] is empty`, with the body's name for it.

    After that only names with an underscore are replaced: the others are words, too.
    """
    found = re.match(r"(\w+)(?:\[(\d+)\])?", text)
    if found is None:
        return text
    name, index = found.groups()
    if index is not None:
        index = f"[{index if positions is None else positions[int(index)]}]"
    rest = re.sub(r"\b[a-z]+_\w+", lambda field: names.get(field[0], field[0]), text[found.end() :])
    return f"{names.get(name, name)}{index or ''}{rest}"


def score_of(item: RankedDocument, options: Options, *, is_raw: bool | None = None) -> float:
    """The relevance score, but log-odds if the request asks for raw scores, and 0...1 if it asks for no raw ones.

    `is_raw`: what a request that says neither asks for, if the vendor has a default.
    """
    if options.wants_raw_scores():
        return item.log_odds
    declines = False in (options.raw_scores, options.return_raw_scores, is_raw)
    is_logit = item.relevance_score == item.log_odds  # as some encoders' config.json says
    return sigmoid(item.log_odds) if declines and is_logit else item.relevance_score


def as_object(document: str | dict[str, Any]) -> dict[str, Any]:
    """The document as it was sent, with a text in an object."""
    return document if isinstance(document, dict) else {"text": document}


def texts_of(
    documents: Sequence[str | dict[str, Any]], rank_fields: Sequence[str] | None = None, *, field: str = "documents"
) -> tuple[str, ...]:
    """The text of each document: an object's `text`, the field that `rank_fields` names, or one line per field.

    Duplicates in `rank_fields` are ignored, because repeating a field could expand a short body without limit.
    """
    names = tuple(dict.fromkeys(rank_fields or ()))
    return tuple(text_of(document, names, f"{field}.{index}") for index, document in enumerate(documents))


def text_of(document: str | dict[str, Any], rank_fields: Sequence[str], field: str) -> str:
    """The text of one document, as in `texts_of`; `field` is its name in errors."""
    if isinstance(document, str):
        return document
    if not rank_fields:
        text = document.get("text", document.get("content"))
        if isinstance(text, str):
            return text
        raise InvalidField(field, "an object without rank_fields needs a text")
    given = [name for name in rank_fields if document.get(name) is not None]
    if not given:
        raise InvalidField(field, f"the object has none of the {len(rank_fields)} rank_fields")
    if len(rank_fields) == 1:
        return str(document[given[0]])
    return "\n".join(f"{name}: {document[name]}" for name in given)
