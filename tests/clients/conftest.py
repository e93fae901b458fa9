"""The servers that the clients call: real processes on the embedded default model."""

from __future__ import annotations

import pytest

from tests.client_servers import DOCUMENTED_KEY as KEY

__all__ = ["KEY"]


@pytest.fixture(scope="session")
def base_url(client_servers: tuple[str, str]) -> str:
    """A server that requires `KEY`."""
    return client_servers[0]


@pytest.fixture(scope="session")
def open_url(client_servers: tuple[str, str]) -> str:
    """A server that requires no key and returns documents as strings."""
    return client_servers[1]
