"""A batch job on a Ray cluster: the pieces of the input through an actor pool of engines, by Ray Data.

An actor holds one engine: a GPU of its own where there are any, else CPU threads. Ray starts a lost actor again and
gives its piece to another one; a part that is there is not computed again, so a job that was ended goes on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from local_rerank import ray_cluster
from local_rerank.batch.pieces import SUFFIXES, Done, Piece, find_pieces, open_filesystem, part_path
from local_rerank.blending import Blend
from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError
from local_rerank.openmp import wait_briefly

JOB_FILE = "job.json"


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """What the command line asks for; `output` is a folder of parts."""

    input: str
    output: str
    suffix: str = ".jsonl"  # of the parts
    with_documents: bool = False
    blend: Blend | None = None
    config: EngineConfig = dataclasses.field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.suffix not in SUFFIXES:
            raise ConfigError(f"output ends in {self.suffix}; on Ray it must end in {' or '.join(SUFFIXES)}")
        if self.suffix == ".parquet" and self.blend is not None:
            raise ConfigError("blended scores are written as .jsonl on Ray")

    def settings(self, num_pieces: int) -> dict[str, str]:
        """All that decides what is written."""
        values = {name: getattr(self, name) for name in ("input", "suffix", "with_documents", "blend")}
        values |= {name: getattr(self.config, name) for name in ("model", "revision", "dtype", "instruction")}
        return {name: str(value) for name, value in (values | {"num_pieces": num_pieces}).items()}


def run(job: RayJob, address: str | None, *, overwrite: bool) -> Iterator[Done]:
    """Score what is left of a job; yields what came of each piece as it is done. Ray is left when all are.

    Raises ConfigError where there is no cluster or the folder is another job's, InvalidRequest for an input that
    cannot be read.
    """
    pieces = find_pieces(job.input)
    if job.suffix == ".parquet" and not all(piece.path.endswith(".parquet") for piece in pieces):
        raise ConfigError("a Parquet output on Ray needs a Parquet input, whose columns it keeps")
    left = _left(job, pieces, overwrite)
    if left:
        yield from _run(job, left, address)


def _left(job: RayJob, pieces: list[Piece], overwrite: bool) -> list[Piece]:
    """The pieces whose parts are not there, in a folder that is this job's."""
    filesystem, folder = open_filesystem(job.output)
    filesystem.create_dir(folder, recursive=True)
    settings, file = job.settings(len(pieces)), f"{folder}/{JOB_FILE}"
    if overwrite:
        filesystem.delete_dir_contents(folder)
    if filesystem.get_file_info(file).type == pafs.FileType.File:
        with filesystem.open_input_stream(file) as stream:
            found = json.loads(stream.read())
        for name, value in settings.items():
            if found.get(name) != value:
                raise ConfigError(f"{job.output} was begun with {name} {found.get(name)}, not {value}; "
                                  "finish it so, or --overwrite begins anew")  # fmt: skip
    else:
        with filesystem.open_output_stream(file) as stream:
            stream.write(json.dumps(settings, indent=2).encode())
    there = {info.path for info in filesystem.get_file_info(pafs.FileSelector(folder))}
    return [piece for piece in pieces if part_path(folder, piece.number, job.suffix) not in there]


def _run(job: RayJob, pieces: list[Piece], address: str | None) -> Iterator[Done]:
    ray_cluster.require_ray()
    import ray
    import ray.data

    joined = ray.is_initialized()
    if not joined:
        ray_cluster.connect(address)
    try:
        resources = ray_cluster.replica_resources(job.config, None)
        room = ray_cluster.room_for(resources)
        if not room:
            raise ConfigError(f"no node of the cluster has {resources.num_cpus} CPUs and {resources.num_gpus} GPUs")
        ray.data.DataContext.get_current().enable_progress_bars = False
        config = job.config if resources.num_gpus else dataclasses.replace(job.config, threads=resources.num_cpus)
        rows = ray.data.from_items([dataclasses.asdict(piece) for piece in pieces], override_num_blocks=len(pieces))
        scored = rows.map(
            _Actor,  # type: ignore[arg-type]  # Ray takes a class whose instances are called, too
            fn_constructor_args=(dataclasses.replace(job, config=config),),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(room, len(pieces))),
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
        )
        for row in scored.iter_rows():
            yield Done(**row)
    finally:
        if not joined:
            ray.shutdown()


class _Actor:
    """One engine in a process of its own."""

    def __init__(self, job: RayJob) -> None:
        wait_briefly()  # before torch is loaded, which is next
        from local_rerank.batch.pieces import PieceScorer
        from local_rerank.batch.scoring import BlockScorer
        from local_rerank.reranker import Reranker

        scorer = BlockScorer(Reranker(config=job.config), blend=job.blend)
        self._score = PieceScorer(scorer, job.input, job.output, job.suffix, with_documents=job.with_documents)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return dataclasses.asdict(self._score(Piece(**row)))


def absolute(config: EngineConfig) -> EngineConfig:
    """A model's folder by its whole path: an engine elsewhere has another working folder."""
    if config.model is None or not Path(config.model).exists():
        return config
    return dataclasses.replace(config, model=str(Path(config.model).resolve()))
