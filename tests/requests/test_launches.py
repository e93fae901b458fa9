"""How many batches are launched, and who waits for them. The clock and the device are the test's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import pytest

from local_rerank.requests.launches import Launches
from local_rerank.requests.pair import Pair
from local_rerank.requests.scheduler import Entry


class Device:
    """Its clock stands still until a test sets `now`; it computes a batch when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.computed: SimpleQueue[Exception | None] = SimpleQueue()
        self.changed = threading.Condition()
        self.launches = Launches(self.launch, self.changed, lambda: self.now)

    def launch(self, pairs: Sequence[Pair]) -> Callable[[], list[float]]:
        def fetch() -> list[float]:
            if error := self.computed.get():
                raise error
            return [0.0 for _ in pairs]

        return fetch

    def start(self, num_tokens: int) -> None:
        self.launches.launch([Entry(0, 0, Pair.of((), (1,) * num_tokens))])

    def finish(self, now: float, error: Exception | None = None) -> None:
        """Compute the first batch until `now`, and wait for the thread that fetches it."""
        self.now = now
        self.computed.put(error)
        with self.changed:
            assert self.changed.wait_for(lambda: self.launches.is_first_done, timeout=10)


@pytest.fixture
def device() -> Device:
    return Device()


def test_one_batch_is_launched_behind_the_running_one(device: Device) -> None:
    launches = device.launches
    device.start(100)
    assert launches.has_room
    device.start(200)
    assert not launches.has_room, "a third batch would only keep its requests from better ones"
    device.finish(0.1)
    assert not launches.has_room, "results are delivered before more is launched"
    launches.take()
    assert launches.has_room
    device.finish(0.2)


def test_a_batch_of_no_time_is_waited_for_by_the_thread_that_launched_it(device: Device) -> None:
    device.start(100)
    device.finish(0.0001)
    device.launches.take()
    device.start(100)
    assert device.launches.is_first_done
    device.computed.put(None)
    assert device.launches.take().outcome == [0.0]


def test_a_batch_that_only_seemed_to_take_no_time_is_waited_for_and_corrects_the_estimate(device: Device) -> None:
    device.start(100)
    device.finish(0.0001)
    device.launches.take()
    for takes_long in (False, True):
        device.start(100)
        assert device.launches.is_first_done == (not takes_long)
        device.now += 5.0
        device.computed.put(failure := RuntimeError("a kernel failed") if takes_long else None)
        assert device.launches.take().outcome == (failure or [0.0])


def test_a_small_batch_after_a_large_one_is_not_expected_to_take_no_time(device: Device) -> None:
    """A GPU takes milliseconds for any; the thread that launches would not launch the next one meanwhile."""
    device.start(10_000)
    device.finish(0.01)  # a million tokens per second
    device.launches.take()
    device.start(100)
    assert not device.launches.is_first_done
    device.finish(0.013)


def test_a_batch_that_is_done_early_or_fails_is_not_waited_for(device: Device) -> None:
    device.start(100)
    device.finish(1.0)
    device.launches.take()
    device.start(1000)  # 10 s, it seems
    device.finish(1.5)
    assert device.launches.take().outcome == [0.0]
    device.start(1000)
    device.finish(1.6, failure := RuntimeError("a kernel failed"))
    assert device.launches.take().outcome is failure


def test_waiting_for_a_device_takes_no_processor_time(device: Device) -> None:
    device.start(100)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
    device.finish(1.0)
    device.launches.close()


def test_closing_ends_the_thread_which_refers_to_the_model() -> None:
    """Else an unloaded model keeps its memory until Python's next collection after the thread's end."""
    before = {*threading.enumerate()}
    device = Device()
    (thread,) = {*threading.enumerate()} - before
    device.start(100)
    threading.Timer(0.05, device.computed.put, [None]).start()
    device.launches.close()
    assert not thread.is_alive()
