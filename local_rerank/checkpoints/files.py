"""Which files of a checkpoint count, for find, load, pack and verify alike; and what a file is that is not what it
should be.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from local_rerank.errors import CheckpointError, InvalidRequest
from local_rerank.text_files import open_utf8

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")

_PACKED = ("*.json", "*.jinja", "*.txt", "*.md", "LICENSE*", "NOTICE*", "1_LogitScore/config.json")
_OF_OTHER_WEIGHTS = ("adapter_*", "*.index.json")  # JSON that describes weights which are not read
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_MEMBER = re.compile(r"[\w-][\w.-]*\.safetensors")  # in the same folder

_GGUF = "a GGUF file for llama.cpp: use the checkpoint it was made from"
_SIGNATURES = (
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the file: run `git lfs pull` in its folder"),
    (re.compile(rb"GGUF"), _GGUF),
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), "a web page, not the file: download it again"),
)
_OTHER_FORMATS = {
    **dict.fromkeys(PICKLE_SUFFIXES, "a pickle, which could run code: save the model as safetensors"),
    ".gguf": _GGUF,
    ".ggml": "a GGML file for llama.cpp: use the checkpoint it was made from",
    ".onnx": "an ONNX file: use the checkpoint it was made from",
    ".h5": "a TensorFlow file: save the model as safetensors",
    ".msgpack": "a Flax file: save the model as safetensors",
}


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that a checkpoint should have; empty if it names none.

    Raises CheckpointError for two sets of weights, because programs differ in which of them they read.
    """
    shards = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    names, is_single = _indexed(folder / INDEX), _is_there(folder / WEIGHTS)
    if is_single and (names or shards) and WEIGHTS not in names:
        others = f"the {len(names)} shards of {INDEX}" if names else f"{len(shards)} shards without {INDEX}"
        raise CheckpointError(f"{folder} has two sets of weights: {WEIGHTS}, and {others}; remove the wrong set")
    if names or is_single:
        return names or [WEIGHTS]
    if shards:
        raise CheckpointError(
            f"{folder} has shards ({', '.join(shards[:3])}) but no {INDEX}, which names them all; "
            "copy it from where the shards are from"
        )
    return []


def loaded_files(folder: Path) -> list[str]:
    """The files that loading reads; they need not be there."""
    index = [INDEX] if _is_there(folder / INDEX) else []
    return ["config.json", "tokenizer.json", *index, *(weight_files(folder) or [WEIGHTS])]


def missing_files(folder: Path) -> list[str]:
    """The files without which a checkpoint cannot be loaded; a link that leads nowhere is missing."""
    return [f"{name} (its link leads nowhere)" if (folder / name).is_symlink() else name
            for name in loaded_files(folder) if not (folder / name).is_file()]  # fmt: skip


def checkpoint_files(folder: Path) -> list[str]:
    """Names of all files that belong to a checkpoint, relative to its folder."""
    found = {path for pattern in _PACKED for path in folder.glob(pattern)}
    found -= {path for pattern in _OF_OTHER_WEIGHTS for path in folder.glob(pattern)}
    weights = weight_files(folder)
    index = [INDEX] if _is_there(folder / INDEX) else []
    return sorted({*(path.relative_to(folder).as_posix() for path in found), *weights, *index})


def require_kind(path: Path) -> None:
    """Raise CheckpointError if a file is empty or obviously something else, such as a Git LFS pointer."""
    with path.open("rb") as stream:
        head = stream.read(256)
    if not head:
        raise CheckpointError(f"{path} is empty; copy or download it again")
    for signature, what in _SIGNATURES:
        if signature.match(head):
            raise CheckpointError(f"{path} is {what}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        require_kind(path)
        with open_utf8(path, "model") as stream:
            value = json.loads(stream.read())
    except (OSError, ValueError, RecursionError, InvalidRequest) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must be a JSON object, not a {type(value).__name__}")
    return value


def no_weights(folder: Path) -> CheckpointError:
    """The error about a folder without weights; it names what is there instead."""
    if has_adapter(folder):
        return adapter_alone(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        if what := _OTHER_FORMATS.get(path.suffix.lower()):
            return CheckpointError(f"{folder} has no safetensors weights; {path.name} is {what}")
    others = [path.name for path in files if path.suffix == ".safetensors" and not path.name.startswith("adapter_")]
    if "consolidated.safetensors" in others:
        what = "consolidated.safetensors has Mistral's names of weights; use the checkpoint in Hugging Face's format"
    elif others:
        what = f"{', '.join(others[:3])} {_is_or_are(others)} not read; rename a file with all weights to {WEIGHTS}"
    else:
        what = f"copy {WEIGHTS}, or {INDEX} and its shards, there"
    return CheckpointError(f"{folder} has no safetensors weights; {what}")


def no_config(folder: Path) -> CheckpointError:
    """The error about a folder without config.json; it names what is there instead."""
    if has_adapter(folder) and not any(folder.glob("model*.safetensors")):
        return adapter_alone(folder)
    if any(path.suffix.lower() in _OTHER_FORMATS for path in folder.iterdir()):
        return no_weights(folder)
    inside = sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob("*/config.json"))
    inside += sorted(path.name.removeprefix("models--").replace("--", "/") for path in folder.glob("models--*"))
    hint = f"; models in it: {', '.join(inside[:3])} ({len(inside)} in all)" if inside else ""
    return CheckpointError(f"{folder} has no config.json: not a model folder{hint}")


def has_adapter(folder: Path) -> bool:
    """Whether there is an adapter, such as LoRA's, alone or beside a model."""
    return (folder / ADAPTER).exists() or any(folder.glob("adapter_model.*"))


def adapter_alone(folder: Path) -> CheckpointError:
    """The error about a folder that has an adapter and no model."""
    config = read_json(folder / ADAPTER) if (folder / ADAPTER).is_file() else {}
    kind = str(config.get("peft_type") or "LORA").upper()
    what = "a LoRA adapter" if kind == "LORA" else f"an adapter ({kind})"
    base = str(config.get("base_model_name_or_path") or "BASE")
    task = "SequenceClassification" if config.get("task_type") == "SEQ_CLS" else "CausalLM"
    return CheckpointError(
        f"{folder} has {what} without a model: merge it into its base with peft, "
        f"`PeftModel.from_pretrained(AutoModelFor{task}.from_pretrained({base!r}), {str(folder)!r})"
        ".merge_and_unload().save_pretrained(FOLDER)`, copy the base's tokenizer.json to FOLDER "
        "and pass FOLDER as --model"
    )


def _indexed(index: Path) -> list[str]:
    """Names of the files in an index; empty if there is none."""
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map, which names the file of each weight; copy it again")
    for name in weight_map.values():
        if not isinstance(name, str) or not _MEMBER.fullmatch(name):
            raise CheckpointError(f"{index} names {name!r}; only safetensors files in the same folder are read")
    return sorted(set(weight_map.values()))


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _is_or_are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
