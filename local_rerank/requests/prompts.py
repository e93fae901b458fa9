"""The prompt template of each model family, as text. To add a family, add a row to `TEMPLATES`.

The texts come from the model card of Qwen3-Reranker ("Transformers Usage"). `tokenization.py` encodes them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """The fixed texts around instruction, query and document, and the two answers."""

    prefix: str  # may contain control tokens
    instruction_label: str
    query_label: str
    document_label: str  # the space after it is encoded with the document
    suffix: str  # may contain control tokens
    yes: str
    no: str

    def shared_body(self, instruction: str, query: str) -> str:
        """The text between `prefix` and the document, which all pairs of a request share."""
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
"""By the first entry of `architectures` in the checkpoint's config.json."""
