"""`local-rerank serve` whose model blocks while a file exists, and prints the number of pairs of each forward pass.

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
        time.sleep(0.01)
    return real_score(self, pairs)


if __name__ == "__main__":
    Engine.score = held_score  # type: ignore[method-assign]
    main(["serve", *sys.argv[2:]])
