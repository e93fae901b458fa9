"""The command `local-rerank doctor`: run the self-test of a model and describe the machine."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from local_rerank.commands.console import Console, JsonOutput, print_json
from local_rerank.config import EngineConfig
from local_rerank.text_files import visible

if TYPE_CHECKING:
    from local_rerank.selftest.machine_report import Machine
    from local_rerank.selftest.order import OrderCheck
    from local_rerank.selftest.self_test import KnownPairScore, SelfTest
    from local_rerank.types import ModelInfo


def doctor(
    *,
    json_output: JsonOutput = False,
    engine: EngineConfig | None = None,
) -> int:
    """Run the self-test, see whether reranking changes an order, describe the machine, and return the exit status."""
    from local_rerank.reranker import Reranker
    from local_rerank.selftest.machine_report import describe
    from local_rerank.selftest.order import check_order
    from local_rerank.selftest.self_test import self_test

    with Reranker(config=engine) as reranker:
        outcome, order = self_test(reranker), check_order(reranker)
        machine = describe(reranker.info, reranker.checkpoint)
        (_print_json if json_output else _print_tables)(reranker.info, outcome, order, machine)
    return int(not outcome.passed or order.is_constant)


def _print_json(info: ModelInfo, outcome: SelfTest, order: OrderCheck, machine: Machine) -> None:
    parts = {"model": asdict(info), "self_test": asdict(outcome), "order": asdict(order), "machine": asdict(machine)}
    print_json(_finite({"passed": outcome.passed and not order.is_constant, **parts}))


def _finite(value: Any) -> Any:
    """Replace infinity and NaN by None, because JSON has neither."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_tables(info: ModelInfo, outcome: SelfTest, order: OrderCheck, machine: Machine) -> None:
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    about = f"{info.model_id} ({info.source}), {info.num_parameters / 1e6:.0f} M parameters"
    console.print(visible(about), markup=False)
    console.print(visible(f"recipe: {info.recipe} ({info.reasons['recipe']})"), markup=False, soft_wrap=True)
    print_scores(outcome.scores)
    verdict = "pass" if outcome.passed else f"FAULT: {outcome.fault}"
    console.print(Text(f"{verdict}: {outcome.detail}", style="green" if outcome.passed else "bold red"), soft_wrap=True)
    console.print(Text(f"order: {order.detail}", style="bold red" if order.is_constant else ""), soft_wrap=True)
    table = Table("", "current", "faster with", box=None, pad_edge=False)
    for name in ("device", "dtype", "decoder", "kernel", "products", "memory", "threads"):
        row = getattr(machine, name)
        table.add_row(name, Text(row.value, overflow="fold"), Text(row.faster, overflow="fold"))
    console.print(table)
    console.print(", ".join(f"{name} {version}" for name, version in machine.versions.items()), style="dim")


def print_scores(scores: tuple[KnownPairScore, ...]) -> None:
    """Print a line for each known pair: score, expected score, and difference."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("log-odds", "expected", "difference"):
        table.add_column(name, justify="right", min_width=10, no_wrap=True)
    table.add_column("pair", overflow="ellipsis", no_wrap=True)
    for score in scores:
        known = ("", "")
        if score.expected is not None:
            known = (f"{score.expected:+.4f}", f"{score.log_odds - score.expected:+.4f}")
        table.add_row(f"{score.log_odds:+.4f}", *known, Text(visible(f"{score.query} | {score.document}")))
    Console().print(table)
