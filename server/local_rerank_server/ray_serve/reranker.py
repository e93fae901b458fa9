"""`RemoteReranker`: a Reranker's `submit`, answered by the replicas of a Ray Serve deployment.

The server cannot tell it from a `Reranker`: errors are the leaves of the same tree, and cancelling a future takes the
request out of its replica's queue. A request whose replica dies goes to another one; scoring has no side effects.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from local_rerank import forks
from local_rerank.batch import ray_cluster
from local_rerank.config import EngineConfig
from local_rerank.errors import CheckpointError, EngineFailure, LocalRerankError, ModelUnavailable, UnusableAfterFork
from local_rerank.requests.worker import BatchReport
from local_rerank.types import ModelInfo, RerankRequest, RerankResult
from local_rerank_server.config import ServerConfig
from local_rerank_server.ray_serve.routing import estimate_tokens

MAX_ATTEMPTS = 3  # a request that kills every engine it meets must not go round all of them
QUIET = {"log_level": "WARNING", "enable_access_log": False}

logger = logging.getLogger(__name__)
logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what it starts and stops is told in our own words


class RemoteReranker:
    """Sends requests to a deployment of `EngineReplica` through its handle."""

    def __init__(self, handle: DeploymentHandle[object], info: ModelInfo, config: EngineConfig) -> None:
        self.info = info
        self.config = config
        self._handle = handle
        self._sent: dict[int, int] = {}  # estimated tokens of the requests that are not answered yet
        self._ids = itertools.count()
        self._is_in_child = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="replicas", daemon=True)
        self._thread.start()
        forks.renew_in_child(self)

    def renew(self) -> None:
        """The connection to Ray, and the loop, stay the parent's."""
        self._is_in_child = True

    @property
    def model_id(self) -> str:
        return self.info.model_id

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that were sent to replicas and are not answered, as the router estimates them."""
        return sum(self._sent.copy().values())

    @property
    def num_queued_requests(self) -> int:
        return len(self._sent)

    @property
    def max_batch_tokens(self) -> int:
        return self.info.max_batch_tokens

    @property
    def tokens_per_second(self) -> None:
        """Only the replicas know."""

    def retry_after(self) -> float:
        """Seconds; how fast the replicas work their queues off is not known here."""
        return 1.0

    def observe_batches(self, observer: Callable[[BatchReport], None]) -> None:
        """Batches run in the replicas, which Ray's own metrics tell of: nothing is reported here."""

    def submit(self, request: RerankRequest, *, name: str | None = None) -> Future[RerankResult]:
        """Send the request on; the future has its result, or fails with a LocalRerankError.

        Raises UnusableAfterFork.
        """
        if self._is_in_child:
            raise UnusableAfterFork("the model is in Ray's replicas, whose connection a forked process cannot use")
        return asyncio.run_coroutine_threadsafe(self._rank(request, name), self._loop)

    async def _rank(self, request: RerankRequest, name: str | None) -> RerankResult:
        num_tokens, place = estimate_tokens(request), next(self._ids)
        self._sent[place] = num_tokens
        try:
            return await self._ask_in_turn(request, num_tokens, name)
        finally:
            del self._sent[place]

    async def _ask_in_turn(self, request: RerankRequest, num_tokens: int, name: str | None) -> RerankResult:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            answer = await self._ask_one(request, num_tokens, name)
            if isinstance(answer, RerankResult):
                return answer
            if not isinstance(answer, ModelUnavailable):
                raise answer
            logger.warning("attempt %d of %d: %s", attempt, MAX_ATTEMPTS, answer)
        raise EngineFailure(f"{MAX_ATTEMPTS} replicas in turn were lost while they scored this request")

    async def _ask_one(
        self, request: RerankRequest, num_tokens: int, name: str | None
    ) -> RerankResult | LocalRerankError:
        """One replica's answer; ModelUnavailable where it was lost. Waits while there is none."""
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
            return ModelUnavailable(f"the replica was lost: {type(error).__name__}")
        return answer

    def close(self) -> None:
        """Stop sending; the replicas are not touched."""
        if self._is_in_child:  # the loop's descriptors are the parent's too
            return
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
            handle, info = _run(self._name, config, server_config, may_grow=not self._started_ray)
            super().__init__(handle, info, config)
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        super().close()
        if not self._is_in_child:
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
