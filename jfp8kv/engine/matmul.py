"""Products with layers' matrices by the GPU kernel, where rows are few.

XLA:GPU cuts a layer's matrix out of the stack of all layers before it multiplies by it: in a decode step, which does little but
read weights, every one of them would be read, written and read again. The kernel reads it in place. It takes the rows of all
requests of a batch together; prefill has so many that multiplying takes longer than copying, and is left to XLA.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from jfp8kv.models.linear import Matmul, stacked_matmul
from pallas_kernels import layer_matmul

MOST_ROWS = 256  # beyond them reading the matrix is no longer what takes time
ALIGNED = 16  # bytes a thread copies at once: a row of the matrix must be so many, or a multiple


@dataclasses.dataclass(frozen=True)
class KernelMatmul:
    """`stacked_matmul` by the kernel, for the rows of all requests under `vmap`. What the kernel is slow or useless for (many
    rows, matrices in bits or out of line) is left to XLA."""

    interpret: bool = False

    def __call__(
        self,
        x: Float[Array, "tokens in"],
        weight: Array,
        layer: Int[Array, ""] | int,
        *,
        stored: np.dtype,
        tiled: bool,
    ) -> Float[Array, "tokens out"]:
        """`x @ weight[layer].T`, accumulated in float32 and returned in float32."""

        @custom_vmap
        def product(x: Array, weight: Array, layer: Array) -> Array:
            if reads(weight) and x.shape[0] <= MOST_ROWS:
                return self._by_kernel(x, weight, layer)
            return stacked_matmul(x, weight, layer, stored=stored, tiled=tiled)

        @product.def_vmap
        def _(
            requests: int, batched: list[bool], x: Array, weight: Array, layer: Array
        ) -> tuple[Array, bool]:
            assert not any(batched[1:]), (
                "weights and layer are shared by the requests: vmap with in_axes=None"
            )
            if not batched[0]:
                return product(x, weight, layer), False
            y = product(x.reshape(-1, x.shape[-1]), weight, layer)
            return y.reshape(requests, -1, y.shape[-1]), True

        return product(x, weight, jnp.asarray(layer, jnp.int32))

    def _by_kernel(self, x: Array, weight: Array, layer: Array) -> Array:
        return layer_matmul(x, weight, layer, interpret=self.interpret)


def reads(weight: Array) -> bool:
    """Whether the kernel reads such a stack, and 16 bytes at a time."""
    known = jnp.issubdtype(weight.dtype, jnp.floating) and weight.dtype.itemsize in (2, 4)
    return known and weight.shape[2] * weight.dtype.itemsize % ALIGNED == 0


def beside(attention: str) -> Matmul:
    """The products that go with this implementation of attention: by the kernel where attention is by kernels."""
    kernels = {"pallas": KernelMatmul(), "pallas_interpret": KernelMatmul(interpret=True)}
    return kernels.get(attention, stacked_matmul)
