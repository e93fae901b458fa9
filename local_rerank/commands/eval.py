"""The command `local-rerank eval`: rerank a first stage's run and measure the gain, as tables, JSON and a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from local_rerank.commands.console import option
from local_rerank.config import EngineConfig
from local_rerank.errors import InvalidRequest
from local_rerank.evaluation.blending import Blend, parse_blend
from local_rerank.evaluation.report import (
    check_plot,
    comparison_record,
    comparison_table,
    examples_table,
    measure_table,
    write_plot,
)

if TYPE_CHECKING:
    from local_rerank.evaluation.collection import Collection
    from local_rerank.evaluation.measures import Comparison, Scores, System

FIRST_STAGE = "first stage"


def evaluate(
    *,
    corpus: Annotated[Path, option(help="Documents: .jsonl (id or _id, text, perhaps title) or .tsv (id, text).")],
    queries: Annotated[Path, option(help="Queries: likewise.")],
    qrels: Annotated[Path, option(help="Judgements: TREC lines `query 0 document grade`.")],
    run: Annotated[Path, option(help="First stage: TREC lines `query Q0 document rank score name`.")],
    model: Annotated[
        tuple[str, ...],
        Parameter(
            negative="", show_default=False, help="Model to measure; may be repeated. Without it the built-in one."
        ),
    ] = (),
    top_k: Annotated[int, option(help="Candidates of each query to rerank; those below keep their order.")] = 20,
    max_queries: Annotated[int | None, option(help="Take only the first queries of the file.")] = None,
    blend: Annotated[
        str | None,
        option(help="Measure the model blended, too: run=W adds W times the run's scores (z-scores), bm25=W BM25's."),
    ] = None,
    json_output: Annotated[
        bool, option(name="--json", help="Print everything, queries one by one too, as JSON.")
    ] = False,
    plot: Annotated[Path | None, option(help="Write the differences by query as a picture (.svg).")] = None,
    engine: EngineConfig | None = None,
) -> None:
    """Rerank a first stage's run and measure it against judgements: nDCG@10, RR (its mean is MRR), AP (MAP), recall."""
    for name, value in (("top_k", top_k), ("max_queries", max_queries)):
        if value is not None and value < 1:
            raise InvalidRequest(f"{name} is {value}; it must be at least 1", field=name, limit=1, value=value)
    check_plot(plot)
    how = None if blend is None else parse_blend(blend)
    from local_rerank.evaluation.collection import read_collection
    from local_rerank.evaluation.measures import load_ir_measures

    load_ir_measures()  # before the work, not after it
    collection = read_collection(corpus=corpus, queries=queries, qrels=qrels, run=run, max_queries=max_queries)
    systems = [_first_stage(collection, top_k)]
    for one in dict.fromkeys(model) or [None]:
        systems += _systems(collection, dataclasses.replace(engine or EngineConfig(), model=one), top_k, how)
    comparisons = _comparisons(systems)
    if plot is not None:
        write_plot(plot, comparisons)
    if json_output:
        _print_json(collection, systems, comparisons, top_k)
    else:
        _print_tables(collection, systems, comparisons, top_k)


def _first_stage(collection: Collection, top_k: int) -> System:
    return _system(FIRST_STAGE, collection, {}, top_k)


def _systems(collection: Collection, config: EngineConfig, top_k: int, how: Blend | None) -> list[System]:
    """The model alone and, where that was asked for, blended. It is asked once."""
    from local_rerank.evaluation.measures import blend_scores, score
    from local_rerank.reranker import Reranker

    with Reranker(config=config) as reranker:
        name = config.model or reranker.model_id
        num_queries = sum(1 for candidates in collection.run.values() if candidates)
        with _progress(name, num_queries) as advance:
            scores: Scores = {}
            for query_id, log_odds in score(reranker, collection, top_k=top_k):
                scores[query_id] = log_odds
                advance()
    systems = [_system(name, collection, scores, top_k)]
    if how is not None:
        systems.append(_system(f"{name}, {how}", collection, blend_scores(scores, collection, how), top_k))
    return systems


def _system(name: str, collection: Collection, scores: Scores, top_k: int) -> System:
    from local_rerank.evaluation.measures import System, measure, measures, reorder

    return System(name=name, values=measure(collection.qrels, reorder(collection, scores), measures(top_k)))


def _comparisons(systems: Sequence[System]) -> list[Comparison]:
    """Everything with the first stage, and everything after the first model with that model."""
    from local_rerank.evaluation.measures import compare

    first, *others = systems
    return [compare(first, system) for system in others] + [compare(others[0], system) for system in others[1:]]


@contextmanager
def _progress(name: str, num_queries: int) -> Iterator[Any]:
    """A bar on standard error; yields the function to call after each query."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield partial(progress.advance, progress.add_task(f"{name}: queries", total=num_queries))


def _print_json(
    collection: Collection, systems: Sequence[System], comparisons: Sequence[Comparison], top_k: int
) -> None:
    from rich.console import Console

    value = {
        "num_queries": len(collection.queries),
        "num_unjudged_queries": collection.num_unjudged_queries,
        "top_k": top_k,
        "systems": [
            {
                "name": system.name,
                "mean": {measure: system.mean(measure) for measure in system.values},
                "by_query": system.values,
            }
            for system in systems
        ],
        "comparisons": [comparison_record(comparison) for comparison in comparisons],
    }
    Console().out(json.dumps(value, ensure_ascii=False, indent=2), highlight=False)


def _print_tables(
    collection: Collection, systems: Sequence[System], comparisons: Sequence[Comparison], top_k: int
) -> None:
    from rich.console import Console

    console = Console()
    console.print(measure_table(systems))
    left_out = f", {collection.num_unjudged_queries} without judgements left out" * bool(
        collection.num_unjudged_queries
    )
    console.print(f"{len(collection.queries)} queries{left_out}; top {top_k} reranked\n", style="dim", highlight=False)
    console.print(comparison_table(comparisons))
    for comparison in comparisons:
        console.print()
        console.print(examples_table(comparison, collection.queries))
