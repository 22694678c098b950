"""Paged decode: one query token per request, with the keys of a request split among programs.

A program handles one KV head of one request, with all query heads of its group as rows, and one
split of the keys. Splits divide the length of each request, so requests of any lengths use all
programs. A single split normalizes its output. Several return partial outputs and the logarithms of
their softmax sums, which `combine` merges.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Refs, cdiv, launch, power_of_two, program, store
from pallas_kernels.kernel_inputs import (
    HOPPER,
    KernelConfig,
    LayerView,
    Pool,
    attention_inputs,
    check_attention,
    load_scalars,
    softmax_scale,
)
from pallas_kernels.kv_tiles import PARTS, KeyRange, first_visible
from pallas_kernels.paged_decode.blocks import DecodeBlocks, choose_blocks
from pallas_kernels.reference import MASKED
from pallas_kernels.softmax_loop import QueryBlock, attend, normalize, part_channels


def paged_decode(
    q: Float[Array, "requests q_heads head_dim"],
    kv: LayerView,
    page_table: Int[Array, "requests pages"],
    lengths: Int[Array, " requests"],
    *,
    element: Any = None,
    score_offset: Float[Array, "requests q_heads"] | None = None,
    sm_scale: float | None = None,
    softcap: float | None = None,
    blocks: DecodeBlocks | None = None,
    capability: tuple[int, int] = HOPPER,
    interpret: bool = False,
) -> Float[Array, "requests q_heads head_dim"]:
    """Return `softmax(q k^T) v` of the last token of each request, accumulated in float32.

    Args:
      q: queries, one per request.
      kv: pages, scales, window and sinks of the layer.
      page_table: page numbers of each request.
      lengths: tokens of each request in the cache, including the query's; 0 gives zeros.
      element: the type of the stored bits; the dtype of the pages if None.
      score_offset: added to the scores of each query before the soft cap.
      sm_scale: the factor on scores; `1 / sqrt(head_dim)` if None.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      blocks: block sizes; chosen by `choose_blocks` if None.
      capability: compute capability of the GPU.
      interpret: run in interpret mode.

    Raises `NotSupported` for unsupported types and sizes, `ValueError` for inconsistent shapes. See
    pallas_kernels/contract.md for padding, precision and NaN.
    """
    requests, q_heads, head_dim = q.shape
    element, compute, group = check_attention(q_heads, head_dim, q.dtype, kv, element)
    kv_heads, page_size = kv.k_pages.shape[1:3]
    if requests == 0:
        return q
    if blocks is None:
        blocks = choose_blocks(
            requests=requests,
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            tokens=page_table.shape[1] * page_size,
            element=element,
            compute=compute,
        )
    # Tensor cores multiply tiles of 16 by 8. With few query heads, these are the 8. Byte pools are
    # read in pairs of channels, which an odd head_dim does not have.
    paired = element.itemsize == 1 and head_dim % PARTS == 0
    transposed = group <= 8 and compute.itemsize == 2 and (element.itemsize == 2 or paired)
    config = KernelConfig(
        element=element,
        compute=compute,
        page_size=page_size,
        head_dim=head_dim,
        group=group,
        rows=max(8 if transposed else 16, power_of_two(group)),
        block_k=blocks.block_k,
        sm_scale=softmax_scale(head_dim, sm_scale),
        softcap=softcap,
        causal=False,
        capability=capability,
        interpret=interpret,
        transposed=transposed,
    )
    inputs = attention_inputs(q, kv, page_table, lengths, score_offset=score_offset)
    if transposed and paired:
        inputs |= {"v": None, "v_pairs": _channel_pairs(kv.v_pages)}
    out = {"out": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    if blocks.splits > 1:
        split_shape = (blocks.splits, requests, q_heads)
        out = {
            "out": jax.ShapeDtypeStruct((*split_shape, head_dim), jnp.float32),
            "weight": jax.ShapeDtypeStruct(split_shape, jnp.float32),
        }
    outputs = launch(
        functools.partial(_kernel, config=config, splits=blocks.splits),
        inputs,
        name="paged_decode",
        grid=(kv_heads, blocks.splits, requests),
        out=out,
        warps=blocks.warps,
        stages=blocks.stages,
        interpret=interpret,
    )
    if blocks.splits == 1:
        return outputs["out"]
    return combine(outputs["out"], outputs["weight"]).astype(q.dtype)


def combine(
    out: Float[Array, "splits requests q_heads head_dim"],
    weight: Float[Array, "splits requests q_heads"],
) -> Float[Array, "requests q_heads head_dim"]:
    """Return the weighted mean of the splits' outputs.

    `weight` has base-2 logarithms of the softmax sum of each split.
    """
    fraction = jnp.exp2(weight - jnp.max(weight, axis=0))
    return jnp.sum(out * (fraction / jnp.sum(fraction, axis=0))[..., None], axis=0)


def _kernel(refs: Refs, out_refs: Refs, *, config: KernelConfig, splits: int) -> None:
    refs = load_scalars(refs)
    kv_head, split, request = program(0), program(1), program(2)
    length = refs["lengths"][request]
    row = jnp.arange(config.rows, dtype=jnp.int32)
    head = kv_head * config.group + row
    position = jnp.broadcast_to(length - 1, (config.rows,))
    index = jnp.broadcast_to(request, (config.rows,))
    queries = QueryBlock(index, head, position, row < config.group)

    first = first_visible(refs, length - 1)
    start = first // config.block_k * config.block_k
    split_keys = cdiv(cdiv(length - start, config.block_k), splits) * config.block_k
    start = start + split * split_keys
    end = jnp.minimum(start + split_keys, length)
    keys = KeyRange(first, start, end)
    with_sink = split == 0
    state = attend(
        refs, config, queries, keys, request=request, kv_head=kv_head, with_sink=with_sink
    )

    out = normalize(refs, config, state, kv_head)
    row_sum = state.row_sum
    weight = jnp.where(
        row_sum == 0, MASKED, state.row_max + jnp.log2(jnp.where(row_sum == 0, 1.0, row_sum))
    )
    leading = (request,) if splits == 1 else (split, request)
    for i, part in enumerate(out):
        channel = part_channels(config, out, i)
        heads = head[:, None]
        channel = channel[None, :]
        valid = queries.valid[:, None]
        if config.transposed:
            heads, channel, valid = heads.T, channel.T, valid.T
        mask = jnp.broadcast_to(valid, part.shape)
        mask &= jnp.broadcast_to(channel < config.head_dim, part.shape)
        ref = out_refs["out"]
        store(ref, *leading, heads, channel, value=part.astype(ref.dtype), mask=mask)
    if splits > 1:
        store(out_refs["weight"], split, request, head, value=weight, mask=queries.valid)


def _channel_pairs(pages: Pool) -> jax.Array:
    """Return a byte pool as 16-bit integers: a bitcast, which XLA does without a copy."""
    bits = pages if pages.dtype == jnp.uint8 else lax.bitcast_convert_type(pages, jnp.uint8)
    return lax.bitcast_convert_type(bits.reshape(*bits.shape[:3], -1, PARTS), jnp.uint16)
