"""API keys from the options and the key file, and the check of the one that a request's headers hold.

An option or variable holds bare keys. The key file has one `NAME:KEY` a line, split at the first colon; a file of one
line without a colon is a bare key. No error here quotes a key, nor a name, which may be the start of a misplaced key.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.text_files import lines
from local_rerank_server.config import ServerConfig
from local_rerank_server.errors import InvalidApiKey, MissingApiKey

NAME = re.compile(r"[\w.@-]{1,64}")  # names are in the log, so they hold no white space
NAME_RULE = "1 to 64 letters, digits and . _ @ -"
PLAIN_HEADERS = ("api-key", "x-api-key")  # of Azure's and Pinecone's clients; both of Continue's
NOT_IN_A_HEADER = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8


class ApiKeys:
    """The configured keys, by name. Without any, every request passes."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        # a client may send a key beyond ASCII as UTF-8 or as Latin-1
        self._keys = [(name, sent) for name, key in keys.items() for sent in _encodings(key)]

    @classmethod
    def from_config(cls, config: ServerConfig) -> ApiKeys:
        """Collect the keys of the options and of the key file; raises ConfigError."""
        keys = {f"key-{number}": key for number, key in enumerate(config.api_key, start=1)}
        if config.api_key_file is not None:
            more = _read_key_file(Path(config.api_key_file), bare_name=f"key-{len(keys) + 1}")
            if twice := sorted(keys.keys() & more.keys()):
                raise ConfigError(f"{twice[0]} names a key of api_key_file and one of api_key; rename it in the file")
            keys |= more
        for name, key in keys.items():
            _check_key(key, f"the key named {name}")
        return cls({name: key.strip() for name, key in keys.items()})

    def check(self, headers: Mapping[str, str]) -> str | None:
        """The name of the key that a request's headers hold; raises MissingApiKey or InvalidApiKey."""
        if not self._keys:
            return None
        sent = _sent_key(headers)
        if not sent:
            raise MissingApiKey()
        # compare all keys, each in constant time, so that the response time reveals nothing
        names = [name for name, key in self._keys if hmac.compare_digest(key, sent)]
        if not names:
            raise InvalidApiKey()
        return names[0]


def _sent_key(headers: Mapping[str, str]) -> bytes:
    """The key of the first header that holds one."""
    authorization = _key_in(headers.get("authorization", "").strip().encode("latin-1"))
    plain = (headers.get(name, "").strip().encode("latin-1") for name in PLAIN_HEADERS)
    return authorization or next(filter(None, plain), b"")


def _key_in(authorization: bytes) -> bytes:
    """`Bearer KEY`, a key alone as Mixedbread's SDK 2 sends it, or the access key id of AWS's signature version 4.

    That is `AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/SERVICE/aws4_request, SignedHeaders=..., Signature=...`. The
    signature is not checked: it would prove knowledge of a second secret, which this server does not have.
    """
    scheme, _, rest = (part.strip() for part in authorization.partition(b" "))
    match scheme.lower():
        case b"bearer":
            return rest
        case b"aws4-hmac-sha256":
            fields = dict(field.strip().partition(b"=")[::2] for field in rest.split(b","))
            return fields.get(b"Credential", b"").rsplit(b"/", 4)[0]
        case _:
            return b"" if rest else scheme


def _encodings(key: str) -> set[bytes]:
    try:
        return {key.encode(), key.encode("latin-1")}
    except UnicodeEncodeError:
        return {key.encode()}


def _check_key(key: str, what: str) -> None:
    """Raise ConfigError for a key that no client could send."""
    if not key.strip():
        raise ConfigError(f"{what} is empty")
    if NOT_IN_A_HEADER.search(key.strip()):
        raise ConfigError(f"{what} has a control character or a byte that is not UTF-8; HTTP headers cannot carry it")


def _read_key_file(path: Path, *, bare_name: str) -> dict[str, str]:
    try:
        stripped = [(number, line.strip()) for number, line in lines(path, "api_key_file")]
    except InvalidRequest as error:
        raise ConfigError(f"api_key_file {error}") from None
    given = [(number, line) for number, line in stripped if line and not line.startswith("#")]
    if not given:
        raise ConfigError(f"api_key_file {path} has no keys; a line that starts with # is a comment")
    if len(given) == 1 and ":" not in given[0][1]:
        return {bare_name: given[0][1]}
    keys: dict[str, str] = {}
    for number, line in given:
        name, colon, key = (part.strip() for part in line.partition(":"))
        if not (colon and key and NAME.fullmatch(name)):
            raise ConfigError(
                f"api_key_file {path}, line {number} is not NAME:KEY, where NAME is {NAME_RULE}; "
                "only a file of a single line may hold a key without a name"
            )
        if name in keys:
            raise ConfigError(f"api_key_file {path}, line {number} has the name of an earlier line")
        keys[name] = key
    return keys
