"""Bring a hub model's files to this machine: what is needed is asked for first, the disk is looked at, then they come.

Progress, resuming, tokens and mirrors (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, ...) are the hub libraries' own.
Everything that goes wrong is one CheckpointError that says what to run where. Knows nothing of what the files hold.
"""

from __future__ import annotations

import logging
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from local_rerank.checkpoints.free_space import gigabytes, require_free_space
from local_rerank.errors import CheckpointError

logger = logging.getLogger(__name__)

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
"""Patterns of what is downloaded: neither pickles nor code."""

Hub = Literal["huggingface", "modelscope"]


def silence_telemetry() -> None:
    """To be called before the hub's library is imported, by us or by transformers: it reads this only then."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def fetch(model_id: str, revision: str | None, to: Path | None = None) -> Path:
    """The folder with a model's files, downloaded from the Hugging Face hub into its cache or into `to`."""
    silence_telemetry()
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    logger.info("asking %s for %s", constants.ENDPOINT, model_id)
    try:
        planned = snapshot_download(model_id, revision=revision, local_dir=to, allow_patterns=HUB_FILES, dry_run=True)
        num_bytes = sum(file.file_size or 0 for file in planned if file.will_download)
        require_free_space(to or Path(constants.HF_HUB_CACHE), num_bytes)
        logger.info("%s of %s to download", gigabytes(num_bytes), model_id)
        return Path(snapshot_download(model_id, revision=revision, local_dir=to, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:  # the hub's "offline" and "not found" are OSErrors
        raise _unreachable(model_id, revision, error) from error


def fetch_from_modelscope(model_id: str, revision: str | None, to: Path | None = None) -> Path:
    """As `fetch`, from ModelScope, whose package must be installed."""
    try:
        from modelscope import snapshot_download
        from modelscope.hub.api import HubApi
    except ImportError as error:
        raise CheckpointError("the package modelscope is not installed; `pip install modelscope`") from error

    try:
        files = HubApi().get_model_files(model_id, revision=revision)
        sizes = [file["Size"] or 0 for file in files if any(fnmatch(file["Path"], pattern) for pattern in HUB_FILES)]
        require_free_space(to or Path(os.environ.get("MODELSCOPE_CACHE") or Path.home()), sum(sizes))
        folder = snapshot_download(
            model_id, revision=revision, local_dir=None if to is None else str(to), allow_patterns=HUB_FILES
        )
    except CheckpointError:
        raise
    except Exception as error:  # its errors have no common root
        raise CheckpointError(f"ModelScope cannot serve {model_id}: {type(error).__name__}: {error}") from error
    return Path(folder)


def _unreachable(model_id: str, revision: str | None, error: Exception) -> CheckpointError:
    cause = error.__cause__ or error  # the hub's library wraps what it met
    reason = (str(cause).strip().splitlines() or [""])[0]
    pull = f"local-rerank pull {model_id}" + (f" --revision {revision}" if revision else "")
    return CheckpointError(
        f"{model_id} is not in the local cache and the hub cannot serve it ({type(cause).__name__}: {reason}). "
        f"On a machine with a network run `{pull} --to FOLDER`, copy FOLDER here and pass it as --model"
    )
