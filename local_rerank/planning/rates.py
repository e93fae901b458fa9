"""How long, on how many machines, for how much: arithmetic over `throughput.toml`, each figure with where it is from.

A rate is tokens a second that one device computes. It is measured (by us, or given by the user), or else an estimate
from the device's peak and the model's size; a plan says which.
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
DEVICES_OF_A_MACHINE = 8

Kind = Literal["measured", "given", "estimate"]


@dataclass(frozen=True, kw_only=True)
class Range:
    """A figure that is known within bounds; equal bounds where it is known."""

    low: float
    high: float

    def __mul__(self, factor: float) -> Range:
        return Range(low=self.low * factor, high=self.high * factor)

    def divide(self, number: float) -> Range:
        """`number` divided by this range: its bounds change sides."""
        return Range(low=number / self.high, high=number / self.low)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Tokens a second of one device."""

    tokens_per_second: Range
    kind: Kind
    source: str


@dataclass(frozen=True, kw_only=True)
class Device:
    """A row of the table, or a device that only the user knows."""

    name: str
    dollars_per_hour: Range | None
    price_source: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job of so many pairs takes."""

    rate: Rate
    computed_tokens_per_pair: float  # that go through the model: the prefix counts once per query
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
    device: Device,
    rate: Rate,
) -> Plan:
    """`tokens` of a pair, of which `shared_tokens` are its query's and computed once for `documents` of them."""
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
        num_machines=math.ceil(num_devices / DEVICES_OF_A_MACHINE),
        device_hours=device_hours,
        dollars=price and Range(low=device_hours.low * price.low, high=device_hours.high * price.high),
        price_source=device.price_source,
    )


def find_device(name: str, dollars_per_hour: float | None) -> Device:
    """The table's row of that name with its price, or the user's; a device that has no row has no price of ours."""
    row = _row("device", name) or {}
    if dollars_per_hour is not None:
        return Device(name=name, dollars_per_hour=_range([dollars_per_hour] * 2), price_source="given")
    known = row.get("dollars_per_hour")
    return Device(
        name=name,
        dollars_per_hour=_range(known) if known else None,
        price_source=row.get("price_source", ""),
    )


def find_rate(device: str, model: str, tokens_per_second: float | None) -> Rate:
    """The rate that is given, or was measured, or an estimate; raises ConfigError where there is none of these."""
    if tokens_per_second is not None:
        return Rate(tokens_per_second=_range([tokens_per_second] * 2), kind="given", source="--tokens-per-second")
    for row in table().get("measured", []):
        if row["device"].lower() == device.lower() and row["model"] == model:
            source = f"{row['what']} ({row['source']})"
            return Rate(tokens_per_second=_range(row["tokens_per_second"]), kind="measured", source=source)
    return _estimate(device, model)


def _estimate(device: str, model: str) -> Rate:
    """Two operations for each parameter and token, at a share of the peak; attention is left out, little as it is."""
    found, size = _row("device", device), _row("model", model)
    if found is None or "peak_tflops" not in found:
        raise ConfigError(f"nothing is known of {device!r} with {model}; give --tokens-per-second, or take {_known()}")
    if size is None:
        names = ", ".join(row["name"] for row in table()["model"])
        raise ConfigError(f"nothing is known of the model {model!r}; give --tokens-per-second, or take {names}")
    per_token = 2 * size["layer_parameters"]
    low, high = table()["estimate"]["utilisation"]
    peak = found["peak_tflops"] * 1e12
    source = (
        f"arithmetic: {low:.0%}-{high:.0%} of {found['peak_tflops']} TFLOP/s ({found['peak_source']}), "
        f"{per_token / 1e9:.2f} GFLOP a token"
    )
    return Rate(
        tokens_per_second=_range([low * peak / per_token, high * peak / per_token]), kind="estimate", source=source
    )


def published(device: str) -> list[str]:
    """What others have published of that device, each as a line."""
    rows = [row for row in table()["published"] if row["device"].lower() == device.lower()]
    return [f"{_span(row['pairs_per_second'])} pairs/s: {row['what']} ({row['source']})" for row in rows]


@cache
def table() -> dict[str, Any]:
    return tomllib.loads(DATA.read_text(encoding="utf-8"))


def _row(kind: str, name: str) -> dict[str, Any] | None:
    return next((row for row in table()[kind] if row["name"].lower() == name.lower()), None)


def _known() -> str:
    return ", ".join(row["name"] for row in table()["device"])


def _range(bounds: list[float]) -> Range:
    return Range(low=float(bounds[0]), high=float(bounds[1]))


def _span(bounds: list[float]) -> str:
    low, high = (f"{bound:,}" for bound in bounds)
    return low if low == high else f"{low}-{high}"
