"""LlamaIndex's rerankers for Cohere, Jina, Text Embeddings Inference, Xinference and SiliconFlow."""

from answering import answered, run
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.siliconflow_rerank import SiliconFlowRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from llama_index.postprocessor.xinference_rerank import XinferenceRerank

ENTRIES = {
    "CohereRerank": lambda url, key, **more: CohereRerank(base_url=url, api_key=key, max_retries=1, **more),
    "JinaRerank": lambda url, key, **more: JinaRerank(base_url=url + "/v1", api_key=key, **more),
    "TextEmbeddingInference": lambda url, key, model, **more: TextEmbeddingInference(
        base_url=url, auth_token=f"Bearer {key}", model_name=model, **more
    ),
    "XinferenceRerank": lambda url, key, **more: XinferenceRerank(base_url=url, **more),  # it sends no key
    "SiliconFlowRerank": lambda url, key, **more: SiliconFlowRerank(base_url=url + "/v1/rerank", api_key=key, **more),
}


def call(job):
    request = job["request"]
    nodes = [NodeWithScore(node=TextNode(id_=str(index), text=text)) for index, text in enumerate(request["documents"])]
    options = {"model": request["model"], "top_n": request.get("top_n", len(nodes))}
    reranker = ENTRIES[job["entry"]](job["base_url"], job["api_key"], **options)
    ranked = reranker.postprocess_nodes(nodes, query_str=request["query"])
    return answered(
        {"index": int(node.node.node_id), "relevance_score": node.score, "text": node.node.get_content()}
        for node in ranked
    )


run(call)
