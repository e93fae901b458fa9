"""Step 5a: static meanings. Piece vectors are trained so that mean vectors of texts are as alike as the teachers say.

The compiled model compares the idf-weighted mean vectors of query and document, in two halves of 48 dimensions; the
very same comparison is trained here on its own, which costs minutes. Two losses: within random batches of texts, each
text's distribution over the others; and over the candidates of each query.

``python meaning.py --work training/work`` writes ``meanings.npy``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import data
import numpy as np
import torch
from compile import CODE, MEANING, RARITY, TEMPERATURE, S
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize
from tqdm import tqdm

SEED = 20261123
TOKENS = 96


def attention_weights(rarity: np.ndarray) -> np.ndarray:
    """How much a token counts in the compiled mean (see ``compile.layer_1``)."""
    x = 1.3 * rarity
    return np.exp(TEMPERATURE * ((0.3 + 0.242 * x) / np.sqrt(1 + x * x) - 0.3)).astype(np.float32)


class Means:
    """Mean vectors of texts under the current table."""

    def __init__(self, texts: list[list[int]], weights: np.ndarray) -> None:
        self.texts = [np.array(t[:TOKENS] or [0]) for t in texts]
        self.weights = torch.from_numpy(weights)

    def __call__(self, table: Tensor, rows: np.ndarray) -> Tensor:
        chosen = [self.texts[i] for i in rows]
        ids = torch.from_numpy(np.concatenate(chosen))
        starts = torch.from_numpy(np.cumsum([0, *map(len, chosen[:-1])]))
        sums = embedding_bag(ids, table, starts, mode="sum", per_sample_weights=self.weights[ids])
        return normalize(sums.view(len(rows), 2, CODE), dim=-1).view(len(rows), MEANING) / 2**0.5


def teacher_vectors(work: Path, kind: str, english: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors by MiniLM (English rows only, others zero) and e5."""
    e5 = np.load(work / f"{kind}.e5.npy").astype(np.float32)
    minilm = np.zeros_like(e5)
    minilm[english] = np.load(work / f"{kind}.minilm.npy")[: len(english)].astype(np.float32)
    return minilm, e5


def divergence(wanted: Tensor, given: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of rows of logits."""
    target = torch.log_softmax(wanted, -1)
    return (target.exp() * (target - torch.log_softmax(given, -1))).sum(-1).mean()


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--hold", type=float, default=0.3, help="how strongly pieces stay near the teachers' own vectors"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    work = arguments.work
    groups = data.load(work)
    embedded = load_file(work / "compiled.safetensors")["model.embed_tokens.weight"]
    weights = attention_weights(embedded[:, RARITY])
    passage_languages = np.array([json.loads(line)["language"] for line in (work / "passages.jsonl").open()])
    query_languages = np.array(groups.languages)
    extra = [json.loads(line) for line in (work / "extra.jsonl").open()]
    extra_languages = np.array([r["language"] for r in extra])
    own = [groups.prompt.ids(q) for q in [*groups.queries, *(r["text"] for r in extra)]]
    texts = Means(groups.passages + own, weights)
    languages = np.concatenate([passage_languages, query_languages, extra_languages])
    parts = [teacher_vectors(work, k, np.flatnonzero(x == "en"))
             for k, x in (("passages", passage_languages), ("queries", query_languages))]  # fmt: skip
    parts.append((np.zeros((len(extra), 384), np.float32), np.zeros((len(extra), 384), np.float32)))
    parts[2][0][extra_languages == "en"] = np.load(work / "extra.minilm.npy")
    parts[2][1][extra_languages == "zh"] = np.load(work / "extra.e5.npy")
    minilm, e5 = (torch.from_numpy(np.concatenate([p[i] for p in parts])) for i in (0, 1))
    knows_e5 = e5.abs().sum(1) > 0
    stored = np.load(work / "pairs.npz")
    table = torch.from_numpy(embedded[:, S].copy()).requires_grad_()
    origin = table.detach().clone()
    scale = torch.tensor([6.0, 6.0]).requires_grad_()
    optimizer = torch.optim.Adam([{"params": [table], "lr": 4e-3}, {"params": [scale], "lr": 0.02}], betas=(0.9, 0.99))
    offset, size = len(passage_languages), 320
    train_rows = np.arange(len(query_languages) - data.DEV)
    for step in tqdm(range(arguments.steps), mininterval=10):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("base", group["lr"]) * (1 - step / arguments.steps)
        language = "zh" if step % 5 < 2 else "en"
        vectors = normalize(table, dim=-1)
        rows = rng.choice(np.flatnonzero(languages == language), size, replace=False)
        means = texts(vectors, rows)
        e5_rows = e5[rows]
        wanted = (e5_rows @ e5_rows.T - 0.80) / 0.03
        if language == "en":
            minilm_rows = minilm[rows]
            both = knows_e5[rows][:, None] & knows_e5[rows][None]
            other = (minilm_rows @ minilm_rows.T - 0.05) / 0.09
            wanted = torch.where(both, (wanted + other) / 2, other)
        diagonal = torch.eye(size, dtype=torch.bool)
        given = scale[0] * 2 * means @ means.T
        loss = divergence(wanted.masked_fill(diagonal, -30), given.masked_fill(diagonal, -30))
        chosen = rng.choice(train_rows[query_languages[train_rows] == language], 48, replace=False)
        asked = texts(vectors, offset + chosen)
        offered = texts(vectors, stored["candidates"][chosen].reshape(-1)).view(48, -1, MEANING)
        close = scale[1] * 2 * torch.einsum("qd,qcd->qc", asked, offered)
        loss = loss + divergence(torch.from_numpy(1.2 * stored["teacher"][chosen]), close)
        seen = np.unique(np.concatenate([texts.texts[i] for i in rows]))
        loss = loss + arguments.hold * (vectors[seen] - origin[seen]).pow(2).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} {language} loss {loss.item():.3f} scales {scale.tolist()}", flush=True)
    out = normalize(table.detach(), dim=-1).numpy()
    out[np.linalg.norm(embedded[:, S], axis=1) < 0.1] = 0  # markers and the prompt's constant tokens have no meaning
    np.save(work / "meanings.npy", out)


if __name__ == "__main__":
    main()
