"""Validation of options, their defaults, and API keys."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from local_rerank.errors import ConfigError
from local_rerank.types import Limits
from local_rerank_server.config import ServerConfig
from local_rerank_server.errors import InvalidApiKey, MissingApiKey
from local_rerank_server.keys import ApiKeys


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"port": 65536}, "port is 65536"),
        ({"max_body_bytes": 0}, "max_body_bytes is 0"),
        ({"request_timeout_ms": 0}, "request_timeout_ms is 0"),
        ({"max_documents": 0}, "max_documents is 0"),
        ({"max_documents": 100_001}, "max_documents is 100001; it must be at most 100000"),
        ({"max_request_tokens": 0}, "max_request_tokens is 0"),
        ({"client_timeout_seconds": 0}, "client_timeout_seconds is 0"),
        ({"root_path": "rerank"}, "root_path is 'rerank'"),
        ({"ssl_certfile": Path("cert.pem")}, "only one of ssl_certfile and ssl_keyfile is set"),
        ({"api_key": ("",)}, "api_key is empty"),
        ({"api_key": ("name:",)}, "api_key is empty"),
        ({"key_requests_per_minute": 0}, "key_requests_per_minute is 0"),
        ({"host": "0.0.0.0"}, "host 0.0.0.0 can be reached from other machines"),
        ({"host": "::"}, "host :: can be reached from other machines"),
        ({"host": "example.com"}, "host example.com can be reached from other machines"),
    ],
)
def test_an_invalid_option_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServerConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"host": "127.0.0.9"},
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "insecure": True},
        {"host": "0.0.0.0", "api_key": ("k",)},
        {"host": "0.0.0.0", "api_key_file": Path("keys")},
        {"host": "0.0.0.0", "uds": Path("socket")},
    ],
)
def test_hosts_that_only_this_machine_reaches_need_no_key(options: dict[str, Any]) -> None:
    ServerConfig(**options)


def test_limits_are_the_hosted_ones_on_dashscope_and_larger_elsewhere() -> None:
    config = ServerConfig()
    texts = {"max_query_chars": 300_000, "max_instruction_chars": 50_000}
    hosted = {"max_documents": 500, "max_document_chars": 300_000, "max_request_tokens": 120_000}
    larger = {"max_documents": 1000, "max_document_chars": 2_000_000, "max_request_tokens": 500_000}
    assert config.dashscope_route_limits == Limits(**texts, **hosted)
    assert config.limits == Limits(**texts, **larger)
    server = ServerConfig(dashscope_limits="server", max_documents=7)
    assert server.dashscope_route_limits == server.limits == Limits(**texts, **larger | {"max_documents": 7})
    strict = ServerConfig(strict=True)
    assert not strict.limits.allow_empty_documents
    assert not strict.dashscope_route_limits.allow_empty_documents


def test_every_numeric_option_has_a_minimum() -> None:
    types = get_type_hints(ServerConfig)
    numeric = [field.name for field in dataclasses.fields(ServerConfig) if types[field.name] in (int, int | None)]
    assert "port" in numeric
    for name in numeric:
        with pytest.raises(ConfigError, match=f"{name} is -1; it must be at least"):
            ServerConfig(**{name: -1})


@pytest.mark.parametrize("text", ["", "# nothing\n", "no colon\n", ":key\n", "name:\n", "a:x\na:y\n"])
def test_a_malformed_or_unreadable_key_file_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    for path in (file, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="api_key_file"):
            ApiKeys.from_config(ServerConfig(api_key_file=path))


def test_check_returns_the_name_of_a_key_or_refuses(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# who: what\n\nanna: sesame\nkarl:schlüssel\n", encoding="utf-8")
    keys = ApiKeys.from_config(ServerConfig(api_key=("open", "bert:door"), api_key_file=file))
    sent = {"sesame": "anna", "schlüssel": "karl", "open": "key-1", "door": "bert"}
    for scheme in ("Bearer", "bearer"):
        assert [keys.check(f"{scheme} {key}".encode()) for key in sent] == list(sent.values())
    for missing in (None, b"Bearer ", b"Basic c2VjcmV0"):
        with pytest.raises(MissingApiKey):
            keys.check(missing)
    for wrong in (b"Bearer wrong", b"Bearer sesam", b"Bearer sesame and more", b"Bearer anna"):
        with pytest.raises(InvalidApiKey):
            keys.check(wrong)
    assert ApiKeys({}).check(None) is None


@pytest.mark.parametrize("given", [("anna:x", "anna:y"), ("anna:x",)])
def test_two_keys_of_one_name_are_refused(given: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("anna: sesame\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="'anna'; names must be unique"):
        ApiKeys.from_config(ServerConfig(api_key=given, api_key_file=file))
