"""`export` writes `Params` as a Hugging Face folder that other engines load.

    folder/config.json             the model in its architecture's fields, and the KV-cache format
    folder/generation_config.json  the BOS and EOS tokens
    folder/model.safetensors       weights and KV scales; above 5 GB in shards, with their index
    folder/tokenizer.json          if there is a tokenizer, and tokenizer_config.json
    folder/kv_scales.jfp8kv        KV scales that the public layout cannot express (kv_export.py)

The folder is written atomically. Weights get Hugging Face's names and layout, the inverse of
`load`: the layouts (models/layouts.py) define which part of a tensor each parameter is. A part is a
view of the tensor, so values are written through the same view, and fused and transposed tensors
need no separate code. A tensor is assembled when it is written. docs/notes/012 has the reasons for
the choices.
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.scales import KVScales, check_shape
from jfp8kv.checkpoint.atomic_folder import atomic_folder, is_missing_or_empty
from jfp8kv.checkpoint.hf_folder import INDEX
from jfp8kv.checkpoint.hf_tokenizer import require_serializable, write_tokenizer
from jfp8kv.checkpoint.kv_export import (
    COMPRESSED_TENSORS,
    KV_FILE,
    ExportLayout,
    equal_values,
    identical,
    quantization_config,
    scale_tensors,
    to_e4m3fn,
    to_public_layout,
)
from jfp8kv.checkpoint.load import ModelLike, as_params, read_scale_report
from jfp8kv.checkpoint.safetensors import LazyTensor, write_safetensors
from jfp8kv.checkpoint.tensors import FLOAT_DTYPES
from jfp8kv.core.errors import CheckpointError, ConfigError, invalid_choice
from jfp8kv.core.formats import E4M3
from jfp8kv.core.types import PathLike
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families.to_hf import config_to_hf
from jfp8kv.models.layouts import add_prefix, hf_modules
from jfp8kv.models.names import (
    Shape,
    TensorSource,
    expected_shapes,
    require_names,
    require_shape,
    tensor_sources,
)
from jfp8kv.models.params import Params
from jfp8kv.text.tokenizer import Tokenizer

LAYOUTS: tuple[ExportLayout, ...] = (COMPRESSED_TENSORS,)
CONFIG = "config.json"
_SHARD_BYTES = 5 * 10**9
_METADATA = {"format": "pt"}  # transformers requires it


def export(
    params: ModelLike,
    folder: PathLike,
    *,
    kv_scales: KVScales | PathLike | None = None,
    layout: ExportLayout = COMPRESSED_TENSORS,
) -> None:
    """Write a model as a Hugging Face folder: weights, config, tokenizer and KV scales.

    vLLM and other engines load the folder with its FP8 scales, and `load` returns the same model.
    Scales per tensor and per head have a public layout. Scales per channel and K offsets are in a
    file that only this library reads. Other engines then get one scale per head that clips no
    value, with a warning.

        jfp8kv.export(params, "out", kv_scales=jfp8kv.calibrate(params, prompts))

    Args:
      params: a `Params`, or a source as for `load`, such as a .gguf file.
      folder: must not exist, or be empty. Parent folders are created.
      kv_scales: a `KVScales` or a path to one; None uses those of `params`, if any. Without scales
        the folder declares no FP8 cache.
      layout: of the scales: "compressed-tensors", as LLM Compressor writes and vLLM reads them.

    Raises:
      CheckpointError: the folder is not empty, or cannot be written.
      ConfigError: something that a folder cannot express: a config that its architecture's
        config.json lacks fields for, a tokenizer that cannot be written, a `KVPlan`, scales of
        another model, or scales too small or large to be loaded.
    """
    if layout not in LAYOUTS:
        raise invalid_choice("layout", layout, LAYOUTS)
    params = as_params(params)
    path = Path(os.path.expanduser(folder)).resolve()
    require_serializable(params.tokenizer)
    tensors = hf_weights(params)
    config = dataclasses.replace(params.config, dtype=params.dtype.name)
    hf_config = config_to_hf(config) | {"pad_token_id": _pad_id(params.tokenizer, config.vocab)}
    scales = _resolve_scales(params, kv_scales)
    _warn_if_declared_cache_changes(config, scales)
    with atomic_folder(path) as temporary:
        if not is_missing_or_empty(path):
            raise CheckpointError(f"{path}: exists and is not an empty folder: give another one.")
        if scales is not None:
            hf_config["quantization_config"] = quantization_config(to_public_layout(scales))
        _write_json(temporary / CONFIG, hf_config)
        _write_json(temporary / "generation_config.json", _generation_config(params))
        if scales is not None:
            tensors += _write_scales(config, scales, temporary)
        _write_weights(temporary, tensors)
        if params.tokenizer is not None:
            write_tokenizer(params.tokenizer, temporary, max_len=config.max_len)
        if scales is not None:
            _require_loadable_scales(temporary)


def _resolve_scales(params: Params, kv_scales: KVScales | PathLike | None) -> KVScales | None:
    """Return the scales to export, converted to E4M3FN with a warning."""
    scales: Any = params.kv_scales if kv_scales is None else kv_scales
    if scales is None:
        return None
    if isinstance(scales, str | os.PathLike):
        scales = KVScales.load(scales)
    if isinstance(scales, KVPlan):
        raise ConfigError(
            "kv_scales is a KVPlan: a checkpoint declares one KV-cache format for all layers, so "
            "it cannot contain a plan. Export with kv_scales=None, write the plan with "
            "plan.save(path), and give that path as kv_dtype."
        )
    if not isinstance(scales, KVScales):
        raise ConfigError(
            f"kv_scales={scales!r}: must be a KVScales, a path to one, or None for those of params."
        )
    config = params.config
    check_shape(scales, layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim)
    converted = to_e4m3fn(scales)
    if converted is not scales:
        warnings.warn(
            f"The KV scales are for {scales.kv_dtype}, and the layout {COMPRESSED_TENSORS!r} is "
            f"for {converted.kv_dtype}: they are multiplied by the ratio of the formats' largest "
            "values.",
            stacklevel=3,
        )
    return converted


def _warn_if_declared_cache_changes(config: ModelConfig, scales: KVScales | None) -> None:
    declared = config.kv_cache_dtype
    if declared and scales is None:
        warnings.warn(
            f"The model declares an {declared} cache and has no scales for it: the folder declares "
            "none.",
            stacklevel=3,
        )
    elif declared and declared != E4M3.name:
        warnings.warn(
            f"The model declares an {declared} cache: the folder declares {E4M3.name}, the only "
            "format of its layout.",
            stacklevel=3,
        )


def _write_scales(config: ModelConfig, scales: KVScales, folder: Path) -> list[LazyTensor]:
    """Return the scale tensors, and write scales that they cannot express to a separate file."""
    public = to_public_layout(scales)
    if not identical(public, scales):
        scales.save(folder / KV_FILE)
        # safetensors creates files that only their owner may read.
        shutil.copymode(folder / CONFIG, folder / KV_FILE)
    if not equal_values(public, scales):
        lost = ["channel scales"] if scales.granularity == "channel" else []
        lost += ["K offsets"] if scales.k_offset is not None else []
        warnings.warn(
            f"The layout {COMPRESSED_TENSORS!r} cannot express {' and '.join(lost)}: they are in "
            f"{KV_FILE}, which only jfp8kv reads. Other engines get one scale per "
            f"{public.granularity} that clips no value but rounds small values more coarsely.",
            stacklevel=3,
        )
    return [
        LazyTensor(name, array.shape, array.dtype, partial(np.asarray, array))
        for name, array in scale_tensors(config, public).items()
    ]


def _pad_id(tokenizer: Tokenizer | None, vocab: int) -> int | None:
    """Return the padding token's id for config.json, without which families assume other ids."""
    token = tokenizer.special_tokens.get("pad_token") if tokenizer is not None else None
    if tokenizer is None or not isinstance(token, str):
        return None
    number: int | None = tokenizer.backend.token_to_id(token)
    return number if number is not None and number < vocab else None


def _generation_config(params: Params) -> dict[str, Any]:
    content = {"bos_token_id": params.config.bos_id, "eos_token_id": list(params.eos_ids)}
    return {name: value for name, value in content.items() if value not in (None, [])}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(folder: Path, tensors: Sequence[LazyTensor]) -> None:
    """Write one file, or shards of at most `_SHARD_BYTES` (or of one tensor) with their index."""
    shards: list[list[LazyTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + tensor.nbytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors, _METADATA)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, _METADATA)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _require_loadable_scales(folder: Path) -> None:
    """Raise `ConfigError` for scales that `load` refuses, such as too small or too large ones."""
    if issues := read_scale_report(folder).issues:
        raise ConfigError(f"kv_scales cannot be exported: {issues[0]}.")


# Weights


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a tensor: `leaf[index]`, one slice of a parameter, which `source` locates in it."""

    leaf: Any
    index: tuple[int, ...]
    source: TensorSource

    def values(self) -> np.ndarray:
        on_host = isinstance(self.leaf, np.ndarray) or all(
            device.platform == "cpu" for device in self.leaf.devices()
        )
        # On a CPU the whole array is a view; on other devices only the slice is copied.
        return np.asarray(self.leaf)[self.index] if on_host else np.asarray(self.leaf[self.index])


def hf_weights(params: Params) -> list[LazyTensor]:
    """Return every weight as a Hugging Face tensor, whose values are computed when it is written.

    The dtype of a tensor is the one of its parameters.

    Raises:
      CheckpointError: a parameter is missing, unexpected or of the wrong shape.
      ConfigError: a parameter is not a float array of a supported dtype.
    """
    config = params.config
    shapes = expected_shapes(config)
    leaves = {
        jax.tree_util.keystr(keys, simple=True, separator="."): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params.tree)
    }
    require_names(leaves, shapes, where="params")
    parts: dict[str, list[_Part]] = {}
    for name, found in tensor_sources(config, hf_modules(config, ())).items():
        _require_array(name, leaves[name], shapes[name])
        stacked = shapes[name][: len(shapes[name]) - len(found[0].part)]
        for index, source in zip(np.ndindex(stacked), found, strict=True):
            parts.setdefault(source.name, []).append(_Part(leaves[name], index, source))
    return [_lazy_tensor(add_prefix(config, name), each) for name, each in parts.items()]


def _require_array(name: str, leaf: Any, shape: Shape) -> None:
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    if not is_array or leaf.dtype not in FLOAT_DTYPES.values():
        kind = f"of dtype {leaf.dtype}" if is_array else f"a {type(leaf).__name__}"
        allowed = ", ".join(FLOAT_DTYPES)
        raise ConfigError(f"params: {name} is {kind}: must be an array of {allowed}.")
    require_shape(name, leaf.shape, shape, where="params")


def _lazy_tensor(name: str, parts: Sequence[_Part]) -> LazyTensor:
    dtypes = {np.dtype(part.leaf.dtype) for part in parts}
    # A fused tensor of parameters of several dtypes is float32, which represents all of them.
    dtype = dtypes.pop() if len(dtypes) == 1 else FLOAT_DTYPES["float32"]
    return LazyTensor(name, parts[0].source.shape, dtype, partial(_assemble, parts, dtype))


def _assemble(parts: Sequence[_Part], dtype: np.dtype) -> np.ndarray:
    if parts[0].source.extract is None:
        return parts[0].values()
    out = np.empty(parts[0].source.shape, dtype)
    for part in parts:
        assert part.source.extract is not None
        view = part.source.extract(out)
        assert np.shares_memory(view, out), "parts of a Hugging Face layout are views"
        view[...] = part.values()
    return out
