"""Log formatting: plain lines, or one JSON object per line with the record's extra fields."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence

from pythonjsonlogger.json import JsonFormatter

from local_rerank.commands.console import LogFormatter, forget, say
from local_rerank_server.config import ServerConfig

REPEAT_SECONDS = 60  # between two warnings of the same text about clients
MISLEADING = ("Unsupported upgrade request", "No supported WebSocket library")
"""uvicorn's warnings about a request with `Upgrade`, which is answered as if it had none. No library is missing."""

logger = logging.getLogger(__name__)


def set_up_logging(config: ServerConfig, *, passed_over: Sequence[str] = ()) -> None:
    """Configure the root logger to write to standard error, and log the names of variables that were passed over."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(config))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # process.py reports start and stop itself
    for name in ("uvicorn.error", "local_rerank_server.connections"):
        logging.getLogger(name).addFilter(Occasionally())
    if config.log_format == "json":
        logging.captureWarnings(True)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
        sys.excepthook = lambda kind, error, trace: logger.critical("uncaught", exc_info=(kind, error, trace))
        threading.excepthook = lambda args: logger.critical("uncaught", exc_info=args.exc_value)
    if passed_over:
        logger.info("Passed over variables that Kubernetes sets for a Service: %s", ", ".join(passed_over))


def make_formatter(config: ServerConfig) -> logging.Formatter:
    if config.log_format == "human":
        return LogFormatter("%(asctime)s %(levelname)s %(message)s")
    return JsonFormatter(
        "{levelname}{name}{message}",
        style="{",
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
    )


def announce(config: ServerConfig, line: str) -> None:
    """Print a line about the start or the stop; with JSON logs it is one of them."""
    if config.log_format == "json":
        logger.info(line)
    else:
        try:
            say(line)
        except BrokenPipeError:  # nobody reads it, like `serve | head -1`; the server goes on
            forget(sys.stdout)


def log_fatal(message: str) -> None:
    """Write the error that ends the process as a JSON line, before or after `set_up_logging`."""
    record = logging.makeLogRecord({"name": "local_rerank", "levelname": "CRITICAL", "msg": message})
    sys.stderr.write(make_formatter(ServerConfig(log_format="json")).format(record) + "\n")


class Occasionally(logging.Filter):
    """Passes a warning of the same text once a minute, because a port scanner causes thousands.

    Passes none of `MISLEADING`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg.startswith(MISLEADING):
            return False
        now = time.monotonic()
        if record.levelno != logging.WARNING or now >= self._next.get(record.msg, now):
            self._next[record.msg] = now + REPEAT_SECONDS
            return True
        return False
