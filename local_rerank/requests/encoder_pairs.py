"""RerankRequest -> TokenizedRequest for encoders: query and document as the tokenizer's own pair template joins them.

The template is the post-processor in tokenizer.json: for BERT `[CLS] query [SEP] document [SEP]`, with token type 1
from the document on. A pair is one segment, whose tokens all see each other, so no prefix is shared and a `Pair`'s
prefix is empty. An instruction has no place in it.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from local_rerank.config import DEFAULT_INSTRUCTION
from local_rerank.errors import CheckpointError, ConfigError
from local_rerank.requests.encoders import with_tokenizers, without_added_tokens
from local_rerank.requests.pair import ID_BYTES, Pair, to_bytes
from local_rerank.requests.parts import PromptLimits
from local_rerank.requests.tokenization import MIN_ROOM, PairTokenizer, RequestQuery
from local_rerank.types import RerankRequest

UNTYPED = "\U0010ffff"  # a noncharacter: begins the names of control tokens where text could otherwise produce them


class EncoderTokenizer(PairTokenizer):
    """A `PairTokenizer` for tokenizers that join two texts themselves."""

    document_lead = ""

    def __init__(self, tokenizer_json: str, *, limits: PromptLimits, default_instruction: str) -> None:
        """`default_instruction`: the one that a request may have without a warning."""
        self._full = Tokenizer.from_str(tokenizer_json)
        self._full.no_truncation()
        self._full.no_padding()
        self._plain = without_added_tokens(Tokenizer.from_str(_without_control_tokens(tokenizer_json)))
        self._encode = with_tokenizers(self._plain)
        self._limits = limits
        self._default_instruction = default_instruction
        self._said: set[str] = set()
        self.prefix_ids, self._middle_ids, self.suffix_ids, self._typed_part = _pair_template(self._full)
        self.num_types = 1 if self._typed_part is None else 2
        self._num_template_tokens = len(self.prefix_ids) + len(self._middle_ids) + len(self.suffix_ids)
        if limits.max_length < (needed := self._num_template_tokens + MIN_ROOM):
            what = f"max_length is {limits.max_length}; it must be at least {needed}: query and document need"
            raise ConfigError(f"{what} {MIN_ROOM} tokens, and those around them take {self._num_template_tokens}")

    @property
    def answer_ids(self) -> None:
        """See `PairTokenizer`."""

    @property
    def num_ids(self) -> int:
        """See `PairTokenizer`."""
        template_ids = (*self.prefix_ids, *self._middle_ids, *self.suffix_ids)
        return max(self._plain.get_vocab_size(with_added_tokens=False), max(template_ids, default=0) + 1)

    def _unwrapped(self, request: RerankRequest) -> tuple[RerankRequest, bool]:
        defaults = (self._default_instruction, DEFAULT_INSTRUCTION, DEFAULT_INSTRUCTION + ".")  # the last: DashScope's
        if request.instruction not in (None, *defaults):
            self._warn_once("requests have an instruction, which this model does not read; it is ignored")
        return request, False

    def _instruction(self, asked: str | None) -> str:
        return ""

    def _ids_before_document(self, query: RequestQuery, text: str) -> bytes:
        return to_bytes(self.prefix_ids) + self._encode([text])[0] + to_bytes(self._middle_ids)

    def _pair(self, before: bytes, ids: bytes) -> Pair:
        num_before, num_tokens = len(before) // ID_BYTES, (len(before) + len(ids)) // ID_BYTES
        starts = {"middle": num_before - len(self._middle_ids), "document": num_before, None: num_tokens}
        return Pair(b"", before + ids, num_query_tokens=num_before, first_typed=starts[self._typed_part])

    def _billed_tokens(self, pair: Pair) -> int:
        """Tokens of query and document."""
        return pair.num_tokens - self._num_template_tokens


def _pair_template(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str | None]:
    """The ids before the query, between query and document and after it, and where token type 1 begins.

    The last is "middle", "document" or None without token types. Raises CheckpointError for a template that does not
    put both texts in order.
    """
    pair = tokenizer.encode("a", "a")
    parts = pair.sequence_ids  # 0 and 1 for tokens of the texts, None for others
    places = [[index for index, part in enumerate(parts) if part == text] for text in (0, 1)]
    if not all(places) or places[0][-1] > places[1][0]:
        raise CheckpointError("tokenizer.json has a post-processor that does not join a query and a document")
    ids, types, (query, document) = pair.ids, pair.type_ids, places
    middle = query[-1] + 1
    template = tuple(ids[: query[0]]), tuple(ids[middle : document[0]]), tuple(ids[document[-1] + 1 :])
    for part, start in {"middle": middle, "document": document[0], None: len(ids)}.items():
        if types == [0] * start + [1] * (len(types) - start):
            return *template, part
    raise CheckpointError("tokenizer.json has a post-processor whose token types do not begin with the document")


def _without_control_tokens(tokenizer_json: str) -> str:
    """The tokenizer with other names for control tokens in its vocabulary, so that no text produces them.

    In the vocabularies of XLM-RoBERTa's tokenizers `</s>` is a piece with the best score of all.
    """
    tokenizer: dict[str, Any] = json.loads(tokenizer_json)
    model = tokenizer["model"]
    control = {token["content"] for token in tokenizer.get("added_tokens", ()) if token.get("special")}
    control -= {model.get("unk_token")}  # WordPiece looks it up by its name
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {UNTYPED + text if text in control else text: id for text, id in model["vocab"].items()}
    else:
        pieces = model.get("vocab") or ()
        model["vocab"] = [[UNTYPED + text if text in control else text, *rest] for text, *rest in pieces]
    return json.dumps({**tokenizer, "added_tokens": [], "post_processor": None}, ensure_ascii=False)
