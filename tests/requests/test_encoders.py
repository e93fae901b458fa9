"""fastokens serves where it gives the ids of tokenizers, and tokenizers serves where it does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers

import local_rerank
from local_rerank.requests.encoders import Encode, check_texts, checked, with_fastokens, with_tokenizers
from local_rerank.requests.pair import to_ids
from tests.tiny_checkpoints import byte_tokenizer_json

NANO = Path(local_rerank.__file__).parent / "nano" / "tokenizer.json"


@pytest.fixture
def by_bytes() -> Tokenizer:
    return Tokenizer.from_str(json.dumps(json.loads(byte_tokenizer_json()) | {"added_tokens": []}))


def test_texts_of_a_batch_have_the_ids_that_tokenizers_gives_each_alone(by_bytes: Tokenizer) -> None:
    texts = ["a b", "", "yes, é 中 \x00 <|im_end|>"]
    expected = [tuple(by_bytes.encode(text).ids) for text in texts]
    for encode in (with_fastokens(by_bytes), with_tokenizers(by_bytes)):
        assert encode is not None
        for batch in (texts, texts[2:], texts[:0]):
            assert [to_ids(ids) for ids in encode(batch)] == expected[len(texts) - len(batch) :]


def test_one_different_text_is_enough_for_tokenizers_and_a_line_in_the_log(
    by_bytes: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    exact, fast = with_tokenizers(by_bytes), with_fastokens(by_bytes)
    assert fast is not None
    assert checked(fast, exact) is fast
    assert checked(lambda texts: [*fast(texts[:-1]), fast(["another"])[0]], exact) is exact
    assert len(caplog.messages) == 1
    assert f"for 1 of {len(list(check_texts()))} texts" in caplog.text


def test_tokenizers_that_fastokens_does_not_know_are_left_to_tokenizers(by_bytes: Tokenizer) -> None:
    assert with_fastokens(Tokenizer.from_file(str(NANO))) is None, "WordPiece"
    assert with_fastokens(Tokenizer(models.Unigram([("a", 0.0)], 0))) is None
    by_bytes.normalizer = normalizers.BertNormalizer()
    assert with_fastokens(by_bytes) is None


def test_a_loaded_reranker_encodes_with_fastokens(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def recording(original: Tokenizer) -> Encode:
        fast = with_fastokens(original)
        assert fast is not None
        return lambda texts: (seen.extend(texts), fast(texts))[1]

    monkeypatch.setattr("local_rerank.requests.encoders.with_fastokens", recording)
    with local_rerank.Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32") as reranker:
        reranker.rank("a query", ["a document", "another"])
    assert seen[-2:] == [" a document", " another"]


def test_without_a_wheel_of_fastokens_tokenizers_serves(by_bytes: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert with_fastokens(by_bytes) is None
