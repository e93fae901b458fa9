"""Step 6: write the folder that transformers (and local-rerank) loads: config, bf16 weights, tokenizer, golden scores.

``python export.py --work training/work --weights FILE --out DIR``. README, LICENSE and NOTICE are edited by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
import vocabulary
from model import Nano, Shape
from safetensors.torch import load_file
from tokenizers import Tokenizer

GOLDEN = [
    ("What is a text reranking model?", "Text reranking models are widely used in search engines and recommender "
     "systems to sort candidates by relevance."),
    ("What is a text reranking model?", "Quantum computing is a frontier field of computer science."),
    ("What is a text reranking model?",
     "The rise of pretrained language models has brought new advances to text reranking."),
    ("What is the capital of China?", "The capital of China is Beijing."),
    ("What is the capital of China?", "I had a turkey sandwich for lunch and it was fine."),
    ("什么是文本排序模型？", "文本排序模型广泛用于搜索引擎和推荐系统中，它们根据文本相关性对候选文本进行排序。"),
    ("什么是文本排序模型？", "量子计算是计算科学的一个前沿领域。"),
    ("how to reset a password", ""),
]  # fmt: skip


def golden(folder: Path) -> list[dict[str, object]]:
    """Compute log-odds of known pairs with plain transformers code in fp32, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = vocabulary.Prompt(Tokenizer.from_file(str(folder / "tokenizer.json")))
    yes, no = prompt.ids("yes")[0], prompt.ids("no")[0]
    out: list[dict[str, object]] = []
    for query, document in GOLDEN:
        ids = torch.tensor([prompt.head(query) + prompt.tail(document)])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, -1].float()
        value = round(float(logits[yes] - logits[no]), 6)
        out.append({"query": query, "document": document, "instruction": vocabulary.INSTRUCTION, "log_odds": value})
    return out


def write(weights: Path, work: Path, folder: Path) -> None:
    """Write all generated files."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    yes, no = tokenizer.token_to_id("yes"), tokenizer.token_to_id("no")
    rows = load_file(weights)["model.embed_tokens.weight"].shape[0]
    shape = Shape(vocabulary=rows)
    Nano.load(weights, shape, yes, no).save(folder / "model.safetensors", torch.bfloat16)
    config = shape.config(tokenizer.token_to_id(vocabulary.PAD))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(work / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(vocabulary.tokenizer_config(), indent=2) + "\n")
    (folder / "golden.json").write_text(json.dumps(golden(folder), indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Write to a temporary folder, then move each file into place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as temporary:
        write(arguments.weights, arguments.work, Path(temporary))
        for file in sorted(Path(temporary).iterdir()):
            file.replace(arguments.out / file.name)
            (arguments.out / file.name).chmod(0o644)
            print(file.name, (arguments.out / file.name).stat().st_size)


if __name__ == "__main__":
    main()
