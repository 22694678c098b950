"""A Hugging Face folder: `config.json`, safetensors weights in one file or in shards, and what stands beside them."""

import json
import warnings
from pathlib import Path
from typing import Any

from jfp8kv.checkpoint.kv_names import is_kv_scale
from jfp8kv.checkpoint.kv_sidecar import SIDECAR, Sidecar, read_sidecar
from jfp8kv.checkpoint.safetensors import open_safetensors
from jfp8kv.checkpoint.tensors import StoredTensor
from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.layouts import bare, is_buffer

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLE_ADVICE = (
    "pickle files can run code when read, so they never are. Convert them where you trust them: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) of transformers writes safetensors."
)
_VISION = (
    "vision_tower.",
    "multi_modal_projector.",
)  # bare names of what turns images into embeddings


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a `CheckpointError` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object.")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, with ModelOpt's `hf_quant_config.json` as its `quantization_config` when it has none.

    Raises:
      CheckpointError: no config.json, saying what the folder holds instead.
    """
    path = folder / "config.json"
    if not path.is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f" It holds {ggufs[0].name}: load that file itself." if ggufs else ""
        raise CheckpointError(
            f"{folder}: no config.json, so not a Hugging Face folder, and no jfp8kv.json, so not one of jfp8kv.save.{hint}"
        )
    config = read_json(path)
    if (
        "quantization_config" not in config and "compression_config" in config
    ):  # compressed-tensors' first name for it
        config["quantization_config"] = config["compression_config"]
    modelopt = folder / "hf_quant_config.json"
    if "quantization_config" not in config and modelopt.is_file():
        declared = read_json(modelopt).get("quantization", {})
        if not isinstance(declared, dict):
            raise CheckpointError(f"{modelopt}: quantization={declared!r}: must be a JSON object.")
        config["quantization_config"] = {"quant_method": "modelopt", **declared}
    return config


def generation_eos_ids(folder: Path) -> Any:
    """`eos_token_id` of `generation_config.json`: an int, a list or None."""
    path = folder / "generation_config.json"
    return read_json(path).get("eos_token_id") if path.is_file() else None


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's weights, by its full name.

    Raises:
      CheckpointError: no weights, only pickles, or a shard that is missing or damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        tensors |= open_safetensors(path)
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / INDEX
    if whole.is_file():
        return [whole]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: has no weight_map.")
        return [
            _shard(folder, name) for name in sorted({str(file) for file in weight_map.values()})
        ]
    if found := sorted(folder.glob("*.safetensors")):
        return found
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(f"{folder}: its weights are only in {pickles[0]}: {PICKLE_ADVICE}")
    raise CheckpointError(
        f"{folder}: no weights: expected model.safetensors, or {INDEX} and its shards."
    )


def _shard(folder: Path, name: str) -> Path:
    path = folder / name
    if path.parent != folder:
        raise CheckpointError(f"{folder / INDEX}: the shard {name!r} lies outside the folder.")
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: the shard {name} that {INDEX} lists is missing: fetch it again."
        )
    return path


def open_sidecar(folder: Path) -> Sidecar | None:
    """What `kv_cache_scales.json` says, or None if it is not there. Raises `CheckpointError` if it cannot be read."""
    path = folder / SIDECAR
    return read_sidecar(read_json(path), where=path) if path.is_file() else None


def split_scales(
    tensors: dict[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The weights under their bare names (models/layouts.py), and the KV-cache scale tensors under their full names.

    Known buffers that are neither are dropped. A vision part's scales stay with its weights.
    """
    scales = {
        name: t
        for name, t in tensors.items()
        if is_kv_scale(name) and not bare(name).startswith(_VISION)
    }
    weights = {
        bare(name): t for name, t in tensors.items() if name not in scales and not is_buffer(name)
    }
    return weights, scales


def unread_scales(folder: Path) -> str:
    """What there is to say of the scales among weights that are not there, from the list of them if that is."""
    index = folder / INDEX
    listed = read_json(index).get("weight_map") if index.is_file() else None
    _, scales = split_scales(listed if isinstance(listed, dict) else {})
    known = f": {INDEX} lists {len(scales)} (such as {min(scales)})" if scales else ""
    return f"its weights are not here, so the KV-cache scales among them are not read{known}."


def without_vision(weights: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The text model's weights, of a model that also sees."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(_VISION)}


def warn_without_vision(folder: Path, count: int) -> None:
    """Say that a vision part of `count` tensors is not loaded, if there is one."""
    if count:
        warnings.warn(
            f"{folder}: only text is served: {count} tensors of its vision part are left out.",
            stacklevel=4,
        )
