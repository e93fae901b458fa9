"""Which web pages may use the server: the checks of host and origin, and the headers of every response.

A browser names the page that a request comes from in `Origin` or `Sec-Fetch-Site`, and the name under which it found
the server in `Host`; pages cannot change them. Other clients send no `Origin`, and nothing changes for them.
"""

from __future__ import annotations

import re
import socket
from ipaddress import IPv6Address
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.types import Scope

from local_rerank_server.config import ServerConfig, is_loopback
from local_rerank_server.errors import ForeignOrigin, UnknownHost

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""On every response; the files of the pages have policies and caching of their own."""

DEFAULT_PORTS = {"http": 80, "https": 443}
ORIGIN = re.compile(r"(https?)://(.+)", re.IGNORECASE)
AUTHORITY = re.compile(r"(\[[^\[\]@/]+\]|[^\[\]@:/?#\s]+)(?::([0-9]{0,5}))?")  # a host and perhaps a port
IPV4_CHARS = re.compile(r"[0-9a-fx.]+")  # 127.1 and 0x7f000001 are addresses, too
FOREIGN_SITES = {"cross-site", "same-site"}
NAVIGATION = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


class _Authority(NamedTuple):
    """A host in lower case, an IPv6 address in brackets, and the port if one is named."""

    host: str
    port: str | None

    @classmethod
    def parse(cls, text: str) -> _Authority | None:
        found = AUTHORITY.fullmatch(text.strip().lower())
        return found and cls(found[1], found[2] or None)


def check_sender(scope: Scope, target_authority: str | None, config: ServerConfig) -> None:
    """Raise `UnknownHost` or `ForeignOrigin` if the request may come from a web page of another server.

    `target_authority` is the host of a target that is a whole URL; it counts instead of `Host`.
    """
    headers = Headers(scope=scope)
    hosts = headers.getlist("host") if target_authority is None else [target_authority]
    if _checks_hosts(scope, config):
        for host in hosts:
            _check_host(host, config)
    if origins := headers.getlist("origin"):
        for origin in origins:
            _check_origin(origin, hosts, config)
    elif FOREIGN_SITES & {site.strip().lower() for site in headers.getlist("sec-fetch-site")}:
        navigates = all(headers.getlist(name) == [value] for name, value in NAVIGATION.items())
        if not (navigates and scope["method"] == "GET"):
            raise ForeignOrigin("another origin")


def _checks_hosts(scope: Scope, config: ServerConfig) -> bool:
    """Whether a page could reach this server by letting its own name point here, and read all it wants."""
    if config.allowed_hosts:
        return True
    if config.has_keys or config.uds:
        return False
    listens_on: str = config.host or (scope.get("server") or ("",))[0]
    return is_loopback(listens_on)


def _check_host(sent: str, config: ServerConfig) -> None:
    authority = _Authority.parse(sent)
    name = authority.host.removesuffix(".") if authority else ""
    allowed = ("localhost", "*.localhost", *config.allowed_hosts)
    if not (_is_ip(name) or any(_matches(name, each.lower()) for each in allowed)):
        raise UnknownHost(sent)


def _matches(name: str, allowed: str) -> bool:
    return allowed in ("*", name) or (allowed.startswith("*.") and name.endswith(allowed[1:]))


def _is_ip(host: str) -> bool:
    """Whether a host is an IP address, which no name server can redirect, in any form that C libraries take."""
    try:
        if host.startswith("["):
            IPv6Address(host[1:-1])
        elif IPV4_CHARS.fullmatch(host):
            socket.inet_aton(host)
        else:
            return False
    except (ValueError, OSError):
        return False
    return True


def _check_origin(origin: str, hosts: list[str], config: ServerConfig) -> None:
    if {"*", origin} & set(config.cors_origins):
        return
    if not hosts or not all(_is_origin_of(origin, host) for host in hosts):
        raise ForeignOrigin(origin)


def _is_origin_of(origin: str, host: str) -> bool:
    found = ORIGIN.fullmatch(origin)
    page, server = _Authority.parse(found[2] if found else ""), _Authority.parse(host)
    if found is None or page is None or server is None:
        return False
    default = DEFAULT_PORTS[found[1].lower()]
    return page.host == server.host and int(page.port or default) == int(server.port or default)
