"""Step 6c: keep the score steady over length, and set its scale and offset, also across the languages.

The network of the last layer saw documents of up to 260 tokens when `fit.py` fitted it, and carried on what it made of
their length: any text of 500 tokens was relevant, whatever it said. Now the length that it reads ends at `CAP`, and a
unit subtracts what the other features gain from `LONG` on. Nothing else is fitted anew, so the order of short documents
stays. Scale, offset and what is added across the languages were fitted to the development half of the everyday
questions. config.json says how long chunks are: short, because a sentence that answers is diluted by what stands
around it.

``python steady.py --folder ../local_rerank/nano`` rewrites weights, config.json and golden.json. Run it once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from align import CHINESE, ENGLISH, OPEN, write
from export import golden
from fit import UNITS
from layer_weights import NEAR, D
from safetensors.torch import load_file
from torch import Tensor

EXCESS = 345  # a free dimension of the residual stream: by how much the length exceeds CAP
SMALLER = 0.125  # factor of the stored length, so that it hardly counts in the norm; a power of two rounds nothing
CAP, LONG = 0.3, 1.2  # lengths 3 n / (n + 600) of about 65 and 400 tokens
SLOPE = 4.0  # log-odds subtracted for each unit of length beyond LONG
SHARP = 1000.0  # slope of the gates
FREE = 500  # a unit of layer 2 that is not used
SCALE, OFFSET = 0.7, -0.75  # of the log-odds
ACROSS, LESS = 1.3, -2.6  # log-odds added across the languages: for each unit of the five cosines, and in any case
CHUNKS = {"chunk_tokens": 256, "chunk_overlap_tokens": 64}  # where a user asks for chunks
ROOT = 0.212  # root mean square of the last state, without the score


def steady(state: dict[str, Tensor], layers: int) -> None:
    """Change the tensors of a checkpoint in place."""
    second, last = "model.layers.2.", f"model.layers.{layers - 1}.mlp."
    state[second + "self_attn.o_proj.weight"][D["LENGTH"]] *= SMALLER
    gate, up, down = (state[f"{second}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    gate[FREE], up[FREE], down[:, FREE] = 0, 0, 0
    gate[FREE, D["LENGTH"]], gate[FREE, D["ONE"]] = SHARP, -SHARP * SMALLER * CAP
    up[FREE, D["ONE"]] = 1
    down[D["LENGTH"], FREE], down[EXCESS, FREE] = -1 / SHARP, 1 / SHARP
    gate, up, down = (state[f"{last}{part}_proj.weight"] for part in ("gate", "up", "down"))
    for matrix in (gate, up):
        matrix[:UNITS, D["LENGTH"]] /= SMALLER
    norm = state["model.norm.weight"]
    gate[UNITS], up[UNITS], down[:, UNITS] = 0, 0, 0
    gate[UNITS, EXCESS], gate[UNITS, D["ONE"]] = SHARP, -SHARP * SMALLER * (LONG - CAP)
    up[UNITS, D["ONE"]] = 1
    down[D["SCORE"], UNITS] = -SLOPE / SMALLER / SHARP * ROOT / (2 * norm[D["SCORE"]])
    gate[UNITS + 1], up[UNITS + 1], down[:, UNITS + 1] = 0, 0, 0
    gate[UNITS + 1, [CHINESE, ENGLISH]] = OPEN
    up[UNITS + 1, list(NEAR)], up[UNITS + 1, D["ONE"]] = ACROSS, LESS
    down[D["SCORE"], UNITS + 1] = ROOT / (2 * norm[D["SCORE"]] * SCALE * OPEN)
    norm[D["SCORE"]] *= SCALE
    norm[D["BIAS"]] = norm[D["BIAS"]] * SCALE + OFFSET * ROOT / 0.2  # the rows of yes and no differ by 0.2


def main() -> None:
    """Change the weights of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.folder
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    state = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    if state["model.layers.2.mlp.gate_proj.weight"][FREE].any():
        raise SystemExit(f"the weights in {folder} are steady already")
    steady(state, layers)
    write(folder, state, layers)
    config = json.loads((folder / "config.json").read_text()) | {"local_rerank": CHUNKS}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "golden.json").write_text(json.dumps(golden(folder), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
