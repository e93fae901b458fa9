"""Lenient field types for the request models of all dialects.

Null means absent in every optional field, unknown keys are ignored, and lone surrogates, which UTF-8 cannot encode,
become U+FFFD. Any other invalid value is an error that names its field.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from local_rerank_server.config import MAX_DOCUMENTS

NOT_TEXT_ERROR = "not_text"
"""The type of the validation error for an image, video or audio; its context has the kind."""

MAX_FIELD_NAMES = 100  # each one is looked up in each document
_NOT_TEXT = ("image", "image_url", "video", "video_url", "audio")


class RequestBody(BaseModel):
    """A JSON object; undeclared keys are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class TextObject(TypedDict):
    """A text in an object, as some clients send it."""

    text: str


def _well_formed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        value.encode()
    except UnicodeEncodeError:  # decoding UTF-16 joins surrogate pairs and replaces lone surrogates
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _text_of(value: Any) -> Any:
    if isinstance(value, dict):
        _refuse_images(value)
        value = value.get("text", value)
    return _well_formed(value)


def _document_of(value: Any) -> str | dict[str, Any]:
    if isinstance(value, dict):
        _refuse_images(value)
        return _well_formed_object(value)
    if isinstance(value, str):
        text: str = _well_formed(value)
        return text
    raise PydanticCustomError("document_type", "Input should be a string or an object with a text")


def _well_formed_object(value: dict[str, Any]) -> dict[str, Any]:
    """Make an object encodable as JSON in UTF-8, because the response may repeat it."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise PydanticCustomError("document_type", "Input is nested too deeply") from None
    except ValueError:  # 1e999, which Python parses as infinity
        raise PydanticCustomError("document_type", "Input contains a number that JSON cannot represent") from None
    well_formed = _well_formed(written)
    return value if well_formed is written else dict(json.loads(well_formed))


def _refuse_images(value: dict[str, Any]) -> None:
    for kind in _NOT_TEXT:
        if value.get(kind) is not None:
            raise PydanticCustomError(NOT_TEXT_ERROR, "{kind} input is not supported", {"kind": kind})


def _at_most(limit: int) -> BeforeValidator:
    """Check the length before the items, because validating a million texts would block other requests."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) > limit:
            message = "List should have at most {limit} items, not {length}"
            raise PydanticCustomError("too_many", message, {"limit": limit, "length": len(value)})
        return value

    return BeforeValidator(check)


def _in_a_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


def _flag_of(value: Any) -> Any:
    words = {"true": True, "false": False}
    return words.get(value.strip().lower(), value) if isinstance(value, str) else value


def _object_or_none(value: Any) -> Any:
    return value if isinstance(value, dict) else None


class _FailFast(FailFast):
    """FailFast with a hash, which a union with None needs."""

    __hash__ = object.__hash__


String = Annotated[StrictStr, BeforeValidator(_well_formed, json_schema_input_type=str)]
"""A plain string, such as a name or an instruction."""

Text = Annotated[StrictStr, BeforeValidator(_text_of, json_schema_input_type=str | TextObject)]
"""A query or a document: a string, or an object with a `text`. Images, video and audio are refused."""

Texts = Annotated[list[Text], _FailFast(), _at_most(MAX_DOCUMENTS)]
"""Documents. The first invalid one ends validation, because collecting a million errors would block other requests."""

OneOrMore = Annotated[Texts, BeforeValidator(_in_a_list)]
"""Texts, or one text."""

Document = Annotated[str | dict[str, Any], PlainValidator(_document_of, json_schema_input_type=str | dict[str, Any])]
"""A document: a string, or an object that the response repeats; `_options.texts_of` extracts its text."""

Documents = Annotated[list[Document], _FailFast(), _at_most(MAX_DOCUMENTS), BeforeValidator(_in_a_list)]
"""Such documents, or one document, which vLLM accepts too."""

FieldNames = Annotated[list[String], _FailFast(), _at_most(MAX_FIELD_NAMES)]
"""The fields of document objects to rank."""

Flag = Annotated[StrictBool, BeforeValidator(_flag_of, json_schema_input_type=bool | Literal["true", "false"])]
"""A boolean, or "true" or "false", which at least one client sends."""

Count = StrictInt
"""An integer; booleans, floats and strings are refused."""

CountOrAll = Annotated[StrictInt, Ge(0)]
"""A count or a limit; 0 means absent."""

IgnoredUnlessObject = BeforeValidator(_object_or_none)
"""Treats values of other types as absent, because some clients send meaningless ones."""
