"""Haystack's CohereRanker and NvidiaRanker."""

from answering import answered, run
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.nvidia import NvidiaRanker


def call(job):
    request = job["request"]
    documents = [Document(content=text, meta={"index": index}) for index, text in enumerate(request["documents"])]
    ranker = RANKERS[job["entry"]](
        job["base_url"],
        model=request["model"],
        top_k=request.get("top_n", len(documents)),
        api_key=Secret.from_token(job["api_key"]),
    )
    ranked = ranker.run(query=request["query"], documents=documents)["documents"]
    return answered(
        {"index": document.meta["index"], "relevance_score": document.score, "text": document.content}
        for document in ranked
    )


RANKERS = {
    "CohereRanker": lambda base_url, **options: CohereRanker(api_base_url=base_url, **options),
    "NvidiaRanker": lambda base_url, **options: NvidiaRanker(api_url=f"{base_url}/v1", truncate="END", **options),
}

run(call)
