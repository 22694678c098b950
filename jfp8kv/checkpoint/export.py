"""`export` writes `Params` as a Hugging Face folder, which other engines load and `load` reads back as it was.

    folder/config.json             the model in the words of its architecture, and what its KV cache is
    folder/generation_config.json  the tokens that begin and end a text
    folder/model.safetensors       weights and KV scales; beyond 5 GB in shards, with their index
    folder/tokenizer.json          if there is a tokenizer, and tokenizer_config.json with its chat template
    folder/kv_scales.jfp8kv        KV scales that the published layout cannot hold (kv_file.py), if they are such

The folder appears whole or not at all. Why things are as they are: docs/notes/012.
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.scales import KVScales, check_shape
from jfp8kv.checkpoint.folder import INDEX
from jfp8kv.checkpoint.hf_weights import hf_weights
from jfp8kv.checkpoint.kv_export import (
    COMPRESSED_TENSORS,
    for_e4m3,
    published,
    quantization_config,
    same_arrays,
    same_numbers,
    scale_tensors,
)
from jfp8kv.checkpoint.kv_file import KV_FILE
from jfp8kv.checkpoint.load import load_kv_scales
from jfp8kv.checkpoint.safetensors import NewTensor, write_safetensors
from jfp8kv.checkpoint.tokenizer import require_written_form, write_tokenizer
from jfp8kv.checkpoint.whole import is_free, written_whole
from jfp8kv.core.errors import CheckpointError, ConfigError, invalid_choice
from jfp8kv.core.formats import E4M3
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.families.to_hf import config_to_hf
from jfp8kv.models.params import Params

CONFIG = "config.json"
LAYOUTS = (COMPRESSED_TENSORS,)
_SHARD_BYTES = 5 * 10**9
_METADATA = {"format": "pt"}  # what transformers asks of a file before it reads it


def export(
    params: Params,
    folder: str | os.PathLike[str],
    *,
    kv_scales: Any = None,
    layout: str = COMPRESSED_TENSORS,
) -> None:
    """Write a model as a Hugging Face folder: weights, config, tokenizer, and scales for an FP8 cache where vLLM and others
    look for them. `load` gives the same model back.

    Scales per tensor and per head are published. Scales per channel and K offsets are for this library alone, in a file beside
    the weights; other engines get one scale per head that holds the same values, which a warning says.

    Args:
      folder: where to; folders above it are made. It must not exist, or be empty.
      kv_scales: a `KVScales` or a path to one; None is what `params` has, if anything. Without scales the weights are written
        as they are and no cache is declared.
      layout: of the scales: "compressed-tensors", as LLM Compressor writes and vLLM reads them.

    Raises:
      CheckpointError: the folder is not empty, or cannot be written.
      ConfigError: what has no form in such a folder: a config that its architecture's config.json cannot say, a tokenizer
        that cannot be written, a `KVPlan`, scales of another model or too small or large to be loaded.
    """
    if not isinstance(params, Params):
        raise ConfigError(
            f"params of type {type(params).__name__}: must be a Params, as from load or Params.from_pytree."
        )
    if layout not in LAYOUTS:
        raise invalid_choice("layout", layout, LAYOUTS)
    path = Path(os.path.expanduser(folder)).resolve()
    require_written_form(params.tokenizer)
    tensors = hf_weights(params)
    config = dataclasses.replace(params.config, dtype=params.dtype.name)
    written = config_to_hf(config) | {"pad_token_id": _pad_id(params.tokenizer)}
    scales = _asked(params, kv_scales)
    _say_what_is_declared(config, scales)
    with written_whole(path) as beside:
        if not is_free(path):
            raise CheckpointError(f"{path}: exists and is not an empty folder: give another one.")
        if scales is not None:
            written["quantization_config"] = quantization_config(published(scales))
        _write_json(beside / CONFIG, written)
        _write_json(beside / "generation_config.json", _generation(params))
        _write_weights(
            beside, tensors if scales is None else tensors + _scales(config, scales, beside)
        )
        if params.tokenizer is not None:
            write_tokenizer(params.tokenizer, beside, max_len=config.max_len)
        if scales is not None:
            _require_readable(beside)


def _asked(params: Params, kv_scales: Any) -> KVScales | None:
    """The scales to publish, for E4M3FN."""
    given = params.kv_scales if kv_scales is None else kv_scales
    if given is None:
        return None
    if isinstance(given, str | os.PathLike):
        given = KVScales.load(given)
    if isinstance(given, KVPlan):
        raise ConfigError(
            "kv_scales is a KVPlan: a checkpoint declares one format for the cache of all layers, so a plan has no form in it. "
            "Export with kv_scales=None, keep the plan beside it with plan.save(path), and give that path as kv_dtype."
        )
    if not isinstance(given, KVScales):
        raise ConfigError(
            f"kv_scales={given!r}: must be a KVScales, a path to one, or None for those of params."
        )
    c = params.config
    check_shape(given, layers=c.layers, kv_heads=c.kv_heads, head_dim=c.head_dim)
    return _for_the_layout(given)


def _for_the_layout(scales: KVScales) -> KVScales:
    changed = for_e4m3(scales)
    if changed is not scales:
        warnings.warn(
            f"The KV scales are made for {scales.kv_dtype}, and the layout {COMPRESSED_TENSORS!r} is for {changed.kv_dtype}: "
            "they are multiplied by the ratio of the formats' largest values.",
            stacklevel=4,
        )
    return changed


def _say_what_is_declared(config: ModelConfig, scales: KVScales | None) -> None:
    """Warn where the folder declares another cache than the model did."""
    declared = config.kv_cache_dtype
    if declared and scales is None:
        warnings.warn(
            f"The model declares an {declared} cache and has no scales for it: the folder declares none.",
            stacklevel=3,
        )
    elif declared and declared != E4M3.name:
        warnings.warn(
            f"The model declares an {declared} cache: the folder, as its layout has it, {E4M3.name}.",
            stacklevel=3,
        )


def _scales(config: ModelConfig, scales: KVScales, folder: Path) -> list[NewTensor]:
    """The tensors to publish. What they cannot hold is written beside them, and said where it matters to other engines."""
    public = published(scales)
    if not same_arrays(public, scales):
        scales.save(folder / KV_FILE)
        shutil.copymode(
            folder / CONFIG, folder / KV_FILE
        )  # safetensors lets nobody but the owner read its files
    if not same_numbers(public, scales):
        kinds = ["channel scales"] * (scales.granularity == "channel") + ["K offsets"] * (
            scales.k_offset is not None
        )
        warnings.warn(
            f"The layout {COMPRESSED_TENSORS!r} has no place for {' and '.join(kinds)}: they are in {KV_FILE}, which jfp8kv "
            f"alone reads. Other engines see one scale per {public.granularity}, under which the same values fit, and small "
            "ones are rounded more coarsely.",
            stacklevel=3,
        )
    arrays = scale_tensors(config, public)
    return [
        NewTensor(name, array.shape, array.dtype, partial(np.asarray, array))
        for name, array in arrays.items()
    ]


def _pad_id(tokenizer: Any) -> int | None:
    """Families differ in what they take for padding where a config says nothing; some of it lies outside the vocabulary."""
    token = tokenizer.special_tokens.get("pad_token") if tokenizer is not None else None
    return tokenizer.backend.token_to_id(token) if isinstance(token, str) else None


def _generation(params: Params) -> dict[str, Any]:
    found = {"bos_token_id": params.config.bos_id, "eos_token_id": list(params.eos_ids)}
    return {name: value for name, value in found.items() if value not in (None, [])}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(folder: Path, tensors: Sequence[NewTensor]) -> None:
    """In one file, or in shards of at most `_SHARD_BYTES` (or of one tensor) with their index."""
    shards: list[list[NewTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + tensor.nbytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors, _METADATA)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, _METADATA)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _require_readable(folder: Path) -> None:
    """Raise `ConfigError` for scales that `load` would refuse: those too small or too large for float32's normal numbers."""
    if problems := load_kv_scales(folder).problems:
        raise ConfigError(f"kv_scales cannot be exported: {problems[0]}.")
