"""Paged decode on Pallas Mosaic GPU. EXPERIMENTAL: compiled for Hopper, never run on a GPU.

Arguments and guarantees are those of `paged_decode` (pallas_kernels/contract.md), for fewer types
and sizes: see `paged_decode_mosaic`. The kernel is in mosaic_kernel.py. XLA scales the queries and
merges splits, sinks and V scales: three small launches before the kernel and one after it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import NotSupported, cdiv
from pallas_kernels.fp8 import FLOAT16, FLOAT32, exact_exp2
from pallas_kernels.kernel_inputs import (
    LayerView,
    attention_inputs,
    check_attention,
    softmax_scale,
)
from pallas_kernels.paged_decode.mosaic_kernel import MosaicBlocks, MosaicConfig, build_kernel
from pallas_kernels.softmax_loop import LOG2E

HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128, 256)
MAX_SPLITS = 64
UNCHANGED_INPUTS = (
    "page_table",
    "lengths",
    "k_exponent",
    "v_exponent",
    "layer",
    "first_row",
    "first_exponent_row",
    "window",
)
TESTED_JAX = "0.11.2"


def paged_decode_mosaic(
    q: Float[Array, "requests q_heads head_dim"],
    kv: LayerView,
    page_table: Int[Array, "requests pages"],
    lengths: Int[Array, " requests"],
    *,
    element: Any = None,
    score_offset: Float[Array, "requests q_heads"] | None = None,
    sm_scale: float | None = None,
    softcap: float | None = None,
    blocks: MosaicBlocks | None = None,
    interpret: bool = False,
) -> Float[Array, "requests q_heads head_dim"]:
    """Return the result of `paged_decode`, on Hopper GPUs with jax >= 0.11.

    Raises `NotSupported` on other GPUs and versions, for float32 queries or pages, for sizes other
    than `HEAD_DIMS` and `PAGE_SIZES`, and for dynamic scales in pages smaller than a block.
    """
    gpu = mosaic_gpu()
    requests, q_heads, head_dim = q.shape
    element, compute, group = check_attention(q_heads, head_dim, q.dtype, kv, element)
    kv_heads, page_size = kv.k_pages.shape[1:3]
    # Tiles of 16 or 32 heads: with more, registers spill.
    tiles = cdiv(group, 4096 // max(128, head_dim))
    dynamic = kv.k_exponent is not None
    if blocks is None:
        blocks = choose_mosaic_blocks(
            programs=requests * kv_heads * tiles,
            head_dim=head_dim,
            tokens=page_table.shape[1] * page_size,
            element=element,
            dynamic=dynamic,
        )
    config = MosaicConfig(
        element=element,
        compute=compute,
        page_size=page_size,
        head_dim=head_dim,
        heads=cdiv(cdiv(group, tiles), 8) * 8,
        tiles=tiles,
        softcap=softcap,
        blocks=blocks,
        interpret=interpret,
    )
    _check_supported(config, dynamic=dynamic)

    inputs = attention_inputs(q, kv, page_table, lengths, score_offset=score_offset)
    present = {name: x for name, x in inputs.items() if x is not None}
    layer = present["layer"][0]
    for name in ("k_scale", "v_scale", "sinks"):
        if name in present:
            present[name] = present[name][layer]
    out, weight = _run(
        gpu, config, _kernel_arrays(config, present, softmax_scale(head_dim, sm_scale))
    )
    out = _combine(
        _by_head(config, group, out),
        _by_head(config, group, weight[..., None]),
        present.get("sinks"),
    )
    if "v_scale" in present:
        out = out * jnp.repeat(present["v_scale"], group, axis=0)
    return out.astype(q.dtype)


def mosaic_gpu() -> Any:
    """Return the Mosaic GPU module. Raise `NotSupported` if this jax has none."""
    if jax.__version_info__ < (0, 11):
        raise NotSupported(
            f"decode on Mosaic GPU needs jax >= 0.11, and this is jax {jax.__version__}."
        )
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as error:
        raise NotSupported(f"jax {jax.__version__} has no Mosaic GPU here: {error}") from error
    return mosaic_gpu


def choose_mosaic_blocks(
    *, programs: int, head_dim: int, tokens: int, element: np.dtype, dynamic: bool, cores: int = 132
) -> MosaicBlocks:
    """Return blocks for requests of up to `tokens` tokens.

    A program has 32 KiB in flight, and a multiprocessor about four of `programs` times the splits.
    """
    block_k = 128 if head_dim == 64 and not dynamic else 64
    splits = max(1, min(cdiv(4 * cores, programs), cdiv(tokens, block_k), MAX_SPLITS))
    block_bytes = 2 * block_k * head_dim * element.itemsize
    return MosaicBlocks(block_k, stages=max(2, 2**15 // block_bytes), splits=splits)


def _check_supported(config: MosaicConfig, *, dynamic: bool) -> None:
    if config.compute == FLOAT32:
        raise NotSupported(
            "float32 queries or pages: decode on Mosaic GPU multiplies 16-bit operands."
        )
    if config.head_dim not in HEAD_DIMS or config.page_size not in PAGE_SIZES:
        raise NotSupported(
            f"head_dim={config.head_dim} in pages of {config.page_size} tokens: decode on Mosaic "
            f"GPU copies whole tiles, with head_dim in {HEAD_DIMS} and page_size in {PAGE_SIZES}."
        )
    if dynamic and config.page_size < config.blocks.block_k:
        raise NotSupported(
            f"token-head scales in pages of {config.page_size}: decode on Mosaic GPU reads those "
            f"of a block at once, from pages of at least {config.blocks.block_k} tokens."
        )
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if capability != "9.0" and not config.interpret:
        raise NotSupported(
            f"compute capability {capability}: decode on Mosaic GPU supports Hopper, 9.0."
        )


def _run(gpu: Any, config: MosaicConfig, arrays: dict[str, jax.Array]) -> Any:
    """Run the kernel. Raise `NotSupported` if another version of jax has another API."""
    try:
        return build_kernel(gpu, config, arrays)(*arrays.values())
    except (AttributeError, NotImplementedError, TypeError) as error:
        # Names, arguments and supported operations of Mosaic GPU change between releases.
        if jax.__version__ == TESTED_JAX:
            raise
        raise NotSupported(
            f"Mosaic GPU of jax {jax.__version__} does not support this kernel, written for jax "
            f"{TESTED_JAX}: {error}"
        ) from error


def _kernel_arrays(
    config: MosaicConfig, inputs: dict[str, Any], sm_scale: float
) -> dict[str, jax.Array]:
    """Return the arrays that the kernel reads, by name."""
    unit = LOG2E if config.softcap is None else 1 / config.softcap
    kv_heads = inputs["k"].shape[1]
    rows = _by_program(config, kv_heads, inputs["q"]).astype(FLOAT32)
    if "k_scale" in inputs:
        rows = rows * jnp.repeat(inputs["k_scale"], config.tiles, axis=0)[:, None, :]
    if config.compute == FLOAT16:
        rows, factor = _normalize_rows(rows)
    else:
        factor = jnp.ones(rows.shape[:-1], FLOAT32)
    arrays = {
        "q": rows.astype(config.compute),
        "factor": factor * (sm_scale * unit),
        "window": jnp.zeros_like(inputs["first_row"]),
    }
    if "score_offset" in inputs:
        offset = (inputs["score_offset"] * unit)[..., None]
        arrays["offset"] = _by_program(config, kv_heads, offset)[..., 0]
    arrays |= {name: lax.bitcast_convert_type(inputs[name], config.element) for name in "kv"}
    return arrays | {name: inputs[name] for name in UNCHANGED_INPUTS if name in inputs}


def _normalize_rows(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divide rows by powers of two that bring their largest element into 1 .. 2.

    Returns the rows and the powers.
    """
    bits = lax.bitcast_convert_type(jnp.max(jnp.abs(rows), axis=-1), jnp.int32)
    exponent = jnp.clip(bits >> 23, 1, 253) - 127
    return rows * exact_exp2(-exponent)[..., None], exact_exp2(exponent)


def _by_program(config: MosaicConfig, kv_heads: int, x: jax.Array) -> jax.Array:
    """Reshape `[requests, q_heads, ...]` to `[requests, programs, heads, ...]`, zero-padded."""
    requests, q_heads, last = x.shape
    x = x.reshape(requests, kv_heads, q_heads // kv_heads, last)
    padding = config.tiles * config.heads - x.shape[2]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))
    return x.reshape(requests, kv_heads * config.tiles, config.heads, last)


def _by_head(config: MosaicConfig, group: int, x: jax.Array) -> jax.Array:
    """Reshape `[splits, requests, programs, heads, ...]` to `[splits, requests, q_heads, ...]`."""
    splits, requests, programs, heads, last = x.shape
    x = x.reshape(splits, requests, programs // config.tiles, config.tiles * heads, last)
    return x[:, :, :, :group].reshape(splits, requests, -1, last)


def _combine(out: jax.Array, weight: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Return the weighted mean of the splits' outputs.

    Args:
      out: `[splits, requests, q_heads, head_dim]`.
      weight: base-2 logarithms of the softmax sums, `[splits, requests, q_heads, 1]`.
      sinks: `[q_heads]`, weights of zero outputs; or None.
    """
    largest = jnp.max(weight, axis=0)
    total = jnp.zeros_like(largest)
    if sinks is not None:
        sink = sinks[:, None] * LOG2E
        largest = jnp.maximum(largest, sink)
        total = jnp.exp2(sink - largest)
    fraction = jnp.exp2(weight - largest)
    return jnp.sum(out * fraction, axis=0) / (total + jnp.sum(fraction, axis=0))
