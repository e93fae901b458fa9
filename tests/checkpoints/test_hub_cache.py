"""The hub's cache as people copy it, edit it and mount it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from local_rerank.checkpoints.find import open_checkpoint
from local_rerank.checkpoints.hub_cache import find_snapshot
from local_rerank.errors import CheckpointError
from tests.fake_hub import COMMIT
from tests.tiny_checkpoints import make_checkpoint

OTHER = "f" * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cached") / "tiny-reranker")


@pytest.fixture
def repository(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model owner/tiny in the cache, with one snapshot, and a hub that cannot be asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(checkpoint, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return repository


@pytest.mark.parametrize("refs", ["newline", "missing", "main", "stale"])
def test_c8_a_complete_snapshot_is_found_whatever_the_refs(refs: str, repository: Path) -> None:
    snapshot = repository / "snapshots" / COMMIT
    if refs == "newline":
        (repository / "refs" / "main").write_text(COMMIT + "\n", encoding="utf-8")
    elif refs == "stale":  # of a snapshot that is not there
        (repository / "refs" / "main").write_text(OTHER, encoding="utf-8")
    else:
        shutil.rmtree(repository / "refs")
    if refs == "main":
        snapshot = snapshot.rename(repository / "snapshots" / "main")
    found = open_checkpoint("owner/tiny")
    assert (found.model_id, found.source, found.folder) == ("owner/tiny", "hub", snapshot)


def test_c8_without_a_ref_the_newest_complete_snapshot_is_used_and_logged(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = shutil.copytree(repository / "snapshots" / COMMIT, repository / "snapshots" / OTHER)
    (repository / "snapshots" / "incomplete").mkdir()
    (repository / "refs" / "main").unlink()
    os.utime(repository / "snapshots" / COMMIT, (1, 1))
    assert find_snapshot(repository, None) == (newest, "")
    assert f"using the newest complete one, {OTHER}" in caplog.text
    assert find_snapshot(repository, COMMIT)[0] == repository / "snapshots" / COMMIT


def test_c8_what_was_looked_for_where_is_said(repository: Path) -> None:
    weights = repository / "snapshots" / COMMIT / "model.safetensors"
    weights.unlink()
    weights.symlink_to("../../blobs/gone")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("owner/tiny")
    missing = f"{weights.parent} lacks model.safetensors (its link leads nowhere)"
    assert (
        f"owner/tiny is not in the local cache ({missing}; nor is owner/tiny a folder here) and the hub cannot serve it"
        in str(caught.value)
    )
    with pytest.raises(CheckpointError, match=rf"/snapshots has none for v2 among {COMMIT}"):
        open_checkpoint("owner/tiny", "v2")
    with pytest.raises(CheckpointError, match=r"there is no .*models--owner--other"):
        open_checkpoint("owner/other")
    with pytest.raises(CheckpointError, match=r"has no complete snapshot: .* lacks model\.safetensors"):
        open_checkpoint(str(repository))


@pytest.mark.parametrize("place", ["", "snapshots", f"snapshots/{COMMIT}", "link"])
def test_c8_a_folder_of_the_cache_has_the_name_of_its_model(place: str, repository: Path, tmp_path: Path) -> None:
    (repository / "link").symlink_to(f"snapshots/{COMMIT}")
    found = open_checkpoint(f"{repository / place}/")
    assert (found.model_id, found.source) == ("owner/tiny", "hub")
    assert found.folder.resolve().name == COMMIT
    with pytest.raises(CheckpointError, match="has none for v2 among"):
        open_checkpoint(f"{repository / place}/", "v2")


def test_c8_the_cache_itself_names_its_models(repository: Path) -> None:
    with pytest.raises(CheckpointError, match="not a model folder; models in it: owner/tiny"):
        open_checkpoint(str(repository.parent))


def test_c8_an_adapter_in_the_cache_is_named_offline(repository: Path) -> None:
    snapshot = repository / "snapshots" / COMMIT
    for path in snapshot.iterdir():
        path.unlink()
    (snapshot / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="a LoRA adapter without a model: merge it into its base"):
        open_checkpoint("owner/tiny")
