"""The write into pages: new keys and values, quantized and scattered in one kernel, in place."""

from pallas_kernels.kv_write.blocks import WriteBlocks
from pallas_kernels.kv_write.kernel import Written, kv_write

__all__ = ["WriteBlocks", "Written", "kv_write"]
