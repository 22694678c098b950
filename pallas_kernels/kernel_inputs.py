"""Inputs of the attention and write kernels: validation, compile-time configuration, arrays."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.backend import NotSupported, Refs, check_offsets, power_of_two
from pallas_kernels.fp8 import ELEMENTS, FLOAT32, compute_dtype, is_fp8

Pool = Any  # stored bits or values, [rows, kv_heads, page_size, head_dim]
Exponents = UInt8[Array, "exponent_rows kv_heads page_size"] | None
ChannelScale = Float[Array, "*layers kv_heads head_dim"] | None
Scalar = Int[Array, ""] | int
LayerScalar = Int[Array, "*layers"] | int  # one value, or one per layer

MAX_HEAD_DIM = 256
HOPPER = (9, 0)  # compute capability; Hopper's tensor cores read operands from shared memory


class LayerView(NamedTuple):
    """The KV cache as attention in one layer sees it: pages, scales, window and sinks.

    A pytree. Fields marked (L) belong to one layer. If `layer` is given, they have a leading axis
    of layers, and the kernel reads the values of `layer` in place. Slicing them beforehand would
    launch a kernel for each of them, in every layer.

    Attributes:
      k_pages: `[rows, kv_heads, page_size, head_dim]`, the pages of all layers.
      v_pages: like `k_pages`.
      layer: layer index, may be traced; None if (L) fields have no axis of layers.
      first_row: (L) row of `k_pages` with page 0 of the layer.
      k_scale: (L) static K scales, `[kv_heads, head_dim]`; 1 if None.
      v_scale: (L) static V scales.
      k_exponent: dynamic K scales, uint8 `[exponent_rows, kv_heads, page_size]`, or None.
        The scale of exponent `e` is `2 ** (e - 127)`.
      v_exponent: dynamic V scales.
      first_exponent_row: (L) like `first_row`, for the exponents; `first_row` if None.
      window: (L) sliding window in tokens; 0 or None attends to all previous tokens.
      sinks: (L) `[q_heads]` logits added to the softmax denominator.
    """

    k_pages: Pool
    v_pages: Pool
    layer: Scalar | None = None
    first_row: LayerScalar = 0
    k_scale: ChannelScale = None
    v_scale: ChannelScale = None
    k_exponent: Exponents = None
    v_exponent: Exponents = None
    first_exponent_row: LayerScalar | None = None
    window: LayerScalar | None = None
    sinks: Float[Array, "*layers q_heads"] | None = None


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Compile-time parameters of an attention kernel, in addition to the shapes of its arrays.

    Attributes:
      element: the type of the stored bits.
      compute: operand type of both matmuls.
      page_size: tokens per page.
      head_dim: channels per head.
      group: query heads per KV head.
      rows: query rows per block, a power of two.
      block_k: keys per block, a power of two.
      sm_scale: the factor on scores.
      softcap: soft cap of scores, or None.
      causal: rows have different positions (prefill).
      capability: compute capability of the GPU.
      interpret: run in interpret mode.
      transposed: scores are `[block_k, rows]` and outputs `[channels, rows]`.
    """

    element: np.dtype
    compute: np.dtype
    page_size: int
    head_dim: int
    group: int
    rows: int
    block_k: int
    sm_scale: float
    softcap: float | None
    causal: bool
    capability: tuple[int, int]
    interpret: bool
    transposed: bool = False

    @property
    def native_e4m3(self) -> bool:
        """Return whether the GPU has an instruction that converts E4M3."""
        return self.capability >= (8, 9)

    @property
    def channels(self) -> int:
        """`head_dim`, padded to a power of two and to the minimum of tensor cores."""
        return max(16, power_of_two(self.head_dim))

    @property
    def weight_shift(self) -> float:
        """Softmax weights are multiplied by `2 ** weight_shift`.

        A float16 then represents weights down to 2**-34.
        """
        return 10.0 if self.compute == np.float16 else 0.0

    @property
    def scale_tiles(self) -> bool:
        """Return whether dynamic scales multiply K and V tiles instead of scores and weights.

        This is faster if there are many rows and tiles go through shared memory anyway.
        """
        return self.causal and self.compute == np.float16 and self.capability >= HOPPER

    @property
    def one_page(self) -> bool:
        """Return whether every block of keys lies in one page."""
        return self.page_size % self.block_k == 0


def check_pool(
    pages: Any, *, element: Any = None, exponents: Any = None, interpret: bool = False
) -> np.dtype:
    """Return the element type of a pool. Raise `NotSupported` if the kernels cannot read it.

    Args:
      pages: `[rows, kv_heads, page_size, head_dim]`; a shape and dtype suffice.
      element: the type of the stored bits; the dtype of `pages` if None.
      exponents: dynamic scales, or None.
      interpret: whether the kernels run in interpret mode, where pools may have any size.
    """
    element = np.dtype(pages.dtype if element is None else element)
    if element not in ELEMENTS:
        supported = ", ".join(e.name for e in ELEMENTS)
        raise NotSupported(f"pages of {element}: the kernels support {supported}.")
    if np.dtype(pages.dtype).itemsize != element.itemsize:
        raise NotSupported(
            f"pages of {pages.dtype} with byte-split {element.name}: the kernels read whole "
            "elements."
        )
    if pages.shape[3] > MAX_HEAD_DIM:
        raise NotSupported(
            f"head_dim={pages.shape[3]}: the kernels support at most {MAX_HEAD_DIM}."
        )
    if exponents is not None and not is_fp8(element):
        raise NotSupported(f"token-head scales require FP8 pages, got {element.name}.")
    if not interpret:
        check_offsets("the pool", pages)
    return element


def check_attention(
    q_heads: int, head_dim: int, q_dtype: Any, kv: LayerView, element: Any
) -> tuple[np.dtype, np.dtype, int]:
    """Return the element type, the operand type of the matmuls and the query heads per KV head.

    Raises `NotSupported` for unsupported types and sizes, `ValueError` for inconsistent shapes.
    """
    element = check_element(head_dim, kv.k_pages, kv.v_pages, element, kv.k_exponent, kv.v_exponent)
    kv_heads = kv.k_pages.shape[1]
    if q_heads % kv_heads:
        raise ValueError(
            f"{q_heads} query heads and {kv_heads} KV heads: kv_heads must divide the query heads."
        )
    return element, compute_dtype(element, np.dtype(q_dtype)), q_heads // kv_heads


def check_element(
    head_dim: int, k_pages: Pool, v_pages: Pool, element: Any, k_exponent: Any, v_exponent: Any
) -> np.dtype:
    """Return the element type of both pools.

    Raises `NotSupported` for unsupported types and sizes, `ValueError` for inconsistent shapes.
    """
    same = k_pages.shape == v_pages.shape and k_pages.dtype == v_pages.dtype
    if not same or k_pages.shape[3] != head_dim:
        raise ValueError(
            f"head_dim={head_dim}, keys {k_pages.dtype} {k_pages.shape} and values "
            f"{v_pages.dtype} {v_pages.shape}: both must be equal, "
            "[rows, kv_heads, page_size, head_dim]."
        )
    if (k_exponent is None) != (v_exponent is None):
        raise ValueError("k_exponent and v_exponent: both or neither.")
    # `launch` checks offsets.
    return check_pool(k_pages, element=element, exponents=k_exponent, interpret=True)


def attention_inputs(
    q: Float[Array, "queries q_heads head_dim"],
    kv: LayerView,
    page_table: Int[Array, "requests pages"],
    lengths: Int[Array, " requests"],
    *,
    score_offset: Float[Array, "queries q_heads"] | None,
) -> dict[str, jax.Array | None]:
    """Return the arrays that attention kernels read, by name.

    Raises `ValueError` for shapes that do not match the pages and queries.
    """
    by_layer = layer_inputs(
        kv.layer,
        {
            "first_row": kv.first_row,
            "first_exponent_row": kv.first_exponent_row,
            "k_scale": kv.k_scale,
            "v_scale": kv.v_scale,
            "window": kv.window,
            "sinks": kv.sinks,
        },
    )
    inputs = by_layer | {
        "q": q,
        "k": kv.k_pages,
        "v": kv.v_pages,
        "page_table": page_table,
        "lengths": lengths,
        "k_exponent": kv.k_exponent,
        "v_exponent": kv.v_exponent,
        "score_offset": None if score_offset is None else score_offset.astype(FLOAT32),
    }
    _, kv_heads, page_size, head_dim = kv.k_pages.shape
    expected = {
        "k_scale": (kv_heads, head_dim),
        "v_scale": (kv_heads, head_dim),
        "k_exponent": (kv_heads, page_size),
        "v_exponent": (kv_heads, page_size),
        "sinks": (q.shape[1],),
        "score_offset": (q.shape[1],),
    }
    for name, shape in expected.items():
        x = inputs[name]
        if x is not None and x.shape[1:] != shape:
            raise ValueError(
                f"{name} has shape {x.shape[1:]}, with queries {q.shape} and pages "
                f"{kv.k_pages.shape}: it must have {shape}."
            )
    return inputs


# Inputs that belong to one layer, and their number of axes.
LAYER_SCALARS = ("first_row", "first_exponent_row", "window")
LAYER_AXES = {
    "first_row": 0,
    "first_exponent_row": 0,
    "window": 0,
    "sinks": 1,
    "k_scale": 2,
    "v_scale": 2,
    "k_inverse": 2,
    "v_inverse": 2,
    "k_offset": 2,
}


def layer_inputs(layer: Scalar | None, arrays: dict[str, Any]) -> dict[str, jax.Array | None]:
    """Return `layer` and arrays with a leading axis of layers, which the kernel indexes.

    Args:
      layer: the layer index. If None, the arrays belong to one layer, and the axis is added.
      arrays: by name, among `LAYER_AXES`; None is passed on. `first_exponent_row` defaults to
        `first_row`.
    """
    if arrays["first_exponent_row"] is None:
        arrays = arrays | {"first_exponent_row": arrays["first_row"]}
    index = jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)
    inputs: dict[str, jax.Array | None] = {"layer": index}
    for name, x in arrays.items():
        if x is not None:
            x = _with_layer_axis(name, x, layer)
        inputs[name] = x
    return inputs


def _with_layer_axis(name: str, x: Any, layer: Scalar | None) -> jax.Array:
    x = jnp.asarray(x, jnp.int32) if name in LAYER_SCALARS else jnp.asarray(x).astype(FLOAT32)
    axes = LAYER_AXES[name]
    if x.ndim != axes + (layer is not None):
        expected = "an axis of layers and" if layer is not None else "no axis of layers and"
        raise ValueError(
            f"{name} has shape {x.shape}: with layer={layer!r} it must have {expected} {axes} axes."
        )
    return x.reshape(1, *x.shape) if layer is None else x


def load_scalars(refs: Refs) -> Refs:
    """Return the references with the layer index and the scalars of the layer loaded."""
    layer = refs["layer"][0]
    return refs | {"layer": layer} | {n: refs[n][layer] for n in LAYER_SCALARS if n in refs}


def softmax_scale(head_dim: int, sm_scale: float | None) -> float:
    """Return `sm_scale`, by default `1 / sqrt(head_dim)`."""
    return 1 / math.sqrt(head_dim) if sm_scale is None else float(sm_scale)
