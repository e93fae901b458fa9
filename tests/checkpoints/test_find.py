"""Finding a model: aliases, folders, the cache, a hub on loopback; and each reason for refusing one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from local_rerank import Reranker
from local_rerank.checkpoints.bundles import read_manifest
from local_rerank.checkpoints.find import EMBEDDED_MODEL, hub_id, open_checkpoint
from local_rerank.errors import CheckpointError
from tests.command_line import command
from tests.fake_hub import COMMIT, FakeHub, fake_hub
from tests.tiny_checkpoints import make_checkpoint

OPEN = (
    "import dataclasses, json, sys\n"
    "from local_rerank.errors import CheckpointError\n"
    "from local_rerank.checkpoints.find import open_checkpoint\n"
    "try:\n"
    "    found = open_checkpoint(*sys.argv[1:])\n"
    "    print(json.dumps([found.model_id, found.source, str(found.folder)]))\n"
    "except CheckpointError as error:\n"
    "    print(json.dumps(str(error)))\n"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a hub model: shards, and files that must not be downloaded."""
    folder = make_checkpoint(tmp_path_factory.mktemp("hub") / "tiny-reranker", max_shard_size="60KB")
    for name in ("pytorch_model.bin", "modeling_evil.py", "model.gguf"):
        (folder / name).write_bytes(b"not to be downloaded")
    return folder


@pytest.fixture(scope="module")
def hub(checkpoint: Path) -> Iterator[FakeHub]:
    with fake_hub(checkpoint) as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    if "hub" in request.fixturenames:
        running = request.getfixturevalue("hub")
        running.requests.clear()
        running.tokens.clear()
        running.claimed_size = None


@pytest.fixture(scope="module")
def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Variables for a process of its own, because huggingface_hub reads them on import."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LOCAL_RERANK_"))}
    return kept | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | variables


def opened(home: Path, *arguments: str, **variables: str) -> list[str] | str:
    """Id, source and folder of the checkpoint that `open_checkpoint` finds in its own process, or the error."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(home, **variables),
        check=True,
    )
    found: list[str] | str = json.loads(done.stdout)
    return found


def pull(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return local_rerank(home, "pull", *arguments, **variables)


def local_rerank(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "local_rerank", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(home, **variables),
        check=False,
    )


def fill_cache(home: Path, checkpoint: Path) -> Path:
    """Make a cache in the layout of huggingface_hub, with the files for loading and no model card."""
    repository = home / "hub" / "models--owner--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    for number, path in enumerate(sorted([*checkpoint.glob("*.json"), *checkpoint.glob("*.safetensors")])):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_the_default_is_the_built_in_model() -> None:
    for name in (None, EMBEDDED_MODEL):
        found = open_checkpoint(name)
        assert (found.model_id, found.source) == (EMBEDDED_MODEL, "embedded")


def test_hub_id_resolves_an_alias_and_keeps_a_hub_id() -> None:
    assert hub_id("Qwen3-Reranker-4B") == "Qwen/Qwen3-Reranker-4B"
    assert hub_id("owner/name.v2") == "owner/name.v2"


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../x", "https://huggingface.co/a/b", "", "a/"])
def test_a_name_of_nothing_raises_and_says_what_is_allowed(name: str) -> None:
    with pytest.raises(CheckpointError, match="no folder or bundle on this machine, no hub id"):
        hub_id(name)


def test_a_revision_without_a_hub_model_is_ignored_with_a_warning(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for model, kind in ((str(checkpoint), "tiny-reranker is a folder"), (None, "local-rerank-nano is built in")):
        caplog.clear()
        assert open_checkpoint(model, "main").revision is None
        assert f"ignoring revision 'main': only hub models have revisions, and {kind}" in caplog.messages
        caplog.clear()
        open_checkpoint(model, "")
        assert "revision" not in caplog.text, "a container's variable may be empty"


def test_a_cached_model_needs_no_network(checkpoint: Path, hub: FakeHub, tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path, checkpoint)
    assert opened(tmp_path, "owner/tiny", HF_ENDPOINT=hub.url) == ["owner/tiny", "hub", str(snapshot)]
    assert opened(tmp_path, "owner/tiny", COMMIT, HF_HUB_OFFLINE="1") == ["owner/tiny", "hub", str(snapshot)]
    moved = opened(tmp_path / "x", "owner/tiny", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert moved == ["owner/tiny", "hub", str(snapshot)]
    assert hub.requests == []


@pytest.mark.parametrize("offline", ["1", "0"])
@pytest.mark.parametrize("lost", [None, "model-00001-of", "tokenizer.json"])
def test_without_a_network_a_model_that_is_not_cached_raises_with_the_command_to_run(
    lost: str | None, offline: str, checkpoint: Path, closed_port: str, tmp_path: Path
) -> None:
    if lost is not None:
        next(path for path in fill_cache(tmp_path, checkpoint).iterdir() if path.name.startswith(lost)).unlink()
    error = opened(tmp_path, "owner/tiny", "v2", HF_ENDPOINT=closed_port, HF_HUB_OFFLINE=offline)
    assert isinstance(error, str)
    assert "owner/tiny is not in the local cache (" in error
    assert ") and the hub cannot serve it (" in error
    assert ("OfflineModeIsEnabled" if offline == "1" else "ConnectError") in error
    assert "run `local-rerank pull owner/tiny --revision v2 --to FOLDER`" in error
    assert "pass it as --model" in error


def test_a_partly_cached_model_is_completed(checkpoint: Path, hub: FakeHub, tmp_path: Path) -> None:
    lost = next(fill_cache(tmp_path, checkpoint).glob("model-00001-of*"))
    lost.unlink()
    found = opened(tmp_path, "owner/tiny", HF_ENDPOINT=hub.url)
    assert found == ["owner/tiny", "hub", str(lost.parent)]
    assert lost.is_file()


def test_pull_downloads_neither_pickles_nor_code(checkpoint: Path, hub: FakeHub, tmp_path: Path) -> None:
    done = pull(tmp_path, "owner/tiny", HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert "serve it: local-rerank serve --model owner/tiny" in done.stdout
    asked = {path.rpartition("/")[2] for _, path in hub.requests if "/resolve/" in path}
    unwanted = {"pytorch_model.bin", "modeling_evil.py", "model.gguf"}
    assert asked == {path.name for path in checkpoint.iterdir()} - unwanted
    assert set(hub.tokens.values()) == {"Bearer hf_secret"}
    assert all("owner/tiny" in path for path in hub.tokens), "only the model is requested: no telemetry"
    snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / COMMIT
    assert opened(tmp_path, "owner/tiny", HF_HUB_OFFLINE="1") == ["owner/tiny", "hub", str(snapshot)]


def test_pack_stores_the_hub_id_and_commit_of_a_cached_model(checkpoint: Path, tmp_path: Path) -> None:
    fill_cache(tmp_path, checkpoint)
    arguments = ("pack", "owner/tiny", "-o", str(tmp_path / "tiny"), "--no-self-test", "--device", "cpu")
    done = local_rerank(tmp_path, *arguments, HF_HUB_OFFLINE="1", LOCAL_RERANK_MODEL="the argument wins")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "tiny")
    assert (manifest.model_id, manifest.revision, manifest.licence) == ("owner/tiny", COMMIT, None)
    assert not any(path.is_symlink() for path in (tmp_path / "tiny").iterdir())


def test_pull_to_a_folder_downloads_only_missing_files(checkpoint: Path, hub: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny-reranker"
    for lost in (None, "tokenizer.json"):
        if lost is not None:
            (target / lost).unlink()
        hub.requests.clear()
        done = pull(tmp_path / "home", "owner/tiny", "--to", str(target), HF_ENDPOINT=hub.url)
        assert done.returncode == 0, done.stderr
        fetched = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
        assert lost is None or fetched == {lost}
        for name in ("config.json", "tokenizer.json", "README.md"):
            assert (target / name).read_bytes() == (checkpoint / name).read_bytes()
    assert f"--model {target}" in done.stdout.replace("\n", "")
    assert not (tmp_path / "home" / "hub" / "models--owner--tiny" / "blobs").exists()


def test_pull_replaces_no_files_of_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("keep", encoding="utf-8")
    done = command("pull", "owner/tiny", "--to", str(tmp_path))
    assert (done.returncode, "which has files that are no model's; choose a new folder" in done.stderr) == (1, True)
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [("README.md", "keep")]


def test_pull_checks_free_disk_space_before_downloading(hub: FakeHub, tmp_path: Path) -> None:
    hub.claimed_size = 10**18
    done = pull(tmp_path, "owner/tiny", "--to", str(tmp_path / "models"), HF_ENDPOINT=hub.url)
    assert done.returncode == 1
    assert "of free disk space" in done.stderr
    assert not [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]


@pytest.mark.parametrize("arguments", [("owner/other",), ("owner/tiny", "--revision", "nowhere")])
def test_pull_of_an_unknown_model_or_revision_prints_one_line(
    arguments: tuple[str, ...], hub: FakeHub, tmp_path: Path
) -> None:
    done = pull(tmp_path, *arguments, HF_ENDPOINT=hub.url)
    assert done.returncode == 1
    assert "the hub cannot serve it (RepositoryNotFoundError" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_pull_from_modelscope_without_its_package_says_what_to_install() -> None:
    done = command("pull", "qwen3-reranker-0.6b", "--hub", "modelscope")
    assert (done.returncode, "pip install modelscope" in done.stderr) == (1, True)


def test_pull_from_modelscope_uses_its_package(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stub of the package, which has the signatures of modelscope 1.40."""
    stub = tmp_path / "stub" / "modelscope"
    (stub / "hub").mkdir(parents=True)
    (stub / "__init__.py").write_text(
        "import shutil\n"
        "def snapshot_download(model_id=None, revision=None, *, local_dir=None, allow_patterns=None):\n"
        f"    assert (model_id, revision) == ('Qwen/Qwen3-Reranker-0.6B', 'v1'), (model_id, revision)\n"
        "    assert '*.safetensors' in allow_patterns and '*.bin' not in allow_patterns\n"
        f"    return shutil.copytree({str(checkpoint)!r}, local_dir)\n"
    )
    (stub / "hub" / "__init__.py").touch()
    (stub / "hub" / "api.py").write_text(
        "class HubApi:\n"
        "    def get_model_files(self, model_id, revision=None, root=None, recursive=True):\n"
        "        return [{'Path': 'model.safetensors', 'Size': SIZE}, {'Path': 'model.bin', 'Size': 10**18}]\n"
    )
    for size, status, message in ((10**18, 1, "of free disk space"), (1000, 0, "serve it: ")):
        api = (stub / "hub" / "api.py").read_text().replace("SIZE", str(size))
        root = tmp_path / str(size)
        shutil.copytree(stub.parent, root)
        (root / "modelscope" / "hub" / "api.py").write_text(api)
        arguments = ("qwen3-reranker-0.6b", "--hub", "modelscope", "--revision", "v1", "--to", str(tmp_path / "to"))
        done = pull(tmp_path, *arguments, PYTHONPATH=str(root))
        assert done.returncode == status, done.stderr
        assert message in done.stdout + done.stderr


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


def lose_a_shard(folder: Path) -> None:
    weights = {"model.norm.weight": "model-00002-of-00002.safetensors", "a": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json: not a model folder"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "must be a JSON object, not a list"),
        (lambda folder: edit_config(folder, architectures=["BertModel"]), "has architecture BertModel; supported are"),
        (lambda folder: edit_config(folder, architectures=[]), "has architecture none"),
        (lambda folder: edit_config(folder, use_sliding_window=True), "sliding-window attention"),
        (lambda folder: edit_config(folder, layer_types=["sliding_attention"] * 2), "sliding-window attention"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            r"no safetensors weights; copy model\.saf",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            r"no safetensors weights; pytorch_model\.bin is a pickle",
        ),
        (lose_a_shard, r"incomplete: model-00002-of-00002\.safetensors missing"),
        (
            lambda folder: edit_config(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3),
            r"lacks weights: model\.layers\.2",
        ),
        (lambda folder: os.truncate(folder / "model.safetensors", 50_000), "has 50000 bytes, but "),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"no tokenizer\.json; a fast tokenizer is required"),
    ],
)
def test_a_folder_that_is_not_a_reranker_raises_with_the_reason(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "tiny-reranker")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Reranker(str(folder), device="cpu", dtype="fp32")


@pytest.mark.parametrize(
    ("marker", "text", "warns"),
    [
        (None, "", True),
        ("README.md", "A chat model.", True),
        ("README.md", "Qwen3-Reranker is a reranker.", False),
        ("chat_template.jinja", "Judge whether the Document meets the requirements", False),
        ("1_LogitScore/config.json", "{}", False),
    ],
)
def test_a_checkpoint_that_may_be_a_chat_model_loads_with_a_warning(
    marker: str | None, text: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_checkpoint(tmp_path / "model")
    (folder / "README.md").unlink()
    if marker is not None:
        (folder / marker).parent.mkdir(exist_ok=True)
        (folder / marker).write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(str(folder)).source == "folder"
    assert ("says that it is a reranker" in caplog.text) is warns
