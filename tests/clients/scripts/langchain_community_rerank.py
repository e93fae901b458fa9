"""LangChain's DashScopeRerank, through the DashScope SDK."""

import dashscope
from answering import run
from langchain_community.document_compressors import DashScopeRerank
from langchain_core.documents import Document


def call(job):
    dashscope.base_http_api_url = job["base_url"] + "/api/v1"
    request = job["request"]
    documents = [Document(text, metadata={"index": index}) for index, text in enumerate(request["documents"])]
    reranker = DashScopeRerank(dashscope_api_key=job["api_key"], top_n=request.get("top_n", len(documents)))
    if "model" in request:  # the constructor takes none: it always sets gte-rerank
        reranker.model = request["model"]
    ranked = reranker.compress_documents(documents, request["query"])
    return {"results": [{**document.metadata, "text": document.page_content} for document in ranked]}


run(call)
