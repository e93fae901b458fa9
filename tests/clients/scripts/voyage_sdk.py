"""Voyage's SDK, synchronous and asynchronous."""

import asyncio

import voyageai
from answering import answered, run


def client(job):
    return described(voyageai.Client(**settings(job)).rerank(**arguments(job["request"])))


def async_client(job):
    async def rerank():
        return await voyageai.AsyncClient(**settings(job)).rerank(**arguments(job["request"]))

    return described(asyncio.run(rerank()))


def settings(job):
    return {"api_key": job["api_key"], "base_url": job["base_url"] + "/v1"}


def arguments(request):
    return {
        "query": request["query"],
        "documents": request["documents"],
        "model": request["model"],
        "top_k": request.get("top_n"),
        **({"truncation": request["truncation"]} if "truncation" in request else {}),
    }


def described(response):
    results = [
        {"index": result.index, "relevance_score": result.relevance_score, "text": result.document}
        for result in response.results
    ]
    return answered(results, response.total_tokens)


ENTRIES = {"Client": client, "AsyncClient": async_client}

run(lambda job: ENTRIES[job["entry"]](job))
