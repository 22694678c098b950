"""The cache of a model that brings no scales: scale 1, unless its keys have a large constant part.

Scale 1 costs nothing, and what FP8 keeps of ordinary keys and values does not depend on the scale. Keys with a large constant
part are another matter (Qwen2 and Qwen2.5 have biases in the hundreds): three bits of mantissa spent on the constant leave none
for the rest, whatever the scale, and text falls apart. The weights say which layers those are. There the constant is kept out
of the cache (`KVScales.k_offset`), at no cost in bytes; and where too much of it turns with the position to be constant, the
layer's cache is not quantized, said aloud. Note 013 has the measurements.
"""

import warnings

import numpy as np

from jfp8kv.cache.scales import KVScales
from jfp8kv.core.formats import BFLOAT16, KVFormat
from jfp8kv.core.ranges import runs
from jfp8kv.models.key_bias import KeysInWeights, turned
from jfp8kv.models.params import Params

# All in times what keys vary by: of a head as a whole, since errors in its channels add up in the scores (note 013).
LARGE = 1.0  # a constant part that doubles what FP8 loses: kept out of the cache
TURNING = 4.0  # the most of each channel that turns away, ten times the loss (not all are there at once): not quantized
FARTHEST = 16.0  # a key from its constant part, by channel, which the scale makes room for


def without_scales(
    params: Params, formats: tuple[KVFormat, ...], longest: int
) -> tuple[tuple[KVFormat, ...], KVScales]:
    """The format of each layer and its scales, for texts of up to `longest` tokens.

    `formats` are those asked for. Scales are 1 and there are no offsets unless a layer needs them.
    """
    unit = KVScales.unit(params.config.layers)
    keys = (
        KeysInWeights.of(params.tree, params.config) if any(fmt.is_fp8 for fmt in formats) else None
    )
    if keys is None:
        return formats, unit
    large = _exceeds(keys.constant, LARGE, keys) & np.array([fmt.is_fp8 for fmt in formats])
    if not large.any():
        return formats, unit
    offset, swing = turned(params.config, np.where(large[:, None, None], keys.constant, 0), longest)
    lost = _exceeds(swing, TURNING, keys) & large
    if lost.any():
        _warn(np.flatnonzero(lost).tolist())
        formats = tuple(BFLOAT16 if gone else fmt for fmt, gone in zip(formats, lost, strict=True))
    kept = (large & ~lost)[:, None, None]
    if not kept.any():
        return formats, unit
    largest = np.array([fmt.largest for fmt in formats], np.float32)[:, None, None]
    reach = (swing + FARTHEST * keys.spread).max(axis=2, keepdims=True) / largest
    scale = np.where(kept, np.exp2(np.maximum(np.ceil(np.log2(reach)), 0)), 1)
    return formats, KVScales(scale, unit.v, np.where(kept, offset, 0))


def _exceeds(part: np.ndarray, times: float, keys: KeysInWeights) -> np.ndarray:
    """The layers with a head where `part` is larger than so many times what keys vary by."""
    return (np.linalg.norm(part, axis=2) > times * np.linalg.norm(keys.spread, axis=2)).any(axis=1)


def _warn(layers: list[int]) -> None:
    warnings.warn(
        f"Keys of layers {runs(layers)} have a bias that is large beside what they vary by, and that turns with the position: "
        "FP8 would lose the rest of them, so these layers keep bfloat16. kv_scales='unit' quantizes them all the same; "
        "jfp8kv.plan_kv measures what each layer loses.",
        stacklevel=4,
    )
