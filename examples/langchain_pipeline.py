"""LangChain: rerank the documents of a retriever with local-rerank and keep the best.

pip install langchain-classic langchain-cohere
local-rerank serve &
python examples/langchain_pipeline.py http://127.0.0.1:8000
"""

import sys

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_cohere import CohereRerank
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

TEXTS = [
    "The Seine flows through Paris and into the English Channel.",
    "Paris is the capital of France and its largest city.",
    "Rome is the capital of Italy.",
    "France is a country in western Europe with many rivers.",
    "A capital letter begins a sentence.",
    "The capital of a company is what its owners have put into it.",
]


class SharedWordsRetriever(BaseRetriever):
    """A placeholder for your search: returns documents that share words with the query."""

    texts: list[str]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        words = set(query.lower().split())
        return [Document(text) for text in self.texts if words & set(text.lower().strip(".").split())]


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    reranker = CohereRerank(cohere_api_key="any", model="rerank-v3.5", base_url=url, top_n=2)
    retriever = ContextualCompressionRetriever(
        base_retriever=SharedWordsRetriever(texts=TEXTS), base_compressor=reranker
    )
    for document in retriever.invoke("capital of France"):
        print(f"{document.metadata['relevance_score']:.6f} {document.page_content}")


if __name__ == "__main__":
    main()
