"""LangChain's partner packages: Cohere, NVIDIA and Voyage."""

from answering import answered, run
from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import NVIDIARerank
from langchain_voyageai import VoyageAIRerank


def call(job):
    request = job["request"]
    documents = [Document(text, metadata={"index": index}) for index, text in enumerate(request["documents"])]
    ranked = ENTRIES[job["entry"]](job, request).compress_documents(documents, request["query"])
    return answered({**document.metadata, "text": document.page_content} for document in ranked)


def cohere(job, request):
    return CohereRerank(
        base_url=job["base_url"], cohere_api_key=job["api_key"], model=request["model"], top_n=request.get("top_n")
    )


def nvidia(job, request):
    return NVIDIARerank(
        base_url=job["base_url"] + "/v1", api_key=job["api_key"], model=request["model"], top_n=request["top_n"]
    )


def voyage(job, request):
    return VoyageAIRerank(
        base_url=job["base_url"] + "/v1", api_key=job["api_key"], model=request["model"], top_k=request.get("top_n")
    )


ENTRIES = {"CohereRerank": cohere, "NVIDIARerank": nvidia, "VoyageAIRerank": voyage}

run(call)
