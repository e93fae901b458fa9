"""Lenient field types for the request models of all dialects.

Null means absent in every optional field, unknown keys are ignored, and lone surrogates, which UTF-8 cannot encode,
become U+FFFD. Any other invalid value is an error that names its field.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar, get_args

from annotated_types import Ge
from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    PlainValidator,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from local_rerank.types import Truncation
from local_rerank_server.config import MAX_DOCUMENTS

NOT_TEXT_ERROR = "not_text"
"""The type of the validation error for an image, video or audio; its context has the kind and its place."""

MAX_NAME_CHARS = 40  # of an option
MAX_FIELD_NAMES = 100  # each one is looked up in each document
_WHOLE = re.compile(r"([+-]?[0-9]{1,20})(\.0*)?")
_MEDIA = {
    "image": "images",
    "image_url": "images",
    "image_pil": "images",
    "image_embeds": "images",
    "input_image": "images",
    "video": "videos",
    "video_url": "videos",
    "audio": "audio",
    "audio_url": "audio",
    "audio_embeds": "audio",
    "input_audio": "audio",
}
"""The keys, and the types of content parts, under which clients of multimodal rerankers send what is not text."""

_DATA_URL = re.compile(r"data:(image|video|audio)/\S+")
_BASE64_IMAGE = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/]{40,}={0,2}")  # PNG, JPEG, GIF, WebP


class RequestBody(BaseModel):
    """A JSON object; undeclared keys are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


def snake_case(name: str) -> str:
    """The name of an option that was written in camelCase, PascalCase or capitals; what is longer is no option."""
    return name if len(name) > MAX_NAME_CHARS else re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


class TextObject(TypedDict):
    """A text in an object, as some clients send it."""

    text: str


class ContentPart(TypedDict):
    type: Literal["text"]
    text: str


class ContentObject(TypedDict):
    """A text in parts, as vLLM's clients send it."""

    content: str | list[ContentPart]


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
        value = _text_in(value)
    elif isinstance(value, str):
        _refuse_media_text(value)
    return _well_formed(value)


def _text_in(value: dict[str, Any]) -> Any:
    """The text of an object: its `text`, or its `content`, whose parts vLLM joins with line feeds; else the object."""
    _refuse_media(value)
    text, content = value.get("text"), value.get("content")
    if text is None and isinstance(content, list):
        return "\n".join(_text_of_part(part, f"content.{index}") for index, part in enumerate(content))
    key = "content" if text is None and isinstance(content, str) else "text"
    found = value.get(key, value)
    if isinstance(found, str):
        _refuse_media_text(found, key)
    return found


def _text_of_part(part: Any, at: str) -> str:
    text = part
    if isinstance(part, dict):
        _refuse_media(part, at)
        if isinstance(kind := part.get("type"), str) and kind in _MEDIA:
            _refuse(kind, at)
        text = part.get("text")
    if not isinstance(text, str):
        raise PydanticCustomError("content_part", "{at} should be a text part", {"at": at})
    _refuse_media_text(text, at)
    return text


def _document_of(value: Any) -> str | dict[str, Any]:
    if isinstance(value, dict):
        text = _text_in(value)
        in_parts = value.get("text") is None and isinstance(value.get("content"), list)
        return _well_formed_object(value | {"text": text} if in_parts else value)
    if isinstance(value, str):
        _refuse_media_text(value)
        text = _well_formed(value)
        return str(text)
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


def _refuse_media(value: dict[str, Any], at: str = "") -> None:
    for key in _MEDIA.keys() & value.keys():
        if value[key]:
            _refuse(key, f"{at}.{key}" if at else key)


def _refuse_media_text(text: str, at: str = "") -> None:
    """Refuse a text that is nothing but an encoded image, video or audio."""
    if found := _DATA_URL.fullmatch(text):
        _refuse(found[1], at)
    if _BASE64_IMAGE.fullmatch(text):
        _refuse("image", at)


def _refuse(key: str, at: str) -> None:
    raise PydanticCustomError(NOT_TEXT_ERROR, "{kind} not supported", {"kind": _MEDIA[key], "at": at})


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


def _whole_number(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (written := _WHOLE.fullmatch(value.strip())):
        return int(written[1])
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise PydanticCustomError("whole_number", "a whole number is expected")


def _truncation_of(value: Any) -> Any:
    words = {"true": "end", "right": "end", "false": "error", "none": "error", "left": "start"}
    word = str(value).strip().lower() if isinstance(value, bool | str) else ""
    if (given := words.get(word, word)) in get_args(Truncation):
        return given
    raise PydanticCustomError("truncation", "one of true, false, start, end and error is expected")


def _lower_case(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _refuse_unless_off(value: Any) -> None:
    if value not in (None, False, 0, "", [], {}):
        raise PydanticCustomError("unsupported", "it has no effect here; leave it out or send null")


def _string_or_none(value: Any) -> Any:
    return value if isinstance(value, str) else None


def _object_or_none(value: Any) -> Any:
    return value if isinstance(value, dict) else None


class _FailFast(FailFast):
    """FailFast with a hash, which a union with None needs."""

    __hash__ = object.__hash__


String = Annotated[StrictStr, BeforeValidator(_well_formed, json_schema_input_type=str)]
"""A plain string, such as a name or an instruction."""

Text = Annotated[StrictStr, BeforeValidator(_text_of, json_schema_input_type=str | TextObject | ContentObject)]
"""A query or a document: a string, or an object with a `text` or `content`. Images, video and audio are refused."""

Item = TypeVar("Item")
Many = Annotated[list[Item], _FailFast(), _at_most(MAX_DOCUMENTS)]
"""Documents. The first invalid one ends validation, because collecting a million errors would block other requests."""

Texts = Many[Text]
"""Such texts."""

OneOrMore = Annotated[Texts, BeforeValidator(_in_a_list)]
"""Texts, or one text."""

Document = Annotated[str | dict[str, Any], PlainValidator(_document_of, json_schema_input_type=str | dict[str, Any])]
"""A document: a string, or an object that the response repeats; `_options.texts_of` extracts its text."""

Documents = Annotated[Many[Document], BeforeValidator(_in_a_list)]
"""Such documents, or one document, which vLLM accepts too."""

FieldNames = Annotated[list[String], _FailFast(), _at_most(MAX_FIELD_NAMES), BeforeValidator(_in_a_list)]
"""The fields of document objects to rank, or one field."""

Flag = Annotated[StrictBool, BeforeValidator(_flag_of, json_schema_input_type=bool | Literal["true", "false"])]
"""A boolean, or "true" or "false", which at least one client sends."""

Count = Annotated[StrictInt, BeforeValidator(_whole_number, json_schema_input_type=int | str)]
"""A whole number, which may be written as "2" or 2.0; booleans and all else are refused."""

Number = Annotated[float, Strict(), AllowInfNan(False)]
"""A finite number."""

CountOrAll = Annotated[Count, Ge(0)]
"""A count or a limit; 0 means absent."""

Cut = Annotated[
    Truncation,
    PlainValidator(_truncation_of, json_schema_input_type=bool | Literal["start", "end", "error", "left", "right"]),
]
"""What to do with texts that are too long: true or "end" cuts their end, "start" their start, else they are refused."""

Side = Annotated[
    Literal["left", "right"],
    BeforeValidator(_lower_case, json_schema_input_type=Literal["left", "Left", "right", "Right"]),
]
"""The end of a long text that is cut off."""

Unsupported = Annotated[None, PlainValidator(_refuse_unless_off, json_schema_input_type=Literal[False] | None)]
"""An option that has no effect here, refused unless it is null or switched off."""

IgnoredUnlessObject = BeforeValidator(_object_or_none)
"""Treats values of other types as absent, because some clients send meaningless ones."""

IgnoredUnlessString = BeforeValidator(_string_or_none)
"""The same for strings."""
