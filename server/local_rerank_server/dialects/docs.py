"""`/docs`: Swagger UI with the OpenAPI document of this server.

Swagger UI's files come with the package fastapi-swagger and are served from here, so the page works offline. Its policy
forbids inline scripts and other origins.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.requests import Request

from local_rerank_server.dialects._files import add_files
from local_rerank_server.dialects._json import JsonResponse
from local_rerank_server.dialects._responses import GenericError, render_generic_error
from local_rerank_server.dialects._route import Dialect, add_get, state_of

FOLDER = Path(__file__).parents[1] / "docs"
SWAGGER_FOLDER = Path(str(files("fastapi_swagger") / "resources"))
SWAGGER_NAMES = ("favicon-32x32.png", "swagger-ui-bundle.js", "swagger-ui.css")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
FILES = {"/docs": FOLDER / "index.html", "/docs/start.js": FOLDER / "start.js"} | {
    f"/docs/{name}": SWAGGER_FOLDER / name for name in SWAGGER_NAMES
}

dialect = Dialect(
    name="Documentation",
    render_error=render_generic_error,
    error_model=GenericError,
    # a browser sends no key; the page asks for one before it sends a request
    open_paths=(*FILES, "/openapi.json"),
)
router = dialect.router()


async def openapi(http: Request) -> JsonResponse:
    """The OpenAPI document."""
    document: dict[str, Any] = http.app.openapi() | {"servers": [{"url": http.scope.get("root_path") or "/"}]}
    if state_of(http).config.has_keys:
        schemes = {"ApiKey": {"type": "http", "scheme": "bearer"}}
        document["components"] = document["components"] | {"securitySchemes": schemes}
        document["security"] = [{"ApiKey": []}]
        document["info"] = document["info"] | {"description": "Requests need an API key: press Authorize to enter it."}
    return JsonResponse(document)


add_get(router, "/openapi.json", openapi)
add_files(router, FILES, policy=POLICY, summary="Every route, with example requests to send")
