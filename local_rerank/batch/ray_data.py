"""Run a batch job on a Ray cluster: Ray Data maps the pieces of the input over a pool of engine actors.

Each actor holds one engine, on a GPU or on CPU threads. Ray restarts a lost actor and retries its piece. Parts that
exist are not computed again, so a job resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from local_rerank.batch import ray_cluster
from local_rerank.batch.job import other_setting
from local_rerank.batch.pieces import (
    SUFFIXES,
    PartFormat,
    Piece,
    PieceResult,
    find_pieces,
    first_row,
    open_filesystem,
    part_path,
    state_of,
)
from local_rerank.batch.rows import AddedColumns
from local_rerank.config import OF_CHUNKS, EngineConfig
from local_rerank.engine.cpu.process_setup import configure_process
from local_rerank.errors import ConfigError, EngineFailure
from local_rerank.evaluation.blending import Blend

JOB_FILE = "job.json"
_OURS = re.compile(r"job\.json|part-\d{5,}\.(jsonl|parquet|rejects\.jsonl)(\.new)?")
"""The files of an output folder; no others are deleted."""


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """The options of a job; `output` is a folder of parts."""

    input: str
    output: str
    suffix: str = ".jsonl"  # of the parts
    with_documents: bool = False
    blend: Blend | None = None
    min_score: float | None = None
    config: EngineConfig = dataclasses.field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.suffix not in SUFFIXES:
            names = " or ".join(f"NAME{suffix}" for suffix in SUFFIXES)
            what = f"output is {self.output}; with --ray it is a folder of parts, whose name says their form: {names}"
            raise ConfigError(what)

    def settings(self, num_pieces: int) -> dict[str, str]:
        """Return everything that determines the output."""
        values = {name: getattr(self, name) for name in ("suffix", "with_documents", "blend", "min_score")}
        values["input"] = re.sub(r"//[^/@]*@", "//", self.input)  # without credentials in the URI
        names = ("model", "revision", "dtype", "instruction", "scores")
        values |= {name: getattr(self.config, name) for name in names}
        values |= {name: getattr(self.config, name) for name in OF_CHUNKS if self.config.in_chunks}
        file = self.config.calibration
        is_here = file is not None and Path(file).exists()
        values["calibration"] = hashlib.sha256(Path(file or "").read_bytes()).hexdigest() if is_here else file
        values |= {"input_state": state_of(self.input), "num_pieces": num_pieces}
        return {name: str(value) for name, value in values.items()}


Begin = Callable[[int, int], None]
"""Called with the number of pieces already done and of all pieces."""


def run(job: RayJob, address: str | None, *, overwrite: bool, begin: Begin) -> Iterator[PieceResult]:
    """Score the remaining pieces of a job and yield the result of each; shuts Ray down at the end if it started it.

    Raises ConfigError if there is no cluster or the folder belongs to another job, InvalidRequest if the input cannot
    be read, and EngineFailure if an engine cannot be loaded or fails.
    """
    pieces = find_pieces(job.input)
    left = _left(job, pieces, overwrite)
    begin(len(pieces) - len(left), len(pieces))
    if left:
        yield from score_on_cluster(job, left, _part_format(job, pieces), address)


def _part_format(job: RayJob, pieces: list[Piece]) -> PartFormat:
    first = first_row(job.input, pieces)
    parts = PartFormat(
        suffix=job.suffix,
        added=AddedColumns(
            with_documents=job.with_documents,
            is_blended=job.blend is not None,
            in_chunks=job.config.in_chunks,
            is_calibrated=job.config.calibration is not None,
            counts_below=job.min_score is not None,
        ),
    )
    if first is None:
        return parts
    if first.is_pair and job.min_score is not None:
        raise ConfigError(f"min_score is {job.min_score:g}, but {job.input} has pairs, which have no ranking")
    return dataclasses.replace(parts, is_pairs=first.is_pair, columns=tuple(first.fields))


def _left(job: RayJob, pieces: list[Piece], overwrite: bool) -> list[Piece]:
    """Return the pieces without a part; raises ConfigError if the folder belongs to another job."""
    if "://" not in job.output and Path(job.output).is_symlink():
        raise ConfigError(f"output is {job.output}, which is a link; remove it or choose another name")
    filesystem, folder = open_filesystem(job.output)
    filesystem.create_dir(folder, recursive=True)
    settings, file = job.settings(len(pieces)), f"{folder}/{JOB_FILE}"
    found = filesystem.get_file_info(pafs.FileSelector(folder))
    if overwrite or file not in {each.path for each in found}:
        if others := [each.base_name for each in found if not _OURS.fullmatch(each.base_name) or not each.is_file]:
            what = f"output is {job.output}, which has files of others ({', '.join(sorted(others)[:3])})"
            raise ConfigError(f"{what}; remove them or choose another name")
        for each in found:
            filesystem.delete_file(each.path)
    if filesystem.get_file_info(file).type == pafs.FileType.File:
        with filesystem.open_input_stream(file) as stream:
            was = json.loads(stream.read())
        for name, value in settings.items():
            if (old := was.get(name, "None")) != value:
                raise ConfigError(other_setting(job.output, name, old, value))
    else:
        with filesystem.open_output_stream(file) as stream:
            stream.write(json.dumps(settings, indent=2).encode())
    there = {info.path for info in filesystem.get_file_info(pafs.FileSelector(folder))}
    return [piece for piece in pieces if part_path(folder, piece.number, job.suffix) not in there]


def score_on_cluster(job: RayJob, pieces: list[Piece], parts: PartFormat, address: str | None) -> Iterator[PieceResult]:
    ray_cluster.require_ray()
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # errors are raised here anyway
    import ray
    import ray.data

    _silence_console("ray.data")
    joined = ray.is_initialized()
    if not joined:
        ray_cluster.connect(address, log_to_driver=False)
    try:
        resources = ray_cluster.replica_resources(job.config, None)
        room = ray_cluster.room_for(resources)
        if not room:
            raise ConfigError(f"no node of the cluster has {resources.num_cpus} CPUs and {resources.num_gpus} GPUs")
        ray.data.DataContext.get_current().enable_progress_bars = False
        config = job.config if resources.num_gpus else dataclasses.replace(job.config, threads=resources.num_cpus)
        rows = ray.data.from_items([dataclasses.asdict(piece) for piece in pieces], override_num_blocks=len(pieces))
        scored = rows.map(
            _Actor,  # type: ignore[arg-type]  # Ray also takes a class with __call__
            fn_constructor_args=(dataclasses.replace(job, config=config), parts),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(room, len(pieces))),
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
        )
        for row in scored.iter_rows():
            yield PieceResult(**row)
    except ray.exceptions.RayError as error:
        raise EngineFailure(f"an engine on the cluster failed: {_reason(error)}") from error
    finally:
        if not joined:
            ray.shutdown()


def _silence_console(logger: str) -> None:
    """Keep Ray Data's steps and tracebacks off standard error; it also writes them to its log file."""
    for handler in logging.getLogger(logger).handlers:
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray."):
            handler.setLevel(logging.CRITICAL + 1)


def _reason(error: Exception) -> str:
    """Return the engine's message from the traceback that Ray sends."""
    said = re.findall(r"^[\w.]+(?:Error|Exception|Failure): (.+)", str(error), re.MULTILINE)
    return said[-1] if said else str(error)


class _Actor:
    """One engine in a worker process."""

    def __init__(self, job: RayJob, parts: PartFormat) -> None:
        configure_process()  # must run before torch is imported
        from local_rerank.batch.pieces import PieceScorer
        from local_rerank.reranker import Reranker

        reranker = Reranker(config=job.config)
        self._score = PieceScorer(reranker, job.input, job.output, parts, blend=job.blend, min_score=job.min_score)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return dataclasses.asdict(self._score(Piece(**row)))
