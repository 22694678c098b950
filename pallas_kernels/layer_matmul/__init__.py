"""Few rows times one layer's matrix, read where it lies in the stack of all layers."""

from pallas_kernels.layer_matmul.blocks import MatmulBlocks
from pallas_kernels.layer_matmul.kernel import layer_matmul

__all__ = ["MatmulBlocks", "layer_matmul"]
