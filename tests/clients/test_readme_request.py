"""The README's request, run in a shell, gets the answer that the README shows."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
TOLERANCE = 1e-4  # fp32 sums, whose order depends on the CPU


def test_the_request_of_the_readme_is_answered_as_shown(open_url: str) -> None:
    (command,) = re.findall(r"^```sh\n(curl [\s\S]*?)^```", README, re.MULTILINE)
    (shown,) = re.findall(r"^```json\n([\s\S]*?)^```", README, re.MULTILINE)
    command = command.replace("curl http://127.0.0.1:8000", f"curl --silent --fail-with-body {open_url}")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    answer, expected = json.loads(done.stdout), json.loads(shown)
    for result in expected["output"]["results"]:
        result["relevance_score"] = pytest.approx(result["relevance_score"], abs=TOLERANCE)
    expected["request_id"] = answer["request_id"]
    assert answer == expected
