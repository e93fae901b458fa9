"""The commands `eval`, which reranks a run and measures the gain, and `compare`, which compares two runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from local_rerank.commands.console import Console, JsonOutput, option, print_json, progress, warn
from local_rerank.config import MODEL, EngineConfig, OtherEngineConfig
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.blending import parse_blend
from local_rerank.evaluation.plot import check_plot, write_plot
from local_rerank.evaluation.report import (
    TIE_RULE,
    comparison_table,
    difference_table,
    evaluation_json,
    examples_table,
    measure_table,
)

if TYPE_CHECKING:
    from local_rerank.evaluation.collection import Collection
    from local_rerank.evaluation.left_out import LeftOut
    from local_rerank.evaluation.measures import Comparison, Scores, System

RECALL_DEPTH = 100  # documents that recall counts, beside the first 10


def evaluate(
    *,
    corpus: Annotated[
        Path, option(help="Documents: .jsonl (id, text, optional title), .tsv (id, text), .csv or TREC documents.")
    ],
    queries: Annotated[Path, option(help="Queries: .jsonl, .tsv or .csv as for the corpus, or TREC topics.")],
    qrels: Annotated[Path, option(help="Relevance judgements: lines `query 0 document grade`, or BEIR's.")],
    run: Annotated[Path, option(help="First-stage run: lines `query Q0 document rank score name`.")],
    model: Annotated[
        tuple[str, ...],
        Parameter(
            group=MODEL, show_default=False, help="Model to measure; may be repeated. Default: the built-in model."
        ),
    ] = (),
    top_k: Annotated[int, option(help="Candidates to rerank per query; the others keep their order.")] = 20,
    max_queries: Annotated[int | None, option(help="Use only the first queries of the file. Default: all.")] = None,
    blend: Annotated[
        str | None,
        option(
            help="Also measure the model blended with W times the run's scores (run=W) or BM25 (bm25=W), as z-scores; "
            "run-ranks=W and bm25-ranks=W add reciprocal ranks."
        ),
    ] = None,
    tune: Annotated[
        Literal["blend"] | None,
        option(
            help="blend: find the weight of the run's scores on one half of the queries, and measure on the other half."
        ),
    ] = None,
    json_output: JsonOutput = False,
    plot: Annotated[Path | None, option(help="Plot the differences by query to this file (.svg, .png, .pdf).")] = None,
    engine: OtherEngineConfig | None = None,
) -> None:
    """Rerank a first-stage run and measure both against relevance judgements."""
    for name, value in (("top_k", top_k), ("max_queries", max_queries)):
        if value is not None and value < 1:
            raise InvalidRequest(f"{name} is {value}; it must be at least 1", field=name, limit=1, value=value)
    check_plot(plot)
    how = None if blend is None else parse_blend(blend)
    if how is not None and tune is not None:
        raise ConfigError(f"blend is {blend}, but tune finds the blend; leave out one of them")
    from local_rerank.evaluation.collection import read_collection
    from local_rerank.evaluation.measures import FIRST_STAGE, blend_scores, halves, require_extras, tune_blend

    require_extras()
    collection = read_collection(corpus=corpus, queries=queries, qrels=qrels, run=run, max_queries=max_queries)
    tuned_on, measured = (None, collection) if tune is None else halves(collection)
    systems = [_system(FIRST_STAGE, measured, {}, top_k)]
    for one in dict.fromkeys(model) or [None]:
        name, scores = _score(collection, dataclasses.replace(engine or EngineConfig(), model=one), top_k)
        systems.append(_system(name, measured, scores, top_k))
        if (chosen := how if tuned_on is None else tune_blend(scores, tuned_on)) is not None:
            systems.append(_system(f"{name}, {chosen}", measured, blend_scores(scores, measured, chosen), top_k))
    comparisons = _comparisons(systems)
    if plot is not None:
        write_plot(plot, comparisons)
    if json_output:
        print_json(
            {
                "num_queries": len(measured.queries),
                **({} if tuned_on is None else {"num_tuning_queries": len(tuned_on.queries)}),
                "num_unjudged_queries": collection.num_unjudged_queries,
                "top_k": top_k,
                "left_out": collection.left_out.as_json(),
                **evaluation_json(systems, comparisons),
            }
        )
    else:
        _print_tables(measured, systems, comparisons, top_k, tuned_on)


def _score(collection: Collection, config: EngineConfig, top_k: int) -> tuple[str, Scores]:
    """The name of a model, and its log-odds."""
    from local_rerank.evaluation.measures import score
    from local_rerank.reranker import Reranker

    with Reranker(config=config) as reranker:
        name = (config.model or reranker.model_id) + ", in chunks" * reranker.config.in_chunks
        num_queries = sum(1 for candidates in collection.run.values() if candidates)
        with progress(f"{name}: queries", num_queries) as advance:
            scores: Scores = {}
            for query_id, log_odds in score(reranker, collection, top_k=top_k):
                scores[query_id] = log_odds
                advance()
    return name, scores


def _system(name: str, collection: Collection, scores: Scores, top_k: int) -> System:
    from local_rerank.evaluation.measures import System, measure, measures, reorder

    return System(name=name, values=measure(collection.qrels, reorder(collection, scores), measures(top_k)))


def _comparisons(systems: Sequence[System]) -> list[Comparison]:
    """Compare every system with the first stage, and every later one with the first model."""
    from local_rerank.evaluation.measures import compare

    first, *others = systems
    return [compare(first, system) for system in others] + [compare(others[0], system) for system in others[1:]]


def _print_tables(
    collection: Collection,
    systems: Sequence[System],
    comparisons: Sequence[Comparison],
    top_k: int,
    tuned_on: Collection | None,
) -> None:
    console = Console()
    console.print(measure_table(systems))
    skipped = (
        f", {collection.num_unjudged_queries} skipped without judgements" if collection.num_unjudged_queries else ""
    )
    others = "" if tuned_on is None else f", with the weight found on {len(tuned_on.queries)} others"
    console.print(
        f"{len(collection.queries)} queries{others}{skipped}; top {top_k} reranked\n", style="dim", highlight=False
    )
    warn(str(collection.left_out))
    console.print(comparison_table(comparisons))
    console.print(TIE_RULE, style="dim", highlight=False)
    for comparison in comparisons:
        if comparison.wins or comparison.losses:
            console.print()
            console.print(examples_table(comparison, collection.queries))


def compare(
    run_a: Annotated[Path, option(help="TREC run that is the baseline.")],
    run_b: Annotated[Path, option(help="TREC run to compare with it.")],
    *,
    qrels: Annotated[Path, option(help="Relevance judgements: lines `query 0 document grade`, or BEIR's.")],
    queries: Annotated[
        Path | None, option(help="Query texts to show: .jsonl (id, text), .tsv (id, text), .csv or TREC topics.")
    ] = None,
    measure: Annotated[
        str, option(help="Measure for the examples and the plot, by its ir-measures name; added to the table.")
    ] = "nDCG@10",
    json_output: JsonOutput = False,
    plot: Annotated[Path | None, option(help="Plot the differences by query to this file (.svg, .png, .pdf).")] = None,
) -> None:
    """Compare run B with run A."""
    check_plot(plot)
    from local_rerank.evaluation.left_out import LeftOut
    from local_rerank.evaluation.measures import compare as compare_systems
    from local_rerank.evaluation.measures import parse_measure, require_extras

    require_extras()
    measure = parse_measure(measure)
    left_out = LeftOut()
    baseline, system, texts = _read_runs(run_a, run_b, qrels, queries, measure, left_out)
    comparisons = [compare_systems(baseline, system, name) for name in baseline.values]
    chosen = next(comparison for comparison in comparisons if comparison.measure == measure)
    if plot is not None:
        write_plot(plot, [chosen])
    if json_output:
        found = evaluation_json([baseline, system], comparisons)
        print_json(found | {"left_out": left_out.as_json(), "tie_rule": TIE_RULE})
        return
    console = Console()
    console.print(difference_table(baseline, system, comparisons))
    console.print(f"{len(chosen.differences)} judged queries; {TIE_RULE}\n", style="dim", highlight=False)
    warn(str(left_out))
    if chosen.wins or chosen.losses:
        console.print(examples_table(chosen, texts))


def _read_runs(
    run_a: Path, run_b: Path, qrels: Path, queries: Path | None, measure: str, left_out: LeftOut
) -> tuple[System, System, dict[str, str]]:
    """Measure both runs over the judged queries of either; also returns the query texts, or ids without a file."""
    from local_rerank.evaluation.measures import System, measures
    from local_rerank.evaluation.measures import measure as measure_orders
    from local_rerank.evaluation.text_forms import read_texts
    from local_rerank.evaluation.trec_files import read_orders, read_qrels

    judgements = read_qrels(qrels)
    orders = [read_orders(file, left_out, judgements) for file in (run_a, run_b)]
    judged = {query_id: grades for query_id, grades in judgements.items() if any(query_id in each for each in orders)}
    if not judged:
        raise InvalidRequest(f"none of the queries of {run_a} and {run_b} has a judgement in {qrels}", field="qrels")
    names = tuple(dict.fromkeys((*measures(RECALL_DEPTH), measure)))
    a, b = (measure_orders(judged, order, names) for order in orders)
    texts = {query_id: query_id for query_id in judged}
    if queries is not None:
        texts |= dict(read_texts(queries, "queries", left_out, only=judged))
    return System(name=str(run_a), values=a), System(name=str(run_b), values=b), texts
