"""Step 5b: compile the decoder: BM25 written as Qwen3 weights, beside the encoder that ``encoder.py`` trained.

The residual stream has two halves. The semantic one is the encoder's, row by row and block by block. The lexical one is
filled by hand, and it also keeps the encoder's texts apart:

* embedding: the encoder's row; a random code of the word's stem; features (constant, idf, marker flags, a filling that
  makes the length of this half the same for every token);
* layer 0: one head marks query and document, one copies half of the code of the previous token (word pairs, bigrams);
* layer 1: every document token looks for its code and its pair among the query's tokens, with the first token as "no
  match", and carries the idf of what it found; one head counts earlier occurrences of the same stem, and the
  feed-forward part multiplies (term-frequency saturation); one sums up the query for the last token;
* layer 2: the last token sums the matches over the document, divided by its length plus a constant, as BM25 does;
* layers 0 to 3: the encoder's heads and units, each token among those of its own segment;
* layer 4: the document marker collects the query's mean state, the last token the document's, and the encoder's last
  part works on both; every document token looks for its state among the query's;
* layer 5: the last token compares the two means in `PARTS` heads and sums the likenesses of states; ``fit.py`` fills
  the feed-forward part, which weighs all of this.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import vocabulary
from encoder import HEADS, OTHERS, OWN, POOL, SEGMENT, SINK, TEMPERATURE, UNITS
from layer_weights import FILLED, NEAR, PART, PARTS, SLOTS, WASTE, D, Head, L, P, S, Weights
from model import Nano, Shape
from pieces import CODE, codes, is_cjk, rarities, stems
from safetensors.numpy import load_file
from teach import WIDTH
from tokenizers import Tokenizer


def embeddings(work: Path, tokenizer: Tokenizer, shape: Shape, semantic: np.ndarray) -> np.ndarray:
    """The embedding table: the encoder's rows and the lexical features."""
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    words = np.arange(4, len(pieces) - len(vocabulary.ADDED))
    rarity = rarities(work, tokenizer)[words]
    han = np.array([is_cjk(p) for p in pieces])[words]
    table = np.zeros((shape.vocabulary, shape.hidden), np.float32)
    table[words, S] = semantic[words]
    table[words, L] = codes(stems(pieces, work))[words]
    table[0, L] = codes([vocabulary.UNKNOWN])[0]
    table[words, D["RARITY"]] = rarity
    table[words, D["IDF"]] = rarity * np.where(han, 0.35, 1.0)
    table[words, D["PAIR"]] = rarity * np.where(han, 0.5, 0.12)
    table[words, D["HAN"]] = han
    constants = {vocabulary.PREFIX: "FIRST", vocabulary.SUFFIX: "LAST", vocabulary.QUERY: "QUERY_MARK",
                 vocabulary.DOCUMENT: "DOCUMENT_MARK"}  # fmt: skip
    for token, flag in constants.items():
        table[tokenizer.token_to_id(token), D[flag]] = 1
    table[:, D["ONE"]] = 1
    for word, sign in (("yes", 1), ("no", -1)):
        row = tokenizer.token_to_id(word)
        table[row, D["SCORE"]], table[row, D["BIAS"]] = sign, sign * 0.1
    table[tokenizer.token_to_id(vocabulary.SUFFIX), D["BIAS"]] = 1
    table[:, D["PAD"]] = np.sqrt(FILLED - (table[:, WIDTH:] ** 2).sum(1))
    return table


def layer_0(shape: Shape) -> Weights:
    """Segments and previous tokens."""
    weights = Weights(shape, FILLED + OWN / 2)
    segment = weights.head(0)
    for dim, flag, value in ((SINK, "FIRST", 0.3), (8, "QUERY_MARK", 0.55), (9, "DOCUMENT_MARK", 0.78)):
        segment.query(dim, D["ONE"], value)
        segment.key(dim, D[flag])
    segment.carry(D["QUERY_MARK"], D["IN_QUERY"])
    segment.carry(D["DOCUMENT_MARK"], D["IN_DOCUMENT"])
    previous = weights.head(1)
    for pair, share in enumerate((0.5, 0.25, 0.15, 0.1)):
        angle = -(shape.theta ** (-2 * pair / shape.head))
        previous.query(pair, D["ONE"], math.sqrt(share) * math.cos(angle))
        previous.query(pair + 32, D["ONE"], math.sqrt(share) * math.sin(angle))
        previous.key(pair, D["ONE"], math.sqrt(share))
    for i in range(CODE // 2):
        previous.carry(L.start + CODE // 2 + i, P.start + i)
    previous.carry(D["PAIR"], D["PREVIOUS_PAIR"])
    return weights


def match_head(
    head: Head,
    reads: list[tuple[int, int]],
    sharp: float,
    threshold: float,
    segment: tuple[str, str],
    scale: float = 1.0,
) -> None:
    """Attend from a token to tokens of `segment[0]` (not of `segment[1]`) whose `reads` agree, else to the first token.

    Keys are (code, segment) / sqrt(2), so a logit is T/sqrt(2) * (sharp * cosine + 0.5); the sink lies at `threshold`.
    """
    for dim, source in reads:
        head.query(dim, source, sharp * scale)
        head.key(dim, source, scale)
    head.query(SEGMENT, D["ONE"], 0.5)
    head.key(SEGMENT, D[segment[0]], 1.0)
    head.key(SEGMENT, D[segment[1]], -1.0)
    sink = math.sqrt(0.5) * (sharp * threshold + 0.5)
    head.query(SINK, D["ONE"], sink)
    head.key(SINK, D["FIRST"], 1.0)
    head.norm([sharp, 0.5, sink], D["ONE"])


def layer_1(shape: Shape) -> Weights:
    """Matches of words and pairs, repetitions, the sum of the query. The encoder has the first four heads."""
    weights = Weights(shape, OTHERS + OWN)
    single = weights.head(4)
    code = [(SLOTS[i], L.start + i) for i in range(CODE)]
    match_head(single, code, 0.5, 0.75, ("IN_QUERY", "IN_DOCUMENT"))
    single.carry(D["IDF"], D["MATCH"])
    double = weights.head(5)
    half = CODE // 2
    reads = [(SLOTS[i], L.start + i if i < half else P.start + i - half) for i in range(CODE)]
    match_head(double, reads, 0.5, 0.8, ("IN_QUERY", "IN_DOCUMENT"))
    double.carry(D["PAIR"], D["MATCH"])
    double.carry(D["PREVIOUS_PAIR"], D["MATCH"])
    repeat = weights.head(6)
    equal = 1.0 + math.log(0.7) / (TEMPERATURE * math.sqrt(0.5) * 0.5)
    match_head(repeat, code, 0.5, equal, ("IN_DOCUMENT", "IN_QUERY"))
    repeat.carry(D["FIRST"], D["NEW"])
    total = weights.head(7)
    total.query(8, D["LAST"], 0.4)
    total.query(SINK, D["LAST"], 0.38 + math.log(60) / TEMPERATURE)
    total.query(WASTE, D["LAST"], 0.8)
    total.query(SINK, D["ONE"], 0.02)
    total.key(8, D["IN_QUERY"])
    total.key(8, D["IN_DOCUMENT"], -1.0)
    total.key(SINK, D["FIRST"])
    total.carry(D["RARITY"], D["QUERY_IDF"], 8.0)
    total.carry(D["HAN"], D["QUERY_HAN"], 4.0)
    weights.unit(UNITS, {D["NEW"]: 20.0, D["ONE"]: -2.6}, {D["MATCH"]: 1.0}, {D["GAIN"]: 1 / 8})
    return weights


def layer_2(shape: Shape) -> Weights:
    """Sums over the document. The encoder has the first five heads."""
    weights = Weights(shape, OTHERS + OWN)
    for index, constant, target, scale in ((5, 120.0, "SHORT", 40.0), (6, 600.0, "LONG", 130.0)):
        mean = weights.head(index)
        sum_head(mean, constant)
        mean.carry(D["GAIN"], D[target], scale)
    mean.carry(D["IN_DOCUMENT"], D["LENGTH"], 3.0)
    peak = weights.head(7)
    peak_head(peak, "GAIN")
    peak.carry(D["GAIN"], D["PEAK"], 2.0)
    return weights


def sum_head(head: Head, constant: float) -> None:
    """The last token attends to the document's tokens alike, and to the first token as to `constant` of them."""
    head.query(8, D["LAST"], 0.4)
    head.query(SINK, D["LAST"], 0.38 + math.log(constant) / TEMPERATURE)
    head.query(WASTE, D["LAST"], 0.75)
    head.query(SINK, D["ONE"], 0.02)
    head.key(8, D["IN_DOCUMENT"])
    head.key(SINK, D["FIRST"])


def peak_head(head: Head, feature: str) -> None:
    """The last token attends to the document's tokens with the largest `feature`."""
    head.query(8, D["LAST"], 0.3)
    head.query(10, D["LAST"], 0.242)
    head.query(WASTE, D["LAST"], 0.92)
    head.query(SINK, D["ONE"], 0.05)
    head.key(8, D["IN_DOCUMENT"])
    head.key(10, D[feature], 4.0)
    head.key(SINK, D["FIRST"])


def layer_4(shape: Shape, size: float) -> Weights:
    """Mean states of query and document; likenesses of states, whose slices have a length of about `size`."""
    weights = Weights(shape, OTHERS + OWN)
    part = WIDTH // 4
    for index in range(4):
        mean = weights.head(index)
        for flag, segment, dim in (("DOCUMENT_MARK", "IN_QUERY", 8), ("LAST", "IN_DOCUMENT", 9)):
            mean.query(dim, D[flag], 0.3)
            mean.query(WASTE, D[flag], 0.95)
            mean.key(dim, D[segment])
        mean.query(SINK, D["ONE"], 0.05)
        mean.key(SINK, D["FIRST"])
        for i in range(index * part, (index + 1) * part):
            mean.carry(S.start + i, S.start + i, POOL)
    for index, first in ((4, 0), (5, PART)):
        soft = weights.head(index)
        reads = [(SLOTS[i], S.start + first + i) for i in range(PART)]
        match_head(soft, reads, 0.38, 0.55, ("IN_QUERY", "IN_DOCUMENT"), 1 / size)
        soft.carry(D["RARITY"], D["SOFT"])
    return weights


def layer_5(shape: Shape) -> Weights:
    """The last token compares the means and sums up the likenesses.

    The norm of a head's query leaves of the document's mean its direction, so that long and short texts compare alike.
    What it attends to is either the query's mean or the first token: constants that outweigh the means in keys keep a
    logit linear in the cosine, and all other tokens far below.
    """
    weights = Weights(shape, OTHERS + OWN)
    for index, target in enumerate(NEAR):
        near = weights.head(index)
        for i in range(PART):
            near.query(SLOTS[i], S.start + index * PART + i, 1.0)
            near.key(SLOTS[i], S.start + index * PART + i, 1.0)
        near.query(SEGMENT, D["LAST"], 0.085)
        near.query(SINK, D["LAST"], 0.085)
        for source, value in (("ONE", -6.0), ("DOCUMENT_MARK", 12.0), ("FIRST", 6.0)):
            near.key(SEGMENT, D[source], value)
        near.key(SINK, D["FIRST"], 6.0)
        near.carry(D["DOCUMENT_MARK"], target)
    added, peak = weights.head(PARTS), weights.head(PARTS + 1)
    sum_head(added, 120.0)
    added.carry(D["SOFT"], D["SOFT_SUM"], 10.0)
    peak_head(peak, "SOFT")
    peak.carry(D["SOFT"], D["SOFT_PEAK"], 1.0)
    return weights


def compile_model(work: Path) -> tuple[Nano, Tokenizer]:
    """The compiled decoder, without the final weighting of its features."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    trained = load_file(work / "encoder.safetensors")
    shape = Shape(vocabulary=-(-tokenizer.get_vocab_size() // 64) * 64)
    if shape.hidden < NEAR.stop:
        raise ValueError(f"{NEAR.stop} dimensions do not fit {shape.hidden}")
    model = Nano(shape, tokenizer.token_to_id("yes"), tokenizer.token_to_id("no"))
    gain = np.zeros(shape.hidden)
    gain[[D["SCORE"], D["BIAS"]]] = 1
    size = 1 / (float(trained["scale"][0]) * math.sqrt(PARTS))
    layers = (layer_0(shape), layer_1(shape), layer_2(shape), Weights(shape, OTHERS + OWN), layer_4(shape, size),
              layer_5(shape))  # fmt: skip
    state = {
        "model.embed_tokens.weight": embeddings(work, tokenizer, shape, trained["table"]),
        "model.norm.weight": gain,
    }
    for index, layer in enumerate(layers):
        if index <= len(HEADS):
            layer.encode(index, trained)
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
