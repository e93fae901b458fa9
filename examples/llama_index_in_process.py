"""LlamaIndex: a node postprocessor that reranks in the same process, without a server.

pip install llama-index-core  # beside local-rerank
python examples/llama_index_in_process.py
"""

from llama_index.core import QueryBundle
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode

from local_rerank import Reranker


class LocalRerank(BaseNodePostprocessor):
    """Keeps the `top_n` most relevant nodes. Their text includes the metadata that an embedding model would see."""

    reranker: Reranker
    top_n: int = 3

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        if query_bundle is None:
            raise ValueError("LocalRerank needs a query: pass query_str=...")
        texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
        ranked = self.reranker.rank(query_bundle.query_str, texts, top_n=self.top_n)
        return [NodeWithScore(node=nodes[item.index].node, score=item.relevance_score) for item in ranked]


def main() -> None:
    """Rank some nodes; in a query engine, pass the postprocessor in `node_postprocessors`."""
    texts = ["Rome is in Italy", "Paris is the capital of France", "Bread is baked"]
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    with Reranker() as reranker:
        postprocessor = LocalRerank(reranker=reranker, top_n=2)
        for node in postprocessor.postprocess_nodes(nodes, query_str="capital of France"):
            print(f"{node.score:.6f} {node.text}")


if __name__ == "__main__":
    main()
