"""Memory that a forward pass frees stays for the next one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PASSES = """
import resource, sys
from local_rerank import Reranker

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
with Reranker(sys.argv[1], device="cpu", max_length=8192) as reranker:
    documents = [f"{number} " + "word " * 500 for number in range(6)]
    for _ in range(2):
        reranker.rank("a query", documents)
    before = faults()
    reranker.rank("a query", documents)
    print(faults() - before)
"""


def _faults_of_a_pass(model: Path, **environment: str) -> int:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    program = [sys.executable, "-c", PASSES, str(model)]
    done = subprocess.run(program, env=variables | environment, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_a_pass_takes_no_new_memory_unless_the_environment_sets_the_allocator(tiny_checkpoint: Path) -> None:
    as_asked_for = _faults_of_a_pass(tiny_checkpoint, MALLOC_MMAP_THRESHOLD_="131072")
    assert as_asked_for > 1000
    assert _faults_of_a_pass(tiny_checkpoint) < as_asked_for / 10
