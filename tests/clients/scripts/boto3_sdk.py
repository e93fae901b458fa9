"""boto3: Rerank of Bedrock's agent runtime, and InvokeModel."""

import json

import boto3
from answering import answered, ranked, run
from botocore.config import Config

ARN = "arn:aws:bedrock:us-east-1::foundation-model/"


def call(job):
    service, _, operation = job["entry"].partition(" ")
    client = boto3.client(
        service,
        endpoint_url=job["base_url"],
        region_name="us-east-1",
        aws_access_key_id=job["api_key"],
        aws_secret_access_key="any",
        config=Config(retries={"total_max_attempts": 1}),
    )
    return OPERATIONS[operation](client, **job["request"])


def rerank(client, model, query, documents, **options):
    configuration = {"modelConfiguration": {"modelArn": ARN + model}}
    if "top_n" in options:
        configuration["numberOfResults"] = options["top_n"]
    if "instruct" in options:
        configuration["modelConfiguration"]["additionalModelRequestFields"] = {"instruct": options["instruct"]}
    response = client.rerank(
        queries=[{"type": "TEXT", "textQuery": {"text": query}}],
        sources=[
            {"type": "INLINE", "inlineDocumentSource": {"type": "TEXT", "textDocument": {"text": text}}}
            for text in documents
        ],
        rerankingConfiguration={
            "type": "BEDROCK_RERANKING_MODEL",
            "bedrockRerankingConfiguration": configuration,
        },
    )
    return answered(
        {"index": result["index"], "relevance_score": result["relevanceScore"]} for result in response["results"]
    )


def invoke_model(client, model, **request):
    response = client.invoke_model(modelId=ARN + model, body=json.dumps({**request, "api_version": 2}))
    return answered(ranked(json.load(response["body"])["results"]))


OPERATIONS = {"rerank": rerank, "invoke_model": invoke_model}

run(call)
