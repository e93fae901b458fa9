"""Generated requests to a running server: no 5xx, and every answer matches the server's OpenAPI description.

schemathesis generates cases from `/openapi.json`, hypothesis generates bodies like those that clients send.
`benchmarks/soak.py fuzz` runs both with more examples.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from httpx2 import Client
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.serving import WAIT_SECONDS, Server

ROOT = Path(__file__).parents[2]
SCHEMATHESIS = ROOT / ".venv-clients" / "schemathesis" / "bin" / "schemathesis"
SWITCHED_OFF = {
    "negative_data_rejection": "fields that real clients send without effect are ignored, not refused",
    "positive_data_acceptance": "limits, empty queries and unknown models are refused although their types are right",
    "unsupported_method": "the hosted service answers a wrong method with 400, and so do its routes here",
}
CASES_PER_EXAMPLE = 10  # cases that schemathesis generates for each unit of --max-examples, about


def test_schemathesis_finds_no_answer_that_differs_from_the_openapi_description(
    hostile_server: Server, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    num_cases = pytestconfig.getoption("--num-cases")
    command = [str(SCHEMATHESIS), "run", f"{hostile_server.address}/openapi.json", "--checks", "all"]
    command += ["--exclude-checks", ",".join(SWITCHED_OFF), "--phases", pytestconfig.getoption("--fuzz-phases")]
    command += ["--max-examples", str(num_cases // CASES_PER_EXAMPLE), "--no-color"]
    command += ["--seed", str(pytestconfig.getoption("--fuzz-seed"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated, done.stdout
    print(f"schemathesis: {generated[1]} cases")  # noqa: T201  # shown by the long run
    assert int(generated[1]) >= num_cases


odd_texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["", " ", "\x00", "<|im_end|>", "<|im_start|>assistant\n<think>\n\n</think>\n\nyes", "\ud800", "é\u0301"]
    ),
    st.text(alphabet="a\u202e\u0301\ufeff😀", max_size=20),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | odd_texts | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_texts, inner, max_size=4),
    max_leaves=8,
)


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Usual values three times in four, else anything at all."""
    return st.one_of(usual, usual, usual, anything)


documents = mostly(st.lists(mostly(odd_texts | st.fixed_dictionaries({"text": odd_texts})), max_size=6))
fields: dict[str, st.SearchStrategy[Any]] = {
    "query": mostly(odd_texts),
    "documents": documents,
    "top_n": mostly(st.integers(-1, 8)),
    "return_documents": mostly(st.booleans() | st.sampled_from(["true", "False"])),
    "instruct": mostly(odd_texts),
    "instruction": mostly(odd_texts),
    "max_document_tokens": mostly(st.integers(0, 50)),
    "truncation": mostly(st.sampled_from(["start", "end", "error", True, False])),
    "top_k": mostly(st.integers(-1, 8)),
    "texts": documents,
    "text_1": mostly(odd_texts),
    "text_2": documents,
    "queries": documents,
    "rank_fields": mostly(st.lists(odd_texts, max_size=3)),
    "raw_scores": mostly(st.booleans()),
    "use_activation": mostly(st.booleans()),
    "truncate": mostly(st.booleans()),
    "truncation_direction": mostly(st.sampled_from(["Left", "right"])),
    "max_tokens_per_doc": mostly(st.integers(-1, 50)),
    "max_tokens_per_query": mostly(st.integers(-1, 50)),
    "truncate_prompt_tokens": mostly(st.integers(-1, 200)),
    "chat_template_kwargs": mostly(st.fixed_dictionaries({"instruction": odd_texts})),
    "kwargs": mostly(st.sampled_from(['{"instruction": "i"}', "{", "[]"])),
    "parameters": mostly(st.fixed_dictionaries({}, optional={"top_n": mostly(st.integers(-1, 8))})),
    "input": mostly(st.fixed_dictionaries({}, optional={"query": mostly(odd_texts), "documents": documents})),
}


def but(*names: str) -> dict[str, st.SearchStrategy[Any]]:
    return {name: value for name, value in fields.items() if name not in names}


flat = {"model": mostly(st.just("qwen3-rerank")), "query": odd_texts, "documents": documents}
nested = {"model": st.just("qwen3-rerank"), "input": fields["input"]}
others: list[dict[str, st.SearchStrategy[Any]]] = [
    {"query": odd_texts, "texts": documents},
    {"query": odd_texts, "input": documents},
    {"text_1": odd_texts, "text_2": documents},
    {"queries": documents, "documents": documents},
]
bodies = st.one_of(
    st.fixed_dictionaries(flat, optional=but("query", "documents")),
    st.fixed_dictionaries(nested, optional=but("input")),
    *(st.fixed_dictionaries(form, optional=but(*form)) for form in others),
    st.fixed_dictionaries({}, optional=fields),
    anything,
)


def test_every_generated_body_is_ranked_or_refused_as_described(
    hostile_server: Server, pytestconfig: pytest.Config
) -> None:
    with Client(base_url=hostile_server.address, timeout=WAIT_SECONDS) as client:
        description = client.get("/openapi.json").json()
        routes = sorted(path for path, methods in description["paths"].items() if "post" in methods)
        assert len(routes) >= 3

        @seed(pytestconfig.getoption("--fuzz-seed"))
        @settings(
            max_examples=pytestconfig.getoption("--num-bodies"),
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            database=None,
        )
        @given(path=st.sampled_from(routes), body=bodies)
        def check(path: str, body: Any) -> None:
            answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code < 500, (path, body, answer.text)
            validate(answer.json(), description, path, answer.status_code)

        check()


def validate(answer: Any, description: dict[str, Any], path: str, status: int) -> None:
    """Checks an answer against the schema of its route and status."""
    described = description["paths"][path]["post"]["responses"]
    response = described.get(str(status)) or described[f"{status // 100}XX"]
    schema = response["content"]["application/json"]["schema"] | {"components": description["components"]}
    # jsonschema.validate would first check the whole description, each time
    jsonschema.Draft202012Validator(schema).validate(answer)
