"""The command `local-rerank rank`: rank documents from arguments, a file or standard input."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from local_rerank.checkpoints.find import EMBEDDED_MODEL
from local_rerank.commands.console import JsonOutput, option, print_json, status
from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.blending import Bm25, best_first, parse_blend
from local_rerank.evaluation.blending import blend as blend_scores

if TYPE_CHECKING:
    from local_rerank.reranker import Reranker
    from local_rerank.types import RankedDocument, RerankRequest, RerankResult

BAR_WIDTH = 20  # characters of a bar for a relevance score of 1
MIN_TABLE_WIDTH = 80  # columns


def rank(
    query: Annotated[str, option(help="Query to rank the documents for.")],
    *documents: Annotated[str, option(help="Documents. Default: read from --file or standard input.")],
    file: Annotated[
        Path | None,
        option(help="File with one document per line; in .jsonl a string or an object with text or document."),
    ] = None,
    top_n: Annotated[int | None, option(help="Number of documents to print. Default: all.")] = None,
    json_output: JsonOutput = False,
    blend: Annotated[
        str | None,
        option(help="Rank by log-odds plus W times BM25, both as z-scores: bm25=W. Default: log-odds alone."),
    ] = None,
    show_prompt: Annotated[
        bool, option(help="Print the prompt and token ids of the first document instead of ranking.")
    ] = False,
    engine: EngineConfig | None = None,
) -> None:
    """Rank documents by their relevance to QUERY."""
    if documents and file is not None:
        raise InvalidRequest("documents are given both as arguments and with --file; use one of them", field="file")
    texts = list(documents) or _read(file)
    weight = None if blend is None else _lexical_weight(blend)
    from local_rerank.reranker import Reranker
    from local_rerank.types import RerankRequest

    request = RerankRequest(query=query, documents=tuple(texts), top_n=top_n)
    with status("loading the model"):
        reranker = Reranker(config=engine)
    with reranker:
        if show_prompt:
            _print_prompt(reranker, query, texts[0])
            return
        result = _rank_with_progress(reranker, request if weight is None else replace(request, top_n=None))
        blended = None if weight is None else _blended(result, query, weight)[:top_n]
        if json_output:
            _print_json(result, blended)
        else:
            _print_table(result, blended)


def _rank_with_progress(reranker: Reranker, request: RerankRequest) -> RerankResult:
    """Rank while a bar on standard error shows how many tokens have left the queue."""
    future = reranker.submit(request)
    total = reranker.num_queued_tokens
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"scoring {len(request.documents)} documents", total=total)
        while True:
            try:
                return future.result(timeout=0.1)
            except TimeoutError:
                progress.update(task, completed=total - reranker.num_queued_tokens)


def _lexical_weight(blend: str) -> float:
    how = parse_blend(blend)
    if how.source != "bm25":
        raise ConfigError(f"blend is {blend!r}, but rank has no run to blend with; use bm25=W")
    return how.weight


def _blended(result: RerankResult, query: str, weight: float) -> list[tuple[RankedDocument, float]]:
    """Return the documents with their blended scores, highest first."""
    documents = [item.document for item in result]
    lexical = Bm25(documents).scores(query, documents)
    scores = blend_scores([item.log_odds for item in result], lexical, weight)
    return [(result[position], scores[position]) for position in best_first(scores)]


def _read(file: Path | None) -> list[str]:
    """Read documents from a file, or from standard input if it is not a terminal."""
    if file is not None:
        try:
            # not splitlines, because a text may contain U+2028 and similar
            lines = file.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"file {file} cannot be read: {error}", field="file") from error
        if file.suffix == ".jsonl":
            return [_text_of(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        return [line for line in lines if line.strip()]
    if sys.stdin.isatty():
        raise InvalidRequest(
            "there are no documents; give them as arguments, with --file or on standard input", field="documents"
        )
    return [line.rstrip("\r\n") for line in sys.stdin if line.strip()]


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"{where} is not JSON: {error}", field="file") from error
    if isinstance(value, dict):
        value = value.get("text", value.get("document"))
    if not isinstance(value, str):
        raise InvalidRequest(f"{where} must be a string or an object with text or document", field="file")
    return value


def _print_json(result: RerankResult, blended: list[tuple[RankedDocument, float]] | None) -> None:
    value = asdict(result)
    if blended is not None:
        value["results"] = [asdict(item) | {"blended_score": score} for item, score in blended]
    print_json(value)


def _print_table(result: RerankResult, blended: list[tuple[RankedDocument, float]] | None) -> None:
    console = Console()
    console.width = max(console.width, MIN_TABLE_WIDTH)
    table = Table(box=None, pad_edge=False, expand=True)
    for name in ("#", "score", "", "log-odds", *([] if blended is None else ["blended"])):
        table.add_column(name, justify="right" if name else "left", no_wrap=True, min_width=0 if name else BAR_WIDTH)
    table.add_column("document", overflow="ellipsis", no_wrap=True, ratio=1)
    for item, score in blended if blended is not None else [(item, None) for item in result]:
        bar = "█" * round(item.relevance_score * BAR_WIDTH) or "▏"
        cut = f"  ({item.num_truncated_tokens} tokens cut)" if item.num_truncated_tokens else ""
        text = Text(" ".join(item.document.split()) + cut)  # not a str, in which rich would parse brackets as markup
        cells = [str(item.index), f"{item.relevance_score:.4f}", bar, f"{item.log_odds:+.2f}"]
        table.add_row(*cells, *([] if score is None else [f"{score:+.2f}"]), text)
    console.print(table)
    note = " (small built-in model; choose another with --model)" if result.model == EMBEDDED_MODEL else ""
    cost = f"{result.num_computed_tokens} tokens in {result.total_ms:.0f} ms"
    console.print(f"{result.model}{note}: {cost}", style="dim", highlight=False)


def _print_prompt(reranker: Reranker, query: str, document: str) -> None:
    prompt, ids = reranker.explain(query, document)
    console = Console()
    console.out(prompt, highlight=False)
    console.out(f"\n{len(ids)} token ids: {' '.join(map(str, ids))}", highlight=False)
