"""The command `local-rerank calibrate`: fit the probability of relevance to labelled pairs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from local_rerank.commands.console import Console, JsonOutput, option, print_json, progress, repeatable, warn
from local_rerank.config import MODEL, EngineConfig, OtherEngineConfig
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.plot import check_plot, write_reliability
from local_rerank.evaluation.report import table
from local_rerank.requests.scores import FORMAT_VERSION
from local_rerank.text_files import check_writable

if TYPE_CHECKING:
    from local_rerank.evaluation.calibrating import Scored
    from local_rerank.evaluation.labelled import Labelled

NOT_SEPARATED = 3  # exit status
METHOD = (
    "AUC, errors, precision and recall: 5-fold cross-validation by query; in parentheses 95 % bootstrap intervals over "
    "queries; calibration error over 10 bins of equal width"
)


def calibrate(
    labelled: Annotated[
        Path | None,
        option(group="Arguments", help="JSON lines with query, document and label (0 or 1). Default: --run."),
    ] = None,
    /,
    *,
    output: Annotated[Path, option(help="File to write the calibration to, as JSON.")],
    corpus: Annotated[Path | None, option(help="With --run: documents, as for `eval`.")] = None,
    queries: Annotated[Path | None, option(help="With --run: queries, as for `eval`.")] = None,
    qrels: Annotated[Path | None, option(help="With --run: relevance judgements; grades from 1 are relevant.")] = None,
    run: Annotated[
        Path | None,
        option(help="First-stage run whose candidates are the pairs; unjudged ones are not relevant."),
    ] = None,
    top_k: Annotated[int, option(help="With --run: candidates per query.")] = 20,
    model: Annotated[
        str | None, Parameter(group=MODEL, help="Model to calibrate. Default: the built-in model.")
    ] = None,
    precision: Annotated[
        tuple[float, ...], repeatable(help="Wanted precision, above 0 and at most 1; may be repeated. Default: 0.9.")
    ] = (0.9,),
    recall: Annotated[
        tuple[float, ...], repeatable(help="Wanted recall, above 0 and at most 1; may be repeated. Default: 0.9.")
    ] = (0.9,),
    num_resamples: Annotated[int, option(help="Bootstrap samples behind the intervals.")] = 1000,
    plot: Annotated[Path | None, option(help="Plot reliability to this file (.svg, .png, .pdf).")] = None,
    json_output: JsonOutput = False,
    engine: OtherEngineConfig | None = None,
) -> int:
    """Fit probabilities to labelled pairs; returns the exit status."""
    for name, values in (("precision", precision), ("recall", recall)):
        if wrong := [value for value in values if not 0 < value <= 1]:
            raise ConfigError(f"{name} is {wrong[0]:g}; it must be above 0 and at most 1, such as 0.9")
    for name, value in (("top_k", top_k), ("num_resamples", num_resamples)):
        if value < 1:
            raise InvalidRequest(f"{name} is {value}; it must be at least 1", field=name, limit=1, value=value)
    check_writable(output, "output")
    check_plot(plot)
    from local_rerank.evaluation.calibrating import NO_SEPARATION, fit
    from local_rerank.evaluation.measures import import_extra

    import_extra("scipy", "fitting a calibration")
    pairs = _read(labelled, {"corpus": corpus, "queries": queries, "qrels": qrels, "run": run}, top_k)
    scored, fitted_with = _score(pairs, dataclasses.replace(engine or EngineConfig(), model=model))
    found = fit(scored, precisions=precision, recalls=recall, num_resamples=num_resamples)
    curve, is_platt = dataclasses.asdict(found.curve), found.method == "platt"
    report = {
        "version": FORMAT_VERSION,
        **fitted_with,
        "method": found.method,
        **{name: value for name, value in curve.items() if (name == "points") != is_platt},
        "data": {
            "sha256": pairs.digest,
            "num_queries": scored.num_queries,
            "num_pairs": len(scored.relevant),
            "num_relevant": int(scored.relevant.sum()),
            "num_unjudged": pairs.num_unjudged,
        },
        "quality": found.quality,
        "thresholds": found.thresholds,
        "separation": found.why_no_separation or "clean",
        "how": METHOD,
    }
    if found.is_usable:
        output.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        lines = {"relevance score": found.bins["before"], f"probability ({found.method})": found.bins["after"]}
        write_reliability(plot, lines, f"{fitted_with['model']}, held-out queries")
    if json_output:
        print_json(report)
    else:
        _print(report)
    if why := found.why_no_separation:
        written = f"{output} is written" if found.is_usable else "nothing is written"
        warn(f"{NO_SEPARATION}: {why}; {written}")
        return NOT_SEPARATED
    return 0


def _read(labelled: Path | None, files: dict[str, Path | None], top_k: int) -> Labelled:
    from local_rerank.evaluation.calibrating import check_size
    from local_rerank.evaluation.collection import read_collection
    from local_rerank.evaluation.labelled import pairs_of, read_pairs

    given: dict[str, Any] = {name: file for name, file in files.items() if file is not None}
    if labelled is not None:
        if given:
            raise ConfigError(f"labelled pairs and {next(iter(given))} are both given; give one file of pairs or a run")
        pairs = read_pairs(labelled)
    elif missing := files.keys() - given.keys():
        raise ConfigError(
            f"{min(missing)} is missing; give a file of labelled pairs, or --run with --qrels, --corpus and --queries"
        )
    else:
        collection = read_collection(**given)
        warn(str(collection.left_out))
        pairs = pairs_of(collection, top_k)
    labels = pairs.labels
    check_size(len(pairs.by_query), sum(labels), len(labels) - sum(labels))
    return pairs


def _score(pairs: Labelled, config: EngineConfig) -> tuple[Scored, dict[str, Any]]:
    """Log-odds of all pairs, and what a calibration of this engine names."""
    import numpy as np

    from local_rerank.arguments import scores_of
    from local_rerank.evaluation.calibrating import Scored
    from local_rerank.reranker import Reranker
    from local_rerank.types import RerankRequest

    requests = [RerankRequest(query=query, documents=tuple(labels)) for query, labels in pairs.by_query.items()]
    log_odds: list[float] = []
    with Reranker(config=config) as reranker:
        with progress(f"{reranker.model_id}: queries", len(requests)) as advance:
            for result in reranker.rank_batch(requests):
                log_odds += scores_of(result, logits=True)
                advance()
        fitted_with = {"model": reranker.model_id, "instruction": reranker.instruction, "recipe": reranker.recipe}
    sizes = [len(labels) for labels in pairs.by_query.values()]
    query = np.repeat(np.arange(len(sizes)), sizes)
    return Scored(log_odds=np.array(log_odds), relevant=np.array(pairs.labels), query=query), fitted_with


def _print(report: dict[str, Any]) -> None:
    quality, data = report["quality"], report["data"]
    console = Console(highlight=False, soft_wrap=True)
    rows = [
        [name, *(f"{quality[f'{key}_{when}']:.4f}" for when in ("before", "after"))]
        for name, key in (("Brier score", "brier"), ("calibration error", "error"))
    ]
    console.print(table([report["model"], "relevance score", f"probability ({report['method']})"], rows))
    low, high = quality["auc_interval"]
    unjudged = f", {data['num_unjudged']} of them unjudged" if data["num_unjudged"] else ""
    console.print(
        f"AUC {quality['auc']:.3f} ({low:.3f} to {high:.3f}); {data['num_queries']} queries, "
        f"{data['num_pairs']} documents, {data['num_relevant']} relevant{unjudged}\n"
    )
    rows = [_cells(each) for each in report["thresholds"]]
    console.print(table(["threshold for", "log-odds", "probability", "precision", "recall"], rows))
    console.print(METHOD, style="dim")


def _cells(threshold: dict[str, Any]) -> list[str]:
    name = f"{threshold['wanted']} {threshold['value']:g}"
    if threshold["log_odds"] is None:
        return [name, "none", "", "", ""]
    cells = [name, f"{threshold['log_odds']:+.3f}", f"{threshold['probability']:.3f}"]
    for share in threshold["held_out"].values():
        low, high = share["interval"] or (0, 0)
        cells.append("none kept" if share["value"] is None else f"{share['value']:.3f} ({low:.2f}-{high:.2f})")
    return cells
