"""The command `local-rerank compare`: measure two runs and compare them query by query."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from local_rerank.commands.console import Console, JsonOutput, option, print_json, warn
from local_rerank.errors import InvalidRequest
from local_rerank.evaluation.plot import check_plot, write_plot
from local_rerank.evaluation.report import TIE_RULE, difference_table, evaluation_json, examples_table

if TYPE_CHECKING:
    from local_rerank.evaluation.left_out import LeftOut
    from local_rerank.evaluation.measures import System

RECALL_DEPTH = 100  # documents that recall counts, beside the first 10


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
    baseline, system, texts = _read(run_a, run_b, qrels, queries, measure, left_out)
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
    console.print(examples_table(chosen, texts))


def _read(
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
