"""API keys from the options and the key file, and the check of the Authorization header."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path

from local_rerank.errors import ConfigError
from local_rerank_server.config import ServerConfig
from local_rerank_server.errors import InvalidApiKey, MissingApiKey


class ApiKeys:
    """The configured keys, by name. Without any, every request passes."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._keys = {name: key.encode() for name, key in keys.items()}

    @classmethod
    def from_config(cls, config: ServerConfig) -> ApiKeys:
        """Collect the keys of the options and of the key file; raises ConfigError."""
        keys = _keys_by_name(config.api_key)
        if config.api_key_file is not None:
            more = _read_key_file(config.api_key_file)
            if twice := sorted(keys.keys() & more.keys()):
                raise ConfigError(f"api_key and api_key_file both have a key named {twice[0]!r}; names must be unique")
            keys |= more
        return cls(keys)

    def check(self, authorization: bytes | None) -> str | None:
        """The name of the key in an Authorization header; raises MissingApiKey or InvalidApiKey."""
        if not self._keys:
            return None
        scheme, _, sent = (authorization or b"").strip().partition(b" ")
        sent = sent.strip()
        if scheme.lower() != b"bearer" or not sent:
            raise MissingApiKey()
        # compare all keys, each in constant time, so that the response time reveals nothing
        names = [name for name, key in self._keys.items() if hmac.compare_digest(key, sent)]
        if not names:
            raise InvalidApiKey()
        return names[0]


def _keys_by_name(given: Sequence[str]) -> dict[str, str]:
    """The keys of the option by name; KEY alone is named key-1, key-2, ..."""
    keys: dict[str, str] = {}
    for number, text in enumerate(given, start=1):
        name, _, key = (part.strip() for part in text.rpartition(":"))
        name = name or f"key-{number}"
        if name in keys:
            raise ConfigError(f"api_key has two keys named {name!r}; names must be unique")
        keys[name] = key
    return keys


def _read_key_file(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error}") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, key = (part.strip() for part in line.partition(":"))
        if not (name and colon and key) or name in keys:
            raise ConfigError(f"api_key_file {path}, line {number} is not `name:key` with a unique name")
        keys[name] = key
    if not keys:
        raise ConfigError(f"api_key_file {path} has no keys")
    return keys
