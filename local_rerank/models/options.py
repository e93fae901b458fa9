"""The models that a server has: texts of --model and sections of a configuration file -> ModelOptions."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from local_rerank.config import EngineConfig
from local_rerank.errors import ConfigError

DEFAULT_KEEP_ALIVE_SECONDS = 600.0  # of a server with several models

_NAMED = re.compile(r"([\w.:/-]+)=(.+)", re.DOTALL)
_SECTION = "\0"  # begins the text of a section; no argument or variable can have it
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_ENGINE_OPTIONS = frozenset(field.name for field in fields(EngineConfig))
SECTION_KEYS = _ENGINE_OPTIONS | {"aliases", "pinned"}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model of a server. Without a name it has that of its checkpoint."""

    engine: EngineConfig
    name: str | None = None
    aliases: tuple[str, ...] = ()
    pinned: bool = False


def models_of(texts: Sequence[str], engine: EngineConfig) -> tuple[ModelOptions, ...]:
    """The models of `--model` texts: MODEL, NAME=MODEL, or a section from `section_text`. The first is the default.

    A section that has the name of an earlier text adds its options to that. Raises ConfigError.
    """
    engine = EngineConfig(**{field.name: getattr(engine, field.name) for field in fields(EngineConfig)})
    if not texts:
        return (ModelOptions(engine=engine),)
    models: dict[str, ModelOptions] = {}
    for text in texts:
        if text.startswith(_SECTION):
            section = json.loads(text.removeprefix(_SECTION))
            name, options = section["name"], section["options"]
            models[name] = _with_section(models.get(name), name, options, engine, section["where"])
            continue
        found = None if Path(text).exists() else _NAMED.fullmatch(text)
        name, model = (found[1], found[2]) if found else (None, text)
        key = name or model
        if key in models:
            raise ConfigError(f"model {key} is given twice; give one of them another name, NAME=MODEL")
        models[key] = ModelOptions(engine=replace(engine, model=model), name=name)
    return tuple(models.values())


def _with_section(
    given: ModelOptions | None, name: str, options: Mapping[str, Any], engine: EngineConfig, where: str
) -> ModelOptions:
    aliases, pinned = options.get("aliases", []), options.get("pinned", False)
    if not name.strip():
        raise ConfigError(f"{where}: the name is empty; give the model a name, [models.NAME]")
    if not isinstance(aliases, list) or not all(isinstance(each, str) and each.strip() for each in aliases):
        raise ConfigError(f"{where}: aliases is {aliases!r}; it must be a list of names")
    if not isinstance(pinned, bool):
        raise ConfigError(f"{where}: pinned is {pinned!r}; it must be true or false")
    of_engine: dict[str, Any] = {"model": name} | {key: options[key] for key in options if key in _ENGINE_OPTIONS}
    if given is not None and given.name is not None:  # NAME=MODEL has said which model it is
        of_engine["model"] = given.engine.model
    try:
        config = replace(engine, **of_engine)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return ModelOptions(engine=config, name=name, aliases=tuple(aliases), pinned=pinned)


def read_config_file(
    path: Path, known: Collection[str], lists: Collection[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The options of a TOML file, and its sections `[models.NAME]`. Raises ConfigError.

    `known`: names of options, which the file may write with hyphens; `lists`: those that take several values.
    """
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:  # also of TOML, and of bytes that are not UTF-8
        raise ConfigError(f"config {path} cannot be read: {error}") from None
    sections = options.pop("models", {})
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise ConfigError(f"{path}: models must be sections, [models.NAME]")
    options = {key.replace("-", "_"): value for key, value in options.items()}
    sections = {
        name: {key.replace("-", "_"): value for key, value in section.items()} for name, section in sections.items()
    }
    _refuse_unknown(options, known, f"{path}")
    for name, section in sections.items():
        _refuse_unknown(section, SECTION_KEYS, f"{path}, [models.{name}]")
    for key, value in options.items():
        values = value if isinstance(value, list) and key in lists else [value]
        if not all(isinstance(each, str | int) for each in values):
            kinds = "a list of texts" if key in lists else "a text, a whole number, true or false"
            raise ConfigError(f"{path}: {key} is {value!r}; it must be {kinds}")
    return options, sections


def _refuse_unknown(options: Mapping[str, Any], known: Collection[str], where: str) -> None:
    if unknown := sorted(set(options) - set(known)):
        near = get_close_matches(unknown[0], known, n=1)
        hint = f"the nearest is {near[0]}" if near else "docs/options.md lists them"
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; {hint}")


def section_text(path: Path, name: str, section: Mapping[str, Any]) -> str:
    """A section as a text of `--model`."""
    return _SECTION + json.dumps({"name": name, "where": f"{path}, [models.{name}]", "options": section}, default=str)


def seconds_of(keep_alive: str | None, *, several: bool) -> float | None:
    """Seconds of a text such as 90s, 10m or 1h; None for never. Raises ConfigError.

    Without a text a server with `several` models unloads an idle one after DEFAULT_KEEP_ALIVE_SECONDS.
    """
    if keep_alive is None:
        return DEFAULT_KEEP_ALIVE_SECONDS if several else None
    if keep_alive == "never":
        return None
    if found := _DURATION.fullmatch(keep_alive):
        return float(found[1]) * _SECONDS[found[2]]
    raise ConfigError(f"keep_alive is {keep_alive!r}; it must be a time such as 90s, 10m or 1h, or never")
