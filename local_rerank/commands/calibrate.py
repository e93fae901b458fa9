"""The command `local-rerank calibrate`: fit the probability of relevance to labelled pairs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from local_rerank.commands.console import Console, JsonOutput, option, print_json, progress, repeatable, warn
from local_rerank.config import MODEL, EngineConfig, OtherEngineConfig
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.plot import check_plot, write_reliability
from local_rerank.evaluation.report import table
from local_rerank.requests.calibration import FORMAT_VERSION
from local_rerank.text_files import check_writable

if TYPE_CHECKING:
    from local_rerank.evaluation.calibrating import Fit, Scored, Threshold
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
    plot: Annotated[Path | None, option(help="Plot reliability to this file (.svg, .png, .pdf).")] = None,
    json_output: JsonOutput = False,
    engine: OtherEngineConfig | None = None,
) -> int:
    """Fit probabilities to labelled pairs; returns the exit status."""
    for name, values in (("precision", precision), ("recall", recall)):
        if wrong := [value for value in values if not 0 < value <= 1]:
            raise ConfigError(f"{name} is {wrong[0]:g}; it must be above 0 and at most 1, such as 0.9")
    if top_k < 1:
        raise InvalidRequest(f"top_k is {top_k}; it must be at least 1", field="top_k", limit=1, value=top_k)
    check_writable(output, "output")
    check_plot(plot)
    from local_rerank.evaluation.calibrating import NO_SEPARATION, fit
    from local_rerank.evaluation.measures import import_extra

    import_extra("scipy", "fitting a calibration")
    pairs = _read(labelled, {"corpus": corpus, "queries": queries, "qrels": qrels, "run": run}, top_k)
    scored, fitted_with = _score(pairs, dataclasses.replace(engine or EngineConfig(), model=model))
    found = fit(scored, precisions=precision, recalls=recall)
    report = _report(pairs, scored, found, fitted_with)
    if found.is_usable:
        _write(output, report)
    if plot is not None:
        lines = {"relevance score": found.bins["before"], f"probability ({found.method})": found.bins["after"]}
        write_reliability(plot, lines, f"{fitted_with['model']}, held-out queries")
    if json_output:
        print_json(report)
    else:
        _print(report, found)
    if why := found.why_no_separation:
        written = f"{output} is written" if found.is_usable else "nothing is written"
        warn(f"{NO_SEPARATION}: {why}; {written}")
        return NOT_SEPARATED
    return 0


def _read(labelled: Path | None, files: Mapping[str, Path | None], top_k: int) -> Labelled:
    from local_rerank.evaluation.calibrating import check_size
    from local_rerank.evaluation.collection import read_collection
    from local_rerank.evaluation.labelled import pairs_of, read_pairs

    given: dict[str, Any] = {name: file for name, file in files.items() if file is not None}
    if labelled is not None and given:
        raise ConfigError(f"labelled pairs and {next(iter(given))} are both given; give one file of pairs or a run")
    if labelled is None and (missing := files.keys() - given.keys()):
        raise ConfigError(
            f"{min(missing)} is missing; give a file of labelled pairs, or --run with --qrels, --corpus and --queries"
        )
    if labelled is not None:
        pairs = read_pairs(labelled)
    else:
        collection = read_collection(**given)
        warn(str(collection.left_out))
        pairs = pairs_of(collection, top_k)
    labels = [label for each in pairs.by_query.values() for label in each.values()]
    check_size(len(pairs.by_query), sum(labels), len(labels) - sum(labels))
    return pairs


def _score(pairs: Labelled, config: EngineConfig) -> tuple[Scored, dict[str, Any]]:
    """Log-odds of all pairs, and what a calibration of this engine names."""
    import numpy as np

    from local_rerank.evaluation.calibrating import Scored
    from local_rerank.reranker import Reranker
    from local_rerank.types import RerankRequest, scores_of

    requests = [RerankRequest(query=query, documents=tuple(labels)) for query, labels in pairs.by_query.items()]
    log_odds: list[float] = []
    with Reranker(config=config) as reranker:
        with progress(f"{reranker.model_id}: queries", len(requests)) as advance:
            for result in reranker.rank_batch(requests):
                log_odds += scores_of(result, logits=True)
                advance()
        fitted_with = {
            "model": reranker.model_id,
            "instruction": reranker.instruction,
            "recipe": reranker.recipe,
        }
    sizes = [len(labels) for labels in pairs.by_query.values()]
    scored = Scored(
        log_odds=np.array(log_odds, dtype=float),
        relevant=np.array([label for labels in pairs.by_query.values() for label in labels.values()], dtype=bool),
        query=np.repeat(np.arange(len(sizes)), sizes),
    )
    return scored, fitted_with


def _report(pairs: Labelled, scored: Scored, found: Fit, fitted_with: dict[str, Any]) -> dict[str, Any]:
    """The contents of the file: the calibration, and what it was fitted to and is worth."""
    data = {
        "sha256": pairs.digest,
        "num_queries": scored.num_queries,
        "num_pairs": len(scored.relevant),
        "num_relevant": int(scored.relevant.sum()),
        "num_unjudged": pairs.num_unjudged,
    }
    return {
        "version": FORMAT_VERSION,
        **fitted_with,
        "method": found.method,
        **found.curve,
        "data": data,
        "quality": dataclasses.asdict(found.quality),
        "thresholds": [dataclasses.asdict(each) for each in found.thresholds],
        "separation": found.why_no_separation or "clean",
        "how": METHOD,
    }


def _write(file: Path, report: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output {file} cannot be written: {error.strerror}") from error


def _print(report: dict[str, Any], found: Fit) -> None:
    quality, data = found.quality, report["data"]
    console = Console()
    rows = [
        ["Brier score", f"{quality.brier_before:.4f}", f"{quality.brier_after:.4f}"],
        ["calibration error", f"{quality.error_before:.4f}", f"{quality.error_after:.4f}"],
    ]
    console.print(table([report["model"], "relevance score", f"probability ({found.method})"], rows))
    low, high = quality.auc_interval
    unjudged = f", {data['num_unjudged']} of them unjudged" if data["num_unjudged"] else ""
    console.print(
        f"AUC {quality.auc:.3f} ({low:.3f} to {high:.3f}); {data['num_queries']} queries, "
        f"{data['num_pairs']} documents, {data['num_relevant']} relevant{unjudged}\n",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        table(
            ["threshold for", "log-odds", "probability", "precision", "recall"],
            [_cells(each) for each in found.thresholds],
        )
    )
    console.print(METHOD, style="dim", highlight=False, soft_wrap=True)


def _cells(threshold: Threshold) -> list[str]:
    name = f"{threshold.wanted} {threshold.value:g}"
    if threshold.log_odds is None or threshold.probability is None:
        return [name, "none", "", "", ""]
    measured = [_measured(threshold.held_out[kind]) for kind in ("precision", "recall")]
    return [name, f"{threshold.log_odds:+.3f}", f"{threshold.probability:.3f}", *measured]


def _measured(share: dict[str, Any]) -> str:
    if share["value"] is None:
        return "none kept"
    low, high = share["interval"]
    return f"{share['value']:.3f} ({low:.2f}-{high:.2f})"
