"""The model card's prompt of a known pair, and ways in which programs build it wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from local_rerank.checkpoints.known_scores import KnownPair
from local_rerank.requests.prompts import PromptTemplate

Fault = Literal[
    "no template",
    "wrong last token",
    "empty query and document",
    "other prompt",
    "missing head rows",
    "wrong dtype",
    "wrong attention kernel",
    "no reranker",
    "other scores",
]


def prompt_of(template: PromptTemplate, pair: KnownPair) -> str:
    return template.prefix + _body(template, pair) + template.suffix


def _body(template: PromptTemplate, pair: KnownPair) -> str:
    return template.shared_body(pair.instruction, pair.query) + " " + pair.document


def _empty(template: PromptTemplate, pair: KnownPair) -> str:
    return template.prefix + template.shared_body(pair.instruction, "") + " " + template.suffix


WRONG_PROMPTS: dict[Fault, tuple[Callable[[PromptTemplate, KnownPair], str], ...]] = {
    "no template": (
        lambda template, pair: f"{pair.query} {pair.document}",
        lambda template, pair: f"{pair.query}{pair.document}",
        lambda template, pair: f"{pair.query}\n{pair.document}",
        _body,
    ),
    "wrong last token": (
        lambda template, pair: prompt_of(template, pair)[:-1],  # a template engine strips the last newline
        lambda template, pair: prompt_of(template, pair).rstrip("\n"),
        lambda template, pair: prompt_of(template, pair) + "\n",
        lambda template, pair: prompt_of(template, pair).partition("<think>")[0],  # no empty think block
        lambda template, pair: template.prefix + _body(template, pair),  # truncation removed the suffix
    ),
    "empty query and document": (_empty, lambda template, pair: _empty(template, pair).replace(" <|", "<|")),
}
"""Known ways to build the prompt wrongly; each gives different scores."""
