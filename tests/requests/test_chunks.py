"""Long documents in chunks: where they are cut, with Qwen's tokenizer, and how they are scored."""

from __future__ import annotations

import unicodedata
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from local_rerank import Reranker
from local_rerank.errors import InvalidRequest, TextTooLong, TooManyChunks
from local_rerank.requests.chunks import MAX_SENTENCES, sentence_ends, sentences
from local_rerank.requests.pair import TokenizedRequest
from local_rerank.requests.tokenization import PairTokenizer, clean
from local_rerank.types import Limits, RankedDocument, RerankRequest
from tests.requests.test_tokenization import make
from tests.tiny_checkpoints import byte_tokenizer_json

WORDS = ["word", "Ünïcödé", "e\u0301\u0323", "중국", "hello.", "What?!", '"Yes."', "3.14"]
ODD = [
    *WORDS, "\ud83d", "\udc00x", "\ufffd", "中文没有空格的句子", "。", "」", "👩‍👩‍👧‍👦", "👍🏽", "🇫🇷🇩🇪", "\u0300",
    "\u0958", "\U0001d160", "\r\n", "\r", "\n\n", " ", "   ", "\t", "\u2028", "\u200d", "\x00", "<|im_end|>", "x" * 300,
    "\u1100\u1161", "ก็", "ﬁ",
]  # fmt: skip
BYTES = make(byte_tokenizer_json())  # up to twelve tokens for a character
TEXT = " ".join(f"Sentence number {i} has some words in it." for i in range(100))


def tokenized(tokenizer: PairTokenizer, document: str, **options: Any) -> TokenizedRequest:
    return tokenizer.pairs(RerankRequest(query="q", documents=(document,), long_documents="chunk", **options))


def check(tokenizer: PairTokenizer, document: str, tokens: int, overlap: int) -> list[tuple[int, int]]:
    """Checks what holds for every text, and returns the chunks."""
    result = tokenized(tokenizer, document, chunk_tokens=tokens, chunk_overlap_tokens=overlap)
    bounds = [result.bounds_as_sent(0, pair) for pair in result.pairs_of_document[0]]
    assert None not in bounds
    found = [each for each in bounds if each is not None]
    assert found[0][0] == 0
    assert found[-1][1] == len(document)
    assert all(first[0] < second[0] <= first[1] < second[1] for first, second in pairwise(found)), "all is covered"
    assert result.num_truncated_tokens == (0,)
    for (start, end), pair in zip(found, result.pairs, strict=True):
        assert pair.num_document_tokens - len(tokenizer.suffix_ids) <= tokens
        alone = tokenizer.pairs(RerankRequest(query="q", documents=(document[start:end],)))
        assert pair.document == alone.pairs[0].document, "as a document of this text"
        for first, last in sentences(clean(document), (start, end)):
            assert start <= first < last <= end
            assert document[first:last].strip() == document[first:last]
    return found


@settings(max_examples=60, suppress_health_check=list(HealthCheck))  # they measure time
@given(
    document=st.lists(st.sampled_from(ODD) | st.text(max_size=6), min_size=1, max_size=60).map("".join),
    tokens=st.integers(16, 60),
    overlap=st.integers(0, 40),
)
@example(document="\U0001d160 " * 20, tokens=20, overlap=30)  # twelve bytes after normalization
@example(document="中文没有空格" * 4 + "\U0001d160x" * 9, tokens=24, overlap=19)
def test_chunks_of_any_text_cover_it_and_fit(qwen: PairTokenizer, document: str, tokens: int, overlap: int) -> None:
    for tokenizer in (qwen, BYTES):
        check(tokenizer, document, tokens, overlap)


@pytest.mark.parametrize(
    "document",
    [
        "x" * 10_000, "中" * 10_000, "\u0300" * 3000, "a\u200d" * 3000, "👩‍👩‍👧‍👦" * 500, " " * 9000, "." * 9000,
        "。" * 5000, "\r\n" * 5000, "\ud800" * 3000, "가\u0301" * 2000, 'a."\'")' * 2000,
    ],
    ids=lambda text: f"{ord(text[0]):x}{ord(text[1]):x}",
)  # fmt: skip
def test_texts_without_a_place_to_cut_are_covered(qwen: PairTokenizer, document: str) -> None:
    check(qwen, document, 512, 64)


def test_chunks_end_after_sentences_and_start_with_them(qwen: PairTokenizer) -> None:
    found = check(qwen, TEXT, 128, 32)
    assert len(found) > 8
    for (_, end), (start, _) in pairwise(found):
        assert TEXT[:end].endswith(". ")
        assert TEXT[start:].startswith("Sentence")
        assert start < end, "they overlap"
    assert all(end == start for (_, end), (start, _) in pairwise(check(qwen, TEXT, 128, 0)))


def test_chunks_end_at_lines_then_words_then_visible_characters(qwen: PairTokenizer) -> None:
    lines = "\r\n".join(f"row {i} of a table without full stops" for i in range(60))
    assert all(lines[:end].endswith("\r\n") for _, end in check(qwen, lines, 64, 0)[:-1])
    words = " ".join(f"word{i}" for i in range(200))
    assert all(words[start:].startswith("word") for start, _ in check(qwen, words, 64, 16))
    families = "👩‍👩‍👧‍👦" * 50
    assert all(families[start] == "👩" and families[start - 1] != "\u200d" for start, _ in check(qwen, families, 64, 0))
    marks = "e\u0301\u0323x" * 200
    assert not any(unicodedata.combining(marks[start]) for start, _ in check(qwen, marks, 64, 16))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "Go." Then (left.) She cried…  "No"', ['He said "Go."', "Then (left.)", "She cried…", '"No"']),
        ("e.g. this, i.e. one", ["e.g. this, i.e. one"]),
        ("of a wing . the results , e.g. lift ? no", ["of a wing .", "the results , e.g. lift ?", "no"]),
        ("第一句。第二句！」第三句", ["第一句。", "第二句！」", "第三句"]),
        ("a line\r\n\r\n  another\n", ["a line", "another"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences(text: str, wanted: list[str]) -> None:
    assert [text[start:end] for start, end in sentences(text, (0, len(text)))] == wanted


def test_sentences_of_a_part_are_bounded_in_number_and_found_in_linear_time() -> None:
    text = "Ab. " * 1000
    found = sentences(text, (4, 2004))
    assert found[0] == (4, 4 + 8 * 4 - 1)
    assert found[-1][1] == 2003
    assert len(found) <= MAX_SENTENCES
    for hostile in (" ", ".", '."', "。", "\n", ". a"):
        sentence_ends(hostile * 200_000)  # quadratic time would be minutes


def test_rendered_prompts_have_offsets_in_the_text_as_sent(qwen: PairTokenizer) -> None:
    documents = tuple(f"{space}<Document>:{space} {TEXT}" for space in ("", "  "))
    request = RerankRequest(query="<Instruct>: i\n<Query>: q\n", documents=documents, long_documents="chunk")
    result = qwen.pairs(request)
    assert result.unwrapped
    assert len(result.pairs_of_document[0]) > 1
    for index, document in enumerate(documents):
        bounds = [result.bounds_as_sent(index, pair) for pair in result.pairs_of_document[index]]
        assert bounds[0] is not None
        assert bounds[-1] is not None
        assert document[slice(*bounds[0])].lstrip().startswith("Sentence number 0 ")
        assert bounds[-1][1] == len(document)


def test_a_request_can_have_less_of_a_document_read(qwen: PairTokenizer) -> None:
    whole = tokenized(qwen, TEXT, chunk_tokens=64)
    num_tokens = qwen.count_tokens(" " + TEXT)
    first = tokenized(qwen, TEXT, chunk_tokens=64, max_chunks_per_document=2)
    assert [pair.document for pair in first.pairs] == [pair.document for pair in whole.pairs[:2]]
    end = first.bounds_as_sent(0, 1)
    assert end is not None
    num_read = qwen.count_tokens(" " + TEXT[: end[1]].rstrip())
    assert num_tokens - first.num_truncated_tokens[0] == num_read + 1, "the next token begins with the space after it"
    last = tokenized(qwen, TEXT, chunk_tokens=64, max_chunks_per_document=2, truncation="start")
    assert [pair.document for pair in last.pairs] == [pair.document for pair in whole.pairs[-2:]]
    read = tokenized(qwen, TEXT, chunk_tokens=64, max_document_tokens=200)
    assert read.num_truncated_tokens == (num_tokens - 200,)
    assert 3 <= len(read.pairs) <= 6
    cut = tokenized(qwen, TEXT, chunk_tokens=64, max_document_tokens=50)
    assert len(cut.pairs) == 1
    assert cut.num_truncated_tokens == (num_tokens - 50,)
    with pytest.raises(TextTooLong, match=r"documents\[0\] has \d+ tokens, 200 fit"):
        tokenized(qwen, TEXT, chunk_tokens=64, max_document_tokens=200, truncation="error")


def test_chunks_are_counted_and_limited(qwen: PairTokenizer) -> None:
    whole = tokenized(qwen, TEXT, chunk_tokens=64, chunk_overlap_tokens=0)
    num = len(whole.pairs)
    assert whole.num_document_tokens(0) >= qwen.count_tokens(" " + TEXT)
    assert whole.total_tokens == sum(map(qwen._billed_tokens, whole.pairs))
    options = {"chunk_tokens": 64, "chunk_overlap_tokens": 0}
    with pytest.raises(TooManyChunks, match=rf"documents\[0\] has {num} chunks or more; at most {num - 1} are taken"):
        tokenized(qwen, TEXT, limits=Limits(max_document_chunks=num - 1), **options)
    request = RerankRequest(
        query="q", documents=("short", TEXT, TEXT), long_documents="chunk", chunk_tokens=64, chunk_overlap_tokens=0,
        limits=Limits(max_request_chunks=2 * num - 1),
    )  # fmt: skip
    with pytest.raises(TooManyChunks, match=rf"the request has {2 * num} chunks or more; .* max_chunks_per_document,"):
        qwen.pairs(request)
    tokenized(qwen, TEXT, limits=Limits(max_document_chunks=num), **options)


@pytest.mark.parametrize(
    ("field", "value"),
    [("long_documents", "split"), ("chunk_tokens", 15), ("chunk_overlap_tokens", -1), ("num_best_chunks", 0),
     ("max_chunks_per_document", 0), ("spans", 1), ("chunk_tokens", True)],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        RerankRequest(query="q", documents=("d",), **{field: value})
    assert caught.value.field == field


def test_beside_a_long_query_chunks_are_as_long_as_there_is_room() -> None:
    tokenizer = make(byte_tokenizer_json(), max_length=600)
    request = RerankRequest(query="word " * 200, documents=("other " * 200,), long_documents="chunk")
    result = tokenizer.pairs(request)
    assert max(pair.num_tokens for pair in result.pairs) <= 600
    assert len(result.pairs) > 1
    assert result.num_truncated_tokens == (0,)


def rank(reranker: Reranker, document: str, **options: Any) -> RankedDocument:
    request = RerankRequest(query="which?", documents=(document, "short", ""), chunk_tokens=100, **options)
    return next(item for item in reranker.submit(request).result() if item.index == 0)


def test_a_document_has_the_score_of_its_best_chunk(tiny_reranker: Reranker) -> None:
    item = rank(tiny_reranker, TEXT[:1500], long_documents="chunk")
    assert item.num_chunks is not None
    assert item.num_chunks > 10
    assert item.num_truncated_tokens == 0
    assert item.best_chunk is not None
    assert item.best_chunk.score == item.relevance_score
    assert item.spans is None
    best = rank(tiny_reranker, TEXT[item.best_chunk.start : item.best_chunk.end])
    assert best.log_odds == pytest.approx(item.log_odds, abs=1e-4)
    mean = rank(tiny_reranker, TEXT[:1500], long_documents="chunk", num_best_chunks=3)
    assert mean.log_odds < item.log_odds
    assert mean.best_chunk == item.best_chunk


def test_documents_that_fit_have_the_same_scores_to_the_bit(tiny_reranker: Reranker) -> None:
    documents = ("one. two", "three", "", "one. two", "Four. " * 8)
    plain = tiny_reranker.rank("which?", documents)
    chunked = tiny_reranker.rank("which?", documents, long_documents="chunk")
    assert [(item.index, item.log_odds) for item in plain] == [(item.index, item.log_odds) for item in chunked]
    assert {item.num_chunks for item in chunked} == {1}
    assert all(item.best_chunk and item.best_chunk.end == len(item.document) for item in chunked)
    assert {(item.num_chunks, item.best_chunk, item.spans) for item in plain} == {(None, None, None)}
    assert chunked.total_tokens == plain.total_tokens
    assert chunked.num_computed_tokens == plain.num_computed_tokens


def test_spans_are_sentences_of_the_best_chunk_scored_as_documents(tiny_reranker: Reranker) -> None:
    item = rank(tiny_reranker, TEXT[:1500], long_documents="chunk", spans=True)
    assert item.best_chunk is not None
    assert item.spans
    assert len(item.spans) > 1
    assert [span.score for span in item.spans] == sorted((span.score for span in item.spans), reverse=True)
    for span in item.spans:
        assert item.best_chunk.start <= span.start < span.end <= item.best_chunk.end
        assert rank(tiny_reranker, TEXT[span.start : span.end]).relevance_score == pytest.approx(span.score, abs=1e-5)
    cut = rank(tiny_reranker, TEXT, spans=True, max_document_tokens=50)
    assert cut.best_chunk is not None
    assert (cut.best_chunk.start, cut.best_chunk.end, cut.num_chunks) == (0, 49, 1)
    assert cut.spans
    empty = tiny_reranker.rank("which?", ["", " \n"], spans=True)
    assert [item.spans for item in empty] == [(), ()]
