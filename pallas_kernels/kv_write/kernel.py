"""KV cache write: new keys and values, scaled, quantized and scattered into pages in one kernel.

A program handles a few tokens of one request and a few heads, each a row of channels. Nothing is
computed outside the kernel, which would be a second launch. The latency of a program is two
dependent loads: the start of its request, then the page number. Keys and values load concurrently.
All loads come before the first store, because the compiler does not move loads across stores.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import (
    NotSupported,
    Refs,
    cdiv,
    launch,
    load,
    power_of_two,
    program,
    store,
)
from pallas_kernels.fp8 import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    encode,
    exact_exp2,
    token_head_exponent,
)
from pallas_kernels.kernel_inputs import (
    ChannelScale,
    Exponents,
    LayerScalar,
    Pool,
    Scalar,
    check_element,
    layer_inputs,
    load_scalars,
)
from pallas_kernels.kv_write.blocks import WriteBlocks, choose_blocks

NewTokens = Float[Array, "requests tokens kv_heads head_dim"]


class UpdatedPools(NamedTuple):
    """The pools with the new tokens; exponents are None if scales are static."""

    k_pages: Pool
    v_pages: Pool
    k_exponent: Exponents
    v_exponent: Exponents


@dataclasses.dataclass(frozen=True)
class _Config:
    """Compile-time parameters, in addition to the shapes of the arrays."""

    element: np.dtype
    block_tokens: int
    block_heads: int
    num_pages: int


def kv_write(
    k: NewTokens,
    v: NewTokens,
    k_pages: Pool,
    v_pages: Pool,
    page_table: Int[Array, "requests pages"],
    start: Int[Array, " requests"],
    lengths: Int[Array, " requests"],
    *,
    element: Any = None,
    layer: Scalar | None = None,
    first_row: LayerScalar = 0,
    k_inverse: ChannelScale = None,
    v_inverse: ChannelScale = None,
    k_offset: ChannelScale = None,
    k_exponent: Exponents = None,
    v_exponent: Exponents = None,
    first_exponent_row: LayerScalar | None = None,
    num_pages: int | None = None,
    blocks: WriteBlocks | None = None,
    interpret: bool = False,
) -> UpdatedPools:
    """Store new keys and values in the pools, in place if the pools are donated.

    Stores `(k - k_offset) * k_inverse` and `v * v_inverse`, rounded to nearest even and saturated.
    With dynamic scales, each token and head is divided by a power of two instead, whose exponent is
    stored too.

    Args:
      k: new keys, bfloat16, float16 or float32.
      v: new values, of the same dtype.
      k_pages: `[rows, kv_heads, page_size, head_dim]`, the pages of all layers.
      v_pages: like `k_pages`.
      page_table: page numbers of each request. No two requests may write to the same slot.
      start: position of `k[r, 0]` in request `r`.
      lengths: tokens of each request after the write. Tokens at later positions are padding and are
        dropped.
      element: the type of the stored bits; the dtype of the pages if None.
      layer: see `LayerView.layer`; applies to rows, scales and offset.
      first_row: row of `k_pages` with page 0 of the layer.
      k_inverse: reciprocals of the static K scales, `[kv_heads, head_dim]`.
      v_inverse: reciprocals of the static V scales.
      k_offset: subtracted from keys, `[kv_heads, head_dim]`.
      k_exponent: dynamic K scales, uint8 `[exponent_rows, kv_heads, page_size]`.
      v_exponent: dynamic V scales.
      first_exponent_row: like `first_row`, for the exponents; `first_row` if None.
      num_pages: pages of the layer; tokens in later pages are dropped. By default, the rows of
        the pool.
      blocks: block sizes; chosen by `choose_blocks` if None.
      interpret: run in interpret mode.

    Raises `NotSupported` for unsupported types and sizes, `ValueError` for inconsistent shapes.
    """
    element = check_element(k.shape[3], k_pages, v_pages, element, k_exponent, v_exponent)
    requests, tokens, kv_heads, head_dim = k.shape
    if blocks is None:
        blocks = choose_blocks(
            requests=requests, tokens=tokens, kv_heads=kv_heads, head_dim=head_dim, element=element
        )

    pools = {
        "k_pages": k_pages,
        "v_pages": v_pages,
        "k_exponent": k_exponent,
        "v_exponent": v_exponent,
    }
    pools = {name: pool for name, pool in pools.items() if pool is not None}
    by_layer = layer_inputs(
        layer,
        {
            "first_row": first_row,
            "first_exponent_row": first_exponent_row,
            "k_inverse": k_inverse,
            "v_inverse": v_inverse,
            "k_offset": k_offset,
        },
    )
    inputs = pools | {
        "k": k,
        "v": v,
        "page_table": page_table,
        "start": start,
        "lengths": lengths,
    }
    inputs |= by_layer
    _check_inputs(inputs)
    config = _Config(
        element, blocks.block_tokens, blocks.block_heads, num_pages or k_pages.shape[0]
    )
    updated = launch(
        functools.partial(_kernel, config=config),
        inputs,
        name="kv_write",
        grid=(cdiv(tokens, blocks.block_tokens), cdiv(kv_heads, blocks.block_heads), requests),
        out={name: jax.ShapeDtypeStruct(pool.shape, pool.dtype) for name, pool in pools.items()},
        warps=blocks.warps,
        stages=1,
        interpret=interpret,
        aliases={name: name for name in pools},
    )
    return UpdatedPools(
        updated["k_pages"],
        updated["v_pages"],
        updated.get("k_exponent"),
        updated.get("v_exponent"),
    )


def _check_inputs(inputs: dict[str, Any]) -> None:
    """Raise `NotSupported` or `ValueError` for inputs that do not match the pools or each other."""
    k, v = inputs["k"], inputs["v"]
    if k.dtype != v.dtype or k.dtype not in (BFLOAT16, FLOAT16, FLOAT32):
        raise NotSupported(
            f"keys of {k.dtype} and values of {v.dtype}: both must be bfloat16, float16 or float32."
        )
    _, kv_heads, page_size, head_dim = inputs["k_pages"].shape
    requests, tokens = k.shape[:2]
    expected = {
        "k": (requests, tokens, kv_heads, head_dim),
        "v": (requests, tokens, kv_heads, head_dim),
        "start": (requests,),
        "lengths": (requests,),
        "page_table": (requests, *inputs["page_table"].shape[1:]),
    }
    for name in ("k_inverse", "v_inverse", "k_offset"):
        if inputs[name] is not None:
            expected[name] = (inputs[name].shape[0], kv_heads, head_dim)
    for name in ("k_exponent", "v_exponent"):
        if name in inputs:
            expected[name] = (inputs[name].shape[0], kv_heads, page_size)
    for name, shape in expected.items():
        if inputs[name].shape != shape:
            raise ValueError(
                f"{name} of shape {inputs[name].shape} with pages {inputs['k_pages'].shape}: "
                f"must be {shape}."
            )
    static = inputs["k_inverse"] is not None or inputs["v_inverse"] is not None
    if "k_exponent" in inputs and static:
        raise ValueError("exponents and k_inverse or v_inverse: scales are dynamic or static.")


class _TokenHeads(NamedTuple):
    """The rows of a program, each one token and head, `[rows]`."""

    token: jax.Array
    head: jax.Array
    position: jax.Array  # in the sequence
    valid: jax.Array  # False for padding


def _kernel(refs: Refs, out_refs: Refs, *, config: _Config) -> None:
    refs = load_scalars(refs)
    token_block, head_block, request = program(0), program(1), program(2)
    _, tokens, kv_heads, _ = refs["k"].shape
    page_size = refs["k_pages"].shape[2]
    index = jnp.arange(config.block_tokens * config.block_heads, dtype=jnp.int32)
    token = token_block * config.block_tokens + index // config.block_heads
    head = head_block * config.block_heads + index % config.block_heads
    position = refs["start"][request] + token
    valid = (token < tokens) & (position < refs["lengths"][request]) & (head < kv_heads)
    rows = _TokenHeads(token, head, position, valid)

    page = load(refs["page_table"], request, position // page_size, mask=valid, other=0)
    stored = {}
    for name in "kv":
        x = _load_new(refs, rows, request, name)
        if "k_exponent" in refs:
            exponent = token_head_exponent(x, config.element)
            stored[f"{name}_exponent"] = exponent.astype(jnp.uint8)
            x = x * exact_exp2(127 - exponent)[:, None]
        elif f"{name}_inverse" in refs:
            x = x * _load_channels(refs, rows, f"{name}_inverse")
        stored[f"{name}_pages"] = encode(x, config.element)

    valid = valid & (page < config.num_pages)
    for name, bits in stored.items():
        ref = out_refs[name]
        first = refs["first_row" if name.endswith("pages") else "first_exponent_row"]
        # Padding is masked, and also past the end: the interpreter would otherwise write old values
        # over new ones.
        row = jnp.where(valid, first + page, ref.shape[0])
        slot = (row, head, position % page_size)
        if bits.ndim == 1:
            store(ref, *slot, value=bits, mask=valid)
        else:
            bits = bits if bits.dtype == ref.dtype else lax.bitcast_convert_type(bits, ref.dtype)
            channel, mask = _channel_mask(refs, valid)
            store(ref, *(x[:, None] for x in slot), channel, value=bits, mask=mask)


def _load_new(refs: Refs, rows: _TokenHeads, request: Any, name: str) -> jax.Array:
    """Return new keys or values minus their offset, in float32; zeros for padding."""
    _, tokens, kv_heads, _ = refs[name].shape
    # A single token is loaded before it is known whether it is padding.
    channel, mask = _channel_mask(refs, rows.head < kv_heads if tokens == 1 else rows.valid)
    token = rows.token[:, None]
    head = rows.head[:, None]
    x = load(refs[name], request, token, head, channel, mask=mask, other=0.0).astype(jnp.float32)
    return x - _load_channels(refs, rows, f"{name}_offset") if f"{name}_offset" in refs else x


def _load_channels(refs: Refs, rows: _TokenHeads, name: str) -> jax.Array:
    """Return a scale or offset by head and channel, for each row."""
    channel, mask = _channel_mask(refs, rows.head < refs["k"].shape[2])
    return load(refs[name], refs["layer"], rows.head[:, None], channel, mask=mask, other=0.0)


def _channel_mask(refs: Refs, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the channel index and the mask of `[rows, channels]`.

    The index is not clamped: the compiler would no longer see that it is contiguous.
    """
    head_dim = refs["k"].shape[3]
    channel = jnp.arange(power_of_two(head_dim), dtype=jnp.int32)[None, :]
    return channel, valid[:, None] & (channel < head_dim)
