"""Step 5b: train a small causal encoder on the teachers' token states and text vectors.

The encoder is the semantic half of the final decoder. It is trained alone because that is cheaper: it has the same
blocks, but only its own `WIDTH` dimensions of the residual stream. The other half adds a constant to a norm
(`OTHERS`), the segment that separates texts is a constant dimension of queries and keys, and a text starts with a
marker whose row stays zero. ``compile.py`` joins the weights with the lexical half.

Losses: each token's state compared with the teacher's; each text's vector compared with the teacher's, and its length
with 1; and the similarities within a batch. A batch contains similar texts, so that the model must distinguish them:
queries with their passages, sometimes with passages that BM25 confuses with these, and short texts that share a word.

``python encoder.py --work training/work --minutes 45`` writes ``encoder.safetensors``; it resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from encoder_texts import DEV, Corpus, Part, TaughtTexts, batch
from safetensors.torch import save_file
from teach import WIDTH
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, normalize, rms_norm, scaled_dot_product_attention, silu
from tqdm import tqdm

SEED = 20261124
HEAD = 64
HEADS = (0, 4, 5, 8)  # semantic heads of layers 0 to 3; layer 0 has no segments yet
UNITS = 480  # semantic units of each MLP; the last MLP works on the pooled vectors
THETA = 1e20
SINK, SEGMENT = 7, 39  # dimensions of a head that no semantic weight uses
SEGMENT_SIZE = 1.0  # of queries and keys, before normalization
TEMPERATURE = 48.0  # largest logit of a head
OTHERS, OWN = 13.0, 1.0  # squared norms of the other half of the residual stream and, about, of this half
POOL = 4.0  # scale of the mean


class Encoder(nn.Module):
    """Token states and text vectors."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(rows, WIDTH))
        self.scale = nn.Parameter(torch.tensor([1.0, 12.0]))  # of token states and similarities; not exported
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
        """Return the factor of the norm of the whole residual stream for each token."""
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
        """The gated MLP."""
        scale = self.scales(states)
        inner = states * scale
        gate = linear(torch.cat([inner, scale], -1), self.get_parameter(f"gate{layer}"))
        return linear(silu(gate) * linear(inner, self.get_parameter(f"up{layer}")), self.get_parameter(f"down{layer}"))

    def forward(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return states (rows, tokens, WIDTH) and vectors (rows, WIDTH) of right-padded texts."""
        states = torch.nn.functional.pad(embedding(ids, self.table), (0, 0, 1, 0))  # the marker
        for layer, heads in enumerate(HEADS):
            if heads:
                states = states + self.attend(layer, states)
            states = states + self.feed(layer, states)
        states = states[:, 1:]
        inside = torch.arange(states.shape[1], device=ids.device)[None] < lengths[:, None]
        pooled = POOL * (states * self.scales(states) * inside[..., None]).sum(1) / (lengths[:, None] + 1.5)
        return states, pooled + self.feed(len(HEADS), pooled)


def losses(model: Encoder, parts: list[Part]) -> dict[str, Tensor]:
    """Return the token, text and similarity losses of a batch of separately padded parts."""
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
    """Compare unit vectors with the teacher's: each vector, and its similarities to the others."""
    diagonal = torch.eye(len(given), dtype=torch.bool, device=given.device)
    close = torch.log_softmax((12 * target @ target.T).masked_fill(diagonal, -30), -1)
    ours = torch.log_softmax((scale * given @ given.T).masked_fill(diagonal, -30), -1)
    return {"text": (1 - (given * target).sum(1)).mean(), "like": (close.exp() * (close - ours)).sum(-1).mean()}


@torch.inference_mode()
def held_out(model: Encoder, corpus: Corpus) -> dict[str, float]:
    """Return the cosine to the teacher on held-out passages, and the MRR of queries' sources for both."""

    def vectors(texts: TaughtTexts, rows: np.ndarray) -> tuple[Tensor, Tensor]:
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
    """Train for a given time and save."""
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
    """Save the checkpoint to resume from, and the weights."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
    torch.save(state, checkpoint.with_suffix(".new"))
    checkpoint.with_suffix(".new").replace(checkpoint)
    weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    save_file(weights, work / "encoder.new.safetensors")
    (work / "encoder.new.safetensors").replace(work / "encoder.safetensors")


if __name__ == "__main__":
    main()
