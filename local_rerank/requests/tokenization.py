"""RerankRequest -> TokenizedRequest: the prompt of Qwen3-Reranker's model card, token for token.

A pair's ids are `prefix + document`. The prefix ends with `<Document>:`. All pairs of a request share it, so the model
computes it once. The document starts with a space, because a space merges with the word after it, and ends with the
template's suffix. User text is encoded by a copy of the tokenizer without added tokens, so a document that contains
`<|im_end|>` or `<think>` stays plain text. Prompts that a client rendered itself are unwrapped first.

If a pair is longer than the prompt may be, its document is cut, down to a quarter of the room that query and document
have. Only then is the query cut, too. What is cut from a pair never depends on the other documents of its request.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from local_rerank.errors import (
    CheckpointError,
    ConfigError,
    InstructionTooLong,
    InvalidRequest,
    LocalRerankError,
    TextTooLong,
    TooManyTokens,
)
from local_rerank.requests.encoders import fastest, with_tokenizers, without_added_tokens
from local_rerank.requests.pair import ID_BYTES, Pair, to_bytes, to_ids
from local_rerank.requests.prompts import PromptTemplate
from local_rerank.text_files import open_utf8
from local_rerank.types import RerankRequest, Truncation

MAX_INSTRUCTION_TOKENS = 1024
DOCUMENT_SHARE = 4  # a document keeps 1/4 of the room for query and document
MIN_ROOM = 32  # tokens for query and document; with less, what is left of them says little and the scores tie
CHUNK_CHARS = 1_000_000  # encoded at once; takes about 0.5 s with tokenizers, 0.05 s with fastokens
_CONTROL_TOKEN = re.compile(r"<\|\w+\|>|</?think>")
_MARKUP = re.compile(r"<[^<>\s]+>")  # such as <|im_end|>, <think> and <tool_call>
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLimits:
    """Limits in tokens. A longer query or document is truncated."""

    max_length: int  # of the whole prompt
    max_query_tokens: int
    max_document_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRequest:
    """The pairs of a request, one for each distinct document, and the token counts of its result."""

    pairs: tuple[Pair, ...]
    pair_of_document: tuple[int, ...]  # per document: position in `pairs`
    num_truncated_tokens: tuple[int, ...]  # per document
    num_query_tokens: int
    num_query_truncated_tokens: int
    num_suffix_tokens: int
    total_tokens: int  # as the hosted service counts usage
    unwrapped: bool  # whether the client had rendered the prompts
    has_default_instruction: bool  # to which a calibration applies

    def num_document_tokens(self, index: int) -> int:
        return self.pairs[self.pair_of_document[index]].num_document_tokens - self.num_suffix_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Query:
    """The query of a request and what decides how much of it is used."""

    instruction: str
    text: str
    num_tokens: int  # of the text
    num_wanted_tokens: int  # within the query's own limits
    max_document_tokens: int
    max_prompt_tokens: int
    truncation: Truncation


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prefix:
    """The ids before a document, with all of the query or a part of it."""

    ids: bytes  # see `pair.py`
    num_query_tokens: int
    room: int  # tokens left for the document; negative if there are too many without it


class PairTokenizer:
    """A checkpoint's tokenizer in two copies: with control tokens for the template, without them for user text."""

    def __init__(
        self,
        tokenizer_json: str,
        template: PromptTemplate,
        *,
        limits: PromptLimits,
        default_instruction: str,
    ) -> None:
        self.template = template
        self._full = Tokenizer.from_str(tokenizer_json)
        self._full.no_truncation()
        self._full.no_padding()
        self._plain = without_added_tokens(self._full)
        self._encode = with_tokenizers(self._plain)
        self._check_base_vocabulary()
        self._limits = limits
        self._default_instruction = default_instruction
        self.prefix_ids = self._control_ids(template.prefix)
        self.suffix_ids = self._control_ids(template.suffix)
        labels = (template.instruction_label, template.query_label, template.document_label)
        self._num_label_tokens = sum(map(self.count_tokens, labels))
        self.yes_id = self._answer_id(template.yes)
        self.no_id = self._answer_id(template.no)
        self._said: set[str] = set()  # warnings that were logged
        self._check_max_length()

    @classmethod
    def from_folder(
        cls, folder: Path, template: PromptTemplate, *, limits: PromptLimits, default_instruction: str
    ) -> PairTokenizer:
        """Raises CheckpointError if the folder has no usable tokenizer.json, ConfigError if prompts do not fit."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json; a fast tokenizer is required. Copy it from the base model, or run "
                f"`AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})` with transformers"
            )
        try:
            with open_utf8(path, "model") as stream:
                text = stream.read().decode("utf-8")
            return cls(text, template, limits=limits, default_instruction=default_instruction)
        except LocalRerankError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def use_fastest(self) -> None:
        """Encode with fastokens from now on, if it can be used here. It takes 1.4 s to load Qwen's tokenizer."""
        self._encode = fastest(self._plain)

    @property
    def num_ids(self) -> int:
        """The number of token ids that prompts can have: user text has no added tokens."""
        template_ids = (*self.prefix_ids, *self.suffix_ids, self.yes_id, self.no_id)
        return max(self._plain.get_vocab_size(with_added_tokens=False), max(template_ids) + 1)

    def pairs(self, request: RerankRequest) -> TokenizedRequest:
        """Encode a request. Raises a leaf of InvalidRequest."""
        request, unwrapped = self._unwrapped(request)
        query = self._query(request)
        whole, shortened = self._prefix(query, query.num_wanted_tokens), None
        documents = [clean(document) for document in request.documents]
        repeats = Counter(documents)  # in the order in which documents first occur
        place = {document: position for position, document in enumerate(repeats)}
        pair_of_document = tuple(place[document] for document in documents)
        pairs: list[Pair] = []
        cuts: list[int] = []
        num_request_tokens = 0  # as `Limits.max_request_tokens` counts them
        limit, suffix = request.limits.max_request_tokens, to_bytes(self.suffix_ids)
        for document, ids in self._encode_in_chunks(list(repeats)):
            prefix, num_tokens = whole, len(ids) // ID_BYTES
            if min(num_tokens, query.max_document_tokens) > whole.room:
                prefix = shortened = shortened or self._shortened(whole, query)
            num_kept = min(num_tokens, prefix.room, query.max_document_tokens)
            if num_kept < num_tokens:
                if query.truncation == "error":
                    raise TextTooLong(field=f"documents[{documents.index(document)}]", limit=num_kept, value=num_tokens)
                kept = ID_BYTES * num_kept
                ids = ids[-kept:] if query.truncation == "start" else ids[:kept]
            pairs.append(Pair(prefix.ids, ids + suffix))
            cuts.append(num_tokens - num_kept)
            num_request_tokens += repeats[document] * (prefix.num_query_tokens + num_kept)
            if limit is not None and num_request_tokens > limit:
                raise TooManyTokens(limit=limit, value=num_request_tokens)
        num_query_tokens = (shortened or whole).num_query_tokens
        num_query_cut = query.num_tokens - num_query_tokens
        if num_query_cut and request.max_query_tokens is request.max_prompt_tokens is None:  # else it asked for that
            what = "a query was cut by %d tokens to %d; max_query_tokens and max_length are the limits"
            self._warn_once(what, num_query_cut, num_query_tokens)
        return TokenizedRequest(
            pairs=tuple(pairs),
            pair_of_document=pair_of_document,
            num_truncated_tokens=tuple(cuts[i] for i in pair_of_document),
            num_query_tokens=num_query_tokens,
            num_query_truncated_tokens=num_query_cut,
            unwrapped=unwrapped,
            has_default_instruction=query.instruction == clean(self._default_instruction),
            num_suffix_tokens=len(self.suffix_ids),
            total_tokens=sum(repeats[text] * self._billed_tokens(pairs[i]) for text, i in place.items()),
        )

    def count_tokens(self, text: str) -> int:
        """The number of tokens of a text outside a prompt."""
        return len(self._encode([text])[0]) // ID_BYTES

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, with control tokens."""
        return self._full.decode(list(ids), skip_special_tokens=False)

    def _unwrapped(self, request: RerankRequest) -> tuple[RerankRequest, bool]:
        """The request with plain texts, and whether its client had rendered the prompts."""
        if (plain := self.template.unwrap(request)) is not None:
            self._warn_once("clients send rendered prompts; the template around query and documents is removed")
            return plain, True
        if self.template.looks_rendered(request):
            self._warn_once(
                "a client sends texts that look like rendered prompts, but query and documents do not all match the "
                "template; they are ranked as plain texts. Send query and documents without the template"
            )
        return request, False

    def _query(self, request: RerankRequest) -> _Query:
        instruction = clean(self._default_instruction if request.instruction is None else request.instruction)
        num_instruction_tokens = self.count_tokens(instruction)
        if num_instruction_tokens > MAX_INSTRUCTION_TOKENS:
            raise InstructionTooLong(limit=MAX_INSTRUCTION_TOKENS, value=num_instruction_tokens)
        text, limits = clean(request.query), self._limits
        num_tokens = self.count_tokens(text)
        num_wanted = min(num_tokens, limits.max_query_tokens, request.max_query_tokens or num_tokens)
        if num_wanted < num_tokens and request.truncation == "error":
            raise TextTooLong(field="query", limit=num_wanted, value=num_tokens)
        max_document = limits.max_document_tokens
        return _Query(
            instruction=instruction,
            text=text,
            num_tokens=num_tokens,
            num_wanted_tokens=num_wanted,
            max_document_tokens=min(max_document, request.max_document_tokens or max_document),
            max_prompt_tokens=min(limits.max_length, request.max_prompt_tokens or limits.max_length),
            truncation=request.truncation,
        )

    def _prefix(self, query: _Query, num_query_tokens: int) -> _Prefix:
        text = query.text
        if num_query_tokens < query.num_tokens:
            text = self._cut_text(text, num_query_tokens, query.truncation == "start")
        ids = to_bytes(self.prefix_ids) + self._encode([self.template.shared_body(query.instruction, text)])[0]
        room = query.max_prompt_tokens - len(ids) // ID_BYTES - len(self.suffix_ids)
        return _Prefix(ids=ids, num_query_tokens=num_query_tokens, room=room)

    def _shortened(self, whole: _Prefix, query: _Query) -> _Prefix:
        """The prefix of pairs that are too long, which leaves a document its share of the room."""
        room = whole.room + whole.num_query_tokens
        share = min(room // DOCUMENT_SHARE, query.max_document_tokens)
        if query.truncation == "error":
            if whole.room < share:
                raise TextTooLong(field="query", limit=max(0, room - share), value=whole.num_query_tokens)
            return whole
        if room < MIN_ROOM:
            raise self._no_room(query, num_fixed_tokens=query.max_prompt_tokens - room)
        prefix = whole
        while prefix.room < share:  # tokens merge, so the first cut may leave a few tokens too many
            prefix = self._prefix(query, prefix.num_query_tokens - (share - prefix.room))
        return prefix

    def _no_room(self, query: _Query, *, num_fixed_tokens: int) -> InvalidRequest:
        needed = num_fixed_tokens + MIN_ROOM
        if query.max_prompt_tokens < self._limits.max_length:
            what = (
                f"max_prompt_tokens is {query.max_prompt_tokens}; the template and the instruction take "
                f"{num_fixed_tokens} of them, so it must be at least {needed}"
            )
            return InvalidRequest(what, field="max_prompt_tokens", limit=needed, value=query.max_prompt_tokens)
        num_tokens = self.count_tokens(query.instruction)
        return InstructionTooLong(limit=max(0, num_tokens - needed + query.max_prompt_tokens), value=num_tokens)

    def _check_max_length(self) -> None:
        """Raises ConfigError if the default instruction leaves no room in a prompt."""
        num_tokens = self.count_tokens(clean(self._default_instruction))
        if num_tokens > MAX_INSTRUCTION_TOKENS:
            raise ConfigError(f"instruction has {num_tokens} tokens; at most {MAX_INSTRUCTION_TOKENS} are taken")
        num_body_tokens = self.count_tokens(self.template.shared_body(clean(self._default_instruction), ""))
        needed = len(self.prefix_ids) + num_body_tokens + len(self.suffix_ids) + MIN_ROOM
        if self._limits.max_length < needed:
            raise ConfigError(
                f"max_length is {self._limits.max_length}; it must be at least {needed}: the template and the default "
                f"instruction take {needed - MIN_ROOM} tokens, and query and document need {MIN_ROOM}"
            )

    def _warn_once(self, message: str, *values: object) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message + " (logged once)", *values)

    def _billed_tokens(self, pair: Pair) -> int:
        """Tokens of instruction, query and document, as the hosted service bills them (from live samples)."""
        return pair.num_tokens - len(self.prefix_ids) - len(self.suffix_ids) - self._num_label_tokens

    def _encode_in_chunks(self, documents: list[str]) -> Iterator[tuple[str, bytes]]:
        """Each document with the ids of " " + document. Lazy, so that a request over its limit is refused early."""
        chunk: list[str] = []
        num_chars = 0
        for number, document in enumerate(documents, 1):
            chunk.append(document)
            num_chars += len(document)
            if number == len(documents) or num_chars > CHUNK_CHARS:
                yield from zip(chunk, self._encode([" " + text for text in chunk]), strict=True)
                chunk, num_chars = [], 0

    def _check_base_vocabulary(self) -> None:
        """Raise CheckpointError if text could become a control token, which must be an added token alone."""
        added = {each.content: id for id, each in self._full.get_added_tokens_decoder().items()}
        control = [text for text in added if _MARKUP.fullmatch(text)]
        for text in dict.fromkeys(control + _CONTROL_TOKEN.findall(self.template.prefix + self.template.suffix)):
            base = self._plain.id_to_token(added[text]) if text in added else None
            base = base if self._plain.token_to_id(text) is None else text
            if base is not None:
                what = f"the base vocabulary has {base!r} for the control token {text}, so that text could produce it"
                raise CheckpointError(f"{what}; use the tokenizer.json of the base model")

    def _control_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a template text. Each control token in it must be a single token of the vocabulary."""
        encoding = self._full.encode(text, add_special_tokens=False)
        for match in _CONTROL_TOKEN.finditer(text):
            if not any(start <= match.start() and match.end() <= end for start, end in encoding.offsets):
                raise CheckpointError(f"the tokenizer does not know the control token {match[0]}: not a reranker")
        return tuple(encoding.ids)

    def _answer_id(self, answer: str) -> int:
        ids = to_ids(self._encode([answer])[0])
        if len(ids) != 1:
            raise CheckpointError(f"the tokenizer splits the answer {answer!r} into {len(ids)} tokens; it must be one")
        return ids[0]

    def _cut_text(self, text: str, limit: int, from_start: bool) -> str:
        """The part of a text that its first or last `limit` tokens cover."""
        offsets = self._plain.encode(text, add_special_tokens=False).offsets
        return text[offsets[-limit][0] :] if from_start else text[: offsets[limit - 1][1]]


def clean(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, with U+FFFD."""
    try:
        text.encode()  # takes a tenth of the time of the search
        return text
    except UnicodeEncodeError:
        return _LONE_SURROGATES.sub("\ufffd", text)
