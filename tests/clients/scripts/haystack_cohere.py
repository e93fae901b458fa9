"""Haystack's CohereRanker."""

from answering import answered, run
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker


def call(job):
    request = job["request"]
    documents = [Document(content=text, meta={"index": index}) for index, text in enumerate(request["documents"])]
    ranker = CohereRanker(
        model=request["model"],
        top_k=request.get("top_n", len(documents)),
        api_key=Secret.from_token(job["api_key"]),
        api_base_url=job["base_url"],
    )
    ranked = ranker.run(query=request["query"], documents=documents)["documents"]
    return answered(
        {"index": document.meta["index"], "relevance_score": document.score, "text": document.content}
        for document in ranked
    )


run(call)
