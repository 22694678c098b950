"""The decode kernel for Pallas Mosaic GPU: TMA copies of pages, `wgmma` with keys as its rows.

A program handles one KV head of one request, some query heads of its group, and one split of the
keys. TMA copies pages, several blocks in flight, and one warpgroup multiplies them. Keys fill the
64 rows of `wgmma`, and query heads are its columns: a small group is padded to 8 heads, not to 64.

    scores  [keys, heads]     = K [keys, head_dim] @ q [head_dim, heads]
    out     [head_dim, heads] = V [head_dim, keys] @ weights [keys, heads]

FP8 keys are converted to float16 in registers on their way into the matmul. Values are converted
in shared memory, because they can only be read transposed from there. Pallas inserts the barriers
among the four warps, a few more than necessary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.backend import Refs, pallas
from pallas_kernels.fp8 import FLOAT16, exact_exp2, is_fp8
from pallas_kernels.kernel_inputs import load_scalars
from pallas_kernels.kv_tiles import first_visible
from pallas_kernels.reference import LOWEST, MASKED
from pallas_kernels.softmax_loop import LOG2E


@dataclasses.dataclass(frozen=True)
class MosaicBlocks:
    """Block sizes of `paged_decode_mosaic`.

    Attributes:
      block_k: keys per block, 64 or 128.
      stages: blocks in flight per program.
      splits: programs per request and KV head; each handles a part of the keys.
    """

    block_k: int
    stages: int
    splits: int


@dataclasses.dataclass(frozen=True)
class MosaicConfig:
    """Compile-time parameters, in addition to the shapes of the arrays."""

    element: np.dtype  # type of the stored bits
    compute: np.dtype  # operand type of the matmuls, 16 bits
    page_size: int
    head_dim: int
    heads: int  # query heads per program, a multiple of 8
    tiles: int  # programs per KV head
    softcap: float | None
    blocks: MosaicBlocks
    interpret: bool

    @property
    def weight_shift(self) -> float:
        """Softmax weights are multiplied by `2 ** weight_shift`.

        A float16 then represents weights down to 2**-34.
        """
        return 10.0 if self.compute == FLOAT16 else 0.0

    @property
    def copy_tokens(self) -> int:
        """Keys per copy: a page, or the part of a page in a block."""
        return min(self.blocks.block_k, self.page_size)


class SplitKeys(NamedTuple):
    """The keys of a program: `first .. end - 1`, in blocks that start at `start <= first`."""

    request: jax.Array
    kv_head: jax.Array
    first: jax.Array
    start: jax.Array
    end: jax.Array
    blocks: jax.Array


class SoftmaxState(NamedTuple):
    """SoftmaxState state of the online softmax.

    Attributes:
      out: weighted sums of values, `[head_dim, heads]`.
      max_weight: running maximum of the logarithms of weights, `[heads]`.
      max_score: running maximum of the scores, `[heads]`.
      weight_sum: running sums of the weights, separate for each key of a block, `[block_k, heads]`.
    """

    out: jax.Array
    max_weight: jax.Array
    max_score: jax.Array
    weight_sum: jax.Array


def build_kernel(
    gpu: Any, config: MosaicConfig, arrays: dict[str, jax.Array]
) -> Callable[..., Any]:
    """Return the kernel as a function of the values of `arrays`.

    It returns the outputs of the splits, `[splits, requests, programs, heads, head_dim]`, and the
    base-2 logarithms of their softmax sums, without `head_dim`.
    """

    def tiled(*shape: int, dtype: np.dtype) -> Any:
        """Return shared memory in tiles of 8 rows, which TMA writes and `wgmma` reads."""
        row = min(shape[-1] * dtype.itemsize, 128)
        return gpu.SMEM(
            shape,
            dtype,
            transforms=(gpu.TilingTransform((8, row // dtype.itemsize)), gpu.SwizzleTransform(row)),
        )

    block_k = config.blocks.block_k
    stages = config.blocks.stages
    copies = block_k // config.copy_tokens
    scratch = {
        "q_smem": tiled(config.heads, config.head_dim, dtype=config.compute),
        "k_smem": tiled(stages, block_k, config.head_dim, dtype=config.element),
        "v_smem": tiled(stages, block_k, config.head_dim, dtype=config.element),
        "weights_smem": tiled(config.heads, block_k, dtype=config.compute),
        "weight_smem": gpu.SMEM((config.heads,), jnp.float32),
        "q_barrier": gpu.Barrier(),
        "k_barrier": gpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "v_barrier": gpu.Barrier(num_arrivals=copies, num_barriers=stages),
    }
    if is_fp8(config.element):
        scratch["v_decoded"] = tiled(block_k, config.head_dim, dtype=FLOAT16)
        if config.interpret:
            scratch["k_decoded"] = tiled(block_k, config.head_dim, dtype=FLOAT16)
    requests, programs = arrays["q"].shape[:2]
    split_shape = (config.blocks.splits, requests, programs)
    names = (*arrays, "out", "weight")

    def kernel(*array_refs: Any, **scratch_refs: Any) -> None:
        _kernel(gpu, config, dict(zip(names, array_refs, strict=True)) | scratch_refs)

    return gpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*split_shape, config.heads, config.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((*split_shape, config.heads), jnp.float32),
        ],
        grid=(requests, config.blocks.splits, programs),
        grid_names=("request", "split", "program"),
        scratch_types=scratch,
        compiler_params=gpu.CompilerParams(approx_math=True),
        interpret=gpu.InterpretGPUParams() if config.interpret else None,
        kernel_name="paged_decode_mosaic",
    )


def _kernel(gpu: Any, config: MosaicConfig, refs: Refs) -> None:
    refs = load_scalars(refs)
    keys = _split_keys(config, refs)
    split = lax.axis_index("split")
    program = lax.axis_index("program")
    request = keys.request
    gpu.copy_gmem_to_smem(refs["q"].at[request, program], refs["q_smem"], refs["q_barrier"])
    for i in range(config.blocks.stages):
        fetch = functools.partial(_fetch, gpu, config, refs, keys, jnp.int32(i), jnp.int32(i))
        pallas().when(i < keys.blocks)(fetch)

    def load_heads(name: str) -> jax.Array:
        layout = gpu.Layout.WGMMA.reduce(0)
        return gpu.load(refs[name].at[request, program], layout=layout, optimized=False)

    factor = load_heads("factor")
    offset = load_heads("offset") if "offset" in refs else None
    gpu.barrier_wait(refs["q_barrier"])

    def full(*shape: int, value: float) -> jax.Array:
        layout = gpu.Layout.WGMMA if len(shape) == 2 else gpu.Layout.WGMMA.reduce(0)
        return gpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    lowest = full(config.heads, value=LOWEST)
    initial = SoftmaxState(
        full(config.head_dim, config.heads, value=0.0),
        lowest,
        lowest,
        full(config.blocks.block_k, config.heads, value=0.0),
    )
    body = functools.partial(_attend_block, gpu, config, refs, keys, factor, offset)
    state = lax.fori_loop(0, keys.blocks, body, initial)

    total = jnp.sum(state.weight_sum, axis=0)
    divisor = jnp.where(total == 0, 1.0, total)
    scale = jnp.exp2(state.max_weight - state.max_score) / divisor
    out = state.out * _broadcast_heads(scale, config.head_dim)
    refs["out"].at[split, request, program].T[...] = gpu.layout_cast(
        out, gpu.Layout.WGMMA_TRANSPOSED
    )
    weight = state.max_score + jnp.log2(divisor) - config.weight_shift
    refs["weight_smem"][...] = jnp.where(total == 0, MASKED, weight)
    gpu.commit_smem()
    gpu.copy_smem_to_gmem(refs["weight_smem"], refs["weight"].at[split, request, program])
    gpu.wait_smem_to_gmem(0)


def _split_keys(config: MosaicConfig, refs: Refs) -> SplitKeys:
    request = lax.axis_index("request")
    kv_head = _div(lax.axis_index("program"), config.tiles)
    length = refs["lengths"][request]
    block_k = config.blocks.block_k
    first = first_visible(refs, length - 1)
    start = _div(first, block_k) * block_k
    size = _cdiv(_cdiv(length - start, block_k), config.blocks.splits) * block_k
    start = start + lax.axis_index("split") * size
    end = jnp.minimum(start + size, length)
    blocks = _cdiv(jnp.maximum(end - start, 0), block_k)
    return SplitKeys(request, kv_head, first, start, end, blocks)


def _attend_block(
    gpu: Any,
    config: MosaicConfig,
    refs: Refs,
    keys: SplitKeys,
    factor: jax.Array,
    offset: jax.Array | None,
    i: jax.Array,
    state: SoftmaxState,
) -> SoftmaxState:
    """Process one block of keys, and start the copy of the block that reuses its slot."""
    block_k = config.blocks.block_k
    stages = config.blocks.stages
    slot = lax.rem(i, jnp.int32(stages))
    start = keys.start + i * block_k
    values = refs["v_decoded"] if "v_decoded" in refs else refs["v_smem"].at[slot]
    k_exponent = _scale_exponents(gpu, config, refs, keys, start, "k_exponent")
    v_exponent = _scale_exponents(gpu, config, refs, keys, start, "v_exponent")

    scores = pallas().run_scoped(
        functools.partial(_scores, gpu, config, refs, slot),
        gpu.ACC((block_k, config.heads), jnp.float32),
    )
    scores = scores * _broadcast_heads(factor, block_k)
    if k_exponent is not None:
        scores = scores * _broadcast_keys(exact_exp2(k_exponent), config.heads)
    if offset is not None:
        scores = scores + _broadcast_heads(offset, block_k)
    if config.softcap is not None:
        scores = (config.softcap * LOG2E) * (1.0 - 2.0 / (1.0 + jnp.exp2((2 * LOG2E) * scores)))
    scores = jnp.where(_valid(gpu, keys, start, scores.shape), scores, MASKED)

    max_score = jnp.maximum(state.max_score, jnp.max(scores, axis=0))
    weights = jnp.exp2(scores - _broadcast_heads(max_score - config.weight_shift, block_k))
    rescale = jnp.exp2(state.max_score - max_score)
    weight_sum = state.weight_sum * _broadcast_heads(rescale, block_k) + weights
    max_weight = max_score
    if v_exponent is not None:
        # Dynamic V scales are powers of two. They are added to the logarithms of the weights, which
        # have a separate running maximum.
        scores = scores + _broadcast_keys(v_exponent.astype(jnp.float32), config.heads)
        max_weight = jnp.maximum(state.max_weight, jnp.max(scores, axis=0))
        weights = jnp.exp2(scores - _broadcast_heads(max_weight - config.weight_shift, block_k))
    refs["weights_smem"].T[...] = weights.astype(config.compute)

    @pallas().when((start < keys.first) | (start + block_k > keys.end))
    def zero_invalid_values() -> None:
        valid = _valid(gpu, keys, start, values.shape)
        values[...] = jnp.where(
            valid, gpu.layout_cast(values[...], gpu.Layout.WGMMA), jnp.zeros((), values.dtype)
        )

    def fetch_next() -> None:
        fetch = functools.partial(_fetch, gpu, config, refs, keys, i + stages, slot)
        pallas().when(i + stages < keys.blocks)(fetch)

    gpu.commit_smem()
    if is_fp8(config.element):
        fetch_next()

    def weighted_sum(accumulator: Any) -> jax.Array:
        gpu.wgmma(accumulator, values.T, refs["weights_smem"].T)
        return accumulator[...]

    block_out = pallas().run_scoped(
        weighted_sum, gpu.ACC((config.head_dim, config.heads), jnp.float32)
    )
    if not is_fp8(config.element):
        fetch_next()
    out_rescale = jnp.exp2(state.max_weight - max_weight)
    out = state.out * _broadcast_heads(out_rescale, config.head_dim) + block_out
    return SoftmaxState(out, max_weight, max_score, weight_sum)


def _fetch(
    gpu: Any, config: MosaicConfig, refs: Refs, keys: SplitKeys, block: jax.Array, slot: jax.Array
) -> None:
    """Start the copies of a block's keys and values to its slot."""
    size = config.copy_tokens
    for offset in range(0, config.blocks.block_k, size):
        token = keys.start + block * config.blocks.block_k + offset
        destination = (slot, pallas().ds(offset, size))
        for name in ("k", "v"):
            source = refs[name].at[_pool_index(config, refs, keys, token, name)]
            smem = refs[f"{name}_smem"].at[destination]
            gpu.copy_gmem_to_smem(source, smem, refs[f"{name}_barrier"].at[slot])


def _pool_index(
    config: MosaicConfig, refs: Refs, keys: SplitKeys, token: jax.Array, name: str
) -> tuple[Any, ...]:
    """Return the index of the `copy_tokens` tokens from `token` on in the pool `name`.

    Invalid tokens use the page of a valid one, because other page numbers are not read. A page past
    the end is replaced by one that exists.
    """
    valid_token = jnp.clip(token, keys.first, keys.end - 1)
    page = refs["page_table"][keys.request, _div(valid_token, config.page_size)]
    row = refs["first_exponent_row" if name.endswith("exponent") else "first_row"] + page
    slots: Any = slice(None)
    if config.page_size > config.copy_tokens:
        slots = pallas().ds(lax.rem(token, jnp.int32(config.page_size)), config.copy_tokens)
    return jnp.minimum(row, refs[name].shape[0] - 1), keys.kv_head, slots


def _scale_exponents(
    gpu: Any, config: MosaicConfig, refs: Refs, keys: SplitKeys, start: jax.Array, name: str
) -> jax.Array | None:
    """Return unbiased exponents of dynamic scales, `[block_k]`; arbitrary for invalid tokens."""
    if name not in refs:
        return None
    source = refs[name].at[_pool_index(config, refs, keys, start, name)]
    exponent = gpu.load(source, layout=gpu.Layout.WGMMA.reduce(1), optimized=False)
    return exponent.astype(jnp.int32) - 127


def _scores(
    gpu: Any, config: MosaicConfig, refs: Refs, slot: jax.Array, accumulator: Any
) -> jax.Array:
    """Return the products of a block's keys with the queries, `[block_k, heads]`.

    FP8 values are converted to float16 meanwhile.
    """
    gpu.barrier_wait(refs["k_barrier"].at[slot])
    keys = refs["k_smem"].at[slot]
    if is_fp8(config.element):
        upcast = gpu.layout_cast(keys[...], gpu.Layout.WGMMA_UPCAST_2X)
        keys = gpu.layout_cast(upcast, gpu.Layout.WGMMA).astype(FLOAT16)
    if "k_decoded" in refs:  # the interpreter multiplies only operands in shared memory
        refs["k_decoded"][...] = keys
        keys = refs["k_decoded"]
    gpu.wgmma(accumulator, keys, refs["q_smem"].T)
    gpu.barrier_wait(refs["v_barrier"].at[slot])
    if is_fp8(config.element):
        upcast = gpu.layout_cast(refs["v_smem"][slot], gpu.Layout.WGMMA_UPCAST_2X)
        refs["v_decoded"][...] = upcast.astype(FLOAT16)
    return accumulator[...]


def _valid(gpu: Any, keys: SplitKeys, start: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return which keys of the block at `start`, the rows of `shape`, are in the key range."""
    token = start + gpu.broadcasted_iota(jnp.int32, shape, 0, layout=gpu.Layout.WGMMA)
    return (token >= keys.first) & (token < keys.end)


def _broadcast_heads(x: jax.Array, rows: int) -> jax.Array:
    """Return a vector of heads as `[rows, heads]`."""
    return lax.broadcast_in_dim(x, (rows, *x.shape), [1])


def _broadcast_keys(x: jax.Array, columns: int) -> jax.Array:
    """Return a vector of keys as `[keys, columns]`."""
    return lax.broadcast_in_dim(x, (*x.shape, columns), [0])


def _div(x: jax.Array, by: int) -> jax.Array:
    return lax.div(x, jnp.int32(by))


def _cdiv(x: jax.Array, by: int) -> jax.Array:
    return _div(x + (by - 1), by)
