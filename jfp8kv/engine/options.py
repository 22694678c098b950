"""Options of the engine. `LLM`, YAML configs and the command line derive from them."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ForwardRef, TypeAlias, Union

from jfp8kv.core.errors import invalid_choice
from jfp8kv.core.options import Options, option, options
from jfp8kv.core.paths import looks_like_path
from jfp8kv.core.sizes import parse_bytes
from jfp8kv.core.types import (
    KV_DTYPES,
    KV_SCALES,
    AttentionName,
    KVDtypeName,
    KVScalesName,
    WeightsDtype,
)

if TYPE_CHECKING:
    from jfp8kv.cache.plan import KVPlan
    from jfp8kv.cache.scales import KVScales
else:  # their modules import JAX; `typing.get_type_hints` finds them by these references
    KVPlan = ForwardRef("KVPlan", module="jfp8kv.cache.plan")
    KVScales = ForwardRef("KVScales", module="jfp8kv.cache.scales")

# A string that is not a known name is a path if it has a separator or a suffix (`core.paths`).
KVDtype: TypeAlias = Union[  # noqa: UP007
    KVDtypeName, Mapping[str, Any], Sequence[str], KVPlan, os.PathLike[str]
]
KVScalesLike: TypeAlias = Union[KVScalesName, str, KVScales, os.PathLike[str]]  # noqa: UP007

MAX_SEED = 2**64 - 1
MAX_PROMPT_LOOKUP = 32  # a longer draft costs more than even a repetitive sequence gains


def check_kv_dtype(value: Any) -> Any:
    """Return `value` unless it is a string that is neither a format nor a path to a `KVPlan`.

    Formats by layer are checked when the number of layers is known (`cache.config`).
    """
    if isinstance(value, str) and value not in KV_DTYPES and not looks_like_path(value):
        raise invalid_choice("kv_dtype", value, KV_DTYPES)
    return value


def check_kv_scales(value: Any) -> Any:
    """Return `value` unless it is a string that is neither a name nor a path to `KVScales`."""
    if isinstance(value, str) and value not in KV_SCALES and not looks_like_path(value):
        raise invalid_choice("kv_scales", value, KV_SCALES, "a KVScales", "a path to one")
    return value


def _parse_memory(value: Any) -> int | None:
    return None if value is None else parse_bytes(value)


@options
class LoadOptions(Options):
    """How a model is loaded from a path or a hub id; `Params` in memory are used unchanged."""

    dtype: WeightsDtype | None = option(
        default=None,
        help="Dtype of the weights. By default that of the checkpoint.",
    )
    strict: bool = option(
        default=True,
        help=(
            "Refuse a checkpoint whose KV scales are missing or invalid. Otherwise scale 1 "
            "replaces them, with a warning."
        ),
    )


@options
class EngineOptions(LoadOptions):
    """Options of one engine: its KV cache, its limits, and how it runs.

    `kv_dtype` by layer is `{"default": "fp8_e4m3", "skip": [0, "sliding_window"]}`, whose skipped
    layers use bfloat16 (or "skip_dtype"), or a list with one name for each layer.
    """

    kv_dtype: KVDtype = option(
        default="auto",
        help=(
            'Format of the KV cache: a name, formats by layer, a KVPlan or a path to one. "auto" '
            "is the checkpoint's FP8 format if it declares one, else the dtype of the weights."
        ),
        convert=check_kv_dtype,
    )
    kv_scales: KVScalesLike = option(
        default="auto",
        help=(
            'Scales of an FP8 cache: a name, a KVScales or a path to one. "token_head" computes '
            'one scale per token and head. "auto" takes those of the checkpoint, else scale 1, and '
            "K offsets if K has large biases."
        ),
        convert=check_kv_scales,
    )
    kv_cache_memory: int | str | None = option(
        default=None,
        help=(
            'Size of the KV cache in bytes, such as "2GiB". By default what the weights and the '
            "largest step leave free on an accelerator, 10% of the free memory of a host, or less "
            "where max_num_seqs full contexts need less."
        ),
        convert=_parse_memory,
    )
    max_model_len: int | None = option(
        default=None,
        help="Maximum length of a sequence, prompt and output. By default the model's limit.",
        minimum=1,
    )
    max_num_seqs: int | None = option(
        default=None,
        help=(
            "Maximum number of requests that run at once. By default 64, or as many as leave "
            "prompts half of max_num_batched_tokens."
        ),
        minimum=1,
    )
    max_num_batched_tokens: int | None = option(
        default=None,
        help=(
            "Maximum number of tokens per scheduler step, padding included. It bounds how long a "
            "prompt delays decoding. By default prompts get 512 tokens on a CPU, 2048 elsewhere."
        ),
        minimum=1,
    )
    page_size: int = option(
        default=64, help="Number of tokens per page of the KV cache.", minimum=1, hint="try 64"
    )
    attention: AttentionName | None = option(
        default=None,
        help="Attention implementation. By default the fastest one that runs on this device.",
    )
    prefix_caching: bool = option(
        default=True, help="Share cached pages between sequences with equal prefixes."
    )
    prompt_lookup: int = option(
        default=0,
        help=(
            "Maximum number of draft tokens per step of prompt-lookup decoding, which drafts from "
            "earlier occurrences in the sequence. 0 turns it off; 4 suits requests that copy or "
            "quote."
        ),
        minimum=0,
        maximum=MAX_PROMPT_LOOKUP,
        hint="try 4",
    )
    seed: int = option(
        default=0,
        help="Seed of requests without one. It is combined with the number of the request.",
        minimum=0,
        maximum=MAX_SEED,
    )
