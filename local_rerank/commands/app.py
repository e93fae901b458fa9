"""The command line. Commands are imported when they run, so `--help` does not load torch.

Flags and `LOCAL_RERANK_*` variables come from the definitions of the options; flags take precedence, then variables,
then the file of `serve --config`; an empty variable is unset. An error is one line on standard error, without a
traceback; the exit status is 1, or 2 for a wrong command line. If the reader of the output has gone, as in `| head -1`,
it is 141, as if SIGPIPE had ended the process.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_origin

from cyclopts import (
    App,
    Argument,
    ArgumentCollection,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    Token,
    UnusedCliTokensError,
)
from cyclopts.config import Env

from local_rerank import __version__
from local_rerank.commands.console import (
    INTERRUPTED,
    Console,
    complain,
    failed,
    missing_package,
    option,
    set_up_streams,
)
from local_rerank.engine.cpu.process_setup import configure_process
from local_rerank.errors import ConfigError, LocalRerankError

if TYPE_CHECKING:
    from local_rerank.config import EngineConfig
    from local_rerank_server.config import ServerConfig

ENV_PREFIX = "LOCAL_RERANK_"

# Kubernetes injects these for a Service named local-rerank, or local-rerank-anything:
# https://kubernetes.io/docs/tutorials/services/connect-applications-service/#environment-variables
_KUBERNETES_NAME = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://.*")


class _Variables(Env):
    """Options from `option_variables`. cyclopts' own class also takes empty variables and those of Kubernetes."""

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        if any(argument.name == "--server" and argument.tokens for argument in arguments):
            return  # variables are about an engine in this process, and `rank --server` has none
        given = option_variables()
        for argument in arguments:
            name = self._convert_argument(commands, argument)
            if name not in given or argument.tokens or not argument.parse:
                continue
            values = argument.env_var_split(given[name]) or [given[name]]  # white space alone is not "no API key"
            for index, value in enumerate(values):
                argument.append(Token(keyword=name, value=value, source=self.source, index=index))


class _ConfigFile:
    """Options of `serve` from the file of --config, where neither a flag nor a variable sets them."""

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        by_option = {
            argument.name.removeprefix("--").replace("-", "_"): argument for argument in arguments if argument.parse
        }
        if "config" not in by_option or not (tokens := by_option["config"].tokens):
            return
        from local_rerank.models.options import read_config_file, section_text

        path = Path(tokens[0].value)
        lists = {name for name, argument in by_option.items() if get_origin(argument.hint) is tuple}
        options, sections = read_config_file(path, by_option.keys() - {"config", "*"}, lists)
        set_before = {name for name, argument in by_option.items() if argument.tokens}
        texts = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
        for name in texts.keys() - set_before:
            for value in texts[name]:
                _append(by_option[name], path, str(value).lower() if isinstance(value, bool) else str(value))
        for name, section in sections.items():  # flags and variables win over a section's options, too
            mine = {key: value for key, value in section.items() if key == "model" or key not in set_before}
            _append(by_option["model"], path, section_text(path, name, mine))


def _append(argument: Argument, path: Path, value: str) -> None:
    name = argument.name.removeprefix("--")
    argument.append(Token(keyword=f"{path}: {name}", value=value, source=str(path), index=len(argument.tokens)))


app = App(
    name="local-rerank",
    help="Rank documents by relevance to a query with a Qwen3-Reranker model or an encoder, on this machine.",
    version=__version__,
    config=(_Variables(ENV_PREFIX, command=False), _ConfigFile()),
    # no --empty-api-key, and no default of flags, which are all off, or of texts and lists that are empty
    default_parameter=Parameter(negative_iterable=(), show_default=lambda value: value or None),
    console=Console(),
)
for _name, _function, _help in (
    ("serve", "local_rerank_server:serve", "Serve rerank APIs over HTTP."),
    ("rank", "local_rerank.commands.rank:rank", "Rank documents from arguments, a file or standard input."),
    ("eval", "local_rerank.commands.eval:evaluate", "Measure how much a model improves a first-stage run.\n\n"
     "Prints nDCG@10, MRR, MAP and recall, and tests whether differences are significant."),
    ("batch", "local_rerank.commands.batch:batch", "Score a file of queries and documents.\n\n"
     "The same command line resumes a killed job. Records that cannot be ranked go to OUTPUT.rejects.jsonl."),
    ("calibrate", "local_rerank.commands.calibrate:calibrate", "Fit probabilities and thresholds to labelled pairs.\n\n"
     "The exit status is 3 if scores do not separate relevant documents from others."),
    ("compare", "local_rerank.commands.eval:compare", "Compare two runs query by query.\n\n"
     "Prints nDCG@10, MRR, MAP and recall, wins and losses, and the significance of the difference."),
    ("bench", "local_rerank.commands.bench:bench", "Measure speed, memory and exactness on this machine.\n\n"
     "Compares throughput with the limit of the hardware, and log-odds with fp32. Precisions run in alternation, so "
     "their ratios stay valid when the machine's speed changes. Says first how long it will take; Ctrl-C prints what "
     "was measured until then."),
    ("plan", "local_rerank.commands.plan:plan", "Estimate time, machines and cost of a large job."),
    ("pull", "local_rerank.commands.models:pull", "Download a model from a hub."),
    ("pack", "local_rerank.commands.models:pack", "Pack a model into one bundle for offline use."),
    ("verify", "local_rerank.commands.models:verify", "Check the files and scores of a bundle.\n\n"
     "The exit status is 1 if scores differ from those in the bundle."),
    ("models", "local_rerank.commands.models:models", "List the models on this machine, with their sizes."),
    ("rm", "local_rerank.commands.models:rm", "Delete a model from a cache.\n\n"
     "It is one of the hub's cache, or the unpacked copy of a bundle. A running server keeps what it has loaded."),
    ("doctor", "local_rerank.commands.doctor:doctor", "Check that scores are correct, and diagnose faults.\n\n"
     "Also says what would make this machine faster. The exit status is 1 on a fault."),
    ("completion", "local_rerank.commands.app:completion", "Print the completion script of a shell.\n\n"
     "In a bash that is open: `source <(local-rerank completion bash)`; in a fish: `local-rerank completion fish | "
     "source`. For every new shell write it to a file: for bash with the package bash-completion "
     "~/.local/share/bash-completion/completions/local-rerank, for zsh _local-rerank in a folder of $fpath, for fish "
     "~/.config/fish/completions/local-rerank.fish."),
):  # fmt: skip
    app.command(_function, name=_name, help=_help)


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], option()], /) -> None:
    """Print the completion script of a shell."""
    script = app.generate_completion(shell=shell)
    # in bash complete names of files where cyclopts has nothing to offer, as for --model, which may be a folder
    sys.stdout.write(script.replace("complete -F", "complete -o default -F"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    configure_process()
    set_up_streams()
    atexit.register(gc.freeze)  # Python's last collection walks the objects of torch and transformers for 1.1 s
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except OSError as error:
        status, message = failed(error)
        if message:
            _print_error(message, arguments)
    sys.exit(status)


def _run(arguments: Sequence[str]) -> int | str | None:
    """Run a command and return its exit status. Raises BrokenPipeError or another OSError of the output."""
    try:
        _refuse_unknown_variables()
        return app(arguments, print_error=False, exit_on_error=False) or 0
    except CycloptsError as error:
        _print_error(_usage_error(error, arguments), arguments)
        return 2
    except LocalRerankError as error:
        _print_error(str(error), arguments)
        return 1
    except ImportError as error:
        if not (message := missing_package(error)):
            raise
        _print_error(message, arguments)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as exit:
        return exit.code


def _usage_error(error: CycloptsError, arguments: Sequence[str]) -> str:
    """The error in one line, which quotes no API key."""
    if isinstance(error, UnusedCliTokensError) and any(text.startswith("--api-key") for text in arguments):
        return "there are more arguments than options take; each key needs an --api-key of its own"
    if isinstance(error, MissingArgumentError) and error.keyword is None and error.argument and error.command_chain:
        name, command = error.argument.name, " ".join(error.command_chain)
        what = name if error.argument.index is None else name.removeprefix("--").upper()
        return f"{command} needs {what}; `local-rerank {command} --help` shows how"
    return str(error)


def _print_error(message: str, arguments: Sequence[str]) -> None:
    """Print the error that ends the process, as a line of JSON if that is how `serve` logs."""
    if arguments and arguments[0] == "serve" and _logs_json(arguments):
        from local_rerank_server.logs import log_fatal

        return log_fatal(message)
    complain(message)


def _logs_json(arguments: Sequence[str]) -> bool:
    """Whether --log-format or its variable asks for JSON; also if another argument is wrong."""
    line = " ".join(arguments).replace("=", " ").replace("log_format", "log-format")
    given = re.findall(r"--log-format (\S+)", line) or [option_variables().get(f"{ENV_PREFIX}LOG_FORMAT")]
    return "json" in given[-1:]


def option_variables() -> dict[str, str]:
    """Return our environment variables by name, without the empty ones and those that Kubernetes sets."""
    ours = {name: value for name, value in os.environ.items() if name.startswith(ENV_PREFIX) and value}
    return {name: value for name, value in ours.items() if not _set_by_kubernetes(name, value)}


def kubernetes_variables() -> list[str]:
    """Return the names of the variables that Kubernetes sets for a Service whose name begins as ours does."""
    return sorted(
        name for name, value in os.environ.items() if name.startswith(ENV_PREFIX) and _set_by_kubernetes(name, value)
    )


def _set_by_kubernetes(name: str, value: str) -> bool:
    if _KUBERNETES_NAME.fullmatch(name.removeprefix(ENV_PREFIX[:-1])):
        return True
    return name.endswith("_PORT") and _KUBERNETES_PORT.fullmatch(value) is not None


def _refuse_unknown_variables() -> None:
    """Raise ConfigError for an unknown variable, because a misspelt one would have no effect."""
    known = {ENV_PREFIX + name.upper() for name in option_names()}
    if unknown := sorted(option_variables().keys() - known):
        raise ConfigError(f"{unknown[0]} is not a known variable; `local-rerank serve --help` lists them")


def serve_options() -> tuple[EngineConfig, ServerConfig]:
    """Return the options of `serve` for the first model, from variables, file and defaults. Raises ConfigError."""
    from local_rerank.config import EngineConfig
    from local_rerank.models.options import models_of
    from local_rerank_server.config import ServerConfig

    _refuse_unknown_variables()
    try:
        _, given, _ = app.parse_args(["serve"], print_error=False, exit_on_error=False)
    except CycloptsError as error:
        raise ConfigError(str(error)) from None
    server = given.arguments.get("server") or ServerConfig()
    return models_of(server.model, given.arguments.get("engine") or EngineConfig())[0].engine, server


def option_names() -> list[str]:
    """Return the names of all options that have a variable."""
    import dataclasses

    from local_rerank.config import EngineConfig
    from local_rerank_server.config import ServerConfig

    return [field.name for config in (EngineConfig, ServerConfig) for field in dataclasses.fields(config)]
