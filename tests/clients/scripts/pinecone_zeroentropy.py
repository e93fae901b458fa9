"""The SDKs of Pinecone, ZeroEntropy and Isaacus."""

from answering import answered, run
from isaacus import Isaacus
from pinecone import Pinecone
from zeroentropy import ZeroEntropy


def pinecone(job):
    request = job["request"]
    client = Pinecone(api_key=job["api_key"], host=job["base_url"])
    response = client.inference.rerank(
        model=request["model"],
        query=request["query"],
        documents=request["documents"],
        top_n=request.get("top_n"),
        return_documents=request.get("return_documents", False),
    )
    return answered(
        {"index": item.index, "relevance_score": item.score, "text": item.document and item.document["text"]}
        for item in response.data
    )


def zeroentropy(job):
    client = ZeroEntropy(api_key=job["api_key"], base_url=job["base_url"] + "/v1", max_retries=0)
    response = client.models.rerank(**job["request"])
    results = [{"index": item.index, "relevance_score": item.relevance_score} for item in response.results]
    return answered(results, response.total_tokens)


def isaacus(job):
    request = {**job["request"]}
    client = Isaacus(api_key=job["api_key"], base_url=job["base_url"] + "/v1", max_retries=0)
    response = client.rerankings.create(texts=request.pop("documents"), **request)
    results = [{"index": item.index, "relevance_score": item.score} for item in response.results]
    return answered(results, response.usage.input_tokens)


ENTRIES = {"isaacus": isaacus, "pinecone": pinecone, "zeroentropy": zeroentropy}

run(lambda job: ENTRIES[job["entry"]](job))
