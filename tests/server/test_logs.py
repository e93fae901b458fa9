"""Log formats, and which texts are logged."""

from __future__ import annotations

import json
import logging
import os
import sys

import pytest

from local_rerank.errors import ModelUnavailable
from local_rerank_server.config import ServerConfig
from local_rerank_server.logs import announce, make_formatter
from tests.server.conftest import HeldRanker, Serve

SECRET = "a secret"


def test_json_logs_have_the_fields_of_the_record() -> None:
    record = logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": "said %s", "args": ("é",), "status": 200})
    line = make_formatter(ServerConfig(log_format="json")).format(record)
    assert line.isascii(), "and so UTF-8, whatever the encoding of standard error"
    said = json.loads(line)
    assert (said["level"], said["logger"], said["message"], said["status"]) == ("INFO", "n", "said é", 200)
    assert "time" in said


@pytest.mark.anyio
async def test_texts_are_logged_only_with_log_texts(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for log_texts in (False, True):
        async with serve(HeldRanker(ModelUnavailable("no")), log_texts=log_texts) as client:
            await client.post("/v1/local/rank", json={"query": SECRET, "documents": [SECRET]})
        assert (SECRET in caplog.text) is log_texts


def test_c9_a_server_goes_on_when_nobody_reads_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        for _ in range(2):
            announce(ServerConfig(), "ready")
        closed.flush()
