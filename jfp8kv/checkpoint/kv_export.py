"""Write KV-cache scales into a checkpoint: the compressed-tensors layout, and a separate file.

The layout is what LLM Compressor writes and vLLM reads:

    model.layers.<n>.self_attn.k_scale, v_scale  float32, [1], or [kv_heads, 1, 1] for one per head
    config.json: quantization_config             declares the FP8 cache and the granularity

The layout is for E4M3FN. It has one granularity for K and V, and neither scales per channel nor K
offsets. Scales that it cannot express are written in full to `kv_scales.jfp8kv` (in the format of
`KVScales.save`), and the tensors get scales that clip no value. The suffix of the file prevents
loaders that read every .safetensors file of a folder from reading it as weights. `load` prefers the
file if the scale tensors are the ones that `export` would write for it. If another tool has
calibrated the folder since, they differ, and the outdated file is not used.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jfp8kv.cache.scales import KVScales, check_shape
from jfp8kv.checkpoint.kv_scales import ScaleIssue, ScaleReport
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.core.formats import E4M3, kv_format
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.layouts import add_prefix, hf_modules

ExportLayout = Literal["compressed-tensors"]
COMPRESSED_TENSORS: ExportLayout = "compressed-tensors"
KV_FILE = "kv_scales.jfp8kv"


def to_e4m3fn(scales: KVScales) -> KVScales:
    """Convert scales to E4M3FN, by the ratio of the largest values of the formats."""
    fmt = kv_format(scales.kv_dtype) if scales.kv_dtype else E4M3
    if fmt is E4M3:
        return scales
    ratio = np.float32(fmt.largest / E4M3.largest)
    return KVScales(scales.k * ratio, scales.v * ratio, scales.k_offset, E4M3.name)


def to_public_layout(scales: KVScales) -> KVScales:
    """Reduce E4M3FN scales to what the layout can express: one granularity, per layer or per head.

    A head gets the largest scale of its channels. A K offset `o` is replaced by a larger scale,
    `scale + |o| / 448`.
    """
    k = scales.k
    if scales.k_offset is not None:
        k = k + np.abs(scales.k_offset) / np.float32(E4M3.largest)
    k = k.max(axis=2, keepdims=True)
    v = scales.v.max(axis=2, keepdims=True)
    shape = np.broadcast_shapes(k.shape, v.shape)
    return KVScales(np.broadcast_to(k, shape), np.broadcast_to(v, shape), kv_dtype=E4M3.name)


def equal_values(a: KVScales, b: KVScales) -> bool:
    """Return whether two scales have the same effect: equal values after broadcasting."""

    def equal(x: np.ndarray | None, y: np.ndarray | None) -> bool:
        return x is y or (x is not None and y is not None and bool(np.all(x == y)))

    return equal(a.k, b.k) and equal(a.v, b.v) and equal(a.k_offset, b.k_offset)


def identical(a: KVScales, b: KVScales) -> bool:
    """Return whether two scales have equal values and shapes."""
    a_shapes = {name: array.shape for name, array in a.arrays.items()}
    b_shapes = {name: array.shape for name, array in b.arrays.items()}
    return a_shapes == b_shapes and equal_values(a, b)


def scale_tensors(config: ModelConfig, scales: KVScales) -> dict[str, np.ndarray]:
    """Return the tensors of the layout by name, for scales from `to_public_layout`."""
    attention = hf_modules(config, ())["layers.o"].path.rpartition(".")[0]
    tensors = {}
    for layer in range(config.layers):
        for part, values in (("k", scales.k), ("v", scales.v)):
            value = values[layer]
            name = add_prefix(config, f"{attention.format(layer=layer)}.{part}_scale")
            tensors[name] = value.reshape(-1, 1, 1) if len(value) > 1 else value.reshape(1)
    return tensors


def quantization_config(scales: KVScales) -> dict[str, Any]:
    """Return the `quantization_config` of config.json, with every field of the schema.

    `observer` is null: how the scales were calibrated is not known.
    """
    scheme = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "attn_head" if scales.granularity == "head" else "tensor",
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "scale_dtype": None,
        "zp_dtype": None,
        "observer": None,
        "observer_kwargs": {},
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "config_groups": {},
        "format": "dense",
        "global_compression_ratio": None,
        "ignore": [],
        "kv_cache_scheme": scheme,
        "quantization_status": "frozen",
    }


def prefer_kv_file(report: ScaleReport, folder: Path, config: ModelConfig) -> ScaleReport:
    """Return the report on `kv_scales.jfp8kv` if the folder has it, else `report` unchanged.

    A file that is unreadable, or that does not match the scale tensors, is an issue of the report,
    and the scale tensors are used.
    """
    path = folder / KV_FILE
    if not path.is_file():
        return report
    scales, error = _read_kv_file(path, report, config)
    if scales is None:
        used = report.scales is not None
        fallback = "the scales in the weights are used" if used else "it is ignored"
        issue = ScaleIssue(None, KV_FILE, error, fallback)
        return dataclasses.replace(report, issues=(*report.issues, issue))
    layers = ScaleReport.from_kv_scales(scales, source=KV_FILE).layers
    return dataclasses.replace(report, layers=layers, file=KV_FILE, scales=scales)


def _read_kv_file(
    path: Path, report: ScaleReport, config: ModelConfig
) -> tuple[KVScales | None, str]:
    """Return the scales, or None and the reason why they cannot be used."""
    try:
        scales = KVScales.load(path)
        check_shape(
            scales, layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim
        )
    except (ConfigError, CheckpointError) as error:
        return None, f"cannot be used: {error}".removesuffix(".")
    exported = to_public_layout(to_e4m3fn(scales))
    if report.scales is not None and not equal_values(exported, report.scales):
        return None, "does not match the scales in the weights: they are from another calibration"
    return scales, ""
