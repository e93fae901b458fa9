"""LiteLLM's rerank, by provider; an entry is `provider path`, the path being what its base URL ends in."""

import litellm
from answering import answered, ranked, run

litellm.suppress_debug_info = True
litellm.telemetry = False


def call(job):
    provider, _, path = job["entry"].partition(" ")
    request = {**job["request"]}
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
