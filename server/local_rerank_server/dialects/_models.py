"""The list of models, at every base URL that a client may have: each dialect adds it at its own."""

from __future__ import annotations

from typing import NotRequired

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse
from typing_extensions import TypedDict

from local_rerank.checkpoints.find import EMBEDDED_MODEL
from local_rerank_server.dialects._route import add_get, state_of
from local_rerank_server.state import ServerState


class Model(TypedDict):
    """A name that can be sent as `model`; the fields are those that OpenAI and Xinference clients read."""

    id: str
    object: str
    created: int
    owned_by: str
    model_type: str
    model_name: str
    description: NotRequired[str]  # only for the built-in model


class ModelList(TypedDict):
    object: str
    data: list[Model]


def add_models(router: APIRouter, *bases: str) -> None:
    """Serve `BASE/models` and `BASE/models/{model_id}`, where an id may contain slashes."""
    for base in bases:
        add_get(router, f"{base}/models", list_models, response_model=ModelList)
        add_get(router, f"{base}/models/{{model_id:path}}", get_model, response_model=Model)


async def list_models(http: Request) -> JSONResponse:
    """The names that can be sent as `model`."""
    state = state_of(http)
    return JSONResponse(ModelList(object="list", data=[_describe(name, state) for name in state.model_names]))


async def get_model(http: Request, model_id: str) -> JSONResponse:
    """One model name; any name exists unless --strict-models is set, because ranking accepts any."""
    state = state_of(http)
    state.check_model(model_id, strict=False)
    return JSONResponse(_describe(model_id, state))


def _describe(name: str, state: ServerState) -> Model:
    model = Model(
        id=name,
        object="model",
        created=state.started,
        owned_by="local-rerank",
        model_type="rerank",
        model_name=state.reranker.model_id,
    )
    if state.reranker.model_id == EMBEDDED_MODEL:
        model["description"] = "the small built-in model; serve a real one with --model Qwen/Qwen3-Reranker-0.6B"
    return model
