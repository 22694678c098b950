"""What is compiled: every kernel, in every element type and with every option, for every GPU.

A kernel comes in with a function that makes its `Case` from an element type, sizes and options, and a line in `cases`.
"""

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
from benchmarks._gpu.topology import Target
from pallas_kernels import kv_write, paged_decode, paged_prefill

SHAPES = yaml.safe_load((Path(__file__).parent.parent.parent / "configs" / "bench" / "gpu.yaml").read_text(encoding="utf-8"))

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
    "channel scales": {"k_inverse": ("kv_heads", "head_dim"), "v_inverse": ("kv_heads", "head_dim")},
    "offset": {"k_offset": ("kv_heads", "head_dim")},
}
EXPONENTS = {name: ("rows", "kv_heads", "page_size") for name in ("k_exponent", "v_exponent")}
DTYPES = {"window": jnp.int32, "first_row": jnp.int32, "k_exponent": jnp.uint8, "v_exponent": jnp.uint8}
# Sizes that change what a kernel is made of, against the ones in configs/bench/gpu.yaml.
SIZES: dict[str, dict[str, int]] = {
    "head_dim 64": {"head_dim": 64},
    "head_dim 256": {"head_dim": 256, "kv_heads": 4, "q_heads": 16},
    "pages of 16": {"page_size": 16, "rows": 8192, "pages": 512},
    "one KV head": {"kv_heads": 1, "rows": 8192},
    "a KV head per query head": {"kv_heads": 32, "rows": 512},
}

Make = Callable[..., Case]


def cases() -> list[Case]:
    """Every case, by GPU, kernel and element type."""
    return [
        case
        for target in (Target.h100(), Target.a100())
        for element in ELEMENTS
        for case in [
            *attending(decode, target, element, sizes=SIZES | {"one request": {"requests": 1, "queries": 1}}),
            *attending(prefill, target, element, sizes=SIZES),
            *writing(target, element),
        ]
    ]


def attending(make: Make, target: Target, element: str, *, sizes: dict[str, dict[str, int]]) -> list[Case]:
    """An attention kernel with each option, and with each size in one FP8 format and one other: both FP8 ones are a byte."""
    options = OPTIONS | ({"token and head scales": EXPONENTS} if element in FP8 else {})
    by_option = [make(target, element, name, options=asked) for name, asked in options.items()]
    return by_option + [make(target, element, name, sizes=changed) for name, changed in sizes.items() if element != "e5m2"]


def writing(target: Target, element: str) -> list[Case]:
    """The write with each way to scale, of a decode and of a prefill."""
    scaled = WRITES | ({"token and head scales": EXPONENTS} if element in FP8 else {})
    kinds = [kind for kind in SHAPES if kind.startswith("write")]
    return [
        write(target, element, f"{kind.split('-')[1]}, {name}", kind, asked) for kind in kinds for name, asked in scaled.items()
    ]


def decode(target: Target, element: str, name: str, **asked: Any) -> Case:
    """`paged_decode` of bfloat16 queries."""
    size, arguments, constants = _attention("decode", target, element, **asked)

    def call(q, k, v, page_table, lengths, arrays):
        return paged_decode(q, k, v, page_table, lengths, **arrays, **constants)

    wants = _wants(arguments[-1], spilled_bytes=16 if target.name == "a100" else 0)
    return Case(f"decode, {element}, {name}", "paged_decode", call, arguments, target, wants=wants, against=streaming)


def prefill(target: Target, element: str, name: str, **asked: Any) -> Case:
    """`paged_prefill` of bfloat16 queries."""
    size, arguments, constants = _attention("prefill", target, element, **asked)
    arguments = (*arguments[:-1], _array(size, "requests"), _array(size, "requests"), arguments[-1])

    def call(q, k, v, page_table, lengths, first_query, queries, arrays):
        return paged_prefill(q, k, v, page_table, lengths, first_query, queries, **arrays, **constants)

    # The blocks are cut for Hopper, whose tensor cores read shared memory; an A100 spills 200 bytes, most outside the loops.
    wants = _wants(arguments[-1], spilled_bytes=256 if target.name == "a100" else 0)
    return Case(f"prefill, {element}, {name}", "paged_prefill", call, arguments, target, wants=wants, against=multiplying)


def write(target: Target, element: str, name: str, kind: str, asked: dict[str, Any]) -> Case:
    """`kv_write` of bfloat16 keys and values into pools that are given up, and exponents with them."""
    size = SHAPES[kind]
    arrays = {name: _array(size, *axes, dtype=DTYPES.get(name, jnp.float32)) for name, axes in asked.items()}
    exponents = [arrays.pop(name) for name in EXPONENTS if name in arrays]
    pools = [*_pools(size, element), *exponents]
    new = _array(size, "requests", "tokens", "kv_heads", "head_dim", dtype=jnp.bfloat16)
    per_request = _array(size, "requests")
    arguments = (*pools, new, new, _array(size, "requests", "pages"), per_request, per_request, _array(size), arrays)

    def call(k_pages, v_pages, *rest):
        exponents, (k, v, page_table, start, lengths, first_row, arrays) = (
            dict(zip(EXPONENTS, rest[:-7], strict=False)),
            rest[-7:],
        )
        more = {"element": ELEMENTS[element], "first_row": first_row} | exponents | arrays
        return kv_write(k, v, k_pages, v_pages, page_table, start, lengths, **more)

    # An exponent crosses shared memory and is stored: a byte each, for K and V. A bfloat16 is converted on the slow pipe, which four
    # bytes moved for each leave time for.
    wants = Wants(attends=False, narrow=4 if exponents else 0, slow_conversions=16 if element == "bf16" else 0)
    return Case(
        f"write, {element}, {name}",
        "kv_write",
        call,
        arguments,
        target,
        pools=tuple(range(len(pools))),
        written=True,
        wants=wants,
    )


def _attention(
    kernel: str, target: Target, element: str, *, options: dict[str, Any] | None = None, sizes: dict[str, int] | None = None
) -> tuple[dict[str, int], tuple[Any, ...], dict[str, Any]]:
    """Sizes, arguments (options that are arrays last) and constants. The layer's first row is always one that varies."""
    size = SHAPES[kernel] | (sizes or {})
    given = {"first_row": ()} | (options or {})
    arrays = {
        name: _array(size, *axes, dtype=DTYPES.get(name, jnp.float32))
        for name, axes in given.items()
        if isinstance(axes, tuple)
    }
    constants = {name: value for name, value in given.items() if name not in arrays}
    arguments = (
        _array(size, "queries", "q_heads", "head_dim", dtype=jnp.bfloat16),
        *_pools(size, element),
        _array(size, "requests", "pages"),
        _array(size, "requests"),
        arrays,
    )
    return size, arguments, constants | {"element": ELEMENTS[element], "native_e4m3": target.converts_e4m3}


def _wants(arrays: dict[str, Any], **allowed: int) -> Wants:
    """A lane reads the exponents of the keys whose scores it holds: 9 loads in decode as compiled by jax 0.10.2."""
    return Wants(narrow=16 if "k_exponent" in arrays else 0, **allowed)


def _pools(size: dict[str, int], element: str) -> list[jax.ShapeDtypeStruct]:
    bits = BITS[np.dtype(ELEMENTS[element]).itemsize]
    return [_array(size, "rows", "kv_heads", "page_size", "head_dim", dtype=bits)] * 2


def _array(size: dict[str, int], *axes: str, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(size[axis] for axis in axes), dtype)
