"""Update the response in both READMEs with that of the built-in model (`make docs`). A test compares the two."""

from __future__ import annotations

import json
import re
from pathlib import Path

from local_rerank import Reranker
from local_rerank_server.config import HOSTED_INSTRUCTION

PAGES = [Path(__file__).parents[1] / name for name in ("README.md", "README.zh.md")]
ANSWER = """{{
  "output": {{
    "results": [
{results}
    ]
  }},
  "usage": {{"total_tokens": {total_tokens}}},
  "request_id": "22666f84-274d-4e66-ac99-259a5d652c52"
}}
"""


def render(request: str) -> str:
    """The response of a server with the built-in model to `request`, JSON text, formatted for the README."""
    body = json.loads(request)["input"]
    with Reranker(device="cpu", dtype="fp32") as reranker:
        ranked = reranker.rank(body["query"], body["documents"], instruction=HOSTED_INSTRUCTION)
    results = [json.dumps({"index": item.index, "relevance_score": item.relevance_score}) for item in ranked]
    return ANSWER.format(results=",\n".join(f"      {result}" for result in results), total_tokens=ranked.total_tokens)


def main() -> None:
    (request,) = re.findall(r"-d '(.*?)'", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    answer = render(request)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(re.sub(r"(?<=```json\n).*?(?=```)", lambda _: answer, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
