"""LlamaIndex's DashScopeRerank, through the DashScope SDK."""

import dashscope
from answering import answered, run
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.dashscope_rerank import DashScopeRerank


def call(job):
    dashscope.base_http_api_url = job["base_url"] + "/api/v1"
    request = job["request"]
    nodes = [NodeWithScore(node=TextNode(id_=str(index), text=text)) for index, text in enumerate(request["documents"])]
    reranker = DashScopeRerank(api_key=job["api_key"], model=request["model"], top_n=request.get("top_n", len(nodes)))
    ranked = reranker.postprocess_nodes(nodes, query_str=request["query"])
    return answered(
        {"index": int(node.node.node_id), "relevance_score": node.score, "text": node.node.get_content()}
        for node in ranked
    )


run(call)
