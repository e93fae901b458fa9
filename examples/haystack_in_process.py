"""Haystack: a ranker component that runs in the same process, without a server.

pip install haystack-ai  # beside local-rerank
python examples/haystack_in_process.py
"""

from dataclasses import replace

from haystack import Document, Pipeline, component

from local_rerank import Reranker


@component
class LocalRanker:
    """Keeps the `top_k` most relevant documents, with their relevance as `score`. Pipelines call `warm_up`."""

    def __init__(self, model: str | None = None, top_k: int = 3) -> None:
        self.model, self.top_k = model, top_k  # by which pipelines are saved
        self.reranker: Reranker | None = None

    def warm_up(self) -> None:
        self.reranker = self.reranker or Reranker(self.model)

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        self.warm_up()
        texts = [document.content or "" for document in documents]
        ranked = self.reranker.rank(query, texts, top_n=top_k or self.top_k) if texts else []
        return {"documents": [replace(documents[item.index], score=item.relevance_score) for item in ranked]}


def main() -> None:
    """Rank some documents in a pipeline of one component."""
    texts = ["Rome is in Italy", "Paris is the capital of France", "Bread is baked"]
    pipeline = Pipeline()
    pipeline.add_component("ranker", LocalRanker(top_k=2))
    documents = [Document(content=text) for text in texts]
    found = pipeline.run({"ranker": {"query": "capital of France", "documents": documents}})
    for document in found["ranker"]["documents"]:
        print(f"{document.score:.6f} {document.content}")


if __name__ == "__main__":
    main()
