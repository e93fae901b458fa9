"""When the next batch is launched behind a running one. The clock and the device are the test's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import pytest

from local_rerank.requests.launches import AHEAD_SECONDS, Launches
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


def test_the_next_batch_is_launched_5_ms_before_the_running_one_is_done(device: Device) -> None:
    launches = device.launches
    assert launches.seconds_to_next() == 0, "an idle device gets its batch at once"
    device.start(100)
    device.finish(0.1)  # 1,000 tokens per second
    assert launches.seconds_to_next() == 0
    launches.take()
    device.now = 0.5
    device.start(200)
    assert launches.seconds_to_next() == pytest.approx(0.2 - AHEAD_SECONDS)
    device.now = 0.5 + 0.2 - AHEAD_SECONDS - 0.001
    assert launches.seconds_to_next() == pytest.approx(0.001)
    device.now += 0.001 + 1e-9
    assert launches.seconds_to_next() == 0
    device.start(100)
    assert launches.seconds_to_next() is None, "a third batch would only keep its requests from better ones"
    device.finish(0.7)
    assert launches.seconds_to_next() is None, "results are delivered before more is launched"
    launches.take()
    assert launches.seconds_to_next() == pytest.approx(0.1 - AHEAD_SECONDS), "it starts when the one before it is done"


def test_a_batch_that_takes_less_than_5_ms_never_delays_the_next(device: Device) -> None:
    device.start(100)
    device.finish(0.004)
    device.launches.take()
    device.start(100)
    assert device.launches.seconds_to_next() == 0


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
    assert device.launches.seconds_to_next() == 0
    assert device.launches.take().outcome == [0.0]
    device.start(1000)
    device.finish(1.6, failure := RuntimeError("a kernel failed"))
    assert device.launches.seconds_to_next() == 0
    assert device.launches.take().outcome is failure


def test_waiting_for_a_device_takes_no_processor_time(device: Device) -> None:
    device.start(100)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
    device.finish(1.0)
    device.launches.close()
