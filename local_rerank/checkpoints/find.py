"""Finds a model's files and checks that they can be a reranker.

`open_checkpoint` turns the user's name for a model (none, an alias, a folder, a bundle or a hub id) into a
`Checkpoint`. We read only safetensors weights and never run code from a checkpoint.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from local_rerank.checkpoints.bundles import PICKLE_SUFFIXES, is_bundle, open_bundle
from local_rerank.checkpoints.download import fetch, silence_telemetry
from local_rerank.errors import CheckpointError
from local_rerank.requests.prompts import TEMPLATES, PromptTemplate

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "local-rerank-nano"
ALIASES = {
    "qwen3-reranker-0.6b": "Qwen/Qwen3-Reranker-0.6B",
    "qwen3-reranker-4b": "Qwen/Qwen3-Reranker-4B",
    "qwen3-reranker-8b": "Qwen/Qwen3-Reranker-8B",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NEEDED = ["config.json", "tokenizer.json", "*.safetensors"]  # for a complete cache entry; the model card is optional

Source = Literal["embedded", "folder", "bundle", "hub"]
_KINDS: dict[Source, str] = {"embedded": "built in", "folder": "a folder", "bundle": "a bundle"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder with a model's files, and their metadata."""

    model_id: str
    folder: Path
    source: Source
    revision: str | None
    architecture: str  # first entry of `architectures` in config.json
    config: dict[str, Any]  # config.json

    @property
    def template(self) -> PromptTemplate:
        return TEMPLATES[self.architecture]

    @property
    def needs_fp32(self) -> bool:
        """True for the built-in model, whose log-odds change by up to 2.2 in bf16."""
        return self.model_id == EMBEDDED_MODEL

    @property
    def stored_dtype(self) -> str:
        """The dtype in config.json; empty if it has none."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "")

    @property
    def max_length(self) -> int:
        """Maximum tokens of a prompt."""
        return int(self.config.get("max_position_embeddings", 8192))


def open_checkpoint(model: str | None, revision: str | None = None) -> Checkpoint:
    """Find a model's files; downloads them only if a hub model is not in the local cache. Raises CheckpointError.

    An empty revision (a container's variable may be empty) means none. Ignores a revision, with a warning, if the model
    is not from a hub.
    """
    local = _open_local(model)
    if local is not None:
        if revision:
            what = "ignoring revision %r: only hub models have revisions, and %s is %s"
            logger.warning(what, revision, local.model_id, _KINDS[local.source])
        return local
    assert model is not None
    model_id, revision = hub_id(model), revision or None
    folder = cached_folder(model_id, revision) or fetch(model_id, revision)
    return _inspect(folder, model_id, "hub", revision)


def _open_local(model: str | None) -> Checkpoint | None:
    """The built-in model, a bundle or a folder; None for any other name."""
    if model is None or model == EMBEDDED_MODEL:
        return _inspect(Path(__file__).parents[1] / "nano", EMBEDDED_MODEL, "embedded", None)
    if is_bundle(Path(model)):
        return _open_bundle(Path(model))
    if Path(model).is_dir():
        return _inspect(Path(model), Path(model).resolve().name, "folder", None)
    return None


def hub_id(model: str) -> str:
    """The hub id of an alias, or `model` itself if it is a hub id. Raises CheckpointError otherwise."""
    model_id = ALIASES.get(model.lower(), model)
    if not _HUB_ID.fullmatch(model_id):
        raise CheckpointError(
            f"model {model!r} is no folder or bundle on this machine, no hub id (owner/name) "
            f"and no alias ({', '.join(ALIASES)})"
        )
    return model_id


def cached_folder(model_id: str, revision: str | None) -> Path | None:
    """A hub model's snapshot in the local cache; None if it is missing or incomplete. Uses no network."""
    silence_telemetry()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model_id, revision=revision, local_files_only=True, allow_patterns=_NEEDED))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise CheckpointError(f"model {model_id!r} is not a hub id: {error}") from error
    return folder if _is_complete(folder) else None


def _open_bundle(path: Path) -> Checkpoint:
    manifest, folder = open_bundle(path)
    checkpoint = _inspect(folder, manifest.model_id, "bundle", manifest.revision)
    if manifest.recipe != asdict(checkpoint.template):
        raise CheckpointError(
            f"{path} was packed by {manifest.made_by} with a different prompt template; pack it again with this version"
        )
    return checkpoint


def _is_complete(folder: Path) -> bool:
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    return bool(files := weight_files(folder)) and all((folder / name).is_file() for name in files)


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that a model folder should have; empty if there is nothing to tell."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(_read_json(index).get("weight_map", {}).values()))
    return ["model.safetensors"] if (folder / "model.safetensors").is_file() else []


def _inspect(folder: Path, model_id: str, source: Source, revision: str | None) -> Checkpoint:
    """Refuse a folder that cannot be a reranker; warn if it may be a chat model."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: not a model folder")
    config = _read_json(folder / "config.json")
    architectures = config.get("architectures") or ["none"]
    if architectures[0] not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise CheckpointError(f"{folder} has architecture {architectures[0]}; supported are {known}")
    if config.get("use_sliding_window"):
        raise CheckpointError(f"{folder} uses sliding-window attention, which is not supported")
    _check_weights(folder)
    if source in ("folder", "hub") and not _is_marked_reranker(folder):
        logger.warning("no file of %s says that it is a reranker; scores of a chat model are meaningless", folder)
    return Checkpoint(
        model_id=model_id,
        folder=folder,
        source=source,
        revision=revision,
        architecture=architectures[0],
        config=config,
    )


def _check_weights(folder: Path) -> None:
    files = weight_files(folder)
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} is incomplete: {', '.join(missing[:3])} missing ({len(missing)} in all)")
    if not files:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        found = f"; {', '.join(pickles[:3])} is a pickle, which could run code" if pickles else ""
        raise CheckpointError(f"{folder} has no safetensors weights{found}")


def _is_marked_reranker(folder: Path) -> bool:
    """Whether a file marks a reranker: sentence-transformers' LogitScore module, the model card or a chat template."""
    if (folder / "1_LogitScore").is_dir() or "reranker" in _text(folder / "README.md").lower():
        return True
    templates = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
    return any("Judge whether the Document" in _text(folder / name) for name in templates)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must be a JSON object, not a {type(value).__name__}")
    return value
