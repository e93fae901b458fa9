"""Xinference's client, which asks for the cluster and the model before it ranks."""

from answering import answered, ranked, run
from xinference_client import RESTfulClient


def call(job):
    request = {**job["request"]}
    model = RESTfulClient(job["base_url"], api_key=job["api_key"]).get_model(request.pop("model"))
    if "instruct" in request:
        request["instruction"] = request.pop("instruct")
    response = model.rerank(**request)
    return answered(ranked(response["results"]), response["meta"]["tokens"]["input_tokens"], response["id"])


run(call)
