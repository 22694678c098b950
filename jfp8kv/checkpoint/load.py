"""`load`: a folder, a file or a hub id becomes `Params`.

What a source is gets decided here and nowhere else; each kind has its reader beside this file. Nothing runs code from a
checkpoint: no pickles, no remote code, and chat templates are rendered in a sandbox.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jfp8kv.checkpoint import folder as hf
from jfp8kv.checkpoint.hub import fetch
from jfp8kv.checkpoint.kv_scales import FoundScales, find_scales
from jfp8kv.checkpoint.orbax import KV_SCALES, is_saved, load_saved, saved_scales
from jfp8kv.checkpoint.quantized import dequantized, warn_dequantized
from jfp8kv.checkpoint.tensors import FLOATS, StoredTensor, assemble, same_values, weights_dtype
from jfp8kv.checkpoint.tokenizer import read_tokenizer
from jfp8kv.core.errors import CheckpointError, ConfigError, one_of
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families import config_from_hf
from jfp8kv.models.families.fields import ids
from jfp8kv.models.layouts import gguf_modules, hf_modules
from jfp8kv.models.params import Params
from jfp8kv.models.quantization import weight_scheme

_HEAD = "lm_head.weight"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load(source: str | os.PathLike[str], dtype: Any = None, *, strict: bool = True) -> Params:
    """Load a checkpoint's weights, config, tokenizer and the scales of its KV cache (`Params.kv_scales`).

    Weights are streamed: memory peaks below 1.3 times their size. torch is never imported. FP8 and MXFP4 weights are
    dequantized on the way, which a warning says.

    Args:
      source: a Hugging Face folder (config.json and safetensors), a folder that `save` wrote, a .gguf file, or a hub id
        such as "HuggingFaceTB/SmolLM2-135M-Instruct", fetched through huggingface_hub and its cache (`HF_HUB_OFFLINE` is
        honoured).
      dtype: of the weights: "float32", "bfloat16", "float16", the same as a NumPy or JAX dtype, or None to keep the
        checkpoint's (for FP8 and MXFP4 weights the one that config.json declares; bfloat16 for a quantized GGUF file).
      strict: whether a KV scale that is missing for a layer, zero, negative, not finite, of a wrong shape, of a layer or a name
        that the model does not have, or half a pair, is an error. If not, a warning names layer and tensor, and scale 1 (values
        are stored as they are) stands in for what is missing or broken.

    Raises:
      CheckpointError: a source that is missing, damaged, incomplete, a pickle, or quantized in a way that is not read,
        naming file and tensor; KV scales that are not as they should be, naming layer and tensor.
      ConfigError: an unknown `dtype`, or an architecture or setting that is not supported.
    """
    target = resolve_dtype(dtype)
    path = locate(source)
    if not path.is_dir():
        return _load_gguf(path, target)
    return load_saved(path, target) if is_saved(path) else _load_folder(path, target, strict)


def resolve_dtype(dtype: Any) -> np.dtype | None:
    """A weight dtype from its name or a NumPy or JAX dtype; None stays None, `ConfigError` with the list otherwise."""
    if dtype is None:
        return None
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in FLOATS:
        raise one_of("dtype", name, FLOATS)
    return FLOATS[name]


def locate(source: str | os.PathLike[str]) -> Path:
    """The folder or .gguf file that `source` means; a hub id that nothing here is named after is fetched."""
    if not isinstance(source, str | os.PathLike) or not str(source).strip():
        raise ConfigError(f"source={source!r}: must be a folder, a .gguf file or a hub id such as 'owner/name'.")
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return path
    if path.exists():
        return _readable_file(path)
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix != ".gguf":
        return fetch(source)
    raise CheckpointError(f"{source}: no such file or folder.")


def _readable_file(path: Path) -> Path:
    if path.suffix in hf.PICKLES:
        raise CheckpointError(f"{path}: {hf.PICKLE_ADVICE}")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: give the folder that holds it and its config.json: {path.parent}")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path}: neither a folder nor a .gguf file.")
    return path


def load_kv_scales(source: str | os.PathLike[str]) -> FoundScales:
    """The KV scales that come with a checkpoint, layer by layer with a verdict on each. Weights are not read, and nothing
    that is wrong with a scale raises: it is in the report.

    Raises:
      CheckpointError, ConfigError: as `load`, for what its config and headers tell.
    """
    path = locate(source)
    if not path.is_dir():
        return FoundScales()
    if is_saved(path):
        scales = saved_scales(path)
        return FoundScales() if scales is None else FoundScales.of(scales, source=KV_SCALES)
    described = hf.read_config(path)
    _, scales = hf.split_scales(hf.open_weights(path))
    return _found_scales(path, described, config_from_hf(described), scales)


def _load_folder(folder: Path, dtype: np.dtype | None, strict: bool) -> Params:
    described = hf.read_config(folder)
    config, scheme = config_from_hf(described), weight_scheme(described.get("quantization_config"))
    weights, scales = hf.split_scales(hf.open_weights(folder))
    if "vision_config" in described:
        weights = hf.without_vision(folder, weights)
    weights = dequantized(weights, scheme, FLOATS[config.dtype])
    modules = hf_modules(config, weights)
    if config.tied_embeddings and _HEAD in weights:  # a copy of the embeddings, or a head of its own whatever the config says
        tied = same_values(weights[_HEAD], weights.get(f"{modules['embed'].path}.weight"))
        config = dataclasses.replace(config, tied_embeddings=tied)
        weights = {name: tensor for name, tensor in weights.items() if not (tied and name == _HEAD)}
    found = _found_scales(folder, described, config, scales)
    found.say(folder, strict=strict, stacklevel=4)
    config = dataclasses.replace(config, kv_cache_dtype=config.kv_cache_dtype or found.declares)
    stored = weights_dtype(weights)
    warn_dequantized(folder, scheme, weights, dtype or stored)
    config = dataclasses.replace(config, dtype=stored.name, eos_ids=ids([*config.eos_ids, *ids(hf.generation_eos_ids(folder))]))
    tree = assemble(config, weights, modules, dtype or stored, where=folder)
    return Params(tree, config, read_tokenizer(folder, eos_ids=config.eos_ids), found.scales)


def _found_scales(
    folder: Path, described: Mapping[str, Any], config: ModelConfig, scales: Mapping[str, StoredTensor]
) -> FoundScales:
    return find_scales(
        config,
        scales,
        quantization=described.get("quantization_config"),
        sidecar=hf.open_sidecar(folder),
        model_types={part.get("model_type") for part in (described, described.get("text_config") or {})},
    )


def _load_gguf(path: Path, dtype: np.dtype | None) -> Params:
    from jfp8kv.checkpoint.gguf import open_gguf  # the gguf library is only needed here

    file = open_gguf(path)
    stored = weights_dtype(file.tensors)
    config = dataclasses.replace(file.config, dtype=stored.name)
    tree = assemble(config, file.tensors, gguf_modules(config), dtype or stored, where=path)
    return Params(tree, config, file.tokenizer())
