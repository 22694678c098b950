"""The loop both attention kernels share: one block of queries over a run of keys, with a running softmax.

Rows of the block are queries: of one token and several heads when decoding, of several tokens in prefill. Keys are taken
`block_k` at a time, decoded on their way into the product, and never anything but read. What is folded where:

- Static K scales and the softmax factor go into the query. For float16 products each row of it is first divided by a power of
  two that brings its largest channel to 1 .. 2, so that no scale can push it out of range; scores are multiplied by that power.
- Static V scales go into the output.
- Dynamic scales are powers of two. Those of K multiply the scores. Those of V, relative to the largest met so far, multiply
  the weights; when a larger one comes, what is summed is rescaled in the multiplication that the running maximum needs anyway.
  So no scale can push the weights out of range either. Where rows are many (`scale_tiles`), scores and weights are no smaller
  than the tiles and cost more to reach by key: there both multiply tiles, relative to the largest of the tile or so far.

Scores are in units of log 2, for `exp2` is what the hardware has.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import cdiv, dot, load
from pallas_kernels.elements import decode, is_fp8, power
from pallas_kernels.options import How

LOG2E = 1.4426950408889634
MASKED = -1e30  # a masked score
LOWEST = -1e20  # where the running maximum starts: exp2(MASKED - LOWEST) is 0, so a row that sees nothing sums to 0

Refs = dict[str, Any]


class Rows(NamedTuple):
    """The queries of a block: where each lies in `q`, its head, its position in the text, and whether it is one at all."""

    query: jax.Array  # [rows]
    head: jax.Array  # [rows]
    position: jax.Array  # [rows]
    valid: jax.Array  # [rows]


class Keys(NamedTuple):
    """The keys that rows go through: `first .. end - 1`, in blocks that begin at `start`, some of them before `first`. Every
    row sees the first `whole` blocks whole; None: no block is known to be so."""

    first: jax.Array
    start: jax.Array
    end: jax.Array
    whole: jax.Array | None = None


class Running(NamedTuple):
    """Weighted values so far, maximum and sum of weights, and the largest exponent of a V scale (0 where scales are static)."""

    out: jax.Array  # [rows, channels]
    peak: jax.Array  # [rows]
    total: jax.Array  # [rows]
    exponent: jax.Array  # []


class Query(NamedTuple):
    """Rows as they are multiplied, the factor on each row's scores, and what is then added to them, if anything."""

    rows: jax.Array  # [rows, channels]
    factor: jax.Array  # [rows]
    offset: jax.Array | None  # [rows]


class Block(NamedTuple):
    """Keys handled together: their tokens, which of them are known (None: all), and the rows of the pools they lie in."""

    kv_head: Any
    token: jax.Array  # [block_k]
    known: jax.Array | None  # [block_k]
    row: jax.Array  # [] or [block_k]


class Exponents(NamedTuple):
    """Those of a block's dynamic scales, int32; 0 for unknown tokens. None where scales are static.

    They are loaded a block ahead: too narrow to be copied to shared memory while others are worked on, as keys and values are,
    they would be waited for.
    """

    k: jax.Array | None  # [block_k]
    v: jax.Array | None  # [block_k]


def attend(
    refs: Refs,
    how: How,
    rows: Rows,
    keys: Keys,
    *,
    request: Any,
    kv_head: Any,
    with_sink: Any = True,
) -> Running:
    """The rows over the keys; `out` is without static V scales and not yet divided by `total`."""
    query = _query(refs, how, rows, kv_head)
    # One whenever the loop runs, which the compiler cannot know. An FP8 tile of V multiplied by it must exist as float16 before
    # it crosses shared memory; else it crosses in bytes and is taken apart there, at 1.6 times the cost of everything else.
    one = jnp.where(keys.end > keys.start, 1.0, 0.5).astype(jnp.float16)

    def body(
        i: jax.Array, state: tuple[Running, Exponents], *, masked: bool = True
    ) -> tuple[Running, Exponents]:
        (now, of), begin = state, keys.start + i * how.block_k
        block, ahead = (
            _block(refs, how, keys, begin, request, kv_head, masked),
            exponents(begin + how.block_k),
        )
        scores = _scores(refs, how, query, block, of.k)
        if masked:
            scores = jnp.where(_seen(refs, how, rows, block), scores, MASKED)
        peak = jnp.maximum(now.peak, jnp.max(scores, axis=1))
        shrink = jnp.exp2(now.peak - peak)
        weights = jnp.exp2(scores - (peak - how.shift)[:, None])
        total = now.total * shrink + jnp.sum(weights, axis=1)

        exponent, factor = now.exponent, one
        if of.v is not None:
            exponent = jnp.maximum(exponent, jnp.max(of.v))
            shrink = shrink * power(now.exponent - exponent)
            if how.scale_tiles:
                factor = power(of.v - exponent).astype(jnp.float16)[:, None]
            else:
                weights = weights * power(of.v - exponent)[None, :]
        v = _tile(refs["v"], how, block)
        v = (v * factor if is_fp8(how.element) else v).astype(how.compute)
        out = now.out * shrink[:, None] + dot(
            weights.astype(how.compute), v, interpret=how.interpret
        )
        return Running(out, peak, total, exponent), ahead

    exponents = functools.partial(_exponents, refs, how, keys, request, kv_head)
    blocks = jnp.maximum(cdiv(keys.end - keys.start, how.block_k), 0)
    state, whole = (_initial(refs, how, rows, with_sink), exponents(keys.start)), jnp.int32(0)
    if keys.whole is not None:
        whole = jnp.minimum(keys.whole, blocks)
        state = lax.fori_loop(0, whole, functools.partial(body, masked=False), state)
    return lax.fori_loop(whole, blocks, body, state)[0]


def finished(refs: Refs, how: How, now: Running, kv_head: Any, *, total: jax.Array) -> jax.Array:
    """`out` with its V scales, divided by `total`; rows that saw nothing give zeros."""
    out = now.out / jnp.where(total == 0, 1.0, total)[:, None]
    if "v_exponent" in refs:
        out = out * power(now.exponent - 127)
    if "v_scale" in refs:
        out = out * _channels(refs, "v_scale", how, kv_head)[None, :]
    return out


def first_seen(refs: Refs, position: jax.Array) -> jax.Array:
    """The first key that queries at these positions see."""
    if "window" not in refs:
        return jnp.zeros_like(position)
    window = refs["window"]
    return jnp.where(window == 0, 0, jnp.maximum(position - window + 1, 0))


def across(how: How, known: jax.Array | None, rows: int) -> tuple[jax.Array, jax.Array | None]:
    """The index of channels, `[1, channels]`, and which of `[rows, channels]` are there, in rows that are `known`; None: all.

    The index itself stays as it is: clamped, its contiguity would be hidden, and loads would be bytes.
    """
    channel, shape = jnp.arange(how.channels, dtype=jnp.int32)[None, :], (rows, how.channels)
    mask = None if known is None else jnp.broadcast_to(known[:, None], shape)
    if how.channels != how.head_dim:
        mask = both(mask, jnp.broadcast_to(channel < how.head_dim, shape))
    return channel, mask


def both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """Both masks; None is no mask."""
    return b if a is None else a if b is None else a & b


def _query(refs: Refs, how: How, rows: Rows, kv_head: Any) -> Query:
    channel, mask = across(how, rows.valid, how.rows)
    q = load(
        refs["q"], rows.query[:, None], rows.head[:, None], channel, mask=mask, other=0.0
    ).astype(jnp.float32)
    if "k_scale" in refs:
        q = q * _channels(refs, "k_scale", how, kv_head)[None, :]
    unit = LOG2E if how.softcap is None else 1 / how.softcap
    factor = jnp.full((how.rows,), how.sm_scale * unit, jnp.float32)
    if how.compute == jnp.float16:
        bits = lax.bitcast_convert_type(jnp.max(jnp.abs(q), axis=1), jnp.int32)
        exponent = jnp.clip(bits >> 23, 1, 253) - 127
        q, factor = q * power(-exponent)[:, None], factor * power(exponent)
    offset = None
    if "score_offset" in refs:
        offset = (
            load(refs["score_offset"], rows.query, rows.head, mask=rows.valid, other=0.0) * unit
        )
    return Query(q.astype(how.compute), factor, offset)


def _scores(
    refs: Refs, how: How, query: Query, block: Block, exponents: jax.Array | None
) -> jax.Array:
    """`[rows, block_k]` scores of keys, seen or not, in units of log 2."""
    k, factor, scale = _tile(refs["k"], how, block), query.factor, None
    if exponents is not None:
        if how.scale_tiles:
            largest = jnp.max(exponents)
            k = k * power(exponents - largest).astype(jnp.float16)[:, None]
            factor = factor * power(largest - 127)
        else:
            scale = power(exponents - 127)
    scores = dot(query.rows, k.astype(how.compute).T, interpret=how.interpret) * factor[:, None]
    if scale is not None:
        scores = scores * scale[None, :]
    if query.offset is not None:
        scores = scores + query.offset[:, None]
    return scores if how.softcap is None else (how.softcap * LOG2E) * _tanh(scores)


def _initial(refs: Refs, how: How, rows: Rows, with_sink: Any) -> Running:
    """Before any key: empty, or the sink alone, whose weight at its own maximum is 1."""
    out = jnp.zeros((how.rows, how.channels), jnp.float32)
    peak, total = jnp.full((how.rows,), LOWEST, jnp.float32), jnp.zeros((how.rows,), jnp.float32)
    if "sinks" in refs:
        sink = load(refs["sinks"], refs["layer"], rows.head, mask=rows.valid, other=0.0) * LOG2E
        peak = jnp.where(with_sink, sink, peak)
        total = jnp.where(with_sink, 2.0**how.shift, total)
    return Running(out, peak, total, jnp.int32(0))


def _seen(refs: Refs, how: How, rows: Rows, block: Block) -> jax.Array:
    """Which keys each row sees."""
    seen = jnp.broadcast_to(block.known[None, :], (how.rows, how.block_k))
    if how.causal:
        seen &= block.token[None, :] <= rows.position[:, None]
        if "window" in refs:
            seen &= block.token[None, :] >= first_seen(refs, rows.position)[:, None]
    return seen


def _block(
    refs: Refs, how: How, keys: Keys, begin: jax.Array, request: Any, kv_head: Any, masked: bool
) -> Block:
    token = begin + jnp.arange(how.block_k, dtype=jnp.int32)
    known = (token >= keys.first) & (token < keys.end) if masked else None
    # One page number for the block, or one a token: those of unknown tokens are not read.
    page_of = (
        begin if how.one_page else jnp.clip(token, keys.first, keys.end - 1) if masked else token
    )
    page = load(refs["page_table"], request, page_of // how.page_size)
    return Block(kv_head, token, known, _inside(refs["k"], refs["first_row"] + page))


def _inside(ref: Any, row: jax.Array) -> jax.Array:
    """Some row that exists, for page numbers past the end."""
    return jnp.minimum(row, ref.shape[0] - 1)


def _tile(ref: Any, how: How, block: Block) -> jax.Array:
    """`[block_k, channels]` of keys or values, decoded; unknown ones are zero whatever their slots hold."""
    channel, mask = across(how, block.known, how.block_k)
    row = block.row if how.one_page else block.row[:, None]
    offset = (block.token % how.page_size)[:, None]
    bits = load(ref, row, block.kv_head, offset, channel, mask=mask, other=0, once=True)
    return decode(bits, how.element, native_e4m3=how.native_e4m3)


def _exponents(
    refs: Refs, how: How, keys: Keys, request: Any, kv_head: Any, begin: jax.Array
) -> Exponents:
    """Those of the block that begins at `begin`, which may lie past the last one."""
    if "k_exponent" not in refs:
        return Exponents(None, None)
    token = begin + jnp.arange(how.block_k, dtype=jnp.int32)
    known = (token >= keys.first) & (token < keys.end)
    last = jnp.maximum(keys.end - 1, 0)
    page_of = jnp.minimum(begin, last) if how.one_page else jnp.clip(token, keys.first, last)
    page = load(refs["page_table"], request, page_of // how.page_size)
    row, offset = (
        _inside(refs["k_exponent"], refs["first_exponent_row"] + page),
        token % how.page_size,
    )
    of = (
        load(refs[name], row, kv_head, offset, mask=known, other=0)
        for name in ("k_exponent", "v_exponent")
    )
    return Exponents(*(exponent.astype(jnp.int32) for exponent in of))


def _channels(refs: Refs, name: str, how: How, kv_head: Any) -> jax.Array:
    """`[channels]` of a static scale."""
    channel = jnp.arange(how.channels, dtype=jnp.int32)
    mask = None if how.channels == how.head_dim else channel < how.head_dim
    return load(refs[name], refs["layer"], kv_head, channel, mask=mask, other=0.0)


def _tanh(x: jax.Array) -> jax.Array:
    """Within 2**-22 of tanh: two quick instructions where the library's has branches."""
    return 1.0 - 2.0 / (1.0 + jnp.exp2((2 * LOG2E) * x))
