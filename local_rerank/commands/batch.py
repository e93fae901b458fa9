"""The command `local-rerank batch`: score a file of queries and documents."""

from __future__ import annotations

import io
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Token

from local_rerank.batch.formats import STANDARD_INPUT, copy_standard_input
from local_rerank.batch.job import JobFolder
from local_rerank.commands.batch_options import STREAM, BatchOptions, Judgements, StreamFormat, judgements_of, source_of
from local_rerank.commands.batch_progress import Display, Mode
from local_rerank.commands.console import Console, MinScore, option, say, status
from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError, DeviceFailure, InvalidRequest
from local_rerank.evaluation.blending import parse_blend
from local_rerank.types import check_number

if TYPE_CHECKING:
    from local_rerank.batch.job import JobProgress
    from local_rerank.batch.sources import Source
    from local_rerank.evaluation.measures import System
    from local_rerank.reranker import Reranker

RUNS = Group("Runs, measures and blending", sort_key=0)
MEASURED_DEPTH = 100  # recall is R@100 unless --top-k bounds it


def _name_or_dash(_: Any, tokens: Sequence[Token]) -> str:
    """A converter for cyclopts, which takes any text for the input if it may begin with a hyphen."""
    if tokens[0].value.startswith("-") and tokens[0].value != STREAM:
        raise ValueError(f"Unknown option: {tokens[0].value}")
    return tokens[0].value


def batch(
    input: Annotated[
        str,
        option(
            help="File to score: .jsonl or .parquet (a query with documents, or a pair), .csv or .tsv (pairs), or a "
            "run (.run, .trec, .txt, and with --queries .tsv or .csv) with --queries and --corpus, or --dataset. Or - "
            "for standard input: JSON lines, CSV or TSV.",
            allow_leading_hyphen=True,
            converter=_name_or_dash,
        ),
    ],
    *,
    output: Annotated[
        str,
        option(
            help="File to write: .jsonl, .csv, .tsv, .parquet or .run; or - for standard output.",
            allow_leading_hyphen=True,
        ),
    ],
    output_format: Annotated[StreamFormat | None, option(help="Form of standard output. Default: jsonl.")] = None,
    queries: Annotated[
        Path | None,
        option(group=RUNS, help="Queries of a run: .jsonl (id, text), .tsv (id, text), .csv or TREC topics."),
    ] = None,
    corpus: Annotated[
        Path | None, option(group=RUNS, help="Documents of a run: .jsonl, .tsv, .csv or TREC documents.")
    ] = None,
    dataset: Annotated[
        str | None, option(group=RUNS, help="ir_datasets collection with the queries and documents of a run.")
    ] = None,
    qrels: Annotated[
        Path | None,
        option(
            group=RUNS,
            help="Relevance judgements, TREC's or BEIR's, to measure the output run with, once it is complete.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        option(group=RUNS, help="Candidates to rerank per query of a run; the others keep their order. Default: all."),
    ] = None,
    blend: Annotated[
        str | None,
        option(
            group=RUNS,
            help="Rank by log-odds plus W times other scores, both as z-scores: run=W (scores of the run, or `score` "
            "of each document) or bm25=W (BM25 over the query's documents, less the less of the query it finds); "
            "run-ranks=W and bm25-ranks=W add reciprocal ranks. Default: log-odds alone.",
        ),
    ] = None,
    min_score: MinScore = None,
    cache: Annotated[Path | None, option(help="SQLite file that caches scores by pair, also across jobs.")] = None,
    return_documents: Annotated[bool, option(help="Include the texts of the documents in the output.")] = False,
    spreadsheet_safe: Annotated[
        bool,
        option(help="In .csv and .tsv put an apostrophe before texts that a spreadsheet would run as formulas."),
    ] = False,
    overwrite: Annotated[bool, option(help="Replace an existing output and start again.")] = False,
    ray: Annotated[
        bool | str,
        option(
            help="Score on a Ray cluster: at this address, at RAY_ADDRESS, or started here. Input and output are "
            ".jsonl or .parquet on any filesystem that pyarrow knows (s3://...); the output is a folder of parts, "
            "called NAME.jsonl or NAME.parquet."
        ),
    ] = False,
    quiet: Annotated[bool, option(help="Print nothing but errors.")] = False,
    json_output: Annotated[
        bool, option(name="--json", help="Print progress, rejected records and the summary as JSON lines.")
    ] = False,
    engine: EngineConfig | None = None,
) -> None:
    """Score a file, or resume a job that was killed."""
    if min_score is not None:
        check_number("min_score", min_score)
    mode: Mode = "quiet" if quiet else "json" if json_output else "bar"
    if output_format is not None and output != STREAM:
        raise ConfigError(f"output_format is for standard output (-), but output is {output}, whose suffix counts")
    if output == STREAM and overwrite:
        raise ConfigError("overwrite needs a file as output, but output is -")
    if ray and STREAM in (input, output):
        name = "input" if input == STREAM else "output"
        raise ConfigError(f"{name} is -, but workers of --ray need files that all of them can reach")
    if ray:
        return _run_on_ray(
            input, output, ray if isinstance(ray, str) else None, engine or EngineConfig(), blend,
            min_score=min_score, return_documents=return_documents, overwrite=overwrite, mode=mode,
            others={"queries": queries, "corpus": corpus, "dataset": dataset, "qrels": qrels, "top_k": top_k,
                    "cache": cache, "spreadsheet_safe": spreadsheet_safe or None},
        )  # fmt: skip
    _run(
        BatchOptions(
            input=STANDARD_INPUT if input == STREAM else Path(input),
            output=Path(f"standard output.{output_format or 'jsonl'}") if output == STREAM else Path(output),
            is_stream=output == STREAM,
            queries=queries,
            corpus=corpus,
            dataset=dataset,
            qrels=qrels,
            top_k=top_k,
            blend=None if blend is None else parse_blend(blend),
            min_score=min_score,
            cache=cache,
            return_documents=return_documents,
            spreadsheet_safe=spreadsheet_safe,
            engine=engine or EngineConfig(),
        ),
        mode,
        overwrite,
    )


@contextmanager
def _saying_what_next(what_next: Callable[[], str]) -> Iterator[None]:
    """Report a full disk or a GPU that failed, for example, in one line."""
    try:
        yield
    except BrokenPipeError:  # the reader of standard output has gone
        raise
    except (OSError, sqlite3.Error, DeviceFailure) as error:
        raise ConfigError(f"the job stopped: {error}; {what_next()}") from error


def _run_on_ray(
    input: str,
    output: str,
    address: str | None,
    config: EngineConfig,
    blend: str | None,
    *,
    min_score: float | None,
    return_documents: bool,
    overwrite: bool,
    mode: Mode,
    others: dict[str, object],
) -> None:
    if given := [name for name, value in others.items() if value is not None]:
        raise ConfigError(f"{given[0]} cannot be combined with --ray")
    from local_rerank.batch.ray_cluster import absolute, require_ray

    require_ray()
    from local_rerank.batch.pieces import suffix_of
    from local_rerank.batch.ray_data import RayJob, run

    job = RayJob(
        input=input,
        output=output,
        suffix=suffix_of(output),
        with_documents=return_documents,
        blend=None if blend is None else parse_blend(blend),
        min_score=min_score,
        config=absolute(config),
    )
    num_rows = 0
    parts = "the same command goes on with the parts that are missing"
    with Display(mode, Path(input).name) as display, _saying_what_next(lambda: parts):
        for done in run(job, address, overwrite=overwrite, begin=display.begin):
            num_rows += done.num_rows
            display.piece(done.num_pairs, done.num_tokens, done.num_rejected)
    counts = {"rows": num_rows, "pairs": display.num_pairs, "rejected": display.num_rejected}
    display.event(
        "done", output=output, **counts, tokens=display.num_tokens, seconds=display.seconds, **display.rates()
    )
    if mode == "bar":
        say(f"{output}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()) + " in this run")
        say(f"{display.seconds:.1f} s, {display.rates_text}")


def _run(job: BatchOptions, mode: Mode, overwrite: bool) -> None:
    """Do a job. With standard streams its folder and a copy of the input are temporary; if the output is one, all else
    that the command prints goes to standard error.
    """
    with ExitStack() as stack:
        stream = None
        if job.is_stream or job.input == STANDARD_INPUT:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="local-rerank-")))
        if job.input == STANDARD_INPUT:
            with _saying_what_next(lambda: f"{folder} takes a copy of standard input; TMPDIR chooses another"):
                copy_standard_input(folder / "input")
            job = replace(job, input_copy=folder / "input")
        if job.is_stream:
            stream = io.FileIO(sys.stdout.fileno(), "wb", closefd=False)
            job = replace(job, output=folder / job.output.name)
            stack.enter_context(redirect_stdout(sys.stderr))
        _do(job, mode, overwrite, stream)


def _do(job: BatchOptions, mode: Mode, overwrite: bool, stream: io.RawIOBase | None) -> None:
    """Judge everything that can be judged without the model, then load it and do the job."""
    judgements = judgements_of(job)
    if job.cache is not None:
        from local_rerank.batch.score_cache import ScoreCache

        ScoreCache(job.cache, "").close()
    with closing(JobFolder(job.output, job.rejects, job.settings, overwrite=overwrite)) as folder:
        display = Display(mode, job.input.name, has_rejects_file=not job.is_stream)
        with _saying_what_next(lambda: _next_time(job, folder)):
            source = source_of(job, folder, judgements)
            if folder.begins:
                display.start(str(job.output), folder.begins)
            from local_rerank.reranker import Reranker

            with status("loading the model") if mode == "bar" else nullcontext():
                reranker = Reranker(config=job.engine)
            with reranker:
                _score(job, folder, source, reranker, display, judgements, stream)


def _next_time(job: BatchOptions, folder: JobFolder) -> str:
    return "the same command starts anew" if job.is_stream else folder.next_time


def _score(
    job: BatchOptions,
    folder: JobFolder,
    source: Source,
    reranker: Reranker,
    display: Display,
    judgements: Judgements | None,
    stream: io.RawIOBase | None,
) -> None:
    from local_rerank.batch.formats import open_sink
    from local_rerank.batch.job import run_job
    from local_rerank.batch.rows import AddedColumns
    from local_rerank.batch.score_cache import ScoreCache, score_identity
    from local_rerank.batch.scoring import BlockScorer

    identity = score_identity(reranker)
    loaded = {"model": reranker.model_id, "dtype": reranker.info.dtype}
    progress = folder.start(loaded | job.settings | {"digest of model and options": identity[:16]})
    was_done = progress.is_done
    sink = open_sink(
        job.output,
        folder.path,
        source,
        model_id=reranker.model_id,
        added=AddedColumns(
            with_documents=job.return_documents,
            is_blended=job.blend is not None,
            in_chunks=reranker.config.in_chunks,
            is_calibrated=job.engine.calibration is not None,
            counts_below=job.min_score is not None,
        ),
        spreadsheet_safe=job.spreadsheet_safe,
        stream=stream,
    )
    file = job.cache or folder.path / "scores.sqlite"
    with closing(ScoreCache(file, identity, in_chunks=reranker.config.in_chunks)) as cache, display:
        reranker.observe_batches(lambda batch: display.computed(batch.num_tokens))
        scorer = BlockScorer(reranker, cache=cache, blend=job.blend, min_score=job.min_score, advance=display.advance)
        display.begin(progress.position.offset, source.size)
        run_job(folder, source, scorer.score, sink, job.rejects, report=display.report)
    systems = [] if judgements is None else _measured(job, judgements, reranker.model_id)
    assert folder.progress is not None
    _summarize(job, display, folder.progress, systems, was_done)


def _measured(job: BatchOptions, judgements: Judgements, name: str) -> list[System]:
    """Measure the output, and an input run, over the judged queries and the documents of the output."""
    from local_rerank.evaluation.left_out import LeftOut
    from local_rerank.evaluation.measures import FIRST_STAGE, System, measure, measures
    from local_rerank.evaluation.trec_files import read_orders

    left_out = LeftOut()  # said when the job read the run
    ours = read_orders(job.output, left_out, judgements)
    orders = {name if job.blend is None else f"{name}, {job.blend}": ours}
    if job.is_run:
        first = read_orders(job.input, left_out, judgements)
        kept = {query_id: set(order) for query_id, order in ours.items()}
        orders = {
            FIRST_STAGE: {query: [each for each in first.get(query, ()) if each in kept[query]] for query in kept}
        } | orders
    if not (judged := {query_id: judgements[query_id] for query_id in ours}):
        raise InvalidRequest(f"none of the queries of {job.output} has a judgement in {job.qrels}", field="qrels")
    names = measures(job.top_k or MEASURED_DEPTH)
    return [System(name=system, values=measure(judged, order, names)) for system, order in orders.items()]


def _summarize(
    job: BatchOptions, display: Display, progress: JobProgress, systems: list[System], was_done: bool
) -> None:
    if display.mode == "json":
        display.event(
            "done",
            output=STREAM if job.is_stream else str(job.output),
            rejects=str(job.rejects) if progress.num_rejected and not job.is_stream else None,
            rows=progress.num_rows,
            pairs=progress.num_pairs,
            rejected=progress.num_rejected,
            model_pairs=display.num_model_pairs,
            tokens=display.num_tokens,
            seconds=display.seconds,
            **display.rates(),
            measures=[{"name": one.name} | {name: one.mean(name) for name in one.values} for one in systems],
        )
    if display.mode != "bar":
        return
    name = "standard output" if job.is_stream else job.output
    say(f"{name}: {progress.num_rows:,} rows, {progress.num_pairs:,} pairs" + " (was complete)" * was_done)
    if progress.num_rejected:
        say(("" if job.is_stream else f"{job.rejects}: ") + f"{progress.num_rejected:,} rejected records")
    if not was_done:
        say(f"{display.num_model_pairs:,} pairs scored by the model, {display.seconds:.1f} s, {display.rates_text}")
    if systems:
        from local_rerank.evaluation.report import measure_table

        Console().print(measure_table(systems))
