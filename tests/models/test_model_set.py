"""ModelSet: what is loaded and unloaded when, with a loader that holds loads; and the memory of real loads."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from local_rerank import EngineConfig, Reranker, RerankRequest
from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.engine.plan import make_plan
from local_rerank.errors import CheckpointError, ConfigError, ModelUnavailable
from local_rerank.models.loader import EngineLoader
from local_rerank.models.model_set import RETRY_SECONDS, ModelSet
from local_rerank.models.options import ModelOptions, models_of, seconds_of
from local_rerank.models.room import needed_bytes
from tests.serving import until

WAIT = 10


class HeldLoader:
    """Models of one byte each. `errors` are raised by name; a load waits until `go_on` is set."""

    def __init__(self) -> None:
        self.errors: dict[str, Exception] = {}
        self.log: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def inspect(self, config: EngineConfig) -> tuple[str, str, int]:
        return str(config.model), "cpu", 1

    def load(self, config: EngineConfig) -> tuple[Any, int]:
        self.log.append(f"load {config.model}")
        assert self.go_on.wait(WAIT)
        if error := self.errors.get(str(config.model)):
            raise error
        close = lambda: self.log.append(f"close {config.model}")  # noqa: E731
        return SimpleNamespace(config=config, model_id=config.model, info=None, close=close), 1

    def available_bytes(self, device: str) -> int:
        return 1000

    def is_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)

    def release_memory(self) -> None:
        pass


def model_set(loader: HeldLoader, *names: str, pinned: str = "", **options: Any) -> ModelSet:
    models = [ModelOptions(engine=EngineConfig(model=name), pinned=name == pinned) for name in names]
    made = ModelSet(models, loader, **options)
    made.start()
    return made


def use(models: ModelSet, name: str) -> None:
    """A request from its start to its end."""
    model = models.find(name)
    if models.acquire(model) is None:
        models.load(model).result(WAIT)
    models.release(model)


def loaded(models: ModelSet) -> str:
    return "".join(model.name for model in models.models if model.state == "loaded")


def test_the_least_recently_used_model_goes_and_a_pinned_one_never() -> None:
    models = model_set(loader := HeldLoader(), "a", "b", "c", "d", max_bytes=3, pinned="b")
    assert loaded(models) == "ab", "the default one and those that are pinned"
    use(models, "c")
    use(models, "a")
    use(models, "d")
    assert loaded(models) == "abd", "a was used after c, and b is pinned"
    use(models, "c")
    assert loader.log[-2:] == ["close a", "load c"]
    models.close()
    assert sorted(loader.log[-3:]) == ["close b", "close c", "close d"]


def test_a_model_in_use_is_unloaded_after_its_requests_and_later_ones_wait() -> None:
    models = model_set(loader := HeldLoader(), "a", "b", max_bytes=1)
    a, b = models.models
    assert models.acquire(a)
    waiting = models.load(b)
    until(lambda: a.is_leaving)
    assert models.acquire(a) is None
    later = models.load(a)
    assert not waiting.done()
    assert loader.log == ["load a"]
    models.release(a)
    waiting.result(WAIT)
    assert not later.done(), "b has work"
    models.release(b)
    later.result(WAIT)
    assert loader.log == ["load a", "close a", "load b", "close b", "load a"]


def test_a_model_that_waits_for_its_requests_to_end_keeps_no_other_from_being_loaded() -> None:
    models = model_set(HeldLoader(), "a", "b")
    a, b = models.models
    assert models.acquire(a)
    unloading = models.unload(a)
    models.load(b).result(WAIT)
    later = models.load(a)
    assert not unloading.done()
    models.release(a)
    unloading.result(WAIT)
    later.result(WAIT)


def test_an_idle_model_is_unloaded_after_the_time_that_it_may_be_kept() -> None:
    models = model_set(HeldLoader(), "a", "b", keep_alive_seconds=0.2, pinned="b")
    start = time.monotonic()
    assert models.acquire(models.default)
    time.sleep(0.4)
    models.release(models.default)
    assert loaded(models) == "ab", "it was in use"
    until(lambda: loaded(models) == "b")
    assert time.monotonic() - start > 0.5
    use(models, "a")
    assert loaded(models) == "ab"


def test_a_failed_load_is_reported_and_may_be_tried_again() -> None:
    models = model_set(loader := HeldLoader(), "a", "b")
    b = models.models[1]
    loader.errors["b"] = CheckpointError("its file is damaged")
    for _ in range(2):  # the second one is not loaded again so soon
        with pytest.raises(ModelUnavailable, match="model b cannot be loaded: its file is damaged") as failed:
            use(models, "b")
        assert 20 < (failed.value.retry_after or 0) <= RETRY_SECONDS
    assert (b.state, b.error, loader.log) == ("failed", "its file is damaged", ["load a", "load b"])
    use(models, "a")
    loader.errors.clear()
    models.load(b, again=True).result(WAIT)
    assert b.state == "loaded"


@pytest.mark.parametrize("helps", [True, False])
@pytest.mark.parametrize(("used", "unused"), ["ab", "ba"])
def test_a_load_that_runs_out_of_memory_is_tried_again_without_the_model_that_was_used_least_recently(
    used: str, unused: str, helps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = model_set(loader := HeldLoader(), "a", "b", "c", "p", pinned="p")
    for name in ("a", "b", used):
        use(models, name)
    loader.log.clear()
    loader.errors["c"] = MemoryError("CUDA out of memory")
    if helps:
        monkeypatch.setattr(loader, "release_memory", loader.errors.clear)
        use(models, "c")
    else:
        with pytest.raises(ModelUnavailable, match="model c cannot be loaded: CUDA out of memory"):
            use(models, "c")
    assert loader.log == ["load c", f"close {unused}", "load c", *([] if helps else [f"close {used}", "load c"])]
    assert loaded(models) == (f"{used}c" if helps else "") + "p"


def test_a_load_is_not_repeated_if_that_cannot_help() -> None:
    models = model_set(loader := HeldLoader(), "p", "b", pinned="p")
    loader.errors["b"] = CheckpointError("its file is damaged")
    with pytest.raises(ModelUnavailable):
        use(models, "b")
    loader.errors["b"] = MemoryError("CUDA out of memory")
    use(models, "p")
    with pytest.raises(ModelUnavailable):
        models.load(models.models[1], again=True).result(WAIT)
    assert (loaded(models), loader.log) == ("p", ["load p", "load b", "load b"])


def test_one_load_serves_all_that_wait_and_who_left_holds_nothing() -> None:
    models = model_set(loader := HeldLoader(), "a", "b")
    loader.go_on.clear()
    waiting = [models.load(models.models[1]) for _ in range(3)]
    assert waiting[0].cancel()
    loader.go_on.set()
    assert waiting[1].result(WAIT) is waiting[2].result(WAIT)
    assert (models.models[1].num_users, loader.log) == (2, ["load a", "load b"])
    models.release(models.models[1])
    done = models.unload(models.models[1])
    assert not done.done()
    models.release_unused(models.models[1], waiting[2])
    done.result(WAIT)
    assert loaded(models) == "a"


def test_closing_ends_the_wait_for_a_load() -> None:
    models = model_set(loader := HeldLoader(), "a", "b")
    loader.go_on.clear()
    waiting: Future[Any] = models.load(models.models[1])
    until(lambda: loader.log[-1] == "load b")
    models.close()
    with pytest.raises(ModelUnavailable, match="stopping"):
        waiting.result(WAIT)
    loader.go_on.set()
    until(lambda: loader.log[-1] == "close b")


def test_names_are_unique_and_a_model_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="two models are named a; give one of them another name"):
        model_set(HeldLoader(), "a", "a")
    for names in ("ab", "ba"):
        models = [ModelOptions(engine=EngineConfig(model=each), aliases=("b",) * (each == "a")) for each in names]
        with pytest.raises(ConfigError, match=f"alias b is a name of two models, {names[0]} and {names[1]};"):
            ModelSet(models, HeldLoader()).start()
    with pytest.raises(ConfigError, match="model a is given twice"):
        models_of(["a", "a"], EngineConfig())
    loader = HeldLoader()
    with pytest.raises(ConfigError, match="model a needs 1 bytes on cpu, but 0 bytes are free"):
        model_set(loader, "a", "b", max_bytes=0)
    for option in ("", "10", "1d", "-1s"):
        with pytest.raises(ConfigError, match="it must be a time such as"):
            seconds_of(option, several=True)


def test_ten_loads_leave_no_memory_behind_and_the_estimate_holds(tiny_checkpoint: Path) -> None:
    loader, process = EngineLoader(self_test=False), psutil.Process()
    config = EngineConfig(model=str(tiny_checkpoint), device="cpu", dtype="fp32")
    request = RerankRequest(query="q", documents=("d",) * 20)
    sizes: list[int] = []
    collected: list[Callable[[], object]] = []
    for _ in range(11):
        reranker, num_bytes = loader.load(config)
        assert isinstance(reranker, Reranker)
        assert num_bytes < needed_bytes(make_plan(config, open_checkpoint(config.model)))
        reranker.submit(request).result(WAIT)
        reranker.close()
        collected.append(weakref.ref(reranker.engine.decoder))
        del reranker
        loader.release_memory()
        sizes.append(process.memory_info().rss)
    assert [each() for each in collected] == [None] * 11
    assert sizes[-1] - sizes[1] < 100e6


def test_a_failed_self_test_leaves_no_thread_behind_which_would_keep_the_weights(tiny_checkpoint: Path) -> None:
    config = EngineConfig(model=str(tiny_checkpoint), device="cpu", dtype="fp32", max_query_tokens=1)
    before = {*threading.enumerate()}
    with pytest.raises(ConfigError, match="the configured limits truncate the self-test's pairs"):
        EngineLoader(self_test=True).load(config)
    assert "local-rerank-engine" not in {thread.name for thread in {*threading.enumerate()} - before}
