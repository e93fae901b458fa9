"""Calls of `CrossEncoder` and what sentence-transformers returns for them: `python -m tests.cross_encoder_calls`
records that in tests/data/cross_encoder.json. Recording needs sentence-transformers, the tests do not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from local_rerank.requests.prompts import QWEN3_RERANKER

ANSWERS = Path(__file__).parent / "data" / "cross_encoder.json"
NANO = Path(__file__).parents[1] / "local_rerank" / "nano"
QUERY = "capital of France"
TEXTS = ["Rome is the capital of Italy", "Paris is the capital of France", "Bread", "Paris is the capital of France"]
PAIRS = [(QUERY, TEXTS[0]), (QUERY, TEXTS[1]), ("how to bake", TEXTS[2])]
PROMPTS = {"bread": "Retrieve recipes"}
SIGMOID = torch.nn.Sigmoid()

CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "pairs": ("predict", (PAIRS,), {}),
    "lists as pairs": ("predict", ([list(pair) for pair in PAIRS],), {}),
    "an array of pairs": ("predict", (np.array(PAIRS),), {}),
    "one pair": ("predict", (PAIRS[1],), {}),
    "one pair as a list": ("predict", (list(PAIRS[1]),), {}),
    "one pair as an array": ("predict", (np.array(PAIRS[1]),), {}),
    "one pair in a list": ("predict", (PAIRS[:1],), {}),
    "a tensor": ("predict", (PAIRS,), {"convert_to_tensor": True}),
    "a tensor first": ("predict", (PAIRS,), {"convert_to_tensor": True, "convert_to_numpy": False}),
    "a list": ("predict", (PAIRS,), {"convert_to_numpy": False}),
    "one pair, a tensor": ("predict", (PAIRS[1],), {"convert_to_tensor": True}),
    "one pair, no array": ("predict", (PAIRS[1],), {"convert_to_numpy": False}),
    "no pairs, a list": ("predict", ([],), {"convert_to_numpy": False}),
    "no pairs, a tensor": ("predict", ([],), {"convert_to_tensor": True}),
    "probabilities": ("predict", (PAIRS,), {"activation_fn": SIGMOID}),
    "probabilities by the former name": ("predict", (PAIRS,), {"activation_fct": SIGMOID}),
    "an activation with weights": ("predict", (PAIRS,), {"activation_fn": torch.nn.PReLU()}),
    "an activation in 16 bits": ("predict", (PAIRS,), {"activation_fn": torch.Tensor.half}),
    "softmax of one label": ("predict", (PAIRS,), {"apply_softmax": True}),
    "sentences": ("predict", (), {"sentences": PAIRS, "batch_size": 1, "show_progress_bar": False, "num_workers": 0}),
    "a prompt": ("predict", (PAIRS,), {"prompt": "Retrieve recipes"}),
    "a prompt by name": ("predict", (PAIRS,), {"prompt_name": "bread"}),
    "rank": ("rank", (QUERY, TEXTS), {}),
    "rank, the best with texts": ("rank", (QUERY, TEXTS, 2, True), {}),
    "rank, probabilities": ("rank", (QUERY, TEXTS), {"top_k": 3, "activation_fn": SIGMOID, "return_documents": True}),
    "rank, more than there are": ("rank", (QUERY, TEXTS[:2]), {"top_k": 9, "batch_size": 1}),
    "rank, its former arguments": ("rank", (QUERY, TEXTS), {"convert_to_tensor": True, "apply_softmax": True}),
    "rank, none": ("rank", (QUERY, []), {}),
    "rank, with a prompt": ("rank", (QUERY, TEXTS), {"prompt_name": "bread", "show_progress_bar": False}),
}


def described(value: Any) -> Any:
    """Type, dtype, shape and values of what a call returned."""
    if isinstance(value, list):
        return [described(item) for item in value]
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    if isinstance(value, int | float | str) and not isinstance(value, np.generic):
        return value
    of = {"type": type(value).__name__, "dtype": str(value.dtype), "shape": list(value.shape)}
    return of | {"values": value.tolist()}


def answers(model: Any) -> dict[str, Any]:
    return {
        name: described(getattr(model, method)(*args, **options)) for name, (method, args, options) in CALLS.items()
    }


def main() -> None:
    """Record what sentence-transformers answers with the built-in model and Qwen's prompt as chat template."""
    import sentence_transformers

    template = QWEN3_RERANKER
    content = {
        role: "{{ messages | selectattr('role', 'eq', '" + role + "') | map(attribute='content') | join }}"
        for role in ("system", "query", "document")
    }
    body = template.shared_body(content["system"], content["query"]) + " " + content["document"]
    suffix = f"{{{{ {json.dumps(template.suffix)} }}}}"  # as an expression: Jinja drops a newline at the end of a text
    with tempfile.TemporaryDirectory() as folder:
        for file in NANO.iterdir():
            (Path(folder) / file.name).symlink_to(file)
        model = sentence_transformers.CrossEncoder(
            folder,
            device="cpu",
            activation_fn=torch.nn.Identity(),
            prompts={"query": "Given a web search query, retrieve relevant passages that answer the query", **PROMPTS},
            default_prompt_name="query",
            model_kwargs={"dtype": torch.float32},
            processor_kwargs={"chat_template": template.prefix + body + suffix},
        )
        recorded = {"version": sentence_transformers.__version__, "answers": answers(model)}
    ANSWERS.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
