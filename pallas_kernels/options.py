"""What both attention kernels are asked for, checked once: arrays that vary by call, and what a kernel is compiled for."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.backend import check_offsets, power_of_two
from pallas_kernels.elements import ELEMENTS, FLOAT32, is_fp8, multiplied_in
from pallas_kernels.errors import NotSupported

Pool = Any  # stored bits [rows, kv_heads, page_size, head_dim]
Exponents = UInt8[Array, "exponent_rows kv_heads page_size"] | None
ChannelScale = Float[Array, "*layers kv_heads head_dim"] | None
Scalar = Int[Array, ""] | int
ByLayer = Int[Array, "*layers"] | int  # a scalar, or one for each layer

MOST_HEAD_DIM = 256
HOPPER = (
    9,
    0,
)  # the compute capability that kernels are made for unless said; its tensor cores read shared memory


@dataclasses.dataclass(frozen=True)
class How:
    """What a kernel is compiled for, apart from the shapes of its arrays."""

    element: np.dtype  # what the stored bits mean
    compute: np.dtype  # what both products multiply
    page_size: int
    head_dim: int
    group: int  # query heads of one KV head
    rows: int  # queries handled together, a power of two
    block_k: int  # keys handled together, a power of two
    sm_scale: float
    softcap: float | None
    causal: bool  # rows stand at different positions
    capability: tuple[int, int]
    interpret: bool
    turned: bool = False  # scores are `[block_k, rows]` and outputs `[channels, rows]`

    @property
    def native_e4m3(self) -> bool:
        """Whether the GPU converts E4M3 by itself."""
        return self.capability >= (8, 9)

    @property
    def channels(self) -> int:
        """`head_dim` as arrays in a kernel have it: a power of two, and no less than tensor cores take."""
        return max(16, power_of_two(self.head_dim))

    @property
    def shift(self) -> float:
        """Weights are kept larger by `2 ** shift`: a float16 then keeps them down to 2**-34."""
        return 10.0 if self.compute == np.float16 else 0.0

    @property
    def scale_tiles(self) -> bool:
        """Whether dynamic scales multiply tiles of keys and values rather than scores and weights: where tiles go to shared
        memory anyway and rows are many."""
        return self.causal and self.compute == np.float16 and self.capability >= HOPPER

    @property
    def one_page(self) -> bool:
        """Whether a block of keys lies in one page."""
        return self.page_size % self.block_k == 0


def check_pool(
    pages: Any, *, element: Any = None, exponents: Any = None, interpret: bool = False
) -> np.dtype:
    """The element of a pool (shapes suffice) that kernels read, or `NotSupported` saying why they do not."""
    element = np.dtype(pages.dtype if element is None else element)
    if element not in ELEMENTS:
        raise NotSupported(
            f"pages of {element}: kernels know {', '.join(e.name for e in ELEMENTS)}."
        )
    if np.dtype(pages.dtype).itemsize != element.itemsize:
        raise NotSupported(
            f"pages of {pages.dtype} hold {element.name} in pieces: kernels know whole elements."
        )
    if pages.shape[3] > MOST_HEAD_DIM:
        raise NotSupported(
            f"head_dim={pages.shape[3]}: kernels are made for up to {MOST_HEAD_DIM}."
        )
    if exponents is not None and not is_fp8(element):
        raise NotSupported(
            f"scales by token and head belong to FP8 pages, and these hold {element.name}."
        )
    if not interpret:
        check_offsets("the pool", pages)
    return element


def checked(
    q_heads: int,
    head_dim: int,
    q_dtype: Any,
    k_pages: Pool,
    v_pages: Pool,
    element: Any,
    k_exponent: Any,
    v_exponent: Any,
) -> tuple[np.dtype, np.dtype, int]:
    """The element, the type that is multiplied and the group. Raises `NotSupported`, or `ValueError` for what does not fit."""
    element = checked_element(head_dim, k_pages, v_pages, element, k_exponent, v_exponent)
    kv_heads = k_pages.shape[1]
    if q_heads % kv_heads:
        raise ValueError(
            f"{q_heads} query heads and keys of {kv_heads} heads: kv_heads must divide the query heads."
        )
    return element, multiplied_in(element, np.dtype(q_dtype)), q_heads // kv_heads


def checked_element(
    head_dim: int, k_pages: Pool, v_pages: Pool, element: Any, k_exponent: Any, v_exponent: Any
) -> np.dtype:
    """What the bits in pools mean. Raises `NotSupported`, or `ValueError` for what does not fit."""
    if (
        k_pages.shape != v_pages.shape
        or k_pages.dtype != v_pages.dtype
        or k_pages.shape[3] != head_dim
    ):
        raise ValueError(
            f"head_dim={head_dim} against keys {k_pages.dtype} {k_pages.shape} and values {v_pages.dtype} {v_pages.shape}: "
            "both must be alike, [rows, kv_heads, page_size, head_dim]."
        )
    if (k_exponent is None) != (v_exponent is None):
        raise ValueError("k_exponent and v_exponent: both or neither.")
    return check_pool(
        k_pages, element=element, exponents=k_exponent, interpret=True
    )  # offsets are checked by `launch`


def operands(
    q: Float[Array, "queries q_heads head_dim"],
    k_pages: Pool,
    v_pages: Pool,
    page_table: Int[Array, "requests pages"],
    lengths: Int[Array, " requests"],
    *,
    k_exponent: Exponents,
    v_exponent: Exponents,
    score_offset: Float[Array, "queries q_heads"] | None,
    layer: Scalar | None,
    **by_layer: Any,
) -> dict[str, jax.Array | None]:
    """What attention kernels read, by name; `ValueError` for shapes that do not belong together."""
    refs = of_layer(layer, **by_layer) | {
        "q": q,
        "k": k_pages,
        "v": v_pages,
        "page_table": page_table,
        "lengths": lengths,
        "k_exponent": k_exponent,
        "v_exponent": v_exponent,
        "score_offset": None if score_offset is None else score_offset.astype(FLOAT32),
    }
    _, kv_heads, page_size, head_dim = k_pages.shape
    ends = dict.fromkeys(("k_scale", "v_scale"), (kv_heads, head_dim))
    ends |= dict.fromkeys(("k_exponent", "v_exponent"), (kv_heads, page_size))
    ends |= dict.fromkeys(("sinks", "score_offset"), (q.shape[1],))
    for name, end in ends.items():
        x = refs[name]
        if x is not None and x.shape[1:] != end:
            raise ValueError(
                f"{name} of {x.shape[1:]}, queries {q.shape} and pages {k_pages.shape}: it must be of {end}."
            )
    return refs


# What a layer has of its own, and how many axes that has.
SCALARS = ("first_row", "first_exponent_row", "window")
AXES = (
    dict.fromkeys(SCALARS, 0)
    | {"sinks": 1}
    | dict.fromkeys(("k_scale", "v_scale", "k_inverse", "v_inverse", "k_offset"), 2)
)


def of_layer(layer: Scalar | None, **arrays: Any) -> dict[str, jax.Array | None]:
    """Arrays with an axis of layers before their own, and which layer is at hand: a kernel reads its own part of them. Without
    `layer` they are of one layer and get the axis here.

    Cutting the layer's part out beforehand would be a launch for each of them, and under `scan` at every layer.
    """
    if arrays.get("first_exponent_row") is None:
        arrays["first_exponent_row"] = arrays["first_row"]
    found: dict[str, jax.Array | None] = {
        "layer": jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)
    }
    for name, x in arrays.items():
        if x is not None:
            x = jnp.asarray(x, jnp.int32) if name in SCALARS else jnp.asarray(x).astype(FLOAT32)
            if x.ndim != AXES[name] + (layer is not None):
                axes = "an axis of layers" if layer is not None else "no axis of layers"
                raise ValueError(
                    f"{name} of shape {x.shape}: with layer={layer!r} it has {axes} before {AXES[name]} of its own."
                )
            x = x.reshape(1, *x.shape) if layer is None else x
        found[name] = x
    return found


def opened(refs: dict[str, Any]) -> dict[str, Any]:
    """What a kernel is given, the layer and its scalars read."""
    layer = refs["layer"][0]
    return refs | {"layer": layer} | {name: refs[name][layer] for name in SCALARS if name in refs}


def scale_of_scores(head_dim: int, sm_scale: float | None) -> float:
    """`1 / sqrt(head_dim)` unless said otherwise."""
    return 1 / math.sqrt(head_dim) if sm_scale is None else float(sm_scale)
