"""Decode on Pallas Mosaic GPU. EXPERIMENTAL: compiled for Hopper and interpreted on a CPU, never yet run on a GPU.

The contract is that of `paged_decode` (pallas_kernels/contract.md), narrower: `NotSupported` says where. The kernel itself is
mosaic_kernel.py. What goes into queries and output (static scales, softmax factor, sinks, shares) is left to XLA: three small
launches before the kernel and one after it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.attend import LOG2E
from pallas_kernels.backend import cdiv
from pallas_kernels.elements import FLOAT16, FLOAT32, power
from pallas_kernels.errors import NotSupported
from pallas_kernels.options import (
    ByLayer,
    ChannelScale,
    Exponents,
    Pool,
    Scalar,
    checked,
    operands,
    scale_of_scores,
)
from pallas_kernels.paged_decode.mosaic_kernel import MosaicBlocks, MosaicHow, launch

HEAD_DIMS, PAGE_SIZES = (64, 128, 256), (16, 32, 64, 128, 256)
MOST_SPLITS = 64
AS_THEY_ARE = (
    "page_table",
    "lengths",
    "k_exponent",
    "v_exponent",
    "layer",
    "first_row",
    "first_exponent_row",
    "window",
)
MADE_WITH = "0.11.2"


def paged_decode_mosaic(
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
    blocks: MosaicBlocks | None = None,
    interpret: bool = False,
) -> Float[Array, "requests q_heads head_dim"]:
    """As `paged_decode`, on Hopper GPUs with jax >= 0.11. `NotSupported` elsewhere, for float32 queries or pages, for sizes
    beyond `HEAD_DIMS` and `PAGE_SIZES`, and for scales by token and head in pages smaller than a block."""
    gpu = mosaic_gpu()
    requests, q_heads, head_dim = q.shape
    element, compute, group = checked(
        q_heads, head_dim, q.dtype, k_pages, v_pages, element, k_exponent, v_exponent
    )
    kv_heads, page_size = k_pages.shape[1:3]
    tiles = cdiv(group, 4096 // max(128, head_dim))  # of 16 or 32 heads: with more, registers spill
    dynamic = k_exponent is not None
    if blocks is None:
        programs, tokens = requests * kv_heads * tiles, page_table.shape[1] * page_size
        blocks = mosaic_blocks_for(
            programs=programs, head_dim=head_dim, tokens=tokens, element=element, dynamic=dynamic
        )
    how = MosaicHow(
        element,
        compute,
        page_size,
        head_dim,
        cdiv(cdiv(group, tiles), 8) * 8,
        tiles,
        softcap,
        blocks,
        interpret,
    )
    _refuse(how, dynamic=dynamic)

    given = operands(
        q, k_pages, v_pages, page_table, lengths, layer=layer, first_row=first_row, first_exponent_row=first_exponent_row,
        k_scale=k_scale, v_scale=v_scale, k_exponent=k_exponent, v_exponent=v_exponent, window=window, sinks=sinks,
        score_offset=score_offset,
    )  # fmt: skip
    given = {name: x for name, x in given.items() if x is not None}
    at = given["layer"][0]
    given |= {name: given[name][at] for name in ("k_scale", "v_scale", "sinks") if name in given}
    try:
        out, weight = launch(gpu, how, _operands(how, given, scale_of_scores(head_dim, sm_scale)))
    except (AttributeError, NotImplementedError, TypeError) as error:
        # The API of Mosaic GPU changes between releases: names, arguments, supported operations.
        raise NotSupported(
            f"Mosaic GPU of jax {jax.__version__} does not take this kernel, written for jax "
            f"{MADE_WITH}: {error}"
        ) from error
    out = _together(
        _by_head(how, group, out), _by_head(how, group, weight[..., None]), given.get("sinks")
    )
    if "v_scale" in given:
        out = out * jnp.repeat(given["v_scale"], group, axis=0)
    return out.astype(q.dtype)


def mosaic_gpu() -> Any:
    """Mosaic GPU's module, or `NotSupported`."""
    if jax.__version_info__ < (0, 11):
        raise NotSupported(
            f"decode on Mosaic GPU needs jax >= 0.11, and this is jax {jax.__version__}."
        )
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as error:
        raise NotSupported(f"jax {jax.__version__} has no Mosaic GPU here: {error}") from error
    return mosaic_gpu


def mosaic_blocks_for(
    *, programs: int, head_dim: int, tokens: int, element: np.dtype, dynamic: bool, cores: int = 132
) -> MosaicBlocks:
    """Blocks for so many programs and requests of up to `tokens` tokens: 32 KiB in flight for each program, four to a core."""
    block_k = 128 if head_dim == 64 and not dynamic else 64
    splits = max(1, min(cdiv(4 * cores, programs), cdiv(tokens, block_k), MOST_SPLITS))
    return MosaicBlocks(
        block_k, stages=max(2, 2**15 // (2 * block_k * head_dim * element.itemsize)), splits=splits
    )


def _refuse(how: MosaicHow, *, dynamic: bool) -> None:
    if how.compute == FLOAT32:
        raise NotSupported(
            "float32 queries or pages: decode on Mosaic GPU multiplies 16-bit operands."
        )
    if how.head_dim not in HEAD_DIMS or how.page_size not in PAGE_SIZES:
        raise NotSupported(
            f"head_dim={how.head_dim} in pages of {how.page_size} tokens: decode on Mosaic GPU copies whole tiles, of heads of "
            f"{HEAD_DIMS} and pages of {PAGE_SIZES}."
        )
    if dynamic and how.page_size < how.blocks.block_k:
        raise NotSupported(
            f"scales by token and head in pages of {how.page_size}: decode on Mosaic GPU reads those of a block at once, from "
            f"pages of at least {how.blocks.block_k} tokens."
        )
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if capability != "9.0" and not how.interpret:
        raise NotSupported(
            f"compute capability {capability}: decode on Mosaic GPU is made for Hopper, 9.0."
        )


def _operands(how: MosaicHow, given: dict[str, Any], sm_scale: float) -> dict[str, jax.Array]:
    """What the kernel reads, by name."""
    unit, kv_heads = LOG2E if how.softcap is None else 1 / how.softcap, given["k"].shape[1]
    rows = _by_program(how, kv_heads, given["q"]).astype(FLOAT32)
    if "k_scale" in given:
        rows = rows * jnp.repeat(given["k_scale"], how.tiles, axis=0)[:, None, :]
    rows, factor = (
        _normal(rows) if how.compute == FLOAT16 else (rows, jnp.ones(rows.shape[:-1], FLOAT32))
    )
    made = {
        "q": rows.astype(how.compute),
        "factor": factor * (sm_scale * unit),
        "window": jnp.zeros_like(given["first_row"]),
    }
    if "score_offset" in given:
        made["offset"] = _by_program(how, kv_heads, (given["score_offset"] * unit)[..., None])[
            ..., 0
        ]
    made |= {name: lax.bitcast_convert_type(given[name], how.element) for name in "kv"}
    return made | {name: given[name] for name in AS_THEY_ARE if name in given}


def _normal(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows divided by powers of two that bring their largest element to 1 .. 2, and those powers."""
    bits = lax.bitcast_convert_type(jnp.max(jnp.abs(rows), axis=-1), jnp.int32)
    exponent = jnp.clip(bits >> 23, 1, 253) - 127
    return rows * power(-exponent)[..., None], power(exponent)


def _by_program(how: MosaicHow, kv_heads: int, x: jax.Array) -> jax.Array:
    """`[requests, q_heads, ...]` as `[requests, programs, heads, ...]`, groups padded with zeros."""
    requests, q_heads, last = x.shape
    x = x.reshape(requests, kv_heads, q_heads // kv_heads, last)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, how.tiles * how.heads - x.shape[2]), (0, 0)))
    return x.reshape(requests, kv_heads * how.tiles, how.heads, last)


def _by_head(how: MosaicHow, group: int, x: jax.Array) -> jax.Array:
    """`[splits, requests, programs, heads, ...]` as `[splits, requests, q_heads, ...]`."""
    splits, requests, programs, heads, last = x.shape
    x = x.reshape(splits, requests, programs // how.tiles, how.tiles * heads, last)[:, :, :, :group]
    return x.reshape(splits, requests, -1, last)


def _together(out: jax.Array, weight: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """The mean of shares `[splits, requests, q_heads, head_dim]` by their weights `[splits, requests, q_heads, 1]`, which are
    base-2 logarithms; a sink is one more share, of zeros."""
    peak = jnp.max(weight, axis=0)
    total = jnp.zeros_like(peak)
    if sinks is not None:
        sink = sinks[:, None] * LOG2E
        peak = jnp.maximum(peak, sink)
        total = jnp.exp2(sink - peak)
    share = jnp.exp2(weight - peak)
    return jnp.sum(out * share, axis=0) / (total + jnp.sum(share, axis=0))
