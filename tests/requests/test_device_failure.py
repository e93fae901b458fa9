"""The worker after an error of the device: it goes on if the device still computes, and ends if it does not."""

from __future__ import annotations

import logging

import pytest

from local_rerank.errors import DeviceFailure, EngineFailure
from local_rerank.requests.worker import Worker
from tests.requests.test_worker import FAILING, CountedEngine, Gpu, pending, submit


@pytest.mark.parametrize("gpu", [None, Gpu(), Gpu(computes_at_launch=True)], ids=["cpu", "gpu", "gpu fails at launch"])
def test_a_device_that_fails_for_good_fails_every_request_and_is_left_alone(
    gpu: Gpu | None, caplog: pytest.LogCaptureFixture
) -> None:
    engine = gpu or CountedEngine()
    engine.gate.clear()
    worker = Worker(
        engine.score,
        max_batch_tokens=200,
        max_queued_tokens=5000,
        launch=None if gpu is None else gpu.launch,
        device="cuda:0",
        is_alive=lambda: False,
    )
    requests = [pending(number, 10, FAILING, name=str(number)) for number in range(6)]
    told: list[tuple[str, int]] = []
    worker.on_failure = lambda failure: told.append((str(failure), sum(request.future.done() for request in requests)))
    submit(worker, *requests)
    assert requests[5].future.cancel()
    engine.gate.set()
    says = "cuda:0 failed: RuntimeError: a kernel failed; this process cannot use the device again, start a new one"
    for request in requests[:5]:
        with pytest.raises(DeviceFailure) as caught:
            request.future.result(10)
        assert str(caught.value) == says
    assert told == [(says, 1)], "before the requests fail, so that a server is not ready any more when they do"
    num_passes = len(engine.num_tokens)
    for _ in ("open", "closed"):
        with pytest.raises(DeviceFailure):
            worker.check_room()
        with pytest.raises(DeviceFailure):
            worker.submit(pending(1, 10))
        worker.close()
    assert worker.num_queued_requests == worker.num_queued_tokens == 0
    assert len(engine.num_tokens) == num_passes <= 3, "launched, tried once on its own, and one launched behind it"
    (record,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert record.getMessage().startswith(f"{says}; requests: 0"), "those of the batch that failed"
    assert record.exc_info is None, "one line"


def test_errors_of_a_retry_do_not_refer_to_the_first_one(caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise they would be taken for a lack of memory, which is looked for in the contexts of an error."""
    engine = CountedEngine()
    engine.memory = 200
    worker = Worker(engine.score, max_batch_tokens=2048, max_queued_tokens=5000)
    submit(worker, bad := pending(1, *range(10, 20), FAILING))
    with pytest.raises(EngineFailure, match="a kernel failed"):
        bad.future.result(10)
    worker.close()
    (record,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert record.exc_info is not None
    assert record.exc_info[1] is not None
    assert record.exc_info[1].__context__ is None
