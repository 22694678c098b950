"""What a checkpoint's `quantization_config` says, in the spellings of the tools that write it.

Two questions. How are the *weights* quantized? `weight_scheme` answers with data, or refuses by name what cannot be
read. Does it declare an FP8 *KV cache*? `declared_kv_dtype`, and the engine's "auto" follows it. Either may be true
without the other. Sources: the configs that compressed-tensors (LLM Compressor, vLLM), ModelOpt, Quark, AutoFP8, FBGEMM
and transformers (DeepSeek's and gpt-oss's own) write.
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
SUPPORTED = "compressed-tensors (float-quantized, 8 bits), modelopt (FP8), quark (fp8_e4m3), fp8, fbgemm_fp8, and mxfp4 as in gpt-oss"


@dataclasses.dataclass(frozen=True)
class WeightScheme:
    """How a checkpoint quantizes its weights.

    Attributes:
      method: the tool's own name for it, `quant_method`.
      kind: "fp8" is a float8 weight beside its scales; "mxfp4" is gpt-oss's experts (OCP Microscaling Formats 1.0).
      blocks: the `(rows, columns)` of a weight that may share one scale, 0 for all of them; one entry for each way
        that the checkpoint uses.
    """

    method: str
    kind: Literal["fp8", "mxfp4"]
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        return f"{self.method}: {'FP8' if self.kind == 'fp8' else 'MXFP4'}, a scale per {' or '.join(map(_words, self.blocks))}"


def _words(block: Block) -> str:
    named = {WHOLE: "tensor", PER_CHANNEL: "channel"}
    return named.get(block) or (
        f"group of {block[1]}" if block[0] == 1 else f"block of {block[0]} x {block[1]}"
    )


def weight_scheme(quantization: Mapping[str, Any] | None) -> WeightScheme | None:
    """How the weights are quantized; None when they are not.

    Raises:
      CheckpointError: a method, format or width that is not read, naming it and what is; a malformed config.
    """
    if not quantization:
        return None
    method = str(quantization.get("quant_method"))
    if method not in _SCHEMES:
        raise _refused(method)
    with _named(quantization):
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
        raise _refused("compressed-tensors", f"sparsity format {sparsity!r}")
    found = []
    for group in groups:
        weights, form = group["weights"], group.get("format") or quantization.get("format")
        if form not in ("float-quantized", "naive-quantized"):
            raise _refused("compressed-tensors", f"format {form!r}")
        bits, kind = weights.get("num_bits"), weights.get("type")
        if (bits, kind) != (8, "float") or not weights.get("symmetric", True):
            raise _refused("compressed-tensors", f"weights of {bits} bits and type {kind!r}")
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
            raise _refused("compressed-tensors", f"strategy {other!r}")


def _modelopt(quantization: Mapping[str, Any]) -> tuple[Block, ...]:
    algorithm = quantization.get("quant_algo")
    known = {"FP8": (WHOLE,), "FP8_PER_CHANNEL_PER_TOKEN": (PER_CHANNEL,), "NO_QUANT": (), None: ()}
    groups = (quantization.get("config_groups") or {}).values()
    if algorithm not in known or (
        algorithm is None and any((group or {}).get("weights") for group in groups)
    ):
        raise _refused("modelopt", f"quant_algo {algorithm!r}")
    return known[algorithm]


def _quark(quantization: Mapping[str, Any]) -> tuple[Block, ...]:
    layers = (quantization.get("layer_quant_config") or {}).values()
    parts = [
        (part or {}).get("weight") for part in (quantization.get("global_quant_config"), *layers)
    ]
    known = {"per_tensor": WHOLE, "per_channel": PER_CHANNEL}
    for part in filter(None, parts):
        if part.get("dtype") != "fp8_e4m3" or part.get("qscheme") not in known:
            raise _refused(
                "quark",
                f"weights of dtype {part.get('dtype')!r} and qscheme {part.get('qscheme')!r}",
            )
    return tuple(dict.fromkeys(known[part["qscheme"]] for part in filter(None, parts)))


def _fp8(quantization: Mapping[str, Any]) -> tuple[Block, ...]:
    experts = quantization.get("expert_dtype") or "fp8"
    if experts != "fp8":
        raise _refused("fp8", f"expert_dtype {experts!r}")
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
        raise ValueError(f"{value!r} is no size")
    return int(value)


def _pair(value: Any) -> Block:
    rows, columns = map(_size, value)
    return rows, columns


def _refused(method: str, what: str = "") -> CheckpointError:
    return CheckpointError(
        f"quantization_config with quant_method {method!r}{what and ', ' + what}: quantized weights of this kind are not "
        f"read; supported are {SUPPORTED}. Load the unquantized checkpoint, or one of these."
    )


@contextmanager
def _named(quantization: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (
        AttributeError,
        TypeError,
        ValueError,
    ) as error:  # an entry of another type than the tools write
        raise CheckpointError(
            f"quantization_config={quantization!r}: malformed ({error})."
        ) from error


def declared_kv_dtype(quantization: Mapping[str, Any] | None) -> str | None:
    """`"fp8_e4m3"` when the config declares an FP8 KV cache, None when it declares none.

    Warns about a KV cache scheme of another kind. Raises `CheckpointError` for a malformed config.
    """
    if not quantization:
        return None
    with _named(quantization):
        return _declared(quantization)


def _declared(quantization: Mapping[str, Any]) -> str | None:
    scheme, algorithm, outputs = _kv_entries(quantization)
    if quantization.get("quant_method") == "fp8" and (
        scheme == "static" or quantization.get("kv_cache_quant_targets")
    ):
        return "fp8_e4m3"  # AutoFP8's two spellings
    if scheme:
        if scheme.get("num_bits") == 8 and scheme.get("type") == "float":
            return "fp8_e4m3"
    elif algorithm in ("FP8", "FP8_E4M3FNUZ") or outputs in ({"fp8_e4m3"}, {"fp8_e4m3fnuz"}):
        return "fp8_e4m3"
    elif outputs == {"fp8_e5m2"}:
        return "fp8_e5m2"
    if declared := scheme or algorithm or outputs:
        warnings.warn(
            f"The checkpoint declares a KV cache scheme that is not known here and is ignored: {declared}",
            stacklevel=2,
        )
    return None


def _kv_entries(quantization: Mapping[str, Any]) -> tuple[Any, Any, set[str]]:
    """compressed-tensors' scheme (AutoFP8's word), ModelOpt's algorithm, and the dtypes that Quark gives K and V."""
    outputs = {
        str((part.get("output_tensors") or {}).get("dtype"))
        for part in (quantization.get("kv_cache_quant_config") or {}).values()
    }
    return quantization.get("kv_cache_scheme"), quantization.get("kv_cache_quant_algo"), outputs


def scales_made_for(quantization: Mapping[str, Any] | None) -> str:
    """The format that the KV scales of such a checkpoint are made for.

    "fp8_e4m3" unless the config says otherwise: "fp8_e4m3fnuz", "fp8_e5m2", or what it says, in words, when scales for that
    mean nothing here (integers, 4 bits). Raises `CheckpointError` for a malformed config.
    """
    if not quantization:
        return "fp8_e4m3"
    if any("fnuz" in text.lower() for text in _strings(quantization)):
        return "fp8_e4m3fnuz"
    with _named(quantization):
        scheme, algorithm, outputs = _kv_entries(quantization)
        if isinstance(scheme, Mapping):
            bits, kind = scheme.get("num_bits"), scheme.get("type")
            return "fp8_e4m3" if (bits, kind) == (8, "float") else f"{kind} of {bits} bits"
        if algorithm not in (None, "FP8"):
            return str(algorithm)
        return " and ".join(sorted(outputs)) or "fp8_e4m3"


def is_static_kv(quantization: Mapping[str, Any] | None) -> bool:
    """Whether a declared FP8 cache has its scales in the checkpoint, rather than finds them as it runs."""
    scheme = (quantization or {}).get("kv_cache_scheme")
    return not (isinstance(scheme, Mapping) and scheme.get("dynamic"))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(entry)
