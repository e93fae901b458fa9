"""Step 5b: weigh the compiled features. Only the last feed-forward part and the readout learn, on cached states.

``python fit.py --work training/work`` reads ``compiled.safetensors`` and writes ``start.safetensors``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import data
import numpy as np
import torch
from compile import (  # fmt: skip
    BIAS,
    LONG,
    NEAR_A,
    NEAR_B,
    ONE,
    PEAK,
    QUERY_IDF,
    SCORE,
    SHORT,
    SOFT_LONG,
    SOFT_PEAK,
    SOFT_SHORT,
)
from model import Nano, Shape, collate
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, silu
from tqdm import tqdm

FEATURES = [ONE, QUERY_IDF, SHORT, LONG, SOFT_SHORT, SOFT_LONG, PEAK, SOFT_PEAK, NEAR_A, NEAR_B]
UNITS = 32


def objective(scores: Tensor, targets: Tensor) -> Tensor:
    """Listwise divergence from the teachers' distribution plus pointwise cross-entropy."""
    wanted = torch.log_softmax(targets, -1)
    listwise = (wanted.exp() * (wanted - torch.log_softmax(scores, -1))).sum(-1).mean()
    return listwise + 0.5 * binary_cross_entropy_with_logits(scores, targets.sigmoid())


def states(model: Nano, groups: data.Groups, rows: np.ndarray) -> Tensor:
    """States of the last token after the compiled layers, queries x candidates x hidden."""
    columns = np.arange(groups.candidates.shape[1])
    rng = np.random.default_rng(1)
    out = []
    with torch.inference_mode():
        for row in tqdm(rows, desc="states"):
            head, tails = groups.group(int(row), columns, data.INSTRUCTION, 200, rng if row % 4 == 0 else None)
            out.append(model.last_states(collate([head], [tails])))
    return torch.stack(out).clone()


def score(state: Tensor, gain: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """The last layer's feed-forward part and the readout, on the features alone."""
    scale = gain / state.pow(2).mean(-1, keepdim=True).sqrt()
    inner = state[..., FEATURES] * scale
    value = (silu(inner @ parts["gate"].T) * (inner @ parts["up"].T)) @ parts["down"]
    final = state.clone()
    final[..., SCORE] = final[..., SCORE] + value
    rms = final.pow(2).mean(-1).sqrt()
    return (2 * parts["readout"] * final[..., SCORE] + 0.2 * parts["bias"] * final[..., BIAS]) / rms


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--queries", type=int, default=360)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(arguments.threads)
    groups = data.load(arguments.work)
    shape = Shape(vocabulary=-(-groups.prompt.full.get_vocab_size() // 64) * 64)
    yes, no = (groups.prompt.ids(w)[0] for w in ("yes", "no"))
    model = Nano.load(arguments.work / "compiled.safetensors", shape, yes, no)
    rows = np.arange(arguments.queries)
    cached = arguments.work / "states.pt"  # of these compiled weights; compile.py removes it
    state = torch.load(cached, weights_only=True) if cached.exists() else states(model, groups, rows)
    torch.save(state, cached)
    targets = torch.from_numpy(groups.targets[rows])
    gain = math.sqrt(6.0 / shape.hidden)
    parts = {"gate": torch.randn(UNITS, len(FEATURES)) * 0.5, "up": torch.rand(UNITS, len(FEATURES)) * 0.5,
             "down": torch.ones(UNITS) / UNITS, "readout": torch.tensor(0.3), "bias": torch.tensor(-1.0)}  # fmt: skip
    parts["gate"][:, 0] = 1.0
    for value in parts.values():
        value.requires_grad_()
    optimizer = torch.optim.Adam(parts.values(), 0.02)
    held = len(rows) * 4 // 5
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 600)
        batch = torch.randint(0, held, (96,))
        loss = objective(score(state[batch], gain, parts), targets[batch])
        optimizer.zero_grad()
        (loss + 1e-3 * sum(p.pow(2).sum() for p in parts.values())).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 150 == 149:
            with torch.no_grad():
                value = objective(score(state[held:], gain, parts), targets[held:])
            print(f"step {step + 1} loss {loss.item():.4f} held out {value.item():.4f}", flush=True)
    with torch.no_grad():
        base = f"model.layers.{shape.layers - 1}.mlp."
        for name in ("gate", "up"):
            matrix = model.weight(f"{base}{name}_proj")
            matrix[:UNITS] = 0
            matrix[:UNITS, FEATURES] = parts[name]
        down = model.weight(f"{base}down_proj")
        down[:, :UNITS] = 0
        down[SCORE, :UNITS] = parts["down"]
        norm = model.weight("model.norm")
        norm[SCORE], norm[BIAS] = parts["readout"], parts["bias"]
    model.save(arguments.work / "start.safetensors")


if __name__ == "__main__":
    main()
