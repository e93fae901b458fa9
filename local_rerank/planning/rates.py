"""Estimate the time, machines and cost of a job from `throughput.toml`, where each figure has its source.

A rate is the number of tokens that one device computes per second. It is measured by us, given by the user, or
estimated from the device's peak and the model's size; a plan says which.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from local_rerank.errors import ConfigError

DATA = Path(__file__).with_name("throughput.toml")
DEVICES_PER_MACHINE = 8
SUFFIX_TOKENS = 9  # of the template, after each document or chunk

RateKind = Literal["measured", "given", "estimate"]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Lower and upper bound of a figure; both are equal if it is known exactly."""

    low: float
    high: float

    def __mul__(self, factor: float) -> Range:
        return Range(low=self.low * factor, high=self.high * factor)

    def divide(self, number: float) -> Range:
        """Return `number` divided by this range."""
        return Range(low=number / self.high, high=number / self.low)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The tokens per second of one device, and where the figure comes from."""

    tokens_per_second: Range
    kind: RateKind
    source: str


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device and its price; the table need not have it."""

    name: str
    dollars_per_hour: Range | None
    price_source: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The time, machines and cost of a job."""

    rate: Rate
    computed_tokens_per_pair: float  # the prefix counts once per query
    pairs_per_second: Range  # of all devices
    hours: Range
    num_machines: int
    device_hours: Range
    dollars: Range | None
    price_source: str


def make_plan(
    *,
    pairs: float,
    tokens: int,
    shared_tokens: int,
    documents: int,
    num_devices: int,
    devices_per_machine: int = DEVICES_PER_MACHINE,
    device: Device,
    rate: Rate,
) -> Plan:
    """Plan a job; `shared_tokens` of the `tokens` of a pair are computed once for a query's `documents`."""
    computed = tokens - shared_tokens + shared_tokens / documents
    pairs_per_second = rate.tokens_per_second * (num_devices / computed)
    hours = pairs_per_second.divide(pairs) * (1 / 3600)
    device_hours = hours * num_devices
    price = device.dollars_per_hour
    return Plan(
        rate=rate,
        computed_tokens_per_pair=computed,
        pairs_per_second=pairs_per_second,
        hours=hours,
        num_machines=math.ceil(num_devices / devices_per_machine),
        device_hours=device_hours,
        dollars=price and Range(low=device_hours.low * price.low, high=device_hours.high * price.high),
        price_source=device.price_source,
    )


def chunks_of(document_tokens: int, chunk_tokens: int, overlap_tokens: int) -> tuple[int, int]:
    """Estimate the chunks of a document, and the tokens that they have beyond the document's: overlaps and suffixes."""
    if document_tokens <= chunk_tokens:
        return 1, 0
    overlap = min(overlap_tokens, chunk_tokens // 2)
    num_chunks = 1 + math.ceil((document_tokens - chunk_tokens) / (chunk_tokens - overlap))
    return num_chunks, (num_chunks - 1) * (overlap + SUFFIX_TOKENS)


def find_device(name: str, dollars_per_hour: float | None) -> Device:
    """Return a device with the user's price, or the table's if it has one."""
    if dollars_per_hour is not None:
        return Device(name=name, dollars_per_hour=_range([dollars_per_hour] * 2), price_source="given")
    row = _row("device", name) or {}
    price = row.get("dollars_per_hour")
    return Device(name=name, dollars_per_hour=price and _range(price), price_source=row.get("price_source", ""))


def find_rate(device: str, model: str, tokens_per_second: float | None) -> Rate:
    """Return the given, measured or estimated rate; raises ConfigError if device or model is unknown."""
    if tokens_per_second is not None:
        return Rate(tokens_per_second=_range([tokens_per_second] * 2), kind="given", source="--tokens-per-second")
    for row in table().get("measured", []):
        if row["device"].lower() == device.lower() and row["model"] == model:
            source = f"{row['what']} ({row['source']})"
            return Rate(tokens_per_second=_range(row["tokens_per_second"]), kind="measured", source=source)
    return _estimate(device, model)


def _estimate(device: str, model: str) -> Rate:
    """Estimate a rate from two operations per parameter and token, without attention, at a share of the peak."""
    found, size = _row("device", device), _row("model", model)
    if found is None or "peak_tflops" not in found:
        names = ", ".join(row["name"] for row in table()["device"])
        raise ConfigError(f"there is no figure for {model} on {device!r}; give --tokens-per-second, or use {names}")
    if size is None:
        names = ", ".join(row["name"] for row in table()["model"])
        raise ConfigError(f"there is no figure for the model {model!r}; give --tokens-per-second, or use {names}")
    per_token = 2 * size["layer_parameters"]
    low, high = table()["estimate"]["utilisation"]
    peak = found["peak_tflops"] * 1e12
    source = (
        f"arithmetic: {low:.0%}-{high:.0%} of {found['peak_tflops']} TFLOP/s ({found['peak_source']}), "
        f"{per_token / 1e9:.2f} GFLOP per token"
    )
    return Rate(
        tokens_per_second=_range([low * peak / per_token, high * peak / per_token]), kind="estimate", source=source
    )


def published(device: str) -> list[str]:
    """Return a line for each figure that others have published for a device."""
    rows = [row for row in table()["published"] if row["device"].lower() == device.lower()]
    return [f"{_span(row['pairs_per_second'])} pairs/s: {row['what']} ({row['source']})" for row in rows]


@cache
def table() -> dict[str, Any]:
    return tomllib.loads(DATA.read_text(encoding="utf-8"))


def _row(kind: str, name: str) -> dict[str, Any] | None:
    return next((row for row in table()[kind] if row["name"].lower() == name.lower()), None)


def _range(bounds: list[float]) -> Range:
    return Range(low=float(bounds[0]), high=float(bounds[1]))


def _span(bounds: list[float]) -> str:
    low, high = (f"{bound:,}" for bound in bounds)
    return low if low == high else f"{low}-{high}"
