"""Hugging Face folders and the hub: `config.json`, weights in safetensors files, and other files.

Weights are in one file, in shards with an index, or in any .safetensors files of the folder.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from jfp8kv.checkpoint.foreign import (
    ADAPTER_CONFIG,
    PICKLES,
    adapter_error,
    folder_hint,
)
from jfp8kv.checkpoint.kv_export import KV_FILE
from jfp8kv.checkpoint.kv_scale_tensors import SIDECAR, Sidecar, is_kv_scale, parse_sidecar
from jfp8kv.checkpoint.safetensors import open_safetensors
from jfp8kv.checkpoint.tensors import StoredTensor
from jfp8kv.core.errors import CheckpointError
from jfp8kv.core.file_contents import PICKLE_ADVICE, describe_placeholder
from jfp8kv.models.families.fields import ids, ids_in_vocab
from jfp8kv.models.layouts import is_buffer, strip_prefix
from jfp8kv.models.saved_names import check_saved_names

GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
_PICKLE_INDEX = "pytorch_model.bin.index.json"
_ADAPTER_WEIGHTS = "adapter_model*"
_VISION = ("vision_tower.", "multi_modal_projector.")  # of a vision encoder, without prefix

# Files to download. The ignored ones are other formats and copies of the same weights.
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", KV_FILE]
_ALL_FILES = ["*.safetensors", *_SMALL_FILES]
_IGNORED_FILES = ["*/*.json", "*/*.model", "*/*.safetensors", "consolidated*.safetensors"]


def download(repo: str, *, weights: bool = True) -> Path:
    """Return the local folder of a hub model, with or without its weights.

    Files that are not in the cache are downloaded.

    Raises:
      CheckpointError: the model cannot be downloaded, with what to try.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The bases of HfHubHTTPError cover connection errors of its HTTP library, which differs between
    # versions of huggingface_hub.
    errors: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError, HFValidationError)
    patterns = _ALL_FILES if weights else _SMALL_FILES
    try:
        path = snapshot_download(repo, allow_patterns=patterns, ignore_patterns=_IGNORED_FILES)
    except errors as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{repo}: not a local folder, and not available from the Hugging Face hub ({reason}). "
            "Check the spelling and the network; gated models need `hf auth login`; with "
            "HF_HUB_OFFLINE=1 only the cache is used."
        ) from error
    return Path(path)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `CheckpointError` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        found = describe_placeholder(path)
        reason = f"cannot be read as JSON: {error}" if found is None else f"not JSON, but {found}"
        raise CheckpointError(f"{path}: {reason}.") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must contain a JSON object.")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json`, with its `quantization_config` under that name.

    compressed-tensors first called the entry `compression_config`, and ModelOpt writes it to
    `hf_quant_config.json`.

    Raises:
      CheckpointError: no config.json, saying what the folder contains instead.
    """
    path = folder / "config.json"
    if not path.is_file():
        _refuse_adapter(folder)
        raise CheckpointError(
            f"{folder}: not a Hugging Face folder (no config.json) and not written by jfp8kv.save "
            f"(no jfp8kv.json).{folder_hint(folder)}"
        )
    config = read_json(path)
    if "quantization_config" not in config and "compression_config" in config:
        config["quantization_config"] = config["compression_config"]
    modelopt = folder / "hf_quant_config.json"
    if "quantization_config" not in config and modelopt.is_file():
        declared = read_json(modelopt).get("quantization", {})
        if not isinstance(declared, dict):
            raise CheckpointError(f"{modelopt}: quantization={declared!r}: must be a JSON object.")
        config["quantization_config"] = {"quant_method": "modelopt", **declared}
    return config


def read_generation_eos_ids(folder: Path, vocab: int) -> tuple[int, ...]:
    """Return the ids of `eos_token_id` in `generation_config.json` that the vocabulary has."""
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return ()
    listed = ids(read_json(path).get("eos_token_id"))
    return ids_in_vocab(listed, vocab, key="eos_token_id", where=str(path))


def read_sidecar(folder: Path) -> Sidecar | None:
    """Return the content of `kv_cache_scales.json`, or None if the folder has none.

    Raises:
      CheckpointError: the file is malformed.
    """
    path = folder / SIDECAR
    return parse_sidecar(read_json(path), where=path) if path.is_file() else None


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a folder's weights, by its full name.

    Raises:
      CheckpointError: no weights, only pickles or an adapter, a missing or damaged shard, a tensor
        that is in two shards, or weights of a wrapped module.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        shard = open_safetensors(path)
        check_saved_names(shard, where=path)
        for name in shard.keys() & tensors.keys():
            if not is_buffer(name):
                raise _repeated(folder, name, tensors[name].file, path)
        tensors |= shard
    if (folder / ADAPTER_CONFIG).is_file():
        warnings.warn(
            f"{folder}: its adapter ({ADAPTER_CONFIG}) is ignored; merge it to use it.",
            stacklevel=5,
        )
    return tensors


def _repeated(folder: Path, name: str, first: Path, second: Path) -> CheckpointError:
    """Return the error for a tensor that is in two files."""
    listed = (_weight_map(folder) or {}).get(name)
    index = f" ({INDEX} lists it in {listed})" if listed else ""
    return CheckpointError(
        f"{folder}: {name} is in both {first.name} and {second.name}{index}: the files may belong "
        "to different checkpoints. Remove those of the other one, or download the folder again."
    )


def _refuse_adapter(folder: Path) -> None:
    """Raise `CheckpointError` if a folder without a model has an adapter."""
    config = folder / ADAPTER_CONFIG
    if config.is_file():
        raise adapter_error(folder, read_json(config).get("base_model_name_or_path"))
    if any(folder.glob(_ADAPTER_WEIGHTS)):
        raise adapter_error(folder, None)


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if (folder / INDEX).is_file():
        weight_map = _weight_map(folder)
        if weight_map is None:
            raise CheckpointError(f"{folder / INDEX}: has no weight_map.")
        return [_shard(folder, name) for name in sorted(set(map(str, weight_map.values())))]
    adapters = set(folder.glob(_ADAPTER_WEIGHTS))
    if found := sorted(set(folder.glob("*.safetensors")) - adapters):
        return found
    _refuse_adapter(folder)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise CheckpointError(f"{folder}: its weights are only in {pickles[0]}: {PICKLE_ADVICE}")
    if (folder / _PICKLE_INDEX).is_file():  # downloaded from the hub, without the weights
        raise CheckpointError(f"{folder}: its weights are only in .bin files: {PICKLE_ADVICE}")
    raise CheckpointError(
        f"{folder}: no weights: expected model.safetensors, or {INDEX} and its shards."
        f"{folder_hint(folder)}"
    )


def _weight_map(folder: Path) -> dict[str, Any] | None:
    """Return the map from tensor names to shards, or None if the index is missing or has none."""
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map") if index.is_file() else None
    return weight_map if isinstance(weight_map, dict) else None


def _shard(folder: Path, name: str) -> Path:
    path = folder / name
    if path.parent != folder:
        raise CheckpointError(f"{folder / INDEX}: the shard {name!r} is outside the folder.")
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: the shard {name} that {INDEX} lists is missing: download it again."
        )
    return path


def split_scales(
    tensors: dict[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Split tensors into weights, by name without prefix (models/layouts.py), and KV scales.

    Buffers are dropped. The scales of a vision encoder stay with its weights.
    """
    scales = {name: tensor for name, tensor in tensors.items() if _is_text_scale(name)}
    weights = {
        strip_prefix(name): tensor
        for name, tensor in tensors.items()
        if name not in scales and not is_buffer(name)
    }
    return weights, scales


def _is_text_scale(name: str) -> bool:
    return is_kv_scale(name) and not strip_prefix(name).startswith(_VISION)


def unread_scales_note(folder: Path) -> str:
    """Return a note on the KV scales of a folder without its weights, counted from the index."""
    scales = [name for name in _weight_map(folder) or {} if _is_text_scale(name)]
    listed = f": {INDEX} lists {len(scales)} (such as {min(scales)})" if scales else ""
    return f"its weights are not present, so KV-cache scales among them are not read{listed}."


def text_weights(weights: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the weights of the text model of a multimodal checkpoint."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(_VISION)}


def warn_vision_ignored(folder: Path, count: int) -> None:
    """Warn that the `count` tensors of a vision encoder are not loaded, if there are any."""
    if count:
        warnings.warn(
            f"{folder}: only text is supported: {count} tensors of its vision encoder are ignored.",
            stacklevel=4,
        )
