"""A checkpoint that can be packed, and its bundles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import command
from tests.tiny_checkpoints import make_checkpoint

EXACT = ("--device", "cpu", "--dtype", "fp32", "--threads", "1")


@pytest.fixture(scope="session")
def packable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several shards, with a licence, a marker in a subfolder, and files that do not belong in a bundle."""
    folder = make_checkpoint(tmp_path_factory.mktemp("packable") / "tiny-reranker", seed=21, max_shard_size="40KB")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA random reranker.\n", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"local_rerank": {"chunk_tokens": 100}}), encoding="utf-8")
    (folder / "LICENSE").write_text("Apache License\n", encoding="utf-8")
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text("{}", encoding="utf-8")
    for name in ("pytorch_model.bin", "modeling.py", "other.safetensors", ".gitattributes"):
        (folder / name).write_bytes(b"not to be packed")
    return folder


@pytest.fixture(scope="session")
def packed(packable: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint packed as a file and as a folder."""
    where = tmp_path_factory.mktemp("bundles")
    bundles = {"file": where / "tiny.zip", "folder": where / "tiny-0.6B"}
    for bundle in bundles.values():
        done = command("pack", str(packable), "-o", str(bundle), "--no-self-test", *EXACT)
        assert done.returncode == 0, done.stderr
        assert str(bundle) in done.stdout
    return bundles


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "local-rerank" / "bundles"
