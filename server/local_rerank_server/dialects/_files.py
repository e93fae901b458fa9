"""Serves the files of a page: fixed names, media types, security headers, and the page's base under a root path."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from html import escape
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response

MEDIA_TYPES = {  # fixed here, because the tables of `mimetypes` depend on the machine
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}


def add_files(router: APIRouter, files: Mapping[str, Path], *, policy: str, summary: str) -> None:
    """Serve each path's file with GET and HEAD under the Content-Security-Policy; only the page is in OpenAPI."""
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",  # revalidate, so that page and scripts match after an upgrade
    }
    for path, file in files.items():
        router.add_api_route(
            path,
            _sender(file, headers),
            methods=["GET"],
            response_class=FileResponse,
            summary=summary,
            include_in_schema=file.suffix == ".html",
        )
        router.add_api_route(path, _sender(file, headers), methods=["HEAD"], include_in_schema=False)


def _sender(file: Path, headers: Mapping[str, str]) -> Callable[[Request], Awaitable[Response]]:
    async def send(http: Request) -> Response:
        root = http.scope.get("root_path", "")
        if not root or file.suffix != ".html":
            return FileResponse(file, media_type=MEDIA_TYPES[file.suffix], headers=headers)
        # links are relative, and a page at /root without a final slash would look for them beside /root
        base = f'<head>\n  <base href="{escape(root)}/">'
        return HTMLResponse(file.read_text(encoding="utf-8").replace("<head>", base, 1), headers=headers)

    return send
