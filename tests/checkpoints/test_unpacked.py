"""What a bundle is loaded from: the unpacked copy of an archive, or a folder in place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from local_rerank.checkpoints.bundles import open_bundle, unpacked_copy
from local_rerank.checkpoints.manifest import MANIFEST
from local_rerank.errors import CheckpointError
from tests.checkpoints.conftest import EXACT
from tests.command_line import command


def edit_manifest_file(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_a_file_is_unpacked_once_and_a_folder_used_in_place(packed: dict[str, Path], cache: Path) -> None:
    assert open_bundle(packed["folder"])[1] == packed["folder"]
    assert not cache.exists()
    _, folder = open_bundle(packed["file"])
    assert folder.parent == cache
    inode = (folder / "config.json").stat().st_ino
    moved = shutil.copy(packed["file"], cache.parent / "elsewhere.zip")
    assert open_bundle(Path(moved))[1] == folder
    assert (folder / "config.json").stat().st_ino == inode
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_a_cache_folder_that_lost_a_file_is_unpacked_again(packed: dict[str, Path]) -> None:
    _, folder = open_bundle(packed["file"])
    (folder / "tokenizer.json").unlink()
    assert open_bundle(packed["file"])[1] == folder
    assert (folder / "tokenizer.json").is_file()


def edit_a_byte(folder: Path) -> None:
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(content.replace(b"0.3", b"0.4"))


def link_away(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit_a_byte, "config.json has changed"),
        (link_away, "config.json has changed"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"other weights"), "model.safetensors was added"),
        (lambda folder: (folder / "LICENSE").unlink(), "LICENSE is missing"),
        (lambda folder: (folder / ".unpacked").write_text("[]"), "1_LogitScore/config.json has changed"),
        (lambda folder: (folder / ".unpacked").write_text("{"), ".unpacked is missing or damaged"),
        (lambda folder: edit_manifest_file(folder / MANIFEST), "local-rerank.json has changed"),
    ],
)
def test_a_changed_unpacked_copy_is_unpacked_again_with_a_warning(
    change: Callable[[Path], object], says: str, packed: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = open_bundle(packed["file"])
    good = (folder / "config.json").read_bytes()
    change(folder)
    assert open_bundle(packed["file"])[1] == folder
    assert f"again, because {says} in {folder}" in caplog.text
    assert (folder / "config.json").read_bytes() == good
    assert not (folder / "config.json").is_symlink()
    assert unpacked_copy(packed["file"]) == (folder, [])


def test_verify_finds_a_change_of_the_unpacked_copy_that_kept_size_and_time(packed: dict[str, Path]) -> None:
    _, folder = open_bundle(packed["file"])
    before = (folder / "config.json").stat()
    edit_a_byte(folder)
    os.utime(folder / "config.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    done = command("verify", str(packed["file"]), *EXACT)
    assert done.returncode == 1
    assert f"{folder}, the unpacked copy of {packed['file']}, is damaged: config.json: sha256 is" in done.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "model.safetensors.index.json"])
def test_a_folder_bundle_with_a_file_past_its_manifest_is_refused(
    name: str, packed: dict[str, Path], tmp_path: Path
) -> None:
    bundle = shutil.copytree(packed["folder"], tmp_path / "tiny")
    files = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["files"]
    if name not in files:  # the weights in one file instead of the shards
        for shard in bundle.glob("model*"):
            files.pop(shard.name, None)
            shard.unlink()
        (bundle / name).write_bytes(b"other weights")
    files.pop(name, None)
    edit_manifest_file(bundle / MANIFEST, files=files)
    with pytest.raises(CheckpointError, match=f"contains {name}, which its manifest does not name"):
        open_bundle(bundle)
