"""A job: rows of a source through a scorer into a sink, and on from where it was after a kill at any moment.

Rows go in blocks. A block is scored, its lines are brought to disk, and only then does `progress.json`, replaced as a
whole, count them; what a kill leaves behind the counted size is cut off before the job goes on. So each row is in the
output once. Scores of a block that was cut off are in the cache of scores, so that they need not be computed again.

Beside OUTPUT stands the folder OUTPUT.job with what is not finished; when the job is done only `progress.json` (and
the lock) stay there, and the same command says that there is nothing left to do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from local_rerank.batch.durable import AppendFile
from local_rerank.batch.durable import replace as replace_file
from local_rerank.batch.rows import Row, ScoredRow
from local_rerank.batch.sinks import Sink
from local_rerank.batch.sources import MAX_CONTENT_CHARS, Position, Rejected, Source
from local_rerank.errors import ConfigError, InvalidRequest

FORMAT_VERSION = 1
MAX_BLOCK_PAIRS = 1024
MAX_BLOCK_CHARS = 4 << 20  # of queries and documents


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """What is done for certain."""

    settings: dict[str, str]  # under which the job was begun; it cannot go on under others
    position: Position = field(default_factory=Position)
    output_mark: int = 0
    rejects_mark: int = 0
    num_rows: int = 0  # in the output
    num_pairs: int = 0  # of those rows
    num_rejected: int = 0
    seconds: float = 0.0  # of all runs of the job
    is_done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Neighbouring records, and the position behind them."""

    items: tuple[Row | Rejected, ...]
    behind: Position

    @property
    def rows(self) -> list[Row]:
        return [item for item in self.items if isinstance(item, Row)]

    @property
    def num_pairs(self) -> int:
        return sum(len(row.documents) for row in self.rows)


Score = Callable[[list[Row]], list[ScoredRow | InvalidRequest]]
Begin = Callable[[Block], None]
Report = Callable[[JobProgress, list[Rejected]], None]
"""Told of each step that is counted, and of the records it rejected."""


class JobFolder:
    """OUTPUT.job, held by one process at a time. Raises ConfigError where the job is another's or another one."""

    def __init__(self, output: Path, rejects: Path, settings: dict[str, str], *, overwrite: bool) -> None:
        self.path = output.with_name(output.name + ".job")
        self._file = self.path / "progress.json"
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"another process is writing {output}") from error
        try:
            self.progress = self._load(output, rejects, settings, overwrite)
        except ConfigError:
            self.close()
            raise

    def _load(self, output: Path, rejects: Path, settings: dict[str, str], overwrite: bool) -> JobProgress:
        found = None if overwrite else _read(self._file)
        if found is None:
            if not overwrite and (there := [file for file in (output, rejects) if file.exists()]):
                raise ConfigError(f"{there[0]} exists and no job can go on there; --overwrite begins anew")
            self.clear(keep_progress=False)
            return JobProgress(settings=settings)
        for name in sorted(settings.keys() | found.settings.keys()):
            if settings.get(name) != found.settings.get(name):
                was, now = found.settings.get(name, "not given"), settings.get(name, "not given")
                what = f"{output} was begun with {name} {was}, not {now}; finish it so, or --overwrite begins anew"
                raise ConfigError(what)
        if found.is_done and not output.exists():
            self.clear(keep_progress=False)
            return JobProgress(settings=settings)
        return found

    def save(self, progress: JobProgress) -> None:
        with replace_file(self._file) as stream:
            stream.write(json.dumps({"version": FORMAT_VERSION, **asdict(progress)}, indent=2).encode())

    def clear(self, *, keep_progress: bool) -> None:
        """Remove what is not finished."""
        for file in self.path.iterdir():
            if file.name != "lock" and not (keep_progress and file == self._file):
                file.unlink()

    def close(self) -> None:
        self._lock.release()  # its file stays: who removes it may take it from the next one


@contextmanager
def job_folder(output: Path, rejects: Path, settings: dict[str, str], *, overwrite: bool) -> Iterator[JobFolder]:
    folder = JobFolder(output, rejects, settings, overwrite=overwrite)
    try:
        yield folder
    finally:
        folder.close()


def run_job(
    folder: JobFolder, source: Source, score: Score, sink: Sink, rejects: Path, *, begin: Begin, report: Report
) -> JobProgress:
    """Do what is left of a job; `begin` is told of each block before it is scored. Returns the last progress."""
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
            rejects_file.append((json.dumps(asdict(each), ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        progress = replace(
            progress,
            position=block.behind,
            output_mark=sink.commit(),
            rejects_mark=rejects_file.commit(),
            num_rows=progress.num_rows + len(scored),
            num_pairs=progress.num_pairs + sum(len(row.results) for row in scored),
            num_rejected=progress.num_rejected + len(rejected),
            seconds=progress.seconds + time.monotonic() - started,
        )
        folder.save(progress)
        report(progress, rejected)
    sink.commit()  # a header, where no row came
    sink.finish()
    rejects_file.close()
    progress = replace(progress, is_done=True)
    folder.save(progress)
    folder.clear(keep_progress=True)
    return progress


def blocks(source: Source, position: Position) -> Iterator[Block]:
    """Records from a position on, in blocks of bounded size; one record that is larger is a block of its own."""
    items: list[Row | Rejected] = []
    num_pairs = num_chars = 0
    behind = position
    for item, item_behind in source.read(position):
        pairs, chars = _size(item)
        if items and (num_pairs + pairs > MAX_BLOCK_PAIRS or num_chars + chars > MAX_BLOCK_CHARS):
            yield Block(items=tuple(items), behind=behind)
            items, num_pairs, num_chars = [], 0, 0
        items.append(item)
        behind = item_behind
        num_pairs += pairs
        num_chars += chars
    if items:
        yield Block(items=tuple(items), behind=behind)


def score_block(block: Block, score: Score, sink: Sink, file: Path) -> tuple[list[ScoredRow], list[Rejected]]:
    """The rows that can be written and the records that cannot."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    for item in block.items:
        if isinstance(item, Rejected):
            rejected.append(item)
        elif (error := sink.objection(item)) is not None:
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
    """Pairs and characters of a record; a rejected one counts as a pair, so that blocks of them end, too."""
    if isinstance(item, Rejected):
        return 1, len(item.content)
    return len(item.documents), len(item.query) + sum(map(len, item.documents))


def _read(file: Path) -> JobProgress | None:
    try:
        value = json.loads(file.read_bytes())
        if value.pop("version") != FORMAT_VERSION:
            raise ValueError("it is of another version")
        return JobProgress(**value | {"position": Position(**value["position"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); --overwrite begins anew") from error
