"""`local-rerank ...` in a process that may neither connect to other machines nor look up names.

python -m tests.no_network ARGUMENTS [--then ARGUMENTS]... An attempt is reported on standard error and ends the
process at once. With the variables of `forbid_in_children` the rule holds for child processes too.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
SENDS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"}
STATUS = 77
THEN = "--then"


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: Python calls it before it acts, for every library."""
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
    os._exit(STATUS)  # the code at fault could catch an exception


def forbid_in_children(folder: Path) -> dict[str, str]:
    """Variables that make every Python process follow the rule, through a `sitecustomize` in `folder`."""
    rule = "import sys\nfrom tests.no_network import forbid\nsys.addaudithook(forbid)\n"
    (folder / "sitecustomize.py").write_text(rule, encoding="utf-8")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parents[1]}"}


if __name__ == "__main__":
    sys.addaudithook(forbid)
    from local_rerank.commands.app import main

    for line in [list(group) for is_then, group in groupby(sys.argv[1:], THEN.__eq__) if not is_then]:
        try:
            main(line)
        except SystemExit as exit:
            if exit.code not in (None, 0, 3):  # 3: `calibrate` ran, and random weights separate nothing
                raise
            print("done:", *line[:1], flush=True)  # noqa: T201  # for the test to count
