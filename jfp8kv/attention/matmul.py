"""Matmuls with layer-stacked weights by a GPU kernel, for batches with few rows.

Before a matmul, XLA:GPU copies the layer's matrix out of the stack of all layers. A decode step
spends most of its time on reading weights, and the copy reads and writes them once more. The kernel
reads the matrix in place, for the rows of all requests of a batch at once. Prefill is left to XLA:
with many rows the matmul takes longer than the copy.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from jfp8kv.models.linear import Matmul, stacked_matmul

MAX_ROWS = 256  # with more rows, reading the matrix is not the bottleneck
ROW_ALIGNMENT = 16  # bytes that a thread copies at once; the size of a matrix row is a multiple


@dataclasses.dataclass(frozen=True)
class KernelMatmul:
    """`stacked_matmul` by the GPU kernel, for the rows of all requests under `vmap`.

    Many rows, weights stored as bits and unaligned matrices are left to XLA.
    """

    interpret: bool = False

    def __call__(
        self,
        x: Float[Array, "tokens in"],
        weight: Array,
        layer: Int[Array, ""] | int,
        *,
        weight_dtype: np.dtype,
        tiled: bool,
    ) -> Float[Array, "tokens out"]:
        """Return `x @ weight[layer].T`, accumulated in float32 and returned in float32."""

        @custom_vmap
        def matmul(x: Array, weight: Array, layer: Array) -> Array:
            if is_supported(weight) and x.shape[0] <= MAX_ROWS:
                return self._by_kernel(x, weight, layer)
            return stacked_matmul(x, weight, layer, weight_dtype=weight_dtype, tiled=tiled)

        @matmul.def_vmap
        def _(
            requests: int, batched: list[bool], x: Array, weight: Array, layer: Array
        ) -> tuple[Array, bool]:
            assert not any(batched[1:]), (
                "weights and layer are shared by the requests: vmap with in_axes=None"
            )
            if not batched[0]:
                return matmul(x, weight, layer), False
            y = matmul(x.reshape(-1, x.shape[-1]), weight, layer)
            return y.reshape(requests, -1, y.shape[-1]), True

        y: Array = matmul(x, weight, jnp.asarray(layer, jnp.int32))
        return y

    def _by_kernel(self, x: Array, weight: Array, layer: Array) -> Array:
        # Imported here: it takes as long as importing the rest of the library.
        from pallas_kernels import layer_matmul

        return layer_matmul(x, weight, layer, interpret=self.interpret)


def is_supported(weight: Array) -> bool:
    """Return whether the kernel can read this stack: 16- or 32-bit floats in aligned rows."""
    floats = jnp.issubdtype(weight.dtype, jnp.floating) and weight.dtype.itemsize in (2, 4)
    return floats and weight.shape[2] * weight.dtype.itemsize % ROW_ALIGNMENT == 0


def select_matmul(attention: str) -> Matmul:
    """Return the matmul that belongs to an attention backend: the kernel for kernel backends."""
    kernels = {"pallas": KernelMatmul(), "pallas_interpret": KernelMatmul(interpret=True)}
    return kernels.get(attention, stacked_matmul)
