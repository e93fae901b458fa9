"""The options of `local-rerank batch`, and everything that is judged before the model is loaded."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from local_rerank.batch.formats import (
    OUTPUT_SUFFIXES,
    STANDARD_INPUT,
    judge_output,
    open_source,
    open_standard_input,
)
from local_rerank.batch.rows import Row
from local_rerank.batch.sources import Position, first_row
from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.evaluation.blending import Blend
from local_rerank.text_files import check_writable, suffix_of

if TYPE_CHECKING:
    from local_rerank.batch.job import JobFolder
    from local_rerank.batch.sources import Source
    from local_rerank.batch.trec_source import TextStore

STREAM = "-"  # as input or output: standard input or output
StreamFormat = Literal["jsonl", "csv", "tsv", "run"]
RUN_SUFFIXES = (".run", ".trec", ".txt")
Judgements = dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """The options of a job in this process."""

    input: Path  # STANDARD_INPUT for -
    output: Path  # for - a name with the suffix of the chosen form, later in the job's temporary folder
    is_stream: bool  # whether the output is standard output
    input_copy: Path | None = None  # of standard input
    queries: Path | None
    corpus: Path | None
    dataset: str | None
    qrels: Path | None
    top_k: int | None
    blend: Blend | None
    min_score: float | None
    cache: Path | None
    return_documents: bool
    spreadsheet_safe: bool
    engine: EngineConfig

    @property
    def rejects(self) -> Path:
        return Path(f"{self.output}.rejects.jsonl")

    @property
    def shown_output(self) -> Path:
        return Path(self.output.name) if self.is_stream else self.output

    @property
    def is_run(self) -> bool:
        """Whether the input is a run; one in .tsv, as MS MARCO has them, or .csv is told by the texts beside it."""
        suffix = suffix_of(self.input)
        return suffix in RUN_SUFFIXES or (suffix in (".tsv", ".csv", "") and (self.queries or self.dataset) is not None)

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise InvalidRequest(
                f"top_k is {self.top_k}; it must be at least 1", field="top_k", limit=1, value=self.top_k
            )
        if self.min_score is not None and self.qrels is not None:
            raise ConfigError(
                "qrels measures whole rankings, but min_score leaves documents out; leave out one of them"
            )
        if self.input == STANDARD_INPUT:
            self._check_standard_input()
        else:
            self._check_files("input")
        if self.input.resolve() in (self.output.resolve(), self.rejects.resolve()):
            raise ConfigError(f"output is {self.output}, which is the input; choose another name")
        if self.output.suffix.lower() not in OUTPUT_SUFFIXES:
            raise ConfigError(f"output is {self.output}; it must end in one of {', '.join(OUTPUT_SUFFIXES)}")
        if self.spreadsheet_safe and self.output.suffix.lower() not in (".csv", ".tsv"):
            raise ConfigError(f"spreadsheet_safe needs .csv or .tsv as output, but output is {self.output}")
        if not self.is_stream:
            check_writable(self.output, "output")
        elif self.qrels is not None:
            raise ConfigError("qrels measures a file, but output is -; give the output a name")
        if self.is_run:
            if (self.dataset is None) == (self.queries is None or self.corpus is None):
                raise ConfigError(
                    f"input is {self.input}, a run, which needs either --queries and --corpus or --dataset"
                )
        elif given := [name for name in ("queries", "corpus", "dataset", "top_k") if getattr(self, name) is not None]:
            raise ConfigError(f"{given[0]} needs a run (.run) as input, but input is {self.input}")
        if self.qrels is not None and self.output.suffix.lower() != ".run":
            raise ConfigError(f"qrels needs a run as output, but output is {self.output}; it must end in .run")
        self._check_files("queries", "corpus", "qrels")

    def _check_standard_input(self) -> None:
        if given := [name for name in ("queries", "corpus", "dataset", "top_k") if getattr(self, name) is not None]:
            raise ConfigError(f"{given[0]} needs a run, and a run needs a file as input, but input is -")
        if self.input_copy is None and sys.stdin.isatty():
            raise InvalidRequest("input is -, but nothing is piped into standard input", field="input")

    def _check_files(self, *names: str) -> None:
        for name in names:
            if (file := getattr(self, name)) is not None and not file.is_file():
                what = "it must be a file, because a job reads it twice" if file.exists() else "there is no such file"
                raise InvalidRequest(f"{name} is {file}; {what}", field=name)

    @property
    def settings(self) -> dict[str, str]:
        """What determines the output and is known before the model is loaded; a resumed job must have the same."""
        from local_rerank.batch.score_cache import score_settings

        files = {name: getattr(self, name) for name in ("input", "queries", "corpus")}
        values = {name: _state(file) for name, file in files.items() if file not in (None, STANDARD_INPUT)}
        if self.input_copy is not None:
            values["input"] = _content(self.input_copy)
        optional = {
            "dataset": self.dataset,
            "top_k": self.top_k,
            "blend": self.blend,
            "min_score": self.min_score,
            "calibration": None if self.engine.calibration is None else _state(Path(self.engine.calibration)),
            "scores": None if self.engine.scores == "model" else self.engine.scores,
            "return_documents": str(self.return_documents).lower(),
            "spreadsheet_safe": "true" if self.spreadsheet_safe else None,
            "instruction": self.engine.instruction,
            **score_settings(self.engine),
        }
        if self.engine.dtype == "auto":
            del optional["dtype"]  # which is known when the model is loaded
        return values | {name: str(value) for name, value in optional.items() if value is not None}


def judgements_of(job: BatchOptions) -> Judgements | None:
    """Read the judgements to measure with, if any; raises InvalidRequest or ConfigError."""
    if job.qrels is None:
        return None
    from local_rerank.evaluation.measures import load_ir_measures
    from local_rerank.evaluation.trec_files import read_qrels

    load_ir_measures()
    return read_qrels(job.qrels)


def source_of(job: BatchOptions, folder: JobFolder, judgements: Judgements | None) -> Source:
    """Open the input, and judge it against the output, `--blend` and the judgements."""
    source = _open(job, folder)
    judge_output(job.shown_output, source)
    if not job.is_run and (first := first_row(source.read(Position()), job.input)) is not None:
        _judge_first(job, first)
        if job.output.suffix.lower() == ".run" and all(row.id is None for row in _rows(source)):
            raise ConfigError(
                f"output is {job.shown_output}, a run, which needs an id; no record of {job.input} has one"
            )
    if judgements is not None and not any(row.id in judgements for row in _rows(source)):
        raise InvalidRequest(f"none of the queries of {job.input} has a judgement in {job.qrels}", field="qrels")
    return source


def _rows(source: Source) -> Iterator[Row]:
    return (item for item, _ in source.read(Position()) if isinstance(item, Row))


def _judge_first(job: BatchOptions, row: Row) -> None:
    """Judge what the first record says about all of them."""
    for name in ("blend", "min_score"):
        if (value := getattr(job, name)) is not None and row.is_pair:
            raise ConfigError(f"{name} is {value}, but {job.input} has pairs, which have no ranking")
    if job.blend is not None and job.blend.source == "run" and row.first_stage_scores is None:
        raise ConfigError(f"blend is {job.blend}, but the documents of {job.input} have no `score`")


def _open(job: BatchOptions, folder: JobFolder) -> Source:
    if job.input_copy is not None:
        return open_standard_input(job.input_copy)
    if not job.is_run:
        return open_source(job.input, folder.path)
    from local_rerank.batch.trec_source import DatasetTexts, FileTexts, RunSource

    if job.dataset is not None:
        texts: TextStore = DatasetTexts(job.dataset)
    else:
        assert job.queries is not None
        assert job.corpus is not None
        texts = FileTexts(job.queries, job.corpus, folder.path)
    return RunSource(job.input, texts, folder.path, job.top_k)


def _state(file: Path) -> str:
    """Identify a file and its version by path, size and modification time."""
    try:
        found = file.stat()
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}", field=file.name) from error
    return f"{file.resolve()} ({found.st_size} bytes, changed at {found.st_mtime_ns} ns)"


def _content(copy: Path) -> str:
    """Identify what was read from standard input."""
    with copy.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return f"{STANDARD_INPUT} ({copy.stat().st_size} bytes, SHA-256 {digest})"
