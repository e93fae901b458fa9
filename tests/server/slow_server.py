"""`local-rerank serve` whose model takes a fixed time per token, so that tests can overload it.

python -m tests.server.slow_server MILLISECONDS_PER_1000_TOKENS [options of serve]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from local_rerank.commands.app import main
from local_rerank.engine.engine import Engine
from local_rerank.requests.pair import Pair, num_batch_tokens

real_score = Engine.score


def slow_score(self: Engine, pairs: Sequence[Pair]) -> list[float]:
    time.sleep(num_batch_tokens(pairs) * float(sys.argv[1]) / 1e6)
    return real_score(self, pairs)


if __name__ == "__main__":
    Engine.score = slow_score  # type: ignore[method-assign]
    main(["serve", *sys.argv[2:]])
