"""RerankRequest -> TokenizedRequest: the prompt of Qwen3-Reranker's model card, token for token.

A pair's ids are `prefix + document`. The prefix ends with `<Document>:`. All pairs of a request share it, so the model
computes it once. The document starts with a space, because a space merges with the word after it, and ends with the
template's suffix. User text is encoded by a copy of the tokenizer without added tokens, so a document that contains
`<|im_end|>` or `<think>` stays plain text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from local_rerank.errors import CheckpointError, InstructionTooLong, InvalidRequest, TextTooLong, TooManyTokens
from local_rerank.requests.prompts import PromptTemplate
from local_rerank.text_files import open_utf8
from local_rerank.types import RerankRequest

MAX_INSTRUCTION_TOKENS = 1024
CHUNK_CHARS = 1_000_000  # encoded at once; takes about 0.5 s
_CONTROL_TOKEN = re.compile(r"<\|\w+\|>|</?think>")
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One query with one document, as token ids."""

    prefix_ids: tuple[int, ...]  # prompt up to and including `<Document>:`; pairs with equal prefixes share it
    document_ids: tuple[int, ...]  # " " + document + suffix

    @property
    def num_tokens(self) -> int:
        return len(self.prefix_ids) + len(self.document_ids)


def num_batch_tokens(pairs: Iterable[Pair]) -> int:
    """Tokens of a packed batch of `pairs`, in which each prefix counts once."""
    lengths: dict[tuple[int, ...], int] = {}
    for pair in pairs:
        lengths[pair.prefix_ids] = lengths.get(pair.prefix_ids, len(pair.prefix_ids)) + len(pair.document_ids)
    return sum(lengths.values())


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

    def num_document_tokens(self, index: int) -> int:
        return len(self.pairs[self.pair_of_document[index]].document_ids) - self.num_suffix_tokens


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
        self._plain = Tokenizer.from_str(json.dumps(json.loads(tokenizer_json) | {"added_tokens": []}))
        for tokenizer in (self._full, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._limits = limits
        self._default_instruction = default_instruction
        self.prefix_ids = self._control_ids(template.prefix)
        self.suffix_ids = self._control_ids(template.suffix)
        labels = (template.instruction_label, template.query_label, template.document_label)
        self._num_label_tokens = sum(len(self._encode(label).ids) for label in labels)
        self.yes_id = self._answer_id(template.yes)
        self.no_id = self._answer_id(template.no)

    @classmethod
    def from_folder(
        cls, folder: Path, template: PromptTemplate, *, limits: PromptLimits, default_instruction: str
    ) -> PairTokenizer:
        """Raises CheckpointError if the folder has no usable tokenizer.json."""
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
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    @property
    def num_ids(self) -> int:
        """The number of token ids that prompts can have: user text has no added tokens."""
        template_ids = (*self.prefix_ids, *self.suffix_ids, self.yes_id, self.no_id)
        return max(self._plain.get_vocab_size(with_added_tokens=False), max(template_ids) + 1)

    def pairs(self, request: RerankRequest) -> TokenizedRequest:
        """Encode a request. Raises a leaf of InvalidRequest."""
        instruction = clean(self._default_instruction if request.instruction is None else request.instruction)
        prefix_ids, num_query_tokens, num_query_cut = self._prefix(instruction, clean(request.query), request)
        documents = [clean(document) for document in request.documents]
        place = {document: position for position, document in enumerate(dict.fromkeys(documents))}
        pair_of_document = tuple(place[document] for document in documents)
        pairs: list[Pair] = []
        cuts: list[int] = []
        num_request_tokens = 0  # as `Limits.max_request_tokens` counts them
        repeats = Counter(documents)
        first_index = {document: index for index, document in reversed(list(enumerate(documents)))}
        for document, ids in self._encode_in_chunks(list(place)):
            kept = self._cut_document(ids, prefix_ids, request, first_index[document])
            pairs.append(Pair(prefix_ids, (*kept, *self.suffix_ids)))
            cuts.append(len(ids) - len(kept))
            num_request_tokens += repeats[document] * (num_query_tokens + len(kept))
            limit = request.limits.max_request_tokens
            if limit is not None and num_request_tokens > limit:
                raise TooManyTokens(limit=limit, value=num_request_tokens)
        return TokenizedRequest(
            pairs=tuple(pairs),
            pair_of_document=pair_of_document,
            num_truncated_tokens=tuple(cuts[i] for i in pair_of_document),
            num_query_tokens=num_query_tokens,
            num_query_truncated_tokens=num_query_cut,
            num_suffix_tokens=len(self.suffix_ids),
            total_tokens=sum(self._billed_tokens(pairs[i]) for i in pair_of_document),
        )

    def count_tokens(self, text: str) -> int:
        """The number of tokens of a text outside a prompt."""
        return len(self._encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, with control tokens."""
        return self._full.decode(list(ids), skip_special_tokens=False)

    def _prefix(self, instruction: str, query: str, request: RerankRequest) -> tuple[tuple[int, ...], int, int]:
        """The prefix ids, the number of query tokens used, and the number cut off."""
        num_instruction_tokens = len(self._encode(instruction).ids)
        if num_instruction_tokens > MAX_INSTRUCTION_TOKENS:
            raise InstructionTooLong(limit=MAX_INSTRUCTION_TOKENS, value=num_instruction_tokens)
        encoding = self._encode(query)
        num_tokens = len(encoding.ids)
        limit = min(num_tokens, self._limits.max_query_tokens, request.max_query_tokens or num_tokens)
        max_length = self._max_prompt_tokens(request)
        while True:
            if limit < num_tokens and request.truncation == "error":
                raise TextTooLong(field="query", limit=limit, value=num_tokens)
            used = _cut_text(query, encoding, limit, request.truncation == "start")
            body_ids = self._encode(self.template.shared_body(instruction, used)).ids
            # an empty document is one token: its space
            over = len(self.prefix_ids) + len(body_ids) + 1 + len(self.suffix_ids) - max_length
            if over <= 0:
                return (*self.prefix_ids, *body_ids), limit, num_tokens - limit
            limit -= over
            if limit < 1:
                if max_length < self._limits.max_length:
                    raise _prompt_too_short(max_length + 1 - limit, max_length)
                fits = max(0, num_instruction_tokens + limit - 1)
                raise InstructionTooLong(limit=fits, value=num_instruction_tokens)

    def _max_prompt_tokens(self, request: RerankRequest) -> int:
        return min(self._limits.max_length, request.max_prompt_tokens or self._limits.max_length)

    def _cut_document(
        self, ids: list[int], prefix_ids: tuple[int, ...], request: RerankRequest, index: int
    ) -> list[int]:
        room = max(1, self._max_prompt_tokens(request) - len(prefix_ids) - len(self.suffix_ids))
        limit = min(room, self._limits.max_document_tokens, request.max_document_tokens or room)
        if len(ids) <= limit:
            return ids
        if request.truncation == "error":
            raise TextTooLong(field=f"documents[{index}]", limit=limit, value=len(ids))
        return ids[-limit:] if request.truncation == "start" else ids[:limit]

    def _billed_tokens(self, pair: Pair) -> int:
        """Tokens of instruction, query and document, as the hosted service bills them (from live samples)."""
        return pair.num_tokens - len(self.prefix_ids) - len(self.suffix_ids) - self._num_label_tokens

    def _encode(self, text: str) -> Encoding:
        return self._plain.encode(text, add_special_tokens=False)

    def _encode_in_chunks(self, documents: list[str]) -> Iterator[tuple[str, list[int]]]:
        """Each document with the ids of " " + document. Lazy, so that a request over its limit is refused early."""
        chunk: list[str] = []
        num_chars = 0
        for number, document in enumerate(documents, 1):
            chunk.append(document)
            num_chars += len(document)
            if number == len(documents) or num_chars > CHUNK_CHARS:
                encodings = self._plain.encode_batch_fast([" " + text for text in chunk], add_special_tokens=False)
                yield from zip(chunk, (encoding.ids for encoding in encodings), strict=True)
                chunk, num_chars = [], 0

    def _control_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a template text. Each control token in it must be a single token of the vocabulary."""
        encoding = self._full.encode(text, add_special_tokens=False)
        for match in _CONTROL_TOKEN.finditer(text):
            if not any(start <= match.start() and match.end() <= end for start, end in encoding.offsets):
                raise CheckpointError(f"the tokenizer does not know the control token {match[0]}: not a reranker")
        return tuple(encoding.ids)

    def _answer_id(self, answer: str) -> int:
        ids = self._encode(answer).ids
        if len(ids) != 1:
            raise CheckpointError(f"the tokenizer splits the answer {answer!r} into {len(ids)} tokens; it must be one")
        return ids[0]


def _prompt_too_short(needed: int, asked: int) -> InvalidRequest:
    what = f"max_prompt_tokens is {asked}, which leaves no room for a query; it must be at least {needed}"
    return InvalidRequest(what, field="max_prompt_tokens", limit=needed, value=asked)


def clean(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, with U+FFFD."""
    return _LONE_SURROGATES.sub("\ufffd", text)


def _cut_text(text: str, encoding: Encoding, limit: int, from_start: bool) -> str:
    """The part of a text that its first or last `limit` tokens cover."""
    if limit == len(encoding.ids):
        return text
    if from_start:
        return text[encoding.offsets[-limit][0] :]
    return text[: encoding.offsets[limit - 1][1]]
