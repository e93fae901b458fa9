"""The command `local-rerank batch`: score a file of queries and documents."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from local_rerank.batch.formats import OUTPUT_SUFFIXES
from local_rerank.commands.console import option, say, status
from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.blending import Blend, parse_blend

if TYPE_CHECKING:
    from local_rerank.batch.job import JobFolder, JobProgress
    from local_rerank.batch.sources import Source
    from local_rerank.batch.trec_source import TextStore
    from local_rerank.commands.batch_progress import Display, Mode
    from local_rerank.evaluation.measures import System
    from local_rerank.reranker import Reranker

RUN_SUFFIXES = (".run", ".trec", ".txt")
MEASURED_DEPTH = 100  # recall is R@100 unless --top-k bounds it


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """The options of a job in this process."""

    input: Path
    output: Path
    queries: Path | None
    corpus: Path | None
    dataset: str | None
    qrels: Path | None
    top_k: int | None
    blend: Blend | None
    cache: Path | None
    return_documents: bool

    @property
    def rejects(self) -> Path:
        return Path(f"{self.output}.rejects.jsonl")

    @property
    def is_run(self) -> bool:
        return self.input.suffix.lower() in RUN_SUFFIXES

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise InvalidRequest(
                f"top_k is {self.top_k}; it must be at least 1", field="top_k", limit=1, value=self.top_k
            )
        if not self.input.is_file():
            raise InvalidRequest(f"input is {self.input}; there is no such file", field="input")
        if self.input.resolve() in (self.output.resolve(), self.rejects.resolve()):
            raise ConfigError(f"output is {self.output}, which is the input; choose another name")
        if self.output.suffix.lower() not in OUTPUT_SUFFIXES:
            raise ConfigError(f"output is {self.output}; it must end in one of {', '.join(OUTPUT_SUFFIXES)}")
        if not self.output.parent.is_dir():
            raise ConfigError(f"output is {self.output}; there is no folder {self.output.parent}")
        if self.is_run:
            if (self.dataset is None) == (self.queries is None or self.corpus is None):
                raise ConfigError(
                    f"input is {self.input}, a run, which needs either --queries and --corpus or --dataset"
                )
        elif given := [name for name in ("queries", "corpus", "dataset", "top_k") if getattr(self, name) is not None]:
            raise ConfigError(f"{given[0]} needs a run (.run) as input, but input is {self.input}")
        if self.qrels is not None and self.output.suffix.lower() != ".run":
            raise ConfigError(f"qrels needs a run as output, but output is {self.output}; it must end in .run")

    def settings(self, reranker: Reranker) -> dict[str, str]:
        """Return everything that determines the output; a resumed job must have the same."""
        from local_rerank.batch.score_cache import score_identity

        values = {
            "input": _state(self.input),
            "model": f"{reranker.model_id} ({score_identity(reranker)[:16]})",
            "instruction": reranker.config.instruction,
            "return_documents": str(self.return_documents).lower(),
        }
        values |= {name: _state(file) for name in ("queries", "corpus") if (file := getattr(self, name)) is not None}
        optional = {"dataset": self.dataset, "top_k": self.top_k, "blend": self.blend}
        return values | {name: str(value) for name, value in optional.items() if value is not None}


def batch(
    input: Annotated[
        str,
        option(
            help="File to score: .jsonl or .parquet (a query with documents, or a pair), .csv or .tsv (pairs), or a "
            "TREC run (.run, .trec, .txt) with --queries and --corpus, or --dataset."
        ),
    ],
    *,
    output: Annotated[str, option(help="File to write: .jsonl, .csv, .tsv, .parquet or .run.")],
    queries: Annotated[
        Path | None, option(help="Queries of a run: .jsonl (id or _id, text), .tsv (id, text) or TREC topics.")
    ] = None,
    corpus: Annotated[Path | None, option(help="Documents of a run: .jsonl or .tsv.")] = None,
    dataset: Annotated[
        str | None, option(help="ir_datasets collection with the queries and documents of a run.")
    ] = None,
    qrels: Annotated[
        Path | None, option(help="TREC relevance judgements to measure the output run with, once it is complete.")
    ] = None,
    top_k: Annotated[
        int | None, option(help="Candidates to rerank per query of a run; the others keep their order. Default: all.")
    ] = None,
    blend: Annotated[
        str | None,
        option(
            help="Rank by log-odds plus W times other scores, both as z-scores: run=W (scores of the run, or `score` "
            "of each document) or bm25=W (BM25 over the query's documents). Default: log-odds alone."
        ),
    ] = None,
    cache: Annotated[Path | None, option(help="SQLite file that caches scores by pair, also across jobs.")] = None,
    return_documents: Annotated[bool, option(help="Include the texts of the documents in the output.")] = False,
    overwrite: Annotated[bool, option(help="Replace an existing output and start again.")] = False,
    ray: Annotated[
        bool | str,
        option(
            help="Score on a Ray cluster: at this address, at RAY_ADDRESS, or started here. Input and output are "
            ".jsonl or .parquet on any filesystem that pyarrow knows (s3://...); the output is a folder of parts."
        ),
    ] = False,
    quiet: Annotated[bool, option(help="Print nothing but errors.")] = False,
    json_output: Annotated[
        bool, option(name="--json", help="Print progress, rejected records and the summary as JSON lines.")
    ] = False,
    engine: EngineConfig | None = None,
) -> None:
    """Score a file, or resume a job that was killed."""
    mode: Mode = "quiet" if quiet else "json" if json_output else "bar"
    if ray:
        return _run_on_ray(
            input, output, ray if isinstance(ray, str) else None, engine or EngineConfig(), blend,
            return_documents=return_documents, overwrite=overwrite, mode=mode,
            others={"queries": queries, "corpus": corpus, "dataset": dataset, "qrels": qrels, "top_k": top_k,
                    "cache": cache},
        )  # fmt: skip
    job = BatchOptions(
        input=Path(input),
        output=Path(output),
        queries=queries,
        corpus=corpus,
        dataset=dataset,
        qrels=qrels,
        top_k=top_k,
        blend=None if blend is None else parse_blend(blend),
        cache=cache,
        return_documents=return_documents,
    )
    from local_rerank.evaluation.measures import load_ir_measures
    from local_rerank.reranker import Reranker

    if qrels is not None:
        load_ir_measures()  # fail before the work if it is missing
    with status("loading the model") if mode == "bar" else nullcontext():
        reranker = Reranker(config=engine)
    with reranker, _io_errors_as_config_error():
        _run(job, reranker, mode, overwrite)


@contextmanager
def _io_errors_as_config_error() -> Iterator[None]:
    """Report a full disk, for example, in one line."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"the job stopped: {error}; the same command resumes it") from error


def _run_on_ray(
    input: str,
    output: str,
    address: str | None,
    config: EngineConfig,
    blend: str | None,
    *,
    return_documents: bool,
    overwrite: bool,
    mode: Mode,
    others: dict[str, object],
) -> None:
    if given := [name for name, value in others.items() if value is not None]:
        raise ConfigError(f"{given[0]} cannot be combined with --ray")
    from local_rerank.batch.ray_cluster import require_ray

    require_ray()
    from local_rerank.batch.pieces import suffix_of
    from local_rerank.batch.ray_data import RayJob, absolute, run
    from local_rerank.commands.batch_progress import Display

    job = RayJob(
        input=input,
        output=output,
        suffix=suffix_of(output),
        with_documents=return_documents,
        blend=None if blend is None else parse_blend(blend),
        config=absolute(config),
    )
    num_rows = 0
    with Display(mode, Path(input).name, 0) as display, _io_errors_as_config_error():
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


def _run(job: BatchOptions, reranker: Reranker, mode: Mode, overwrite: bool) -> None:
    from local_rerank.batch.formats import open_sink
    from local_rerank.batch.job import JobFolder, run_job
    from local_rerank.batch.score_cache import ScoreCache, score_identity
    from local_rerank.batch.scoring import BlockScorer
    from local_rerank.commands.batch_progress import Display

    with closing(JobFolder(job.output, job.rejects, job.settings(reranker), overwrite=overwrite)) as folder:
        was_done = folder.progress.is_done
        source = _source(job, folder)
        sink = open_sink(
            job.output,
            folder.path,
            source,
            model_id=reranker.model_id,
            with_documents=job.return_documents,
            is_blended=job.blend is not None,
        )
        with (
            closing(ScoreCache(job.cache or folder.path / "scores.sqlite", score_identity(reranker))) as cache,
            Display(mode, job.input.name, source.size) as display,
        ):
            scorer = BlockScorer(reranker, cache=cache, blend=job.blend, advance=display.advance)
            display.begin(folder.progress.position.offset)
            progress = run_job(
                folder, source, scorer.score, sink, job.rejects, begin=display.block, report=display.report
            )
        systems = [] if job.qrels is None else _measured(job, job.qrels, reranker.model_id)
        _summarize(job, display, progress, systems, mode, was_done)


def _source(job: BatchOptions, folder: JobFolder) -> Source:
    from local_rerank.batch.formats import open_source

    if not job.is_run:
        return open_source(job.input)
    from local_rerank.batch.trec_source import DatasetTexts, FileTexts, RunSource

    if job.dataset is not None:
        texts: TextStore = DatasetTexts(job.dataset)
    else:
        assert job.queries is not None
        assert job.corpus is not None
        texts = FileTexts(job.queries, job.corpus)
    return RunSource(job.input, texts, folder.path, job.top_k)


def _measured(job: BatchOptions, qrels: Path, name: str) -> list[System]:
    """Measure the output, and an input run, over the judged queries of the output."""
    from local_rerank.evaluation.collection import read_orders, read_qrels
    from local_rerank.evaluation.measures import FIRST_STAGE, System, measure, measures

    judgements = read_qrels(qrels)
    runs = {FIRST_STAGE: job.input} if job.is_run else {}
    runs |= {name if job.blend is None else f"{name}, {job.blend}": job.output}
    orders = {system: read_orders(file, judgements) for system, file in runs.items()}
    *_, ours = orders.values()
    if not (judged := {query_id: judgements[query_id] for query_id in ours if query_id in judgements}):
        raise InvalidRequest(f"none of the queries of {job.output} has a judgement in {qrels}", field="qrels")
    names = measures(job.top_k or MEASURED_DEPTH)
    return [System(name=system, values=measure(judged, order, names)) for system, order in orders.items()]


def _summarize(
    job: BatchOptions, display: Display, progress: JobProgress, systems: list[System], mode: Mode, was_done: bool
) -> None:
    if mode == "json":
        display.event(
            "done",
            output=str(job.output),
            rejects=str(job.rejects) if progress.num_rejected else None,
            rows=progress.num_rows,
            pairs=progress.num_pairs,
            rejected=progress.num_rejected,
            model_pairs=display.num_model_pairs,
            tokens=display.num_tokens,
            seconds=display.seconds,
            **display.rates(),
            measures=[{"name": one.name} | {name: one.mean(name) for name in one.values} for one in systems],
        )
    if mode != "bar":
        return
    say(f"{job.output}: {progress.num_rows:,} rows, {progress.num_pairs:,} pairs" + " (was complete)" * was_done)
    if progress.num_rejected:
        say(f"{job.rejects}: {progress.num_rejected:,} rejected records")
    if not was_done:
        say(f"{display.num_model_pairs:,} pairs scored by the model, {display.seconds:.1f} s, {display.rates_text}")
    if systems:
        from rich.console import Console

        from local_rerank.evaluation.report import measure_table

        Console().print(measure_table(systems))


def _state(file: Path) -> str:
    """Identify a file and its version by path, size and modification time."""
    try:
        found = file.stat()
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}", field=file.name) from error
    return f"{file.resolve()} ({found.st_size} bytes, changed at {found.st_mtime_ns} ns)"
