"""Log formatting: plain lines, or one JSON object per line with the record's extra fields."""

from __future__ import annotations

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

from local_rerank_server.config import ServerConfig


def set_up_logging(config: ServerConfig) -> None:
    """Configure the root logger to write to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(config))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # process.py reports start and stop itself


def make_formatter(config: ServerConfig) -> logging.Formatter:
    if config.log_format == "human":
        return logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    return JsonFormatter(
        "{levelname}{name}{message}",
        style="{",
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
    )
