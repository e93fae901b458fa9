"""Texts -> token ids as bytes, four for each id (see `pair.py`).

fastokens encodes byte-level BPE about thirty times as fast as tokenizers, and makes no Python integers. It serves a
tokenizer of this kind if both give the same ids for `check_texts`; tokenizers serves all others.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from tokenizers import Tokenizer
from tokenizers.models import BPE

from local_rerank import forks
from local_rerank.errors import CheckpointError
from local_rerank.requests.pair import ID_BYTES, to_bytes

Encode = Callable[[Sequence[str]], list[bytes]]
"""The ids of each text, without special tokens. Texts must be valid in UTF-8."""

CHECK_STEP = 193  # between code points; a prime, so that it is no step of any script's table
LAST_CODE_POINT = 0x3FFFF  # the planes above hold no assigned characters but tags and private use
SURROGATES = range(0xD800, 0xE000)
CONTROL_TOKEN = re.compile(r"<\|\w+\|>|</?think>")
_MARKUP = re.compile(r"<[^<>\s]+>")  # such as <|im_end|>, <think> and <tool_call>

_LONE_SURROGATES = re.compile("[\ud800-\udfff]")

logger = logging.getLogger(__name__)


def without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer for text in which control tokens mean nothing; it shares the vocabulary."""
    plain = Tokenizer(tokenizer.model)
    plain.normalizer, plain.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    plain.post_processor = tokenizer.post_processor  # it trims offsets
    return plain


def check_base_vocabulary(full: Tokenizer, plain: Tokenizer, template: str) -> None:
    """Raise CheckpointError if text could become a control token, which must be an added token alone."""
    added = {each.content: id for id, each in full.get_added_tokens_decoder().items()}
    control = [text for text in added if _MARKUP.fullmatch(text)]
    for text in dict.fromkeys(control + CONTROL_TOKEN.findall(template)):
        base = plain.id_to_token(added[text]) if text in added else None
        base = base if plain.token_to_id(text) is None else text
        if base is not None:
            what = f"the base vocabulary has {base!r} for the control token {text}, so that text could produce it"
            raise CheckpointError(f"{what}; use the tokenizer.json of the base model")


def with_tokenizers(tokenizer: Tokenizer) -> Encode:
    def encode(texts: Sequence[str]) -> list[bytes]:
        if len(texts) == 1:  # without waking its threads
            return [to_bytes(tokenizer.encode(texts[0], add_special_tokens=False).ids)]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [to_bytes(encoding.ids) for encoding in encodings]

    return encode


def with_fastokens(original: Tokenizer) -> Encode | None:
    """An encoder that does what `original` should do; None if fastokens cannot be used."""
    if not isinstance(original.model, BPE):
        return None
    # its own threads gain nothing at this speed, and a forked child could inherit a lock that one of them holds
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
    try:
        import fastokens

        with forks.encoding():
            tokenizer = fastokens.Tokenizer.from_json_str(original.to_str())
    except Exception as error:  # no wheel for this platform, or whatever fastokens raises on a tokenizer unknown to it
        logger.debug("fastokens cannot be used (%s: %s)", type(error).__name__, error)
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: Sequence[str]) -> list[bytes]:
        with forks.encoding():
            ids, offsets = tokenizer.encode_batch_flat(list(texts))
        bounds = memoryview(offsets).cast("Q").tolist()
        return [ids[ID_BYTES * start : ID_BYTES * end] for start, end in pairwise(bounds)]

    return encode


def fastest(tokenizer: Tokenizer) -> Encode:
    """The fastest encoder with the ids of `tokenizer`, which must know no added tokens."""
    fast, exact = with_fastokens(tokenizer), with_tokenizers(tokenizer)
    return exact if fast is None else checked(fast, exact)


def checked(fast: Encode, exact: Encode) -> Encode:
    """`fast` if it gives the ids of `exact` for each of `check_texts`, else `exact`."""
    texts = list(check_texts())
    wrong = [text for text, ours, theirs in zip(texts, fast(texts), exact(texts), strict=True) if ours != theirs]
    if not wrong:
        return fast
    logger.warning(
        "fastokens gives other ids than tokenizers for %d of %d texts, such as %r; tokenizers encodes, more slowly",
        len(wrong), len(texts), wrong[0],
    )  # fmt: skip
    return exact


def check_texts() -> Iterator[str]:
    """Each class of characters that a pre-tokenizer may split at, between letters, digits, spaces and itself."""
    yield from ("", " ", "   a", " \n \n\n  b\t\tc\r\n", "I'm we'LL they've DON'T it's'd", "1 12 1234567 3.14 1,000")
    yield from ("<|im_end|><think></think><|endoftext|> <Query>: {}", "a" * 300, "!?" * 100, "x=1;\n\n  return(y)")
    yield from ("e\u0301 \xe9 \ufb01 \u1e9b\u0323 \u3131\u1161 z\u0300\u0316", "\U0001f469\u200d\U0001f467 \U0001f1eb")
    for code in range(0, LAST_CODE_POINT, CHECK_STEP):
        if code not in SURROGATES:
            character = chr(code)
            yield f"{character}|a{character}1 {character}b {character}{character}\n{character}'s{character} {character}"


def clean(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, with U+FFFD."""
    try:
        text.encode()  # takes a tenth of the time of the search
        return text
    except UnicodeEncodeError:
        return _LONE_SURROGATES.sub("\ufffd", text)


def cut_text(tokenizer: Tokenizer, text: str, limit: int, from_start: bool) -> str:
    """The part of a text that its first or last `limit` tokens cover."""
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    return text[offsets[-limit][0] :] if from_start else text[: offsets[limit - 1][1]]
