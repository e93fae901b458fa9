"""LlamaIndex: a query engine that reranks retrieved nodes with local-rerank and keeps the best.

    pip install llama-index-core llama-index-postprocessor-cohere-rerank
    local-rerank serve &
    python examples/llama_index_pipeline.py http://127.0.0.1:8000

The language model is LlamaIndex's mock, so the script prints the nodes that a model would get.
"""

import sys

from llama_index.core import QueryBundle, Settings
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank

TEXTS = [
    "The Seine flows through Paris and into the English Channel.",
    "Paris is the capital of France and its largest city.",
    "Rome is the capital of Italy.",
    "France is a country in western Europe with many rivers.",
    "A capital letter begins a sentence.",
    "The capital of a company is what its owners have put into it.",
]


class SharedWordsNodes(BaseRetriever):
    """A placeholder for your index: returns nodes that share words with the query."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        words = set(query_bundle.query_str.lower().split())
        found = [text for text in TEXTS if words & set(text.lower().strip(".").split())]
        return [NodeWithScore(node=TextNode(text=text)) for text in found]


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    Settings.llm = MockLLM()
    reranker = CohereRerank(api_key="any", base_url=url, top_n=2)
    engine = RetrieverQueryEngine.from_args(SharedWordsNodes(), node_postprocessors=[reranker])
    for node in engine.query("capital of France").source_nodes:
        print(f"{node.score:.6f} {node.text}")


if __name__ == "__main__":
    main()
