"""`local-rerank plan`: the arithmetic, and the source of each figure."""

from __future__ import annotations

import json

import pytest

from tests.command_line import command


def planned(line: str) -> str:
    done = command("plan", *line.split())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_without_a_measured_rate_is_an_estimate() -> None:
    said = planned("--pairs 1e9 --tokens 300 --gpus 8xH200")
    for part in ("ESTIMATE, not measured", "machines  1", "cost      $"):
        assert part in said


def test_a_plan_follows_from_a_given_rate_and_price() -> None:
    job = "--pairs 3.6e6 --tokens 300 --shared-tokens 100 --documents 100"
    plan = json.loads(planned(f"{job} --gpus 16xmine --price 2 --tokens-per-second 20100 --json"))
    assert plan["rate"]["kind"] == "given"
    assert plan["computed_tokens_per_pair"] == 201
    assert plan["pairs_per_second"]["low"] == pytest.approx(1600)
    assert plan["hours"]["low"] == plan["hours"]["high"] == pytest.approx(0.625)
    assert plan["num_machines"] == 2
    assert plan["dollars"]["high"] == pytest.approx(20.0)


def test_a_plan_counts_the_overlaps_and_suffixes_of_chunks() -> None:
    job = "--pairs 3.6e6 --tokens 2100 --shared-tokens 100 --documents 100 --gpus 1xmine --tokens-per-second 20100"
    chunks = "--long-documents chunk --chunk-tokens 500 --chunk-overlap-tokens 100"
    one, five = (json.loads(planned(f"{job} {more} --json"))["computed_tokens_per_pair"] for more in ("", chunks))
    assert (one, five) == (2001, 2001 + 4 * (100 + 9))
    assert "2100 tokens in 5 chunks, qwen3" in planned(f"{job} {chunks}")
    assert "chunks" not in planned(f"{job} --long-documents chunk --chunk-tokens 2000")


def test_replicas_for_a_latency_are_simulated() -> None:
    assert "replicas  2 for p99 <= 500 ms" in planned("--gpus H100 --requests-per-second 30 --p99-ms 500")


def test_a_measured_rate_is_used_and_marked() -> None:
    said = planned("--model local-rerank-nano --gpus 16xCPU-thread --tokens 300")
    for part in ("per CPU-thread: measured; fp32, AMD EPYC", "docs/log.md, 2026-11-28", "cost      unknown"):
        assert part in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--gpus 2xunknown", "there is no figure for qwen3-reranker-0.6b on 'unknown'"),
        ("--gpus 0xH100", "gpus is '0xH100'"),
        ("--pairs 0", "pairs is 0; it must be more than 0"),
        ("--tokens 60", "shared_tokens is 69; it must be less than tokens, which is 60"),
        ("--gpus H100 --chunk-tokens 5", "chunk_tokens is 5; it must be at least 16"),
        ("--model other --gpus H100", "there is no figure for the model 'other'"),
        ("--requests-per-second 1 --p99-ms 1 --gpus H100", "p99_ms is 1; p99 is "),
    ],
)
def test_wrong_options_are_named(arguments: str, says: str) -> None:
    done = command("plan", *arguments.split())
    assert done.returncode == 1
    assert says in done.stderr
