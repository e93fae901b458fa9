"""Finds a model's files and checks that they can be a reranker.

`open_checkpoint` turns the user's name for a model (none, an alias, a folder, a bundle or a hub id) into a
`Checkpoint`. We read only safetensors weights and never run code from a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from local_rerank.checkpoints.bundles import is_bundle, open_bundle
from local_rerank.checkpoints.download import fetch
from local_rerank.checkpoints.files import has_adapter, missing_files, no_weights, require_kind, weight_files
from local_rerank.checkpoints.hub_cache import find_snapshot, repository_of, split_cache_path
from local_rerank.checkpoints.model_config import DEFAULT_HEAD_DIM, read_config
from local_rerank.checkpoints.recipes import Recipe, choose_recipe
from local_rerank.checkpoints.tensors import check_tensors, stored_tensors
from local_rerank.errors import CheckpointError
from local_rerank.requests.encoder_pairs import EncoderTokenizer
from local_rerank.requests.parts import PromptLimits
from local_rerank.requests.prompts import PromptTemplate
from local_rerank.requests.tokenization import PairTokenizer

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "local-rerank-nano"
ALIASES = {
    "qwen3-reranker-0.6b": "Qwen/Qwen3-Reranker-0.6B",
    "qwen3-reranker-4b": "Qwen/Qwen3-Reranker-4B",
    "qwen3-reranker-8b": "Qwen/Qwen3-Reranker-8B",
}
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[\w.-]+")

_WORDS = ("reranker", "cross-encoder", "crossencoder")  # in the model card of a reranker
DIGEST_BLOCKS, DIGEST_BLOCK_BYTES = 16, 1 << 16  # of each weights file

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
    config: dict[str, Any]  # the keys of config.json that count
    weights: tuple[str, ...]  # names of the safetensors files
    recipe: Recipe
    recipe_reason: str

    @property
    def template(self) -> PromptTemplate:
        """The prompt's fixed texts. Raises CheckpointError for an encoder, which has none."""
        if self.recipe.template is None:
            raise CheckpointError(f"{self.model_id} is an encoder: it has no prompt template")
        return self.recipe.template

    @property
    def activation(self) -> str:
        """What makes a relevance score of log-odds: "sigmoid", or "identity" for some classifiers with one label."""
        return "sigmoid" if self.config["num_labels"] != 1 else str(self.config.get("activation", "sigmoid"))

    def tokenizer(self, *, limits: PromptLimits, default_instruction: str) -> PairTokenizer:
        """The tokenizer for pairs. Raises CheckpointError without a usable tokenizer.json, or ConfigError."""
        kind = EncoderTokenizer if self.recipe.is_encoder else PairTokenizer
        template = () if self.recipe.template is None else (self.recipe.template,)
        tokenizer = kind.from_folder(self.folder, *template, limits=limits, default_instruction=default_instruction)
        self._require_embeddings(tokenizer)
        return tokenizer

    @property
    def needs_fp32(self) -> bool:
        """True for the built-in model, whose log-odds change by up to 2.2 in bf16."""
        return self.model_id == EMBEDDED_MODEL

    @property
    def stored_dtype(self) -> str:
        """The dtype in config.json; empty if it has none."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "")

    @property
    def num_parameters(self) -> int:
        """Numbers in the safetensors files, by their headers."""
        return sum(math.prod(tensor.shape) for tensor in stored_tensors(self.folder, self.weights).values())

    @property
    def max_length(self) -> int:
        """Maximum tokens of a prompt."""
        unused = int(self.config.get("pad_token_id", 1)) + 1 if self.recipe.positions_follow_padding else 0
        positions = int(self.config.get("max_position_embeddings", 8192)) - unused
        return min(positions, int(self.config.get("model_max_length", positions)))

    @property
    def head_dim(self) -> int:
        """Of each attention head."""
        if self.recipe.is_encoder:
            return int(self.config["hidden_size"] // self.config["num_attention_heads"])
        return int(self.config.get("head_dim", DEFAULT_HEAD_DIM))

    def _require_embeddings(self, tokenizer: PairTokenizer) -> None:
        """Raise CheckpointError if the tokenizer has ids or token types without a row in the embeddings."""
        for key, what, number in (
            ("vocab_size", "ids", tokenizer.num_ids),
            ("type_vocab_size", "token types", tokenizer.num_types),
        ):
            if number > self.config.get(key, number):
                what = f"the tokenizer of {self.folder} has {number} {what}, but {key} is {self.config[key]}"
                raise CheckpointError(f"{what}; use the tokenizer.json that belongs to the weights")

    @property
    def digest(self) -> str:
        """Hex digest of names, sizes and 16 blocks of each weights file, which other weights change.

        Reading whole files would take a minute for an 8B model on a disk of 250 MB/s.
        """
        digest = hashlib.sha256()
        for name in self.weights:
            with (self.folder / name).open("rb") as stream:
                size = stream.seek(0, 2)
                digest.update(f"{name} {size}\n".encode())
                for block in range(DIGEST_BLOCKS):
                    stream.seek(block * size // DIGEST_BLOCKS)
                    digest.update(stream.read(DIGEST_BLOCK_BYTES))
        return digest.hexdigest()[:32]


def open_checkpoint(model: str | None, revision: str | None = None, recipe: str | None = None) -> Checkpoint:
    """Find a model's files; downloads them only if a hub model is not in the local cache. Raises CheckpointError.

    `recipe`: the name of the row in `RECIPES`, for a checkpoint whose files do not say that it is a reranker.
    An empty revision or recipe (a container's variable may be empty) means none. Ignores a revision, with a warning, if
    the model is not from a hub.
    """
    try:
        local = _open_local(model, revision or None, recipe or None)
        if local is not None:
            if revision and local.source != "hub":
                what = "ignoring revision %r: only hub models have revisions, and %s is %s"
                logger.warning(what, revision, local.model_id, _KINDS[local.source])
            return local
        assert model is not None
        model_id, revision = hub_id(model), revision or None
        folder, why_not = find_snapshot(repository_of(model_id), revision)
        folder = folder or fetch(model_id, revision, why_not=f"{why_not}; nor is {model} a folder here")
        return _inspect(folder, model_id, "hub", revision, recipe or None)
    except OSError as error:
        raise CheckpointError(f"model {model!r} cannot be read: {error}") from error


def _open_local(model: str | None, revision: str | None, recipe: str | None) -> Checkpoint | None:
    """The built-in model, a bundle, a folder or a place in a hub's cache; None for any other name."""
    if model is None or model == EMBEDDED_MODEL:
        return _inspect(Path(__file__).parents[1] / "nano", EMBEDDED_MODEL, "embedded", None, recipe)
    path = Path(model)
    with contextlib.suppress(RuntimeError):  # no home folder of that name
        path = path.expanduser()  # from Python or a variable no shell has done it
    if is_bundle(path):
        return _open_bundle(path, recipe)
    if not path.is_dir():
        return None
    if cached := split_cache_path(path):
        model_id, repository, snapshot = cached
        folder, why_not = (snapshot, "") if snapshot and not revision else find_snapshot(repository, revision)
        if folder is None:
            raise CheckpointError(f"{path} has no complete snapshot: {why_not}; run `local-rerank pull {model_id}`")
        return _inspect(folder, model_id, "hub", revision, recipe)
    return _inspect(path, path.resolve().name, "folder", None, recipe)


def hub_id(model: str) -> str:
    """The hub id of an alias, or `model` itself if it is a hub id. Raises CheckpointError otherwise."""
    model_id = ALIASES.get(model.lower(), model)
    if not _HUB_ID.fullmatch(model_id):
        raise CheckpointError(
            f"model {model!r} is no folder or bundle on this machine, no hub id (owner/name) "
            f"and no alias ({', '.join(ALIASES)})"
        )
    return model_id


def _open_bundle(path: Path, recipe: str | None) -> Checkpoint:
    manifest, folder = open_bundle(path)
    checkpoint = _inspect(folder, manifest.model_id, "bundle", manifest.revision, recipe)
    if manifest.recipe != checkpoint.recipe.stored:
        raise CheckpointError(
            f"{path} was packed by {manifest.made_by} with a different prompt template; pack it again with this version"
        )
    return checkpoint


def _inspect(folder: Path, model_id: str, source: Source, revision: str | None, recipe_name: str | None) -> Checkpoint:
    """Refuse a folder that cannot be a reranker; warn if it may be a chat model."""
    config = read_config(folder)
    architecture = config["architectures"][0]
    recipe, reason = choose_recipe(folder, architecture, recipe_name)
    files = _checked_files(folder)
    check_tensors(folder, files, config, architecture)
    if has_adapter(folder):
        logger.warning("ignoring the adapter in %s (adapter_*): the folder has a whole model", folder)
    if source in ("folder", "hub") and recipe_name is None and not is_marked_reranker(folder):
        other = "another classifier" if recipe.is_encoder else "a chat model"
        what = "no file of %s says that it is a reranker; scores of %s are meaningless; if it is one, set recipe to %s"
        logger.warning(what, folder, other, recipe.name)
    return Checkpoint(
        model_id=model_id,
        folder=folder,
        source=source,
        revision=revision,
        architecture=architecture,
        config=config,
        weights=tuple(files),
        recipe=recipe,
        recipe_reason=reason,
    )


def _checked_files(folder: Path) -> list[str]:
    """The names of the safetensors files, if all files that loading needs are there."""
    files = weight_files(folder)
    if not files:
        raise no_weights(folder)
    if missing := [name for name in missing_files(folder) if name != "tokenizer.json"]:  # has its own error
        raise CheckpointError(f"{folder} is incomplete: {', '.join(missing[:3])} missing ({len(missing)} in all)")
    if (folder / "tokenizer.json").is_file():
        require_kind(folder / "tokenizer.json")
    return files


def is_marked_reranker(folder: Path) -> bool:
    """Whether a file marks a reranker: sentence-transformers' LogitScore module, the model card or a chat template."""
    if (folder / "1_LogitScore").is_dir() or any(word in _text(folder / "README.md").lower() for word in _WORDS):
        return True
    if any(word in _text(folder / "config.json") for word in ('"sentence_transformers"', '"sbert_ce_')):
        return True
    if '"CrossEncoder"' in _text(folder / "config_sentence_transformers.json"):
        return True
    templates = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
    return any("Judge whether the Document" in _text(folder / name) for name in templates)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
