"""What is compiled: every kernel, in every element type and with every option, for every GPU.

A kernel comes in with a function that makes its `Case` from an element type, sizes and options, and a line in `cases`.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from benchmarks._gpu.bound import multiplying, streaming
from benchmarks._gpu.compiled import Case
from benchmarks._gpu.guards import Wants
from benchmarks._gpu.products import products
from benchmarks._gpu.topology import Target
from pallas_kernels import kv_write, paged_decode, paged_prefill

SHAPES = yaml.safe_load(
    (Path(__file__).parent.parent.parent / "configs" / "bench" / "gpu.yaml").read_text(
        encoding="utf-8"
    )
)

ELEMENTS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "bf16": jnp.bfloat16}
FP8 = ("e4m3", "e5m2")
BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.float32}

# What attention is asked for: arrays by their axes, numbers as they are. Dynamic scales come beside them, for FP8 alone.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channel scales": {"k_scale": ("kv_heads", "head_dim"), "v_scale": ("kv_heads", "head_dim")},
    "window": {"window": ()},
    "soft cap": {"softcap": 50.0},
    "sinks": {"sinks": ("q_heads",)},
    "score offset": {"score_offset": ("queries", "q_heads")},
}
WRITES: dict[str, dict[str, Any]] = {
    "plain": {},
    "channel scales": {
        "k_inverse": ("kv_heads", "head_dim"),
        "v_inverse": ("kv_heads", "head_dim"),
    },
    "offset": {"k_offset": ("kv_heads", "head_dim")},
}
EXPONENTS = {name: ("rows", "kv_heads", "page_size") for name in ("k_exponent", "v_exponent")}
DTYPES = {
    "window": jnp.int32,
    "first_row": jnp.int32,
    "k_exponent": jnp.uint8,
    "v_exponent": jnp.uint8,
}
# Sizes that change what a kernel is made of, against the ones in configs/bench/gpu.yaml.
SIZES: dict[str, dict[str, int]] = {
    "head_dim 64": {"head_dim": 64},
    "head_dim 96": {"head_dim": 96},
    "head_dim 256": {"head_dim": 256, "kv_heads": 4, "q_heads": 16},
    "pages of 16": {"page_size": 16, "rows": 8192, "pages": 512},
    "groups of 7": {"q_heads": 28, "kv_heads": 4, "rows": 4096},
    "one KV head": {"kv_heads": 1, "rows": 8192},
    "a KV head per query head": {"kv_heads": 32, "rows": 512},
}

Make = Callable[..., Case]


def cases() -> list[Case]:
    """Every case, by GPU, kernel and element type."""
    targets = (Target.h100(), Target.a100())
    about_caches = [
        case
        for target in targets
        for element in ELEMENTS
        for case in [
            *attending(
                decode,
                target,
                element,
                sizes=SIZES | {"one request": {"requests": 1, "queries": 1}},
            ),
            *attending(prefill, target, element, sizes=SIZES),
            *writing(target, element),
        ]
    ]
    return about_caches + [
        case for target in targets for case in products(target, SHAPES["product"])
    ]


def attending(
    make: Make, target: Target, element: str, *, sizes: dict[str, dict[str, int]]
) -> list[Case]:
    """An attention kernel with each option, and with each size in one FP8 format and one other: both FP8 ones are a byte."""
    options = OPTIONS | ({"token and head scales": EXPONENTS} if element in FP8 else {})
    by_option = [make(target, element, name, options=asked) for name, asked in options.items()]
    if element == "e5m2":
        return by_option
    by_size = [make(target, element, name, sizes=changed) for name, changed in sizes.items()]
    return [*by_option, *by_size, make(target, element, "float32 queries", query=jnp.float32)]


def writing(target: Target, element: str) -> list[Case]:
    """The write with each way to scale, of a decode and of a prefill."""
    scaled = WRITES | ({"token and head scales": EXPONENTS} if element in FP8 else {})
    sizes = {"decode": SHAPES["write-decode"], "prefill": SHAPES["write-prefill"]}
    return [
        write(target, element, f"{of}, {name}", size, asked)
        for of, size in sizes.items()
        for name, asked in scaled.items()
    ]


def decode(
    target: Target, element: str, name: str, *, query: Any = jnp.bfloat16, **asked: Any
) -> Case:
    """`paged_decode` with what was asked: `options` and `sizes` that are not the usual ones."""
    size, pools, arrays, constants = _attention("decode", element, query, **asked)
    call = functools.partial(paged_decode, **constants, capability=target.capability)
    wants = _wants(query, arrays)
    against = functools.partial(streaming, used=_used(size))
    return Case(
        f"decode, {element}, {name}",
        "paged_decode",
        call,
        pools,
        arrays,
        target,
        wants=wants,
        against=against,
    )


def prefill(
    target: Target, element: str, name: str, *, query: Any = jnp.bfloat16, **asked: Any
) -> Case:
    """`paged_prefill` with what was asked."""
    size, pools, arrays, constants = _attention("prefill", element, query, **asked)
    arrays |= {"first_query": _array(size, "requests"), "queries": _array(size, "requests")}
    call = functools.partial(paged_prefill, **constants, capability=target.capability)
    # Blocks that fill the registers and a little more were faster on an H200 than any that spill nothing (docs/log.md).
    wants = _wants(query, arrays, spilled_bytes=256, spill_moves=12)
    against = functools.partial(multiplying, used=_used(size))
    return Case(
        f"prefill, {element}, {name}",
        "paged_prefill",
        call,
        pools,
        arrays,
        target,
        wants=wants,
        against=against,
    )


def write(
    target: Target, element: str, name: str, size: dict[str, int], asked: dict[str, Any]
) -> Case:
    """`kv_write` of bfloat16 keys and values into pools that are given up, and exponents with them."""
    arrays = _arrays(size, {"first_row": ()} | asked)
    exponents = {name: arrays.pop(name) for name in EXPONENTS if name in arrays}
    new = _array(size, "requests", "tokens", "kv_heads", "head_dim", dtype=jnp.bfloat16)
    arrays |= {"k": new, "v": new, "page_table": _array(size, "requests", "pages")}
    arrays |= {"start": _array(size, "requests"), "lengths": _array(size, "requests")}
    # An exponent crosses shared memory and is stored: a byte each, for K and V. A bfloat16 is converted on the slow pipe, which
    # four bytes moved for each leave time for.
    wants = Wants(
        attends=False, narrow=4 if exponents else 0, slow_conversions=16 if element == "bf16" else 0
    )
    call = functools.partial(kv_write, element=ELEMENTS[element])
    pools = _pools(size, element) | exponents
    return Case(
        f"write, {element}, {name}",
        "kv_write",
        call,
        pools,
        arrays,
        target,
        written=True,
        wants=wants,
    )


def _attention(
    kernel: str,
    element: str,
    query: Any,
    *,
    options: dict[str, Any] | None = None,
    sizes: dict[str, int] | None = None,
) -> tuple[dict[str, int], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Sizes, pools, other arrays and constants. The layer's first row is always one that varies."""
    size = SHAPES[kernel] | (sizes or {})
    given = {"first_row": ()} | (options or {})
    arrays = _arrays(size, given)
    constants = {name: value for name, value in given.items() if name not in arrays} | {
        "element": ELEMENTS[element]
    }
    arrays |= {"q": _array(size, "queries", "q_heads", "head_dim", dtype=query)}
    arrays |= {"page_table": _array(size, "requests", "pages"), "lengths": _array(size, "requests")}
    return size, _pools(size, element), arrays, constants


def _wants(query: Any, arrays: dict[str, Any], **known: int) -> Wants:
    """A lane reads the exponents of the keys whose scores it holds: 9 loads in decode as compiled by jax 0.10.2. Operands of
    float32 queries fill the registers, and up to 184 bytes more are spilled beside the loops."""
    known |= {"narrow": 16} if "k_exponent" in arrays else {}
    known |= {"spilled_bytes": 256, "spill_moves": 0} if query == jnp.float32 else {}
    return Wants(**known)


def _used(size: dict[str, int]) -> float:
    """The part of a tile's channels that exist: tiles have a power of two."""
    return size["head_dim"] / (1 << (size["head_dim"] - 1).bit_length())


def _pools(size: dict[str, int], element: str) -> dict[str, Any]:
    bits = BITS[np.dtype(ELEMENTS[element]).itemsize]
    pool = _array(size, "rows", "kv_heads", "page_size", "head_dim", dtype=bits)
    return {"k_pages": pool, "v_pages": pool}


def _arrays(size: dict[str, int], given: dict[str, Any]) -> dict[str, Any]:
    """Options that are arrays, float32 unless `DTYPES` says otherwise."""
    axes = {name: value for name, value in given.items() if isinstance(value, tuple)}
    return {
        name: _array(size, *of, dtype=DTYPES.get(name, jnp.float32)) for name, of in axes.items()
    }


def _array(size: dict[str, int], *axes: str, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(size[axis] for axis in axes), dtype)
