"""What a layer may keep, and the scales that each way of keeping it takes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jfp8kv.cache.plan import KVPlan, LayerPlan
from jfp8kv.cache.scales import TOKEN_HEAD, UNIT, KVScales
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.formats import FORMATS, kv_format
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.params import Params
from jfp8kv.quality.calibrate import calibration
from jfp8kv.quality.calibration_options import plan as calibration_plan

# Of an FP8 layer. Costlier ones last: of two that lose the same, the first is taken.
WAYS = (
    (UNIT, False),
    ("head", False),
    ("channel", False),
    ("channel", True),
    (TOKEN_HEAD, False),
    (TOKEN_HEAD, True),
)

HEADROOM = 2.0  # a few thousand tokens do not show the largest values there are


@dataclasses.dataclass(frozen=True)
class Candidates:
    """`plans` are the ways to keep a layer; `scales` those of every layer if all were kept so."""

    plans: tuple[LayerPlan, ...]
    scales: tuple[KVScales, ...]

    @classmethod
    def of(
        cls, params: Params, kv_dtypes: Sequence[str], prompts: Sequence[Any], *, longest: int
    ) -> "Candidates":
        """All ways to keep a layer in one of these formats, calibrated on `prompts` (token ids)."""
        plans, scales = [], []
        for name in kv_dtypes:
            fmt = kv_format(name)
            ways = WAYS if fmt.is_fp8 else ((None, False),)
            found = _calibrated(params, fmt.name, prompts, longest) if fmt.is_fp8 else {}
            for granularity, offset in ways:
                plans.append(LayerPlan(fmt.name, granularity, offset))
                scales.append(full(found.get((granularity, offset)), params.config))
        return cls(tuple(plans), tuple(scales))

    def chosen(
        self, which: Sequence[int], losses: np.ndarray
    ) -> tuple[tuple[LayerPlan, ...], KVScales]:
        """The plan of each layer, with what it was measured to lose, and the scales of them all."""
        layers = tuple(
            dataclasses.replace(self.plans[c], loss=float(losses[layer, c]))
            for layer, c in enumerate(which)
        )
        return layers, self.mixed(which)

    def mixed(self, which: Sequence[int | None]) -> KVScales:
        """Scales of layers that are kept in these ways; None is a layer that is not quantized."""
        unit = full(None, None, like=self.scales[0])
        rows = [(unit if c is None else self.scales[c], layer) for layer, c in enumerate(which)]
        k, v, offset = (
            np.stack([getattr(each, name)[layer] for each, layer in rows])
            for name in ("k", "v", "k_offset")
        )
        return KVScales(k, v, offset)


def dtypes(kv_dtypes: Any) -> tuple[str, ...]:
    """The names of formats to choose from, each checked. Raises `ConfigError`."""
    if isinstance(kv_dtypes, str) or not isinstance(kv_dtypes, Sequence) or not kv_dtypes:
        raise ConfigError(
            f"kv_dtypes={kv_dtypes!r}: must be a list of formats, of {', '.join(map(repr, FORMATS))}."
        )
    return tuple(dict.fromkeys(kv_format(name).name for name in kv_dtypes))


def _calibrated(
    params: Params, kv_dtype: str, prompts: Sequence[Any], longest: int
) -> dict[tuple[str, bool], KVScales]:
    """Scales by way; those per head are the largest of a head's channels."""

    def run(k_offset: bool) -> KVScales:
        asked = calibration_plan(
            kv_dtype=kv_dtype,
            granularity="channel",
            k_offset=k_offset,
            headroom=HEADROOM,
            max_model_len=longest,
        )
        return calibration(params, prompts, asked, progress=False).scales

    plain, less = run(False), run(True)
    head = KVScales(plain.k.max(axis=2, keepdims=True), plain.v.max(axis=2, keepdims=True))
    dynamic = KVScales(np.ones_like(less.k), np.ones_like(less.v), less.k_offset)
    return {
        ("head", False): head,
        ("channel", False): plain,
        ("channel", True): less,
        (TOKEN_HEAD, True): dynamic,
    }


def full(
    scales: KVScales | None, config: ModelConfig | None, like: KVScales | None = None
) -> KVScales:
    """Scales of every channel with an offset, 1 and 0 where there are none."""
    shape = like.k.shape if config is None else (config.layers, config.kv_heads, config.head_dim)
    k, v, offset = (1.0, 1.0, None) if scales is None else (scales.k, scales.v, scales.k_offset)
    return KVScales(
        *(np.broadcast_to(np.float32(x), shape) for x in (k, v, 0.0 if offset is None else offset))
    )


def as_plan(
    layers: tuple[LayerPlan, ...], scales: KVScales, bytes_per_token: float, loss: float
) -> KVPlan:
    """A plan that holds no more than it needs: no offsets where no layer has one."""
    offset = scales.k_offset if any(layer.k_offset for layer in layers) else None
    return KVPlan(layers, KVScales(scales.k, scales.v, offset), bytes_per_token, loss)
