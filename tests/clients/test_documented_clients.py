"""Each code block of docs/clients.md runs in the environments that it names, and prints the library's scores."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from local_rerank import Reranker
from local_rerank_server.config import HOSTED_INSTRUCTION
from tests.client_servers import RunPython
from tests.clients.driver import ENVIRONMENTS, environment_bin
from tests.clients.test_clients import SAME

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
QUERY = "capital of France"
DOCUMENTS = ("Rome is the capital of Italy", "Paris is the capital of France")
DOCUMENTED_URL = "http://127.0.0.1:8000"
PRINTED = {  # index and score as the blocks print them: lines, or in a shell the JSON of the response
    "python": r"(\d+) (\S+)\n",
    "js": r"(\d+) (\S+)\n",
    "sh": r'"index":\s*(\d+),\s*"relevance_score":\s*([\d.e-]+)',
}


@dataclass(frozen=True)
class Block:
    title: str
    language: str
    environment: str  # "" where the block needs none
    text: str

    def __str__(self) -> str:
        return f"{self.title}, {self.environment or 'no environment'}"


def blocks() -> list[Block]:
    """One for each environment of a block, which the words behind the fence's language name."""
    found = []
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        title = section.splitlines()[0]
        for language, environments, text in re.findall(r"^```(\w+)(.*)\n([\s\S]*?)^```", section, re.MULTILINE):
            found += [Block(title, language, name, text) for name in environments.split() or [""]]
    return found


def run(block: Block, base_url: str, run_python: RunPython) -> str:
    text = block.text.replace(DOCUMENTED_URL, base_url)
    if block.language == "python":
        return run_python(block.environment, text)
    path = os.environ["PATH"]
    if block.language != "js" and block.environment:
        path = f"{environment_bin(block.environment)}{os.pathsep}{path}"
    program = {"sh": ["sh", "-e"], "js": ["node", "--input-type=module", "-"]}[block.language]
    environment = os.environ | {"PATH": path}
    folder = ENVIRONMENTS / block.environment  # node looks for its modules there
    done = subprocess.run(program, input=text, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_a_documented_client_runs_unchanged(block: Block, base_url: str, nano: Reranker, run_python: RunPython) -> None:
    if block.language == "js" and shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    hosted = "/api/v1" in block.text or "/compatible-api" in block.text
    expected = nano.rank(QUERY, DOCUMENTS, instruction=HOSTED_INSTRUCTION if hosted else None)
    printed = re.findall(PRINTED[block.language], run(block, base_url, run_python))
    assert [int(index) for index, _ in printed] == [item.index for item in expected]
    scores = [float(score) for _, score in printed]
    assert scores == pytest.approx([item.relevance_score for item in expected], abs=SAME)
