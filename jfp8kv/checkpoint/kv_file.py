"""`kv_scales.jfp8kv`: KV scales in our own form, beside weights whose published layout cannot hold them.

The name ends so that loaders which take every .safetensors file of a folder leave it alone; inside it is what `KVScales.save`
writes. `load` goes by it, as long as the scale tensors beside it say the same as far as they can: who calibrates the folder
anew with another tool gets that tool's scales, not ours of before.
"""

import dataclasses
from pathlib import Path

from jfp8kv.cache.scales import KVScales, check_shape
from jfp8kv.checkpoint.kv_export import for_e4m3, published, same_numbers
from jfp8kv.checkpoint.kv_scales import FoundScales, Problem
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.models.config import ModelConfig

KV_FILE = "kv_scales.jfp8kv"


def with_own_file(found: FoundScales, folder: Path, config: ModelConfig) -> FoundScales:
    """What the folder's own file says, if it has one, in the place of what was found in tensors. Never raises for a bad file:
    that is a problem of the report, and the tensors stay."""
    path = folder / KV_FILE
    if not path.is_file():
        return found
    own, problem = _read(path, found, config)
    if own is None:
        fallback = (
            "the scales in the weights are used" if found.scales is not None else "it is left out"
        )
        told = Problem(None, KV_FILE, problem, fallback)
        return dataclasses.replace(found, problems=(*found.problems, told))
    return dataclasses.replace(
        found, layers=FoundScales.of(own, source=KV_FILE).layers, file=KV_FILE, scales=own
    )


def _read(path: Path, found: FoundScales, config: ModelConfig) -> tuple[KVScales | None, str]:
    """The scales, or why they cannot be used."""
    try:
        own = KVScales.load(path)
        check_shape(own, layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim)
    except (ConfigError, CheckpointError) as error:
        return None, f"cannot be used: {error}".removesuffix(".")
    if found.scales is not None and not same_numbers(published(for_e4m3(own)), found.scales):
        return None, "does not belong to the scales in the weights: they are of another calibration"
    return own, ""
