"""Paths that several dialects share, such as `/rerank`: which body is whose."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Union

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from local_rerank_server.dialects._json import json_request
from local_rerank_server.dialects._route import DialectRoute, as_ours, documented_errors, documented_examples


class SharedRoute(APIRoute):
    """A path of several dialects: the first form that takes a body answers it, the last one whatever is left."""

    def __init__(self, path: str, forms: Sequence[DialectRoute]) -> None:
        self.forms = forms
        super().__init__(
            path,
            _stand_in(forms),
            methods=["POST"],
            tags=[form.dialect.name for form in forms],
            summary="Rerank, in the form of the body",
            response_model=Union[tuple(form.response_model for form in forms)],  # noqa: UP007  # built, not written
            responses=documented_errors(Union[tuple(form.dialect.error_model for form in forms)]),  # noqa: UP007
            openapi_extra=documented_examples({name: e for form in forms for name, e in form.examples.items()}),
            include_in_schema=any(form.include_in_schema for form in forms),
        )

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handlers = [(form.takes, form.get_route_handler()) for form in self.forms]

        async def answer(http: Request) -> Response:
            request = json_request(http)
            try:
                body = await request.json()
            except Exception as error:
                return self.forms[-1].dialect.error_response(as_ours(error, http), http)
            known = isinstance(body, dict)
            handle = next(handle for takes, handle in handlers if takes is None or (known and takes(body)))
            return await handle(request)

        return answer


def _stand_in(forms: Sequence[DialectRoute]) -> Callable[..., None]:
    """What FastAPI reads a shared path's documentation from; it is never called."""

    def rank(body: Any) -> None:
        raise NotImplementedError

    models = [form.body_field.field_info.annotation for form in forms if form.body_field is not None]
    rank.__annotations__ = {"body": Union[tuple(models)], "return": None}  # noqa: UP007
    rank.__doc__ = "\n\n".join(f"{form.dialect.name}: {form.description}" for form in forms)
    return rank
