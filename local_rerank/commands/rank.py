"""The command `local-rerank rank`: rank documents from arguments, a file or standard input."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import OverflowMethod
from rich.progress import Progress
from rich.text import Text

from local_rerank.checkpoints.find import EMBEDDED_MODEL
from local_rerank.commands.console import Console, JsonOutput, MinScore, option, print_json, status, warn
from local_rerank.commands.documents import read_documents
from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.blending import Bm25, parse_blend
from local_rerank.requests.encoders import clean
from local_rerank.requests.remote import Server, options_to_send, rank_at
from local_rerank.requests.scores import sigmoid
from local_rerank.text_files import as_utf8, visible
from local_rerank.types import RankedDocument, RerankRequest, RerankResult

if TYPE_CHECKING:
    from local_rerank.reranker import Reranker

BAR_WIDTH = 20  # characters of a bar for a relevance score of 1
MIN_TABLE_WIDTH = 80  # columns
SHOWN_SPANS = 3  # of a document; --json has all


def rank(
    query: Annotated[str, option(group="Arguments", help="Query to rank the documents for.")],
    *documents: Annotated[str, option(help="Documents. Default: read from --file or standard input.")],
    file: Annotated[
        Path | None,
        option(
            help="File with one document per line, or .jsonl, .json, .csv or .tsv; - for standard input.",
            allow_leading_hyphen=True,
        ),
    ] = None,
    top_n: Annotated[int | None, option(help="Number of documents to print. Default: all.")] = None,
    json_output: JsonOutput = False,
    blend: Annotated[
        str | None,
        option(
            help="Rank by log-odds plus W times BM25, both as z-scores (bm25=W) or reciprocal ranks (bm25-ranks=W). "
            "W counts less, the less of the query BM25 finds. Default: log-odds alone."
        ),
    ] = None,
    min_score: MinScore = None,
    spans: Annotated[
        bool, option(help="Score the sentences of each document, or of its best chunk, and print the best ones.")
    ] = False,
    show_prompt: Annotated[
        bool, option(help="Print the prompt and token ids of the first document instead of ranking.")
    ] = False,
    server: Annotated[
        str | None,
        option(
            help="URL of a running server that ranks instead of a model in this process, for example "
            "http://127.0.0.1:8000. Its key is taken from LOCAL_RERANK_API_KEY."
        ),
    ] = None,
    engine: EngineConfig | None = None,
) -> None:
    """Rank documents by their relevance to QUERY, with a model in this process or at a server."""
    if documents and file is not None:
        raise InvalidRequest("documents are given both as arguments and with --file; use one of them", field="file")
    if server is not None and show_prompt:
        raise ConfigError("show_prompt cannot be combined with --server, whose tokenizer is not here")
    remote = None if server is None else (Server.parse(server), options_to_send(engine))
    query = clean(as_utf8(query))
    texts = [clean(as_utf8(text)) for text in documents] or read_documents(file)
    if len(texts) == len(documents) == 1 and _is_file(texts[0]):
        warn(f"note: this ranks the text {texts[0]!r}; with --file it ranks the documents in the file of that name")
    request = RerankRequest(query=query, documents=tuple(texts), top_n=top_n, spans=spans, min_score=min_score)
    request = request if blend is None else _with_bm25(request, blend)
    if remote is not None:
        address, options = remote
        with status(f"ranking at {address.shown}"):
            result = rank_at(address, request, options)
    elif show_prompt:
        with _loaded(engine) as reranker:
            return _print_prompt(reranker, query, texts[0])
    else:
        with _loaded(engine) as reranker:
            result = _rank_with_progress(reranker, request)
    if json_output:
        _print_json(result)
    else:
        _print_table(result, is_remote=remote is not None)
    warn(_status_in_words(result, len(texts)))


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # longer than a path can be, or with a NUL
        return False


def _loaded(engine: EngineConfig | None) -> Reranker:
    from local_rerank.bench.kept_speeds import before_download
    from local_rerank.reranker import Reranker  # torch, after everything that can be refused without it

    warn(before_download(engine or EngineConfig()))
    with status("loading the model"):
        return Reranker(config=engine)


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


def _with_bm25(request: RerankRequest, blend: str) -> RerankRequest:
    """The request with BM25 scores to blend, unless they are all equal."""
    how = parse_blend(blend)
    if how.source != "bm25":
        raise ConfigError(f"blend is {blend!r}, but rank has no run to blend with; use bm25=W")
    bm25 = Bm25(request.documents)
    scores = tuple(bm25.scores(request.query, request.documents))
    if len(scores) > 1 and len(set(scores)) == 1:
        warn(f"note: BM25 scores all documents {scores[0]:g}, so that they are ranked by log-odds alone")
        return request
    weight = how.weight * bm25.matched(request.query, scores)
    return replace(request, first_stage_scores=scores, first_stage_weight=weight, first_stage_method=how.method)


def _print_json(result: RerankResult) -> None:
    value = _given(asdict(result) | {"status": result.status})
    print_json(value | {"results": [_given(item) for item in value["results"]]})


def _status_in_words(result: RerankResult, num_documents: int) -> str:
    """What the order cannot show; empty if there is nothing."""
    lines = []
    cut = [f"{result.num_truncated_documents} of {num_documents} documents"] if result.num_truncated_documents else []
    cut += ["the query"] if result.num_query_truncated_tokens else []
    if cut:
        remedy = "; --long-documents chunk scores long documents whole" if result.num_truncated_documents else ""
        lines.append(f"note: {' and '.join(cut)} exceeded a limit in tokens and lost the rest{remedy}")
    if result.is_constant:
        lines.append(
            "warning: all documents have the same log-odds, so the model does not order them; "
            "`local-rerank doctor` tells whether the model is at fault"
        )
    return "\n".join(lines)


def _given(value: dict[str, Any]) -> dict[str, Any]:
    """The fields that were asked for."""
    return {name: each for name, each in value.items() if each is not None}


def _print_table(result: RerankResult, *, is_remote: bool) -> None:
    """Print a line for each document: cut to the width of a terminal, whole in a file or pipe."""
    console = Console(highlight=False)
    console.width = max(console.width, MIN_TABLE_WIDTH)
    first = next(iter(result), None)  # has the same fields as the others
    rows = [["#", "score", "", "log-odds", *["probability"] * (first is not None and first.probability is not None)]]
    rows[0] += [*["blended"] * (first is not None and first.blended_score is not None), "document"]
    for item in result:
        bar = _bar(_share_of(item), is_ascii_only=console.is_ascii_only)
        text, cut = item.document, f"  ({item.num_truncated_tokens} tokens cut)" if item.num_truncated_tokens else ""
        if item.best_chunk is not None and (item.num_chunks or 0) > 1:
            chunk = item.best_chunk
            text = text[chunk.start : chunk.end]
            cut = f"  (characters {chunk.start} to {chunk.end}, the best of {item.num_chunks} chunks){cut}"
        cells = [str(item.index), f"{item.relevance_score:.4f}", bar, f"{item.log_odds:+.2f}"]
        cells += [] if item.probability is None else [f"{item.probability:.4f}"]
        cells += [] if item.blended_score is None else [f"{item.blended_score:+.2f}"]
        rows.append([*cells, visible(" ".join(text.split())) + cut])
        for span in (item.spans or ())[:SHOWN_SPANS]:
            is_bare = item.relevance_score == item.log_odds  # and so are the scores of its sentences
            bar = _bar(sigmoid(span.score) if is_bare else span.score, is_ascii_only=console.is_ascii_only)
            sentence = visible(" ".join(item.document[span.start : span.end].split()))
            rows.append(["", f"{span.score:.4f}", bar, *[""] * (len(cells) - 3), f"  {sentence}"])
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    cut_with: OverflowMethod = "crop" if console.is_ascii_only else "ellipsis"
    for number, (*cells, document) in enumerate(rows):
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        aligned[2] = cells[2].ljust(BAR_WIDTH)
        line = Text("  ".join([*aligned, document]), style="" if number else "bold")  # a str would be parsed as markup
        if console.is_terminal:
            console.print(line, no_wrap=True, overflow=cut_with)
        else:
            console.print(line, soft_wrap=True)
    other = "start the server with --model for another" if is_remote else "choose another with --model"
    below = f"; documents below the minimum score: {result.num_below_min_score}" if result.num_below_min_score else ""
    note = f" (small built-in model; {other})" if result.model == EMBEDDED_MODEL else ""
    cost = f"{result.num_computed_tokens} tokens in {result.total_ms:.0f} ms"
    console.print(Text(f"{visible(result.model)}{note}: {cost}{below}", style="dim"), soft_wrap=True)


def _share_of(item: RankedDocument) -> float:
    """0...1, also where the relevance score is a bare logit."""
    return sigmoid(item.log_odds) if item.probability is None else item.probability


def _bar(score: float, *, is_ascii_only: bool) -> str:
    full, least = "#|" if is_ascii_only else "█▏"
    return full * round(score * BAR_WIDTH) or least


def _print_prompt(reranker: Reranker, query: str, document: str) -> None:
    prompt, ids = reranker.explain(query, document)
    console = Console()
    console.out(visible(prompt, keep_lines=True), highlight=False)
    console.out(f"\n{len(ids)} token ids: {' '.join(map(str, ids))}", highlight=False)
