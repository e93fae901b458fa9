"""The DashScope SDK's own entries, 1.20 to 2.0."""

import asyncio

import dashscope
from answering import ERROR_FIELDS, ranked, run


def text_rerank(job):
    return returned(dashscope.TextReRank.call(api_key=job["api_key"], **job["request"]))


def aio_text_rerank(job):
    return returned(asyncio.run(dashscope.AioTextReRank.call(api_key=job["api_key"], **job["request"])))


def returned(response):
    """TextReRank and AioTextReRank raise nothing: an error is a response too."""
    if response.status_code != 200:
        return {"error": {name: getattr(response, name) for name in ERROR_FIELDS}}
    return {
        "results": ranked(response.output.results),
        "total_tokens": response.usage["total_tokens"],
        "request_id": response.request_id,
    }


def client(job):
    with dashscope.Client(api_key=job["api_key"], base_url=dashscope.base_http_api_url) as client:
        return created(client.rerank.create(**job["request"]))


def async_client(job):
    async def create():
        async with dashscope.AsyncClient(api_key=job["api_key"], base_url=dashscope.base_http_api_url) as client:
            return await client.rerank.create(**job["request"])

    return created(asyncio.run(create()))


def created(response):
    """Client and AsyncClient return a pydantic model, and raise their errors."""
    return {
        "results": ranked(result.model_dump() for result in response.results),
        "total_tokens": response.usage.total_tokens,
        "request_id": response.request_id,
    }


ENTRIES = {
    "TextReRank.call": text_rerank,
    "AioTextReRank.call": aio_text_rerank,
    "Client": client,
    "AsyncClient": async_client,
}


def call(job):
    dashscope.base_http_api_url = job["base_url"] + "/api/v1"
    return ENTRIES[job["entry"]](job)


run(call)
