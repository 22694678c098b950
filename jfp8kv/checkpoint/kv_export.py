"""Scales of an FP8 cache as a checkpoint publishes them, in the layout of compressed-tensors that LLM Compressor writes and
vLLM reads.

    model.layers.<n>.self_attn.k_scale, v_scale    float32, [1] for a tensor or [kv_heads, 1, 1] for each head
    config.json: quantization_config               says that the cache is FP8 and how its scales are given

The layout has E4M3FN, one kind of scale for keys and values, and neither scales by channel nor offsets. What goes beyond that
is kept whole in a file of our own (kv_file.py), and the layout gets the scale that holds the same values: nothing clips there.
"""

from typing import Any

import numpy as np

from jfp8kv.cache.scales import KVScales
from jfp8kv.core.formats import E4M3, kv_format
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.layouts import full_name, hf_modules

COMPRESSED_TENSORS = "compressed-tensors"


def for_e4m3(scales: KVScales) -> KVScales:
    """The same scales for E4M3FN, which is what the layout is for: changed so that the largest value stays the largest, where
    they were made for another format."""
    made_for = kv_format(scales.kv_dtype) if scales.kv_dtype else E4M3
    if made_for is E4M3:
        return scales
    ratio = np.float32(made_for.largest / E4M3.largest)
    return KVScales(scales.k * ratio, scales.v * ratio, scales.k_offset, E4M3.name)


def published(scales: KVScales) -> KVScales:
    """What the layout can say of scales for E4M3FN: one for each layer or each head, of keys and values alike.

    Of several channels it is the largest; keys stored less an offset `o` need `scale + |o| / 448` without it.
    """
    k = (
        scales.k
        if scales.k_offset is None
        else scales.k + np.abs(scales.k_offset) / np.float32(E4M3.largest)
    )
    k, v = (value.max(axis=2, keepdims=True) for value in (k, scales.v))
    shape = np.broadcast_shapes(k.shape, v.shape)
    return KVScales(np.broadcast_to(k, shape), np.broadcast_to(v, shape), kv_dtype=E4M3.name)


def same_numbers(a: KVScales, b: KVScales) -> bool:
    """Whether a cache does the same under both, whatever shapes they are kept in."""

    def equal(x: np.ndarray | None, y: np.ndarray | None) -> bool:
        return x is y or (x is not None and y is not None and bool(np.all(x == y)))

    return equal(a.k, b.k) and equal(a.v, b.v) and equal(a.k_offset, b.k_offset)


def same_arrays(a: KVScales, b: KVScales) -> bool:
    """The same, and the shapes too."""
    shapes = [{name: array.shape for name, array in each.arrays.items()} for each in (a, b)]
    return shapes[0] == shapes[1] and same_numbers(a, b)


def scale_tensors(config: ModelConfig, scales: KVScales) -> dict[str, np.ndarray]:
    """The tensors of what `published` gives, by name."""
    attention = hf_modules(config, ())["layers.o"].path.rpartition(".")[0]
    tensors = {}
    for layer in range(config.layers):
        for part, values in (("k", scales.k), ("v", scales.v)):
            one = values[layer]
            name = full_name(config, f"{attention.format(layer=layer)}.{part}_scale")
            tensors[name] = one.reshape(-1, 1, 1) if len(one) > 1 else one.reshape(1)
    return tensors


def quantization_config(scales: KVScales) -> dict[str, Any]:
    """The entry of config.json, every field of the schema spelled out. How the scales were found, `observer`, is not known."""
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
