"""Compare the speed and scores of this library with those of other software, each in a process of its own.

    python -m benchmarks.peers card sentence-transformers vllm [--vllm-python PATH] [--shape qwen3-reranker-0.6b]

`card` is the model card's code on transformers. All systems run the same requests in alternation. A peer that is not
installed is skipped. See `peer_process.py` for the code that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peer_process import DTYPES, PEERS
from local_rerank.engine.cpu.process_setup import OPENMP_VARIABLES, configure_process
from local_rerank.types import RerankRequest

configure_process()  # must run before torch is imported

from local_rerank import EngineConfig, Reranker  # noqa: E402
from local_rerank.bench.measure import Measurement  # noqa: E402
from local_rerank.bench.report import all_tables  # noqa: E402
from local_rerank.bench.targets import RerankerTarget, Round  # noqa: E402
from local_rerank.bench.workloads import WORKLOADS  # noqa: E402
from local_rerank.commands.bench import load_reference, random_weights  # noqa: E402


class PeerMissing(Exception):
    """A peer is not installed."""


class PeerProcess:
    """A peer in its own process; `peer_process.py` describes the protocol."""

    def __init__(self, name: str, python: str, folder: Path, dtype: str, threads: int = 0) -> None:
        """Start the process and wait until it is ready; raises PeerMissing."""
        self.name = f"{name} {dtype}"
        command = [python, str(Path(__file__).with_name("peer_process.py")), name, str(folder), dtype, str(threads)]
        # peers get default settings, without the OpenMP wait policy of this process
        environment = {key: value for key, value in os.environ.items() if key not in OPENMP_VARIABLES}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self.pid = self._process.pid
        hello = self._read()
        if "missing" in hello:
            self.close()
            raise PeerMissing(f"{name} is not installed in {python}: {hello['missing']}")
        self.version, self.start_seconds = hello["version"], hello["ready"]

    def ask(self, job: dict[str, Any]) -> Round:
        assert self._process.stdin is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer = self._read()
        log_odds = tuple(tuple(row) for row in answer["log_odds"])
        return Round(seconds=answer["seconds"], log_odds=log_odds, latencies=())

    def _read(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class PeerTarget(PeerProcess):
    """A peer that runs the requests of a `Reranker` with its prompt."""

    def __init__(self, name: str, python: str, reranker: Reranker, dtype: str) -> None:
        super().__init__(name, python, reranker.checkpoint.folder, dtype, reranker.config.threads or 0)
        self._template, self._instruction = reranker.checkpoint.template, reranker.config.instruction

    def run(self, requests: Sequence[RerankRequest], *, concurrent: bool) -> Round:
        shared = [{"shared": self._shared(request), "documents": request.documents} for request in requests]
        answer = self.ask({"suffix": self._template.suffix, "requests": shared})
        return replace(answer, latencies=() if concurrent else (answer.seconds,))

    def _shared(self, request: RerankRequest) -> str:
        instruction = self._instruction if request.instruction is None else request.instruction
        return self._template.prefix + self._template.shared_body(instruction, request.query)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="+", choices=[name for name in PEERS if name != "cross-encoder"])
    parser.add_argument("--model", help="default: random weights in the shape of --shape")
    parser.add_argument("--shape", default="qwen3-reranker-0.6b")
    parser.add_argument("--weights", type=Path, help="folder that keeps the random weights")
    parser.add_argument("--dtype", nargs="+", default=["bf16"], help="of this library")
    parser.add_argument("--peer-dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["passages"])
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("vllm", "sentence-transformers"):
        parser.add_argument(f"--{name}-python", default=sys.executable, help=f"Python that has {name}")
    options = parser.parse_args()
    with ExitStack() as stack:
        config = EngineConfig(
            model=options.model or str(random_weights(stack, options.shape, options.weights)), threads=options.threads
        )
        rerankers = [
            stack.enter_context(Reranker(config.model, dtype=dtype, threads=options.threads)) for dtype in options.dtype
        ]
        ours = [RerankerTarget(f"local-rerank {each.info.dtype}", each, "", None) for each in rerankers]
        targets = [*ours, *start_peers(stack, rerankers[0], options)]
        reference = load_reference(stack, config)
        results = [
            Measurement(WORKLOADS[name], targets, reference=reference, rounds=options.rounds).run()
            for name in options.workload
        ]
    from rich.console import Console

    for target in targets:
        print(target.name, target.version)
    for table in all_tables(results):
        Console().print(table)


def start_peers(stack: ExitStack, reranker: Reranker, options: argparse.Namespace) -> Iterator[PeerTarget]:
    for name in options.peers:
        python = getattr(options, f"{name.replace('-', '_')}_python", sys.executable)
        try:
            peer = PeerTarget(name, python, reranker, options.peer_dtype)
        except PeerMissing as missing:
            print(f"skipped: {missing}", file=sys.stderr)
        else:
            stack.callback(peer.close)
            yield peer


if __name__ == "__main__":
    main()
