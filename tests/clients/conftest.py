"""The server that the clients call: a real process on the embedded default model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving import serving

KEY = "any"  # the one that docs/clients.md sends


@pytest.fixture(scope="session")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that asks for `KEY`, in the precision of the library's fixture `nano`."""
    with serving(
        tmp_path_factory.mktemp("server") / "log", "--device", "cpu", "--dtype", "fp32", "--api-key", KEY
    ) as url:
        yield url
