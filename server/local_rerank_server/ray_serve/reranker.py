"""`RemoteReranker`: a Reranker's `submit`, answered by the replicas of a Ray Serve deployment.

The server cannot tell it from a `Reranker`: errors are the leaves of the same tree, and cancelling a future takes the
request out of its replica's queue. A request whose replica dies goes to another one; scoring has no side effects.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
import uuid
from concurrent.futures import Future

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from local_rerank import ray_cluster
from local_rerank.config import EngineConfig
from local_rerank.engine import ModelInfo
from local_rerank.errors import CheckpointError, EngineFailure, LocalRerankError, ModelUnavailable
from local_rerank.types import RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.ray_serve.routing import estimate_tokens

MAX_ATTEMPTS = 3  # a request that kills every engine it meets must not go round all of them
QUIET = {"log_level": "WARNING", "enable_access_log": False}

logger = logging.getLogger(__name__)
logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what it starts and stops is told in our own words


class RemoteReranker:
    """Sends requests to a deployment of `EngineReplica` through its handle."""

    def __init__(self, handle: DeploymentHandle[object], info: ModelInfo) -> None:
        self.info = info
        self._handle = handle
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="replicas", daemon=True)
        self._thread.start()

    @property
    def model_id(self) -> str:
        return self.info.model_id

    def submit(self, request: RerankRequest) -> Future[RerankResult]:
        """Send the request on; the future has its result, or fails with a LocalRerankError."""
        return asyncio.run_coroutine_threadsafe(self._rank(request), self._loop)

    async def _rank(self, request: RerankRequest) -> RerankResult:
        num_tokens = estimate_tokens(request)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            answer = await self._ask_one(request, num_tokens)
            if isinstance(answer, RerankResult):
                return answer
            if not isinstance(answer, ModelUnavailable):
                raise answer
            logger.warning("attempt %d of %d: %s", attempt, MAX_ATTEMPTS, answer)
        raise EngineFailure(f"{MAX_ATTEMPTS} replicas in turn were lost while they scored this request")

    async def _ask_one(self, request: RerankRequest, num_tokens: int) -> RerankResult | LocalRerankError:
        """One replica's answer; ModelUnavailable where it was lost. Waits while there is none."""
        response = self._handle.rank.remote(request, num_tokens=num_tokens)
        try:
            answer: RerankResult | LocalRerankError = await response
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]  # Ray's own
            raise
        except ray.exceptions.RayTaskError as error:
            logger.exception("a replica failed")
            return EngineFailure(f"a replica failed: {type(error.cause).__name__}: {error.cause}")
        except (RayError, RayServeException) as error:
            return ModelUnavailable(f"the replica was lost: {type(error).__name__}")
        return answer

    def close(self) -> None:
        """Stop sending; the replicas are not touched."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class ReplicaReranker(RemoteReranker):
    """A RemoteReranker that starts its replicas, and Ray where there is none, and ends what it started.

    Raises ConfigError where there is no Ray or no room, CheckpointError where no replica can load the model.
    """

    def __init__(self, config: EngineConfig, server_config: ServerConfig) -> None:
        self._started_ray = ray_cluster.connect()
        self._name = f"local-rerank-{uuid.uuid4().hex[:8]}"
        try:
            super().__init__(*_run(self._name, config, server_config, may_grow=not self._started_ray))
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        super().close()
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the process; what is left ends with Ray
            serve.delete(self._name)
            if self._started_ray:
                serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's own
        ray.shutdown()


def _run(
    name: str, config: EngineConfig, server_config: ServerConfig, *, may_grow: bool
) -> tuple[DeploymentHandle[object], ModelInfo]:
    from local_rerank_server.ray_serve.replica import engine_application

    serve.start(proxy_location="Disabled", logging_config=QUIET)  # requests come through our own server
    application = engine_application(config, server_config, may_grow=may_grow)
    try:
        handle = serve.run(application, name=name, route_prefix=None, logging_config=QUIET)
        info: ModelInfo = handle.info.remote().result()
    except (RuntimeError, RayError, RayServeException) as error:
        raise CheckpointError(f"no replica can load the model: {_reason(name, error)}") from error
    return handle, info


def _reason(name: str, error: Exception) -> str:
    """What the replicas said, without their tracebacks."""
    application = serve.status().applications.get(name)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    said = re.findall(r"(?:CheckpointError|ConfigError|\w+Error): (.+)", "\n".join([*messages, str(error)]))
    return said[-1] if said else str(error)
