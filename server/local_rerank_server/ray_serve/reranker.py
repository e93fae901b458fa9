"""`RemoteReranker`: the `submit` of a `Reranker`, answered by the replicas of a Ray Serve deployment.

It raises the same errors as a `Reranker`, and cancelling a future removes the request from its replica's queue. A
request whose replica dies is sent to another one, which is safe because scoring has no side effects.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from local_rerank import forks
from local_rerank.batch import ray_cluster
from local_rerank.config import EngineConfig
from local_rerank.errors import (
    CheckpointError,
    DeviceFailure,
    EngineFailure,
    LocalRerankError,
    ModelUnavailable,
    UnusableAfterFork,
)
from local_rerank.requests.pending import OnScored
from local_rerank.requests.worker import BatchReport
from local_rerank.types import ModelInfo, RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.ray_serve.routing import estimate_tokens

MAX_ATTEMPTS = 3  # so that a request that crashes engines does not crash all of them
LOGGING = {"log_level": "WARNING", "enable_access_log": False}

logger = logging.getLogger(__name__)
logging.getLogger("ray.serve").setLevel(logging.WARNING)  # process.py reports start and stop itself


class RemoteReranker:
    """Sends requests to a deployment of `EngineReplica` through its handle."""

    def __init__(self, handle: DeploymentHandle[object], info: ModelInfo, config: EngineConfig) -> None:
        self.info = info
        self.config = config
        self._handle = handle
        self._sent: dict[int, int] = {}  # estimated tokens of each unanswered request
        self._ids = itertools.count()
        self._is_in_child = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="replicas", daemon=True)
        self._thread.start()
        forks.renew_in_child(self)

    def renew(self) -> None:
        """Mark the connection to Ray and the event loop as unusable in a forked child."""
        self._is_in_child = True

    @property
    def model_id(self) -> str:
        return self.info.model_id

    @property
    def num_queued_tokens(self) -> int:
        """Estimated tokens of the unanswered requests."""
        return sum(self._sent.copy().values())

    @property
    def num_queued_requests(self) -> int:
        return len(self._sent)

    @property
    def max_batch_tokens(self) -> int:
        return self.info.max_batch_tokens

    @property
    def tokens_per_second(self) -> None:
        """Unknown here; only the replicas measure it."""

    def retry_after(self) -> float:
        """A constant number of seconds, because the replicas' speed is unknown here."""
        return 1.0

    def observe_batches(self, observer: Callable[[BatchReport], None]) -> None:
        """Does nothing: batches run in the replicas, and Ray's own metrics cover those."""

    def observe_failure(self, observer: Callable[[DeviceFailure], None]) -> None:
        """Does nothing: a replica whose GPU fails ends, and Ray starts another one."""

    def submit(
        self, request: RerankRequest, *, name: str | None = None, on_scored: OnScored | None = None
    ) -> Future[RerankResult]:
        """Send the request to a replica; the future resolves to its result or a LocalRerankError.

        `on_scored` gets all ranked documents at once, because a replica sends nothing before its result.
        Raises UnusableAfterFork in a forked child.
        """
        if self._is_in_child:
            raise UnusableAfterFork("a forked process cannot use its parent's connection to Ray's replicas")
        return asyncio.run_coroutine_threadsafe(self._rank(request, name, on_scored), self._loop)

    async def _rank(self, request: RerankRequest, name: str | None, on_scored: OnScored | None) -> RerankResult:
        num_tokens, number = estimate_tokens(request), next(self._ids)
        self._sent[number] = num_tokens
        try:
            result = await self._rank_with_retries(request, num_tokens, name)
            if on_scored is not None:
                on_scored(list(result))
            return result
        finally:
            del self._sent[number]

    async def _rank_with_retries(self, request: RerankRequest, num_tokens: int, name: str | None) -> RerankResult:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            answer = await self._rank_once(request, num_tokens, name)
            if isinstance(answer, RerankResult):
                return answer
            if not isinstance(answer, ModelUnavailable):
                raise answer
            logger.warning("attempt %d of %d: %s", attempt, MAX_ATTEMPTS, answer)
        raise EngineFailure(f"{MAX_ATTEMPTS} replicas died while they scored this request")

    async def _rank_once(
        self, request: RerankRequest, num_tokens: int, name: str | None
    ) -> RerankResult | LocalRerankError:
        """One replica's answer, or ModelUnavailable if the replica died. Waits while there is no replica."""
        response = self._handle.rank.remote(request, num_tokens=num_tokens, name=name)
        try:
            answer: RerankResult | LocalRerankError = await response
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]  # Ray's own
            raise
        except ray.exceptions.RayTaskError as error:
            logger.exception("a replica failed")
            return EngineFailure(f"a replica failed: {type(error.cause).__name__}: {error.cause}")
        except (RayError, RayServeException) as error:
            return ModelUnavailable(f"the replica died: {type(error).__name__}")
        return answer

    def close(self) -> None:
        """Stop sending requests; leaves the replicas running."""
        if self._is_in_child:  # the loop's descriptors belong to the parent
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def start_replicas(configs: Sequence[EngineConfig], server_config: ServerConfig) -> list[RemoteReranker]:
    """Replicas of each model, on the cluster at RAY_ADDRESS or on one that is started here. The first is closed last.

    Raises ConfigError if Ray is not installed or has too few resources, CheckpointError if a model cannot be loaded.
    """
    started_ray = ray_cluster.connect()
    with contextlib.ExitStack() as started:
        rankers: list[RemoteReranker] = []
        for config in configs:
            rankers.append(
                ReplicaReranker(
                    config, server_config, num_models=len(configs), started_ray=started_ray, is_first=not rankers
                )
            )
            started.callback(rankers[-1].close)
        started.pop_all()
    return rankers


class ReplicaReranker(RemoteReranker):
    """A RemoteReranker that starts its replicas and stops them; the first one then leaves Ray, or ends it."""

    def __init__(
        self, config: EngineConfig, server_config: ServerConfig, *, num_models: int, started_ray: bool, is_first: bool
    ) -> None:
        self._leaves_ray, self._ends_ray = is_first, is_first and started_ray
        self._name = f"local-rerank-{uuid.uuid4().hex[:8]}"
        try:
            handle, info = _start(self._name, config, server_config, num_models=num_models, may_grow=not started_ray)
            super().__init__(handle, info, config)
        except BaseException:
            self._stop()
            raise

    def close(self) -> None:
        super().close()
        if not self._is_in_child:
            self._stop()

    def _stop(self) -> None:
        with contextlib.suppress(Exception):  # the process is ending, and what remains ends with Ray
            serve.delete(self._name)
            if self._ends_ray:
                serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's own
        if self._leaves_ray:
            ray.shutdown()


def _start(
    name: str, config: EngineConfig, server_config: ServerConfig, *, num_models: int, may_grow: bool
) -> tuple[DeploymentHandle[object], ModelInfo]:
    from local_rerank_server.ray_serve.replica import engine_application

    serve.start(proxy_location="Disabled", logging_config=LOGGING)  # HTTP goes through our own server
    application = engine_application(config, server_config, num_models=num_models, may_grow=may_grow)
    try:
        handle = serve.run(application, name=name, route_prefix=None, logging_config=LOGGING)
        info: ModelInfo = handle.info.remote().result()
    except (RuntimeError, RayError, RayServeException) as error:
        raise CheckpointError(f"no replica can load the model: {_reason(name, error)}") from error
    return handle, info


def _reason(name: str, error: Exception) -> str:
    """The replicas' error message without traceback."""
    application = serve.status().applications.get(name)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    errors = re.findall(r"(?:CheckpointError|ConfigError|\w+Error): (.+)", "\n".join([*messages, str(error)]))
    return errors[-1] if errors else str(error)
