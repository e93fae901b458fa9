"""The list of models, at every base URL that a client may have: each dialect adds it at its own; and their loading."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import NotRequired

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from typing_extensions import TypedDict

from local_rerank.checkpoints.find import EMBEDDED_MODEL
from local_rerank.errors import DeadlineExceeded
from local_rerank.models.served import ServedModel, State
from local_rerank_server.config import is_loopback
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._route import add_get, state_of
from local_rerank_server.errors import InvalidField, NotOnThisMachine, UnsupportedContent
from local_rerank_server.state import ServerState


class Model(TypedDict):
    """A name that can be sent as `model`; the fields are those that OpenAI and Xinference clients read."""

    id: str
    object: str
    created: int
    owned_by: str
    model_type: str
    model_name: str
    alias_of: NotRequired[str]  # only for a name that is not the model's own
    state: State
    reason: NotRequired[str]  # why it could not be loaded
    size_bytes: int  # of its weights while it is loaded, before that what loading needs; 0: not known
    last_used: int | None  # seconds since 1970
    description: NotRequired[str]  # only for the built-in model


class ModelList(TypedDict):
    object: str
    data: list[Model]


class NamedModel(BaseModel):
    """The body of the routes that load and unload a model."""

    model: str


def add_models(router: APIRouter, *bases: str) -> None:
    """Serve `BASE/models` and `BASE/models/{model_id}`, where an id may contain slashes."""
    for base in bases:
        add_get(router, f"{base}/models", list_models, response_model=ModelList)
        add_get(router, f"{base}/models/{{model_id:path}}", get_model, response_model=Model)


async def list_models(http: Request) -> JsonResponse:
    """The names that can be sent as `model`."""
    state = state_of(http)
    return JsonResponse(ModelList(object="list", data=[_describe(name, state) for name in state.model_names]))


async def get_model(http: Request, model_id: str) -> JsonResponse:
    """One model name; any name exists unless --strict-models is set, because ranking accepts any."""
    state = state_of(http)
    state.check_model(model_id, strict=False)
    return JsonResponse(_describe(model_id, state))


def add_loading(router: APIRouter, base: str) -> None:
    """Serve `BASE/models/load` and `BASE/models/unload`, for operators."""
    for path, handler in (("load", load_model), ("unload", unload_model)):
        router.add_api_route(f"{base}/models/{path}", handler, methods=["POST"], response_model=Model)


async def load_model(http: Request, body: NamedModel) -> JsonResponse:
    """Load a model that was named at the start, also one whose load has failed; answers when it is loaded."""
    state, model = _operated(http, body)
    await _within_the_timeout(state, state.loaded(model, again=True))
    state.models.release(model)
    return JsonResponse(_describe(model.name, state))


async def unload_model(http: Request, body: NamedModel) -> JsonResponse:
    """Unload a model after its requests; it is loaded again at its next one. Answers when it is unloaded."""
    state, model = _operated(http, body)
    if model.options.pinned:
        raise InvalidField("model", "this model is pinned, so it stays loaded")
    unloading = asyncio.wrap_future(state.models.unload(model))
    await _within_the_timeout(state, unloading)
    return JsonResponse(_describe(model.name, state))


async def _within_the_timeout(state: ServerState, work: Awaitable[object]) -> None:
    timeout_ms = state.config.request_timeout_ms
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            await work
    except TimeoutError:
        raise DeadlineExceeded(timeout_ms=timeout_ms, remedy="it goes on; GET /v1/models tells its state") from None


def _operated(http: Request, body: NamedModel) -> tuple[ServerState, ServedModel]:
    """Raises an error unless the client may load models. A page cannot send JSON to another server without asking it,
    so that the content type keeps pages out of a server without keys.
    """
    state = state_of(http)
    if not state.config.has_keys:
        # all, because on a Unix socket `client` is the first one, which the client itself may have sent
        forwarded = ",".join(http.headers.getlist("x-forwarded-for")).split(",")
        hosts = [*([http.client.host] if http.client else []), *filter(None, map(str.strip, forwarded))]
        if not all(map(is_loopback, hosts)):
            raise NotOnThisMachine()
        if "json" not in http.headers.get("content-type", ""):
            raise UnsupportedContent("the body has no Content-Type; send application/json")
    state.check_model(body.model, strict=True)
    return state, state.models.find(body.model)


def _describe(name: str, state: ServerState) -> Model:
    served = state.models.find(name)
    model = Model(
        id=name,
        object="model",
        created=state.started,
        owned_by="local-rerank",
        model_type="rerank",
        model_name=served.model_id,
        state=served.state,
        size_bytes=served.num_bytes if served.ranker else served.needed_bytes,
        last_used=None if served.last_used is None else int(served.last_used),
    )
    if name != served.name:
        model["alias_of"] = served.name
    if served.state == "failed" and served.error is not None:
        model["reason"] = served.error
    if served.model_id == EMBEDDED_MODEL:
        model["description"] = "the small built-in model; serve a real one with --model Qwen/Qwen3-Reranker-0.6B"
    return model
