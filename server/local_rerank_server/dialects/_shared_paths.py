"""Paths that several dialects share, such as `/rerank`; the body decides which dialect answers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Union

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from local_rerank_server.dialects._json import json_request
from local_rerank_server.dialects._route import DialectRoute, documented_errors, documented_examples, to_known_error


class SharedRoute(APIRoute):
    """One path of several dialects. The first one that takes a body answers it, the last one takes the rest."""

    def __init__(self, path: str, forms: Sequence[DialectRoute]) -> None:
        self.forms = forms
        super().__init__(
            path,
            _documented_handler(forms),
            methods=["POST"],
            tags=[form.dialect.name for form in forms],
            summary="Rerank, in the API that the body belongs to",
            response_model=Union[tuple(form.response_model for form in forms)],  # noqa: UP007  # built at run time
            responses=documented_errors(Union[tuple(form.dialect.error_model for form in forms)]),  # noqa: UP007
            openapi_extra=documented_examples({name: e for form in forms for name, e in form.examples.items()}),
            include_in_schema=any(form.include_in_schema for form in forms),
        )

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handlers = [(form, form.get_route_handler()) for form in self.forms]

        async def respond(http: Request) -> Response:
            request = json_request(http)
            try:
                body = await request.json()
            except Exception as error:
                return self.forms[-1].dialect.error_response(to_known_error(error, http), http)
            handle = next(handle for form, handle in handlers if form.owns(body, http))
            return await handle(request)

        return respond


def _documented_handler(forms: Sequence[DialectRoute]) -> Callable[..., None]:
    """A function that is never called; FastAPI derives the path's documentation from its signature."""

    def rank(body: Any) -> None: ...  # only the signature counts

    models = [form.body_field.field_info.annotation for form in forms if form.body_field is not None]
    rank.__annotations__ = {"body": Union[tuple(models)], "return": None}  # noqa: UP007
    rank.__doc__ = "\n\n".join(f"{form.dialect.name}: {form.description}" for form in forms)
    return rank
