"""How log records look: lines for people, or one JSON object a line with the fields that came with the record."""

from __future__ import annotations

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

from local_rerank_server.config import ServerConfig


def set_up_logging(config: ServerConfig) -> None:
    """Log to standard error as the options say; the command line calls this, no import does."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(config))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start and stop are told in our own words


def make_formatter(config: ServerConfig) -> logging.Formatter:
    if config.log_format == "human":
        return logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    return JsonFormatter(
        "{levelname}{name}{message}",
        style="{",
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
        json_ensure_ascii=False,
    )
