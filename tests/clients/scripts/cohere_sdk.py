"""Cohere's SDK: API v2, v2 asynchronous, and v1."""

import asyncio

import cohere
from answering import answered, run


def v2(job):
    client = cohere.ClientV2(api_key=job["api_key"], base_url=job["base_url"])
    return described(client.rerank(**job["request"]))


def async_v2(job):
    async def rerank():
        client = cohere.AsyncClientV2(api_key=job["api_key"], base_url=job["base_url"])
        return await client.rerank(**job["request"])

    return described(asyncio.run(rerank()))


def v1(job):
    client = cohere.Client(api_key=job["api_key"], base_url=job["base_url"])
    return described(client.rerank(**job["request"]))


def described(response):
    results = [
        {
            "index": result.index,
            "relevance_score": result.relevance_score,
            "text": getattr(getattr(result, "document", None), "text", None),
        }
        for result in response.results
    ]
    return answered(results, response.meta.tokens.input_tokens, response.id)


ENTRIES = {"ClientV2": v2, "AsyncClientV2": async_v2, "Client": v1}

run(lambda job: ENTRIES[job["entry"]](job))
