"""What a checkpoint's `quantization_config` says, in the spellings of the tools that write it.

Two questions only. Are the *weights* quantized? Then they cannot be read here, and that is an error. Does it declare
an FP8 *KV cache*? Then the engine's "auto" follows it. compressed-tensors (LLM Compressor, vLLM), ModelOpt and Quark
can each say the second without the first; every other method exists to quantize weights.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from jfp8kv.core.errors import CheckpointError


def declared_kv_dtype(quantization: Mapping[str, Any] | None) -> str | None:
    """`"fp8_e4m3"` when the config declares an FP8 KV cache, None when it declares none.

    Warns about a KV cache scheme of another kind. Raises `CheckpointError` for quantized weights.
    """
    if not quantization:
        return None
    try:
        return _declared(quantization)
    except (AttributeError, TypeError) as error:  # an entry of another type than the tools write
        raise CheckpointError(f"quantization_config={quantization!r}: malformed ({error}).") from error


def _declared(quantization: Mapping[str, Any]) -> str | None:
    method = quantization.get("quant_method")
    if _weights_are_quantized(quantization):
        raise CheckpointError(
            f"quantization_config with quant_method {method!r}: quantized weights are not read yet; load the "
            "unquantized checkpoint (a quantized KV cache alone is fine)."
        )
    scheme = quantization.get("kv_cache_scheme")
    algorithm = quantization.get("kv_cache_quant_algo")
    outputs = {
        str((part.get("output_tensors") or {}).get("dtype"))
        for part in (quantization.get("kv_cache_quant_config") or {}).values()
    }
    if scheme:
        if scheme.get("num_bits") == 8 and scheme.get("type") == "float":
            return "fp8_e4m3"
    elif algorithm == "FP8" or outputs == {"fp8_e4m3"}:
        return "fp8_e4m3"
    if declared := scheme or algorithm or outputs:
        warnings.warn(
            f"The checkpoint declares a KV cache scheme that is not known here and is ignored: {declared}", stacklevel=2
        )
    return None


def _weights_are_quantized(quantization: Mapping[str, Any]) -> bool:
    groups: Iterable[Any] = (quantization.get("config_groups") or {}).values()
    match quantization.get("quant_method"):
        case "compressed-tensors":
            return any((group or {}).get("weights") for group in groups)
        case "modelopt":
            algorithm = quantization.get("quant_algo")
            return algorithm not in (None, "NO_QUANT") or any((group or {}).get("weights") for group in groups)
        case "quark":
            layers = (quantization.get("layer_quant_config") or {}).values()
            return any((part or {}).get("weight") for part in (quantization.get("global_quant_config"), *layers))
        case _:
            return True
