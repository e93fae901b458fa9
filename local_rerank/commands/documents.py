"""Read the documents of `rank` from a file or standard input: plain lines, JSON, CSV or TSV.

The suffix says which, in any case and before a suffix of compression. Input without such a suffix is JSON if it starts
with an object or with `["` or `[{`, or if every line is a JSON string. Otherwise each line is a document.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from local_rerank.errors import InvalidRequest
from local_rerank.text_files import has_nul, lines, name_of, suffix_of

TEXT_KEYS = ("text", "document")  # of a JSON object, or the columns of a table
DELIMITERS = ",;\t"  # a CSV file has the one that is most frequent in its head
MAX_CELL_CHARS = 2**31 - 1  # instead of Python's 131,072
HOW_TO_GIVE = "give them as arguments, with --file or on standard input"
MAX_SHOWN_CHARS = 200  # of a table's head in an error
_ARRAY_START = re.compile(r'\[\s*["{]')
_WHITESPACE = re.compile(r"\s*")
_decoder = json.JSONDecoder()

Lines = list[tuple[int, str]]
"""Number and text of each line."""


def read_documents(file: Path | None) -> list[str]:
    """Read documents from a file, or from standard input for None and "-". Raises InvalidRequest."""
    file = None if file == Path("-") else file
    if file is None and sys.stdin.isatty():
        raise InvalidRequest(f"there are no documents; {HOW_TO_GIVE}", field="documents")
    numbered, name = list(lines(file, "file")), name_of(file)
    for number, line in numbered:
        if "\0" in line:
            raise _invalid(has_nul(f"{name}:{number}"))
    documents = _FORMS.get("" if file is None else suffix_of(file), _by_content)(numbered, name)
    if not documents:
        raise InvalidRequest(f"{name} has no documents; {HOW_TO_GIVE}", field="documents")
    return documents


def _by_content(numbered: Lines, name: str) -> list[str]:
    filled = [line for _, line in numbered if line.strip()]
    text = "\n".join(filled).lstrip()
    if _ARRAY_START.match(text) or _starts_with_object(text) or all(map(_is_json_string, filled)):
        return _json(numbered, name)
    return filled


def _starts_with_object(text: str) -> bool:
    try:
        return isinstance(_decoder.raw_decode(text)[0], dict)
    except (ValueError, RecursionError):
        return False


def _is_json_string(line: str) -> bool:
    try:
        return isinstance(json.loads(line), str)
    except (ValueError, RecursionError):
        return False


def _json(numbered: Lines, name: str) -> list[str]:
    """JSON lines, values over several lines as jq prints them, or one array."""
    values = list(_json_values("\n".join(line for _, line in numbered), name))
    if len(values) == 1 and isinstance(values[0][1], list):
        return [_text_of(value, f"{name}, element {place}") for place, value in enumerate(values[0][1], 1)]
    return [_text_of(value, f"{name}:{number}") for number, value in values]


def _json_values(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """Each JSON value, with the number of the line where it starts."""
    number, counted, start = 1, 0, _end_of_space(text, 0)
    while start < len(text):
        number, counted = number + text.count("\n", counted, start), start
        try:
            value, end = _decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _invalid(f"{name}:{error.lineno} is not JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # a number of too many digits, or too many brackets
            raise _invalid(f"{name}:{number} is not JSON that can be read: {error}") from error
        yield number, value
        start = _end_of_space(text, end)


def _end_of_space(text: str, start: int) -> int:
    found = _WHITESPACE.match(text, start)
    return start if found is None else found.end()


def _text_of(value: Any, where: str) -> str:
    texts = [value]
    if isinstance(value, dict):
        texts = [value[key] for key in TEXT_KEYS if value.get(key) is not None]
    if not texts or not isinstance(texts[0], str):
        raise _invalid(f"{where} must be a string or an object with text or document")
    return texts[0]


def _csv(numbered: Lines, name: str) -> list[str]:
    head = next((line for _, line in numbered if line.strip()), "")
    return _table(numbered, name, max(DELIMITERS, key=head.count))


def _tsv(numbered: Lines, name: str) -> list[str]:
    return _table(numbered, name, "\t")


def _table(numbered: Lines, name: str, delimiter: str) -> list[str]:
    """A column of a table that has a head. Cells in quotes may contain delimiters and line ends."""
    csv.field_size_limit(MAX_CELL_CHARS)
    rows = csv.reader((line + "\n" for _, line in numbered), delimiter=delimiter, strict=True)
    try:
        head = next(filter(None, rows), [])
        names = [column.strip().lower() for column in head]
        column = next((names.index(key) for key in TEXT_KEYS if key in names), None)
        if column is None:
            found = ", ".join(head)[:MAX_SHOWN_CHARS] or "none"
            raise _invalid(f"{name} must have a column text or document; its columns are: {found}")
        texts = []
        for row in filter(None, rows):
            if len(row) != len(head):
                raise _invalid(f"{name}:{rows.line_num} has {len(row)} columns; the head has {len(head)}")
            texts.append(row[column])
        return texts
    except csv.Error as error:
        raise _invalid(f"{name}:{rows.line_num} is not a table in CSV: {error}") from error


def _invalid(what: str) -> InvalidRequest:
    return InvalidRequest(what, field="file")


_FORMS: dict[str, Callable[[Lines, str], list[str]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}
