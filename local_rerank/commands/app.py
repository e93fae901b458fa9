"""The command line. Each command is a function in a module of its own, imported when it runs: `--help` loads no torch.

Flags and `LOCAL_RERANK_*` variables come from the options' definitions; a flag wins over a variable. Errors end in one
line on standard error and exit status 1 (2 for the command line itself), without a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cyclopts import App, CycloptsError
from cyclopts.config import Env
from rich.console import Console

from local_rerank import __version__
from local_rerank.engine.cpu.process_setup import configure_process
from local_rerank.errors import ConfigError, LocalRerankError

if TYPE_CHECKING:
    from local_rerank.config import EngineConfig
    from local_rerank_server.config import ServerConfig

ENV_PREFIX = "LOCAL_RERANK_"

app = App(
    name="local-rerank",
    help="Rank documents by relevance to a query with a Qwen3-Reranker model, offline, on this machine.",
    version=__version__,
    config=Env(ENV_PREFIX, command=False),
    error_formatter=lambda error: f"local-rerank: {error}",
    error_console=Console(stderr=True, width=1000),  # one line, as for every other error
)
app.command("local_rerank_server:serve", name="serve", help="Serve rerank APIs over HTTP.")
app.command("local_rerank.commands.rank:rank", name="rank", help="Rank documents given here, in a file or piped in.")
app.command("local_rerank.commands.eval:evaluate", name="eval", help="Measure how much a model improves a search run.")
app.command("local_rerank.commands.batch:batch", name="batch", help="Score a file of queries and documents.")
app.command("local_rerank.commands.compare:compare", name="compare", help="Compare two runs, query by query.")
app.command(
    "local_rerank.commands.bench:bench", name="bench", help="Measure speed against other code and the hardware."
)
app.command("local_rerank.commands.plan:plan", name="plan", help="Say how long a large job takes, and on how much.")
app.command("local_rerank.commands.models:pull", name="pull", help="Download a model from a hub.")
app.command("local_rerank.commands.models:pack", name="pack", help="Write a model into one bundle for use offline.")
app.command("local_rerank.commands.models:verify", name="verify", help="Check a bundle's files and its scores.")
app.command("local_rerank.commands.doctor:doctor", name="doctor", help="Say whether the scores are right, and why not.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    configure_process()
    try:
        _refuse_unknown_variables()
        sys.exit(app(arguments) or 0)
    except LocalRerankError as error:
        print(f"local-rerank: {error}", file=sys.stderr)  # noqa: T201  # the one place that speaks without rich
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _refuse_unknown_variables() -> None:
    """A misspelt variable would be passed over in silence; name it instead."""
    given = sorted(name for name in os.environ if name.startswith(ENV_PREFIX))
    if not given:
        return
    known = {ENV_PREFIX + name.upper() for name in option_names()}
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(f"{unknown[0]} is no option's variable; `local-rerank serve --help` lists them")


def serve_options() -> tuple[EngineConfig, ServerConfig]:
    """The options of a `serve` without flags: those that variables set, else the defaults. Raises ConfigError."""
    from local_rerank.config import EngineConfig
    from local_rerank_server.config import ServerConfig

    _refuse_unknown_variables()
    try:
        _, given, _ = app.parse_args(["serve"], print_error=False, exit_on_error=False)
    except CycloptsError as error:
        raise ConfigError(str(error)) from None
    return given.arguments.get("engine") or EngineConfig(), given.arguments.get("server") or ServerConfig()


def option_names() -> list[str]:
    """Names of all options that have a variable."""
    import dataclasses

    from local_rerank.config import EngineConfig
    from local_rerank_server.config import ServerConfig

    return [field.name for config in (EngineConfig, ServerConfig) for field in dataclasses.fields(config)]
