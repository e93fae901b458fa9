"""The command `local-rerank compare`: two runs over the same queries, measured and compared query by query."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from local_rerank.commands.console import option
from local_rerank.errors import InvalidRequest
from local_rerank.evaluation.report import check_plot, comparison_record, difference_table, examples_table, write_plot

if TYPE_CHECKING:
    from local_rerank.evaluation.measures import Comparison, System


def compare(
    run_a: Annotated[Path, option(help="TREC run to compare with.")],
    run_b: Annotated[Path, option(help="TREC run that is compared.")],
    *,
    qrels: Annotated[Path, option(help="Judgements: TREC lines `query 0 document grade`.")],
    queries: Annotated[
        Path | None, option(help="Texts of the queries, to show them: .jsonl (id or _id, text) or .tsv (id, text).")
    ] = None,
    measure: Annotated[str, option(help="Measure to tell queries and draw by, as ir-measures names it.")] = "nDCG@10",
    depth: Annotated[int, option(help="Documents that recall counts, beside the first 10.")] = 100,
    json_output: Annotated[
        bool, option(name="--json", help="Print everything, queries one by one too, as JSON.")
    ] = False,
    plot: Annotated[Path | None, option(help="Write the differences by query as a picture (.svg).")] = None,
) -> None:
    """Compare RUN_B with RUN_A: nDCG@10, RR (its mean is MRR), AP (MAP), recall, wins by query, significance."""
    check_plot(plot)
    if depth < 1:
        raise InvalidRequest(f"depth is {depth}; it must be at least 1", field="depth", limit=1, value=depth)
    from rich.console import Console

    from local_rerank.evaluation.measures import compare as compare_systems
    from local_rerank.evaluation.measures import parse_measure

    measure = parse_measure(measure)
    baseline, system, texts = _systems(run_a, run_b, qrels, queries, measure, depth)
    comparisons = [compare_systems(baseline, system, name) for name in baseline.values]
    chosen = next(comparison for comparison in comparisons if comparison.measure == measure)
    if plot is not None:
        write_plot(plot, [chosen])
    console = Console()
    if json_output:
        console.out(_json(baseline, system, comparisons), highlight=False)
        return
    console.print(difference_table(baseline, system, comparisons))
    console.print(f"{len(chosen.differences)} judged queries\n", style="dim", highlight=False)
    console.print(examples_table(chosen, texts))


def _systems(
    run_a: Path, run_b: Path, qrels: Path, queries: Path | None, measure: str, depth: int
) -> tuple[System, System, dict[str, str]]:
    """Both runs over the judged queries that one of them has, and those queries' texts (their ids without a file)."""
    from local_rerank.evaluation.collection import read_orders, read_qrels, read_texts
    from local_rerank.evaluation.measures import System, measures
    from local_rerank.evaluation.measures import measure as measure_orders

    judgements = read_qrels(qrels)
    orders = [read_orders(file, judgements) for file in (run_a, run_b)]
    judged = {query_id: grades for query_id, grades in judgements.items() if any(query_id in each for each in orders)}
    if not judged:
        raise InvalidRequest(f"none of the queries of {run_a} and {run_b} is judged in {qrels}", field="qrels")
    names = tuple(dict.fromkeys((*measures(depth), measure)))
    a, b = (measure_orders(judged, order, names) for order in orders)
    texts = {query_id: query_id for query_id in judged}
    if queries is not None:
        texts |= {name: text for name, text in read_texts(queries, "queries") if name in judged}
    return System(name=str(run_a), values=a), System(name=str(run_b), values=b), texts


def _json(baseline: System, system: System, comparisons: list[Comparison]) -> str:
    value = {
        "systems": [
            {"name": each.name, "mean": {name: each.mean(name) for name in each.values}, "by_query": each.values}
            for each in (baseline, system)
        ],
        "comparisons": [comparison_record(comparison) for comparison in comparisons],
    }
    return json.dumps(value, ensure_ascii=False, indent=2)
