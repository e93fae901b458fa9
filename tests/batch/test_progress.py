"""The time left by a clock of our own, and results that are written as they come."""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from local_rerank import Reranker
from local_rerank.batch import job as job_module
from local_rerank.batch.formats import open_sink, open_source
from local_rerank.batch.job import JobFolder, run_job
from local_rerank.batch.rows import Row, ScoredRow, parse_record
from local_rerank.batch.scoring import BlockScorer
from local_rerank.batch.sources import Position
from local_rerank.commands.batch_progress import Display
from tests.batch.test_command import write_lines
from tests.batch.test_files import scored

QUERY_TOKENS, TOKENS_PER_SECOND, WINDOW = 70, 1000, 50


def finished(num_tokens: int) -> ScoredRow:
    """A scored pair whose document has that many tokens."""
    row = scored({"query": "q", "document": "d"}, [0.0])
    return replace(row, results=(replace(row.results[0], num_tokens=num_tokens),))


@pytest.mark.parametrize("begin", [0, 700])
def test_c14_the_time_left_is_steady_although_short_documents_are_scored_first(begin: int) -> None:
    """Documents differ in length by a factor of 100. Of those in the queue the shortest is scored next, or every tenth
    time the first; records are finished in order."""
    lengths = [int(10 ** random.Random(i).uniform(0.5, 2.5)) for i in range(2000)]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]  # an offset counts bytes, as many as tokens
    now = 0.0
    display = Display("quiet", "in.jsonl", clock=lambda: now)
    display.begin(ends[begin - 1] if begin else 0, ends[-1])
    waiting, scored_ones, first = list(range(begin, len(lengths))), set(), begin
    left = []
    for step in range(len(waiting)):
        queue = waiting[:WINDOW]
        chosen = queue[0] if step % 10 == 0 else min(queue, key=lambda i: lengths[i])
        waiting.remove(chosen)
        scored_ones.add(chosen)
        num_tokens = QUERY_TOKENS + lengths[chosen]
        now += num_tokens / TOKENS_PER_SECOND
        display.computed(num_tokens)
        while first in scored_ones:
            display.advance(1, QUERY_TOKENS + lengths[first], lengths[first])
            display.report(finished(lengths[first]), Position(ends[first]))
            first += 1
        if display.seconds_left is not None:
            left.append((now, display.seconds_left))
    assert left[-1] == (now, 0.0)
    whole = now
    assert whole > 100
    for at, estimate in left:
        if at > whole / 10:
            assert at + estimate == pytest.approx(whole, rel=0.2), at


def test_c14_cached_pairs_take_no_time_count_in_no_rate_and_the_share_done_counts_from_the_start_of_the_file() -> None:
    now = 0.0
    display = Display("quiet", "in.jsonl", clock=lambda: now)
    display.begin(50, 100)
    assert display.seconds_left is None
    for offset in range(51, 76):
        display.advance(1, 0 if offset < 61 else 20, 10)
        now += 0 if offset < 61 else 1
        display.report(finished(10), Position(offset))
    assert display.seconds_left == pytest.approx(25)
    assert display.rates() == pytest.approx({"pairs_per_second": 1, "tokens_per_second": 20})
    assert display._estimate.done == pytest.approx(0.5 + 0.5 * 15 / 40)


def test_c14_results_are_written_in_order_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is in the file before the next one of its block is scored."""
    monkeypatch.setattr(job_module, "WRITE_SECONDS", 0.0)
    input, output = (
        write_lines(tmp_path / "in.jsonl", [{"query": "q", "document": "d" * i} for i in range(1, 9)]),
        tmp_path / "o.jsonl",
    )
    written = []

    def score(rows: list[Row]) -> Any:
        for row in rows:
            written.append(len(output.read_text().splitlines()) if output.exists() else 0)
            yield scored({"query": "q", "document": row.documents[0]}, [1.0])

    with closing(JobFolder(output, tmp_path / "rejects", {}, overwrite=False)) as folder:
        folder.start({})
        source = open_source(input, folder.path)
        sink = open_sink(output, folder.path, source, model_id="m")
        run_job(folder, source, score, sink, tmp_path / "rejects", report=lambda *_: None)
    assert written == list(range(8))


def test_c14_short_pairs_do_not_overtake_a_whole_block_of_long_ones(tiny_reranker: Reranker) -> None:
    """Without a bound all short pairs would be scored before the tenth long one, whose result is next in order."""
    documents = ["long " * 40] * 30 + ["short"] * 90
    rows = [parse_record({"query": f"q{i}", "document": text}) for i, text in enumerate(documents)]
    counts: list[int] = []
    tiny_reranker.observe_batches(lambda report: counts.append(report.num_pairs))
    try:
        outcomes = BlockScorer(tiny_reranker).score(rows)
        for _ in range(10):
            next(outcomes)
        assert sum(counts) <= 25  # 45 without the bound
    finally:
        tiny_reranker.observe_batches(lambda report: None)
