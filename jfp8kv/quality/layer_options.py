"""The options of mixed precision: cache formats, with the scales of each."""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from jfp8kv.cache.plan import KVPlan, LayerPlan
from jfp8kv.cache.scales import TOKEN_HEAD, UNIT, KVScales
from jfp8kv.core.formats import KVFormat, kv_format
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.params import Params
from jfp8kv.quality.calibrate import Calibrator, amax_scales, run_calibration
from jfp8kv.quality.observers import AmaxObserver, ScaleShape
from jfp8kv.quality.options import CalibrationOptions

ScalesKey: TypeAlias = tuple[str, bool]
"""The kind of scales of an FP8 layer, and whether it has K offsets."""

# Cheaper ones first: of two with equal loss and size, the first is chosen.
FP8_SCALES: tuple[ScalesKey, ...] = (
    (UNIT, False),
    ("head", False),
    ("channel", False),
    ("channel", True),
    (TOKEN_HEAD, False),
    (TOKEN_HEAD, True),
)

HEADROOM = 2.0  # other data has larger values than a few thousand tokens show


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """The options of every layer: option `i` is `plans[i]` with the scales `scales[i]`."""

    plans: tuple[LayerPlan, ...]
    scales: tuple[KVScales, ...]

    @classmethod
    def of(
        cls,
        params: Params,
        kv_dtypes: Sequence[str],
        prompts: Sequence[list[int]],
        *,
        max_model_len: int,
    ) -> "LayerOptions":
        """Return the options with these formats, calibrated on `prompts` (token ids)."""
        plans: list[LayerPlan] = []
        scales: list[KVScales] = []
        formats = [kv_format(name) for name in kv_dtypes]
        amax = _channel_amax(params, prompts) if any(fmt.is_fp8 for fmt in formats) else None
        for fmt in formats:
            if amax is None or not fmt.is_fp8:
                plans.append(LayerPlan(fmt.name))
                scales.append(full_scales(None, params.config))
                continue
            calibrated = _calibrate(params, fmt, amax, prompts, max_model_len)
            for key in FP8_SCALES:
                plans.append(LayerPlan(fmt.name, *key))
                scales.append(full_scales(calibrated.get(key), params.config))
        return cls(tuple(plans), tuple(scales))

    def mixed_scales(self, options: Sequence[int | None]) -> KVScales:
        """Return the scales of layers with these options. None is a layer that is not quantized."""
        shape = self.scales[0].k.shape
        k = np.ones(shape, np.float32)
        v = np.ones(shape, np.float32)
        k_offset = np.zeros(shape, np.float32)
        for layer, option in enumerate(options):
            if option is None:
                continue
            scales = self.scales[option]
            assert scales.k_offset is not None, "full scales have an offset"
            k[layer] = scales.k[layer]
            v[layer] = scales.v[layer]
            k_offset[layer] = scales.k_offset[layer]
        return KVScales(k, v, k_offset)

    def kv_plan(
        self, options: Sequence[int], losses: np.ndarray, *, bytes_per_token: float, loss: float
    ) -> KVPlan:
        """Return the plan of layers with these options.

        Args:
          options: the option of each layer.
          losses: the measured losses, `[layers, options]`.
          bytes_per_token: the size of the plan.
          loss: the measured loss of the whole plan.
        """
        layers = tuple(
            dataclasses.replace(self.plans[option], loss=float(losses[layer, option]))
            for layer, option in enumerate(options)
        )
        scales = self.mixed_scales(options)
        if not any(layer.k_offset for layer in layers):
            scales = KVScales(scales.k, scales.v)
        return KVPlan(layers, scales, bytes_per_token, loss)


def _channel_amax(params: Params, prompts: Sequence[list[int]]) -> AmaxObserver:
    """Return the amax of each channel, which serves all FP8 formats."""
    calibrator = Calibrator(params, "channel")
    return calibrator.run([[ids] for ids in prompts], AmaxObserver.empty(calibrator.shape))


def _calibrate(
    params: Params,
    fmt: KVFormat,
    amax: AmaxObserver,
    prompts: Sequence[list[int]],
    max_model_len: int,
) -> dict[ScalesKey, KVScales]:
    """Return calibrated scales for the options that use them."""
    config = params.config
    shape = ScaleShape(config.layers, config.kv_heads, config.head_dim, "channel")
    formats = [fmt] * config.layers
    options = CalibrationOptions.from_fields(
        kv_dtype=fmt.name,
        granularity="channel",
        k_offset=True,
        headroom=HEADROOM,
        max_model_len=max_model_len,
    )
    offset = run_calibration(params, prompts, options, progress=False).scales
    ones = np.ones_like(offset.k)
    return {
        ("head", False): amax_scales(amax, shape, "head", formats, HEADROOM),
        ("channel", False): amax_scales(amax, shape, "channel", formats, HEADROOM),
        ("channel", True): offset,
        (TOKEN_HEAD, True): KVScales(ones, ones, offset.k_offset),
    }


def full_scales(scales: KVScales | None, config: ModelConfig) -> KVScales:
    """Return scales and K offsets for every channel: 1 and 0 if `scales` has none."""
    shape = (config.layers, config.kv_heads, config.head_dim)
    if scales is None:
        ones = np.ones(shape, np.float32)
        return KVScales(ones, ones, np.zeros(shape, np.float32))
    k_offset = np.float32(0) if scales.k_offset is None else scales.k_offset
    return KVScales(
        np.broadcast_to(scales.k, shape),
        np.broadcast_to(scales.v, shape),
        np.broadcast_to(k_offset, shape),
    )
