"""GPU kernels in Pallas that need nothing of jfp8kv: paged attention and cache writes with the FP8 conversion fused in.

No kernel is in this version: on every backend `jfp8kv.attention.xla` runs. The library meets kernels in one place,
`jfp8kv/attention/dispatch.py`, which refuses "pallas" until there is one.
"""
