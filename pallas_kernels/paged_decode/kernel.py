"""Decode: one query token per request, its keys split among programs.

A program has one KV head of one request, all query heads of its group as rows, and a share of the keys. The share is of the
request's own length: requests of any lengths keep all programs busy. A single share is finished where it is made; several
leave what `combine` needs to weigh them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.attend import (
    PARTS,
    Keys,
    Refs,
    Rows,
    attend,
    channels,
    finished,
    first_seen,
)
from pallas_kernels.backend import cdiv, launch, power_of_two, program, store
from pallas_kernels.elements import MASKED
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
from pallas_kernels.paged_decode.blocks import DecodeBlocks, blocks_for


def paged_decode(
    q: Float[Array, "requests q_heads head_dim"],
    k_pages: Pool,
    v_pages: Pool,
    page_table: Int[Array, "requests pages"],
    lengths: Int[Array, " requests"],
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
    score_offset: Float[Array, "requests q_heads"] | None = None,
    sm_scale: float | None = None,
    softcap: float | None = None,
    blocks: DecodeBlocks | None = None,
    capability: tuple[int, int] = HOPPER,
    interpret: bool = False,
) -> Float[Array, "requests q_heads head_dim"]:
    """`softmax(q k^T) v` of one query per request over its pages, accumulated in float32; see pallas_kernels/contract.md."""
    requests, q_heads, head_dim = q.shape
    element, compute, group = checked(
        q_heads, head_dim, q.dtype, k_pages, v_pages, element, k_exponent, v_exponent
    )
    kv_heads, page_size = k_pages.shape[1:3]
    if requests == 0:
        return q
    if blocks is None:
        blocks = blocks_for(
            requests=requests, kv_heads=kv_heads, group=group, head_dim=head_dim, tokens=page_table.shape[1] * page_size,
            element=element, compute=compute, page_size=page_size,
        )  # fmt: skip
    # Tensor cores take 16 by 8: with few query heads these are the 8. An odd head_dim of bytes has no pairs.
    turned = (
        group <= 8 and compute.itemsize == 2 and (element.itemsize == 2 or head_dim % PARTS == 0)
    )
    how = How(
        turned=turned,
        element=element,
        compute=compute,
        page_size=page_size,
        head_dim=head_dim,
        group=group,
        rows=max(8 if turned else 16, power_of_two(group)),
        block_k=blocks.block_k,
        sm_scale=scale_of_scores(head_dim, sm_scale),
        softcap=softcap,
        causal=False,
        capability=capability,
        interpret=interpret,
    )
    refs = operands(
        q, k_pages, v_pages, page_table, lengths, layer=layer, first_row=first_row, first_exponent_row=first_exponent_row,
        k_scale=k_scale, v_scale=v_scale, k_exponent=k_exponent, v_exponent=v_exponent, window=window, sinks=sinks,
        score_offset=score_offset,
    )  # fmt: skip
    if turned and element.itemsize == 1 and head_dim % PARTS == 0:
        refs |= {"v": None, "v_pairs": _in_pairs(v_pages)}
    out = {"out": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    if blocks.splits > 1:
        part = (blocks.splits, requests, q_heads)
        out = {
            "out": jax.ShapeDtypeStruct((*part, head_dim), jnp.float32),
            "weight": jax.ShapeDtypeStruct(part, jnp.float32),
        }
    done = launch(
        functools.partial(_kernel, how=how, splits=blocks.splits),
        refs,
        name="paged_decode",
        grid=(kv_heads, blocks.splits, requests),
        out=out,
        warps=blocks.warps,
        stages=blocks.stages,
        interpret=interpret,
    )
    return (
        done["out"] if blocks.splits == 1 else combine(done["out"], done["weight"]).astype(q.dtype)
    )


def combine(
    out: Float[Array, "splits requests q_heads head_dim"],
    weight: Float[Array, "splits requests q_heads"],
) -> Float[Array, "requests q_heads head_dim"]:
    """The mean of the parts' outputs by their weights, which are base-2 logarithms of what each part's softmax summed to."""
    share = jnp.exp2(weight - jnp.max(weight, axis=0))
    return jnp.sum(out * (share / jnp.sum(share, axis=0))[..., None], axis=0)


def _kernel(refs: Refs, out_refs: Refs, *, how: How, splits: int) -> None:
    refs = opened(refs)
    kv_head, split, request = program(0), program(1), program(2)
    length = refs["lengths"][request]
    row = jnp.arange(how.rows, dtype=jnp.int32)
    head = kv_head * how.group + row
    position = jnp.broadcast_to(length - 1, (how.rows,))
    rows = Rows(jnp.broadcast_to(request, (how.rows,)), head, position, row < how.group)

    first = first_seen(refs, length - 1)
    start = first // how.block_k * how.block_k
    share = cdiv(cdiv(length - start, how.block_k), splits) * how.block_k
    start = start + split * share
    end = jnp.minimum(start + share, length)
    now = attend(
        refs,
        how,
        rows,
        Keys(first, start, end),
        request=request,
        kv_head=kv_head,
        with_sink=split == 0,
    )

    out = finished(refs, how, now, kv_head, total=now.total)
    weight = jnp.where(
        now.total == 0, MASKED, now.peak + jnp.log2(jnp.where(now.total == 0, 1.0, now.total))
    )
    place = (request,) if splits == 1 else (split, request)
    for i, part in enumerate(out):
        channel = channels(how, out, i)
        heads, channel, valid = head[:, None], channel[None, :], rows.valid[:, None]
        if how.turned:
            heads, channel, valid = heads.T, channel.T, valid.T
        mask = jnp.broadcast_to(valid, part.shape) & jnp.broadcast_to(
            channel < how.head_dim, part.shape
        )
        ref = out_refs["out"]
        store(ref, *place, heads, channel, value=part.astype(ref.dtype), mask=mask)
    if splits > 1:
        store(out_refs["weight"], split, request, head, value=weight, mask=rows.valid)


def _in_pairs(pages: Pool) -> jax.Array:
    """A pool of bytes as 16-bit numbers, which costs nothing: XLA only calls it otherwise."""
    bits = pages if pages.dtype == jnp.uint8 else lax.bitcast_convert_type(pages, jnp.uint8)
    return lax.bitcast_convert_type(bits.reshape(*bits.shape[:3], -1, PARTS), jnp.uint16)
