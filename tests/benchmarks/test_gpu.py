"""The scripts that measure on a bare GPU machine, as far as a CPU shows them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_THERE = "fastapi fastokens limits msgspec prometheus_client pydantic rich starlette uvicorn".split()
COLLECT = f"""
import sys
import pytest
sys.modules |= dict.fromkeys({NOT_THERE!r})
sys.exit(pytest.main(["-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", "tests/engine/cuda"]))
"""


@pytest.mark.slow
def test_the_tests_for_gpus_are_collected_on_a_machine_without_the_servers_packages() -> None:
    """benchmarks/bare stands in for two that the library itself imports."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "server", ROOT / "benchmarks/bare")))
    alone = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_scores_on_a_gpu_stay_near_fp32[fp8-False]" in done.stdout
