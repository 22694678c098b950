"""KV cache write: quantizes new keys and values and scatters them into pages, in one kernel."""

from pallas_kernels.kv_write.blocks import WriteBlocks
from pallas_kernels.kv_write.kernel import UpdatedPools, kv_write

__all__ = ["UpdatedPools", "WriteBlocks", "kv_write"]
