"""The playground at `/`: a page for trying the model. Its files need no API key.

The page calls only this server. Its policy forbids inline scripts, other origins, and inserting text as HTML
(`require-trusted-types-for`), whatever a document contains.
"""

from __future__ import annotations

from pathlib import Path

from local_rerank_server.dialects._files import add_files
from local_rerank_server.dialects._responses import GenericError, render_generic_error
from local_rerank_server.dialects._route import Dialect

FOLDER = Path(__file__).parents[1] / "playground"
NAMES = (
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
    "progress.js",
    "results.js",
    "server.js",
    "style.css",
)
FILES = {"/": FOLDER / "index.html", "/favicon.ico": FOLDER / "icon.svg"} | {
    f"/playground/{name}": FOLDER / name for name in NAMES
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)

dialect = Dialect(
    name="Playground", render_error=render_generic_error, error_model=GenericError, open_paths=tuple(FILES)
)
router = dialect.router()

add_files(router, FILES, policy=POLICY, summary="A page for trying the model; it loads nothing from other servers")
