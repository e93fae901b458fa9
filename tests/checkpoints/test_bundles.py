"""Bundles: packing, unpacking, verifying, and refusing damaged and malicious ones."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from local_rerank import Reranker
from local_rerank.checkpoints.bundles import damaged_files, open_bundle, read_manifest
from local_rerank.checkpoints.free_space import require_free_space
from local_rerank.checkpoints.known_scores import STORED, from_json
from local_rerank.checkpoints.manifest import MANIFEST
from local_rerank.errors import CheckpointError
from local_rerank.selftest.self_test import self_test
from tests.checkpoints.conftest import EXACT
from tests.command_line import command
from tests.reference import ModelCard
from tests.tiny_checkpoints import make_checkpoint

PAIRS = [("q", "a"), ("q", "bb"), ("r", "a")]


def rewrite(
    bundle: Path,
    target: Path,
    change: Callable[[dict[str, bytes]], object],
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A copy of a file bundle with its members changed."""
    with zipfile.ZipFile(bundle) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def edit_manifest(members: dict[str, bytes], **changes: Any) -> None:
    members[MANIFEST] = json.dumps(json.loads(members[MANIFEST]) | changes).encode()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_bundle_contains_the_files_for_loading_and_a_manifest_of_them(
    kind: str, packed: dict[str, Path], packable: Path
) -> None:
    manifest = read_manifest(packed[kind])
    shards = {path.name for path in packable.glob("model-*.safetensors")}
    assert len(shards) > 1
    others = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert set(manifest.files) == shards | others | {"README.md", "LICENSE", "1_LogitScore/config.json"}
    assert (manifest.model_id, manifest.licence) == ("tiny-reranker", "apache-2.0")
    assert manifest.recipe["suffix"].endswith("</think>\n\n")
    labels = {"instruction_label", "query_label", "document_label"}
    assert manifest.recipe.keys() == {"prefix", "suffix", "yes", "no"} | labels  # others would refuse earlier bundles
    assert manifest.expected["dtype"] == "fp32"
    card = ModelCard(packable)
    for score, pair in zip(manifest.expected["scores"], STORED, strict=True):
        assert score["log_odds"] == pytest.approx(card.pair(pair.query, pair.document, pair.instruction), abs=1e-4)
    assert damaged_files(packed[kind]) == []


def test_packing_is_reproducible(packable: Path, packed: dict[str, Path], tmp_path: Path) -> None:
    assert command("pack", str(packable), "-o", str(tmp_path / "x.zip"), "--no-self-test", *EXACT).returncode == 0
    assert (tmp_path / "x.zip").read_bytes() == packed["file"].read_bytes()


def test_a_bundle_can_be_packed_again(packed: dict[str, Path], tmp_path: Path) -> None:
    done = command("pack", str(packed["file"]), "-o", str(tmp_path / "again"), "--no-self-test", *EXACT)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_manifest(tmp_path / "again").files == read_manifest(packed["file"]).files


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_bundle_scores_as_its_checkpoint_and_passes_its_self_test(
    kind: str, packed: dict[str, Path], packable: Path
) -> None:
    with Reranker(str(packable), device="cpu", dtype="fp32") as reranker:
        expected = reranker.score(PAIRS, logits=True)
    with Reranker(str(packed[kind]), device="cpu", dtype="fp32") as reranker:
        assert reranker.score(PAIRS, logits=True) == pytest.approx(expected, abs=1e-4)  # in different batches
        assert (reranker.model_id, reranker.info.source) == ("tiny-reranker", "bundle")
        assert self_test(reranker).basis == "stored"
        assert self_test(reranker).passed


def test_an_archive_unpacked_by_hand_is_a_folder_bundle(packed: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(packed["file"]) as archive:
        archive.extractall(tmp_path / "by hand")
    assert damaged_files(tmp_path / "by hand") == []
    assert open_bundle(tmp_path / "by hand")[1] == tmp_path / "by hand"


def test_verify_accepts_an_intact_bundle(packed: dict[str, Path]) -> None:
    for bundle in packed.values():
        done = command("verify", str(bundle), *EXACT)
        assert done.returncode == 0, done.stderr
        assert "match the checksums of the manifest" in done.stdout
        assert "pass: the scores are those stored with the model" in done.stdout


def test_verify_names_every_damaged_file(packed: dict[str, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(packed["folder"], tmp_path / "damaged")
    with (bundle / "config.json").open("ab") as file:
        file.write(b" ")
    tokenizer = (bundle / "tokenizer.json").read_bytes()
    (bundle / "tokenizer.json").write_bytes(tokenizer.replace(b"Q", b"q", 1))
    (bundle / "LICENSE").unlink()
    (bundle / "model.safetensors").write_bytes(b"would be loaded instead of the shards")
    done = command("verify", str(bundle), *EXACT)
    assert done.returncode == 1
    assert "config.json: " in done.stderr
    assert "bytes instead of" in done.stderr
    assert "tokenizer.json: sha256 is" in done.stderr
    assert "LICENSE: missing" in done.stderr
    assert "model.safetensors: not in the manifest" in done.stderr


def test_verify_names_a_wrong_score(packed: dict[str, Path], tmp_path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        expected = json.loads(members[MANIFEST])["expected"]
        expected["scores"][3]["log_odds"] += 100
        edit_manifest(members, expected=expected)

    done = command("verify", str(rewrite(packed["file"], tmp_path / "other.zip", change)), *EXACT)
    assert done.returncode == 1
    assert "FAULT: other scores" in done.stdout
    assert STORED[3].document in done.stdout.splitlines()[-1]


def add_file(name: str) -> Callable[[dict[str, bytes]], object]:
    """A member with a valid manifest entry, so that only its name is wrong."""

    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members[MANIFEST])
        manifest["files"][name] = manifest["files"]["LICENSE"]
        members[name] = members["LICENSE"]
        members[MANIFEST] = json.dumps(manifest).encode()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_file("../escaped.json"), "'../escaped.json'; only plain relative names are allowed"),
        (add_file("/absolute/escaped.json"), "only plain relative names"),
        (add_file("a/../../escaped.json"), "only plain relative names"),
        (add_file("C:\\escaped.json"), "only plain relative names"),
        (add_file("C:escaped.json"), "only plain relative names"),
        (add_file(".hidden"), "only plain relative names"),
        (add_file("pytorch_model.bin"), "pytorch_model.bin, a pickle"),
        (add_file("weights/model.PT"), "model.PT, a pickle"),
        (add_file("modeling_evil.py"), "modeling_evil.py; only .json, .safetensors, "),
        (lambda members: members.update({"extra.json": b"{}"}), "does not contain the files of its manifest"),
        (lambda members: members.pop("LICENSE"), "does not contain the files of its manifest"),
        (lambda members: members.pop(MANIFEST), "is not a bundle of local-rerank"),
        (lambda members: members.update({MANIFEST: b"{"}), "manifest .* cannot be read"),
        (lambda members: edit_manifest(members, format_version=2), "version 2"),
        (lambda members: edit_manifest(members, files={"config.json": {"size": 1}}), "manifest .* cannot be read"),
        (lambda members: edit_manifest(members, files={"a": {"size": "1", "sha256": ""}}), "a file has size '1'"),
        (lambda members: edit_manifest(members, files={"a": {"size": -1, "sha256": ""}}), "a file has size -1"),
        (lambda members: edit_manifest(members, files={"a": {"size": 10**400, "sha256": ""}}), "a file has size 100"),
        (lambda members: edit_manifest(members, files=[]), "manifest .* cannot be read"),
        (lambda members: edit_manifest(members, model_id=["x"]), "model_id must be a string of at most 300 characters"),
        (lambda members: edit_manifest(members, model_id="x" * 301), "model_id must be a string of at most 300"),
        (lambda members: edit_manifest(members, model_id="\ud800"), "manifest .* cannot be read: UnicodeEncodeError"),
        (lambda members: edit_manifest(members, revision=1), "revision must be a string"),
        (add_file("license"), "contains LICENSE twice; each name must be there once, whatever its case"),
        (add_file(MANIFEST.upper()), f"contains {MANIFEST.upper()} twice"),
        (add_file("LICENSE/inside.txt"), "cannot be read: .*LICENSE"),
        (lambda members: members.update({MANIFEST: b"[" * 100_000}), "manifest .* cannot be read: RecursionError"),
        (lambda members: edit_manifest(members, recipe={"prefix": "x"}), "a different prompt template"),
        (lambda members: members.update({"config.json": members["config.json"] + b" "}), "config.json does not have"),
    ],
)
def test_a_tampered_archive_raises_and_leaves_no_files(
    change: Callable[[dict[str, bytes]], object], message: str, packed: dict[str, Path], tmp_path: Path, cache: Path
) -> None:
    bundle = rewrite(packed["file"], tmp_path / "tampered.zip", change)
    with pytest.raises(CheckpointError, match=message):
        Reranker(str(bundle), device="cpu", dtype="fp32")
    assert not list(tmp_path.rglob("*escaped*"))
    assert not Path("/absolute/escaped.json").exists()
    if "template" not in message:
        assert not list(cache.glob("*"))


def test_a_truncated_archive_raises_before_anything_is_unpacked(
    packed: dict[str, Path], tmp_path: Path, cache: Path
) -> None:
    content = packed["file"].read_bytes()
    (tmp_path / "short.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not a bundle, or an incomplete one"):
        open_bundle(tmp_path / "short.zip")
    assert not cache.exists()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("honest", [True, False])
def test_a_zip_bomb_raises_before_anything_is_unpacked(
    compression: int, honest: bool, packed: dict[str, Path], tmp_path: Path, cache: Path
) -> None:
    """Whether or not its manifest has the true size."""
    zeros = bytes(30_000_000)

    def change(members: dict[str, bytes]) -> None:
        members["zeros.safetensors"] = zeros
        entry = {"size": len(zeros) if honest else 1, "sha256": hashlib.sha256(zeros).hexdigest()}
        edit_manifest(members, files=json.loads(members[MANIFEST])["files"] | {"zeros.safetensors": entry})

    bundle = rewrite(packed["file"], tmp_path / "bomb.zip", change, compression)
    assert bundle.stat().st_size < 1_000_000
    for read in (read_manifest, open_bundle, damaged_files):
        with pytest.raises(CheckpointError, match=r"would unpack to 0\.03\d* GB; at most 20 times its size"):
            read(bundle)
    assert not cache.exists()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_archive_works_and_a_damaged_one_raises(
    compression: int, packed: dict[str, Path], tmp_path: Path
) -> None:
    bundle = rewrite(packed["file"], tmp_path / "compressed.zip", lambda members: None, compression)
    assert damaged_files(bundle) == []
    content = bytearray(bundle.read_bytes())
    with zipfile.ZipFile(bundle) as archive:
        largest = max(archive.infolist(), key=lambda member: member.compress_size)
    middle = largest.header_offset + largest.compress_size // 2
    content[middle : middle + 64] = b"\xff" * 64
    bundle.write_bytes(content)
    assert [fault.partition(": damaged")[0] for fault in damaged_files(bundle)] == [largest.filename]
    with pytest.raises(CheckpointError):
        open_bundle(bundle)


def test_an_archive_with_a_name_twice_is_refused(packed: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "twice.zip"
    shutil.copy(packed["file"], bundle)
    with zipfile.ZipFile(bundle, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("config.json", b"{}")
    with pytest.raises(CheckpointError, match=r"contains config\.json twice"):
        open_bundle(bundle)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, "x", None])
def test_known_scores_that_are_no_numbers_are_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="known scores in here c"):
        from_json({"scores": [{"query": "q", "document": "d", "log_odds": value}]}, "here")


def test_a_file_that_is_not_a_bundle_raises(tmp_path: Path) -> None:
    for name, message in (("model.bin", "a pickle, which could run code"), ("model.gguf", "is a GGUF file")):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match=message):
            Reranker(str(tmp_path / name))
    with pytest.raises(CheckpointError, match="does not exist"):
        read_manifest(tmp_path / "nowhere.zip")


def test_a_folder_bundle_without_one_of_its_files_raises(packed: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(packed["folder"], tmp_path / "part")
    (tmp_path / "part" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: tokenizer\.json is missing"):
        Reranker(str(tmp_path / "part"))


def test_a_model_that_fails_its_self_test_is_not_packed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "untrained-reranker", seed=0)
    (folder / "golden.json").write_text('[{"query": "q", "document": "d", "log_odds": 1000}]', encoding="utf-8")
    done = command("pack", str(folder), "-o", str(tmp_path / "x.zip"), *EXACT)
    assert done.returncode == 1
    assert "the self-test failed: other scores" in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("x")] == []


def test_verify_has_no_model_option_and_pack_a_hidden_one() -> None:
    """The model is their argument; the hidden --model makes LOCAL_RERANK_MODEL work."""
    assert "Unknown option: --model" in command("verify", "x.zip", "--model", "y").stderr
    assert "model 'y' is no folder" in command("pack", "--model", "y", "-o", "z.zip").stderr


def test_pack_overwrites_nothing(packed: dict[str, Path], packable: Path) -> None:
    for bundle in packed.values():
        done = command("pack", str(packable), "-o", str(bundle), "--no-self-test", *EXACT)
        assert done.returncode == 1
        assert "which exists" in done.stderr


def test_pack_removes_nothing_beside_its_output(packable: Path, tmp_path: Path) -> None:
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "notes.txt").write_text("keep", encoding="utf-8")
    (tmp_path / "linked").symlink_to("nowhere")
    options = ("--no-self-test", *EXACT)
    assert command("pack", str(packable), "-o", str(tmp_path / "x"), *options).returncode == 0
    assert "which exists" in command("pack", str(packable), "-o", str(tmp_path / "linked"), *options).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linked", "x", "x.partial"]
    assert (tmp_path / "x.partial" / "notes.txt").read_text(encoding="utf-8") == "keep"


def test_too_little_disk_space_raises_before_anything_is_written(
    packed: dict[str, Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"needs 1e\+09 GB of free disk space; .* are free"):
        require_free_space(tmp_path / "not" / "yet", 10**18)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full)
    with pytest.raises(CheckpointError, match="1000 bytes are free"):
        open_bundle(packed["file"])
    assert not cache.exists()
