"""Fixed workloads of realistic text, the same on every machine.

A text is a sequence of sentences, truncated at the word that reaches the target length in tokens of the model's own
tokenizer, so a workload has the same number of tokens for every model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from local_rerank.bench.sentences import SENTENCES
from local_rerank.types import RerankRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The number and lengths of requests; `concurrent` requests are sent at the same time."""

    name: str
    about: str
    query_tokens: int
    num_documents: int
    document_tokens: tuple[int, int]  # minimum and maximum, evenly spaced
    num_requests: int = 1
    concurrent: bool = False


WORKLOADS: dict[str, Workload] = {
    row.name: row
    for row in (
        Workload(name="titles", about="short titles", query_tokens=7, num_documents=64, document_tokens=(6, 16)),
        Workload(name="passages", about="short passages", query_tokens=15, num_documents=32, document_tokens=(40, 100)),
        Workload(name="chunks", about="chunks of pages", query_tokens=14, num_documents=12, document_tokens=(230, 470)),
        Workload(name="longquery", about="a long query", query_tokens=250, num_documents=32, document_tokens=(35, 85)),
        Workload(name="rag", about="mixed lengths", query_tokens=15, num_documents=100, document_tokens=(50, 500)),
        Workload(
            name="small", about="many small requests at once", query_tokens=12, num_documents=8,
            document_tokens=(40, 100), num_requests=64, concurrent=True,
        ),
    )
}  # fmt: skip


def make_requests(workload: Workload, count_tokens: Callable[[str], int]) -> list[RerankRequest]:
    """Build the requests of a workload."""
    generator = random.Random(f"{workload.name} 0")  # a fixed seed per workload
    low, high = workload.document_tokens
    number = workload.num_documents
    requests = []
    for _ in range(workload.num_requests):
        lengths = [round(low + (high - low) * i / max(1, number - 1)) for i in range(number)]
        generator.shuffle(lengths)
        requests.append(
            RerankRequest(
                query=_text(generator, workload.query_tokens, count_tokens),
                documents=tuple(_text(generator, length, count_tokens) for length in lengths),
            )
        )
    return requests


def _text(generator: random.Random, num_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """Join sentences up to the first word that reaches `num_tokens`."""
    words: list[str] = []
    while len(words) < num_tokens:  # a word is at least one token
        words += generator.choice(SENTENCES).split()
    few, enough = 1, num_tokens
    while few < enough:  # bisection: tokens increase with words
        middle = (few + enough) // 2
        if count_tokens(" ".join(words[:middle])) < num_tokens:
            few = middle + 1
        else:
            enough = middle
    return " ".join(words[:few])
