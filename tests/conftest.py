"""Fixtures shared by all tests: tiny random checkpoints in the real architecture, made on the spot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import hypothesis
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

# kernels for GPUs run in an interpreter, but in tests on a GPU; Triton must know before anything imports it
os.environ.setdefault("TRITON_INTERPRET", "1")

from local_rerank import Reranker
from tests.client_servers import RunPython, python_hosts, two_servers
from tests.reference import ModelCard
from tests.tiny_checkpoints import make_checkpoint

# no deadline: these machines are shared, and the tests are free of timing
hypothesis.settings.register_profile("tests", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("tests")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # each worker has a core; threads that wait for a core make a pass many times slower


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the library keeps for later starts does not go into the user's cache, nor come from it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen3ForCausalLM with a byte tokenizer, tied head, fp32."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-reranker")


@pytest.fixture(scope="session")
def tiny_reranker(tiny_checkpoint: Path) -> Iterator[Reranker]:
    with Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32") as reranker:
        yield reranker


@pytest.fixture(scope="session")
def card(tiny_checkpoint: Path) -> ModelCard:
    """The same checkpoint as `tiny_reranker`, run as the model card does."""
    return ModelCard(tiny_checkpoint)


@pytest.fixture(scope="session")
def nano() -> Iterator[Reranker]:
    """The embedded default model, fp32."""
    with Reranker(device="cpu", dtype="fp32") as reranker:
        yield reranker


@pytest.fixture(scope="session")
def client_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Base URLs of a server that asks for a key and of an open one."""
    with two_servers(tmp_path_factory.mktemp("servers")) as urls:
        yield urls


@pytest.fixture(scope="session")
def run_python() -> Iterator[RunPython]:
    """Runs a program in a client environment."""
    with python_hosts() as run:
        yield run


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of what is made up; `benchmarks/soak.py fuzz` asks for more."""
    parser.addoption("--num-cases", type=int, default=100, help="cases that schemathesis makes")
    parser.addoption("--num-bodies", type=int, default=150, help="bodies that hypothesis makes")
    parser.addoption("--fuzz-seed", type=int, default=1, help="another seed makes others of both")


class ByFile(LoadScopeScheduling):
    """Each file is run by one worker of pytest-xdist; so are files that share servers, and all that start Ray.

    `--dist loadgroup` cannot do it: it writes into a test's `_nodeid`, which pytest 9.2 no longer reads.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = PurePosixPath(nodeid.partition("::")[0])
        folder = path.parent.name
        return "clients" if folder in ("clients", "playground") else "ray" if "_ray_" in path.name else str(path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    return ByFile(config, log) if config.getoption("dist") == "loadgroup" else None
