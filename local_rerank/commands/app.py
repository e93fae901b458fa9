"""The command line. Commands are imported when they run, so `--help` does not load torch.

Flags and `LOCAL_RERANK_*` variables come from the definitions of the options; flags take precedence. An error is
one line on standard error, without a traceback; the exit status is 1, or 2 for a wrong command line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cyclopts import App, CycloptsError
from cyclopts.config import Env

from local_rerank import __version__
from local_rerank.commands.console import Console, complain, failed, set_up_streams
from local_rerank.engine.cpu.process_setup import configure_process
from local_rerank.errors import ConfigError, LocalRerankError

if TYPE_CHECKING:
    from local_rerank.config import EngineConfig
    from local_rerank_server.config import ServerConfig

ENV_PREFIX = "LOCAL_RERANK_"

app = App(
    name="local-rerank",
    help="Rank documents by relevance to a query with a Qwen3-Reranker model on this machine.",
    version=__version__,
    config=Env(ENV_PREFIX, command=False),
    console=Console(),
    error_formatter=lambda error: f"local-rerank: {error}",
    error_console=Console(stderr=True, width=1000),  # wide, to keep an error on one line
)
for _name, _function, _help in (
    ("serve", "local_rerank_server:serve", "Serve rerank APIs over HTTP."),
    ("rank", "local_rerank.commands.rank:rank", "Rank documents from arguments, a file or standard input."),
    ("eval", "local_rerank.commands.eval:evaluate", "Measure how much a model improves a first-stage run.\n\n"
     "Prints nDCG@10, MRR, MAP and recall, and tests whether differences are significant."),
    ("batch", "local_rerank.commands.batch:batch", "Score a file of queries and documents.\n\n"
     "The same command line resumes a killed job. Records that cannot be ranked go to OUTPUT.rejects.jsonl."),
    ("compare", "local_rerank.commands.compare:compare", "Compare two runs query by query.\n\n"
     "Prints nDCG@10, MRR, MAP and recall, wins and losses, and the significance of the difference."),
    ("bench", "local_rerank.commands.bench:bench", "Measure speed, memory and exactness on this machine.\n\n"
     "Compares throughput with the limit of the hardware, and log-odds with fp32. Precisions run in alternation, so "
     "their ratios stay valid when the machine's speed changes."),
    ("plan", "local_rerank.commands.plan:plan", "Estimate time, machines and cost of a large job."),
    ("pull", "local_rerank.commands.models:pull", "Download a model from a hub."),
    ("pack", "local_rerank.commands.models:pack", "Pack a model into one bundle for offline use."),
    ("verify", "local_rerank.commands.models:verify", "Check the files and scores of a bundle.\n\n"
     "The exit status is 1 if scores differ from those in the bundle."),
    ("doctor", "local_rerank.commands.doctor:doctor", "Check that scores are correct, and diagnose faults.\n\n"
     "Also says what would make this machine faster. The exit status is 1 on a fault."),
):  # fmt: skip
    app.command(_function, name=_name, help=_help)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    configure_process()
    set_up_streams()
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except OSError as error:
        status = failed(error)
    sys.exit(status)


def _run(arguments: Sequence[str] | None) -> int | str | None:
    """Run a command and return its exit status. Raises BrokenPipeError if the reader of its output has gone."""
    try:
        _refuse_unknown_variables()
        return app(arguments) or 0
    except LocalRerankError as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as exit:
        if isinstance(exit.__context__, BrokenPipeError):  # rich exits with 1, which would mean an error of ours
            raise exit.__context__ from None
        return exit.code


def _refuse_unknown_variables() -> None:
    """Raise ConfigError for an unknown variable, because a misspelt one would have no effect."""
    given = sorted(name for name in os.environ if name.startswith(ENV_PREFIX))
    if not given:
        return
    known = {ENV_PREFIX + name.upper() for name in option_names()}
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(f"{unknown[0]} is not a known variable; `local-rerank serve --help` lists them")


def serve_options() -> tuple[EngineConfig, ServerConfig]:
    """Return the options of `serve` from variables and defaults, without flags. Raises ConfigError."""
    from local_rerank.config import EngineConfig
    from local_rerank_server.config import ServerConfig

    _refuse_unknown_variables()
    try:
        _, given, _ = app.parse_args(["serve"], print_error=False, exit_on_error=False)
    except CycloptsError as error:
        raise ConfigError(str(error)) from None
    return given.arguments.get("engine") or EngineConfig(), given.arguments.get("server") or ServerConfig()


def option_names() -> list[str]:
    """Return the names of all options that have a variable."""
    import dataclasses

    from local_rerank.config import EngineConfig
    from local_rerank_server.config import ServerConfig

    return [field.name for config in (EngineConfig, ServerConfig) for field in dataclasses.fields(config)]
