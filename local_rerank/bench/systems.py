"""Ours and the peers behind one call: requests in, seconds and log-odds out."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from local_rerank.bench.memory import PeakMemory
from local_rerank.engine.cpu.process_setup import OPENMP_VARIABLES
from local_rerank.errors import ConfigError
from local_rerank.reranker import Reranker
from local_rerank.types import RerankRequest, RerankResult

PEER_NAMES = ("card", "sentence-transformers", "vllm")


class PeerMissing(Exception):
    """A peer that this machine does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One round of one system over one workload."""

    seconds: float
    log_odds: tuple[tuple[float, ...], ...]  # by request, in the order of its documents
    latencies: tuple[float, ...]  # seconds, by request; empty where a peer does not tell
    tokenize_seconds: float | None = None
    peak_bytes: int | None = None  # memory over that before the round


class System(Protocol):
    """Something that ranks requests."""

    name: str
    version: str
    start_seconds: float | None

    def run(self, requests: Sequence[RerankRequest], *, concurrent: bool) -> Sample: ...


class Ours:
    """A Reranker of this process."""

    def __init__(self, name: str, reranker: Reranker, version: str, start_seconds: float | None) -> None:
        self.name, self.version, self.start_seconds = name, version, start_seconds
        self.reranker = reranker

    def run(self, requests: Sequence[RerankRequest], *, concurrent: bool) -> Sample:
        with PeakMemory(self.reranker.info.device) as memory:
            start = time.perf_counter()
            if concurrent:
                futures = [self.reranker.submit(request) for request in requests]
                results = [future.result() for future in futures]
            else:
                results = [self.reranker.submit(request).result() for request in requests]
            seconds = time.perf_counter() - start
        return Sample(
            seconds=seconds,
            log_odds=tuple(_in_order(result) for result in results),
            latencies=tuple(result.total_ms / 1e3 for result in results),
            tokenize_seconds=sum(result.tokenize_ms for result in results) / 1e3,
            peak_bytes=memory.peak_bytes,
        )


def _in_order(result: RerankResult) -> tuple[float, ...]:
    return tuple(item.log_odds for item in sorted(result, key=lambda item: item.index))


class Peer:
    """A peer's process; see `peer.py` for what is spoken."""

    def __init__(self, name: str, python: str, reranker: Reranker, dtype: str) -> None:
        """Start it and wait until it is ready; raises PeerMissing, or ConfigError where it fails."""
        self.name = f"{name} {dtype}"
        self._template, self._instruction = reranker.checkpoint.template, reranker.config.instruction
        threads = reranker.config.threads or 0
        command = [python, str(Path(__file__).with_name("peer.py")), name, str(reranker.checkpoint.folder), dtype]
        # peers run as they do by themselves: without the waiting policy that our command line sets for this process
        environment = {key: value for key, value in os.environ.items() if key not in OPENMP_VARIABLES}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as the process runs
        try:
            self._process = subprocess.Popen(
                [*command, str(threads)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment, text=True,
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise ConfigError(f"{python} cannot be run: {error.strerror}") from error
        hello = self._read()
        if "missing" in hello:
            self.close()
            raise PeerMissing(f"{name} is not installed in {python}: {hello['missing']}")
        self.version, self.start_seconds = hello["version"], hello["ready"]

    def run(self, requests: Sequence[RerankRequest], *, concurrent: bool) -> Sample:
        job = {
            "suffix": self._template.suffix,
            "requests": [{"shared": self._shared(request), "documents": request.documents} for request in requests],
        }
        assert self._process.stdin is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer = self._read()
        log_odds = tuple(tuple(row) for row in answer["log_odds"])
        latencies = () if concurrent else (answer["seconds"],)
        return Sample(seconds=answer["seconds"], log_odds=log_odds, latencies=latencies)

    def _shared(self, request: RerankRequest) -> str:
        instruction = self._instruction if request.instruction is None else request.instruction
        return self._template.prefix + self._template.shared_body(instruction, request.query)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["it said nothing"]
            self.close()
            raise ConfigError(f"{self.name} ended with status {status}: {said[-1]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
