"""Paged prefill: chunks with any number of query tokens per request, each with causal attention.

A chunk is divided into blocks of tokens. A block has all query heads of one KV head as rows, so
keys are read once per group. Each program computes its request and block from the number of queries
per request, without a separate launch, so decode rows (chunks of one) can be batched with long
chunks. Keys after the last query of a block, and before its window, are not read. Blocks run from
the end of a chunk to its start, because the last ones have the most keys.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Refs, cdiv, launch, load, power_of_two, program, store
from pallas_kernels.kernel_inputs import (
    HOPPER,
    KernelConfig,
    LayerView,
    attention_inputs,
    check_attention,
    load_scalars,
    softmax_scale,
)
from pallas_kernels.kv_tiles import KeyRange, channel_mask, first_visible
from pallas_kernels.paged_prefill.blocks import PrefillBlocks, choose_blocks
from pallas_kernels.softmax_loop import QueryBlock, attend, normalize


def paged_prefill(
    q: Float[Array, "queries q_heads head_dim"],
    kv: LayerView,
    page_table: Int[Array, "requests pages"],
    lengths: Int[Array, " requests"],
    first_query: Int[Array, " requests"],
    queries: Int[Array, " requests"],
    *,
    element: Any = None,
    score_offset: Float[Array, "queries q_heads"] | None = None,
    sm_scale: float | None = None,
    softcap: float | None = None,
    blocks: PrefillBlocks | None = None,
    capability: tuple[int, int] = HOPPER,
    interpret: bool = False,
) -> Float[Array, "queries q_heads head_dim"]:
    """Return `softmax(q k^T) v` of the last `queries[r]` tokens of each request `r`.

    Args:
      q: queries of all requests. Rows of no request are padding and give zeros.
      kv: pages, scales, window and sinks of the layer.
      page_table: page numbers of each request.
      lengths: tokens of each request in the cache, including the queries'.
      first_query: row of `q` with the first query of each request; the others follow.
      queries: number of queries of each request.

    The remaining arguments and the errors are those of `paged_decode`.
    """
    tokens, q_heads, head_dim = q.shape
    element, compute, group = check_attention(q_heads, head_dim, q.dtype, kv, element)
    kv_heads, page_size = kv.k_pages.shape[1:3]
    requests = lengths.shape[0]
    if 0 in (tokens, requests):
        return jnp.zeros_like(q)
    if blocks is None:
        blocks = choose_blocks(
            queries=tokens,
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            element=element,
            compute=compute,
            capability=capability,
            dynamic=kv.k_exponent is not None,
        )
    config = KernelConfig(
        element=element,
        compute=compute,
        page_size=page_size,
        head_dim=head_dim,
        group=group,
        rows=max(blocks.block_m, power_of_two(group)),
        block_k=blocks.block_k,
        sm_scale=softmax_scale(head_dim, sm_scale),
        softcap=softcap,
        causal=True,
        capability=capability,
        interpret=interpret,
    )
    inputs = attention_inputs(q, kv, page_table, lengths, score_offset=score_offset)
    inputs |= {"first_query": first_query, "queries": queries, "zeros": jnp.zeros_like(q)}
    block_tokens = config.rows // group
    outputs = launch(
        functools.partial(_kernel, config=config, requests=requests, block_tokens=block_tokens),
        inputs,
        name="paged_prefill",
        grid=(min(tokens, tokens // block_tokens + requests), kv_heads),
        out={"out": jax.ShapeDtypeStruct(q.shape, q.dtype)},
        warps=blocks.warps,
        stages=blocks.stages,
        interpret=interpret,
        aliases={"zeros": "out"},
    )
    return outputs["out"]


def _kernel(
    refs: Refs, out_refs: Refs, *, config: KernelConfig, requests: int, block_tokens: int
) -> None:
    refs = load_scalars(refs)
    kv_head = program(1)
    request, block = _find_block(refs, program(0), requests=requests, block_tokens=block_tokens)
    queries = load(refs["queries"], request)
    start = load(refs["lengths"], request) - queries  # position of the chunk in its sequence
    first = block * block_tokens

    row = jnp.arange(config.rows, dtype=jnp.int32)
    token = first + row // config.group
    head = kv_head * config.group + row % config.group
    valid = (token < queries) & (row < block_tokens * config.group)
    index = load(refs["first_query"], request) + token
    query_block = QueryBlock(index, head, start + token, valid)

    last = jnp.minimum(first + block_tokens, queries) - 1
    first_key = first_visible(refs, start + first)
    unmasked = (start + first + 1) // config.block_k if "window" not in refs else None
    first_block = first_key // config.block_k * config.block_k
    end = jnp.where(first < queries, start + last + 1, 0)
    keys = KeyRange(first_key, first_block, end, unmasked)
    state = attend(refs, config, query_block, keys, request=request, kv_head=kv_head)

    (out,) = normalize(refs, config, state, kv_head)
    channel, mask = channel_mask(config, valid, config.rows)
    ref = out_refs["out"]
    out_row = query_block.query[:, None]
    store(ref, out_row, head[:, None], channel, value=out.astype(ref.dtype), mask=mask)


def _find_block(
    refs: Refs, number: Any, *, requests: int, block_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Return the request of program `number`, and its block in the chunk, from last to first.

    Programs past the last block return the number of blocks of the last request: an empty block.
    """
    size = power_of_two(requests)
    index = jnp.arange(size, dtype=jnp.int32)
    exists = None if size == requests else index < requests
    queries = load(refs["queries"], index, mask=exists, other=0)
    blocks = cdiv(queries, block_tokens)
    ends = jnp.cumsum(blocks)
    request = jnp.minimum(jnp.sum((ends <= number).astype(jnp.int32)), requests - 1)
    selected = index == request
    end, count = (jnp.sum(jnp.where(selected, x, 0)) for x in (ends, blocks))
    return request, jnp.where(number < end, end - 1 - number, count)
