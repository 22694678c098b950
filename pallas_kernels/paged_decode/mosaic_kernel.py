"""The decode kernel for Pallas Mosaic GPU: TMA copies of pages, `wgmma` with keys as its rows.

A program has one KV head of one request, some query heads of its group, and a share of the keys. Pages come by TMA, several
blocks in flight, and one warpgroup multiplies them. Keys fill the 64 rows that `wgmma` has, and query heads are its columns: a
small group is padded to 8 heads, not to 64.

    scores  [keys, heads]     = K [keys, head_dim] @ q [head_dim, heads]
    out     [head_dim, heads] = V [head_dim, keys] @ weights [keys, heads]

FP8 keys become float16 in registers on their way into the product. Values become float16 in shared memory, for only there can
they be read transposed. Barriers among the four warps are left to Pallas, which sets a few more than are needed.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attend import LOG2E, first_seen
from pallas_kernels.backend import pallas
from pallas_kernels.elements import FLOAT16, LOWEST, MASKED, is_fp8, power
from pallas_kernels.options import opened

Refs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class MosaicBlocks:
    """Keys handled together (64 or 128), blocks that a program has in flight, and shares of a request's keys."""

    block_k: int
    stages: int
    splits: int


@dataclasses.dataclass(frozen=True)
class MosaicHow:
    """What the kernel is compiled for, apart from the shapes of its arrays."""

    element: np.dtype  # what is stored
    compute: np.dtype  # what is multiplied, in 16 bits
    page_size: int
    head_dim: int
    heads: int  # query heads of a program, a multiple of 8
    tiles: int  # programs that share a KV head
    softcap: float | None
    blocks: MosaicBlocks
    interpret: bool

    @property
    def shift(self) -> float:
        """Weights are kept larger by `2 ** shift`: a float16 then keeps them down to 2**-34."""
        return 10.0 if self.compute == FLOAT16 else 0.0

    @property
    def piece(self) -> int:
        """Keys that one copy brings: a page, or a block's part of one."""
        return min(self.blocks.block_k, self.page_size)


class Share(NamedTuple):
    """A program's keys: `first .. end - 1`, in blocks that begin at `start`, some of them before `first`."""

    request: jax.Array
    kv_head: jax.Array
    first: jax.Array
    start: jax.Array
    end: jax.Array
    blocks: jax.Array


class Running(NamedTuple):
    """Weighted values so far, the largest weight's logarithm by head, the same of scores, and sums by key of a block."""

    out: jax.Array  # [head_dim, heads]
    largest: jax.Array  # [heads]
    peak: jax.Array  # [heads]
    total: jax.Array  # [block_k, heads]


def launch(gpu: Any, how: MosaicHow, operands: dict[str, jax.Array]) -> Any:
    """Outputs `[splits, requests, programs, head_dim, heads]` of the shares, and their weights without `head_dim`."""

    def tiled(*shape: int, dtype: np.dtype) -> Any:
        """Shared memory in the tiles of 8 rows that TMA writes and `wgmma` reads."""
        row = min(shape[-1] * dtype.itemsize, 128)
        return gpu.SMEM(
            shape,
            dtype,
            transforms=(gpu.TilingTransform((8, row // dtype.itemsize)), gpu.SwizzleTransform(row)),
        )

    block_k, stages, pieces = how.blocks.block_k, how.blocks.stages, how.blocks.block_k // how.piece
    shared = {
        "q_here": tiled(how.heads, how.head_dim, dtype=how.compute),
        "k_here": tiled(stages, block_k, how.head_dim, dtype=how.element),
        "v_here": tiled(stages, block_k, how.head_dim, dtype=how.element),
        "weights": tiled(how.heads, block_k, dtype=how.compute),
        "weight_here": gpu.SMEM((how.heads,), jnp.float32),
        "q_arrived": gpu.Barrier(),
        "k_arrived": gpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        "v_arrived": gpu.Barrier(num_arrivals=pieces, num_barriers=stages),
    }
    if is_fp8(how.element):
        shared["v_decoded"] = tiled(block_k, how.head_dim, dtype=FLOAT16)
        if how.interpret:
            shared["k_decoded"] = tiled(block_k, how.head_dim, dtype=FLOAT16)
    requests, programs = operands["q"].shape[:2]
    part = (how.blocks.splits, requests, programs)

    def kernel(*arrays: Any, **here: Any) -> None:
        _kernel(gpu, how, dict(zip((*operands, "out", "weight"), arrays, strict=True)) | here)

    call = gpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*part, how.heads, how.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((*part, how.heads), jnp.float32),
        ],
        grid=(requests, how.blocks.splits, programs),
        grid_names=("request", "split", "program"),
        scratch_types=shared,
        compiler_params=gpu.CompilerParams(approx_math=True),
        interpret=gpu.InterpretGPUParams() if how.interpret else None,
        kernel_name="paged_decode_mosaic",
    )
    return call(*operands.values())


def _kernel(gpu: Any, how: MosaicHow, refs: Refs) -> None:
    refs = opened(refs)
    share, split, program = _share(how, refs), lax.axis_index("split"), lax.axis_index("program")
    gpu.copy_gmem_to_smem(refs["q"].at[share.request, program], refs["q_here"], refs["q_arrived"])
    for i in range(how.blocks.stages):
        pallas().when(i < share.blocks)(
            functools.partial(_fetch, gpu, how, refs, share, jnp.int32(i), jnp.int32(i))
        )
    factor, offset = (
        gpu.load(
            refs[name].at[share.request, program],
            layout=gpu.Layout.WGMMA.reduce(0),
            optimized=False,
        )
        if name in refs
        else None
        for name in ("factor", "offset")
    )
    gpu.barrier_wait(refs["q_arrived"])

    def full(*shape: int, value: float) -> jax.Array:
        layout = gpu.Layout.WGMMA if len(shape) == 2 else gpu.Layout.WGMMA.reduce(0)
        return gpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    lowest = full(how.heads, value=LOWEST)
    empty = Running(
        full(how.head_dim, how.heads, value=0.0),
        lowest,
        lowest,
        full(how.blocks.block_k, how.heads, value=0.0),
    )
    body = functools.partial(_block, gpu, how, refs, share, factor, offset)
    now = lax.fori_loop(0, share.blocks, body, empty)

    total = jnp.sum(now.total, axis=0)
    some = jnp.where(total == 0, 1.0, total)
    out = now.out * _rows(jnp.exp2(now.largest - now.peak) / some, how.head_dim)
    refs["out"].at[split, share.request, program].T[...] = gpu.layout_cast(
        out, gpu.Layout.WGMMA_TRANSPOSED
    )
    refs["weight_here"][...] = jnp.where(total == 0, MASKED, now.peak + jnp.log2(some) - how.shift)
    gpu.commit_smem()
    gpu.copy_smem_to_gmem(refs["weight_here"], refs["weight"].at[split, share.request, program])
    gpu.wait_smem_to_gmem(0)


def _share(how: MosaicHow, refs: Refs) -> Share:
    request, kv_head = lax.axis_index("request"), _div(lax.axis_index("program"), how.tiles)
    length, block_k = refs["lengths"][request], how.blocks.block_k
    first = first_seen(refs, length - 1)
    start = _div(first, block_k) * block_k
    share = _cdiv(_cdiv(length - start, block_k), how.blocks.splits) * block_k
    start = start + lax.axis_index("split") * share
    end = jnp.minimum(start + share, length)
    return Share(request, kv_head, first, start, end, _cdiv(jnp.maximum(end - start, 0), block_k))


def _block(
    gpu: Any,
    how: MosaicHow,
    refs: Refs,
    share: Share,
    factor: jax.Array,
    offset: jax.Array | None,
    i: jax.Array,
    now: Running,
) -> Running:
    """One block of keys, and the fetch of the one that takes its place."""
    block_k, stages = how.blocks.block_k, how.blocks.stages
    slot, begin = lax.rem(i, jnp.int32(stages)), share.start + i * block_k
    values = refs["v_decoded"] if "v_decoded" in refs else refs["v_here"].at[slot]
    k_exponent, v_exponent = (
        _exponents(gpu, how, refs, share, begin, name) for name in ("k_exponent", "v_exponent")
    )

    scores = pallas().run_scoped(
        functools.partial(_products, gpu, how, refs, slot),
        gpu.ACC((block_k, how.heads), jnp.float32),
    )
    scores = scores * _rows(factor, block_k)
    if k_exponent is not None:
        scores = scores * _columns(power(k_exponent), how.heads)
    if offset is not None:
        scores = scores + _rows(offset, block_k)
    if how.softcap is not None:
        scores = (how.softcap * LOG2E) * (1.0 - 2.0 / (1.0 + jnp.exp2((2 * LOG2E) * scores)))
    scores = jnp.where(_known(gpu, share, begin, scores.shape), scores, MASKED)

    peak = jnp.maximum(now.peak, jnp.max(scores, axis=0))
    weights = jnp.exp2(scores - _rows(peak - how.shift, block_k))
    total = now.total * _rows(jnp.exp2(now.peak - peak), block_k) + weights
    largest = peak
    if v_exponent is not None:
        # Dynamic V scales are powers of two: they join weights as logarithms, with a running maximum of their own.
        scores = scores + _columns(v_exponent.astype(jnp.float32), how.heads)
        largest = jnp.maximum(now.largest, jnp.max(scores, axis=0))
        weights = jnp.exp2(scores - _rows(largest - how.shift, block_k))
    refs["weights"].T[...] = weights.astype(how.compute)

    @pallas().when((begin < share.first) | (begin + block_k > share.end))
    def unknown_values_are_zero() -> None:
        known = _known(gpu, share, begin, values.shape)
        values[...] = jnp.where(
            known, gpu.layout_cast(values[...], gpu.Layout.WGMMA), jnp.zeros((), values.dtype)
        )

    def next_block() -> None:
        pallas().when(i + stages < share.blocks)(
            functools.partial(_fetch, gpu, how, refs, share, i + stages, slot)
        )

    gpu.commit_smem()
    if is_fp8(how.element):
        next_block()

    def weighted(product: Any) -> jax.Array:
        gpu.wgmma(product, values.T, refs["weights"].T)
        return product[...]

    product = pallas().run_scoped(weighted, gpu.ACC((how.head_dim, how.heads), jnp.float32))
    if not is_fp8(how.element):
        next_block()
    return Running(
        now.out * _rows(jnp.exp2(now.largest - largest), how.head_dim) + product,
        largest,
        peak,
        total,
    )


def _fetch(
    gpu: Any, how: MosaicHow, refs: Refs, share: Share, block: jax.Array, slot: jax.Array
) -> None:
    """Have a block's keys and values brought to its slot."""
    for piece in range(how.blocks.block_k // how.piece):
        token = share.start + block * how.blocks.block_k + piece * how.piece
        there = (slot, pallas().ds(piece * how.piece, how.piece))
        for name in ("k", "v"):
            source = refs[name].at[_place(how, refs, share, token, name)]
            gpu.copy_gmem_to_smem(
                source, refs[f"{name}_here"].at[there], refs[f"{name}_arrived"].at[slot]
            )


def _place(
    how: MosaicHow, refs: Refs, share: Share, token: jax.Array, name: str
) -> tuple[Any, ...]:
    """Where the piece that begins at `token` lies. Unknown tokens have a known one's page, for only those page numbers are
    read, and a page past the end is some page that exists."""
    page = refs["page_table"][
        share.request, _div(jnp.clip(token, share.first, share.end - 1), how.page_size)
    ]
    row = refs["first_exponent_row" if name.endswith("exponent") else "first_row"] + page
    here = (
        pallas().ds(lax.rem(token, jnp.int32(how.page_size)), how.piece)
        if how.page_size > how.piece
        else slice(None)
    )
    return jnp.minimum(row, refs[name].shape[0] - 1), share.kv_head, here


def _exponents(
    gpu: Any, how: MosaicHow, refs: Refs, share: Share, begin: jax.Array, name: str
) -> jax.Array | None:
    """`[block_k]` exponents of dynamic scales without their bias; anything for unknown tokens."""
    if name not in refs:
        return None
    source = refs[name].at[_place(how, refs, share, begin, name)]
    return (
        gpu.load(source, layout=gpu.Layout.WGMMA.reduce(1), optimized=False).astype(jnp.int32) - 127
    )


def _products(gpu: Any, how: MosaicHow, refs: Refs, slot: jax.Array, product: Any) -> jax.Array:
    """`[block_k, heads]` products of a block's keys with the queries; meanwhile FP8 values become float16."""
    gpu.barrier_wait(refs["k_arrived"].at[slot])
    keys = refs["k_here"].at[slot]
    if is_fp8(how.element):
        keys = gpu.layout_cast(
            gpu.layout_cast(keys[...], gpu.Layout.WGMMA_UPCAST_2X), gpu.Layout.WGMMA
        ).astype(FLOAT16)
    if "k_decoded" in refs:  # the interpreter multiplies only what is in shared memory
        refs["k_decoded"][...] = keys
        keys = refs["k_decoded"]
    gpu.wgmma(product, keys, refs["q_here"].T)
    gpu.barrier_wait(refs["v_arrived"].at[slot])
    if is_fp8(how.element):
        refs["v_decoded"][...] = gpu.layout_cast(
            refs["v_here"][slot], gpu.Layout.WGMMA_UPCAST_2X
        ).astype(FLOAT16)
    return product[...]


def _known(gpu: Any, share: Share, begin: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Which keys of the block at `begin`, the rows of `shape`, are the request's and seen."""
    token = begin + gpu.broadcasted_iota(jnp.int32, shape, 0, layout=gpu.Layout.WGMMA)
    return (token >= share.first) & (token < share.end)


def _rows(x: jax.Array, rows: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (rows, *x.shape), [1])


def _columns(x: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (*x.shape, columns), [0])


def _div(x: jax.Array, by: int) -> jax.Array:
    return lax.div(x, jnp.int32(by))


def _cdiv(x: jax.Array, by: int) -> jax.Array:
    return _div(x + (by - 1), by)
