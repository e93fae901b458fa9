"""Routing by queued tokens, without Ray."""

from __future__ import annotations

import pytest

from local_rerank import Reranker, RerankRequest
from local_rerank.requests.tokenization import num_batch_tokens
from local_rerank_server.ray_serve.routing import TokenLoad, estimate_tokens

ENGLISH = "Text reranking models are widely used in search engines to sort candidates by their relevance. "
CHINESE = "重排序模型在搜索引擎和推荐系统中被广泛用来按相关性对候选文档排序。"


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
@pytest.mark.parametrize("num_documents", [10, 100])
def test_the_estimate_is_within_half_and_twice_the_number_of_tokens(
    nano: Reranker, text: str, num_documents: int
) -> None:
    documents = tuple(f"{number} {text * (1 + number % 5)}" for number in range(num_documents))
    request = RerankRequest(query="which models?", documents=documents)
    exact = num_batch_tokens(nano.tokenizer.pairs(request).pairs)
    assert exact / 2 < estimate_tokens(request) < exact * 2


def test_a_long_request_counts_more_than_many_short_ones() -> None:
    load = TokenLoad()
    load.sent("a", "long", 10_000)
    for number in range(20):
        load.sent(min("ab", key=load.of), str(number), 100)
    assert (load.of("a"), load.of("b")) == (10_000, 2_000)


def test_answered_requests_no_longer_count() -> None:
    load = TokenLoad()
    load.sent("a", "1", 100)
    load.sent("a", "2", 50)
    load.answered("a", "1")
    assert load.of("a") == 50


def test_an_answer_reported_before_its_request_leaves_nothing_behind() -> None:
    load = TokenLoad()
    load.answered("a", "1")
    load.sent("a", "1", 100)
    assert load.of("a") == 0


def test_a_replica_that_is_gone_is_forgotten() -> None:
    load = TokenLoad()
    load.sent("a", "1", 100)
    load.sent("b", "2", 70)
    load.keep_only(["b"])
    assert (load.of("a"), load.of("b")) == (0, 70)
