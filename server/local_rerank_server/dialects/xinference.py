"""The route that Xinference's client calls first; its rerank requests go to `rerank_v1`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse
from typing_extensions import TypedDict

from local_rerank_server.dialects._responses import DetailError, render_detail_error
from local_rerank_server.dialects._route import Dialect, add_get, state_of

PATH = "/v1/cluster/auth"


class ClusterAuth(TypedDict):
    """Whether the client must send its API key."""

    auth: bool


dialect = Dialect(
    name="Xinference",
    render_error=render_detail_error,
    error_model=DetailError,
    prefixes=("/v1/cluster",),
    open_paths=(PATH,),
)
router = dialect.router()


async def cluster_auth(http: Request) -> JSONResponse:
    """Whether the server needs an API key; if not, Xinference's client sends none."""
    return JSONResponse(ClusterAuth(auth=state_of(http).config.has_keys))


add_get(router, PATH, cluster_auth, response_model=ClusterAuth)
