"""The option `replicas`: how many engines Ray Serve may run."""

from __future__ import annotations

from dataclasses import dataclass

from local_rerank.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ReplicaRange:
    """How many engines Ray Serve may run; `maximum` is None if only the cluster's size limits it."""

    minimum: int
    maximum: int | None

    @property
    def fixed(self) -> int | None:
        """The number of engines, if it may not vary."""
        return self.minimum if self.minimum == self.maximum else None

    @classmethod
    def parse(cls, text: str) -> ReplicaRange:
        """Parse `auto`, `4` or `1-8`; raises ConfigError."""
        if text == "auto":
            return cls(1, None)
        low, _, high = text.partition("-")
        if low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low):
            return cls(int(low), int(high or low))
        raise ConfigError(f"replicas is {text!r}; it must be auto, a number from 1, or a range such as 1-8")
