"""Show the progress of a batch job as a bar with rates and time left, as JSON lines, or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from local_rerank.batch.rows import ScoredRow
from local_rerank.batch.sources import Position, Rejected
from local_rerank.commands.console import Console, print_json, say
from local_rerank.text_files import visible

Mode = Literal["bar", "json", "quiet"]

JSON_SECONDS = 5.0  # between two progress lines
MAX_REJECTED_LINES = 10  # shown on the terminal; the file of rejects has all


class Estimate:
    """Estimates how much of a job is done, from tokens. Records would mislead: they differ in length, and the short
    ones of those in the queue are scored first.

    The tokens of all documents follow from those of the finished records; the tokens that the model computes for them,
    from what it computed for documents so far. Cached documents take no time.
    """

    def __init__(self) -> None:
        self.num_batch_tokens = 0  # computed by the model, also for requests that are not complete
        self.offset = self._begin = self._size = 0
        self._finished = 0  # document tokens of the records up to the offset
        self._cached = 0  # document tokens found in the cache
        self._scored = 0  # document tokens scored by the model, and the tokens computed for them
        self._computed = 0

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the model."""
        return max(self.num_batch_tokens, self._computed)

    def begin(self, offset: int, size: int) -> None:
        self.offset = self._begin = offset
        self._size = size

    def count(self, num_tokens: int, num_document_tokens: int) -> None:
        """Count documents with the tokens computed for them; 0 if they were cached."""
        if num_tokens:
            self._computed += num_tokens
            self._scored += num_document_tokens
        else:
            self._cached += num_document_tokens

    def finish(self, num_document_tokens: int, offset: int) -> None:
        """Count a record, which ends at this offset."""
        self._finished += num_document_tokens
        self.offset = offset

    @property
    def left(self) -> float | None:
        """Tokens left to compute; None if that is not yet known."""
        if not (self._scored and self._finished):
            return None
        total = self._finished * (self._size - self._begin) / max(1, self.offset - self._begin)
        return max(0.0, (total - self._cached) * self._computed / self._scored - self.num_tokens)

    @property
    def done(self) -> float:
        """The share of the whole input that is done, from 0 to 1."""
        if self.offset >= self._size:
            return 1.0
        before = self._begin / self._size
        left = self.left
        if left is None or not self.num_tokens:
            return self.offset / self._size
        return before + (1 - before) * self.num_tokens / (self.num_tokens + left)


class Display:
    """Counts and shows what this run of a job does."""

    def __init__(
        self,
        mode: Mode,
        name: str,
        *,
        has_rejects_file: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mode = mode
        self._has_rejects_file = has_rejects_file
        self._clock = clock
        self._started = self._last_line = clock()
        self._estimate = Estimate()
        self.num_pairs = 0  # scored or found in the cache
        self.num_model_pairs = 0  # scored by the model
        self.num_rejected = 0
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[left]}"),
        )  # fmt: skip
        self._bar = Progress(
            *columns, console=console, transient=True, disable=mode != "bar" or not console.is_terminal
        )
        self._task = self._bar.add_task(visible(name), total=1.0, rate="", left="")

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

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the model."""
        return self._estimate.num_tokens

    @property
    def seconds_left(self) -> float | None:
        """The estimated time left; None if it cannot be estimated yet."""
        left = self._estimate.left
        return None if left is None or not self.num_tokens else left * self.seconds / self.num_tokens

    def start(self, output: str, begins: str) -> None:
        """Say whether a job goes on or starts anew."""
        self.event("start", output=output, begins=begins)
        if self.mode == "bar":
            say(f"{output}: {begins}")

    def begin(self, offset: int, size: int) -> None:
        """Start to score at this offset; `size` is the offset after the last record."""
        self._started = self._last_line = self._clock()  # loading the model is over
        self._estimate.begin(offset, size)

    def computed(self, num_tokens: int) -> None:
        """Count a batch of the model; called in its thread, perhaps after the last record is finished."""
        self._estimate.num_batch_tokens += num_tokens
        if self.mode == "bar":
            self._show()

    def advance(self, num_pairs: int, num_tokens: int, num_document_tokens: int) -> None:
        """Count scored pairs, and the tokens computed for them (0 for cached pairs)."""
        self.num_pairs += num_pairs
        self.num_model_pairs += num_pairs if num_tokens else 0
        self._estimate.count(num_tokens, num_document_tokens)
        self._show()

    def report(self, outcome: ScoredRow | Rejected, end: Position) -> None:
        """Show that a record is finished."""
        if isinstance(outcome, Rejected):
            self._reject(outcome)
            self._estimate.finish(0, end.offset)
        else:
            self._estimate.finish(outcome.num_tokens, end.offset)
        self._show()

    def piece(self, num_pairs: int, num_tokens: int, num_rejected: int) -> None:
        """Count a piece scored by a Ray worker; offsets then count pieces."""
        self.num_rejected += num_rejected
        self.advance(num_pairs, num_tokens, num_tokens)
        self._estimate.finish(num_tokens, self._estimate.offset + 1)
        self._show()

    def event(self, name: str, **values: Any) -> None:
        """Print a line of JSON on standard output in JSON mode."""
        if self.mode == "json":
            print_json({"event": name, **values}, indent=None)

    def rates(self) -> dict[str, float]:
        """Of what the model scored: pairs from the cache take no time."""
        seconds = max(self.seconds, 1e-9)
        return {"pairs_per_second": self.num_model_pairs / seconds, "tokens_per_second": self.num_tokens / seconds}

    @property
    def rates_text(self) -> str:
        rates = self.rates()
        return f"{rates['pairs_per_second']:,.0f} pairs/s, {rates['tokens_per_second']:,.0f} tokens/s"

    def _reject(self, rejected: Rejected) -> None:
        self.num_rejected += 1
        self.event("rejected", file=rejected.file, line=rejected.number, error=rejected.error)
        is_only_here = not self._has_rejects_file and self.mode != "json"
        if is_only_here or (self.mode == "bar" and self.num_rejected <= MAX_REJECTED_LINES):
            where = f"{rejected.file}:{rejected.number}: {rejected.error}"
            is_last = not is_only_here and self.num_rejected == MAX_REJECTED_LINES
            more = " (further ones are only in the file of rejects)" * is_last
            self._bar.console.print(visible(where + more), markup=False, highlight=False, soft_wrap=True)

    def _show(self) -> None:
        left, done = self.seconds_left, self._estimate.done
        shown = "-:--:--" if left is None else str(timedelta(seconds=round(left)))
        self._bar.update(self._task, completed=done, rate=self.rates_text, left=shown)
        if self.mode == "json" and self._clock() - self._last_line >= JSON_SECONDS:
            self._last_line = self._clock()
            counts = {"pairs": self.num_pairs, "tokens": self.num_tokens}
            self.event("progress", done=round(done, 6), seconds_left=left, **counts, **self.rates())
