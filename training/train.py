"""Optional: train every weight of the start on the teachers' scores.

AdamW with warm-up and cosine decay, an exponential moving average of the weights, checkpoints that a second call
resumes from, a clock (``--minutes``) as well as a number of steps. Runs in fp32, on a CPU or (``--device cuda``) a GPU.

``python train.py --work training/work --minutes 60`` writes ``trained.safetensors``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import data
import numpy as np
import torch
from fit import objective
from model import Batch, Nano, Shape, collate
from torch import Tensor
from tqdm import tqdm

SEED = 20261123
LONG_EVERY = 5  # every fifth batch holds long documents


def batches(groups: data.Groups, rows: np.ndarray, size: int, limit: int, epoch: int) -> list[np.ndarray]:
    """Shuffled batches of queries whose longest candidates are alike, so that little is padding."""
    rng = np.random.default_rng(SEED + epoch)
    longest = np.array([max(min(len(groups.passages[i]), limit) for i in groups.candidates[r]) for r in rows])
    order = np.argsort(longest + rng.normal(0, 4, len(rows)))
    blocks = [rows[order[i : i + size]] for i in range(0, len(order) - size + 1, size)]
    return [blocks[i] for i in rng.permutation(len(blocks))]


def make(
    groups: data.Groups, rows: np.ndarray, documents: int, limit: int, rng: np.random.Generator, long: bool = False
) -> tuple[Batch, Tensor]:
    """Ids and targets of a batch: the source and a sample of the other candidates, some batches as long documents."""
    texts, weights = zip(*data.INSTRUCTIONS, strict=True)
    heads, tails, targets = [], [], []
    for row in rows:
        others = 1 + rng.permutation(groups.candidates.shape[1] - 1)[: documents - 1]
        columns = np.concatenate([[0], others])
        instruction = texts[rng.choice(len(texts), p=np.array(weights) / sum(weights))]
        head, group = groups.group(int(row), columns, instruction, limit, rng if long else None)
        heads.append(head)
        tails.append(group)
        targets.append(groups.targets[row, columns])
    return collate(heads, tails), torch.from_numpy(np.stack(targets))


def parameters(model: Nano, rate: float) -> list[dict[str, object]]:
    """Groups by learning rate; no weight decay: the compiled weights are meant.

    Adam moves every entry alike, and a compiled head is a few large entries among zeros: its layers move slowly.
    """
    slow, fast = [], []
    for name, p in model.named_parameters():
        compiled = "self_attn" in name and f"layers_{model.shape.layers - 1}_" not in name
        (slow if compiled or p.ndim == 1 else fast).append(p)
    return [{"params": slow, "base": rate / 4}, {"params": fast, "base": rate}]


@torch.inference_mode()
def held_out(model: Nano, groups: data.Groups, rows: np.ndarray) -> dict[str, float]:
    """Loss and the mean teacher score of the document ranked first, on queries never trained on."""
    losses, regret = [], []
    rng = np.random.default_rng(SEED)
    for start in range(0, len(rows), 16):
        batch, targets = make(groups, rows[start : start + 16], groups.candidates.shape[1], 200, rng)
        scores = model(batch.to(str(model.frequencies.device))).cpu()
        losses.append(objective(scores, targets).item())
        best = targets.gather(1, scores.argmax(1, keepdim=True))[:, 0]
        regret.append((targets.max(1).values - best).mean().item())
    return {"loss": float(np.mean(losses)), "regret": float(np.mean(regret))}


def main() -> None:
    """Train until the clock or the steps run out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--start", default="start.safetensors")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--queries", type=int, default=8, help="per step")
    parser.add_argument("--documents", type=int, default=8, help="per query")
    parser.add_argument("--limit", type=int, default=160, help="tokens of a document")
    parser.add_argument("--lr", type=float, default=1.2e-4)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    groups = data.load(arguments.work)
    shape = Shape(vocabulary=-(-groups.prompt.full.get_vocab_size() // 64) * 64)
    yes, no = (groups.prompt.ids(w)[0] for w in ("yes", "no"))
    checkpoint = arguments.work / "checkpoint.pt"
    model = Nano.load(arguments.work / arguments.start, shape, yes, no).to(arguments.device)
    optimizer = torch.optim.AdamW(parameters(model, arguments.lr), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.0)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    step, spent, pairs = 0, 0.0, 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=arguments.device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step, spent, pairs = saved["average"], saved["step"], saved["spent"], saved["pairs"]
    rows = np.arange(len(groups.queries) - data.DEV)
    plan = [b for e in range(arguments.epochs) for b in batches(groups, rows, arguments.queries, arguments.limit, e)]
    development = np.arange(len(groups.queries) - data.DEV, len(groups.queries))[:160]
    log = (arguments.work / "train.jsonl").open("a")
    recent: list[float] = []
    begin = time.monotonic() - spent
    bar = tqdm(total=len(plan), initial=step, desc="train", mininterval=10)
    while step < len(plan) and (spent := time.monotonic() - begin) < arguments.minutes * 60:
        progress = max(step / len(plan), spent / (arguments.minutes * 60))
        rate = min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * rate
        rng = np.random.default_rng([SEED, step])
        long = step % LONG_EVERY == LONG_EVERY - 1
        rows_now, documents = (plan[step][::2], 5) if long else (plan[step], arguments.documents)
        batch, targets = make(groups, rows_now, documents, arguments.limit, rng, long)
        pairs += len(rows_now) * documents
        loss = objective(model(batch.to(arguments.device)), targets.to(arguments.device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(arguments.ema, step / (step + 10))
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - decay)
        recent.append(loss.item())
        bar.update()
        bar.set_postfix(loss=f"{np.mean(recent[-100:]):.4f}")
        if step % arguments.every == 0 or step == len(plan):
            save(model, optimizer, average, (step, time.monotonic() - begin, pairs), checkpoint, arguments.work)
            record = {
                "step": step,
                "minutes": (time.monotonic() - begin) / 60,
                "pairs": pairs,
                "train": float(np.mean(recent[-200:])),
            }
            print(json.dumps(record), file=log, flush=True)
    save(model, optimizer, average, (step, time.monotonic() - begin, pairs), checkpoint, arguments.work)
    model.load_state_dict(average)
    print("held out", held_out(model, groups, development), "pairs", pairs)


def save(model: Nano, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], counts: tuple[int, float, int],
         checkpoint: Path, work: Path) -> None:  # fmt: skip
    """The checkpoint to resume from, and the averaged weights."""
    step, spent, pairs = counts
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step,
             "spent": spent, "pairs": pairs}  # fmt: skip
    torch.save(state, checkpoint.with_suffix(".new"))
    checkpoint.with_suffix(".new").replace(checkpoint)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(average)
    model.save(work / "trained.safetensors")
    model.load_state_dict(own)


if __name__ == "__main__":
    main()
