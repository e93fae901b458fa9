"""How the threads of torch's CPU operators wait for one another; read when torch is loaded, so it is set before."""

from __future__ import annotations

import os

VARIABLES = {
    "OMP_WAIT_POLICY": "passive",  # spinning without end made a request of 32 tokens take 350 ms beside other work
    "GOMP_SPINCOUNT": "20000",  # some ten microseconds: without them waking takes longer than a block of tokens
}


def wait_briefly() -> None:
    """Let threads spin for a moment before they sleep, unless the environment says how they wait."""
    if not VARIABLES.keys() & os.environ.keys():
        os.environ.update(VARIABLES)
