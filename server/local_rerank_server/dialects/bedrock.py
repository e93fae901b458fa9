"""AWS Bedrock: the agent runtime's Rerank, and InvokeModel with the body of Cohere's models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NotRequired, Self

from annotated_types import Ge, Len
from pydantic import ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.errors import DeadlineExceeded, LocalRerankError
from local_rerank.types import RankedDocument, RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.dialects._examples import DOCUMENTS, QUERY
from local_rerank_server.dialects._field_types import Count, Document, Many, RequestBody, String, Text, Unsupported
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._options import (
    DocumentsRequest,
    Options,
    as_object,
    make_request,
    parse_documents,
    score_of,
    text_of,
)
from local_rerank_server.dialects._responses import amazon_error_type
from local_rerank_server.dialects._route import Dialect, add_post, rank_body
from local_rerank_server.errors import MissingField

RERANK, INVOKE = "/rerank", "/model/{model_id:path}/invoke"


class CamelCase(RequestBody):
    """An object whose names are in camelCase."""

    model_config = ConfigDict(alias_generator=to_camel)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise PydanticCustomError("object", "a JSON object is expected")
        return {name: value for name, value in body.items() if value is not None}


class BedrockQuery(CamelCase):
    text_query: Text


class BedrockInlineDocument(CamelCase):
    text_document: Text | None = None
    json_document: Document | None = None


class BedrockSource(CamelCase):
    inline_document_source: BedrockInlineDocument


class BedrockOptions(Options):
    """The options of all dialects; boto3 passes no others on than those of the model."""

    return_documents: Unsupported = None  # the response has no place for them
    return_text: Unsupported = None
    return_input: Unsupported = None


class BedrockModel(CamelCase):
    model_arn: String | None = None
    additional_model_request_fields: BedrockOptions = BedrockOptions()


class BedrockConfiguration(CamelCase):
    number_of_results: Annotated[Count, Ge(1)] | None = None
    model_configuration: BedrockModel = BedrockModel()


class RerankingConfiguration(CamelCase):
    bedrock_reranking_configuration: BedrockConfiguration = BedrockConfiguration()


class BedrockRequest(CamelCase):
    queries: Annotated[list[BedrockQuery], Len(1, 1)]
    sources: Many[BedrockSource]
    reranking_configuration: RerankingConfiguration = RerankingConfiguration()
    model: String | None = Field(default=None, description="Any name; by default that of the ARN.")

    @model_validator(mode="after")
    def _name_the_model(self) -> Self:
        arn = self.reranking_configuration.bedrock_reranking_configuration.model_configuration.model_arn
        if self.model is None and arn is not None:
            self.model = name_of(arn)
        return self

    def options(self) -> BedrockOptions:
        configured = self.reranking_configuration.bedrock_reranking_configuration
        given = configured.model_configuration.additional_model_request_fields
        return given.model_copy(update={"top_n": configured.number_of_results or given.count()})

    def names(self) -> dict[str, str]:
        return self.options().names() | {"query": "queries.0.textQuery.text", "documents": "sources"}

    def texts(self) -> Iterator[str]:
        """The text of each source: of a JSON document the `rank_fields`, by default all."""
        rank_fields = self.options().rank_fields
        for index, source in enumerate(self.sources):
            document, at = source.inline_document_source, f"sources.{index}.inlineDocumentSource"
            if document.text_document is not None:
                yield document.text_document
            elif document.json_document is not None:
                names = tuple(dict.fromkeys(rank_fields or document.json_document))
                yield text_of(document.json_document, names, f"{at}.jsonDocument")
            else:
                raise MissingField(f"{at}.textDocument", hint=", and so is jsonDocument")


class BedrockResult(TypedDict):
    index: int
    relevanceScore: float


class BedrockResponse(TypedDict):
    """The documents, most relevant first."""

    results: list[BedrockResult]


class InvokedResult(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[dict[str, Any]]


class InvokedResponse(TypedDict):
    """The documents, most relevant first."""

    results: list[InvokedResult]


class BedrockError(TypedDict):
    message: str


def takes(body: Mapping[str, Any]) -> bool:
    """`sources` decides where there is no `query`, which every other API on this path needs."""
    return body.get("sources") is not None and body.get("query") is None


def name_of(model_id: str) -> str:
    """A model's name: its id, or of an ARN what follows the first slash."""
    return model_id.partition("/")[2] if model_id.startswith("arn:") else model_id


def parse(body: BedrockRequest, config: ServerConfig) -> RerankRequest:
    query = body.queries[0].text_query
    return make_request(query, tuple(body.texts()), body.options(), config)


def render(result: RerankResult, options: BedrockOptions) -> BedrockResponse:
    return {"results": [{"index": item.index, "relevanceScore": score_of(item, options)} for item in result]}


def _render_invoked(item: RankedDocument, body: DocumentsRequest) -> InvokedResult:
    rendered: InvokedResult = {"index": item.index, "relevance_score": score_of(item, body)}
    if body.wants_documents():
        rendered["document"] = as_object(body.documents[item.index])
    return rendered


def render_error(error: LocalRerankError, status: int, request_id: str) -> BedrockError:
    return {"message": str(error)}


dialect = Dialect(
    name="AWS Bedrock",
    render_error=render_error,
    error_model=BedrockError,
    prefixes=("/model",),
    status={DeadlineExceeded: 408},  # that of ModelTimeoutException; boto3 would repeat a 504
    error_headers=amazon_error_type,
)
router = dialect.router()

EXAMPLE = {
    "queries": [{"type": "TEXT", "textQuery": {"text": QUERY}}],
    "sources": [
        {"type": "INLINE", "inlineDocumentSource": {"type": "TEXT", "textDocument": {"text": text}}}
        for text in DOCUMENTS
    ],
    "rerankingConfiguration": {
        "type": "BEDROCK_RERANKING_MODEL",
        "bedrockRerankingConfiguration": {
            "numberOfResults": 2,
            "modelConfiguration": {"modelArn": "arn:aws:bedrock:us-east-1::foundation-model/cohere.rerank-v3-5:0"},
        },
    },
}
INVOKED_EXAMPLE = {"query": QUERY, "documents": DOCUMENTS, "top_n": 2, "api_version": 2}


async def rank(http: Request, body: BedrockRequest) -> JsonResponse:
    """Rank documents by relevance to a query. A body with `sources` and without `query` is Bedrock's."""
    return JsonResponse(render(await rank_body(http, body, parse), body.options()))


async def invoke(http: Request, body: DocumentsRequest, model_id: str) -> JsonResponse:
    """Rank documents with the model of the path, like Cohere's models on Bedrock."""
    named = body.model_copy(update={"model": name_of(model_id)})
    result = await rank_body(http, named, parse_documents)
    return JsonResponse(InvokedResponse(results=[_render_invoked(item, body) for item in result]))


add_post(
    router,
    [RERANK],
    rank,
    takes=takes,
    examples={"AWS Bedrock Rerank": EXAMPLE},
    summary="AWS Bedrock rerank",
    response_model=BedrockResponse,
)
add_post(
    router,
    [INVOKE],
    invoke,
    examples={"AWS Bedrock InvokeModel": INVOKED_EXAMPLE},
    summary="AWS Bedrock InvokeModel",
    response_model=InvokedResponse,
)
