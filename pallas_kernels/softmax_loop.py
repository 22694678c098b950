"""The loop of both attention kernels: a block of queries over blocks of keys, with online softmax.

The rows of a query block are the heads of one token in decode, and of several tokens in prefill.
Keys are read `block_k` at a time and decoded on their way into the matmul. Where scales apply:

- Static K scales and the softmax scale multiply the query. For float16 matmuls each query row is
  first divided by a power of two that brings its largest channel into 1 .. 2, so no scale can
  overflow it. The scores are multiplied by that power.
- Static V scales multiply the output.
- Dynamic scales are powers of two. Those of K multiply the scores. Those of V multiply the weights,
  relative to the largest scale so far. A larger one rescales the running sums, in the same
  multiplication as a new running maximum. So no scale can overflow the weights either. With many
  rows (`scale_tiles`), scores and weights are as large as the K and V tiles and cost more to index
  by key: there, dynamic scales multiply the tiles, relative to the largest of the tile (K) or so
  far (V).

Scores are in units of log 2, because the hardware has `exp2`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import Refs, cdiv, dot, exp2, load
from pallas_kernels.fp8 import exact_exp2, is_fp8
from pallas_kernels.kernel_inputs import KernelConfig
from pallas_kernels.kv_tiles import (
    PARTS,
    KeyBlock,
    KeyRange,
    channel_mask,
    first_visible,
    key_block,
    load_channel_scale,
    load_pair_tiles,
    load_scale_exponents,
    load_tile,
    load_transposed_tile,
    pool_row,
)
from pallas_kernels.reference import LOWEST, MASKED

LOG2E = 1.4426950408889634


class QueryBlock(NamedTuple):
    """The query rows of a program, each `[rows]`."""

    query: jax.Array  # index in `q`
    head: jax.Array
    position: jax.Array  # in the sequence
    valid: jax.Array  # False for padding


class SoftmaxState(NamedTuple):
    """Running state of the online softmax.

    Attributes:
      out: weighted sums of values, `[rows, channels]`; `[channels, rows]` if transposed, and then
        in two parts for FP8, of even and of odd channels.
      row_max: running maximum of the scores, `[rows]`.
      row_sum: running sum of the weights, `[rows]`.
      v_exponent: largest exponent of a dynamic V scale so far; 0 if scales are static.
    """

    out: tuple[jax.Array, ...]
    row_max: jax.Array
    row_sum: jax.Array
    v_exponent: jax.Array


class ScaledQuery(NamedTuple):
    """Query operands, the factor on the scores of each row, and the offset added to them."""

    rows: jax.Array  # [rows, channels]
    factor: jax.Array  # [rows]
    offset: jax.Array | None  # [rows]


def broadcast_rows(config: KernelConfig, x: jax.Array) -> jax.Array:
    """Return a vector of rows in the layout of scores and outputs."""
    return x[None, :] if config.transposed else x[:, None]


def broadcast_keys(config: KernelConfig, x: jax.Array) -> jax.Array:
    """Return a vector of keys in the layout of scores."""
    return x[:, None] if config.transposed else x[None, :]


def attend(
    refs: Refs,
    config: KernelConfig,
    queries: QueryBlock,
    keys: KeyRange,
    *,
    request: Any,
    kv_head: Any,
    with_sink: Any = True,
) -> SoftmaxState:
    """Return the softmax state of the query block after all keys.

    `out` is not yet divided by `row_sum` and has no static V scales: see `normalize`.
    `with_sink`: whether the sinks join this program's sums.
    """
    query = _scaled_query(refs, config, queries, kv_head)
    # 1 whenever the loop runs, which the compiler cannot know. A multiplied FP8 tile of V must
    # exist as float16 before it goes through shared memory. Otherwise bytes go through shared
    # memory and are unpacked behind it, at 1.6 times the cost of everything else.
    one = jnp.where(keys.end > keys.start, 1.0, 0.5).astype(jnp.float16)

    # The pool row of the next block is loaded one block ahead. If a block loaded its own, its keys
    # could not be requested earlier: the pipeline would have one block in flight instead of two.
    prefetch_row = config.one_page and not config.causal
    pairs = "v_pairs" in refs
    exp2_of = jnp.exp2 if config.causal else functools.partial(exp2, interpret=config.interpret)

    def body(i: Any, carry: Any, *, masked: bool = True) -> Any:
        state, scale_exponents, row = carry
        start = keys.start + i * config.block_k
        block = key_block(refs, config, keys, start, request, kv_head, masked, row)
        next_exponents = exponents(start + config.block_k)
        next_row = None
        if prefetch_row:
            next_row = pool_row(refs, config, keys, request, start + config.block_k)
        scores = _scores(refs, config, query, block, scale_exponents.k)
        if masked:
            scores = jnp.where(_visible(refs, config, queries, block), scores, MASKED)
        key_axis = 0 if config.transposed else 1
        row_max = jnp.maximum(state.row_max, jnp.max(scores, axis=key_axis))
        rescale = exp2_of(state.row_max - row_max)
        weights = exp2_of(scores - broadcast_rows(config, row_max - config.weight_shift))
        row_sum = state.row_sum * rescale + jnp.sum(weights, axis=key_axis)

        v_exponent = state.v_exponent
        v_factor = one
        if scale_exponents.v is not None:
            v_exponent = jnp.maximum(v_exponent, jnp.max(scale_exponents.v))
            rescale = rescale * exact_exp2(state.v_exponent - v_exponent)
            relative = scale_exponents.v - v_exponent
            if config.scale_tiles:
                v_factor = exact_exp2(relative).astype(jnp.float16)[:, None]
            else:
                weights = weights * broadcast_keys(config, exact_exp2(relative))
        weights = weights.astype(config.compute)
        if config.transposed:
            tiles = (
                load_pair_tiles(refs["v_pairs"], config, block)
                if pairs
                else (load_transposed_tile(refs["v"], config, block),)
            )
            sums = [
                dot(v.astype(config.compute), weights, interpret=config.interpret) for v in tiles
            ]
        else:
            v = load_tile(refs["v"], config, block)
            v = (v * v_factor if is_fp8(config.element) else v).astype(config.compute)
            sums = [dot(weights, v, interpret=config.interpret)]
        out = tuple(
            previous * broadcast_rows(config, rescale) + new
            for previous, new in zip(state.out, sums, strict=True)
        )
        return SoftmaxState(out, row_max, row_sum, v_exponent), next_exponents, next_row

    exponents = functools.partial(load_scale_exponents, refs, config, keys, request, kv_head)
    blocks = jnp.maximum(cdiv(keys.end - keys.start, config.block_k), 0)
    row = pool_row(refs, config, keys, request, keys.start) if prefetch_row else None
    carry = (_initial_state(refs, config, queries, with_sink), exponents(keys.start), row)
    unmasked = jnp.int32(0)
    if keys.unmasked is not None:
        unmasked = jnp.minimum(keys.unmasked, blocks)
        carry = lax.fori_loop(0, unmasked, functools.partial(body, masked=False), carry)
    return lax.fori_loop(unmasked, blocks, body, carry)[0]


def normalize(
    refs: Refs, config: KernelConfig, state: SoftmaxState, kv_head: Any
) -> tuple[jax.Array, ...]:
    """Return `out` divided by `row_sum`, with V scales; rows that attend to no key give zeros."""
    parts = []
    for index, out in enumerate(state.out):
        out = out / broadcast_rows(config, jnp.where(state.row_sum == 0, 1.0, state.row_sum))
        if "v_exponent" in refs:
            out = out * exact_exp2(state.v_exponent - 127)
        if "v_scale" in refs:
            channel = part_channels(config, state.out, index)
            scale = load_channel_scale(refs, "v_scale", config, kv_head, channel)
            out = out * (scale[:, None] if config.transposed else scale[None, :])
        parts.append(out)
    return tuple(parts)


def part_channels(config: KernelConfig, parts: tuple[jax.Array, ...], index: int) -> jax.Array:
    """Return the channels of one part of `SoftmaxState.out`."""
    return len(parts) * jnp.arange(config.channels // len(parts), dtype=jnp.int32) + index


def _scaled_query(
    refs: Refs, config: KernelConfig, queries: QueryBlock, kv_head: Any
) -> ScaledQuery:
    channel, mask = channel_mask(config, queries.valid, config.rows)
    index = queries.query[:, None]
    head = queries.head[:, None]
    q = load(refs["q"], index, head, channel, mask=mask, other=0.0).astype(jnp.float32)
    if "k_scale" in refs:
        q = q * load_channel_scale(refs, "k_scale", config, kv_head)[None, :]
    unit = LOG2E if config.softcap is None else 1 / config.softcap
    factor = jnp.full((config.rows,), config.sm_scale * unit, jnp.float32)
    if config.compute == jnp.float16:
        bits = lax.bitcast_convert_type(jnp.max(jnp.abs(q), axis=1), jnp.int32)
        exponent = jnp.clip(bits >> 23, 1, 253) - 127
        q = q * exact_exp2(-exponent)[:, None]
        factor = factor * exact_exp2(exponent)
    offset = None
    if "score_offset" in refs:
        offset = load(
            refs["score_offset"], queries.query, queries.head, mask=queries.valid, other=0.0
        )
        offset = offset * unit
    return ScaledQuery(q.astype(config.compute), factor, offset)


def _scores(
    refs: Refs,
    config: KernelConfig,
    query: ScaledQuery,
    block: KeyBlock,
    exponents: jax.Array | None,
) -> jax.Array:
    """Return the unmasked scores of a block in units of log 2."""
    k = load_tile(refs["k"], config, block)
    factor = query.factor
    scale = None
    if exponents is not None:
        if config.scale_tiles:
            largest = jnp.max(exponents)
            k = k * exact_exp2(exponents - largest).astype(jnp.float16)[:, None]
            factor = factor * exact_exp2(largest - 127)
        else:
            scale = exact_exp2(exponents - 127)
    k = k.astype(config.compute)
    operands = (k, query.rows.T) if config.transposed else (query.rows, k.T)
    scores = dot(*operands, interpret=config.interpret) * broadcast_rows(config, factor)
    if scale is not None:
        scores = scores * broadcast_keys(config, scale)
    if query.offset is not None:
        scores = scores + broadcast_rows(config, query.offset)
    return scores if config.softcap is None else (config.softcap * LOG2E) * _tanh(scores)


def _initial_state(
    refs: Refs, config: KernelConfig, queries: QueryBlock, with_sink: Any
) -> SoftmaxState:
    """Return the state before any key: empty, or the sink alone with a weight of 1."""
    parts = PARTS if "v_pairs" in refs else 1
    size = config.channels // parts
    shape = (size, config.rows) if config.transposed else (config.rows, size)
    out = (jnp.zeros(shape, jnp.float32),) * parts
    row_max = jnp.full((config.rows,), LOWEST, jnp.float32)
    row_sum = jnp.zeros((config.rows,), jnp.float32)
    if "sinks" in refs:
        sink = load(refs["sinks"], refs["layer"], queries.head, mask=queries.valid, other=0.0)
        row_max = jnp.where(with_sink, sink * LOG2E, row_max)
        row_sum = jnp.where(with_sink, 2.0**config.weight_shift, row_sum)
    return SoftmaxState(out, row_max, row_sum, jnp.int32(0))


def _visible(refs: Refs, config: KernelConfig, queries: QueryBlock, block: KeyBlock) -> jax.Array:
    """Return the attention mask of a block, in the layout of its scores."""
    rows, keys = config.rows, config.block_k
    shape = (keys, rows) if config.transposed else (rows, keys)
    assert block.valid is not None, "masked blocks know their valid tokens"
    visible = jnp.broadcast_to(broadcast_keys(config, block.valid), shape)
    if config.causal:
        visible &= block.token[None, :] <= queries.position[:, None]
        if "window" in refs:
            visible &= block.token[None, :] >= first_visible(refs, queries.position)[:, None]
    return visible


def _tanh(x: jax.Array) -> jax.Array:
    """Return tanh within 2**-22: two fast instructions, without the branches of `jnp.tanh`."""
    return 1.0 - 2.0 / (1.0 + jnp.exp2((2 * LOG2E) * x))
