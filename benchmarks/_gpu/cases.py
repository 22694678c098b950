"""What is compiled: every kernel, in every element type and with every option, for every GPU.

A kernel comes in with a function that makes its `Case` from an element type, sizes and options, and a line in `cases`.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from benchmarks._gpu.bound import streaming
from benchmarks._gpu.compiled import Case
from benchmarks._gpu.guards import Wants
from benchmarks._gpu.topology import Target
from pallas_kernels import paged_decode

SHAPES = yaml.safe_load((Path(__file__).parent.parent.parent / "configs" / "bench" / "gpu.yaml").read_text(encoding="utf-8"))

ELEMENTS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "bf16": jnp.bfloat16}
BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.float32}

# What attention is asked for: arrays by their axes, numbers as they are. Dynamic scales come beside them, for FP8 alone.
STATIC: dict[str, dict[str, Any]] = {
    "plain": {},
    "channel scales": {"k_scale": ("kv_heads", "head_dim"), "v_scale": ("kv_heads", "head_dim")},
    "window": {"window": ()},
    "soft cap": {"softcap": 50.0},
    "sinks": {"sinks": ("q_heads",)},
    "score offset": {"score_offset": ("queries", "q_heads")},
}
EXPONENTS = {name: ("rows", "kv_heads", "page_size") for name in ("k_exponent", "v_exponent")}
DTYPES = {"window": jnp.int32, "first_row": jnp.int32, "k_exponent": jnp.uint8, "v_exponent": jnp.uint8}
# Sizes that change what a kernel is made of, against the ones in configs/bench/gpu.yaml.
SIZES: dict[str, dict[str, int]] = {
    "head_dim 64": {"head_dim": 64},
    "head_dim 256": {"head_dim": 256, "kv_heads": 4, "q_heads": 16},
    "pages of 16": {"page_size": 16, "rows": 8192, "pages": 512},
    "one KV head": {"kv_heads": 1},
    "a KV head per query head": {"kv_heads": 32, "rows": 512},
}


def cases() -> list[Case]:
    """Every case, by GPU."""
    return [case for target in (Target.h100(), Target.a100()) for element in ELEMENTS for case in decodes(target, element)]


def decodes(target: Target, element: str) -> list[Case]:
    options = STATIC | ({"token and head scales": EXPONENTS} if element in ("e4m3", "e5m2") else {})
    made = [decode(target, element, name, options=asked) for name, asked in options.items()]
    sizes = SIZES | {"one request": {"requests": 1}}
    return made + [decode(target, element, name, sizes=sizes[name]) for name in sizes]


def decode(
    target: Target, element: str, name: str, *, options: dict[str, Any] | None = None, sizes: dict[str, int] | None = None
) -> Case:
    """`paged_decode` of bfloat16 queries."""
    size = SHAPES["decode"] | (sizes or {})
    size["queries"] = size["requests"]
    arrays, numbers = _options(size, options or {})
    arguments = (
        _array(size, "requests", "q_heads", "head_dim", dtype=jnp.bfloat16),
        *_pools(size, element),
        _array(size, "requests", "pages", dtype=jnp.int32),
        _array(size, "requests", dtype=jnp.int32),
        arrays,
    )

    def call(q, k, v, page_table, lengths, arrays):
        return paged_decode(
            q, k, v, page_table, lengths, element=ELEMENTS[element], native_e4m3=target.converts_e4m3, **arrays, **numbers
        )

    return Case(
        f"decode, {element}, {name}",
        "paged_decode",
        call,
        arguments,
        target,
        # A lane reads the exponents of the keys whose scores it holds: 9 loads as compiled by jax 0.10.2.
        wants=Wants(narrow_loads=16 if "k_exponent" in arrays else 0),
        against=streaming,
    )


def _options(size: dict[str, int], options: dict[str, Any]) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """Options that are arrays, and those that are numbers. The layer's first row is always one that varies."""
    given = {"first_row": ()} | options
    arrays = {k: _array(size, *v, dtype=DTYPES.get(k, jnp.float32)) for k, v in given.items() if isinstance(v, tuple)}
    return arrays, {k: v for k, v in given.items() if k not in arrays}


def _pools(size: dict[str, int], element: str) -> list[jax.ShapeDtypeStruct]:
    bits = BITS[np.dtype(ELEMENTS[element]).itemsize]
    return [_array(size, "rows", "kv_heads", "page_size", "head_dim", dtype=bits)] * 2


def _array(size: dict[str, int], *axes: str, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(size[axis] for axis in axes), dtype)
