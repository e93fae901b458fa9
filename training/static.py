"""Step 5a: initialize the encoder: train its embedding table alone on the teachers' text vectors.

A text's vector is the mean of its rows, as in the encoder before its blocks are trained. This takes minutes, because
only the rows of a batch are updated (lazy Adam).

``python static.py --work training/work`` writes ``static.npy``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from encoder import POOL, Encoder, likeness
from encoder_texts import Corpus, TaughtTexts
from pieces import is_cjk, piece_vectors, rarities
from teach import load_space
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize
from tqdm import tqdm

SEED = 20261124


def initial(work: Path) -> Tensor:
    """Initialize rows from the teachers' vectors of single pieces, longer for rarer ones."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    vectors = piece_vectors(work, pieces)
    chinese = np.array([is_cjk(p) for p in pieces])[:, None]
    rows = np.where(chinese, load_space(work, "zh").place(vectors, True), load_space(work, "en").place(vectors, True))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-6
    rows *= (0.1 + 0.9 * np.minimum(1, rarities(work, tokenizer)))[:, None]
    rows[[0, 1, 2, 3, *range(len(pieces) - 3, len(pieces))]] = 0  # [UNK], the markers, the added tokens
    return torch.from_numpy(rows.astype(np.float32))


def flat(texts: TaughtTexts, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated ids of the chosen texts, and their lengths."""
    spans = [texts.ids[texts.starts[r] : texts.starts[r] + texts.lengths[r]] for r in rows]
    return np.concatenate(spans).astype(np.int64), texts.lengths[rows]


def pooled(table: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """Return text vectors as the untrained encoder computes them."""
    starts = torch.cumsum(lengths, 0) - lengths
    return POOL * embedding_bag(ids, table * Encoder.scales(table), starts, mode="sum") / (lengths[:, None] + 1.5)


class LazyAdam:
    """Adam that updates some rows of a table at a time."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.first, self.second = table, torch.zeros_like(table), torch.zeros_like(table)
        self.count = torch.zeros(len(table), 1)

    def step(self, rows: Tensor, gradient: Tensor, rate: float) -> None:
        """Update `rows`."""
        self.count[rows] += 1
        self.first[rows] = 0.9 * self.first[rows] + 0.1 * gradient
        self.second[rows] = 0.99 * self.second[rows] + 0.01 * gradient.pow(2)
        first = self.first[rows] / (1 - 0.9 ** self.count[rows])
        second = self.second[rows] / (1 - 0.99 ** self.count[rows])
        self.table[rows] -= rate * first / (second.sqrt() + 1e-8)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(SEED)
    work = arguments.work
    table = initial(work)
    frozen = table.abs().sum(1) == 0
    corpora = {language: Corpus(work, language) for language in ("en", "zh")}
    optimizer = LazyAdam(table)
    recent: list[dict[str, float]] = []
    for step in tqdm(range(arguments.steps), mininterval=10):
        corpus = corpora["zh" if step % 3 == 2 else "en"]
        rows = rng.choice(corpus.kept, 256, replace=False)
        asked = np.array([rng.choice(corpus.asked[r]) for r in rows.tolist() if r in corpus.asked][:96])
        extra = rng.choice(len(corpus.extra.lengths), 64, replace=False)
        parts = ((corpus.passages, rows), (corpus.extra, extra), (corpus.queries, asked))
        found = [flat(texts, chosen) for texts, chosen in parts]
        ids, lengths = (torch.from_numpy(np.concatenate([f[i] for f in found])) for i in (0, 1))
        used, local = ids.unique(return_inverse=True)
        leaf = table[used].requires_grad_()
        vectors = pooled(leaf, local, lengths)
        target = torch.from_numpy(np.concatenate([texts.vectors[chosen] for texts, chosen in parts]))
        loss = likeness(normalize(vectors, dim=1), target, torch.tensor(12.0))
        loss["size"] = (vectors.norm(dim=1) - 1).pow(2).mean()
        gradient = torch.autograd.grad(2 * loss["text"] + loss["like"] + 0.5 * loss["size"], leaf)[0]
        gradient[frozen[used]] = 0
        optimizer.step(used, gradient, arguments.lr * (1 - step / arguments.steps) * min(1, (step + 1) / 50))
        recent.append({name: value.item() for name, value in loss.items()})
        if step % 100 == 99:
            print(step + 1, json.dumps({k: round(float(np.mean([r[k] for r in recent[-100:]])), 4) for k in loss}),
                  flush=True)  # fmt: skip
    np.save(work / "static.npy", table.numpy())


if __name__ == "__main__":
    main()
