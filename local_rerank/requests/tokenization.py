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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path

from tokenizers import Tokenizer

from local_rerank.errors import (
    CheckpointError,
    ConfigError,
    InstructionTooLong,
    InvalidRequest,
    LocalRerankError,
    TextTooLong,
)
from local_rerank.requests.chunks import Bounds, sentences
from local_rerank.requests.encoders import (
    CONTROL_TOKEN,
    check_base_vocabulary,
    clean,
    cut_text,
    fastest,
    with_tokenizers,
    without_added_tokens,
)
from local_rerank.requests.pair import ID_BYTES, Pair, TokenizedRequest, to_bytes, to_ids
from local_rerank.requests.parts import Cutting, PromptLimits, check_num_chunks, check_num_tokens, parts_of
from local_rerank.requests.prompts import PromptTemplate
from local_rerank.text_files import open_utf8
from local_rerank.types import RerankRequest, Truncation

MAX_INSTRUCTION_TOKENS = 1024
DOCUMENT_SHARE = 4  # a document keeps 1/4 of the room for query and document
MIN_ROOM = 32  # tokens for query and document; with less, what is left of them says little and the scores tie
ENCODED_CHARS = 1_000_000  # at once; takes about 0.5 s with tokenizers, 0.05 s with fastokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestQuery:
    """The query of a request and what decides how much of it is used."""

    instruction: str
    text: str
    num_tokens: int  # of the text
    num_wanted_tokens: int  # within the query's own limits
    max_document_tokens: int  # of a document or a chunk
    max_prompt_tokens: int
    truncation: Truncation


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPrefix:
    """The ids before a document, with all of the query or a part of it."""

    ids: bytes  # see `pair.py`
    num_query_tokens: int
    room: int  # tokens left for the document; negative if there are too many without it


class PairTokenizer:
    """A checkpoint's tokenizer in two copies: with control tokens for the template, without them for user text."""

    document_lead = " "  # encoded with a document
    num_types = 1  # token types that the model tells apart

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
        check_base_vocabulary(self._full, self._plain, template.prefix + template.suffix)
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
        cls, folder: Path, *template: PromptTemplate, limits: PromptLimits, default_instruction: str
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
            return cls(text, *template, limits=limits, default_instruction=default_instruction)
        except LocalRerankError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def use_fastest(self) -> None:
        """Encode with fastokens from now on, if it can be used here. It takes 1.4 s to load Qwen's tokenizer."""
        self._encode = fastest(self._plain)

    @property
    def answer_ids(self) -> tuple[int, int] | None:
        """The ids of "yes" and "no"; None for a model that computes a score itself."""
        return self.yes_id, self.no_id

    @property
    def num_ids(self) -> int:
        """The number of token ids that prompts can have: user text has no added tokens."""
        template_ids = (*self.prefix_ids, *self.suffix_ids, self.yes_id, self.no_id)
        return max(self._plain.get_vocab_size(with_added_tokens=False), max(template_ids) + 1)

    def pairs(self, request: RerankRequest) -> TokenizedRequest:
        """Encode a request. Raises a leaf of InvalidRequest."""
        as_sent, (request, unwrapped) = request.documents, self._unwrapped(request)
        query, cutting = self._query(request), Cutting.of(request, self._limits)
        whole, shortened = self._prefix(query, query.num_wanted_tokens), None
        documents = [clean(document) for document in request.documents]
        repeats = Counter(documents)  # in the order in which documents first occur
        place = {document: position for position, document in enumerate(repeats)}
        pairs: list[Pair] = []
        bounds: list[Bounds] = []
        ranges: list[range] = []
        cuts: list[int] = []
        num_request_tokens = num_request_chunks = 0  # as `Limits` counts them
        longest: list[int] = []  # tokens of each document's longest part, of which spans may be scored
        suffix = to_bytes(self.suffix_ids)
        for document, ids in self._encode_in_turn(list(repeats)):
            prefix, num_tokens = whole, len(ids) // ID_BYTES
            if min(num_tokens, query.max_document_tokens) > whole.room:
                prefix = shortened = shortened or self._shortened(whole, query)
            parts, num_cut = parts_of(
                document, ids, prefix.room, cutting, self._plain, encode=self._encode, lead=self.document_lead
            )
            if len(parts) > 1 or (num_cut and query.truncation == "error"):
                field = f"documents[{documents.index(document)}]"
                if num_cut and query.truncation == "error":
                    raise TextTooLong(field=field, limit=num_tokens - num_cut, value=num_tokens)
                num_request_chunks += repeats[document] * len(parts)
                check_num_chunks(request, field, num_chunks=len(parts), num_request_chunks=num_request_chunks)
            ranges.append(range(len(pairs), len(pairs) + len(parts)))
            pairs += [self._pair(prefix.ids, part + suffix) for _, part in parts]
            bounds += [part_bounds for part_bounds, _ in parts]
            cuts.append(num_cut)
            num_part_tokens = [len(part) // ID_BYTES for _, part in parts]
            longest += repeats[document] * [max(num_part_tokens)] if request.spans else []
            num_request_tokens += repeats[document] * (len(parts) * prefix.num_query_tokens + sum(num_part_tokens))
            check_num_tokens(request, num_request_tokens)
        check_num_tokens(request, num_request_tokens + sum(nlargest(request.top_n or len(documents), longest)))
        num_query_tokens = (shortened or whole).num_query_tokens
        num_query_cut = query.num_tokens - num_query_tokens
        if num_query_cut and request.max_query_tokens is request.max_prompt_tokens is None:  # else it asked for that
            what = "a query was cut by %d tokens to %d; max_query_tokens and max_length are the limits"
            self._warn_once(what, num_query_cut, num_query_tokens)
        return TokenizedRequest(
            pairs=tuple(pairs),
            pairs_of_document=tuple(ranges[place[document]] for document in documents),
            bounds=tuple(bounds) if cutting.with_bounds else None,
            text_starts=tuple(map(self.template.start_of_text, as_sent)) if unwrapped else None,
            num_best_chunks=request.num_best_chunks or self._limits.num_best_chunks,
            num_truncated_tokens=tuple(cuts[place[document]] for document in documents),
            num_query_tokens=num_query_tokens,
            num_query_truncated_tokens=num_query_cut,
            unwrapped=unwrapped,
            has_default_instruction=query.instruction == self._instruction(None),
            num_suffix_tokens=len(self.suffix_ids),
            num_unbilled_tokens=pairs[0].num_tokens - self._billed_tokens(pairs[0]),
            total_tokens=sum(
                repeats[text] * self._billed_tokens(pairs[i]) for text, at in place.items() for i in ranges[at]
            ),
        )

    def span_pairs(self, document: str, bounds: Bounds, pair: Pair) -> list[tuple[Bounds, Pair]]:
        """The sentences of a part of a document as sent, each as a document behind the prefix of the part's pair."""
        text, suffix = clean(document), to_bytes(self.suffix_ids)
        spans = sentences(text, bounds)
        before = pair.ids_before_document
        most = ID_BYTES * pair.num_tokens - len(before) - len(suffix)  # a sentence may be a token longer by itself
        encoded = self._encode([self.document_lead + text[start:end] for start, end in spans]) if spans else []
        return [(span, self._pair(before, ids[:most] + suffix)) for span, ids in zip(spans, encoded, strict=True)]

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

    def _query(self, request: RerankRequest) -> RequestQuery:
        instruction = self._instruction(request.instruction)
        num_instruction_tokens = self.count_tokens(instruction)
        if num_instruction_tokens > MAX_INSTRUCTION_TOKENS:
            raise InstructionTooLong(limit=MAX_INSTRUCTION_TOKENS, value=num_instruction_tokens)
        text, limits = clean(request.query), self._limits
        num_tokens = self.count_tokens(text)
        num_wanted = min(num_tokens, limits.max_query_tokens, request.max_query_tokens or num_tokens)
        if num_wanted < num_tokens and request.truncation == "error":
            raise TextTooLong(field="query", limit=num_wanted, value=num_tokens)
        return RequestQuery(
            instruction=instruction,
            text=text,
            num_tokens=num_tokens,
            num_wanted_tokens=num_wanted,
            max_document_tokens=Cutting.of(request, limits).max_part_tokens,
            max_prompt_tokens=min(limits.max_length, request.max_prompt_tokens or limits.max_length),
            truncation=request.truncation,
        )

    def _prefix(self, query: RequestQuery, num_query_tokens: int) -> RequestPrefix:
        text = query.text
        if num_query_tokens < query.num_tokens:
            text = cut_text(self._plain, text, num_query_tokens, query.truncation == "start")
        ids = self._ids_before_document(query, text)
        room = query.max_prompt_tokens - len(ids) // ID_BYTES - len(self.suffix_ids)
        return RequestPrefix(ids=ids, num_query_tokens=num_query_tokens, room=room)

    def _instruction(self, asked: str | None) -> str:
        return clean(self._default_instruction if asked is None else asked)

    def _ids_before_document(self, query: RequestQuery, text: str) -> bytes:
        return to_bytes(self.prefix_ids) + self._encode([self.template.shared_body(query.instruction, text)])[0]

    def _pair(self, before: bytes, ids: bytes) -> Pair:
        return Pair(before, ids)

    def _shortened(self, whole: RequestPrefix, query: RequestQuery) -> RequestPrefix:
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

    def _no_room(self, query: RequestQuery, *, num_fixed_tokens: int) -> InvalidRequest:
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

    def _encode_in_turn(self, documents: list[str]) -> Iterator[tuple[str, bytes]]:
        """Each document with its ids. Lazy, so that a request over its limit is refused early."""
        some: list[str] = []
        num_chars = 0
        for number, document in enumerate(documents, 1):
            some.append(document)
            num_chars += len(document)
            if number == len(documents) or num_chars > ENCODED_CHARS:
                yield from zip(some, self._encode([self.document_lead + text for text in some]), strict=True)
                some, num_chars = [], 0

    def _control_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a template text. Each control token in it must be a single token of the vocabulary."""
        encoding = self._full.encode(text, add_special_tokens=False)
        for match in CONTROL_TOKEN.finditer(text):
            if not any(start <= match.start() and match.end() <= end for start, end in encoding.offsets):
                raise CheckpointError(f"the tokenizer does not know the control token {match[0]}: not a reranker")
        return tuple(encoding.ids)

    def _answer_id(self, answer: str) -> int:
        ids = to_ids(self._encode([answer])[0])
        if len(ids) != 1:
            raise CheckpointError(f"the tokenizer splits the answer {answer!r} into {len(ids)} tokens; it must be one")
        return ids[0]
