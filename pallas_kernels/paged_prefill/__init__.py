"""Paged prefill attention: a ragged batch of chunks."""

from pallas_kernels.paged_prefill.blocks import PrefillBlocks
from pallas_kernels.paged_prefill.kernel import paged_prefill

__all__ = ["PrefillBlocks", "paged_prefill"]
