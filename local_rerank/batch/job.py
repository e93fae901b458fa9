"""Run a job from a source through a scorer to a sink, and resume it after a kill at any moment.

The job scores one block of rows at a time, syncs its output to disk, and only then counts it in `progress.json`, which
is replaced atomically. Output beyond the counted size, left by a kill, is truncated before the job resumes, so each row
is written exactly once. The score cache keeps the scores of a truncated block.

The folder OUTPUT.job holds unfinished data. Once the job is done it holds only `progress.json` and the lock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from local_rerank.batch.durable import AppendFile
from local_rerank.batch.durable import replace as replace_file
from local_rerank.batch.rows import Row, ScoredRow, encode, json_line
from local_rerank.batch.sinks import Sink
from local_rerank.batch.sources import MAX_CONTENT_CHARS, Position, Rejected, Source
from local_rerank.errors import ConfigError, InvalidRequest

FORMAT_VERSION = 1
MAX_BLOCK_PAIRS = 1024
MAX_BLOCK_CHARS = 4 << 20  # of queries and documents


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """What is safely on disk."""

    settings: dict[str, str]  # the job was started with these and resumes only with the same ones
    position: Position = field(default_factory=Position)
    output_mark: int = 0
    rejects_mark: int = 0
    num_rows: int = 0  # in the output
    num_pairs: int = 0  # in those rows
    num_rejected: int = 0
    seconds: float = 0.0  # over all runs of the job
    is_done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive records and the position after them."""

    items: tuple[Row | Rejected, ...]
    end: Position

    @property
    def rows(self) -> list[Row]:
        return [item for item in self.items if isinstance(item, Row)]

    @property
    def num_pairs(self) -> int:
        return sum(len(row.documents) for row in self.rows)


Score = Callable[[list[Row]], list[ScoredRow | InvalidRequest]]
Begin = Callable[[Block], None]
Report = Callable[[JobProgress, list[Rejected]], None]
"""Called after each block is on disk, with the records it rejected."""


class JobFolder:
    """The folder OUTPUT.job, locked by one process. Raises ConfigError if it is in use or belongs to another job."""

    def __init__(self, output: Path, rejects: Path, settings: dict[str, str], *, overwrite: bool) -> None:
        self.path = output.with_name(output.name + ".job")
        self._file = self.path / "progress.json"
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"{output} is being written by another process") from error
        try:
            self.progress = self._load(output, rejects, settings, overwrite)
        except ConfigError:
            self.close()
            raise

    def _load(self, output: Path, rejects: Path, settings: dict[str, str], overwrite: bool) -> JobProgress:
        found = None if overwrite else _read(self._file)
        if found is None:
            if not overwrite and (there := [file for file in (output, rejects) if file.exists()]):
                raise ConfigError(f"{there[0]} exists and belongs to no unfinished job; --overwrite replaces it")
            return self._begin(settings)
        for name in sorted(settings.keys() | found.settings.keys()):
            if settings.get(name) != found.settings.get(name):
                was, now = found.settings.get(name, "unset"), settings.get(name, "unset")
                raise ConfigError(other_setting(output, name, was, now))
        return self._begin(settings) if found.is_done and not output.exists() else found

    def _begin(self, settings: dict[str, str]) -> JobProgress:
        """Save empty progress before creating the output, so that a kill leaves no output without a job."""
        self.clear(keep_progress=False)
        self.save(JobProgress(settings=settings))
        return JobProgress(settings=settings)

    def save(self, progress: JobProgress) -> None:
        with replace_file(self._file) as stream:
            stream.write(json.dumps({"version": FORMAT_VERSION, **asdict(progress)}, indent=2).encode())

    def clear(self, *, keep_progress: bool) -> None:
        """Remove unfinished data."""
        for file in self.path.iterdir():
            if file.name != "lock" and not (keep_progress and file == self._file):
                file.unlink()

    def close(self) -> None:
        self._lock.release()  # the file stays, because removing it could break the lock of the next process


def other_setting(output: object, name: str, was: object, now: object) -> str:
    """Say that a job cannot resume because a setting has changed."""
    return f"{output} was started with {name} {was}, not {now}; use the same value, or --overwrite to start again"


def run_job(
    folder: JobFolder, source: Source, score: Score, sink: Sink, rejects: Path, *, begin: Begin, report: Report
) -> JobProgress:
    """Do the rest of a job; calls `begin` before each block and `report` after it. Returns the final progress."""
    progress = folder.progress
    if progress.is_done:
        return progress
    rejects_file = AppendFile(rejects)
    sink.rewind(progress.output_mark)
    rejects_file.rewind(progress.rejects_mark)
    for block in blocks(source, progress.position):
        started = time.monotonic()
        begin(block)
        scored, rejected = score_block(block, score, sink, source.file)
        sink.write(scored)
        for each in rejected:
            rejects_file.append(encode(json_line(asdict(each))))
        progress = replace(
            progress,
            position=block.end,
            output_mark=sink.commit(),
            rejects_mark=rejects_file.commit(),
            num_rows=progress.num_rows + len(scored),
            num_pairs=progress.num_pairs + sum(len(row.results) for row in scored),
            num_rejected=progress.num_rejected + len(rejected),
            seconds=progress.seconds + time.monotonic() - started,
        )
        folder.save(progress)
        report(progress, rejected)
    sink.commit()  # writes the header even without rows
    sink.finish()
    rejects_file.close()
    progress = replace(progress, is_done=True)
    folder.save(progress)
    folder.clear(keep_progress=True)
    return progress


def blocks(source: Source, position: Position) -> Iterator[Block]:
    """Yield the records after a position in blocks of bounded size; a larger record is a block by itself."""
    items: list[Row | Rejected] = []
    num_pairs = num_chars = 0
    end = position
    for item, item_end in source.read(position):
        pairs, chars = _size(item)
        if items and (num_pairs + pairs > MAX_BLOCK_PAIRS or num_chars + chars > MAX_BLOCK_CHARS):
            yield Block(items=tuple(items), end=end)
            items, num_pairs, num_chars = [], 0, 0
        items.append(item)
        end = item_end
        num_pairs += pairs
        num_chars += chars
    if items:
        yield Block(items=tuple(items), end=end)


def score_block(block: Block, score: Score, sink: Sink, file: Path) -> tuple[list[ScoredRow], list[Rejected]]:
    """Score a block; returns the rows to write and the rejected records."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    for item in block.items:
        if isinstance(item, Rejected):
            rejected.append(item)
        elif (error := sink.refusal(item)) is not None:
            rejected.append(_reject(item, error, file))
        else:
            rows.append(item)
    scored: list[ScoredRow] = []
    for row, outcome in zip(rows, score(rows), strict=True):
        if isinstance(outcome, InvalidRequest):
            rejected.append(_reject(row, str(outcome), file))
        else:
            scored.append(outcome)
    return scored, rejected


def _reject(row: Row, error: str, file: Path) -> Rejected:
    content = json.dumps(row.fields, ensure_ascii=False, default=str)[:MAX_CONTENT_CHARS]
    return Rejected(file=str(file), number=row.number, error=error, content=content)


def _size(item: Row | Rejected) -> tuple[int, int]:
    """Return the pairs and characters of a record; a rejected one counts as a pair, to bound blocks of them too."""
    if isinstance(item, Rejected):
        return 1, len(item.content)
    return len(item.documents), len(item.query) + sum(map(len, item.documents))


def _read(file: Path) -> JobProgress | None:
    try:
        value = json.loads(file.read_bytes())
        if value.pop("version") != FORMAT_VERSION:
            raise ValueError("it has another version")
        return JobProgress(**value | {"position": Position(**value["position"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); --overwrite starts again") from error
