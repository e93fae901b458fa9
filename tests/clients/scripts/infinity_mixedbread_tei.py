"""Infinity's client, Mixedbread's SDK 2, which sends a key without `Bearer`, and a client of TEI that reads /info."""

from answering import answered, run
from infinity_client import AuthenticatedClient
from infinity_client.api.default import rerank
from infinity_client.models import RerankInput
from mixedbread_ai.client import MixedbreadAI
from tei_client import HttpClient


def infinity(job):
    client = AuthenticatedClient(job["base_url"], token=job["api_key"], raise_on_unexpected_status=True)
    response = rerank.sync(client=client, body=RerankInput(**job["request"]))
    results = [
        {"index": item.index, "relevance_score": item.relevance_score, "text": item.document or None}
        for item in response.results
    ]
    return answered(results, response.usage.total_tokens, response.id)


def mixedbread(job):
    request = job["request"]
    response = MixedbreadAI(api_key=job["api_key"], base_url=job["base_url"]).reranking(
        model=request["model"],
        query=request["query"],
        input=request["documents"],
        top_k=request.get("top_n"),
        return_input=request.get("return_documents", False),
    )
    results = [{"index": item.index, "relevance_score": item.score, "text": item.input} for item in response.data]
    return answered(results, response.usage.total_tokens)


def tei(job):
    request = job["request"]
    client = HttpClient(job["base_url"], headers={"Authorization": f"Bearer {job['api_key']}"})
    ranks = client.rerank(request["query"], request["documents"], request.get("return_documents", False)).ranks
    return answered({"index": item.index, "relevance_score": item.score, "text": item.text} for item in ranks)


ENTRIES = {"infinity-client": infinity, "mixedbread-ai": mixedbread, "tei-client": tei}

run(lambda job: ENTRIES[job["entry"]](job))
