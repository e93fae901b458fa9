"""The commands `models`, which lists what is on this machine, and `rm`, which deletes only what is in a cache."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from local_rerank.checkpoints.bundles import open_bundle
from tests.command_line import command
from tests.fake_hub import COMMIT


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def hub(packable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with owner/tiny and a data set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(packable, tmp_path / "hub/models--owner--tiny/snapshots" / COMMIT)
    (tmp_path / "hub/datasets--owner--pairs").mkdir()
    return tmp_path / "hub"


def test_models_lists_caches_folders_and_bundles_with_what_they_are(
    hub: Path, packed: dict[str, Path], packable: Path, tmp_path: Path
) -> None:
    copy = open_bundle(packed["file"])[1]
    folder = tmp_path / "models"
    shutil.copytree(packable, folder / "unmarked", ignore=shutil.ignore_patterns("1_LogitScore"))
    (folder / "unmarked/README.md").unlink()
    shutil.copytree(packable, folder / "broken")
    (folder / "broken/tokenizer.json").unlink()
    shutil.copy(packed["file"], folder / "tiny.zip")
    done = command("models")
    listed = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert list(listed) == [
        "owner/tiny", f"tiny-reranker@{copy.name[:8]}", "models/broken", "models/tiny.zip", "models/unmarked",
    ]  # fmt: skip
    size = sum(path.stat().st_size for path in (folder / "unmarked").rglob("*") if path.is_file())
    assert f" {size} bytes  no file of it says that it is a reranker" in listed["models/unmarked"]
    assert "reranker (qwen3-reranker)" in listed["owner/tiny"]
    assert "reranker (tiny-reranker)" in listed["models/tiny.zip"]
    assert (done.stderr, done.returncode) == ("", 0)
    assert [line.split()[0] for line in command("models", str(packable)).stdout.splitlines()][2:] == [str(packable)]
    assert "folder nowhere does not exist" in command("models", "nowhere").stderr


def test_rm_deletes_only_what_is_listed_in_a_cache_and_asks(
    hub: Path, packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = open_bundle(packed["file"])[1]
    for name in ("owner/pairs", "../hub", str(hub), "models--owner--tiny", str(packed["folder"]), ""):
        assert "which is in no cache; the caches have owner/tiny, tiny-rer" in command("rm", name, "--yes").stderr
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert "standard input is no terminal; give --yes" in command("rm", "owner/tiny").stderr
    for answer, status, is_left in (("", 1, True), ("n\n", 1, True), ("y\n", 0, False)):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        assert command("rm", "owner/tiny").returncode == status
        assert (hub / "models--owner--tiny").exists() == is_left
    assert command("rm", f"tiny-reranker@{copy.name[:8]}", "--yes").returncode == 0
    assert not copy.exists()
    elsewhere = hub.parent / "elsewhere"
    elsewhere.mkdir()
    (hub / "models--owner--linked").symlink_to(elsewhere)
    assert "cannot be deleted" in command("rm", "owner/linked", "--yes").stderr
    assert sorted(path.name for path in hub.iterdir()) == ["datasets--owner--pairs", "models--owner--linked"]
    assert elsewhere.exists()
