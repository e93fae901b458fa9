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

AWS = (
    "AWS4-HMAC-SHA256 Credential={}/20261128/us-east-1/bedrock/aws4_request, "
    "SignedHeaders=content-type;host;x-amz-date, Signature=5d672d79c15b13162d9279b0855cfba6"
)
"""An Authorization header of AWS's signature version 4, as boto3 sends it."""


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
        ({"api_key": (" \n",)}, "api_key is empty"),
        ({"api_key": "secret"}, "api_key must be a tuple"),
        ({"key_requests_per_minute": 0}, "key_requests_per_minute is 0"),
        ({"keep_alive": "10"}, "keep_alive is '10'; it must be a time such as 90s, 10m or 1h, or never"),
        ({"max_model_bytes": 0}, "max_model_bytes is 0"),
        ({"ray": True, "keep_alive": "1m"}, "ray keeps every model loaded; leave out keep_alive and max_model_bytes"),
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


def test_e5_the_server_times_out_before_the_usual_client() -> None:
    assert 50_000 <= ServerConfig().request_timeout_ms < 60_000


def test_every_numeric_option_has_a_minimum() -> None:
    types = get_type_hints(ServerConfig)
    numeric = [field.name for field in dataclasses.fields(ServerConfig) if types[field.name] in (int, int | None)]
    assert "port" in numeric
    for name in numeric:
        with pytest.raises(ConfigError, match=f"{name} is -1; it must be at least"):
            ServerConfig(**{name: -1})


def bearer(key: str) -> dict[str, str]:
    """The headers with a key in UTF-8, as a server decodes them."""
    return {"authorization": f"Bearer {key}".encode().decode("latin-1")}


def keys_of(content: bytes, folder: Path, *api_key: str) -> ApiKeys:
    (folder / "keys").write_bytes(content)
    return ApiKeys.from_config(ServerConfig(api_key=api_key, api_key_file=folder / "keys"))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"# SECRET\n", b"SECRET\nSECRET2\n", b":SECRET\n", b"a:\n", b"a:SECRET\na:SECRET2\n",
        b"SECRET SECRET:x", b"a:SECRET\nSECRET2", b"S\x00ECRET", b"a:SE\x1bCRET", b"SECRET\xff", b"key-1:SECRET",
    ],
)  # fmt: skip
def test_a10_a_malformed_key_file_is_refused_without_quoting_it(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_key_file|the key named (a|key-2) ") as refused:
        keys_of(content, tmp_path, "SECRET")
    assert "SECRET" not in str(refused.value)


def test_an_unreadable_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_key_file .*nothing cannot be read"):
        ApiKeys.from_config(ServerConfig(api_key_file=tmp_path / "nothing"))


@pytest.mark.parametrize("key", ["open", "abc:def", "carol:sk:carol", "-x", "a b", "schlüssel", "密钥", " padded\n"])
def test_a10_an_option_holds_a_bare_key(key: str, tmp_path: Path) -> None:
    keys = ApiKeys.from_config(ServerConfig(api_key=("first", key)))
    assert keys.check(bearer(key)) == "key-2"
    for part in key.split(":")[1:]:
        with pytest.raises(InvalidApiKey):
            keys.check(bearer(part))
    assert key not in repr(ServerConfig(api_key=(key,)))


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"secret", {"secret": "key-2"}),
        (b"secret\r\n", {"secret": "key-2"}),
        (b"\xef\xbb\xbf# of Docker\n\nsecret\n", {"secret": "key-2"}),
        ("anna:secret\nkarl: sk:1:2\n".encode("utf-16"), {"secret": "anna", "sk:1:2": "karl"}),
        ("# who: what\r\nJörg@x.de : schlüssel\r\n".encode(), {"schlüssel": "Jörg@x.de"}),
    ],
)
def test_a10_a_key_file_has_names_or_one_bare_key(content: bytes, names: dict[str, str], tmp_path: Path) -> None:
    keys = keys_of(content, tmp_path, "of the option")
    assert {key: keys.check(bearer(key)) for key in names} == names


def test_a10_a_key_beyond_ascii_may_come_as_latin_1() -> None:
    assert ApiKeys({"a": "schlüssel"}).check({"authorization": "Bearer schlüssel"}) == "a"


@pytest.mark.parametrize("key", ["a\x00b", "a\nb", "\udcff"])
def test_a10_a_key_that_no_header_carries_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="the key named key-1 has a control character"):
        ApiKeys.from_config(ServerConfig(api_key=(key,)))


def test_check_refuses_missing_and_wrong_keys() -> None:
    keys = ApiKeys({"anna": "sesame"})
    for taken in ("Bearer sesame", "bearer sesame", "sesame", AWS.format("sesame")):
        assert keys.check({"authorization": taken}) == "anna"
    for missing in ("", "Bearer ", "Basic c2VjcmV0", "sesame and more", "AWS4-HMAC-SHA256 ,=,", AWS.format("")):
        with pytest.raises(MissingApiKey):
            keys.check({"authorization": missing, "api-key": " "})
    wrong = ("wrong", "sesam", "sesame and more", "anna", "anna:sesame")
    for sent in (*map("Bearer {}".format, wrong), *map(AWS.format, wrong), "wrong", "bearersesame"):
        with pytest.raises(InvalidApiKey):
            keys.check({"authorization": sent, "api-key": "sesame"})
    assert ApiKeys({}).check({}) is None


@pytest.mark.parametrize("name", ["api-key", "x-api-key"])
def test_the_first_header_with_a_key_counts(name: str) -> None:
    keys = ApiKeys({"anna": "sesame", "karl": "a/b"})
    for authorization in ("", "Bearer", "Basic c2VjcmV0"):  # that of a proxy's user
        assert keys.check({"authorization": authorization, name: " sesame "}) == "anna"
        with pytest.raises(InvalidApiKey):
            keys.check({"authorization": authorization, name: "Bearer sesame"})
    assert keys.check({"authorization": AWS.format("a/b"), name: "sesame"}) == "karl"
