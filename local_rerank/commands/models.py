"""The commands for models on this machine: `pull`, `pack`, `verify`, `models`, which lists them, and `rm`."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from local_rerank import __version__
from local_rerank.checkpoints.download import Hub
from local_rerank.commands.console import option, say, status, warn
from local_rerank.config import EngineConfig, OtherEngineConfig, PackEngineConfig
from local_rerank.errors import CheckpointError, ConfigError

OF_A_PULL = ("config.json", ".cache/huggingface", ".msc")  # what a model's folder has, also if its download was stopped
LICENCE_LINE = re.compile(r"^license: *(\S+)", re.MULTILINE)  # in a model card's front matter


def pull(
    model: Annotated[str, option(help="Hub id (owner/name) or alias (qwen3-reranker-0.6b|4b|8b).")],
    /,
    *,
    revision: Annotated[str | None, option(help="Branch, tag or commit.")] = None,
    to: Annotated[
        Path | None, option(help="Folder for the files. Default: the hub's cache, where --model finds it.")
    ] = None,
    hub: Annotated[
        Hub, option(help="Hub to download from; modelscope needs the package of that name.")
    ] = "huggingface",
) -> None:
    """Download MODEL, resuming earlier downloads, and check that it is a reranker that can be loaded."""
    from local_rerank.bench.kept_speeds import before_download
    from local_rerank.checkpoints.download import fetch, fetch_from_modelscope
    from local_rerank.checkpoints.find import hub_id, open_checkpoint

    model_id = hub_id(model)
    if to is not None and to.is_dir() and any(to.iterdir()) and not any((to / name).exists() for name in OF_A_PULL):
        raise ConfigError(f"to is {to}, which has files that are no model's; choose a new folder, or an empty one")
    warn(before_download(replace(EngineConfig(), model=model, device="cpu", revision=revision)))
    folder = (fetch if hub == "huggingface" else fetch_from_modelscope)(model_id, revision, to)
    checkpoint = open_checkpoint(str(folder))
    in_cache = to is None and hub == "huggingface"
    say(f"{model_id}: a {checkpoint.architecture} in {folder}")
    say(f"serve it: local-rerank serve --model {model_id if in_cache else folder}")


def pack(
    model: Annotated[str | None, option(help="Hub id, alias or folder. Default: the built-in model.")] = None,
    /,
    *,
    output: Annotated[
        Path, option(name=["--output", "-o"], help="Bundle to write: a file if the name ends in .zip, else a folder.")
    ],
    no_self_test: Annotated[bool, option(help="Pack the model even if its self-test fails.")] = False,
    engine: PackEngineConfig | None = None,
) -> None:
    """Pack MODEL into one bundle: weights, tokenizer, prompt template, licence, checksums and expected scores."""
    from local_rerank.checkpoints.bundles import write_bundle
    from local_rerank.checkpoints.files import checkpoint_files
    from local_rerank.checkpoints.free_space import gigabytes
    from local_rerank.checkpoints.known_scores import STORED, to_json
    from local_rerank.checkpoints.manifest import MANIFEST, Manifest
    from local_rerank.reranker import Reranker
    from local_rerank.selftest.self_test import log_odds_of, require_self_test

    if os.path.lexists(output):
        raise ConfigError(f"output is {output}, which exists; remove it or choose another name")
    with status("loading the model"), Reranker(config=_exact(engine, model)) as reranker:
        if not no_self_test:
            require_self_test(reranker)
        checkpoint = reranker.checkpoint
        pairs = STORED[:-1] if checkpoint.recipe.is_encoder else STORED  # the last one has another instruction
        expected = to_json(pairs, log_odds_of(reranker, pairs), reranker.info.dtype)
    with status(f"writing {output}"):
        manifest = Manifest(
            model_id=checkpoint.model_id,
            revision=checkpoint.folder.name if checkpoint.source == "hub" else checkpoint.revision,
            licence=_licence(checkpoint.folder),
            made_by=f"local-rerank {__version__}",
            recipe=checkpoint.recipe.stored,
            expected=expected,
        )
        names = [name for name in checkpoint_files(checkpoint.folder) if name != MANIFEST]  # of an earlier bundle
        manifest = write_bundle(output, checkpoint.folder, names, manifest)
    num_bytes = sum(entry.size for entry in manifest.files.values())
    say(
        f"{output}: {manifest.model_id}, {len(manifest.files)} files, {gigabytes(num_bytes)}, "
        f"licence: {manifest.licence or 'not stated'}"
    )
    say(f"serve it anywhere: local-rerank serve --model {output}")


def verify(
    file: Annotated[Path, option(help="Bundle, a file or a folder.")],
    /,
    *,
    engine: OtherEngineConfig | None = None,
) -> int:
    """Check the checksums of a bundle, recompute its expected scores, and return the exit status."""
    from local_rerank.checkpoints.bundles import damaged_files, read_manifest, unpacked_copy
    from local_rerank.commands.doctor import print_scores
    from local_rerank.reranker import Reranker
    from local_rerank.selftest.self_test import self_test

    manifest = read_manifest(file)
    with status(f"checking {len(manifest.files)} files"):
        if damaged := damaged_files(file):
            raise CheckpointError(f"{file} is damaged: {'; '.join(damaged)}")
        folder, damaged = unpacked_copy(file) or (file, [])
    if damaged:
        what = f"{folder}, the unpacked copy of {file}, is damaged: {'; '.join(damaged)}"
        raise CheckpointError(f"{what}; remove that folder, and the next start unpacks the file again")
    say(f"{len(manifest.files)} files of {manifest.model_id} match the checksums of the manifest")
    with status("loading the model"), Reranker(config=replace(engine or EngineConfig(), model=str(file))) as reranker:
        outcome = self_test(reranker)
    print_scores(outcome.scores)
    say(f"{'pass' if outcome.passed else f'FAULT: {outcome.fault}'}: {outcome.detail}")
    return int(not outcome.passed)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A model on this machine. `rm` takes the name of one that is in a cache."""

    name: str
    kind: str
    path: Path

    @property
    def num_bytes(self) -> int:
        """Bytes on disk; links into the same cache count once."""
        paths = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(path.stat().st_size for path in paths if path.is_file() and not path.is_symlink())

    @property
    def verdict(self) -> str:
        """Which reranker it is, or why it cannot be loaded as one."""
        from local_rerank.checkpoints.bundles import read_manifest
        from local_rerank.checkpoints.find import is_marked_reranker, open_checkpoint

        try:
            if self.path.is_file():
                return f"reranker ({read_manifest(self.path).model_id})"
            checkpoint = open_checkpoint(str(self.path))
        except CheckpointError as error:
            return f"not usable: {error}"
        is_marked = checkpoint.source in ("embedded", "bundle") or is_marked_reranker(checkpoint.folder)
        return f"reranker ({checkpoint.recipe.name})" if is_marked else "no file of it says that it is a reranker"


def models(
    *folders: Annotated[Path, option(help="Folder of models, or of one model. Default: ./models, if it is there.")],
) -> None:
    """List the models on this machine, their sizes, and whether they are rerankers."""
    from local_rerank.checkpoints.free_space import gigabytes

    if missing := [folder for folder in folders if not folder.exists()]:
        raise ConfigError(f"folder {missing[0]} does not exist; give a folder of models, or one model's")
    found = [*_in_caches(), *_in_folders(folders or tuple(filter(Path.is_dir, [Path("models")])))]
    width = max((len(model.name) for model in found), default=0)
    logging.disable(logging.WARNING)  # verdicts say the same
    try:
        for model in found:
            say(f"{model.name:{width}}  {model.kind:15}  {gigabytes(model.num_bytes):>10}  {model.verdict}")
    finally:
        logging.disable(logging.NOTSET)
    warn("" if found else "no models but the built-in one; `local-rerank pull` downloads one")


def rm(
    name: Annotated[str, option(help="Name that `local-rerank models` lists for a model in a cache.")],
    /,
    *,
    yes: Annotated[bool, option(help="Delete without asking.")] = False,
) -> int:
    """Delete a model from the hub's cache, or the unpacked copy of a bundle, and return the exit status."""
    from local_rerank.checkpoints.find import ALIASES
    from local_rerank.checkpoints.free_space import gigabytes

    found = {model.name: model for model in _in_caches()}
    model = found.get(ALIASES.get(name.lower(), name))
    if model is None:
        raise ConfigError(f"name is {name!r}, which is in no cache; the caches have {', '.join(found) or 'no models'}")
    what = f"{model.name}, {gigabytes(model.num_bytes)} in {model.path}"
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("rm asks before it deletes, but standard input is no terminal; give --yes")
        say(f"Delete {what}? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return 1
    try:
        shutil.rmtree(model.path)  # refuses a link
    except OSError as error:
        raise CheckpointError(f"{model.path} cannot be deleted: {error}") from error
    say(f"deleted {what}")
    return 0


def _in_caches() -> Iterator[Stored]:
    """Models in the hub's cache, and unpacked copies of bundles: all that `rm` may delete."""
    from local_rerank.checkpoints.bundles import read_manifest, unpacked_copies
    from local_rerank.checkpoints.hub_cache import repositories

    for model_id, folder in repositories():
        yield Stored(name=model_id, kind="hub's cache", path=folder)
    for folder in unpacked_copies():
        try:
            name = f"{read_manifest(folder).model_id}@{folder.name[:8]}"
        except CheckpointError:
            name = folder.name
        yield Stored(name=name, kind="unpacked bundle", path=folder)


def _in_folders(folders: tuple[Path, ...]) -> Iterator[Stored]:
    """The models in folders; a folder that has none counts as a model itself, whose verdict then says what is wrong."""
    from local_rerank.checkpoints.bundles import FILE_SUFFIX
    from local_rerank.checkpoints.manifest import MANIFEST

    for folder in folders:
        inside = [
            path for path in sorted(folder.glob("*")) if path.suffix == FILE_SUFFIX or (path / "config.json").is_file()
        ]
        for path in inside if inside and not (folder / "config.json").is_file() else [folder]:
            is_bundle = path.is_file() or (path / MANIFEST).is_file()
            yield Stored(name=str(path), kind="bundle" if is_bundle else "folder", path=path)


def _exact(engine: EngineConfig | None, model: str | None) -> EngineConfig:
    """Use fp32 for the expected scores unless another precision is set."""
    config = engine or EngineConfig()
    return replace(config, model=model or config.model, dtype="fp32" if config.dtype == "auto" else config.dtype)


def _licence(folder: Path) -> str | None:
    """Return the licence from the model card, else the first line of a licence file."""
    card = folder / "README.md"
    if card.is_file() and (found := LICENCE_LINE.search(card.read_text(encoding="utf-8", errors="replace"))):
        return found[1]
    for path in sorted(folder.glob("LICENSE*")):
        return path.read_text(encoding="utf-8", errors="replace").strip().partition("\n")[0].strip()
    return None
