"""Bodies are parsed and responses written as by Python's json module, in less time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_rerank_server.dialects._json import JsonResponse, parse_json
from local_rerank_server.errors import MalformedBody

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ODD = ["-0", "-0.0", "1e5", "0." + "1" * 400, "1e-400", '{"a": 1, "a": 2}', '"\\ud83d\\ude00 \\/ \\ud800"', "\ufeff[1]"]
WRONG = [*"01 1. .5 NaN -Infinity [1,] {'a':1} tru".split(), '"\t"', "", "[1] x", "[" * 9999 + "]" * 9999]


def exactly(value: Any) -> str:
    """Distinguishes 1 from 1.0 and from True, and 0.0 from -0.0."""
    return repr(value)


@given(value=values, ascii_only=st.booleans())
def test_what_the_json_module_writes_is_read_as_it_was(value: Any, ascii_only: bool) -> None:
    assert exactly(parse_json(json.dumps(value, ensure_ascii=ascii_only).encode())) == exactly(value)
    assert exactly(json.loads(JsonResponse(value).body)) == exactly(value)


@pytest.mark.parametrize("text", ODD)
def test_odd_json_is_read_as_by_the_json_module(text: str) -> None:
    assert exactly(parse_json(text.encode())) == exactly(json.loads(text.removeprefix("\ufeff")))


@pytest.mark.parametrize("text", WRONG)
def test_what_the_json_module_or_the_standard_refuses_is_malformed(text: str) -> None:
    with pytest.raises(MalformedBody):
        parse_json(text.encode())
