"""Downloads the files of a hub model, after checking that they fit on the disk.

The hub libraries handle progress, resuming, tokens and mirrors (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, ...).
Every failure is a CheckpointError that says what to run instead.
"""

from __future__ import annotations

import errno
import logging
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from local_rerank.checkpoints.free_space import gigabytes, require_free_space
from local_rerank.errors import CheckpointError

logger = logging.getLogger(__name__)

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
"""Patterns of the files to download: neither pickles nor code."""

_CANNOT_WRITE = (errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EROFS, errno.ENOSPC)

Hub = Literal["huggingface", "modelscope"]


def silence_telemetry() -> None:
    """Call before importing huggingface_hub or transformers, because the setting is read on import."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def fetch(model_id: str, revision: str | None, to: Path | None = None, *, why_not: str = "") -> Path:
    """Download a model from the Hugging Face hub into its cache or into `to`; returns the folder.

    `why_not`: why the local cache does not do, for the error.
    """
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
    except (HfHubHTTPError, OSError, ValueError) as error:  # the hub's offline and not-found errors are OSErrors
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            raise CheckpointError(
                f"{to or constants.HF_HUB_CACHE} cannot be written: {error}; use another --to"
            ) from error
        raise _unreachable(model_id, revision, error, why_not) from error


def fetch_from_modelscope(model_id: str, revision: str | None, to: Path | None = None) -> Path:
    """Like `fetch`, from ModelScope. Needs the package modelscope."""
    try:
        from modelscope import snapshot_download
        from modelscope.hub.api import HubApi
    except ImportError as error:
        raise CheckpointError("the package modelscope is not installed; run `pip install modelscope`") from error

    try:
        files = HubApi().get_model_files(model_id, revision=revision)
        sizes = [file["Size"] or 0 for file in files if any(fnmatch(file["Path"], pattern) for pattern in HUB_FILES)]
        require_free_space(to or Path(os.environ.get("MODELSCOPE_CACHE") or Path.home()), sum(sizes))
        folder = snapshot_download(
            model_id, revision=revision, local_dir=None if to is None else str(to), allow_patterns=HUB_FILES
        )
    except CheckpointError:
        raise
    except Exception as error:  # ModelScope's errors have no common base class
        raise CheckpointError(f"ModelScope cannot serve {model_id}: {type(error).__name__}: {error}") from error
    return Path(folder)


def _unreachable(model_id: str, revision: str | None, error: Exception, why_not: str) -> CheckpointError:
    cause = error.__cause__ or error  # huggingface_hub wraps errors of the network
    reason = (str(cause).strip().splitlines() or [""])[0]
    pull = f"local-rerank pull {model_id}" + (f" --revision {revision}" if revision else "")
    cache = f"{model_id} is not in the local cache ({why_not}) and " if why_not else f"{model_id}: "
    return CheckpointError(
        f"{cache}the hub cannot serve it ({type(cause).__name__}: {reason}). "
        f"On a machine with a network, run `{pull} --to FOLDER`, copy FOLDER here and pass it as --model"
    )
