"""Run jobs in processes to kill, forked from one that has imported everything, so that they start fast."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

PRELOADED = [
    "tests.batch.killed", "tests.batch.test_job", "pandas",  # imported by pyarrow
    "local_rerank.batch.scoring", "local_rerank.batch.parquet", "local_rerank.commands.batch_progress",
    "local_rerank.commands.app", "local_rerank.commands.batch", "local_rerank.evaluation.measures",
    "transformers.models.qwen3.modeling_qwen3",
]  # fmt: skip


def forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = forks().Process(target=target, args=arguments)
    process.start()
    return process


def job_killed_at_step(step: int, folder: str, input_name: str, output_name: str) -> None:
    """Run a job with a fake scorer and kill it just before its `step`-th disk operation."""
    from tests.batch.test_job import do_job

    patch = pytest.MonkeyPatch()
    count = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    patch.setattr(os, "fsync", counting(os.fsync))
    patch.setattr(Path, "replace", counting(Path.replace))
    patch.setattr(Path, "unlink", counting(Path.unlink))
    do_job(Path(folder), input_name, output_name)


def command_line(arguments: list[str], block_pairs: int) -> None:
    """Run `local-rerank ...` with blocks of `block_pairs` pairs."""
    from local_rerank.batch import job
    from local_rerank.commands.app import main

    pytest.MonkeyPatch().setattr(job, "MAX_BLOCK_PAIRS", block_pairs)
    main(arguments)


def command_line_in_pipes(arguments: list[str], input: str, output: str, error: str) -> None:
    """Run `local-rerank ...` with named pipes or files as its standard streams."""
    from local_rerank.commands.app import main

    for descriptor, name, flags in ((0, input, os.O_RDONLY), (1, output, os.O_WRONLY), (2, error, os.O_WRONLY)):
        os.dup2(os.open(name, flags | (os.O_CREAT if descriptor else 0)), descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # multiprocessing has closed it
    main(arguments)


def command_line_at_terminal(arguments: list[str], terminal: str, output: str) -> None:
    """Run `local-rerank ...` with a wide terminal as standard error and a file as standard output."""
    from local_rerank.commands.app import main

    os.environ |= {"COLUMNS": "200", "TERM": "xterm"}
    os.dup2(os.open(terminal, os.O_RDWR | os.O_NOCTTY), 2)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    main(arguments)


def growth_of_memory(folder: str, input_name: str, output_name: str, answer: Connection) -> None:
    """Send by how many bytes a job with a fake scorer raises the peak memory of this process."""
    from tests.batch.test_job import do_job

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    do_job(Path(folder), input_name, output_name, block_pairs=1000)
    answer.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
