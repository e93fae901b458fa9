"""Step 5c: fit the weights of the compiled features: the last MLP and the readout, on cached states.

``python fit.py --work training/work`` reads ``compiled.safetensors`` and writes ``start.safetensors``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import data
import numpy as np
import torch
from encoder import OTHERS, OWN
from layer_weights import FEATURES, D
from model import Nano, Shape, collate
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, silu
from tqdm import tqdm

UNITS = 64
STEPS, RATE, DECAY = 800, 0.01, 1e-2
SHARPER = 2.0  # scales the log-odds at the end, because soft targets keep them near 0; the order stays
SCORE, BIAS = D["SCORE"], D["BIAS"]


def objective(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the listwise divergence from the teachers' distribution plus pointwise cross-entropy."""
    wanted = torch.log_softmax(targets, -1)
    listwise = (wanted.exp() * (wanted - torch.log_softmax(scores, -1))).sum(-1).mean()
    return listwise + 0.5 * binary_cross_entropy_with_logits(scores, targets.sigmoid())


def states(model: Nano, groups: data.Groups, rows: np.ndarray) -> Tensor:
    """Compute the last token's states after the compiled layers: (queries, candidates, hidden)."""
    columns = np.arange(groups.candidates.shape[1])
    rng = np.random.default_rng(1)
    out = []
    with torch.inference_mode():
        for row in tqdm(rows, desc="states", mininterval=10):
            head, tails = groups.group(int(row), columns, data.INSTRUCTION, 200, rng if row % 4 == 0 else None)
            out.append(model.last_states(collate([head], [tails])))
    return torch.stack(out).clone()


def score(state: Tensor, gain: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """Apply the last layer's MLP and the readout to the features."""
    scale = gain / state.pow(2).mean(-1, keepdim=True).sqrt()
    inner = state[..., FEATURES] * scale
    value = (silu(inner @ parts["gate"].T) * (inner @ parts["up"].T)) @ parts["down"]
    final = state.clone()
    final[..., SCORE] = final[..., SCORE] + value
    rms = final.pow(2).mean(-1).sqrt()
    return (2 * parts["readout"] * final[..., SCORE] + 0.2 * parts["bias"] * final[..., BIAS]) / rms


def train(state: Tensor, targets: Tensor, gain: float, held: int) -> dict[str, Tensor]:
    """Fit the last layer on the first `held` queries."""
    seen = state[..., FEATURES] * gain / state.pow(2).mean(-1, keepdim=True).sqrt()
    spread = seen.std((0, 1))
    spread[0] = seen[..., 0].mean()  # the constant
    parts = {"gate": torch.randn(UNITS, len(FEATURES)) * 0.3, "up": torch.randn(UNITS, len(FEATURES)) * 0.2,
             "down": torch.ones(UNITS) / UNITS, "readout": torch.tensor(0.3), "bias": torch.tensor(-1.0)}  # fmt: skip
    parts["gate"][:, 0] = 1.0
    for value in parts.values():
        value.requires_grad_()
    optimizer = torch.optim.Adam(parts.values(), RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        batch = torch.randint(0, held, (96,))
        loss = objective(score(state[batch], gain, scaled(parts, spread)), targets[batch])
        optimizer.zero_grad()
        (loss + DECAY * sum(p.pow(2).sum() for p in parts.values())).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 500 == 499:
            with torch.no_grad():
                value = objective(score(state[held:], gain, scaled(parts, spread)), targets[held:])
            print(f"step {step + 1} loss {loss.item():.4f} held out {value.item():.4f}", flush=True)
    return {name: value.detach() for name, value in scaled(parts, spread).items()}


def scaled(parts: dict[str, Tensor], spread: Tensor) -> dict[str, Tensor]:
    """Rescale weights fitted to features of spread 1 to the actual spread."""
    return parts | {name: parts[name] / spread for name in ("gate", "up")}


def main() -> None:
    """Fit and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--queries", type=int, default=640)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(arguments.threads)
    groups = data.load(arguments.work)
    shape = Shape(vocabulary=-(-groups.prompt.full.get_vocab_size() // 64) * 64)
    yes, no = (groups.prompt.ids(w)[0] for w in ("yes", "no"))
    model = Nano.load(arguments.work / "compiled.safetensors", shape, yes, no)
    languages = np.array(groups.languages)
    parts = [np.flatnonzero((languages == x) & (groups.asked == asked))[: arguments.queries // 4]
             for x in ("en", "zh") for asked in (False, True)]  # fmt: skip
    rows = np.random.default_rng(1).permutation(np.concatenate(parts))
    cached = arguments.work / "states.pt"  # computed with these compiled weights; compile.py removes it
    state = torch.load(cached, weights_only=True) if cached.exists() else states(model, groups, rows)
    torch.save(state, cached)
    targets = torch.from_numpy(groups.targets[rows])
    gain = math.sqrt((OTHERS + OWN) / shape.hidden)
    held = len(rows) * 4 // 5
    learned = train(state, targets, gain, held)
    with torch.no_grad():
        base = f"model.layers.{shape.layers - 1}.mlp."
        for name in ("gate", "up"):
            matrix = model.weight(f"{base}{name}_proj")
            matrix[:UNITS] = 0
            matrix[:UNITS, FEATURES] = learned[name]
        down = model.weight(f"{base}down_proj")
        down[:, :UNITS] = 0
        down[SCORE, :UNITS] = learned["down"]
        norm = model.weight("model.norm")
        norm[SCORE], norm[BIAS] = SHARPER * learned["readout"], SHARPER * learned["bias"]
    model.save(arguments.work / "start.safetensors")


if __name__ == "__main__":
    main()
