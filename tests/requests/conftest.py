"""Qwen's tokenizer, which takes seconds to load."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from local_rerank.requests.tokenization import PairTokenizer
from tests.tiny_checkpoints import qwen_tokenizer_json


@pytest.fixture(scope="session")
def qwen_json() -> str:
    return qwen_tokenizer_json()


@pytest.fixture(scope="session")
def whole(qwen_json: str) -> Tokenizer:
    return Tokenizer.from_str(qwen_json)


@pytest.fixture(scope="session")
def qwen(qwen_json: str) -> PairTokenizer:
    from tests.requests.test_tokenization import make

    tokenizer = make(qwen_json)
    tokenizer.use_fastest()
    return tokenizer
