"""The prompt of each model family, as text. A new family is a new row of `TEMPLATES`.

The pieces come from the model card of Qwen3-Reranker ("Transformers Usage"). Nothing here touches a tokenizer;
`tokenization.py` turns the pieces into token ids.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """The fixed texts around instruction, query and document, and the two answers."""

    prefix: str  # may hold control tokens
    instruction_label: str
    query_label: str
    document_label: str  # the document follows after one space, which belongs to the document's side
    suffix: str  # may hold control tokens
    yes: str
    no: str

    def shared_body(self, instruction: str, query: str) -> str:
        """The text after `prefix` that every pair of a request begins with."""
        return f"{self.instruction_label} {instruction}\n{self.query_label} {query}\n{self.document_label}"


QWEN3_RERANKER = PromptTemplate(
    prefix=(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    ),
    instruction_label="<Instruct>:",
    query_label="<Query>:",
    document_label="<Document>:",
    suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    yes="yes",
    no="no",
)

TEMPLATES: dict[str, PromptTemplate] = {
    "Qwen3ForCausalLM": QWEN3_RERANKER,
    "Qwen3ForSequenceClassification": QWEN3_RERANKER,
}
"""Keyed by the first entry of `architectures` in the checkpoint's config.json."""
