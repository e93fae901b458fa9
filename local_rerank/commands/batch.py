"""The command `local-rerank batch`: a file of queries and documents in, a file with scores out."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from local_rerank.batch.sinks import SUFFIXES
from local_rerank.commands.console import option, say, status
from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.blending import Blend, parse_blend

if TYPE_CHECKING:
    from local_rerank.batch.display import Display, Mode
    from local_rerank.batch.job import JobFolder, JobProgress
    from local_rerank.batch.sources import Source
    from local_rerank.batch.trec_source import Texts
    from local_rerank.evaluation.measures import System
    from local_rerank.reranker import Reranker

RUN_SUFFIXES = (".run", ".trec", ".txt")
FIRST_STAGE = "first stage"
MEASURED_DEPTH = 100  # R@100, where no --top-k bounds what reranking can reach


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the command line asks for."""

    input: Path
    output: Path
    rejects: Path
    queries: Path | None
    corpus: Path | None
    dataset: str | None
    qrels: Path | None
    top_k: int | None
    blend: Blend | None
    cache: Path | None
    return_documents: bool

    @property
    def is_run(self) -> bool:
        return self.input.suffix.lower() in RUN_SUFFIXES

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise InvalidRequest(
                f"top_k is {self.top_k}; it must be at least 1", field="top_k", limit=1, value=self.top_k
            )
        if not self.input.is_file():
            raise InvalidRequest(f"{self.input} is no file here", field="input")
        if self.input.resolve() in (self.output.resolve(), self.rejects.resolve()):
            raise ConfigError(f"{self.input} is both input and output")
        if self.output.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"output is {self.output}; it must end in one of {', '.join(SUFFIXES)}")
        if not self.output.parent.is_dir():
            raise ConfigError(f"output is {self.output}, but there is no folder {self.output.parent}")
        if self.is_run:
            if (self.dataset is None) == (self.queries is None or self.corpus is None):
                raise ConfigError(f"{self.input} is a run: its texts need --queries and --corpus, or --dataset")
        elif given := [name for name in ("queries", "corpus", "dataset", "top_k") if getattr(self, name) is not None]:
            raise ConfigError(f"{given[0]} is for a run (.run), but the input is {self.input}")
        if self.qrels is not None and self.output.suffix.lower() != ".run":
            raise ConfigError(f"qrels measure a run, but the output is {self.output}; it must end in .run")

    def settings(self, reranker: Reranker) -> dict[str, str]:
        """All that decides what is written, as a job that goes on must find it again."""
        from local_rerank.batch.score_cache import score_identity

        values = {
            "input": _state(self.input),
            "model": f"{reranker.model_id} ({score_identity(reranker)[:16]})",
            "instruction": reranker.config.instruction,
            "return_documents": str(self.return_documents).lower(),
            "rejects": str(self.rejects),
        }
        values |= {name: _state(file) for name in ("queries", "corpus") if (file := getattr(self, name)) is not None}
        optional = {"dataset": self.dataset, "top_k": self.top_k, "blend": self.blend}
        return values | {name: str(value) for name, value in optional.items() if value is not None}


def batch(
    input: Annotated[
        str,
        option(
            help="File to score: .jsonl or .parquet (query with documents, or with one document), .csv or .tsv (a "
            "pair on each line), or a TREC run (.run, .trec, .txt), with --queries and --corpus or --dataset."
        ),
    ],
    *,
    output: Annotated[str, option(help="File to write: .jsonl, .csv, .tsv, .parquet or .run.")],
    queries: Annotated[
        Path | None, option(help="Queries of a run: .jsonl (id or _id, text) or .tsv (id, text).")
    ] = None,
    corpus: Annotated[Path | None, option(help="Documents of a run: likewise.")] = None,
    dataset: Annotated[
        str | None, option(help="Take queries and documents of a run from this collection of ir_datasets.")
    ] = None,
    qrels: Annotated[
        Path | None, option(help="Measure the output, a run, against these TREC judgements when it is complete.")
    ] = None,
    top_k: Annotated[
        int | None, option(help="Candidates of each query of a run to score; those below keep their order.")
    ] = None,
    blend: Annotated[
        str | None,
        option(
            help="Order by log-odds plus W times other scores, as z-scores: run=W (the run's, or `score` of each "
            "document) or bm25=W (over the query's documents). Off by default."
        ),
    ] = None,
    cache: Annotated[
        Path | None, option(help="Keep scores in this SQLite file, and take from it those that it has.")
    ] = None,
    rejects: Annotated[
        Path | None, option(help="File for records that cannot be ranked; default: OUTPUT.rejects.jsonl.")
    ] = None,
    return_documents: Annotated[bool, option(help="Write the documents' texts with the results, too.")] = False,
    overwrite: Annotated[bool, option(help="Begin anew, whatever is there.")] = False,
    ray: Annotated[
        bool | str,
        option(
            help="Score on a Ray cluster: the one at this address or RAY_ADDRESS, else one that is started here. Input "
            "and output are .jsonl or .parquet, on any filesystem that pyarrow knows (s3://...), the output a folder "
            "of parts."
        ),
    ] = False,
    quiet: Annotated[bool, option(help="Say nothing unless something goes wrong.")] = False,
    json_output: Annotated[
        bool, option(name="--json", help="Print progress, rejected records and the summary as lines of JSON.")
    ] = False,
    engine: EngineConfig | None = None,
) -> None:
    """Score a file. Killed and started again with the same command line it goes on where it was."""  # fmt: skip
    mode: Mode = "quiet" if quiet else "json" if json_output else "bar"
    if ray:
        return _run_on_ray(
            input, output, ray if isinstance(ray, str) else None, engine or EngineConfig(), blend,
            return_documents=return_documents, overwrite=overwrite, mode=mode,
            others={"queries": queries, "corpus": corpus, "dataset": dataset, "qrels": qrels, "top_k": top_k,
                    "cache": cache, "rejects": rejects},
        )  # fmt: skip
    job = Job(
        input=Path(input),
        output=Path(output),
        rejects=rejects or Path(f"{Path(output)}.rejects.jsonl"),
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
        load_ir_measures()  # before the work, not after it
    with status("loading the model") if mode == "bar" else nullcontext():
        reranker = Reranker(config=engine)
    with reranker, _stopped():
        _run(job, reranker, mode, overwrite)


@contextmanager
def _stopped() -> Iterator[None]:
    """A full disk, above all, is one line."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"the job stopped: {error}; the same command goes on from there") from error


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
        raise ConfigError(f"{given[0]} is not taken together with ray")
    from local_rerank.batch.ray_cluster import require_ray

    require_ray()
    from local_rerank.batch.display import Display
    from local_rerank.batch.pieces import suffix_of
    from local_rerank.batch.ray_data import RayJob, absolute, run

    job = RayJob(
        input=input,
        output=output,
        suffix=suffix_of(output),
        with_documents=return_documents,
        blend=None if blend is None else parse_blend(blend),
        config=absolute(config),
    )
    num_rows = 0
    with Display(mode, Path(input).name, 0) as display, _stopped():
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


def _run(job: Job, reranker: Reranker, mode: Mode, overwrite: bool) -> None:
    from local_rerank.batch.display import Display
    from local_rerank.batch.job import job_folder, run_job
    from local_rerank.batch.score_cache import ScoreCache, score_identity
    from local_rerank.batch.scoring import BlockScorer
    from local_rerank.batch.sinks import open_sink

    with job_folder(job.output, job.rejects, job.settings(reranker), overwrite=overwrite) as folder:
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


def _source(job: Job, folder: JobFolder) -> Source:
    from local_rerank.batch.sources import open_source

    if not job.is_run:
        return open_source(job.input)
    from local_rerank.batch.trec_source import DatasetTexts, FileTexts, RunSource

    if job.dataset is not None:
        texts: Texts = DatasetTexts(job.dataset)
    else:
        assert job.queries is not None
        assert job.corpus is not None
        texts = FileTexts(job.queries, job.corpus)
    return RunSource(job.input, texts, folder.path, job.top_k)


def _measured(job: Job, qrels: Path, name: str) -> list[System]:
    """The input, where it is a run, and the output, over the judged queries that the output has."""
    from local_rerank.evaluation.collection import read_orders, read_qrels
    from local_rerank.evaluation.measures import System, measure, measures

    judgements = read_qrels(qrels)
    runs = {FIRST_STAGE: job.input} if job.is_run else {}
    runs |= {name if job.blend is None else f"{name}, {job.blend}": job.output}
    orders = {system: read_orders(file, judgements) for system, file in runs.items()}
    *_, ours = orders.values()
    if not (judged := {query_id: judgements[query_id] for query_id in ours if query_id in judgements}):
        raise InvalidRequest(f"none of the queries of {job.output} is judged in {qrels}", field="qrels")
    names = measures(job.top_k or MEASURED_DEPTH)
    return [System(name=system, values=measure(judged, order, names)) for system, order in orders.items()]


def _summarize(
    job: Job, display: Display, progress: JobProgress, systems: list[System], mode: Mode, was_done: bool
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
        say(f"{job.rejects}: {progress.num_rejected:,} records that could not be ranked")
    if not was_done:
        say(f"{display.num_model_pairs:,} pairs scored by the model, {display.seconds:.1f} s, {display.rates_text}")
    if systems:
        from rich.console import Console

        from local_rerank.evaluation.report import measure_table

        Console().print(measure_table(systems))


def _state(file: Path) -> str:
    """A file and what tells whether it was changed."""
    try:
        found = file.stat()
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}", field=file.name) from error
    return f"{file.resolve()} ({found.st_size} bytes, changed at {found.st_mtime_ns} ns)"
