"""The kernel calls that are compiled: every kernel, element type and option, for every GPU.

To add a kernel, write a function that returns its `Case`, and call it in `cases`.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from benchmarks._gpu.bound import matmul_bound, streaming_bound
from benchmarks._gpu.compiled import Case
from benchmarks._gpu.guards import Expectations
from benchmarks._gpu.matmul_cases import matmul_cases
from benchmarks._gpu.topology import Target
from pallas_kernels import LayerView, kv_write, paged_decode, paged_prefill

CONFIG = Path(__file__).parents[2] / "configs" / "bench" / "gpu.yaml"
SHAPES = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))

ELEMENTS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "bf16": jnp.bfloat16}
FP8 = ("e4m3", "e5m2")
BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.float32}

# Options of attention: arrays by their axes, numbers by value. FP8 also has dynamic scales.
ATTENTION_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channel scales": {"k_scale": ("kv_heads", "head_dim"), "v_scale": ("kv_heads", "head_dim")},
    "window": {"window": ()},
    "soft cap": {"softcap": 50.0},
    "sinks": {"sinks": ("q_heads",)},
    "score offset": {"score_offset": ("queries", "q_heads")},
}
WRITE_OPTIONS: dict[str, dict[str, Any]] = {
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
# Changes to configs/bench/gpu.yaml that compile to different kernels.
SIZES: dict[str, dict[str, int]] = {
    "head_dim 64": {"head_dim": 64},
    "head_dim 96": {"head_dim": 96},
    "head_dim 256": {"head_dim": 256, "kv_heads": 4, "q_heads": 16},
    "pages of 16": {"page_size": 16, "rows": 8192, "pages": 512},
    "groups of 7": {"q_heads": 28, "kv_heads": 4, "rows": 4096},
    "one KV head": {"kv_heads": 1, "rows": 8192},
    "a KV head per query head": {"kv_heads": 32, "rows": 512},
}

CaseFactory = Callable[..., Case]


def cases() -> list[Case]:
    """Return all cases, ordered by GPU, kernel and element type."""
    targets = (Target.h100(), Target.a100())
    decode_sizes = SIZES | {"one request": {"requests": 1, "queries": 1}}
    found = []
    for target in targets:
        for element in ELEMENTS:
            found += attention_cases(decode, target, element, sizes=decode_sizes)
            found += attention_cases(prefill, target, element, sizes=SIZES)
            found += write_cases(target, element)
    for target in targets:
        found += matmul_cases(target, SHAPES["matmul"])
    return found


def attention_cases(
    factory: CaseFactory, target: Target, element: str, *, sizes: dict[str, dict[str, int]]
) -> list[Case]:
    """Return an attention kernel with each option and each size.

    Sizes are left out for E5M2, whose kernels differ from those of E4M3 only in the conversion.
    """
    options = ATTENTION_OPTIONS
    if element in FP8:
        options = options | {"token and head scales": EXPONENTS}
    by_option = [factory(target, element, name, options=o) for name, o in options.items()]
    if element == "e5m2":
        return by_option
    by_size = [factory(target, element, name, sizes=changed) for name, changed in sizes.items()]
    return [*by_option, *by_size, factory(target, element, "float32 queries", query=jnp.float32)]


def write_cases(target: Target, element: str) -> list[Case]:
    """Return the cache write of a decode and of a prefill, with each kind of scales."""
    options = WRITE_OPTIONS
    if element in FP8:
        options = options | {"token and head scales": EXPONENTS}
    sizes = {"decode": SHAPES["write-decode"], "prefill": SHAPES["write-prefill"]}
    return [
        write(target, element, f"{step}, {name}", size, chosen)
        for step, size in sizes.items()
        for name, chosen in options.items()
    ]


def decode(
    target: Target,
    element: str,
    name: str,
    *,
    query: Any = jnp.bfloat16,
    options: dict[str, Any] | None = None,
    sizes: dict[str, int] | None = None,
) -> Case:
    """Return a case of `paged_decode` with these options and changed sizes."""
    size, pools, arrays, constants = _attention("decode", element, query, options, sizes)
    call = functools.partial(_attend, paged_decode, **constants, capability=target.capability)
    return Case(
        f"decode, {element}, {name}",
        "paged_decode",
        call,
        pools,
        arrays,
        target,
        expectations=_expectations(query, arrays),
        bound=functools.partial(streaming_bound, used=_used_channels(size)),
    )


def prefill(
    target: Target,
    element: str,
    name: str,
    *,
    query: Any = jnp.bfloat16,
    options: dict[str, Any] | None = None,
    sizes: dict[str, int] | None = None,
) -> Case:
    """Return a case of `paged_prefill` with these options and changed sizes."""
    size, pools, arrays, constants = _attention("prefill", element, query, options, sizes)
    arrays |= {"first_query": _array(size, "requests"), "queries": _array(size, "requests")}
    call = functools.partial(_attend, paged_prefill, **constants, capability=target.capability)
    # Blocks that spill a few registers were the fastest on an H200 (docs/log.md).
    expectations = _expectations(query, arrays, spilled_bytes=256, spill_moves=12)
    return Case(
        f"prefill, {element}, {name}",
        "paged_prefill",
        call,
        pools,
        arrays,
        target,
        expectations=expectations,
        bound=functools.partial(matmul_bound, used=_used_channels(size)),
    )


def write(
    target: Target, element: str, name: str, size: dict[str, int], options: dict[str, Any]
) -> Case:
    """Return a case of `kv_write` of bfloat16 keys and values into donated pools."""
    arrays = _arrays(size, {"first_row": ()} | options)
    exponents = {name: arrays.pop(name) for name in EXPONENTS if name in arrays}
    new = _array(size, "requests", "tokens", "kv_heads", "head_dim", dtype=jnp.bfloat16)
    arrays |= {"k": new, "v": new, "page_table": _array(size, "requests", "pages")}
    arrays |= {"start": _array(size, "requests"), "lengths": _array(size, "requests")}
    # An exponent goes through shared memory and is stored: a byte each, for K and V. Conversions to
    # bfloat16 use the slow pipe, which is fast enough: four bytes are moved for each.
    expectations = Expectations(
        attention=False,
        narrow=4 if exponents else 0,
        slow_conversions=16 if element == "bf16" else 0,
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
        expectations=expectations,
    )


def _attend(kernel: Callable[..., jax.Array], **arguments: Any) -> jax.Array:
    """Call an attention kernel with the fields of its `LayerView` as keyword arguments."""
    fields = {name: arguments.pop(name) for name in LayerView._fields if name in arguments}
    return kernel(kv=LayerView(**fields), **arguments)


def _attention(
    kernel: str,
    element: str,
    query: Any,
    options: dict[str, Any] | None,
    sizes: dict[str, int] | None,
) -> tuple[dict[str, int], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return sizes, pools, other arrays and constants. `first_row` is always an array."""
    size = SHAPES[kernel] | (sizes or {})
    given = {"first_row": ()} | (options or {})
    arrays = _arrays(size, given)
    constants = {name: value for name, value in given.items() if name not in arrays}
    constants["element"] = ELEMENTS[element]
    arrays |= {"q": _array(size, "queries", "q_heads", "head_dim", dtype=query)}
    arrays |= {"page_table": _array(size, "requests", "pages"), "lengths": _array(size, "requests")}
    return size, _pools(size, element), arrays, constants


def _expectations(
    query: Any, arrays: dict[str, Any], *, spilled_bytes: int = 64, spill_moves: int = 0
) -> Expectations:
    """Return what an attention kernel may contain.

    A lane loads the exponents of the keys of its scores: 9 loads in decode with jax 0.10.2.
    Operands of float32 queries fill the registers, and up to 184 bytes more are spilled outside the
    loops.
    """
    if query == jnp.float32:
        spilled_bytes, spill_moves = 256, 0
    narrow = 16 if "k_exponent" in arrays else 0
    return Expectations(narrow=narrow, spilled_bytes=spilled_bytes, spill_moves=spill_moves)


def _used_channels(size: dict[str, int]) -> float:
    """Return the fraction of a tile's channels that exist: tiles have a power of two."""
    return size["head_dim"] / (1 << (size["head_dim"] - 1).bit_length())


def _pools(size: dict[str, int], element: str) -> dict[str, Any]:
    bits = BITS[np.dtype(ELEMENTS[element]).itemsize]
    pool = _array(size, "rows", "kv_heads", "page_size", "head_dim", dtype=bits)
    return {"k_pages": pool, "v_pages": pool}


def _arrays(size: dict[str, int], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are arrays, float32 unless `DTYPES` has another dtype."""
    axes = {name: value for name, value in options.items() if isinstance(value, tuple)}
    return {
        name: _array(size, *of, dtype=DTYPES.get(name, jnp.float32)) for name, of in axes.items()
    }


def _array(size: dict[str, int], *axes: str, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(size[axis] for axis in axes), dtype)
