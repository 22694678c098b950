"""Matmul of few rows with one layer's matrix, read in place from the stack of all layers."""

from pallas_kernels.layer_matmul.blocks import MatmulBlocks
from pallas_kernels.layer_matmul.kernel import layer_matmul

__all__ = ["MatmulBlocks", "layer_matmul"]
