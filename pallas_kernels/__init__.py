"""GPU kernels in Pallas, independent of jfp8kv.

Paged attention with fused FP8 dequantization, a quantizing KV cache write, and a matmul with one
matrix of a layer-stacked weight.

`contract.md` documents arguments and guarantees. The kernels raise `NotSupported` for what they
cannot do, and run on any device in interpret mode. jfp8kv calls them from
`jfp8kv/attention/dispatch.py`, `jfp8kv/cache/` and `jfp8kv/attention/matmul.py`. It never calls
`paged_decode_mosaic`, which is experimental (docs/notes/014).
"""

from pallas_kernels.backend import NotSupported
from pallas_kernels.kernel_inputs import LayerView, check_pool
from pallas_kernels.kv_write import UpdatedPools, WriteBlocks, kv_write
from pallas_kernels.layer_matmul import MatmulBlocks, layer_matmul
from pallas_kernels.paged_decode import (
    DecodeBlocks,
    MosaicBlocks,
    paged_decode,
    paged_decode_mosaic,
)
from pallas_kernels.paged_prefill import PrefillBlocks, paged_prefill

__all__ = [
    "DecodeBlocks",
    "LayerView",
    "MatmulBlocks",
    "MosaicBlocks",
    "NotSupported",
    "PrefillBlocks",
    "UpdatedPools",
    "WriteBlocks",
    "check_pool",
    "kv_write",
    "layer_matmul",
    "paged_decode",
    "paged_decode_mosaic",
    "paged_prefill",
]
