"""`local-rerank serve`, but the model waits while a file is there, and tells how many pairs each forward pass has.

python -m tests.server.held_server FILE [options of serve]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from torch import Tensor

from local_rerank.commands.app import main
from local_rerank.engine.engine import Engine
from local_rerank.engine.packing import PackedBatch

HELD_BY = Path(sys.argv[1])
real_forward = Engine.forward


def held_forward(self: Engine, batch: PackedBatch) -> Tensor:
    sys.stdout.write(f"forward {batch.num_pairs}\n")
    sys.stdout.flush()
    while HELD_BY.exists():
        time.sleep(0.01)
    return real_forward(self, batch)


if __name__ == "__main__":
    Engine.forward = held_forward  # type: ignore[method-assign]
    main(["serve", *sys.argv[2:]])
