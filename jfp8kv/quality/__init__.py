"""Measuring and choosing a KV cache: calibration, comparison, mixed precision, reports, benchmarks.

calibrate.py        static FP8 scales from data (observers.py, key_offsets.py)
compare.py          perplexity, KL divergence and reconstruction error of caches
mixed_precision.py  a format per layer within a budget (pareto.py, simulate.py)
model_report.py     a checkpoint, the size of its cache and its KV scales, without loading it
bench.py            speed of caches on this device
"""
