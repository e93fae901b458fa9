"""The OpenAI SDK, posting to the compatible route as the hosted service documents it."""

from answering import ranked, run
from openai import OpenAI


def call(job):
    client = OpenAI(api_key=job["api_key"], base_url=job["base_url"] + "/compatible-api/v1")
    body = client.post("/reranks", body=job["request"], cast_to=object)
    return {
        "results": ranked(body["results"]),
        "total_tokens": body["usage"]["total_tokens"],
        "request_id": body["id"],
    }


run(call)
