"""The commands `pull`, `pack` and `verify`: download a model and move it to a machine without a network."""

from __future__ import annotations

import os
import re
from dataclasses import replace
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
