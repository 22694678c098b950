"""Scales for models without calibrated ones: scale 1, unless the keys have a large K bias.

Scale 1 costs nothing, and the quantization error of ordinary keys and values does not depend on the
scale. Keys with a large K bias are different (Qwen2 and Qwen2.5 have biases in the hundreds): three
mantissa bits that encode the bias leave none for the rest, with any scale, and the output
degenerates. The weights show which layers have such a bias. In these layers it is subtracted before
keys are stored (`KVScales.k_offset`), at no cost in bytes. If RoPE rotates too much of the bias for
a constant offset, the layer is not quantized, with a warning. docs/notes/013 has the measurements.
"""

import warnings

import numpy as np

from jfp8kv.cache.scales import KVScales
from jfp8kv.core.errors import number_ranges
from jfp8kv.core.formats import BFLOAT16, KVFormat
from jfp8kv.models.key_bias import KeyStats, mean_rotated_bias
from jfp8kv.models.params import Params

# Thresholds, as multiples of the key spread of each KV head. A head counts as a whole, since the
# errors of its channels add up in the scores (docs/notes/013).
LARGE_BIAS = 1.0  # subtract larger biases: they more than double the quantization error
MAX_DEVIATION = 4.0  # do not quantize if RoPE moves the bias further: ten times the error
KEY_REACH = 16.0  # by channel: the scale covers keys up to this distance from the bias


def default_scales(
    params: Params, formats: tuple[KVFormat, ...], max_model_len: int
) -> tuple[tuple[KVFormat, ...], KVScales]:
    """Return the format of each layer, and the scales of all layers.

    Scales are 1, and K offsets are only present if a layer needs one.

    Args:
      params: the model. If its leaves are shapes instead of weights, all scales are 1.
      formats: the requested format of each layer.
      max_model_len: length of the longest sequence, in tokens.
    """
    unit = KVScales.unit(params.config.layers)
    is_fp8 = np.array([fmt.is_fp8 for fmt in formats])
    keys = KeyStats.from_weights(params.tree, params.config) if is_fp8.any() else None
    if keys is None:
        return formats, unit
    large = _exceeds(keys.bias, LARGE_BIAS, keys) & is_fp8
    if not large.any():
        return formats, unit
    offset, deviation = mean_rotated_bias(
        params.config, np.where(large[:, None, None], keys.bias, 0), max_model_len
    )
    rotating = _exceeds(deviation, MAX_DEVIATION, keys) & large
    if rotating.any():
        _warn_not_quantized(np.flatnonzero(rotating).tolist())
        formats = tuple(
            BFLOAT16 if wide else fmt for fmt, wide in zip(formats, rotating, strict=True)
        )
    with_offset = (large & ~rotating)[:, None, None]
    if not with_offset.any():
        return formats, unit
    largest = np.array([fmt.largest for fmt in formats], np.float32)[:, None, None]
    needed = (deviation + KEY_REACH * keys.spread).max(axis=2, keepdims=True) / largest
    power_of_two = np.exp2(np.maximum(np.ceil(np.log2(needed)), 0))
    k = np.where(with_offset, power_of_two, 1)
    return formats, KVScales(k, unit.v, np.where(with_offset, offset, 0))


def _exceeds(part: np.ndarray, times: float, keys: KeyStats) -> np.ndarray:
    """Return, by layer, whether `part` exceeds `times` the spread in any KV head."""
    return (np.linalg.norm(part, axis=2) > times * np.linalg.norm(keys.spread, axis=2)).any(axis=1)


def _warn_not_quantized(layers: list[int]) -> None:
    warnings.warn(
        f"Keys of layers {number_ranges(layers)} have a K bias that is large compared with their "
        "spread and rotates with the position. FP8 would lose the rest of the keys, so these "
        "layers use bfloat16. kv_scales='unit' quantizes them anyway; jfp8kv.plan_kv measures the "
        "loss of each layer.",
        stacklevel=4,
    )
