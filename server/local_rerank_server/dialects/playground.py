"""The page at `/`: a form to try the model in. Its files are served as they are, and to everyone, key or not.

The page calls our own routes alone. Its policy lets it run no inline script, ask no other origin, and put no text into
the page as HTML (`require-trusted-types-for`), whatever a document holds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.responses import FileResponse

from local_rerank_server.dialects._responses import GenericError, render_generic_error
from local_rerank_server.dialects._route import Dialect

FOLDER = Path(__file__).parents[1] / "playground"
PAGE = "index.html"
MEDIA_TYPES = {  # said here, because what `mimetypes` knows depends on the machine
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
PATHS = {
    "/": PAGE,
    **{
        f"/playground/{name}": name
        for name in (
            "clients.js",
            "code.js",
            "connection.js",
            "documents.js",
            "elements.js",
            "examples.js",
            "files.js",
            "icon.svg",
            "main.js",
            "messages.js",
            "results.js",
            "server.js",
            "style.css",
        )
    },
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # after an upgrade of the server no old script meets a new page
}

dialect = Dialect(
    name="Playground", render_error=render_generic_error, error_model=GenericError, open_paths=tuple(PATHS)
)
router = dialect.router()


def _serve(name: str) -> Callable[[], Awaitable[FileResponse]]:
    file = FOLDER / name

    async def answer() -> FileResponse:
        """A page to try the model in; it loads nothing from elsewhere."""
        return FileResponse(file, media_type=MEDIA_TYPES[file.suffix], headers=HEADERS)

    return answer


for path, name in PATHS.items():
    router.add_api_route(
        path, _serve(name), methods=["GET"], response_class=FileResponse, include_in_schema=name == PAGE
    )
    router.add_api_route(path, _serve(name), methods=["HEAD"], include_in_schema=False)
