"""Step 5b: the meaning of texts. A small causal encoder learns the teachers' states and vectors.

It is the semantic half of the final decoder, trained on its own because that is the cheapest place: the same blocks, on
its `WIDTH` dimensions of the residual stream only. What the other half contributes to a norm is a constant here
(`OTHERS`), the segment that keeps a text apart is a constant dimension of queries and keys, and a text begins with a
marker whose row is zero and stays zero. ``compile.py`` puts the weights beside the lexical half.

Losses: each token's state against the teacher's state of that token; each text's vector against the teacher's, and its
length against 1; and the likeness of the texts of a batch. What is alike is in one batch, so that it has to be told
apart: queries with their passages, now and then with passages that BM25 takes for these, and short texts that share a
word.

``python encoder.py --work training/work --minutes 45`` writes ``encoder.safetensors``; it resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from teach import AS_QUERIES, WIDTH, chosen, load_both, load_space, load_vectors
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, normalize, rms_norm, scaled_dot_product_attention, silu
from tqdm import tqdm

SEED = 20261124
HEAD = 64
HEADS = (0, 4, 5, 8)  # semantic heads of layers 0 to 3: layer 0 does not know segments yet
UNITS = 480  # semantic units of each feed-forward part; the last part works on the pooled vectors
THETA = 1e20
SINK, SEGMENT = 7, 39  # dimensions of a head that no semantic weight uses
SEGMENT_SIZE = 1.0  # of queries and keys, before they are normalised
TEMPERATURE = 48.0  # largest logit of a head
OTHERS, OWN = 13.0, 1.0  # squared norms of the other half of the residual stream and, about, of this half
POOL = 4.0  # scale of the mean
DEV = 300  # last passages and queries of each language, held out


class Encoder(nn.Module):
    """Token states and text vectors."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(rows, WIDTH))
        self.scale = nn.Parameter(torch.tensor([1.0, 12.0]))  # of token states, of likenesses; not exported
        for layer, heads in enumerate(HEADS):
            for part in "qkv" if heads else "":
                spread = 0.5 / math.sqrt(HEAD) if part != "v" else 1 / math.sqrt(WIDTH)
                self.register_parameter(f"{part}{layer}", nn.Parameter(torch.randn(heads * HEAD, WIDTH) * spread))
            if heads:
                self.register_parameter(f"o{layer}", nn.Parameter(torch.zeros(WIDTH, heads * HEAD)))
        for layer in range(len(HEADS) + 1):
            for part in ("gate", "up"):
                width = WIDTH + (part == "gate")  # a gate also reads a constant
                matrix = torch.randn(UNITS, width) / math.sqrt(WIDTH) * 2
                self.register_parameter(f"{part}{layer}", nn.Parameter(matrix))
            self.register_parameter(f"down{layer}", nn.Parameter(torch.zeros(WIDTH, UNITS)))
        frequencies = THETA ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        free, constant = torch.ones(HEAD), torch.zeros(HEAD)
        free[[SINK, SEGMENT]], constant[SEGMENT] = 0, SEGMENT_SIZE
        self.register_buffer("free", free, persistent=False)
        self.register_buffer("constant", constant, persistent=False)

    @staticmethod
    def scales(states: Tensor) -> Tensor:
        """What the norm of the whole residual stream multiplies a token by."""
        return ((OTHERS + OWN) / (OTHERS + states.pow(2).sum(-1, keepdim=True))).sqrt()

    def attend(self, layer: int, states: Tensor) -> Tensor:
        """Causal attention within each row."""
        scale = self.scales(states)
        inner = states * scale
        rows, tokens, _ = states.shape
        angles = torch.arange(tokens, device=states.device).float()[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()

        def split(part: str) -> Tensor:
            found = linear(inner, self.get_parameter(f"{part}{layer}"))
            return found.view(rows, tokens, HEADS[layer], HEAD)

        def turn(part: str) -> Tensor:
            found = split(part) * self.free + scale[..., None] * self.constant
            found = rms_norm(found, (HEAD,)).transpose(1, 2) * math.sqrt(TEMPERATURE / 8)
            a, b = found.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        mixed = scaled_dot_product_attention(turn("q"), turn("k"), split("v").transpose(1, 2), is_causal=True)
        return linear(mixed.transpose(1, 2).reshape(rows, tokens, -1), self.get_parameter(f"o{layer}"))

    def feed(self, layer: int, states: Tensor) -> Tensor:
        """The gated feed-forward part."""
        scale = self.scales(states)
        inner = states * scale
        gate = linear(torch.cat([inner, scale], -1), self.get_parameter(f"gate{layer}"))
        return linear(silu(gate) * linear(inner, self.get_parameter(f"up{layer}")), self.get_parameter(f"down{layer}"))

    def forward(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """States (rows x tokens x WIDTH) and vectors (rows x WIDTH) of texts padded on the right."""
        states = torch.nn.functional.pad(embedding(ids, self.table), (0, 0, 1, 0))  # the marker
        for layer, heads in enumerate(HEADS):
            if heads:
                states = states + self.attend(layer, states)
            states = states + self.feed(layer, states)
        states = states[:, 1:]
        inside = torch.arange(states.shape[1], device=ids.device)[None] < lengths[:, None]
        pooled = POOL * (states * self.scales(states) * inside[..., None]).sum(1) / (lengths[:, None] + 1.5)
        return states, pooled + self.feed(len(HEADS), pooled)


@dataclass
class Texts:
    """Texts of one language: ids, where each text's tokens lie, the teacher's reduced vectors and token states."""

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    vectors: np.ndarray
    states: np.ndarray

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids and lengths (padded), states of all tokens in a row, vectors."""
        lengths = self.lengths[rows]
        ids = np.zeros((len(rows), max(1, lengths.max())), np.int64)
        for i, row in enumerate(rows):
            ids[i, : lengths[i]] = self.ids[self.starts[row] : self.starts[row] + lengths[i]]
        states = np.concatenate([self.states[self.starts[r] : self.starts[r] + self.lengths[r]] for r in rows])
        return (torch.from_numpy(ids), torch.from_numpy(lengths), torch.from_numpy(states.astype(np.float32)),
                torch.from_numpy(self.vectors[rows]))  # fmt: skip


def load(work: Path, kind: str, language: str) -> Texts:
    """What ``teach.py`` wrote for a kind of text."""
    stored, query = np.load(work / f"{kind}.{language}.npz"), kind in AS_QUERIES
    given = load_vectors(work, kind, language)
    lengths = stored["lengths"][: len(given[0])].astype(np.int64)
    if language == "en":
        vectors = load_both(work).place(given[0], given[1], query)
    else:
        vectors = load_space(work, language).place(given[0].astype(np.float32), query)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    states = np.load(work / f"{kind}.{language}.states.npy", mmap_mode="r")
    return Texts(stored["ids"], np.cumsum(lengths) - lengths, lengths, vectors, states)


class Corpus:
    """All texts of a language and which queries belong to which passage."""

    def __init__(self, work: Path, language: str) -> None:
        kinds = ("passages", "everyday", "extra", "queries", "asked")
        self.passages, self.everyday, self.extra, self.queries, self.asking = (load(work, k, language) for k in kinds)
        places, _ = chosen(work, "passages", language)
        inside = {place: i for i, place in enumerate(places)}
        self.sources = np.array([inside[r["source"]] for r in chosen(work, "queries", language)[1]])
        self.held = np.unique(np.concatenate([self.sources[-DEV:], np.arange(len(places) - DEV, len(places))]))
        self.asked: dict[int, list[int]] = {}
        for query, source in enumerate(self.sources[:-DEV]):
            self.asked.setdefault(int(source), []).append(query)
        self.kept = np.setdiff1d(np.arange(len(places)), self.held)
        stored = np.load(work / "pairs.npz")
        rows = {row: i for i, row in enumerate(chosen(work, "queries", language)[0][:-DEV])}
        mine = [i for i, row in enumerate(stored["queries"].tolist()) if row in rows]
        self.planned: list[tuple[str, np.ndarray]] = []
        self.hard = np.array([rows[row] for row in stored["queries"][mine].tolist()])
        local = [[inside.get(place, -1) for place in row] for row in stored["candidates"][mine].tolist()]
        self.candidates = np.where(np.isin(local, self.held), -1, local)
        texts = np.repeat(np.arange(len(self.asking.lengths)), self.asking.lengths)
        order = np.argsort(self.asking.ids, kind="stable")
        self.holding, self.begin = (
            texts[order],
            np.searchsorted(self.asking.ids[order], np.arange(self.asking.ids.max() + 2)),
        )

    def sharing(self, rng: np.random.Generator, words: int = 10, each: int = 8) -> np.ndarray:
        """Short texts, some of which share a word."""
        drawn = rng.integers(0, len(self.asking.ids), words)  # a frequent word is drawn often
        out = [rng.choice(self.holding[self.begin[t] : self.begin[t + 1]], each) for t in self.asking.ids[drawn]]
        return np.unique(np.concatenate(out))

    def confusing(self, rng: np.random.Generator, queries: int = 14, each: int = 4) -> tuple[np.ndarray, np.ndarray]:
        """Queries, and passages: each one's own and some that share words with it or are near to it."""
        drawn = rng.choice(len(self.hard), queries, replace=False)
        others = rng.permuted(self.candidates[drawn, 1:], axis=1)[:, :each]
        passages = np.unique(np.concatenate([self.candidates[drawn, 0], others.ravel()]))
        passages = passages[(passages >= 0) & (self.passages.lengths[passages] > 0)]
        return self.hard[drawn], passages[np.argsort(self.passages.lengths[passages])]

    def plan(self, rng: np.random.Generator, budget: int) -> list[tuple[str, np.ndarray]]:
        """One pass over passages and definitions: batches of like lengths, each of about `budget` tokens."""
        out = []
        for kind in ("passages", "everyday", "extra"):
            texts = getattr(self, kind)
            rows = self.kept if kind == "passages" else np.arange(len(texts.lengths))
            rows = rows[texts.lengths[rows] > 0]
            rows = rows[np.argsort(texts.lengths[rows] + rng.normal(0, 3, len(rows)))]
            start = 0
            while start < len(rows):
                stop = start + 8
                while stop < len(rows) and stop - start < 160 and (stop - start) * texts.lengths[rows[stop]] < budget:
                    stop += 1
                out.append((kind, rows[start:stop]))
                start = stop
        return [out[i] for i in rng.permutation(len(out))]


Part = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(corpus: Corpus, rng: np.random.Generator, budget: int, hard: bool) -> list[Part]:
    """Parts that are padded apart: the next texts with some queries, or confusing ones; and short texts."""
    if hard:
        asked, rows = corpus.confusing(rng)
        parts = [corpus.passages.batch(half) for half in np.array_split(rows, 2)]
    else:
        corpus.planned = corpus.planned or corpus.plan(rng, budget)
        kind, rows = corpus.planned.pop()
        parts = [getattr(corpus, kind).batch(rows)]
        asked = rng.choice(len(corpus.sources) - DEV, 24, replace=False)
        if kind == "passages":
            asked = np.array([rng.choice(corpus.asked[r]) for r in rows.tolist() if r in corpus.asked][:64], np.int64)
    asked = asked[corpus.queries.lengths[asked] > 0]
    if len(asked):
        parts.append(corpus.queries.batch(asked))
    return [*parts, corpus.asking.batch(corpus.sharing(rng))]


def losses(model: Encoder, parts: list[Part]) -> dict[str, Tensor]:
    """Token, text and likeness losses of a batch made of parts that are padded apart."""
    found, wanted, token, size = [], [], [], []
    for ids, lengths, states, vectors in parts:
        own, pooled = model(ids, lengths)
        size.append((pooled.norm(dim=1) - 1).pow(2).mean())
        inside = torch.arange(ids.shape[1])[None] < lengths[:, None]
        token.append((model.scale[0] * own[inside] - states).pow(2).sum() / states.pow(2).sum())
        found.append(normalize(pooled, dim=1))
        wanted.append(vectors)
    text = likeness(torch.cat(found), torch.cat(wanted), model.scale[1])
    return text | {"token": torch.stack(token).mean(), "size": torch.stack(size).mean()}


def likeness(given: Tensor, target: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Unit vectors against the teacher's: each one's own, and each one's distribution over the others."""
    diagonal = torch.eye(len(given), dtype=torch.bool, device=given.device)
    close = torch.log_softmax((12 * target @ target.T).masked_fill(diagonal, -30), -1)
    ours = torch.log_softmax((scale * given @ given.T).masked_fill(diagonal, -30), -1)
    return {"text": (1 - (given * target).sum(1)).mean(), "like": (close.exp() * (close - ours)).sum(-1).mean()}


@torch.inference_mode()
def held_out(model: Encoder, corpus: Corpus) -> dict[str, float]:
    """Cosine to the teacher on held-out passages; mean reciprocal rank of queries' sources, ours and the teacher's."""

    def vectors(texts: Texts, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        order = rows[np.argsort(texts.lengths[rows])]
        parts = [texts.batch(order[i : i + 50]) for i in range(0, len(order), 50)]
        back = torch.from_numpy(np.argsort(np.argsort(texts.lengths[rows])))
        return (
            torch.cat([normalize(model(p[0], p[1])[1], dim=1) for p in parts])[back],
            torch.cat([p[3] for p in parts])[back],
        )

    asked, asked_target = vectors(corpus.queries, np.arange(len(corpus.sources) - DEV, len(corpus.sources)))
    places, places_target = vectors(corpus.passages, corpus.held)
    right = torch.from_numpy(np.searchsorted(corpus.held, corpus.sources[-DEV:]))

    def rank(queries: Tensor, passages: Tensor) -> float:
        scores = queries @ passages.T
        return (1 / (1 + (scores > scores.gather(1, right[:, None])).sum(1))).mean().item()

    return {"cosine": (places * places_target).sum(1).mean().item(),
            "query_cosine": (asked * asked_target).sum(1).mean().item(),
            "mrr": rank(asked, places), "teacher_mrr": rank(asked_target, places_target)}  # fmt: skip


def main() -> None:
    """Train by the clock and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--steps", type=int, default=1_000_000, help="fewer than the clock allows")
    parser.add_argument("--tokens", type=int, default=3200, help="per step, without queries")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--table-lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    work, checkpoint = arguments.work, arguments.work / "encoder.pt"
    table = torch.from_numpy(np.load(work / "static.npy"))
    corpora = {language: Corpus(work, language) for language in ("en", "zh")}
    model = Encoder(len(table)).to(arguments.device)
    model.table.data = table.to(arguments.device)
    others = [p for name, p in model.named_parameters() if name != "table"]
    optimizer = torch.optim.AdamW([{"params": others, "base": arguments.lr, "weight_decay": 0.02},
                                   {"params": [model.table], "base": arguments.table_lr, "weight_decay": 0.0}],
                                  lr=arguments.lr, betas=(0.9, 0.98), fused=True)  # fmt: skip
    step, spent = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=arguments.device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]
        for group, base in zip(optimizer.param_groups, (arguments.lr, arguments.table_lr), strict=True):
            group["base"] = base
    frozen = torch.ones(len(table), 1, device=arguments.device)
    frozen[table.abs().sum(1) == 0] = 0
    begin, recent = time.monotonic() - spent, []
    log = (work / "encoder.jsonl").open("a")
    bar = tqdm(initial=step, desc="encoder", mininterval=10)
    while step < arguments.steps and (spent := time.monotonic() - begin) < arguments.minutes * 60:
        rng = np.random.default_rng([SEED, step])
        progress = max(step / arguments.steps, spent / (arguments.minutes * 60))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 - progress))
        corpus = corpora["zh" if step % 5 in (1, 3) else "en"]
        parts = batch(corpus, rng, arguments.tokens, step // 5 % 2 == 1)
        found = losses(model, [tuple(t.to(arguments.device) for t in part) for part in parts])  # type: ignore[misc]
        loss = 0.1 * found["token"] + 2.0 * found["text"] + 1.5 * found["like"] + 1.5 * found["size"]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        if model.table.grad is not None:
            model.table.grad *= frozen
        optimizer.step()
        step += 1
        recent.append({name: value.item() for name, value in found.items()})
        bar.update()
        if step % arguments.every == 0:
            save(model, optimizer, step, time.monotonic() - begin, checkpoint, work)
            means = {k: round(float(np.mean([r[k] for r in recent])), 4) for k in recent[0]}
            record = {"step": step, "minutes": round((time.monotonic() - begin) / 60, 1)} | means
            if step % (5 * arguments.every) == 0:
                record |= {x: {k: round(v, 4) for k, v in held_out(model, c).items()} for x, c in corpora.items()}
            print(json.dumps(record), file=log, flush=True)
            recent = []
    save(model, optimizer, step, time.monotonic() - begin, checkpoint, work)
    print({x: held_out(model, c) for x, c in corpora.items()})


def save(model: Encoder, optimizer: torch.optim.Optimizer, step: int, spent: float, checkpoint: Path,
         work: Path) -> None:  # fmt: skip
    """The checkpoint to resume from, and the weights."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
    torch.save(state, checkpoint.with_suffix(".new"))
    checkpoint.with_suffix(".new").replace(checkpoint)
    weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    save_file(weights, work / "encoder.new.safetensors")
    (work / "encoder.new.safetensors").replace(work / "encoder.safetensors")


if __name__ == "__main__":
    main()
