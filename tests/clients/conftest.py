"""The servers that the clients call: real processes on the embedded default model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving import serving

KEY = "any"  # the one that docs/clients.md sends
PRECISION = ("--device", "cpu", "--dtype", "fp32")  # that of the library's fixture `nano`


@pytest.fixture(scope="session")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that asks for `KEY`."""
    with serving(tmp_path_factory.mktemp("server") / "log", *PRECISION, "--api-key", KEY) as url:
        yield url


@pytest.fixture(scope="session")
def open_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that asks for no key and sends documents back as strings."""
    with serving(tmp_path_factory.mktemp("open") / "log", *PRECISION, "--document-echo", "string") as url:
        yield url
