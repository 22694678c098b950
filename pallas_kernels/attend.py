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

from pallas_kernels.backend import cdiv, decode_pairs, dot, exp2, load
from pallas_kernels.elements import LOWEST, MASKED, decode, is_fp8, power
from pallas_kernels.options import How

LOG2E = 1.4426950408889634

Refs = dict[str, Any]
PARTS = (
    2  # FP8 values are read by two channels at a time, and even and odd ones are multiplied apart
)


def by_row(how: How, x: jax.Array) -> jax.Array:
    """A vector of rows, to be broadcast over scores or outputs."""
    return x[None, :] if how.turned else x[:, None]


def by_key(how: How, x: jax.Array) -> jax.Array:
    """A vector of keys, to be broadcast over scores."""
    return x[:, None] if how.turned else x[None, :]


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

    out: tuple[
        jax.Array, ...
    ]  # of [rows, channels]; [channels, rows] if turned, and then even and odd ones apart for FP8
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
    begin: Any = None


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

    # The row of the next block is read a block ahead. Were it read by the block itself, its keys could not be asked for before it
    # came: the pipeline would keep one block in flight, asked for when the one before is done, instead of two.
    ahead_rows = how.one_page and not how.causal
    pairs = "v_pairs" in refs
    exp2_of = jnp.exp2 if how.causal else functools.partial(exp2, interpret=how.interpret)

    def body(i: Any, state: Any, *, masked: bool = True) -> Any:
        (now, of, row), begin = state, keys.start + i * how.block_k
        block, ahead = (
            _block(refs, how, keys, begin, request, kv_head, masked, row),
            exponents(begin + how.block_k),
        )
        next_row = _row(refs, how, keys, request, begin + how.block_k) if ahead_rows else None
        scores = _scores(refs, how, query, block, of.k)
        if masked:
            scores = jnp.where(_seen(refs, how, rows, block), scores, MASKED)
        of_keys = 0 if how.turned else 1
        peak = jnp.maximum(now.peak, jnp.max(scores, axis=of_keys))
        shrink = exp2_of(now.peak - peak)
        weights = exp2_of(scores - by_row(how, peak - how.shift))
        total = now.total * shrink + jnp.sum(weights, axis=of_keys)

        exponent, factor = now.exponent, one
        if of.v is not None:
            exponent = jnp.maximum(exponent, jnp.max(of.v))
            shrink = shrink * power(now.exponent - exponent)
            if how.scale_tiles:
                factor = power(of.v - exponent).astype(jnp.float16)[:, None]
            else:
                weights = weights * by_key(how, power(of.v - exponent))
        weights = weights.astype(how.compute)
        if how.turned:
            tiles = (
                _pair_tiles(refs["v_pairs"], how, block)
                if pairs
                else (_turned_tile(refs["v"], how, block),)
            )
            products = [dot(v.astype(how.compute), weights, interpret=how.interpret) for v in tiles]
        else:
            v = _tile(refs["v"], how, block)
            v = (v * factor if is_fp8(how.element) else v).astype(how.compute)
            products = [dot(weights, v, interpret=how.interpret)]
        out = tuple(
            was * by_row(how, shrink) + new for was, new in zip(now.out, products, strict=True)
        )
        return Running(out, peak, total, exponent), ahead, next_row

    exponents = functools.partial(_exponents, refs, how, keys, request, kv_head)
    blocks = jnp.maximum(cdiv(keys.end - keys.start, how.block_k), 0)
    row = _row(refs, how, keys, request, keys.start) if ahead_rows else None
    state, whole = (_initial(refs, how, rows, with_sink), exponents(keys.start), row), jnp.int32(0)
    if keys.whole is not None:
        whole = jnp.minimum(keys.whole, blocks)
        state = lax.fori_loop(0, whole, functools.partial(body, masked=False), state)
    return lax.fori_loop(whole, blocks, body, state)[0]


def finished(
    refs: Refs, how: How, now: Running, kv_head: Any, *, total: jax.Array
) -> tuple[jax.Array, ...]:
    """`out` with its V scales, divided by `total`; rows that saw nothing give zeros."""
    finished = []
    for place, out in enumerate(now.out):
        out = out / by_row(how, jnp.where(total == 0, 1.0, total))
        if "v_exponent" in refs:
            out = out * power(now.exponent - 127)
        if "v_scale" in refs:
            scale = _channels(refs, "v_scale", how, kv_head, channels(how, now.out, place))
            out = out * (scale[:, None] if how.turned else scale[None, :])
        finished.append(out)
    return tuple(finished)


def channels(how: How, parts: tuple[jax.Array, ...], place: int) -> jax.Array:
    """Those of one of the parts that outputs come in."""
    return len(parts) * jnp.arange(how.channels // len(parts), dtype=jnp.int32) + place


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
    k = k.astype(how.compute)
    factors = (k, query.rows.T) if how.turned else (query.rows, k.T)
    scores = dot(*factors, interpret=how.interpret) * by_row(how, factor)
    if scale is not None:
        scores = scores * by_key(how, scale)
    if query.offset is not None:
        scores = scores + by_row(how, query.offset)
    return scores if how.softcap is None else (how.softcap * LOG2E) * _tanh(scores)


def _initial(refs: Refs, how: How, rows: Rows, with_sink: Any) -> Running:
    """Before any key: empty, or the sink alone, whose weight at its own maximum is 1."""
    parts = PARTS if "v_pairs" in refs else 1
    size = how.channels // parts
    out = (jnp.zeros((size, how.rows) if how.turned else (how.rows, size), jnp.float32),) * parts
    peak, total = jnp.full((how.rows,), LOWEST, jnp.float32), jnp.zeros((how.rows,), jnp.float32)
    if "sinks" in refs:
        sink = load(refs["sinks"], refs["layer"], rows.head, mask=rows.valid, other=0.0) * LOG2E
        peak = jnp.where(with_sink, sink, peak)
        total = jnp.where(with_sink, 2.0**how.shift, total)
    return Running(out, peak, total, jnp.int32(0))


def _seen(refs: Refs, how: How, rows: Rows, block: Block) -> jax.Array:
    """Which keys each row sees."""
    shape = (how.block_k, how.rows) if how.turned else (how.rows, how.block_k)
    seen = jnp.broadcast_to(by_key(how, block.known), shape)
    if how.causal:
        seen &= block.token[None, :] <= rows.position[:, None]
        if "window" in refs:
            seen &= block.token[None, :] >= first_seen(refs, rows.position)[:, None]
    return seen


def _block(
    refs: Refs,
    how: How,
    keys: Keys,
    begin: jax.Array,
    request: Any,
    kv_head: Any,
    masked: bool,
    row: Any = None,
) -> Block:
    token = begin + jnp.arange(how.block_k, dtype=jnp.int32)
    known = token < keys.end if masked else None
    if masked and ("window" in refs or how.causal):
        known &= token >= keys.first
    if row is None:
        # One page number for the block, or one a token: those of unknown tokens are not read.
        page_of = (
            begin
            if how.one_page
            else jnp.clip(token, keys.first, keys.end - 1)
            if masked
            else token
        )
        number = page_of // how.page_size if how.causal else lax.div(page_of, how.page_size)
        page = load(refs["page_table"], request, number)
        row = _inside(refs["k"], refs["first_row"] + page)
    return Block(kv_head, token, known, row, begin)


def _row(refs: Refs, how: How, keys: Keys, request: Any, begin: jax.Array) -> jax.Array:
    """The row of the pools that a block of one page lies in, which may begin past the last one."""
    page = load(
        refs["page_table"],
        request,
        lax.div(jnp.minimum(begin, jnp.maximum(keys.end - 1, 0)), how.page_size),
    )
    return _inside(refs["k"], refs["first_row"] + page)


def _inside(ref: Any, row: jax.Array) -> jax.Array:
    """Some row that exists, for page numbers past the end."""
    return jnp.minimum(row, ref.shape[0] - 1)


def _tile(ref: Any, how: How, block: Block) -> jax.Array:
    """`[block_k, channels]` of keys or values, decoded; unknown ones are zero whatever their slots hold."""
    channel, mask = across(how, block.known, how.block_k)
    row = block.row if how.one_page else block.row[:, None]
    bits = load(
        ref,
        row,
        block.kv_head,
        _offset(how, block)[:, None],
        channel,
        mask=mask,
        other=0,
        once=True,
    )
    return decode(bits, how.element, native_e4m3=how.native_e4m3)


def _offset(how: How, block: Block) -> jax.Array:
    """`[block_k]`: places in pages. In one page they follow each other, which the compiler would not see by itself."""
    if how.one_page and not how.causal:
        return lax.rem(block.begin, how.page_size) + jnp.arange(how.block_k, dtype=jnp.int32)
    return block.token % how.page_size


def _turned_tile(ref: Any, how: How, block: Block) -> jax.Array:
    """`[channels, block_k]` of values that are not FP8."""
    return decode(_turned(ref, how, block, 1), how.element, native_e4m3=how.native_e4m3)


def _pair_tiles(ref: Any, how: How, block: Block) -> tuple[jax.Array, jax.Array]:
    """`[channels / 2, block_k]` of even and of odd channels of FP8 values. A pool of bytes is read as 16-bit numbers: those are
    what the hardware transposes on their way from shared memory."""
    return decode_pairs(
        _turned(ref, how, block, PARTS),
        how.element,
        native_e4m3=how.native_e4m3,
        interpret=how.interpret,
    )


def _turned(ref: Any, how: How, block: Block, parts: int) -> jax.Array:
    """What is stored, `[channels / parts, block_k]`. Loaded in this order it lies in shared memory such that reads do not collide."""
    channel, shape = (
        jnp.arange(how.channels // parts, dtype=jnp.int32)[:, None],
        (how.channels // parts, how.block_k),
    )
    mask = None if block.known is None else jnp.broadcast_to(block.known[None, :], shape)
    if how.channels != how.head_dim:
        mask = both(mask, jnp.broadcast_to(channel < how.head_dim // parts, shape))
    row = block.row if how.one_page else block.row[None, :]
    return load(
        ref,
        row,
        block.kv_head,
        _offset(how, block)[None, :],
        channel,
        mask=mask,
        other=0,
        once=True,
    )


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


def _channels(
    refs: Refs, name: str, how: How, kv_head: Any, channel: jax.Array | None = None
) -> jax.Array:
    """A static scale of these channels, or all."""
    if channel is None:
        channel = jnp.arange(how.channels, dtype=jnp.int32)
    mask = None if how.channels == how.head_dim else channel < how.head_dim
    return load(refs[name], refs["layer"], kv_head, channel, mask=mask, other=0.0)


def _tanh(x: jax.Array) -> jax.Array:
    """Within 2**-22 of tanh: two quick instructions where the library's has branches."""
    return 1.0 - 2.0 / (1.0 + jnp.exp2((2 * LOG2E) * x))
