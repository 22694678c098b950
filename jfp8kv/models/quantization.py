"""Read the `quantization_config` of checkpoints, in the formats of the tools that write it.

`weight_scheme` returns how the *weights* are quantized, or raises for an unsupported scheme.
`declared_kv_dtype` returns the FP8 format of the *KV cache* that the config declares, which
`kv_dtype="auto"` follows. A checkpoint may have either without the other.

Sources: configs written by compressed-tensors (LLM Compressor, vLLM), ModelOpt, Quark, AutoFP8,
FBGEMM and transformers (for DeepSeek and gpt-oss).
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from jfp8kv.core.errors import CheckpointError

Block = tuple[int, int]

WHOLE: Block = (0, 0)
PER_CHANNEL: Block = (1, 0)
SUPPORTED = (
    "compressed-tensors (float-quantized, 8 bits), modelopt (FP8), quark (fp8_e4m3), fp8, "
    "fbgemm_fp8, and mxfp4 as in gpt-oss"
)


@dataclasses.dataclass(frozen=True)
class WeightScheme:
    """How a checkpoint quantizes its weights.

    Attributes:
      method: the `quant_method` of the config.
      kind: "fp8" for float8 weights with scales; "mxfp4" for the experts of gpt-oss (OCP
        Microscaling Formats 1.0).
      blocks: the shapes `(rows, columns)` of the blocks that share a scale; 0 for all rows or
        columns.
    """

    method: str
    kind: Literal["fp8", "mxfp4"]
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        kind = "FP8" if self.kind == "fp8" else "MXFP4"
        return f"{self.method}: {kind}, a scale per {' or '.join(map(_describe, self.blocks))}"


def _describe(block: Block) -> str:
    if block == WHOLE:
        return "tensor"
    if block == PER_CHANNEL:
        return "channel"
    rows, columns = block
    return f"group of {columns}" if rows == 1 else f"block of {rows} x {columns}"


def weight_scheme(quantization: Mapping[str, Any] | None) -> WeightScheme | None:
    """Return how the weights are quantized; None if they are not.

    Raises:
      CheckpointError: an unsupported method, format or width, with the supported ones; a malformed
        config.
    """
    if not quantization:
        return None
    method = str(quantization.get("quant_method"))
    if method not in _SCHEMES:
        raise _unsupported(method)
    with _malformed(quantization):
        blocks = _SCHEMES[method](quantization)
    return WeightScheme(method, "mxfp4" if method == "mxfp4" else "fp8", blocks) if blocks else None


def _compressed_tensors(quantization: Mapping[str, Any]) -> tuple[Block, ...]:
    groups = [
        group
        for group in (quantization.get("config_groups") or {}).values()
        if (group or {}).get("weights")
    ]
    sparsity = (quantization.get("sparsity_config") or {}).get("format")
    if sparsity not in (None, "dense"):
        raise _unsupported("compressed-tensors", f"sparsity format {sparsity!r}")
    found = []
    for group in groups:
        weights = group["weights"]
        form = group.get("format") or quantization.get("format")
        if form not in ("float-quantized", "naive-quantized"):
            raise _unsupported("compressed-tensors", f"format {form!r}")
        bits = weights.get("num_bits")
        kind = weights.get("type")
        if bits != 8 or kind != "float" or not weights.get("symmetric", True):
            raise _unsupported("compressed-tensors", f"weights of {bits} bits and type {kind!r}")
        found.append(_compressed_block(weights))
    return tuple(dict.fromkeys(found))


def _compressed_block(weights: Mapping[str, Any]) -> Block:
    match weights.get("strategy"):
        case None | "tensor":
            return WHOLE
        case "channel":
            return PER_CHANNEL
        case "group":
            return (1, _size(weights.get("group_size")))
        case "block":
            block = weights.get("block_structure")
            return _pair(block.split("x") if isinstance(block, str) else block)
        case other:
            raise _unsupported("compressed-tensors", f"strategy {other!r}")


def _modelopt(quantization: Mapping[str, Any]) -> tuple[Block, ...]:
    algorithm = quantization.get("quant_algo")
    known = {"FP8": (WHOLE,), "FP8_PER_CHANNEL_PER_TOKEN": (PER_CHANNEL,), "NO_QUANT": (), None: ()}
    groups = (quantization.get("config_groups") or {}).values()
    if algorithm not in known or (
        algorithm is None and any((group or {}).get("weights") for group in groups)
    ):
        raise _unsupported("modelopt", f"quant_algo {algorithm!r}")
    return known[algorithm]


def _quark(quantization: Mapping[str, Any]) -> tuple[Block, ...]:
    layers = (quantization.get("layer_quant_config") or {}).values()
    parts = [
        (part or {}).get("weight") for part in (quantization.get("global_quant_config"), *layers)
    ]
    known = {"per_tensor": WHOLE, "per_channel": PER_CHANNEL}
    for part in filter(None, parts):
        if part.get("dtype") != "fp8_e4m3" or part.get("qscheme") not in known:
            raise _unsupported(
                "quark",
                f"weights of dtype {part.get('dtype')!r} and qscheme {part.get('qscheme')!r}",
            )
    return tuple(dict.fromkeys(known[part["qscheme"]] for part in filter(None, parts)))


def _fp8(quantization: Mapping[str, Any]) -> tuple[Block, ...]:
    experts = quantization.get("expert_dtype") or "fp8"
    if experts != "fp8":
        raise _unsupported("fp8", f"expert_dtype {experts!r}")
    block = quantization.get("weight_block_size")
    return (WHOLE,) if block is None else (_pair(block),)


_SCHEMES: dict[str, Callable[[Mapping[str, Any]], tuple[Block, ...]]] = {
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "quark": _quark,
    "fp8": _fp8,
    "fbgemm_fp8": lambda _: (PER_CHANNEL,),
    "mxfp4": lambda _: ((1, 32),),
}


def _size(value: Any) -> int:
    if int(value) < 1:
        raise ValueError(f"{value!r} is not a size")
    return int(value)


def _pair(value: Any) -> Block:
    rows, columns = map(_size, value)
    return rows, columns


def _unsupported(method: str, what: str = "") -> CheckpointError:
    return CheckpointError(
        f"quantization_config with quant_method {method!r}{what and ', ' + what}: quantized "
        f"weights of this kind are not supported; supported are {SUPPORTED}. Load the unquantized "
        "checkpoint, or one of these."
    )


@contextmanager
def _malformed(quantization: Mapping[str, Any]) -> Iterator[None]:
    """Raise `CheckpointError` for entries whose type is not the one that the tools write."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"quantization_config={quantization!r}: malformed ({error})."
        ) from error


def declared_kv_dtype(quantization: Mapping[str, Any] | None) -> str | None:
    """Return the FP8 format that the config declares for the KV cache, or None.

    Warns about an unknown KV cache scheme. Raises `CheckpointError` for a malformed config.
    """
    if not quantization:
        return None
    with _malformed(quantization):
        return _declared(quantization)


def _declared(quantization: Mapping[str, Any]) -> str | None:
    scheme, algorithm, outputs = _kv_entries(quantization)
    if quantization.get("quant_method") == "fp8" and (
        scheme == "static" or quantization.get("kv_cache_quant_targets")
    ):
        return "fp8_e4m3"  # the two forms of AutoFP8
    if scheme:
        if scheme.get("num_bits") == 8 and scheme.get("type") == "float":
            return "fp8_e4m3"
    elif algorithm in ("FP8", "FP8_E4M3FNUZ") or outputs in ({"fp8_e4m3"}, {"fp8_e4m3fnuz"}):
        return "fp8_e4m3"
    elif outputs == {"fp8_e5m2"}:
        return "fp8_e5m2"
    if declared := scheme or algorithm or outputs:
        warnings.warn(
            f"The checkpoint declares an unknown KV cache scheme, which is ignored: {declared}",
            stacklevel=2,
        )
    return None


def _kv_entries(quantization: Mapping[str, Any]) -> tuple[Any, Any, set[str]]:
    """Return the KV entries of the config.

    They are the scheme of compressed-tensors or AutoFP8, the algorithm of ModelOpt, and the dtypes
    of K and V of Quark.
    """
    outputs = {
        str((part.get("output_tensors") or {}).get("dtype"))
        for part in (quantization.get("kv_cache_quant_config") or {}).values()
    }
    return quantization.get("kv_cache_scheme"), quantization.get("kv_cache_quant_algo"), outputs


def kv_scale_format(quantization: Mapping[str, Any] | None) -> str:
    """Return the format that the KV scales of the checkpoint were computed for.

    It is "fp8_e4m3" unless the config declares "fp8_e4m3fnuz", "fp8_e5m2" or an unsupported format
    (integers, 4 bits), which is returned as a description.

    Raises `CheckpointError` for a malformed config.
    """
    if not quantization:
        return "fp8_e4m3"
    if any("fnuz" in text.lower() for text in _strings(quantization)):
        return "fp8_e4m3fnuz"
    with _malformed(quantization):
        scheme, algorithm, outputs = _kv_entries(quantization)
        if isinstance(scheme, Mapping):
            bits = scheme.get("num_bits")
            kind = scheme.get("type")
            return "fp8_e4m3" if bits == 8 and kind == "float" else f"{kind} of {bits} bits"
        if algorithm not in (None, "FP8"):
            return str(algorithm)
        return " and ".join(sorted(outputs)) or "fp8_e4m3"


def is_static_kv(quantization: Mapping[str, Any] | None) -> bool:
    """Return whether a declared FP8 cache has static scales, which the checkpoint contains."""
    scheme = (quantization or {}).get("kv_cache_scheme")
    return not (isinstance(scheme, Mapping) and scheme.get("dynamic"))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(entry)
