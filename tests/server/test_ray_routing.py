"""Routing by queued tokens, without Ray."""

from __future__ import annotations

import pytest

from local_rerank import Reranker, RerankRequest
from local_rerank.requests.pair import num_batch_tokens
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


def test_answered_requests_and_gone_replicas_no_longer_count() -> None:
    load = TokenLoad()
    for replica, request, num_tokens in (("a", "1", 100), ("a", "2", 50), ("b", "3", 70), ("c", "4", 20)):
        load.sent(replica, request, num_tokens)
    load.answered("a", "1")
    load.answered("b", "early")
    load.sent("b", "early", 1000)
    load.keep_only(["a", "b"])
    assert [load.of(replica) for replica in "abc"] == [50, 70, 0]
