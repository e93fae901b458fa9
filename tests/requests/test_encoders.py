"""fastokens serves where it gives the ids of tokenizers, and tokenizers serves where it does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import local_rerank
from local_rerank.requests.encoders import check_texts, choose, with_fastokens, with_tokenizers
from local_rerank.requests.pair import to_ids
from tests.tiny_checkpoints import byte_tokenizer_json

NANO = Path(local_rerank.__file__).parent / "nano" / "tokenizer.json"


def test_texts_of_a_batch_have_the_ids_that_tokenizers_gives_each_alone() -> None:
    tokenizer = Tokenizer.from_str(byte_tokenizer_json())
    texts = ["a b", "", "yes, é 中 \x00"]
    expected = [tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    for encode in (with_fastokens(byte_tokenizer_json()), with_tokenizers(tokenizer)):
        assert encode is not None
        for batch in (texts, texts[2:], texts[:0]):
            assert [to_ids(ids) for ids in encode(batch)] == expected[len(texts) - len(batch) :]


def test_one_different_text_is_enough_for_tokenizers_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    exact = with_tokenizers(Tokenizer.from_str(json.dumps(json.loads(byte_tokenizer_json()) | {"added_tokens": []})))
    same, other = with_fastokens(byte_tokenizer_json()), with_tokenizers(Tokenizer.from_file(str(NANO)))
    assert same is not None
    assert choose(same, exact) is same
    assert choose(lambda texts: [*same(texts[:-1]), *other(texts[-1:])], exact) is exact
    assert len(caplog.messages) == 1
    assert f"for 1 of {len(list(check_texts()))} texts" in caplog.text


@pytest.mark.parametrize("tokenizer_json", ["{}", '{"model": {"type": "BPE"}}', NANO.read_text(encoding="utf-8")])
def test_what_fastokens_cannot_read_is_left_to_tokenizers(tokenizer_json: str) -> None:
    assert with_fastokens(tokenizer_json) is None


def test_without_a_wheel_of_fastokens_tokenizers_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert with_fastokens(byte_tokenizer_json()) is None
