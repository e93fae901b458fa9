"""Mixedbread's SDK."""

from answering import answered, run
from mixedbread import Mixedbread


def call(job):
    request = job["request"]
    client = Mixedbread(api_key=job["api_key"], base_url=job["base_url"], max_retries=0)
    response = client.rerank(
        model=request["model"],
        query=request["query"],
        input=request["documents"],
        return_input=request.get("return_documents", False),
        **({"top_k": request["top_n"]} if "top_n" in request else {}),
    )
    results = [
        {"index": result.index, "relevance_score": result.score, "text": result.input} for result in response.data
    ]
    return answered(results, response.usage.total_tokens)


run(call)
