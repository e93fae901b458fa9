"""The prompt template of each model family, as text; `checkpoints/recipes.py` says which one a checkpoint has.

The texts come from the model card of Qwen3-Reranker ("Transformers Usage"). `tokenization.py` encodes them.

Clients written for servers without templates, as vLLM's examples are, render the prompt themselves. `unwrap` knows
these forms. Whitespace may differ around `prefix` and after the document's end, and the query's newline may be missing:

- the query is `prefix`, instruction and query; each document is its label, the text, and one of `client_suffixes`;
- the query is instruction and query; each document is its label and the text, with or without such a suffix.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from local_rerank.types import RerankRequest


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """The fixed texts around instruction, query and document, and the two answers."""

    prefix: str  # may contain control tokens
    instruction_label: str
    query_label: str
    document_label: str  # the space after it is encoded with the document
    suffix: str  # may contain control tokens
    client_suffixes: tuple[str, ...]  # with which clients end a prompt, without the whitespace at its end
    yes: str
    no: str

    @property
    def recipe(self) -> dict[str, str]:
        """The fields that decide what the model reads, as a bundle stores them."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, str)}

    def shared_body(self, instruction: str, query: str) -> str:
        """The text between `prefix` and the document, which all pairs of a request share."""
        return f"{self.instruction_label} {instruction}\n{self.query_label} {query}\n{self.document_label}"

    def unwrap(self, request: RerankRequest) -> RerankRequest | None:
        """The request with the plain texts, if its query and every document are parts of a rendered prompt.

        The instruction in the query replaces the request's. Raises a leaf of InvalidRequest if the query is empty.
        """
        query = request.query.lstrip()
        is_whole = query.startswith(self.prefix.rstrip())
        if is_whole:
            query = query[len(self.prefix.rstrip()) :].lstrip()
        if not query.startswith(self.instruction_label):
            return None
        instruction, label, query = query.removeprefix(self.instruction_label).partition(f"\n{self.query_label}")
        documents = [self._unwrap_document(document, is_whole) for document in request.documents]
        if not label or None in documents:
            return None
        newlines = "\n\n" if instruction.endswith("\n") else "\n"  # the model card's code for vLLM has two
        query = query.removesuffix(newlines) if query.endswith(newlines) else query.removesuffix("\n")
        return replace(
            request,
            instruction=instruction.removesuffix("\n").removeprefix(" "),
            query=query.removeprefix(" "),
            documents=tuple(document for document in documents if document is not None),
        )

    def looks_rendered(self, request: RerankRequest) -> bool:
        """Whether the query or a document starts, or a document starts and ends, like a part of a rendered prompt."""
        starts = (self.prefix.partition("\n")[0], self.instruction_label)
        if request.query.lstrip().startswith(starts):
            return True
        return any(
            document.lstrip().startswith(self.prefix.rstrip())  # the whole prompt of a pair
            or (document.startswith(self.document_label) and self._unwrap_document(document, True) is not None)
            for document in request.documents
        )

    def start_of_text(self, document: str) -> int:
        """Where the text of an unwrapped document starts."""
        start = document.index(self.document_label) + len(self.document_label)
        return start + document.startswith(" ", start)

    def _unwrap_document(self, document: str, needs_suffix: bool) -> str | None:
        text = document.lstrip()
        suffix = next((suffix for suffix in self.client_suffixes if text.rstrip().endswith(suffix)), None)
        if not text.startswith(self.document_label) or (needs_suffix and suffix is None):
            return None
        if suffix is not None:
            text = text.rstrip().removesuffix(suffix)
        return text.removeprefix(self.document_label).removeprefix(" ")


QWEN3_RERANKER = PromptTemplate(
    prefix=(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    ),
    instruction_label="<Instruct>:",
    query_label="<Query>:",
    document_label="<Document>:",
    suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    client_suffixes=(
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>",
        "<|im_end|>\n<|im_start|>assistant",  # SGLang's template
    ),
    yes="yes",
    no="no",
)
