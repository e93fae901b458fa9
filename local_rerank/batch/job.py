"""Run a job from a source through a scorer to a sink, and resume it after a kill at any moment.

The job scores one block of rows at a time and writes them in order as they come. Every few seconds it syncs the output
to disk, and only then counts it in `progress.json`, which is replaced atomically. Output beyond the counted size, left
by a kill, is truncated before the job resumes, so each row is written exactly once. The score cache keeps the scores of
what is truncated.

The folder OUTPUT.job holds unfinished data. Once the job is done it holds only `progress.json` and the lock; a job that
did not start leaves no folder.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from local_rerank.batch.durable import AppendFile
from local_rerank.batch.durable import replace as replace_file
from local_rerank.batch.rows import Row, ScoredRow, encode, json_line
from local_rerank.batch.sinks import Sink
from local_rerank.batch.sources import MAX_CONTENT_CHARS, Item, Position, Rejected, Source
from local_rerank.errors import ConfigError, InvalidRequest

FORMAT_VERSION = 2
FROM_INPUT = "input."  # how names of files begin that are made from the input alone: its index, plain copies
_OURS = re.compile(
    r"lock|progress\.json(\.new)?|scores\.sqlite(-wal|-shm|-journal)?|part-\d{8}\.parquet(\.new)?"
    r"|output\.new|input\.(plain|corpus|candidates\.sqlite)(\.new)?(-wal|-shm|-journal)?"
)
"""The files of a job's folder; no others are deleted."""
WRITE_SECONDS = 5.0  # between two commits, each of which syncs two or three files
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
    """Consecutive records, each with the position after it."""

    items: tuple[Item, ...]

    @property
    def num_pairs(self) -> int:
        return sum(len(item.documents) for item, _ in self.items if isinstance(item, Row))


Score = Callable[[list[Row]], Iterable[ScoredRow | InvalidRequest]]
Report = Callable[[ScoredRow | Rejected, Position], None]
"""Called for each record, in order, with the position after it, before it is on disk."""


class JobFolder:
    """The folder OUTPUT.job, locked by one process. Raises ConfigError if it is in use or belongs to another job.

    `settings` are those that are known before the model is loaded; `start` takes all of them.
    """

    def __init__(self, output: Path, rejects: Path, settings: dict[str, str], *, overwrite: bool) -> None:
        self.path = output.with_name(output.name + ".job")
        self.begins = ""  # whether the job goes on or starts anew, unless it is the first of its name
        self._output = output
        self._file = self.path / "progress.json"
        self._refuse_others()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / "lock")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"{output} is being written by another process") from error
        except OSError as error:
            raise ConfigError(f"output is {output}, but {self.path} cannot be written: {error.strerror}") from error
        try:
            self.progress = self._find(rejects, settings, overwrite)
        except ConfigError:
            self.close()
            raise

    def _refuse_others(self) -> None:
        """Raise ConfigError if the folder is a link or has files of others, because a job deletes what is in it."""
        what = ""
        if self.path.is_symlink():
            what = f"{self.path} is a link"
        elif self.path.is_dir():
            found = sorted(self.path.iterdir())
            others = [file.name for file in found if not _OURS.fullmatch(file.name) or not _is_plain(file)]
            what = f"{self.path} has files of others ({', '.join(others[:3])})" if others else ""
        elif self.path.exists():
            what = f"{self.path} is a file"
        if what:
            raise ConfigError(f"output is {self._output}, but {what}; remove it or choose another name")

    def _find(self, rejects: Path, settings: dict[str, str], overwrite: bool) -> JobProgress | None:
        """Return the progress of the job to resume, or None to start anew."""
        found = None if overwrite else _read(self._file)
        if found is not None:
            self._refuse_changes(found, settings, settings)
            is_gone = found.is_done and not self._output.exists()
            if not is_gone:
                has_begun = found.position.offset > 0
                why = "goes on after " + _num_records(found) if has_begun else "starts anew: the last run wrote nothing"
                self.begins = "" if found.is_done else why
                return found
            self.begins = "starts anew: the output of the finished job is gone"
        elif overwrite:
            self.begins = "starts anew (--overwrite)" if self._output.exists() or self._file.exists() else ""
        elif there := [file for file in (self._output, rejects) if os.path.lexists(file)]:
            raise ConfigError(f"{there[0]} exists and belongs to no unfinished job; --overwrite replaces it")
        for file in self.path.glob(f"{FROM_INPUT}*"):
            file.unlink()
        return None

    def _refuse_changes(self, found: JobProgress, settings: dict[str, str], names: Iterable[str]) -> None:
        for name in names:
            was, now = found.settings.get(name, "unset"), settings.get(name, "unset")
            if was != now:
                raise ConfigError(other_setting(self._output, name, was, now))

    def start(self, settings: dict[str, str]) -> JobProgress:
        """Resume or start the job with all settings; raises ConfigError if others were used before."""
        if self.progress is not None:
            self._refuse_changes(self.progress, settings, dict.fromkeys([*settings, *self.progress.settings]))
            return self.progress
        # empty progress is saved before the output is created, so that a kill leaves no output without a job
        self.clear(keep=FROM_INPUT)
        self.progress = JobProgress(settings=settings)
        self.save(self.progress)
        return self.progress

    @property
    def next_time(self) -> str:
        """What the same command will do after an error."""
        if self.progress is None or not self.progress.position.offset:
            return "nothing was written; the same command starts anew"
        return f"the same command goes on after {_num_records(self.progress)}"

    def save(self, progress: JobProgress) -> None:
        with replace_file(self._file) as stream:
            stream.write(json.dumps({"version": FORMAT_VERSION, **asdict(progress)}, indent=2).encode())
        self.progress = progress

    def clear(self, *, keep: str) -> None:
        """Remove unfinished data, except files whose names begin with `keep`."""
        for file in self.path.iterdir():
            if file.name != "lock" and not file.name.startswith(keep):
                file.unlink()

    def close(self) -> None:
        """Release the lock, and remove the folder if no job was started in it."""
        if not self._file.exists():
            for file in self.path.glob(f"{FROM_INPUT}*"):
                file.unlink()
            if [file.name for file in self.path.iterdir()] == ["lock"]:
                with suppress(OSError):  # another process may have just opened it
                    (self.path / "lock").unlink()
                    self.path.rmdir()
        self._lock.release()  # elsewhere the file stays, because removing it could break the lock of the next process


def _is_plain(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def _num_records(progress: JobProgress) -> str:
    return f"{progress.num_rows + progress.num_rejected:,} records"


def other_setting(output: object, name: str, was: object, now: object) -> str:
    """Say that a job cannot resume because a setting has changed."""
    return f"{output} was started with {name} {was}, not {now}; use the same value, or --overwrite to start again"


def run_job(folder: JobFolder, source: Source, score: Score, sink: Sink, rejects: Path, *, report: Report) -> None:
    """Do the rest of a job, whose progress `folder` has then; calls `report` for each record."""
    progress = folder.progress
    assert progress is not None
    if progress.is_done:
        folder.clear(keep="progress.json")
        return
    with closing(sink), closing(AppendFile(rejects)) as rejects_file:
        sink.rewind(progress.output_mark)
        rejects_file.rewind(progress.rejects_mark)
        for block in blocks(source, progress.position):
            progress = _do_block(
                folder, progress, block, score_block(block, score, sink, source.file), sink, rejects_file, report
            )
        sink.commit()  # writes the header even without rows
        sink.finish()
    folder.save(replace(progress, is_done=True))
    folder.clear(keep="progress.json")


def _do_block(
    folder: JobFolder,
    progress: JobProgress,
    block: Block,
    outcomes: Iterable[tuple[ScoredRow | Rejected, Position]],
    sink: Sink,
    rejects_file: AppendFile,
    report: Report,
) -> JobProgress:
    """Write the outcomes of a block as they come, with a commit every few seconds and at its end."""
    started = time.monotonic()
    scored: list[ScoredRow] = []
    num_rejected = 0
    for outcome, end in outcomes:
        if isinstance(outcome, Rejected):
            rejects_file.append(encode(json_line(asdict(outcome))))
            num_rejected += 1
        else:
            scored.append(outcome)
        report(outcome, end)
        if end != block.items[-1][1] and time.monotonic() - started < WRITE_SECONDS:
            continue
        sink.write(scored)
        progress = replace(
            progress,
            position=end,
            output_mark=sink.commit(),
            rejects_mark=rejects_file.commit(),
            num_rows=progress.num_rows + len(scored),
            num_pairs=progress.num_pairs + sum(len(each.row.documents) for each in scored),
            num_rejected=progress.num_rejected + num_rejected,
            seconds=progress.seconds + time.monotonic() - started,
        )
        folder.save(progress)
        scored, num_rejected, started = [], 0, time.monotonic()
    return progress


def blocks(source: Source, position: Position) -> Iterator[Block]:
    """Yield the records after a position in blocks of bounded size; a larger record is a block by itself."""
    items: list[Item] = []
    num_pairs = num_chars = 0
    for item, end in source.read(position):
        pairs, chars = _size(item)
        if items and (num_pairs + pairs > MAX_BLOCK_PAIRS or num_chars + chars > MAX_BLOCK_CHARS):
            yield Block(items=tuple(items))
            items, num_pairs, num_chars = [], 0, 0
        items.append((item, end))
        num_pairs += pairs
        num_chars += chars
    if items:
        yield Block(items=tuple(items))


def score_block(block: Block, score: Score, sink: Sink, file: Path) -> Iterator[tuple[ScoredRow | Rejected, Position]]:
    """Yield the outcome of each record of a block, in order, with the position after it."""
    refusals = [sink.refusal(item) if isinstance(item, Row) else None for item, _ in block.items]
    rows = [item for (item, _), error in zip(block.items, refusals, strict=True) if isinstance(item, Row) and not error]
    outcomes = iter(score(rows))
    for (item, end), error in zip(block.items, refusals, strict=True):
        if isinstance(item, Rejected):
            yield item, end
        elif error is not None:
            yield _reject(item, error, file), end
        else:
            outcome = next(outcomes)
            yield _reject(item, str(outcome), file) if isinstance(outcome, InvalidRequest) else outcome, end


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
