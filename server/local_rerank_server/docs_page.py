"""The `/docs` page: an OpenAPI description -> HTML that needs no other file, so that it works offline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }}
  code, pre {{ font: 14px/1.4 ui-monospace, monospace; }}
  pre {{ border: 1px solid; padding: .75rem; overflow-x: auto; }}
</style>
<h1>{title}</h1>
<p>Every route of this server, with a request to copy. The same as OpenAPI: <a href="openapi.json">openapi.json</a>.</p>
{routes}
</html>
"""

_ROUTE = """<section>
<h2><code>{method} {path}</code></h2>
<p>{tag}</p>
{description}
{examples}
</section>
"""


def render_docs(openapi: Mapping[str, Any], *, base_url: str) -> str:
    """The page for the server at `base_url`, which the examples to copy name."""
    routes = "".join(_render_routes(openapi["paths"], base_url))
    return _PAGE.format(title=escape(f"{openapi['info']['title']} {openapi['info']['version']}"), routes=routes)


def _render_routes(paths: Mapping[str, Any], base_url: str) -> Iterator[str]:
    for path, operations in paths.items():
        for method, operation in operations.items():
            yield _ROUTE.format(
                method=method.upper(),
                path=escape(path),
                tag=escape(", ".join(operation["tags"])),
                description="".join(f"<p>{escape(text)}</p>" for text in operation["description"].split("\n\n")),
                examples="".join(_render_example(base_url + path, *named) for named in _examples(operation)),
            )


def _examples(operation: Mapping[str, Any]) -> list[tuple[str, Any]]:
    contents = operation.get("requestBody", {}).get("content", {}).values()
    return [(name, example["value"]) for content in contents for name, example in content.get("examples", {}).items()]


def _render_example(url: str, name: str, body: Any) -> str:
    return f"<h3>{escape(name)}</h3>\n<pre>{escape(_curl(url, body))}</pre>\n"


def _curl(url: str, body: Any) -> str:
    text = json.dumps(body, ensure_ascii=False, indent=2).replace("'", "'\\''")
    return f"curl {url} -H 'Content-Type: application/json' -d '{text}'"
