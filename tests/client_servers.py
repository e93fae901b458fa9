"""What tests/clients and tests/playground share: two servers on the built-in model, and Python processes.

One server requires a key and truncates long documents. The other requires none, truncates nothing and returns documents
as strings where a client can choose. Both use the dtype of the fixture `nano`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.clients.driver import ENVIRONMENTS, VARIABLES, environment_bin
from tests.serving import serving

DOCUMENTED_KEY = "any"  # used by docs/clients.md
TYPED_KEY = "schlüssel-密钥"
OTHER_NAME = "playground.test"  # of the open server, for tests/playground
TWIN = "twin"  # the keyed server's second model, loaded at its first request
MAX_DOCUMENT_TOKENS = 128  # of the keyed server
OPTIONS = ("--device", "cpu", "--dtype", "fp32", "--no-self-test")
HOST = Path(__file__).parent / "clients" / "python_host.py"

RunPython = Callable[..., str]


@contextmanager
def two_servers(folder: Path) -> Iterator[tuple[str, str]]:
    """Base URLs of the keyed server and of the open one, which start in parallel."""
    keys = folder / "keys"
    keys.write_text(f"documented:{DOCUMENTED_KEY}\ntyped:{TYPED_KEY}\n", encoding="utf-8")
    requires_key = ("--api-key-file", str(keys), "--max-document-tokens", str(MAX_DOCUMENT_TOKENS))
    requires_key += ("--model", "local-rerank-nano", "--model", f"{TWIN}=local-rerank-nano")
    with ExitStack() as stack, ThreadPoolExecutor() as starters:
        starting = (
            serving(folder / "keyed.log", *OPTIONS, *requires_key),
            serving(folder / "open.log", *OPTIONS, "--document-echo", "string", "--allowed-hosts", OTHER_NAME),
        )
        keyed, open_ = starters.map(stack.enter_context, starting)
        yield keyed.address, open_.address


@contextmanager
def python_hosts() -> Iterator[RunPython]:
    """`run_python(environment, text, *arguments)`: the output of that program, run by `clients/python_host.py`."""
    hosts: dict[str, subprocess.Popen[str]] = {}

    def start(environment: str) -> subprocess.Popen[str]:
        command = [environment_bin(environment) / "python", HOST]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=VARIABLES, cwd=ENVIRONMENTS / environment,
        )  # fmt: skip
        return stack.enter_context(process)  # closes the pipes, at which the process ends

    def run_python(environment: str, text: str, *arguments: str, path: str = "-", given: str = "") -> str:
        host = hosts[environment] = hosts.get(environment) or start(environment)
        assert host.stdin is not None
        assert host.stdout is not None
        program = {"text": text, "path": path, "arguments": arguments, "input": given}
        print(json.dumps(program), file=host.stdin, flush=True)
        done = json.loads(host.stdout.readline())
        assert done["status"] == 0, f"{path}: {done['stderr']}"
        printed: str = done["stdout"]
        return printed

    with ExitStack() as stack:
        yield run_python
