"""Field types that forgive what real clients send: every dialect's request model is built from these.

Null stands for absent in every optional field, unknown keys of any type are ignored, and lone surrogates, which no
UTF-8 text can hold, become U+FFFD. What is still wrong is named by its field.
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

from local_rerank_server.config import MOST_DOCUMENTS

NOT_TEXT_ERROR = "not_text"
"""The type of the validation error for an image or a video; its context says which."""

MOST_FIELD_NAMES = 100  # each is looked for in each document
_NOT_TEXT = ("image", "image_url", "video", "video_url", "audio")


class RequestBody(BaseModel):
    """A JSON object; keys that are not declared are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class TextObject(TypedDict):
    """A text as some clients wrap it."""

    text: str


def _well_formed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        value.encode()
    except UnicodeEncodeError:  # UTF-16 joins the halves that belong together and replaces those that do not
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
    """It may be sent back, so every string in it must be one that UTF-8 holds."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise PydanticCustomError("document_type", "Input is nested too deeply") from None
    except ValueError:  # 1e999, which Python reads as infinity
        raise PydanticCustomError("document_type", "Input holds a number that no answer could") from None
    mended = _well_formed(written)
    return value if mended is written else dict(json.loads(mended))


def _refuse_images(value: dict[str, Any]) -> None:
    for kind in _NOT_TEXT:
        if value.get(kind) is not None:
            raise PydanticCustomError(NOT_TEXT_ERROR, "{kind} input is not supported", {"kind": kind})


def _at_most(limit: int) -> BeforeValidator:
    """Before each item is looked at: a million empty texts would hold up every other request."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) > limit:
            what = "List should have at most {limit} items, not {length}"
            raise PydanticCustomError("too_many", what, {"limit": limit, "length": len(value)})
        return value

    return BeforeValidator(check)


def _in_a_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


def _flag_of(value: Any) -> Any:
    words = {"true": True, "false": False}
    return words.get(value.strip().lower(), value) if isinstance(value, str) else value


def _object_or_nothing(value: Any) -> Any:
    return value if isinstance(value, dict) else None


class _FailFast(FailFast):
    """One wrong item ends the validation; with a hash, which a union with None asks for."""

    __hash__ = object.__hash__


String = Annotated[StrictStr, BeforeValidator(_well_formed, json_schema_input_type=str)]
"""A string as it is meant: a name, an instruction."""

Text = Annotated[StrictStr, BeforeValidator(_text_of, json_schema_input_type=str | TextObject)]
"""A query or a document: a string, or an object with a `text`. An image or a video is refused by name."""

Texts = Annotated[list[Text], _FailFast(), _at_most(MOST_DOCUMENTS)]
"""Documents. One that is wrong ends the validation: a million error records would hold up every other request."""

OneOrMore = Annotated[Texts, BeforeValidator(_in_a_list)]
"""Texts; one alone is a list of one."""

Document = Annotated[str | dict[str, Any], PlainValidator(_document_of, json_schema_input_type=str | dict[str, Any])]
"""A document that may be an object of several fields, which is sent back as it came; `_options.texts_of` reads it."""

Documents = Annotated[list[Document], _FailFast(), _at_most(MOST_DOCUMENTS), BeforeValidator(_in_a_list)]
"""Such documents; one text alone is a list of one, as vLLM has it."""

FieldNames = Annotated[list[String], _FailFast(), _at_most(MOST_FIELD_NAMES)]
"""Which fields of document objects are ranked."""

Flag = Annotated[StrictBool, BeforeValidator(_flag_of, json_schema_input_type=bool | Literal["true", "false"])]
"""A boolean, or its word: at least one client sends "true"."""

Count = StrictInt
"""An integer; a boolean, a float or a digit string is none."""

CountOrAll = Annotated[StrictInt, Ge(0)]
"""How many, or up to how many; 0 is the same as leaving it out."""

IgnoredUnlessObject = BeforeValidator(_object_or_nothing)
"""Marks an optional object that clients send in other types without meaning anything by it."""
