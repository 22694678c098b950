"""Measuring and choosing a KV cache.

- `calibrate`: static FP8 scales from data (observers.py, key_offsets.py, observe.py).
- `compare`: perplexity, KL divergence and reconstruction error of caches (cache_quality.py).
- `plan_kv`: a format per layer within a budget (mixed_precision.py, pareto.py, simulate.py).
- `inspect`: a checkpoint, the size of its cache and its KV scales (model_report.py).
- `bench`: the speed of caches on this device.
"""
