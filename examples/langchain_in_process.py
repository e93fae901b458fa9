"""LangChain: a document compressor that reranks in the same process, without a server.

pip install langchain-core  # beside local-rerank
python examples/langchain_in_process.py
"""

from collections.abc import Sequence

from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict

from local_rerank import Reranker


class LocalRerank(BaseDocumentCompressor):
    """Keeps the `top_n` most relevant documents, with `relevance_score` in their metadata."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    reranker: Reranker
    top_n: int = 3

    def compress_documents(self, documents: Sequence[Document], query: str, callbacks: object = None) -> list[Document]:
        if not documents:
            return []
        ranked = self.reranker.rank(query, [document.page_content for document in documents], top_n=self.top_n)
        return [
            documents[item.index].model_copy(
                update={"metadata": documents[item.index].metadata | {"relevance_score": item.relevance_score}}
            )
            for item in ranked
        ]


def main() -> None:
    """Rank some documents; in a chain, pass the compressor to ContextualCompressionRetriever."""
    texts = ["Rome is in Italy", "Paris is the capital of France", "Bread is baked"]
    with Reranker() as reranker:
        compressor = LocalRerank(reranker=reranker, top_n=2)
        for document in compressor.compress_documents([Document(text) for text in texts], "capital of France"):
            print(f"{document.metadata['relevance_score']:.6f} {document.page_content}")


if __name__ == "__main__":
    main()
