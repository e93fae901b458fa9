"""Drives a vendor's SDK: a script of `scripts/`, run in the environment of `<environment>.txt`, answers a list of jobs.

A job is JSON: `base_url` of the server, `api_key`, `entry` (which of the script's ways to call), `request` (query and
documents and, where the client can send them, model, top_n, return_documents, instruct).
An answer is JSON: `results` (index, relevance_score, text) with `total_tokens` and `request_id` where the client shows
them, or `error` with whatever the client lets its caller see of it.

A new client is a `.txt` of exact pins (`make clients` installs it), a script, and a row of `CLIENTS`.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venv-clients"

Request = dict[str, Any]
Answer = dict[str, Any]


def environment_bin(environment: str) -> Path:
    """The folder of a client environment's programs."""
    path = ENVIRONMENTS / environment / "bin"
    assert path.is_dir(), f"{path} is missing; `make clients` installs it"
    return path


@dataclass(frozen=True, kw_only=True)
class Client:
    """One way to call the server, and what of a request it can send beside query and documents."""

    environment: str
    script: str
    entry: str = ""
    sends: frozenset[str] = frozenset({"model", "top_n", "return_documents", "instruct"})
    shows: frozenset[str] = frozenset({"total_tokens", "request_id"})
    errors: Literal["returned", "raised", "printed", "hidden"]  # how a caller learns of them; hidden: by a crash

    def __str__(self) -> str:
        return " ".join(filter(None, [self.environment, self.script.removesuffix(".py"), self.entry]))

    def sendable(self, request: Request) -> Request:
        """What of a request this client can send."""
        return {name: request[name] for name in request if name in {"query", "documents", *self.sends}}

    def call(self, base_url: str, requests: list[tuple[str, Request]]) -> list[Answer]:
        """The answers to (api key, request) pairs, made one after the other in a process of their own."""
        jobs = [
            {"base_url": base_url, "api_key": key, "entry": self.entry, "request": self.sendable(request)}
            for key, request in requests
        ]
        done = subprocess.run(
            [environment_bin(self.environment) / "python", HERE / "scripts" / self.script],
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{self}: {done.stderr}"
        answers: list[Answer] = json.loads(done.stdout)
        return answers


def framework(script: str, *sends: str) -> Client:
    """A framework that hands on indices and scores alone."""
    return Client(environment="frameworks", script=script, sends=frozenset(sends), shows=frozenset(), errors="hidden")


CLIENTS = [
    Client(environment="dashscope-2", script="dashscope_sdk.py", entry="TextReRank.call", errors="returned"),
    Client(environment="dashscope-2", script="dashscope_sdk.py", entry="AioTextReRank.call", errors="returned"),
    Client(environment="dashscope-2", script="dashscope_sdk.py", entry="Client", errors="raised"),
    Client(environment="dashscope-2", script="dashscope_sdk.py", entry="AsyncClient", errors="raised"),
    Client(environment="dashscope-2", script="dashscope_cli.py", shows=frozenset({"total_tokens"}), errors="printed"),
    Client(environment="dashscope-1.25", script="dashscope_sdk.py", entry="TextReRank.call", errors="returned"),
    Client(environment="dashscope-1.25", script="dashscope_sdk.py", entry="AioTextReRank.call", errors="returned"),
    Client(environment="dashscope-1.20", script="dashscope_sdk.py", entry="TextReRank.call", errors="returned"),
    framework("langchain_community_rerank.py", "top_n"),  # as constructed: it names gte-rerank whatever it is told
    framework("langchain_community_rerank.py", "top_n", "model"),
    framework("llama_index_rerank.py", "top_n", "model"),
    Client(environment="openai", script="openai_sdk.py", errors="raised"),
]
