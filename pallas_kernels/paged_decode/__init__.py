"""Decode attention over pages: one query token per request."""

from pallas_kernels.paged_decode.blocks import DecodeBlocks
from pallas_kernels.paged_decode.kernel import paged_decode

__all__ = ["DecodeBlocks", "paged_decode"]
