"""The table of figures and bars with which gpu.py ends, in the form of docs/log.md."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Figures = dict[str, dict[str, Any]]
"""By part, then by name."""
MAX_P99_MS = 500
NOTHING = (KeyError, TypeError)  # what reading a figure raises that does not exist


@dataclass(frozen=True)
class Row:
    what: str
    bar: str
    part: str
    said: Callable[[dict[str, Any]], str]  # the figures of the part, in words
    is_met: Callable[[dict[str, Any]], bool]


def served(clients: int) -> Row:
    def said(part: dict[str, Any]) -> str:
        load = part[f"{clients} clients"]
        return (
            f"{load['pairs_per_second']:,.0f} pairs/s, {load['share_of_batch_after_batch']:.0%} of batch after batch "
            f"({part['batch_after_batch_pairs_per_second']:,.0f}), P99 {load['p99_ms']:.0f} ms ({part['clients']})"
        )

    def is_met(part: dict[str, Any]) -> bool:
        load = part[f"{clients} clients"]
        return bool(load["share_of_batch_after_batch"] >= 0.9 and load["p99_ms"] < MAX_P99_MS)

    return Row(f"served to {clients} clients", f"90 %, P99 < {MAX_P99_MS} ms", "serving", said, is_met)


def fp8(shape: str, part: str) -> Row:
    return Row(
        f"fp8, {shape} shape", "faster than bf16", part,
        lambda it: (
            f"{it['speedup']:.2f}x, {it['fp8_pairs_per_second']:,.0f} pairs/s; from fp32 {it['fp8_largest']:.2g} "
            f"(mean {it['fp8_mean']:.2g}; bf16 {it['bf16_largest']:.2g}, {it['bf16_mean']:.2g}) "
            f"in a range of {it['range_of_fp32']:.2g}"
        ),
        lambda it: it["speedup"] > 1,
    )  # fmt: skip


ROWS = (
    Row(
        "kernels beside torch", "agree", "kernels",
        lambda it: "all agree" if it["passed"] else f"wrong: {', '.join(it['failed'])}",
        lambda it: it["passed"],
    ),
    Row(
        "tests marked `gpu`", "pass", "gpu_tests",
        lambda it: f"{it.get('passed', 0)} passed, {it.get('failed', 0)} failed, {it.get('skipped', 0)} skipped",
        lambda it: it["passed_all"],
    ),
    Row(
        "useful operations of the measured bf16 ceiling", "55 % (1,950 pairs/s), aim 66 %", "throughput",
        lambda it: (
            f"{it['share_of_ceiling']:.0%} ({it['useful_tflops']:.0f} of {it['gemm_ceiling_tflops']:.0f} TFLOP/s), "
            f"{it['pairs_per_second']:,.0f} pairs/s"
        ),
        lambda it: it["share_of_ceiling"] >= 0.55,
    ),
    served(16),
    served(64),
    Row(
        "ten passages, p50", "9 ms, aim 6", "latency",
        lambda it: f"{it['p50_ms']:.1f} ms (P99 {it['p99_ms']:.1f})",
        lambda it: it["p50_ms"] <= 9,
    ),
    Row(
        "320 passages against sentence-transformers", "5x", "peer",
        lambda it: f"{it['ratio']:.1f}x {it['version']} in batches of {it['best_batch_size']}",
        lambda it: it["ratio"] >= 5,
    ),
    Row(
        "bf16 from fp32", "no further than the card's code in bf16", "precision",
        lambda it: (
            f"largest {it['ours_largest']:.3g}, mean {it['ours_mean']:.3g}; the card's code {it['card_largest']:.3g}, "
            f"{it['card_mean']:.3g}; range {it['range_of_fp32']:.3g}"
        ),
        lambda it: it["ours_largest"] <= it["card_largest"] and it["ours_mean"] <= it["card_mean"],
    ),
    fp8("0.6B", "fp8"),
    fp8("4B", "fp8_4b"),
    Row(
        "memory of graphs and batches", "within the estimate", "memory",
        lambda it: (
            f"{it['peak_bytes_per_token'] / 1e3:.1f} of {it['estimated_bytes_per_token'] / 1e3:.1f} kB a token; "
            f"{it['num_graphs']} graphs {it['bytes_held_by_graphs'] / 1e9:.2f} of "
            f"{it['estimated_bytes_of_graphs'] / 1e9:.2f} GB"
        ),
        lambda it: (
            it["peak_bytes_per_token"] <= it["estimated_bytes_per_token"]
            and it["bytes_held_by_graphs"] <= it["estimated_bytes_of_graphs"]
        ),
    ),
    Row(
        "start, kernels to compile", "20 s", "serving",
        lambda it: f"{it['cold_start_seconds']:.1f} s", lambda it: it["cold_start_seconds"] <= 20,
    ),
    Row(
        "start, warm cache", "10 s", "serving",
        lambda it: f"{it['warm_start_seconds']:.1f} s", lambda it: it["warm_start_seconds"] <= 10,
    ),
    Row(
        "compute-sanitizer over the kernels", "0 errors", "sanitizer",
        lambda it: f"{it['errors']} errors, kernels {'agreed' if it.get('kernels_agree') else 'did not agree'}",
        lambda it: it["errors"] == 0 and it.get("kernels_agree", False),
    ),
)  # fmt: skip


def table(figures: Figures) -> str:
    made = figures.get("checkpoint", {})
    versions = ", ".join(f"{name} {made.get(name, '?')}" for name in ("torch", "transformers", "triton"))
    head = f"{datetime.date.today()}, {made.get('device', 'no device')}, {versions}"
    lines = [head, "", "| | figure | bar | |", "| --- | --- | --- | --- |"]
    for row in ROWS:
        part = figures.get(row.part, {})
        try:
            said, verdict = row.said(part), "met" if row.is_met(part) else "missed"
        except NOTHING:
            said, verdict = str(part.get("not_here", "no figure")), "not measured"
        if part.get("end", "done") != "done":
            said = f"{said} ({part['end']})"
        lines.append(f"| {row.what} | {said} | {row.bar} | {verdict} |")
    return "\n".join(lines)
