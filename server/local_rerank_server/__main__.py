"""`python -m local_rerank_server` runs `local-rerank serve`."""

from __future__ import annotations

import sys

from local_rerank.commands.app import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
