"""The models of one process: loaded at their first request, and unloaded when idle or when another needs the room.

One thread loads and unloads, one model after the other. A model that is loaded is used between `acquire` and `release`,
and is never unloaded in between. If there is no room, the model that was used least recently goes first; if all are in
use, the one that was used least recently finishes its requests and then goes, and later requests for it wait until it
is loaded again. This module imports no torch: a `Loader` loads.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import cast

from local_rerank import forks
from local_rerank.checkpoints.free_space import gigabytes
from local_rerank.errors import CheckpointError, ConfigError, LocalRerankError, ModelUnavailable
from local_rerank.models.options import ModelOptions
from local_rerank.models.served import Loader, Ranker, ServedModel, in_the_way

RETRY_SECONDS = 30.0  # after a failed load requests fail that long before one loads again; a damaged file stays so

logger = logging.getLogger(__name__)

OnLoad = Callable[[ServedModel, Ranker], None]
"""Called in the loading thread with a loaded model, before it is used."""


class ModelSet:
    """Any number of threads may call its methods."""

    def __init__(
        self,
        options: Sequence[ModelOptions],
        loader: Loader,
        *,
        aliases: Sequence[str] = (),
        keep_alive_seconds: float | None = None,
        max_bytes: int | None = None,
        on_load: OnLoad = lambda model, ranker: None,
    ) -> None:
        """`aliases`: names of the default model, which is the first, unless another model has them.

        `keep_alive_seconds`: after how long without a request a model is unloaded; None: never. `max_bytes`: of all
        loaded models together.
        """
        self.models = [ServedModel(each) for each in options]
        self.aliases = aliases
        self._loader = loader
        self._keep_alive = keep_alive_seconds
        self._max_bytes = max_bytes
        self._counts_room = len(options) > 1 or max_bytes is not None
        self._on_load = on_load
        self.by_name: dict[str, ServedModel] = {}  # names first, then aliases
        self._is_started = self._closing = False
        self._set_up()
        forks.renew_in_child(self)

    def _set_up(self) -> None:
        self._changed = threading.Condition()  # guards the models and what follows
        self._wanted: deque[ServedModel] = deque()  # to be loaded, in this order
        self._thread: threading.Thread | None = None

    def renew(self) -> None:
        """In a forked child, whose parent answers the requests."""
        self._set_up()
        for model in self.models:
            model.num_users, model.is_loading, model.is_leaving = 0, False, False
            model.loads, model.unloads = [], []

    @classmethod
    def of(
        cls, *rankers: Ranker, options: Sequence[ModelOptions] = (), aliases: Sequence[str], on_load: OnLoad
    ) -> ModelSet:
        """A set of models that are loaded and stay so; without `options` they have the names of their checkpoints."""
        known = options or [ModelOptions(engine=ranker.config, name=ranker.model_id) for ranker in rankers]
        pinned = [replace(each, pinned=True) for each in known]
        models = cls(pinned, cast(Loader, None), aliases=aliases, on_load=on_load)
        for model, ranker in zip(models.models, rankers, strict=True):
            models._add(model, ranker, 0)
        models._name()
        return models

    @property
    def default(self) -> ServedModel:
        return self.models[0]

    @property
    def is_loading(self) -> bool:
        return any(model.is_loading for model in self.models)

    def find(self, name: str | None) -> ServedModel:
        """The model of a name, or the default one."""
        return self.by_name.get(name or "", self.default)

    def start(self) -> None:
        """Inspect all models; load the default one, and those that are pinned.

        Raises CheckpointError for the default one; another one has failed then. Raises ConfigError for each.
        """
        for model in self.models if self._counts_room else ():
            self._load_or_fail(model, self._inspect)
        self._name()
        for model in self.models:
            if (model is self.default or model.options.pinned) and model.error is None:
                self._load_or_fail(model)
        self._name()  # one model was not inspected
        self._is_started = True

    def _load_or_fail(self, model: ServedModel, step: Callable[[ServedModel], None] | None = None) -> None:
        try:
            return (step or self._load)(model)
        except Exception as error:
            if not self._is_started and (model is self.default or isinstance(error, ConfigError)):
                raise
            self._fail(model, error)
        self._loader.release_memory()  # here, because the traceback refers to what was loaded

    def _inspect(self, model: ServedModel) -> None:
        model.model_id, model.device, model.needed_bytes = self._loader.inspect(model.options.engine)
        model.name = model.options.name or model.model_id
        if (free := self._free_bytes(model)) < model.needed_bytes:
            what = f"model {model.name} needs {gigabytes(model.needed_bytes)} on {model.device}"
            raise ConfigError(
                f"{what}, but {gigabytes(free)} are free; choose a smaller model, dtype or max_batch_tokens"
            )

    def _name(self) -> None:
        """Collect the names. Raises ConfigError for a name of two models."""
        names: dict[str, ServedModel] = {}
        for model in self.models:
            for name in (model.name, *model.options.aliases):
                if (other := names.setdefault(name, model)) is not model:
                    if other.name == model.name:
                        raise ConfigError(f"two models are named {name}; give one of them another name, NAME=MODEL")
                    what = f"alias {name} is a name of two models, {other.name} and {model.name}"
                    raise ConfigError(f"{what}; remove that alias of one of them")
        for alias in self.aliases:
            names.setdefault(alias, self.default)
        self.by_name = names

    def acquire(self, model: ServedModel) -> Ranker | None:
        """The loaded model, to be used until `release`. None if it must be loaded first, with `load`."""
        with self._changed:
            if model.ranker is None or model.is_leaving:
                return None
            model.num_users += 1
            return model.ranker

    def release(self, model: ServedModel) -> None:
        """Say that a request no longer uses the model that `acquire` or `load` gave it."""
        with self._changed:
            model.num_users -= 1
            model.last_used, model.idle_since = time.time(), time.monotonic()
            if model.is_leaving and not model.num_users:
                self._changed.notify_all()

    def release_unused(self, model: ServedModel, loading: Future[Ranker]) -> None:
        """Release what `load` gave, for a caller that no longer waits for it."""
        if not loading.cancelled() and loading.exception() is None:
            self.release(model)

    def load(self, model: ServedModel, *, again: bool = False) -> Future[Ranker]:
        """Have the model loaded. The result is to be used until `release`; who cancels the future need not release.

        Raises ModelUnavailable, also for RETRY_SECONDS after a failed load unless `again`.
        """
        future: Future[Ranker] = Future()
        with self._changed:
            if self._closing:
                raise ModelUnavailable("the server is stopping")
            if model.ranker is not None and not model.is_leaving:
                model.num_users += 1
                future.set_result(model.ranker)
                return future
            if model.error is not None and not again and time.monotonic() < model.retry_at:
                raise model.unavailable()
            model.loads = [*(each for each in model.loads if not each.cancelled()), future]
            if not model.is_loading:
                model.is_loading = True
                self._wanted.append(model)
                self._wake()
        return future

    def unload(self, model: ServedModel) -> Future[None]:
        """Have the model unloaded as soon as its requests are answered."""
        future: Future[None] = Future()
        with self._changed:
            if model.ranker is None or self._closing:
                future.set_result(None)
            else:
                model.is_leaving = True
                model.unloads.append(future)
                self._wake()
        return future

    def close(self) -> None:
        """Close all models. Those who wait for a load get ModelUnavailable; a running load goes on in its thread."""
        with self._changed:
            self._closing = True
            waiting = [future for model in self.models for future in model.loads]
            for model in self.models:
                model.loads, model.is_loading = [], model.is_loading and model not in self._wanted
            self._changed.notify_all()
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(ModelUnavailable("the server is stopping"))
        for model in reversed(self.models):  # the first one of several on Ray ends Ray
            if model.ranker is not None:
                model.ranker.close()

    def _wake(self) -> None:
        """Have the thread look for work; holds the lock."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="local-rerank-models", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                job()
            except Exception:  # a bug of ours: the other models go on
                logger.exception("the thread of the models failed")

    def _next_job(self) -> Callable[[], None] | None:
        """Wait until there is something to unload or to load; None when closing."""
        with self._changed:
            while not self._closing:
                now = time.monotonic()
                for model in self.models:
                    model.is_leaving |= self._seconds_left(model, now) <= 0
                for model in self.models:  # one in use does not keep others waiting: `release` tells when it is unused
                    if model.is_leaving and not model.num_users:
                        return partial(self._unload, model)
                for model in self._wanted:
                    if not model.is_leaving:
                        self._wanted.remove(model)
                        return partial(self._load_or_fail, model)
                left = min((self._seconds_left(model, now) for model in self.models), default=threading.TIMEOUT_MAX)
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            return None

    def _seconds_left(self, model: ServedModel, now: float) -> float:
        """Until the model has been idle for as long as it may; a model in use is looked at again after that time."""
        if self._keep_alive is None or model.options.pinned or model.ranker is None or model.is_leaving:
            return threading.TIMEOUT_MAX
        return self._keep_alive if model.num_users else model.idle_since + self._keep_alive - now

    def _load(self, model: ServedModel) -> None:
        if self._counts_room:
            if not model.needed_bytes:  # it could not be opened at the start
                _, model.device, model.needed_bytes = self._loader.inspect(model.options.engine)
            self._make_room(model)
        while True:  # memory may run out all the same: another model's batch or another process took some meanwhile
            try:
                return self._add(model, *self._loader.load(model.options.engine))
            except Exception as error:
                if not self._loader.is_out_of_memory(error):
                    raise
                logger.debug("memory ran out", exc_info=error)
                failure = CheckpointError(str(error) or type(error).__name__)
            self._loader.release_memory()  # outside the except block, because the traceback refers to what was loaded
            if not (others := self._in_the_way(model)):
                raise failure
            logger.warning("model %s: %s", model.name, failure)
            self._unload_for(model, others[0])

    def _add(self, model: ServedModel, ranker: Ranker, num_bytes: int) -> None:
        model.model_id = ranker.model_id
        if not self._is_started:  # else it keeps the name under which it could not be opened
            model.name = model.options.name or ranker.model_id
        self._on_load(model, ranker)
        with self._changed:
            if self._closing:
                ranker.close()
                return
            model.info, model.num_bytes, model.ranker, model.error = ranker.info, num_bytes, ranker, None
            model.idle_since, model.is_loading = time.monotonic(), False
            waiting, model.loads = model.loads, []
            for future in waiting:
                if future.set_running_or_notify_cancel():
                    model.num_users += 1
                    future.set_result(ranker)
            if self._keep_alive is not None:
                self._wake()

    def _fail(self, model: ServedModel, error: Exception) -> None:
        """Report a failed load: to the log, to those who wait, and in the model's state."""
        what = str(error) if isinstance(error, LocalRerankError) else f"{type(error).__name__}: {error}"
        logger.error("model %s cannot be loaded: %s", model.name, what)
        logger.debug("loading failed", exc_info=error)
        with self._changed:
            model.error, model.retry_at, model.is_loading = what, time.monotonic() + RETRY_SECONDS, False
            waiting, model.loads = model.loads, []
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(model.unavailable())

    def _free_bytes(self, model: ServedModel) -> int:
        # a model that is spread takes what is free on all GPUs, in RAM and on disk
        free = sys.maxsize if model.is_spread else self._loader.available_bytes(model.device)
        if self._max_bytes is None:
            return free
        return min(free, self._max_bytes - sum(model.num_bytes for model in self.models if model.ranker is not None))

    def _make_room(self, model: ServedModel) -> None:
        """Unload others until the model fits. Raises CheckpointError if it would not fit without them either."""
        while (free := self._free_bytes(model)) < model.needed_bytes:
            others = self._in_the_way(model, anywhere=self._max_bytes is not None)
            if free + sum(each.num_bytes for each in others) < model.needed_bytes:
                what = f"it needs {gigabytes(model.needed_bytes)} on {model.device}"
                raise CheckpointError(f"{what}, but {gigabytes(max(0, free))} are free beside the loaded models")
            self._unload_for(model, others[0])

    def _in_the_way(self, model: ServedModel, *, anywhere: bool = False) -> list[ServedModel]:
        with self._changed:
            return in_the_way(self.models, model, anywhere=anywhere)

    def _unload_for(self, model: ServedModel, other: ServedModel) -> None:
        logger.info("unloading %s to make room for %s", other.name, model.name)
        self._unload(other)
        if self._closing:
            raise ModelUnavailable("the server is stopping")

    def _unload(self, model: ServedModel) -> None:
        """Unload a model after its last request."""
        with self._changed:
            model.is_leaving = True
            self._changed.wait_for(lambda: not model.num_users or self._closing)
            if self._closing:
                return
            ranker, model.ranker, model.is_leaving = model.ranker, None, False
            done, model.unloads = model.unloads, []
        if ranker is not None:
            ranker.close()
            del ranker
            self._loader.release_memory()
            logger.info("unloaded %s", model.name)
        for unloading in done:
            if unloading.set_running_or_notify_cancel():
                unloading.set_result(None)
