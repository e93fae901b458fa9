"""The examples for frameworks, in the frameworks' environment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from local_rerank import Reranker
from tests.client_servers import RunPython
from tests.clients.test_clients import SAME

EXAMPLES = Path(__file__).parents[2] / "examples"
QUERY = "capital of France"


@pytest.mark.parametrize("name", ["langchain_pipeline.py", "llama_index_pipeline.py"])
def test_a_pipeline_keeps_the_best_retrieved_documents(
    name: str, base_url: str, nano: Reranker, run_python: RunPython
) -> None:
    script = EXAMPLES / name
    done = run_python("frameworks", script.read_text(encoding="utf-8"), base_url, path=str(script))
    printed = [line.partition(" ")[::2] for line in done.splitlines()]
    words = set(QUERY.lower().split())
    texts = [text for text in sources(script) if words & set(text.lower().strip(".").split())]
    expected = nano.rank(QUERY, texts, top_n=2)
    assert [text for _, text in printed] == [item.document for item in expected]
    scores = [float(score) for score, _ in printed]
    assert scores == pytest.approx([item.relevance_score for item in expected], abs=SAME)


def sources(script: Path) -> list[str]:
    """The script's TEXTS, read without an import, because its framework is not installed here."""
    text = script.read_text(encoding="utf-8")
    listed: dict[str, list[str]] = {}
    exec(text[text.index("TEXTS = [") : text.index("]\n") + 1], listed)
    return listed["TEXTS"]


IN_PROCESS = ("langchain_in_process.py", "llama_index_in_process.py", "haystack_in_process.py")
PROGRAM = """
import haystack, langchain_core.documents, llama_index.core, runpy, sys  # in the host, which has them from other tests

sys.path += [{root!r}, *{packages!r}]  # this package, torch and what else the frameworks' environment lacks
for name in {names!r}:
    runpy.run_path({root!r} + "/examples/" + name, run_name="__main__")
"""


def test_components_in_the_same_process_keep_the_best_documents(nano: Reranker, run_python: RunPython) -> None:
    places = {"root": str(EXAMPLES.parent), "packages": sys.path, "names": IN_PROCESS}
    printed = [line.partition(" ")[::2] for line in run_python("frameworks", PROGRAM.format(**places)).splitlines()]
    expected = nano.rank(QUERY, ["Rome is in Italy", "Paris is the capital of France", "Bread is baked"], top_n=2)
    assert [text for _, text in printed] == [item.document for item in expected] * len(IN_PROCESS)
    scores = [float(score) for score, _ in printed]
    assert scores == pytest.approx([item.relevance_score for item in expected] * len(IN_PROCESS), abs=SAME)
