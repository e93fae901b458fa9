"""`local-rerank serve` whose model blocks while a file exists, and prints the number of pairs of each forward pass.

With any text in the file the device has failed for good.

python -m tests.server.held_server FILE [options of serve]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from local_rerank.commands.app import main
from local_rerank.engine.engine import Engine
from local_rerank.requests.pair import Pair

HELD_BY = Path(sys.argv[1])
real_score = Engine.score


def held_score(self: Engine, pairs: Sequence[Pair]) -> list[float]:
    sys.stdout.write(f"forward {len(pairs)}\n")
    sys.stdout.flush()
    while HELD_BY.exists():
        if not is_alive(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")
        time.sleep(0.01)
    return real_score(self, pairs)


def is_alive(self: Engine) -> bool:
    return not (HELD_BY.exists() and HELD_BY.read_text())


if __name__ == "__main__":
    Engine.score, Engine.is_alive = held_score, is_alive  # type: ignore[method-assign]
    main(["serve", *sys.argv[2:]])
