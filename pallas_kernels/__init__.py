"""GPU kernels in Pallas that need nothing of jfp8kv: paged attention and cache writes with the FP8 conversion fused in, and
products with one matrix of a stack.

`contract.md` says what all of them are given and promise. They raise `NotSupported` for what they cannot do, and run anywhere
in interpret mode. The library meets them in `jfp8kv/attention/dispatch.py`, `jfp8kv/cache/` and
`jfp8kv/attention/matmul.py` alone, and never meets `paged_decode_mosaic`, which is an experiment (docs/notes/014).
"""

from pallas_kernels.errors import NotSupported
from pallas_kernels.kv_write import WriteBlocks, Written, kv_write
from pallas_kernels.layer_matmul import MatmulBlocks, layer_matmul
from pallas_kernels.options import check_pool
from pallas_kernels.paged_decode import (
    DecodeBlocks,
    MosaicBlocks,
    paged_decode,
    paged_decode_mosaic,
)
from pallas_kernels.paged_prefill import PrefillBlocks, paged_prefill

__all__ = [
    "DecodeBlocks",
    "MatmulBlocks",
    "MosaicBlocks",
    "NotSupported",
    "PrefillBlocks",
    "WriteBlocks",
    "Written",
    "check_pool",
    "kv_write",
    "layer_matmul",
    "paged_decode",
    "paged_decode_mosaic",
    "paged_prefill",
]
