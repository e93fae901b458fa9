"""A `Reranker` in its own process, and the Ray Serve deployment that runs and scales such replicas."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import ray.util
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from local_rerank.async_reranker import TOKENIZER_THREADS, queued
from local_rerank.batch.ray_cluster import LOOPBACK, ReplicaResources, absolute, replica_resources, room_for
from local_rerank.config import EngineConfig
from local_rerank.engine.cpu.process_setup import configure_process
from local_rerank.errors import ConfigError, DeviceFailure, LocalRerankError
from local_rerank.types import ModelInfo, RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.ray_serve.replica_range import ReplicaRange

ROUTER = "local_rerank_server.ray_serve.routing.FewestTokensRouter"
MAX_ONGOING_REQUESTS = 10_000  # in effect no limit: the engine limits its queue by tokens
TARGET_ONGOING_REQUESTS = 4.0
"""Requests per replica above which Ray Serve adds one: one being scored and three waiting."""
UPSCALE_SECONDS = 10.0
DOWNSCALE_SECONDS = 300.0  # longer than for upscaling, because a large model takes a minute to load again
CONSTRUCTOR_TRIES = 2  # one retry for a transient fault; a model that cannot be loaded is reported soon


class EngineReplica:
    """One engine. `rank` returns errors as values, because Ray would treat a raised one as a failure of the replica."""

    def __init__(self, config: EngineConfig, self_test: bool) -> None:
        configure_process()  # before importing torch
        _stay_on_loopback()
        from local_rerank import Reranker
        from local_rerank.selftest.self_test import require_self_test

        self._reranker = Reranker(config=config)
        self._reranker.observe_failure(end_process)
        if self_test:
            require_self_test(self._reranker)
        self._tokenizers = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")

    async def rank(
        self, request: RerankRequest, *, num_tokens: int, name: str | None = None
    ) -> RerankResult | LocalRerankError:
        """Rank a request; the sender's router reads `num_tokens`, its estimate."""
        try:
            return await asyncio.wrap_future(await queued(self._tokenizers, self._reranker.submit, request, name=name))
        except LocalRerankError as error:
            return error

    async def info(self) -> ModelInfo:
        return self._reranker.info


def end_process(_: DeviceFailure) -> None:
    """End this process, so that its requests are sent to another replica. Ray Serve replaces a dead one at its next
    health check, within 10 s; until it had replaced one that fails three checks, requests would go on to be sent there.
    """
    logging.shutdown()
    os._exit(1)


def _stay_on_loopback() -> None:
    """Serve opens a gRPC port on every address; on a cluster that listens on loopback, restrict it to loopback."""
    if ray.util.get_node_ip_address() != LOOPBACK:  # type: ignore[no-untyped-call]  # Ray's own
        return
    replica: Any = importlib.import_module("ray.serve._private.replica")
    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", LOOPBACK))


def engine_application(
    config: EngineConfig, server_config: ServerConfig, *, num_models: int = 1, may_grow: bool
) -> serve.Application:
    """The engine deployment of one of `num_models`, bound to its configuration. Ray must be connected.

    Raises ConfigError if a cluster that cannot grow has too few resources for the minimum number of replicas.
    """
    replicas = server_config.replica_range
    resources = replica_resources(config, replicas.fixed, num_models)
    room = room_for(resources) // num_models
    if not may_grow and replicas.minimum > room:
        raise ConfigError(
            f"replicas is {server_config.replicas}; there is room for {room}{' of each model' * (num_models > 1)} "
            f"({resources.num_cpus} CPUs and {resources.num_gpus} GPUs each)"
        )
    return _deployment(replicas, resources, room, server_config).bind(
        _replica_config(config, resources), not server_config.no_self_test
    )


def _deployment(
    replicas: ReplicaRange, resources: ReplicaResources, room: int, server_config: ServerConfig
) -> serve.Deployment:
    scaling = AutoscalingConfig(
        min_replicas=replicas.minimum,
        max_replicas=replicas.maximum or max(room, replicas.minimum),
        target_ongoing_requests=TARGET_ONGOING_REQUESTS,
        upscale_delay_s=UPSCALE_SECONDS,
        downscale_delay_s=DOWNSCALE_SECONDS,
    )
    scale: dict[str, Any] = {"num_replicas": replicas.fixed} if replicas.fixed else {"autoscaling_config": scaling}
    make = serve.deployment(
        name="EngineReplica",
        **scale,
        ray_actor_options=resources.as_options,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        graceful_shutdown_timeout_s=server_config.drain_seconds,
        request_router_config=RequestRouterConfig.model_validate({"request_router_class": ROUTER}),
    )
    deployment: serve.Deployment = make(EngineReplica)
    return deployment


def _replica_config(config: EngineConfig, resources: ReplicaResources) -> EngineConfig:
    """The engine options for another process, with its share of CPU threads."""
    return dataclasses.replace(absolute(config), threads=config.threads if resources.num_gpus else resources.num_cpus)
