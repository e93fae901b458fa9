"""Prompts that clients render themselves: unwrapped where all parts match the template, else left as they are."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from local_rerank import Reranker, RerankRequest
from local_rerank.arguments import scores_of
from local_rerank.errors import EmptyQuery
from local_rerank.requests.tokenization import PairTokenizer
from tests.reference import INSTRUCTION, PREFIX, SUFFIX
from tests.requests.test_tokenization import NASTY_TEXTS, make
from tests.tiny_checkpoints import byte_tokenizer_json

QUERY, DOCUMENTS = "capital of France?", ("Paris is it", " Rome\n", "", "says <|im_end|> and <Document>: x")
PLAIN = RerankRequest(query=QUERY, documents=DOCUMENTS, instruction="Find a city")
NO_THINK = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> PairTokenizer:
    return make(byte_tokenizer_json())


def rendered(
    plain: RerankRequest = PLAIN, *, prefix: str = PREFIX, between: str = "\n", end: str = "\n", suffix: str = SUFFIX
) -> RerankRequest:
    """As vLLM's examples render it, or another way."""
    query = f"{prefix}<Instruct>: {plain.instruction}{between}<Query>: {plain.query}{end}"
    documents = tuple(f"<Document>: {document}{suffix}" for document in plain.documents)
    return replace(plain, query=query, documents=documents, instruction=None)


def all_ids(tokenizer: PairTokenizer, request: RerankRequest) -> list[tuple[int, ...]]:
    tokenized = tokenizer.pairs(request)
    pairs = [tokenized.pairs[place] for own in tokenized.pairs_of_document for place in own]
    return [(*pair.prefix_ids, *pair.document_ids) for pair in pairs]


@pytest.mark.parametrize(
    "request_",
    [
        rendered(),
        rendered(end=""),
        rendered(suffix=SUFFIX.rstrip()),
        rendered(suffix=SUFFIX + "\n"),
        rendered(suffix=NO_THINK),
        rendered(suffix=NO_THINK.rstrip()),
        rendered(between="\n\n", end="\n\n"),
        rendered(between="\n\n", end="\n"),
        rendered(prefix="\n" + PREFIX),
        rendered(prefix=PREFIX.rstrip() + "\n\n"),
        rendered(prefix=""),
        rendered(prefix="", suffix=""),
        rendered(prefix="", end="", suffix=""),
    ],
)
def test_a12_a_rendered_prompt_gives_the_tokens_of_the_plain_texts(
    tokenizer: PairTokenizer, request_: RerankRequest
) -> None:
    assert all_ids(tokenizer, request_) == all_ids(tokenizer, PLAIN)
    with_default = replace(request_, instruction="What the server or the request says")
    assert all_ids(tokenizer, with_default) == all_ids(tokenizer, PLAIN), "the instruction of the prompt wins"
    unwrapped, plain = tokenizer.pairs(request_), tokenizer.pairs(PLAIN)
    assert (unwrapped.unwrapped, plain.unwrapped) == (True, False)
    assert unwrapped.total_tokens == plain.total_tokens


@pytest.mark.parametrize("text", [text for text in NASTY_TEXTS if text.strip() and len(text) < 3000])
def test_a12_any_text_survives_the_template_to_the_bit(tokenizer: PairTokenizer, text: str) -> None:
    plain = RerankRequest(query=text, documents=(text, text + "\n", SUFFIX), instruction=INSTRUCTION)
    assert all_ids(tokenizer, rendered(plain)) == all_ids(tokenizer, plain)


@pytest.mark.parametrize(
    ("query", "documents", "warns"),
    [
        (rendered().query, DOCUMENTS, True),
        (QUERY, rendered().documents, True),
        (rendered().query, (*rendered().documents[:2], "plain"), True),
        (rendered().query, rendered(suffix="").documents, True),
        (rendered(prefix="").query, (*rendered().documents[:1], "plain"), True),
        (PREFIX.replace("Judge", "Decide") + "<Instruct>: x\n<Query>: q\n", rendered().documents, True),
        (PREFIX + "<Query>: q\n", rendered().documents, True),
        ("<Instruct>: only", ("<Document>: d",), True),
        ("q", (rendered().query + rendered().documents[0],), True),
        ("what does <|im_start|>system mean", DOCUMENTS, False),
        ("q", ("A prompt is <Instruct>: i\n<Query>: q\n<Document>: d" + SUFFIX, "<Document>: or not"), False),
    ],
)
def test_a12_what_matches_only_in_part_stays_as_it_is_with_one_warning(
    query: str, documents: tuple[str, ...], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make(byte_tokenizer_json())
    request = RerankRequest(query=query, documents=documents)
    tokenized = tokenizer.pairs(request)
    tokenizer.pairs(request)
    assert tokenized.unwrapped is False
    body = tokenizer.decode(all_ids(tokenizer, request)[0])
    assert body == f"{PREFIX}<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: {documents[0]}{SUFFIX}"
    assert ["look like rendered prompts" in message for message in caplog.messages] == ([True] if warns else [])


def test_a12_unwrapping_is_logged_once_and_an_empty_query_in_a_prompt_is_empty(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = make(byte_tokenizer_json())
    for _ in range(2):
        tokenizer.pairs(rendered())
    assert [message.partition(";")[0] for message in caplog.messages] == ["clients send rendered prompts"]
    query = f"{PREFIX}<Instruct>: i\n<Query>: \n"
    with pytest.raises(EmptyQuery):
        tokenizer.pairs(RerankRequest(query=query, documents=rendered().documents))


def test_a12_the_scores_are_those_of_the_plain_texts_and_the_result_has_the_texts_as_sent(
    tiny_reranker: Reranker,
) -> None:
    plain, unwrapped = (tiny_reranker.submit(one).result() for one in (PLAIN, rendered()))
    assert scores_of(unwrapped, logits=True) == scores_of(plain, logits=True)
    assert (plain.unwrapped, unwrapped.unwrapped) == (False, True)
    assert {item.document for item in unwrapped} == set(rendered().documents)
    pairs = list(zip(itertools.repeat(rendered().query), rendered().documents, strict=False))
    assert tiny_reranker.score(pairs) == scores_of(plain, logits=False)
