"""Benchmarks: each prints what it measured beside the alternative, in one run. `make bench` runs them all."""
