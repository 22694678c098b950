"""Prefill: chunks of any number of query tokens per request, each attending causally over its pages.

Chunks are cut into blocks of tokens; a block has all query heads of one KV head as rows, so keys are read once for the group.
Which chunk a program works on is found in the program, from the number of queries of each request: nothing is launched before
it, and decode rows (chunks of one) may stand among long ones. Keys after a block's last query are not touched, nor keys before
its window. Blocks at the end of a chunk see most keys and come first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attend import Keys, Refs, Rows, across, attend, finished, first_seen
from pallas_kernels.backend import cdiv, launch, load, power_of_two, program, store
from pallas_kernels.options import (
    HOPPER,
    ByLayer,
    ChannelScale,
    Exponents,
    How,
    Pool,
    Scalar,
    checked,
    opened,
    operands,
    scale_of_scores,
)
from pallas_kernels.paged_prefill.blocks import PrefillBlocks, blocks_for


def paged_prefill(
    q: Float[Array, "queries q_heads head_dim"],
    k_pages: Pool,
    v_pages: Pool,
    page_table: Int[Array, "requests pages"],
    lengths: Int[Array, " requests"],
    first_query: Int[Array, " requests"],
    queries: Int[Array, " requests"],
    *,
    element: Any = None,
    layer: Scalar | None = None,
    first_row: ByLayer = 0,
    k_scale: ChannelScale = None,
    v_scale: ChannelScale = None,
    k_exponent: Exponents = None,
    v_exponent: Exponents = None,
    first_exponent_row: ByLayer | None = None,
    window: ByLayer | None = None,
    sinks: Float[Array, "*layers q_heads"] | None = None,
    score_offset: Float[Array, "queries q_heads"] | None = None,
    sm_scale: float | None = None,
    softcap: float | None = None,
    blocks: PrefillBlocks | None = None,
    capability: tuple[int, int] = HOPPER,
    interpret: bool = False,
) -> Float[Array, "queries q_heads head_dim"]:
    """`softmax(q k^T) v` of the last `queries[r]` tokens of every request over its pages; see pallas_kernels/contract.md.

    Those of request `r` lie in rows `first_query[r] ..` of `q`, one after another; rows of no request give zeros.
    """
    tokens, q_heads, head_dim = q.shape
    element, compute, group = checked(
        q_heads, head_dim, q.dtype, k_pages, v_pages, element, k_exponent, v_exponent
    )
    kv_heads, page_size = k_pages.shape[1:3]
    requests = lengths.shape[0]
    if 0 in (tokens, requests):
        return jnp.zeros_like(q)
    if blocks is None:
        blocks = blocks_for(
            queries=tokens, kv_heads=kv_heads, group=group, head_dim=head_dim, element=element, compute=compute,
            capability=capability, dynamic=k_exponent is not None,
        )  # fmt: skip
    how = How(
        element=element,
        compute=compute,
        page_size=page_size,
        head_dim=head_dim,
        group=group,
        rows=max(blocks.block_m, power_of_two(group)),
        block_k=blocks.block_k,
        sm_scale=scale_of_scores(head_dim, sm_scale),
        softcap=softcap,
        causal=True,
        capability=capability,
        interpret=interpret,
    )
    refs = {"first_query": first_query, "queries": queries} | operands(
        q, k_pages, v_pages, page_table, lengths, layer=layer, first_row=first_row, first_exponent_row=first_exponent_row,
        k_scale=k_scale, v_scale=v_scale, k_exponent=k_exponent, v_exponent=v_exponent, window=window, sinks=sinks,
        score_offset=score_offset,
    )  # fmt: skip
    block_tokens = how.rows // group
    done = launch(
        functools.partial(_kernel, how=how, requests=requests, block_tokens=block_tokens),
        refs | {"zeros": jnp.zeros_like(q)},
        name="paged_prefill",
        grid=(min(tokens, tokens // block_tokens + requests), kv_heads),
        out={"out": jax.ShapeDtypeStruct(q.shape, q.dtype)},
        warps=blocks.warps,
        stages=blocks.stages,
        interpret=interpret,
        aliases={"zeros": "out"},
    )
    return done["out"]


def _kernel(refs: Refs, out_refs: Refs, *, how: How, requests: int, block_tokens: int) -> None:
    refs = opened(refs)
    kv_head = program(1)
    request, block = _block(refs, program(0), requests=requests, block_tokens=block_tokens)
    queries = load(refs["queries"], request)
    start = load(refs["lengths"], request) - queries  # of the chunk, in its text
    first = block * block_tokens

    row = jnp.arange(how.rows, dtype=jnp.int32)
    token, head = first + row // how.group, kv_head * how.group + row % how.group
    valid = (token < queries) & (row < block_tokens * how.group)
    rows = Rows(load(refs["first_query"], request) + token, head, start + token, valid)

    last = jnp.minimum(first + block_tokens, queries) - 1
    seen = first_seen(refs, start + first)
    whole = (start + first + 1) // how.block_k if "window" not in refs else None
    keys = Keys(
        seen,
        seen // how.block_k * how.block_k,
        jnp.where(first < queries, start + last + 1, 0),
        whole,
    )
    now = attend(refs, how, rows, keys, request=request, kv_head=kv_head)

    (out,) = finished(refs, how, now, kv_head, total=now.total)
    channel, mask = across(how, valid, how.rows)
    ref = out_refs["out"]
    store(ref, rows.query[:, None], head[:, None], channel, value=out.astype(ref.dtype), mask=mask)


def _block(
    refs: Refs, number: Any, *, requests: int, block_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """The request that program `number` works on, and which of its blocks, counted from the last; past the end of all blocks
    it is one past the end of the last request's."""
    size = power_of_two(requests)
    index = jnp.arange(size, dtype=jnp.int32)
    queries = load(
        refs["queries"], index, mask=None if size == requests else index < requests, other=0
    )
    blocks = cdiv(queries, block_tokens)
    ends = jnp.cumsum(blocks)
    request = jnp.minimum(jnp.sum((ends <= number).astype(jnp.int32)), requests - 1)
    here = index == request
    end, own = (jnp.sum(jnp.where(here, x, 0)) for x in (ends, blocks))
    return request, jnp.where(number < end, end - 1 - number, own)
