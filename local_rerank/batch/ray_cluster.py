"""Connect to Ray: join the cluster at an address or `RAY_ADDRESS`, else start one here. Usage statistics are off.

Ray is an extra (`pip install 'local-rerank[ray]'`) and is imported only when needed. A cluster started here listens on
loopback only and has no dashboard.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 512 * 1024**2
"""Shared memory of a cluster started here, for texts and scores. Ray's default is 30 % of the machine's memory."""


@dataclass(frozen=True, kw_only=True)
class ReplicaResources:
    """The resources that one engine reserves on a cluster."""

    num_cpus: int
    num_gpus: int

    @property
    def as_options(self) -> dict[str, float]:
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


def require_ray() -> None:
    """Set Ray's environment variables, so call this before `import ray`. Raises ConfigError if Ray is missing."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed: pip install 'local-rerank[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing leaves the machine
    if "RAY_ADDRESS" not in os.environ:
        # despite its name, without this Ray replaces 127.0.0.1 by an address that other machines can reach
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns that this default will change


def connect(address: str | None = None, *, log_to_driver: bool = True) -> bool:
    """Join the cluster at `address` or `RAY_ADDRESS`, else start one; returns whether one was started.

    `log_to_driver` also prints the workers' output here. Raises ConfigError if there is no cluster at that address.
    """
    require_ray()
    address = address or os.environ.get("RAY_ADDRESS") or None
    connected: Future[None] = Future()

    def keep() -> None:
        """Stay alive, because the kernel ends Ray's processes together with the thread that started them."""
        try:
            _init(address, log_to_driver)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"at {address}" if address else "on this machine"
            connected.set_exception(ConfigError(f"there is no Ray cluster {where}: {error}"))
        else:
            connected.set_result(None)
            threading.Event().wait()

    threading.Thread(target=keep, name="ray", daemon=True).start()
    connected.result()
    return address is None


def _init(address: str | None, log_to_driver: bool) -> None:
    import ray

    if address is not None:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=log_to_driver)
        return
    ray.init(
        address="local",
        include_dashboard=False,
        _node_ip_address=LOOPBACK,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=log_to_driver,
    )


def replica_resources(config: EngineConfig, num_replicas: int | None, num_models: int = 1) -> ReplicaResources:
    """Give each engine a GPU if the cluster has any and `device` allows it, else one CPU per thread.

    Without `threads`, `num_replicas` engines of each model share the cluster's CPUs, or one of each fills a node.
    """
    nodes = _nodes()
    num_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    num_cpus = [int(node.get("CPU", 0)) for node in nodes]
    if config.device.startswith("cuda") or (config.device == "auto" and num_gpus):
        return ReplicaResources(num_cpus=1, num_gpus=1)
    if config.threads is not None:
        return ReplicaResources(num_cpus=config.threads, num_gpus=0)
    if num_replicas is None:
        return ReplicaResources(num_cpus=max(1, min(filter(None, num_cpus), default=1) // num_models), num_gpus=0)
    return ReplicaResources(num_cpus=max(1, sum(num_cpus) // (num_replicas * num_models)), num_gpus=0)


def room_for(resources: ReplicaResources) -> int:
    """Return how many engines of that size fit on the cluster's nodes."""
    wanted = {name: amount for name, amount in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus)) if amount}
    return sum(min(int(node.get(name, 0)) // amount for name, amount in wanted.items()) for node in _nodes())


def _nodes() -> list[dict[str, float]]:
    """Return the resources of each live node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def absolute(config: EngineConfig) -> EngineConfig:
    """Make the paths of a model folder and a calibration absolute: a worker has another working directory."""
    paths = {name: getattr(config, name) for name in ("model", "calibration")}
    there = {name: Path(path) for name, path in paths.items() if path is not None and Path(path).exists()}
    found: dict[str, Any] = {name: str(path.resolve()) for name, path in there.items()}
    return dataclasses.replace(config, **found)
