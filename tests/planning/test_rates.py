"""`local-rerank plan`: the arithmetic, and that each figure says where it is from."""

from __future__ import annotations

import json

import pytest

from local_rerank.planning.rates import find_rate, table
from tests.command_line import command


def test_a_billion_pairs_on_eight_gpus() -> None:
    done = command("plan", "--pairs", "1e9", "--tokens", "300", "--gpus", "8xH200")
    assert done.returncode == 0, done.stderr
    assert "ESTIMATE, nothing was measured" in done.stdout
    assert "machines  1" in done.stdout
    assert "money     $" in done.stdout


def test_the_arithmetic_from_a_given_rate_and_price() -> None:
    arguments = "--pairs 3.6e6 --tokens 300 --shared-tokens 100 --documents 100 --gpus 16xmine --price 2 --json"
    done = command("plan", *arguments.split(), "--tokens-per-second", "20100")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["rate"]["kind"] == "given"
    assert plan["computed_tokens_per_pair"] == 201
    assert plan["pairs_per_second"]["low"] == pytest.approx(1600)
    assert plan["hours"]["low"] == plan["hours"]["high"] == pytest.approx(0.625)
    assert plan["num_machines"] == 2
    assert plan["dollars"]["high"] == pytest.approx(20.0)


def test_replicas_for_a_latency_come_from_the_simulation() -> None:
    done = command("plan", *"--gpus H100 --requests-per-second 30 --p99-ms 500".split())
    assert done.returncode == 0, done.stderr
    assert "replicas  2 for p99 <= 500 ms" in done.stdout


def test_a_measured_rate_is_told_as_one() -> None:
    done = command("plan", *"--model local-rerank-nano --gpus 16xCPU-thread --tokens 300".split())
    assert done.returncode == 0, done.stderr
    assert "tokens/s of one CPU-thread: measured; fp32, AMD EPYC" in done.stdout
    assert "docs/log.md, 2026-11-28" in done.stdout
    assert "money     give --price" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--gpus 2xunknown", "nothing is known of 'unknown'"),
        ("--gpus 0xH100", "gpus is '0xH100'"),
        ("--pairs 0", "pairs is 0; it must be more than 0"),
        ("--tokens 60", "shared_tokens is 69; it must be less than tokens, which is 60"),
        ("--model other --gpus H100", "nothing is known of the model 'other'"),
        ("--requests-per-second 1 --p99-ms 1 --gpus H100", "p99_ms is 1; p99 stays at"),
    ],
)
def test_what_cannot_be_planned_is_named(arguments: str, says: str) -> None:
    done = command("plan", *arguments.split())
    assert done.returncode == 1
    assert says in done.stderr


def test_every_figure_has_its_source_and_no_published_one_enters_a_plan() -> None:
    for device in table()["device"]:
        assert device["peak_source"]
        assert device["price_source"]
        assert find_rate(device["name"], "qwen3-reranker-0.6b", None).kind in ("estimate", "measured")
    assert all(row["source"] and row["what"] for row in [*table()["published"], *table().get("measured", [])])
