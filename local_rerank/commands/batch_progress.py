"""Show the progress of a batch job as a bar with rates and time left, as JSON lines, or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from local_rerank.batch.job import Block, JobProgress
from local_rerank.batch.sources import Rejected
from local_rerank.commands.console import Console, print_json

Mode = Literal["bar", "json", "quiet"]

JSON_SECONDS = 5.0  # between two progress lines
MAX_REJECTED_LINES = 10  # shown on the terminal; the file of rejects has all


class Display:
    """Counts and shows what this run of a job does. `size` is the offset after the last record of the input."""

    def __init__(self, mode: Mode, name: str, size: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._mode = mode
        self._size = size
        self._clock = clock
        self._started = self._last_line = clock()
        self._block: tuple[float, float, int] | None = None  # start, end and pairs of the current block
        self._offset = 0.0
        self._pairs_of_block = 0
        self.num_pairs = 0  # scored or found in the cache
        self.num_model_pairs = 0  # scored by the model
        self.num_tokens = 0  # computed by the model
        self.num_rejected = 0
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"), TimeRemainingColumn(elapsed_when_finished=True),
        )  # fmt: skip
        self._bar = Progress(
            *columns, console=console, transient=True, disable=mode != "bar" or not console.is_terminal
        )
        self._task = self._bar.add_task(name, total=size, rate="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

    def begin(self, offset: int, size: int | None = None) -> None:
        """Start at this offset; `size` sets the end if it was unknown before."""
        self._offset = float(offset)
        self._size = self._size if size is None else size
        self._bar.reset(self._task, completed=offset, total=self._size)  # the time left is estimated from here

    def block(self, block: Block) -> None:
        """Note that a block is about to be scored."""
        self._block = (self._offset, float(block.end.offset), block.num_pairs)
        self._pairs_of_block = 0

    def advance(self, num_pairs: int, num_tokens: int) -> None:
        """Count scored pairs and the tokens computed for them (0 for cached pairs)."""
        self.num_pairs += num_pairs
        self.num_model_pairs += num_pairs if num_tokens else 0
        self.num_tokens += num_tokens
        self._pairs_of_block += num_pairs
        if self._block is not None:
            start, end, pairs = self._block
            self._show(start + (end - start) * min(1.0, self._pairs_of_block / max(1, pairs)))

    def report(self, progress: JobProgress, rejected: list[Rejected]) -> None:
        """Show that a block is on disk."""
        self._offset = float(progress.position.offset)
        for each in rejected:
            self._reject(each)
        self._show(self._offset)

    def piece(self, num_pairs: int, num_tokens: int, num_rejected: int) -> None:
        """Count a piece scored by a Ray worker; offsets then count pieces."""
        self._offset += 1
        self.num_rejected += num_rejected
        self.advance(num_pairs, num_tokens)
        self._show(self._offset)

    def event(self, name: str, **values: Any) -> None:
        """Print a line of JSON on standard output in JSON mode."""
        if self._mode == "json":
            print_json({"event": name, **values}, indent=None)

    def rates(self) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        return {"pairs_per_second": self.num_pairs / seconds, "tokens_per_second": self.num_tokens / seconds}

    @property
    def rates_text(self) -> str:
        rates = self.rates()
        return f"{rates['pairs_per_second']:,.0f} pairs/s, {rates['tokens_per_second']:,.0f} tokens/s"

    def _reject(self, rejected: Rejected) -> None:
        self.num_rejected += 1
        self.event("rejected", file=rejected.file, line=rejected.number, error=rejected.error)
        if self._mode == "bar" and self.num_rejected <= MAX_REJECTED_LINES:
            where = f"{rejected.file}:{rejected.number}: {rejected.error}"
            more = " (further ones are only in the file of rejects)" * (self.num_rejected == MAX_REJECTED_LINES)
            self._bar.console.print(where + more, markup=False, highlight=False, soft_wrap=True)

    def _show(self, offset: float) -> None:
        self._bar.update(self._task, completed=offset, rate=self.rates_text)
        if self._mode == "json" and self._clock() - self._last_line >= JSON_SECONDS:
            self._last_line = self._clock()
            done = offset / self._size if self._size else 1.0
            self.event("progress", done=round(done, 6), pairs=self.num_pairs, tokens=self.num_tokens, **self.rates())
