"""`local-rerank serve`, but the model takes a set time for each token, so that a test can offer more than it can do.

python -m tests.server.slow_server MILLISECONDS_PER_1000_TOKENS [options of serve]
"""

from __future__ import annotations

import sys
import time

from torch import Tensor

from local_rerank.commands.app import main
from local_rerank.engine.engine import Engine
from local_rerank.engine.packing import PackedBatch

real_forward = Engine.forward


def slow_forward(self: Engine, batch: PackedBatch) -> Tensor:
    time.sleep(batch.num_tokens * float(sys.argv[1]) / 1e6)
    return real_forward(self, batch)


if __name__ == "__main__":
    Engine.forward = slow_forward  # type: ignore[method-assign]
    main(["serve", *sys.argv[2:]])
