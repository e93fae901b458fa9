"""The table of model families: how each one's checkpoints are recognized and scored. To add a family, add a row.

A recipe is chosen by `architectures` in config.json, never by a model's name. `--recipe NAME` names it where the files
do not say that they are a reranker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_rerank.errors import CheckpointError
from local_rerank.requests.prompts import QWEN3_RERANKER, PromptTemplate


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the checkpoints of a family are scored."""

    name: str
    architectures: tuple[str, ...]  # the first entry of `architectures` in config.json is one of them
    template: PromptTemplate | None  # None: an encoder, whose tokenizer joins query and document itself
    checkpoints: tuple[str, ...]  # known ones
    licence: str  # of those
    positions_follow_padding: bool = False  # the first is the padding id plus 1; that id is 1 by default

    @property
    def is_encoder(self) -> bool:
        return self.template is None

    @property
    def stored(self) -> dict[str, str]:
        """What decides how a pair is written, as a bundle stores it."""
        return {"recipe": self.name} if self.template is None else self.template.recipe


RECIPES = (
    Recipe(
        name="qwen3-reranker",
        architectures=("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
        template=QWEN3_RERANKER,
        checkpoints=("Qwen/Qwen3-Reranker-0.6B", "Qwen/Qwen3-Reranker-4B", "Qwen/Qwen3-Reranker-8B"),
        licence="Apache 2.0",
    ),
    Recipe(
        name="bert",
        architectures=("BertForSequenceClassification",),
        template=None,
        checkpoints=("cross-encoder/ms-marco-MiniLM-L6-v2", "cross-encoder/ms-marco-MiniLM-L12-v2"),
        licence="Apache 2.0",
    ),
    Recipe(
        name="xlm-roberta",
        architectures=("XLMRobertaForSequenceClassification",),
        template=None,
        checkpoints=(
            "BAAI/bge-reranker-v2-m3",
            "BAAI/bge-reranker-base",
            "BAAI/bge-reranker-large",
            "cross-encoder/mmarco-mMiniLMv2-L12-H384-v1",
        ),
        licence="Apache 2.0; bge-reranker-base and -large MIT",
        positions_follow_padding=True,
    ),
    Recipe(
        name="modernbert",
        architectures=("ModernBertForSequenceClassification",),
        template=None,
        checkpoints=("Alibaba-NLP/gte-reranker-modernbert-base", "ibm-granite/granite-embedding-reranker-english-r2"),
        licence="Apache 2.0",
    ),
)
ARCHITECTURES = tuple(architecture for recipe in RECIPES for architecture in recipe.architectures)
"""All that a checkpoint may have."""


def choose_recipe(folder: Path, architecture: str, name: str | None = None) -> tuple[Recipe, str]:
    """The recipe for an architecture of `ARCHITECTURES`, and the reason. Raises CheckpointError.

    `name`: the user's choice among those with this architecture.
    """
    found = [recipe for recipe in RECIPES if architecture in recipe.architectures]
    if name is None:
        return found[0], f"{folder.name} has architecture {architecture}"
    for recipe in found:
        if recipe.name == name:
            return recipe, "set by the user"
    names = ", ".join(recipe.name for recipe in found)
    raise CheckpointError(f"recipe is {name!r}; for architecture {architecture} of {folder} it must be {names}")


def require_no_code(folder: Path, architecture: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a checkpoint's layers are Python code in its repository, which we never run."""
    code = config.get("auto_map")
    is_ours = any(architecture in recipe.architectures and not recipe.is_encoder for recipe in RECIPES)
    if not code or is_ours:  # Qwen3's layers are known by the names and shapes of their weights
        return
    names = sorted(map(str, code.values())) if isinstance(code, dict) else [str(code)]
    raise CheckpointError(
        f"{folder} ({architecture}) computes with code from its repository ({', '.join(names)[:200]}: auto_map in "
        "config.json), which is never run; use a checkpoint of plain transformers, such as BAAI/bge-reranker-v2-m3"
    )
