"""One model of a server: its names, its state, and the loaded model while there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Literal, Protocol

from local_rerank.errors import ModelUnavailable
from local_rerank.models.options import ModelOptions

if TYPE_CHECKING:
    from local_rerank.config import EngineConfig
    from local_rerank.errors import DeviceFailure
    from local_rerank.requests.pending import OnScored
    from local_rerank.requests.worker import BatchReport
    from local_rerank.types import ModelInfo, RerankRequest, RerankResult

State = Literal["on demand", "loading", "loaded", "failed"]


class Ranker(Protocol):
    """What a server needs from a `Reranker`; `RemoteReranker` implements it with replicas in other processes."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def model_id(self) -> str: ...

    @property
    def info(self) -> ModelInfo: ...

    @property
    def num_queued_tokens(self) -> int: ...

    @property
    def num_queued_requests(self) -> int: ...

    @property
    def max_batch_tokens(self) -> int: ...

    @property
    def tokens_per_second(self) -> float | None: ...

    def retry_after(self) -> float: ...

    def observe_batches(self, observer: Callable[[BatchReport], None]) -> None: ...

    def observe_failure(self, observer: Callable[[DeviceFailure], None]) -> None: ...

    def submit(
        self, request: RerankRequest, *, name: str | None = None, on_scored: OnScored | None = None
    ) -> Future[RerankResult]: ...

    def close(self) -> None: ...


class Loader(Protocol):
    """What a ModelSet needs from `loader.EngineLoader`, which says what each does."""

    def inspect(self, config: EngineConfig) -> tuple[str, str, int]: ...

    def load(self, config: EngineConfig) -> tuple[Ranker, int]: ...

    def available_bytes(self, device: str) -> int: ...

    def is_out_of_memory(self, error: Exception) -> bool: ...

    def release_memory(self) -> None: ...


class ServedModel:
    """Changed by the `ModelSet` that it belongs to, under its lock. The attributes without underscore may be read."""

    def __init__(self, options: ModelOptions) -> None:
        self.options = options
        self.name = options.name or options.engine.model or ""  # in the end that of the checkpoint, if it has no other
        self.model_id = self.name  # that of the checkpoint, when known
        self.device = ""
        self.needed_bytes = 0  # to load it, for its weights and a batch; 0: not known
        self.num_bytes = 0  # of its weights while it is loaded; models take turns with the memory of a batch
        self.info: ModelInfo | None = None  # of the last load
        self.ranker: Ranker | None = None
        self.error: str | None = None  # of the last load
        self.retry_at = 0.0  # time.monotonic() from when on a request loads it again after an error
        self.last_used: float | None = None  # seconds since 1970
        self.idle_since = 0.0  # time.monotonic()
        self.num_users = 0  # requests that use `ranker`
        self.is_loading = False  # or waits for that
        self.is_leaving = False  # no request may start to use `ranker`, which is unloaded after the last one
        self.loads: list[Future[Ranker]] = []  # of those that wait until it is loaded
        self.unloads: list[Future[None]] = []  # ... until it is unloaded

    @property
    def is_spread(self) -> bool:
        """Whether the model is split over several devices, of which `device` is one."""
        return self.options.engine.device_map is not None

    @property
    def state(self) -> State:
        if self.ranker is not None:
            return "loaded"
        if self.is_loading:
            return "loading"
        return "on demand" if self.error is None else "failed"

    def unavailable(self) -> ModelUnavailable:
        """The error of requests after a failed load, until a later one may try again."""
        what = f"model {self.name} cannot be loaded: {self.error}"
        return ModelUnavailable(what, retry_after=self.retry_at - time.monotonic())

    @property
    def seconds_to_load(self) -> float:
        """What the last load took, or what a disk of 250 MB/s takes for the weights."""
        return self.info.load_seconds if self.info else self.needed_bytes / 250e6

    @property
    def known_info(self) -> ModelInfo:
        """What the last load said about the model. Raises ModelUnavailable before the first one."""
        if self.info is None:
            raise ModelUnavailable("the model is still loading")
        return self.info


def in_the_way(models: Sequence[ServedModel], model: ServedModel, *, anywhere: bool) -> list[ServedModel]:
    """Loaded models that can make room for another on its device, or `anywhere`, in the order in which they go.

    That which was used least recently is first; those in use are last.
    """
    loaded = [each for each in models if each.ranker is not None and not each.options.pinned]
    there = [each for each in loaded if anywhere or each.device == model.device or each.is_spread or model.is_spread]
    return sorted(there, key=lambda each: (each.num_users > 0, each.idle_since))
