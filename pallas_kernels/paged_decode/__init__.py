"""Paged decode attention: one query token per request."""

from pallas_kernels.paged_decode.blocks import DecodeBlocks
from pallas_kernels.paged_decode.kernel import paged_decode
from pallas_kernels.paged_decode.mosaic import paged_decode_mosaic
from pallas_kernels.paged_decode.mosaic_kernel import MosaicBlocks

__all__ = ["DecodeBlocks", "MosaicBlocks", "paged_decode", "paged_decode_mosaic"]
