"""Documents match the code: options, make targets, routes, links, anchors, files and examples."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest

import local_rerank
from docs.options import render
from local_rerank.commands.app import app
from local_rerank_server.dialects import ROWS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DIALECTS = (ROOT / "docs" / "dialects.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")]
PAGES += sorted(ROOT.glob("docs/*.md"))
ASSETS = ("/playground/", "/docs/")  # files that the pages at / and /docs load
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def fences(page: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def commands(program: str) -> list[list[str]]:
    """The arguments of every command line of that program in the documents' shell blocks."""
    text = "\n".join(block for page in PAGES for block in fences(page, "sh") + fences(page, "console"))
    lines = re.findall(rf"^(?:\$ |.*\| )?{program} (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_options_page_is_what_the_definitions_say() -> None:
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == render(), "run `make docs`"


def test_the_api_page_is_what_the_docstrings_say_and_has_every_public_name() -> None:
    from docs.api import render

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == render(), "run `make docs`"
    assert set(local_rerank.__all__) <= set(re.findall(r"^## (\w+)$", page, re.MULTILINE))


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for page in PAGES for word in re.findall(r"`make (\w+)", page.read_text(encoding="utf-8"))}
    named |= {arguments[0] for arguments in commands("make")}
    assert {"serve", "test"} <= named <= targets


def test_every_command_line_that_is_shown_parses() -> None:
    shown = commands("local-rerank")
    assert {"serve", "rank"} <= {arguments[0] for arguments in shown}
    for arguments in shown:
        app.parse_args(arguments, print_error=False, exit_on_error=False)


def test_the_table_of_routes_lists_every_route() -> None:
    paths = {route.path.replace(":path", "").rstrip("/") or "/" for _, router in ROWS for route in router.routes}
    served = {path for path in paths if not path.startswith(ASSETS)}
    assert set(re.findall(r"^\| `(?:GET|POST) ([^`]+)`", DIALECTS, re.MULTILINE)) == served


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_and_to_a_heading_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    targets = [(page.parent / file if file else page, anchor) for file, anchor in links]
    assert [path for path, _ in targets if not path.exists()] == []
    assert [(path, anchor) for path, anchor in targets if anchor and anchor not in anchors(path)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_every_module_and_script_that_a_page_names_exists(page: Path) -> None:
    folders = (ROOT, ROOT / "local_rerank", ROOT / "server" / "local_rerank_server")
    named = re.findall(r"`([\w/]+/\w+\.(?:py|sh|json|toml))`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not any((folder / name).exists() for folder in folders)] == []


def test_the_log_is_newest_first_and_its_index_has_every_entry() -> None:
    page = ROOT / "docs" / "log.md"
    log = page.read_text(encoding="utf-8")
    entries = re.findall(r"^## (\S+): (.*)$", log, re.MULTILINE)
    assert [date for date, _ in entries] == sorted((date for date, _ in entries), reverse=True)
    assert re.findall(r"^\| ([\d-]+) \| \[(.+)\]\(#", log, re.MULTILINE) == entries


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {(ROOT / link).resolve() for link in re.findall(r"\]\((?!https?:)([^)#]+)", README)}
    assert {page for page in PAGES if page.name != "README.md"} <= linked


@pytest.mark.parametrize("name", ["README.md", "docs/library.md", "docs/api.md"])
def test_the_examples_in_python_run_and_print_what_is_shown(name: str) -> None:
    """In the order of the page, of which all examples share their names."""
    names = {name: getattr(local_rerank, name) for name in local_rerank.__all__} if name == "docs/api.md" else {}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for number, block in enumerate(block for block in fences(ROOT / name, "python") if ">>>" in block):
        example = doctest.DocTestParser().get_doctest(block, names, f"{name}, example {number}", None, None)
        runner.run(example, clear_globs=False)
        names = example.globs
    assert runner.tries > 2
    assert runner.failures == 0


def test_every_test_that_the_security_page_names_exists() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)`: ((?:`test_\w+`(?:, )?)+)", page)
    assert len(named) > 8
    for file, functions in named:
        for function in re.findall(r"test_\w+", functions):
            assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), (file, function)


def test_the_table_of_clients_is_sorted_and_names_base_urls_of_routes() -> None:
    table = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8").partition("| --- | --- | --- | --- |\n")[2]
    rows = [row.split(" | ") for row in table.partition("\n\n")[0].splitlines()]
    names = [row[0].strip("| ").replace("`", "").removeprefix("@").lower() for row in rows]
    assert len(names) > 30
    assert names == sorted(set(names))
    paths = {route.path for _, router in ROWS for route in router.routes}
    for row in rows:
        base = re.search(r"http://127\.0\.0\.1:8000([\w/-]*)", row[2])
        assert base, row
        assert any(f"{path}/".startswith(f"{base[1]}/") for path in paths), row
