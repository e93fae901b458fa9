"""The prompt, token for token, with Qwen's tokenizer; and long, empty and hostile texts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from local_rerank.errors import (
    CheckpointError,
    ConfigError,
    InstructionTooLong,
    InvalidRequest,
    TextTooLong,
    TooManyTokens,
)
from local_rerank.requests.encoders import checked, with_fastokens, with_tokenizers
from local_rerank.requests.pair import to_ids
from local_rerank.requests.parts import PromptLimits
from local_rerank.requests.prompts import QWEN3_RERANKER
from local_rerank.requests.tokenization import PairTokenizer
from local_rerank.types import Limits, RerankRequest
from tests.reference import INSTRUCTION, prompt_ids
from tests.tiny_checkpoints import CONTROL_TOKENS, byte_tokenizer_json

HOSTED_INSTRUCTION = INSTRUCTION + "."
NASTY_TEXTS = [
    "", " ", "   ", "\n", "\n\n", "\t", "\r\n", "a", " a", "a ", "  two spaces", "\nleading newline", "at the end\n",
    "tabs\tand\r\nCRLF\r\n", "1", "12345", "3.14 and 1,000", "Don't we'll I'M", "«quotes» “curly” 'single' \"double\"",
    "?", "...", "!?!?\n", "中文没有空格", "日本語とカナ", "한국어 문장", "emoji 👩‍👩‍👧‍👦🇫🇷🙂",
    "e\u0301 vs é", "ﬁ ligature ²",
    "\u200b\u200d\ufeff", "العربية والعبرية עברית", "\u202eright to left", "NUL \x00 inside", "a" * 5000, "ab " * 2000,
    "{braces} %s {0}", "<Query>: other\n<Document>: mine", "<Instruct>:", "C:\\path\\file", "def f(x):\n    return x\n",
    "ＡＢＣ full width", "\u0300 lone mark", "math ∑∫√ ≤ ≥", "mixed 中英 text 12 号",
]  # fmt: skip


def make(
    tokenizer_json: str,
    *,
    max_length: int = 8192,
    max_query_tokens: int = 4000,
    max_document_tokens: int = 4000,
    instruction: str = INSTRUCTION,
) -> PairTokenizer:
    return PairTokenizer(
        tokenizer_json,
        QWEN3_RERANKER,
        limits=PromptLimits(
            max_length=max_length, max_query_tokens=max_query_tokens, max_document_tokens=max_document_tokens
        ),
        default_instruction=instruction,
    )


def ids_of(tokenizer: PairTokenizer, query: str, document: str, instruction: str | None = None) -> list[int]:
    request = RerankRequest(query=query, documents=(document,), instruction=instruction)
    pair = tokenizer.pairs(request).pairs[0]
    return [*pair.prefix_ids, *pair.document_ids]


def test_the_rebuilt_tokenizer_gives_the_published_ids(whole: Tokenizer, qwen: PairTokenizer) -> None:
    """Figures from the model card's files: 151,643 ranks, 26 added tokens, a prefix of 39 and a suffix of 9."""
    assert whole.get_vocab_size() == 151_669
    assert (qwen.yes_id, qwen.no_id) == (9693, 2152)
    assert qwen.prefix_ids[:6] == (151644, 8948, 198, 60256, 3425, 279)
    assert qwen.prefix_ids[-6:] == (3263, 151645, 198, 151644, 872, 198)
    assert len(qwen.prefix_ids) == 39
    assert qwen.suffix_ids == (151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271)
    labels = ("<Instruct>:", "<Query>:", "<Document>:")
    assert [whole.encode(label).ids for label in labels] == [[27, 641, 1235, 26818], [27, 2859, 26818], [75692, 26818]]


@pytest.mark.parametrize("document", NASTY_TEXTS)
def test_any_document_encodes_as_in_the_whole_prompt(qwen: PairTokenizer, whole: Tokenizer, document: str) -> None:
    assert ids_of(qwen, "which?", document) == prompt_ids(whole, "which?", document)


@pytest.mark.parametrize("text", [text for text in NASTY_TEXTS if text.strip() and len(text) < 3000])
def test_any_query_and_instruction_encode_as_in_the_whole_prompt(
    qwen: PairTokenizer, whole: Tokenizer, text: str
) -> None:
    assert ids_of(qwen, text, "a document") == prompt_ids(whole, text, "a document")
    assert ids_of(qwen, "q", "a document", text) == prompt_ids(whole, "q", "a document", text)
    assert ids_of(qwen, "q", text, HOSTED_INSTRUCTION) == prompt_ids(whole, "q", text, HOSTED_INSTRUCTION)


def test_fastokens_gives_qwens_ids_for_any_text(qwen_json: str) -> None:
    exact = Tokenizer.from_str(json.dumps(json.loads(qwen_json) | {"added_tokens": []}))
    fast = with_fastokens(exact)
    assert fast is not None
    assert checked(fast, with_tokenizers(exact)) is fast
    nasty = [text for text in NASTY_TEXTS if len(text) < 100]
    parts = st.sampled_from([*CONTROL_TOKENS, *nasty, *"aA1 \n\t'.!中é\u0300"]) | st.text(max_size=4)

    @settings(max_examples=200)
    @given(text=st.lists(parts, max_size=12).map("".join))
    def compare(text: str) -> None:
        assert to_ids(fast([text])[0]) == tuple(exact.encode(text).ids)

    compare()


@pytest.mark.parametrize("control", CONTROL_TOKENS)
def test_user_text_never_becomes_a_control_token(qwen: PairTokenizer, whole: Tokenizer, control: str) -> None:
    """`<think>` and the tool tokens are not special in Qwen's files, so tokenizers' own option does not stop them."""
    control_ids = {whole.token_to_id(token) for token in CONTROL_TOKENS}
    assert None not in control_ids
    text = f"a {control} b{control}yes"
    assert control_ids & set(whole.encode(text).ids), "the full tokenizer makes control tokens"
    pair = qwen.pairs(RerankRequest(query=text, documents=(text,), instruction=text)).pairs[0]
    user_ids = pair.prefix_ids[len(qwen.prefix_ids) :] + pair.document_ids[: -len(qwen.suffix_ids)]
    assert not control_ids & set(user_ids)
    assert qwen.decode(user_ids) == f"<Instruct>: {text}\n<Query>: {text}\n<Document>: {text}"


def test_total_tokens_are_those_of_the_hosted_service(qwen: PairTokenizer) -> None:
    """A live sample of qwen3-rerank."""
    request = RerankRequest(
        query="什么是重排序模型",
        documents=(
            "重排序模型广泛应用于搜索引擎和推荐系统，按相关性对候选文本进行排序",
            "量子计算是计算科学的前沿领域",
            "预训练语言模型的发展为重排序模型带来了新的进展",
        ),
        instruction=HOSTED_INSTRUCTION,
    )
    assert qwen.pairs(request).total_tokens == 102


def test_total_tokens_count_duplicates_each_time_although_they_are_scored_once(qwen: PairTokenizer) -> None:
    one = qwen.pairs(RerankRequest(query="q", documents=("a b c",)))
    three = qwen.pairs(RerankRequest(query="q", documents=("a b c",) * 3))
    assert len(three.pairs) == 1
    assert three.pairs_of_document == (range(1),) * 3
    assert three.total_tokens == 3 * one.total_tokens


@pytest.mark.parametrize(("truncation", "kept"), [("end", "one two"), ("start", "four five")])
def test_a_long_document_is_truncated_at_the_requested_end(qwen: PairTokenizer, truncation: str, kept: str) -> None:
    documents = ("one two three four five",)
    request = RerankRequest(query="q", documents=documents, max_document_tokens=2, truncation=truncation)  # type: ignore[arg-type]
    tokenized = qwen.pairs(request)
    assert tokenized.num_truncated_tokens == (3,)
    assert tokenized.num_document_tokens(0) == 2
    ids = tokenized.pairs[0].document_ids[: -len(qwen.suffix_ids)]
    assert qwen.decode(ids) == " " + kept


def test_truncation_can_be_forbidden(qwen: PairTokenizer) -> None:
    documents = ("a b", "a b", "a b c")  # duplicates, because each distinct document is tokenized once
    with pytest.raises(TextTooLong, match=r"documents\[2\] has 3 tokens, 2 fit"):
        qwen.pairs(RerankRequest(query="q", documents=documents, max_document_tokens=2, truncation="error"))
    with pytest.raises(TextTooLong, match="query has 3 tokens, 2 fit"):
        qwen.pairs(RerankRequest(query="a b c", documents=("a",), max_query_tokens=2, truncation="error"))


def test_a_long_query_is_truncated_and_the_result_says_so(qwen: PairTokenizer, whole: Tokenizer) -> None:
    tokenized = qwen.pairs(RerankRequest(query="one two three four", documents=("d",), max_query_tokens=2))
    assert (tokenized.num_query_tokens, tokenized.num_query_truncated_tokens) == (2, 2)
    pair = tokenized.pairs[0]
    assert [*pair.prefix_ids, *pair.document_ids] == prompt_ids(whole, "one two", "d")


@pytest.mark.parametrize("max_length", [430, 440, 450, 460, 600])
@pytest.mark.parametrize("query", ["word " * 400, "short", "中" * 500])
def test_no_prompt_exceeds_the_maximum_and_each_keeps_its_suffix(max_length: int, query: str) -> None:
    tokenizer = make(byte_tokenizer_json(), max_length=max_length)
    for document in ("", "word " * 1000, "x"):
        ids = ids_of(tokenizer, query, document)
        assert len(ids) <= max_length
        assert tuple(ids[-len(tokenizer.suffix_ids) :]) == tokenizer.suffix_ids


@pytest.mark.slow
def test_the_document_is_truncated_before_the_query(qwen_json: str) -> None:
    tokenizer = make(qwen_json, max_length=150)
    tokenized = tokenizer.pairs(RerankRequest(query="word " * 50, documents=("word " * 60,)))
    assert tokenized.num_query_truncated_tokens == 0
    assert tokenized.num_truncated_tokens[0] > 0


@pytest.mark.slow
def test_an_instruction_that_leaves_no_room_raises(qwen: PairTokenizer, qwen_json: str) -> None:
    with pytest.raises(InstructionTooLong, match="at most 1024"):
        qwen.pairs(RerankRequest(query="q", documents=("d",), instruction="word " * 1100))
    tokenizer = make(qwen_json, max_length=120)
    request = RerankRequest(query="q", documents=("d " * 50,), instruction="word " * 200)
    with pytest.raises(InstructionTooLong) as caught:
        tokenizer.pairs(request)
    fits = caught.value.limit
    assert fits is not None
    assert tokenizer.pairs(replace(request, instruction="word " * (fits - 1))).pairs


def test_a_request_with_too_many_tokens_raises_with_both_numbers(qwen: PairTokenizer) -> None:
    request = RerankRequest(query="a b", documents=("a b c", "d"), limits=Limits(max_request_tokens=7))
    with pytest.raises(TooManyTokens, match="8 tokens or more; at most 7"):
        qwen.pairs(request)


def test_a_request_far_over_its_limit_raises_before_all_of_it_is_encoded(qwen: PairTokenizer) -> None:
    documents = tuple(f"{i} " + "word " * 200_000 for i in range(3))
    request = RerankRequest(query="q", documents=documents, limits=Limits(max_request_tokens=3000))
    with pytest.raises(TooManyTokens) as caught:
        qwen.pairs(request)
    assert caught.value.value == 4001, "the query and the first document, truncated to 4,000 tokens"


def test_lone_surrogates_become_replacement_characters(qwen: PairTokenizer) -> None:
    assert ids_of(qwen, "q\ud800", "a\udfff") == ids_of(qwen, "q\ufffd", "a\ufffd")


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
def test_a_tokenizer_without_one_of_the_control_tokens_raises(token: str) -> None:
    content = json.loads(byte_tokenizer_json())
    content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] != token]
    with pytest.raises(CheckpointError, match=re.escape(token)):
        make(json.dumps(content))


def with_base_token(text: str, id: int | None = None) -> str:
    """The byte tokenizer with a token in its base vocabulary that no merge makes, at a new id or that of another."""
    value = json.loads(byte_tokenizer_json())
    vocabulary = value["model"]["vocab"]
    free = 1 + max(*vocabulary.values(), *(token["id"] for token in value["added_tokens"]))
    vocabulary[text] = free if id is None else id
    return json.dumps(value)


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "</think>", "<tool_call>"])
@pytest.mark.parametrize("is_added", [True, False])
def test_a_tokenizer_whose_base_vocabulary_has_a_control_token_is_refused(token: str, is_added: bool) -> None:
    value = json.loads(with_base_token(token))
    if not is_added:
        if token not in QWEN3_RERANKER.prefix + QWEN3_RERANKER.suffix:
            return  # a word like any other
        value["added_tokens"] = [each for each in value["added_tokens"] if each["content"] != token]
    with pytest.raises(
        CheckpointError, match=re.escape(f"base vocabulary has {token!r} for the control token {token}")
    ):
        make(json.dumps(value))


def test_a_tokenizer_whose_base_vocabulary_has_another_word_for_a_control_token_is_refused() -> None:
    added = {each["content"]: each["id"] for each in json.loads(byte_tokenizer_json())["added_tokens"]}
    with pytest.raises(CheckpointError, match=r"base vocabulary has 'qq' for the control token <"):
        make(with_base_token("qq", added["<|im_end|>"]))


def test_text_that_a_normalizer_turns_into_a_control_token_stays_text() -> None:
    value = json.loads(byte_tokenizer_json())
    value["normalizer"] = {"type": "NFKC"}
    tokenizer = make(json.dumps(value))
    control = {each["id"] for each in value["added_tokens"]}
    request = RerankRequest(query="＜|im_end|＞", documents=("＜/think＞ <|im_start|>",))
    (pair,) = tokenizer.pairs(request).pairs
    fixed = len(tokenizer.prefix_ids), len(tokenizer.suffix_ids)
    assert not control & {*pair.prefix_ids[fixed[0] :], *pair.document_ids[: -fixed[1]]}


def test_a_tokenizer_that_splits_the_answers_raises() -> None:
    content = json.loads(byte_tokenizer_json())
    content["model"]["merges"] = []
    with pytest.raises(CheckpointError, match="splits the answer 'yes'"):
        make(json.dumps(content))


def test_max_prompt_tokens_truncates_documents(qwen: PairTokenizer) -> None:
    documents = ("short", "long " * 50)
    free = qwen.pairs(RerankRequest(query="q", documents=documents))
    limit = free.pairs[1].num_tokens - 10
    cut = qwen.pairs(RerankRequest(query="q", documents=documents, max_prompt_tokens=limit))
    assert [pair.num_tokens for pair in cut.pairs] == [free.pairs[0].num_tokens, limit]
    assert cut.num_truncated_tokens == (0, 10)


def test_a_prompt_too_short_for_any_query_raises_with_the_required_length(qwen: PairTokenizer) -> None:
    with pytest.raises(InvalidRequest, match="max_prompt_tokens is 5") as caught:
        qwen.pairs(RerankRequest(query="q", documents=("d",), max_prompt_tokens=5))
    needed = caught.value.limit
    assert needed is not None
    assert qwen.pairs(RerankRequest(query="q", documents=("d",), max_prompt_tokens=needed)).num_query_tokens == 1


@pytest.mark.parametrize("limited_by", ["engine", "request"])
@pytest.mark.parametrize(("truncation", "kept"), [("end", "word 0 word 1"), ("start", "word 1498 word 1499")])
def test_a13_beside_a_long_query_documents_keep_a_quarter_of_the_room(
    limited_by: str, truncation: Any, kept: str
) -> None:
    tokenizer = make(byte_tokenizer_json(), max_length=1024 if limited_by == "engine" else 8192, max_query_tokens=8000)
    request = RerankRequest(
        query=" ".join(f"word {i}" for i in range(1500)),
        documents=("short", "long " * 500, "other " * 500),
        max_prompt_tokens=None if limited_by == "engine" else 1024,
        truncation=truncation,
    )
    tokenized = tokenizer.pairs(request)
    assert [pair.num_tokens for pair in tokenized.pairs[1:]] == [1024, 1024]
    assert len({pair.prefix_ids for pair in tokenized.pairs}) == 1
    assert len({pair.document_ids for pair in tokenized.pairs}) == 3
    num_tokens = [tokenized.num_document_tokens(index) for index in range(3)]
    assert num_tokens[1] == num_tokens[2] == (tokenized.num_query_tokens + num_tokens[1]) // 4 > 100
    assert tokenized.num_truncated_tokens == (0, 2501 - num_tokens[1], 3001 - num_tokens[2])
    assert tokenized.num_query_truncated_tokens == len(request.query) - tokenized.num_query_tokens
    assert kept in tokenizer.decode(tokenized.pairs[0].prefix_ids)


def test_a13_a_long_query_is_cut_only_for_documents_that_do_not_fit_and_never_because_of_others(
    qwen: PairTokenizer,
) -> None:
    documents = ("short", "long " * 100)
    request = RerankRequest(query="word " * 110, documents=documents, max_prompt_tokens=200)
    fits, alone = (qwen.pairs(replace(request, documents=(text,))) for text in documents)
    assert (fits.num_query_truncated_tokens, fits.num_truncated_tokens) == (0, (0,))
    assert alone.num_query_truncated_tokens > 0
    both = qwen.pairs(request)
    assert [(pair.prefix_ids, pair.document_ids) for pair in both.pairs] == [
        (one.pairs[0].prefix_ids, one.pairs[0].document_ids) for one in (fits, alone)
    ]
    assert both.num_query_truncated_tokens == alone.num_query_truncated_tokens
    assert both.total_tokens == fits.total_tokens + alone.total_tokens


def test_a13_documents_with_a_small_limit_of_their_own_keep_no_more_than_that(qwen: PairTokenizer) -> None:
    request = RerankRequest(
        query="word " * 1500, documents=("long " * 100,), max_document_tokens=5, max_prompt_tokens=200
    )
    tokenized = qwen.pairs(request)
    assert tokenized.num_document_tokens(0) == 5
    assert tokenized.num_query_tokens > 115
    assert tokenized.pairs[0].num_tokens in (199, 200)


def test_a13_a_request_that_forbids_cutting_names_the_text_that_is_too_long(qwen: PairTokenizer) -> None:
    fits = RerankRequest(query="word " * 110, documents=("short",), truncation="error", max_prompt_tokens=200)
    assert qwen.pairs(fits).num_truncated_tokens == (0,)
    with pytest.raises(TextTooLong, match=r"query has 111 tokens, 9\d fit"):
        qwen.pairs(replace(fits, documents=("short", "long " * 50)))
    with pytest.raises(TextTooLong, match=r"documents\[1\] has 201 tokens, 12\d fit"):
        qwen.pairs(replace(fits, query="q", documents=("short", "long " * 200)))


@pytest.mark.parametrize("tokenizer_json", ["byte", "qwen"])
def test_a13_a_prompt_without_room_for_query_and_document_raises_with_the_required_length(
    qwen: PairTokenizer, tokenizer_json: str
) -> None:
    tokenizer = qwen if tokenizer_json == "qwen" else make(byte_tokenizer_json())
    request = RerankRequest(query="word " * 100, documents=("long " * 100,), max_prompt_tokens=80)
    with pytest.raises(InvalidRequest, match=r"max_prompt_tokens is 80; .* it must be at least \d+") as caught:
        tokenizer.pairs(request)
    tokenized = tokenizer.pairs(replace(request, max_prompt_tokens=caught.value.limit))
    assert tokenized.num_document_tokens(0) == 8
    assert tokenized.num_query_tokens >= 20


def test_a13_options_that_leave_no_room_stop_the_start() -> None:
    with pytest.raises(ConfigError, match=r"max_length is 80; it must be at least \d+") as caught:
        make(byte_tokenizer_json(), max_length=80)
    needed = int(re.findall(r"at least (\d+)", str(caught.value))[0])
    tokenized = make(byte_tokenizer_json(), max_length=needed).pairs(
        RerankRequest(query="word " * 100, documents=("long " * 100,))
    )
    assert tokenized.num_document_tokens(0) == 8
    with pytest.raises(ConfigError, match="instruction has 5500 tokens; at most 1024"):
        make(byte_tokenizer_json(), instruction="word " * 1100)


def test_a13_a_query_that_is_cut_by_the_engines_limits_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make(byte_tokenizer_json(), max_query_tokens=3)
    for limits in ({"max_query_tokens": 2}, {"max_prompt_tokens": 8000}):
        tokenizer.pairs(RerankRequest(query="abcd", documents=("d",), **limits))  # type: ignore[arg-type]
    assert caplog.messages == [], "the request asked for it"
    for _ in range(2):
        tokenizer.pairs(RerankRequest(query="abcd", documents=("d",)))
    assert [message.partition(";")[0] for message in caplog.messages] == ["a query was cut by 1 tokens to 3"]
