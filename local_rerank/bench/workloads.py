"""Fixed workloads of realistic text: the same requests for every model and every machine.

A text is a run of sentences, cut at the word that brings it to its number of tokens, as the model's own tokenizer
counts them: workloads hold equally many tokens for every tokenizer. Needs no torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from local_rerank.bench.sentences import SENTENCES
from local_rerank.types import RerankRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How many requests of how many texts of how many tokens; `concurrent` requests are sent at the same time."""

    name: str
    about: str
    query_tokens: int
    num_documents: int
    document_tokens: tuple[int, int]  # least and most, evenly spread
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


def make_requests(
    workload: Workload, count_tokens: Callable[[str], int], *, seed: int = 0, num_documents: int | None = None
) -> list[RerankRequest]:
    """The requests of a workload; `num_documents` overrides its own number."""
    generator = random.Random(f"{workload.name} {seed}")
    low, high = workload.document_tokens
    number = num_documents or workload.num_documents
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
    """Sentences up to the first word that brings them to `num_tokens` or more."""
    words: list[str] = []
    while len(words) < num_tokens:  # a word is at least one token
        words += _sentence(generator, SENTENCES)
    few, enough = 1, num_tokens
    while few < enough:  # the number of tokens grows with the words
        middle = (few + enough) // 2
        if count_tokens(" ".join(words[:middle])) < num_tokens:
            few = middle + 1
        else:
            enough = middle
    return " ".join(words[:few])


def _sentence(generator: random.Random, sentences: Sequence[str]) -> list[str]:
    return generator.choice(sentences).split()
