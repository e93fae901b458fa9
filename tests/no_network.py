"""`local-rerank ...` in a process in which no socket may leave this machine and no name may be looked up.

python -m tests.no_network ARGUMENTS; whoever breaks the rule is told on standard error, and the process ends at once.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from typing import Any

LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
SENDS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"}
STATUS = 77


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: Python reports here before it acts, whichever library asks."""
    if event in LOOKUPS and not is_loopback(arguments[0]):
        stop(event, arguments[0])
    if event in SENDS and isinstance(arguments[1], tuple) and not is_loopback(arguments[1][0]):
        stop(event, arguments[1])


def is_loopback(host: object) -> bool:
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def stop(event: str, target: object) -> None:
    sys.stderr.write(f"forbidden: {event} {target!r}\n")
    sys.stderr.flush()
    os._exit(STATUS)  # an exception could be caught by the very code that must not try


if __name__ == "__main__":
    sys.addaudithook(forbid)
    from local_rerank.cli import main

    main(sys.argv[1:])
