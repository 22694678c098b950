"""New keys and values: less the offset, scaled, rounded to stored bits, and scattered into the pages, in one kernel.

A program has a few tokens of one request and a few heads, each a row of channels. Nothing is computed outside the kernel, for
that would be another launch. What a program waits for is one chain of two loads, where its request starts and then the page's
number; keys and values come meanwhile. All loads stand before the first store: the compiler moves none across one.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import cdiv, launch, load, power_of_two, program, store
from pallas_kernels.elements import BFLOAT16, FLOAT16, FLOAT32, encode, power, token_head_exponent
from pallas_kernels.errors import NotSupported
from pallas_kernels.kv_write.blocks import WriteBlocks, blocks_for
from pallas_kernels.options import (
    ByLayer,
    ChannelScale,
    Exponents,
    Pool,
    Scalar,
    checked_element,
    of_layer,
    opened,
)

Refs = dict[str, Any]
New = Float[Array, "requests tokens kv_heads head_dim"]


class Written(NamedTuple):
    """The pools with the new tokens in them; exponents where there are any."""

    k_pages: Pool
    v_pages: Pool
    k_exponent: Exponents
    v_exponent: Exponents


@dataclasses.dataclass(frozen=True)
class _How:
    """What a kernel is compiled for, apart from the shapes of its arrays."""

    element: np.dtype
    block_tokens: int
    block_heads: int
    num_pages: int


def kv_write(
    k: New,
    v: New,
    k_pages: Pool,
    v_pages: Pool,
    page_table: Int[Array, "requests pages"],
    start: Int[Array, " requests"],
    lengths: Int[Array, " requests"],
    *,
    element: Any = None,
    layer: Scalar | None = None,
    first_row: ByLayer = 0,
    k_inverse: ChannelScale = None,
    v_inverse: ChannelScale = None,
    k_offset: ChannelScale = None,
    k_exponent: Exponents = None,
    v_exponent: Exponents = None,
    first_exponent_row: ByLayer | None = None,
    num_pages: int | None = None,
    blocks: WriteBlocks | None = None,
    interpret: bool = False,
) -> Written:
    """The pools, in place where they are donated, with token `j` of request `r` at position `start[r] + j` where that is less
    than `lengths[r]`; other tokens are padding, dropped, and so are those of page numbers past the end (`num_pages`, the rows
    of the pool unless said). No two requests write the same slot.

    Stored are the bits of `(k - k_offset) * k_inverse` and `v * v_inverse`, rounded to nearest even and saturated; with
    exponents, each token and head is divided by a power of two of its own instead, whose exponent is stored too.
    """
    element = checked_element(k.shape[3], k_pages, v_pages, element, k_exponent, v_exponent)
    requests, tokens, kv_heads, head_dim = k.shape
    if blocks is None:
        blocks = blocks_for(
            requests=requests, tokens=tokens, kv_heads=kv_heads, head_dim=head_dim, element=element
        )

    pools = {
        "k_pages": k_pages,
        "v_pages": v_pages,
        "k_exponent": k_exponent,
        "v_exponent": v_exponent,
    }
    pools = {name: pool for name, pool in pools.items() if pool is not None}
    refs = pools | {
        "k": k,
        "v": v,
        "page_table": page_table,
        "start": start,
        "lengths": lengths,
    }
    refs |= of_layer(
        layer, first_row=first_row, first_exponent_row=first_exponent_row, k_inverse=k_inverse, v_inverse=v_inverse,
        k_offset=k_offset,
    )  # fmt: skip
    _check(refs)
    done = launch(
        functools.partial(
            _kernel,
            how=_How(
                element, blocks.block_tokens, blocks.block_heads, num_pages or k_pages.shape[0]
            ),
        ),
        refs,
        name="kv_write",
        grid=(cdiv(tokens, blocks.block_tokens), cdiv(kv_heads, blocks.block_heads), requests),
        out={name: jax.ShapeDtypeStruct(pool.shape, pool.dtype) for name, pool in pools.items()},
        warps=blocks.warps,
        stages=1,
        interpret=interpret,
        aliases={name: name for name in pools},
    )
    return Written(done["k_pages"], done["v_pages"], done.get("k_exponent"), done.get("v_exponent"))


def _check(refs: Refs) -> None:
    """Raise `NotSupported` or `ValueError` for operands that do not go with the pools or with one another."""
    k, v, (_, kv_heads, page_size, head_dim) = refs["k"], refs["v"], refs["k_pages"].shape
    if k.dtype != v.dtype or k.dtype not in (BFLOAT16, FLOAT16, FLOAT32):
        raise NotSupported(
            f"keys of {k.dtype} and values of {v.dtype}: both must be bfloat16, float16 or float32."
        )
    requests, tokens = k.shape[:2]
    new, channels = (requests, tokens, kv_heads, head_dim), (kv_heads, head_dim)
    shapes = {"k": new, "v": new, "start": (requests,), "lengths": (requests,)}
    shapes |= {"page_table": (requests, *refs["page_table"].shape[1:])}
    for name in ("k_inverse", "v_inverse", "k_offset"):
        shapes |= {} if refs[name] is None else {name: (refs[name].shape[0], *channels)}
    shapes |= {
        name: (*refs[name].shape[:1], kv_heads, page_size)
        for name in ("k_exponent", "v_exponent")
        if name in refs
    }
    for name, shape in shapes.items():
        if refs[name] is not None and refs[name].shape != shape:
            raise ValueError(
                f"{name} of shape {refs[name].shape} with pages {refs['k_pages'].shape}: must be {shape}."
            )
    if "k_exponent" in refs and (refs["k_inverse"] is not None or refs["v_inverse"] is not None):
        raise ValueError("exponents and k_inverse or v_inverse: scales are dynamic or static.")


class _Rows(NamedTuple):
    """The rows of a program: which token and head each is, where it stands in the text, and whether it is one to be written."""

    token: jax.Array  # [rows]
    head: jax.Array  # [rows]
    position: jax.Array  # [rows]
    known: jax.Array  # [rows]


def _kernel(refs: Refs, out_refs: Refs, *, how: _How) -> None:
    refs = opened(refs)
    _, tokens, kv_heads, _ = refs["k"].shape
    page_size = refs["k_pages"].shape[2]
    token_block, head_block, request = program(0), program(1), program(2)
    index = jnp.arange(how.block_tokens * how.block_heads, dtype=jnp.int32)
    token = token_block * how.block_tokens + index // how.block_heads
    head = head_block * how.block_heads + index % how.block_heads
    position = refs["start"][request] + token
    known = (token < tokens) & (position < refs["lengths"][request]) & (head < kv_heads)
    rows = _Rows(token, head, position, known)

    number = load(refs["page_table"], request, position // page_size, mask=known, other=0)
    first = {"pages": refs["first_row"], "exponent": refs["first_exponent_row"]}
    stored = {}
    for name in "kv":
        x = _new(refs, rows, request, name)
        if "k_exponent" in refs:
            exponent = token_head_exponent(x, how.element)
            stored[f"{name}_exponent"] = exponent.astype(jnp.uint8)
            x = x * power(127 - exponent)[:, None]
        elif f"{name}_inverse" in refs:
            x = x * _channels(refs, rows, f"{name}_inverse")
        stored[f"{name}_pages"] = encode(x, how.element)

    known = known & (number < how.num_pages)
    for name, bits in stored.items():
        ref = out_refs[name]
        # Padding is masked, and past the end besides: the interpreter would else write old values over new ones.
        row = jnp.where(known, first[name[2:]] + number, ref.shape[0])
        slot = (row, head, position % page_size)
        if bits.ndim == 1:
            store(ref, *slot, value=bits, mask=known)
        else:
            bits = bits if bits.dtype == ref.dtype else lax.bitcast_convert_type(bits, ref.dtype)
            channel, mask = _across(refs, known)
            store(ref, *(x[:, None] for x in slot), channel, value=bits, mask=mask)


def _new(refs: Refs, rows: _Rows, request: Any, name: str) -> jax.Array:
    """Keys or values as they are given, less their offset, in float32; zeros where there are none."""
    _, tokens, kv_heads, _ = refs[name].shape
    # A single token is loaded before it is known whether it is padding.
    channel, mask = _across(refs, rows.head < kv_heads if tokens == 1 else rows.known)
    x = load(
        refs[name], request, rows.token[:, None], rows.head[:, None], channel, mask=mask, other=0.0
    ).astype(jnp.float32)
    return x - _channels(refs, rows, f"{name}_offset") if f"{name}_offset" in refs else x


def _channels(refs: Refs, rows: _Rows, name: str) -> jax.Array:
    """What rows have by head and channel."""
    channel, mask = _across(refs, rows.head < refs["k"].shape[2])
    return load(refs[name], refs["layer"], rows.head[:, None], channel, mask=mask, other=0.0)


def _across(refs: Refs, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index of channels, and which elements of `[rows, channels]` exist. The index is never clamped: that would hide that
    channels lie side by side."""
    head_dim = refs["k"].shape[3]
    channel = jnp.arange(power_of_two(head_dim), dtype=jnp.int32)[None, :]
    return channel, rows[:, None] & (channel < head_dim)
