"""Loads from the paged KV cache inside a kernel: blocks of keys, values and dynamic scales."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import Refs, decode_pairs, load
from pallas_kernels.fp8 import decode
from pallas_kernels.kernel_inputs import KernelConfig

PARTS = 2  # FP8 values are loaded as pairs of channels; even and odd channels are multiplied apart


class KeyRange(NamedTuple):
    """The keys of a program: `first .. end - 1`, in blocks that start at `start <= first`.

    Every row attends to all keys of the first `unmasked` blocks; None if that is unknown.
    """

    first: jax.Array
    start: jax.Array
    end: jax.Array
    unmasked: jax.Array | None = None


class KeyBlock(NamedTuple):
    """A block of keys.

    Attributes:
      kv_head: KV head.
      token: positions in the sequence, `[block_k]`.
      valid: which tokens are in the key range, `[block_k]`; None if all are.
      row: rows of the pools, `[]` or `[block_k]`.
      start: the first position.
    """

    kv_head: Any
    token: jax.Array
    valid: jax.Array | None
    row: jax.Array
    start: Any = None


class ScaleExponents(NamedTuple):
    """Exponents of a block's dynamic scales, int32 `[block_k]`; 0 for invalid tokens.

    None if scales are static. They are loaded one block ahead: unlike keys and values they are too
    narrow for asynchronous copies to shared memory, and the block would wait for them.
    """

    k: jax.Array | None
    v: jax.Array | None


def key_block(
    refs: Refs,
    config: KernelConfig,
    keys: KeyRange,
    start: jax.Array,
    request: Any,
    kv_head: Any,
    masked: bool,
    row: Any = None,
) -> KeyBlock:
    """Return the block at `start`. `row` is its pool row, or None to look it up."""
    token = start + jnp.arange(config.block_k, dtype=jnp.int32)
    valid = None
    if masked:
        valid = token < keys.end
        if "window" in refs or config.causal:
            valid &= token >= keys.first
    if row is None:
        # One page number per block, or one per token. Invalid tokens use that of a valid one.
        page_token = token
        if config.one_page:
            page_token = start
        elif masked:
            page_token = jnp.clip(token, keys.first, keys.end - 1)
        if config.causal:
            index = page_token // config.page_size
        else:
            index = lax.div(page_token, config.page_size)
        page = load(refs["page_table"], request, index)
        row = _clamp_row(refs["k"], refs["first_row"] + page)
    return KeyBlock(kv_head, token, valid, row, start)


def pool_row(
    refs: Refs, config: KernelConfig, keys: KeyRange, request: Any, start: jax.Array
) -> jax.Array:
    """Return the pool row of the one-page block at `start`, which may be past the last key."""
    token = jnp.minimum(start, jnp.maximum(keys.end - 1, 0))
    page = load(refs["page_table"], request, lax.div(token, config.page_size))
    return _clamp_row(refs["k"], refs["first_row"] + page)


def load_tile(ref: Any, config: KernelConfig, block: KeyBlock) -> jax.Array:
    """Return decoded keys or values, `[block_k, channels]`; zeros for invalid tokens."""
    channel, mask = channel_mask(config, block.valid, config.block_k)
    row = block.row if config.one_page else block.row[:, None]
    slot = _slot(config, block)[:, None]
    bits = load(ref, row, block.kv_head, slot, channel, mask=mask, other=0, once=True)
    return decode(bits, config.element, native_e4m3=config.native_e4m3)


def load_transposed_tile(ref: Any, config: KernelConfig, block: KeyBlock) -> jax.Array:
    """Return decoded values that are not FP8, `[channels, block_k]`."""
    bits = _transposed_bits(ref, config, block, 1)
    return decode(bits, config.element, native_e4m3=config.native_e4m3)


def load_pair_tiles(ref: Any, config: KernelConfig, block: KeyBlock) -> tuple[jax.Array, jax.Array]:
    """Return decoded even and odd channels of FP8 values, each `[channels / 2, block_k]`.

    A byte pool is read as 16-bit integers: the hardware transposes only those when it loads them
    from shared memory.
    """
    return decode_pairs(
        _transposed_bits(ref, config, block, PARTS),
        config.element,
        native_e4m3=config.native_e4m3,
        interpret=config.interpret,
    )


def load_scale_exponents(
    refs: Refs, config: KernelConfig, keys: KeyRange, request: Any, kv_head: Any, start: jax.Array
) -> ScaleExponents:
    """Return the exponents of the block at `start`, which may be past the last key."""
    if "k_exponent" not in refs:
        return ScaleExponents(None, None)
    token = start + jnp.arange(config.block_k, dtype=jnp.int32)
    valid = (token >= keys.first) & (token < keys.end)
    last = jnp.maximum(keys.end - 1, 0)
    one_page = config.one_page
    page_token = jnp.minimum(start, last) if one_page else jnp.clip(token, keys.first, last)
    page = load(refs["page_table"], request, page_token // config.page_size)
    row = _clamp_row(refs["k_exponent"], refs["first_exponent_row"] + page)
    slot = token % config.page_size
    k, v = (
        load(refs[name], row, kv_head, slot, mask=valid, other=0).astype(jnp.int32)
        for name in ("k_exponent", "v_exponent")
    )
    return ScaleExponents(k, v)


def load_channel_scale(
    refs: Refs, name: str, config: KernelConfig, kv_head: Any, channel: jax.Array | None = None
) -> jax.Array:
    """Return a static scale of these channels, by default of all."""
    if channel is None:
        channel = jnp.arange(config.channels, dtype=jnp.int32)
    mask = None if config.channels == config.head_dim else channel < config.head_dim
    return load(refs[name], refs["layer"], kv_head, channel, mask=mask, other=0.0)


def first_visible(refs: Refs, position: jax.Array) -> jax.Array:
    """Return the first key in the window of queries at these positions."""
    if "window" not in refs:
        return jnp.zeros_like(position)
    window = refs["window"]
    return jnp.where(window == 0, 0, jnp.maximum(position - window + 1, 0))


def channel_mask(
    config: KernelConfig, valid: jax.Array | None, rows: int
) -> tuple[jax.Array, jax.Array | None]:
    """Return the channel index, `[1, channels]`, and the mask of `[rows, channels]`.

    The mask is False for invalid rows and padded channels; None if all elements exist. The index is
    not clamped: the compiler would no longer see that it is contiguous, and would load bytes.
    """
    channel = jnp.arange(config.channels, dtype=jnp.int32)[None, :]
    shape = (rows, config.channels)
    mask = None if valid is None else jnp.broadcast_to(valid[:, None], shape)
    if config.channels != config.head_dim:
        mask = combine_masks(mask, jnp.broadcast_to(channel < config.head_dim, shape))
    return channel, mask


def combine_masks(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """Return the conjunction of two masks; None masks nothing."""
    if a is None:
        return b
    return a if b is None else a & b


def _transposed_bits(ref: Any, config: KernelConfig, block: KeyBlock, parts: int) -> jax.Array:
    """Return stored bits, `[channels / parts, block_k]`.

    Loaded in this order, they are laid out in shared memory without bank conflicts.
    """
    channel = jnp.arange(config.channels // parts, dtype=jnp.int32)[:, None]
    shape = (config.channels // parts, config.block_k)
    mask = None if block.valid is None else jnp.broadcast_to(block.valid[None, :], shape)
    if config.channels != config.head_dim:
        exists = jnp.broadcast_to(channel < config.head_dim // parts, shape)
        mask = combine_masks(mask, exists)
    row = block.row if config.one_page else block.row[None, :]
    slot = _slot(config, block)[None, :]
    return load(ref, row, block.kv_head, slot, channel, mask=mask, other=0, once=True)


def _slot(config: KernelConfig, block: KeyBlock) -> jax.Array:
    """Return the slots of the tokens in their pages, `[block_k]`.

    In a single page they are contiguous, which the compiler would not find out by itself.
    """
    if config.one_page and not config.causal:
        first = lax.rem(block.start, config.page_size)
        return first + jnp.arange(config.block_k, dtype=jnp.int32)
    return block.token % config.page_size


def _clamp_row(ref: Any, row: jax.Array) -> jax.Array:
    """Return a row that exists, also for page numbers past the end."""
    return jnp.minimum(row, ref.shape[0] - 1)
