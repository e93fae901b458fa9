"""Fixtures shared by all tests: a tiny random checkpoint in the real architecture, and models and servers on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.client_servers import RunPython, python_hosts, two_servers

if TYPE_CHECKING:  # imported by the fixtures: pytest-xdist's controller runs no test, and torch takes seconds
    from local_rerank import Reranker
    from tests.reference import ModelCard

# Triton interprets kernels on the CPU unless the tests run on a GPU; it reads this when it is imported
os.environ.setdefault("TRITON_INTERPRET", "1")
# no deadline: test machines are shared, and no test depends on timing
hypothesis.settings.register_profile("tests", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("tests")

if "PYTEST_XDIST_WORKER" in os.environ:
    import torch

    torch.set_num_threads(1)  # a core for each worker: threads that wait for a core make a pass many times slower


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The library neither reads nor writes the user's cache folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen3ForCausalLM with a byte tokenizer, tied head, fp32."""
    from tests.tiny_checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-reranker")


@pytest.fixture(scope="session")
def tiny_reranker(tiny_checkpoint: Path) -> Iterator[Reranker]:
    from local_rerank import Reranker

    with Reranker(str(tiny_checkpoint), device="cpu", dtype="fp32") as reranker:
        yield reranker


@pytest.fixture(scope="session")
def card(tiny_checkpoint: Path) -> ModelCard:
    """The checkpoint of `tiny_reranker`, run with the model card's code."""
    from tests.reference import ModelCard

    return ModelCard(tiny_checkpoint)


@pytest.fixture(scope="session")
def nano() -> Iterator[Reranker]:
    """The embedded default model, fp32."""
    from local_rerank import Reranker

    with Reranker(device="cpu", dtype="fp32") as reranker:
        yield reranker


@pytest.fixture(scope="session")
def client_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Base URLs of a server that requires an API key and of one that requires none."""
    with two_servers(tmp_path_factory.mktemp("servers")) as urls:
        yield urls


@pytest.fixture(scope="session")
def run_python() -> Iterator[RunPython]:
    """Runs a program in a client environment."""
    with python_hosts() as run:
        yield run


def pytest_addoption(parser: pytest.Parser) -> None:
    """Sizes of the generated tests; `benchmarks/soak.py fuzz` sets larger ones."""
    parser.addoption("--num-cases", type=int, default=100, help="cases that schemathesis generates")
    parser.addoption("--fuzz-phases", default="examples,fuzzing", help="of schemathesis; coverage makes 2,400 cases")
    parser.addoption("--num-bodies", type=int, default=150, help="bodies that hypothesis generates")
    parser.addoption("--fuzz-seed", type=int, default=1, help="seed of both generators")


GROUPS = {"ray": ("_ray_",), "clients": ("tests/clients/", "tests/playground/"), "hostile": ("_hostile", "_fuzz")}
GROUPS["tokenizer"] = ("requests/test_tokenization", "requests/test_chunks", "requests/test_prompts")
"""Files that share a server, Ray or a tokenizer, by parts of their paths: each group runs on one worker of xdist."""
LONGEST_FIRST = ("ray", "clients", "hostile")
SLOW_FILES = (  # servers, SDKs, other processes, the built-in model
    "tests/server/", "tests/clients/", "tests/playground/", "_ray_", "test_forks", "test_celery", "test_packaging",
    "test_no_network", "test_find", "test_bundles", "test_bench.", "test_job", "test_command", "test_app",
    "test_self_test", "test_linears", "test_compute_thread", "test_threads", "test_int8", "test_products",
    "test_quality", "test_simulation", "test_rates", "test_dockerfile", "test_examples", "tests/engine/cuda/",
)  # fmt: skip


def group_of(path: str) -> str:
    """The group of a test file, or the file itself."""
    return next((name for name, parts in GROUPS.items() if any(part in path for part in parts)), path)


class ByGroup(LoadScopeScheduling):
    """Runs each group of files on one worker.

    `--dist loadgroup` alone cannot: it writes into a test's `_nodeid`, which pytest 9.2 no longer reads.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.partition("::")[0])


@pytest.hookimpl(optionalhook=True)  # benchmarks/gpu.sh runs the tests without plugins
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup | None:
    return ByGroup(config, log) if config.getoption("dist") == "loadgroup" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files; the longest groups start first, so that no worker idles in the end."""
    for item in items:
        if any(part in item.nodeid for part in SLOW_FILES):
            item.add_marker("slow")
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(group_of(item.nodeid.partition("::")[0]), len(order)))
