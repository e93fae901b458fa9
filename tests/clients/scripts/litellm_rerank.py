"""LiteLLM's rerank, by provider; an entry is `provider path`, the path being what its base URL ends in."""

import os

import litellm
from answering import answered, ranked, run

litellm.suppress_debug_info = True
litellm.telemetry = False
os.environ |= {"AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}


def call(job):
    provider, _, path = job["entry"].partition(" ")
    request = {**job["request"]}
    os.environ["AWS_ACCESS_KEY_ID"] = job["api_key"]  # for bedrock, which takes no api_key
    model = request.pop("model")
    response = litellm.rerank(
        model=f"{provider}/{model}",
        api_base=job["base_url"] + path,
        api_key=job["api_key"],
        return_documents=request.pop("return_documents", False),
        **request,
    )
    results = ranked(response.results)
    if provider == "deepinfra":  # whose scores have the order of the documents
        results.sort(key=lambda result: -result["relevance_score"])
    return answered(results)


run(call)
