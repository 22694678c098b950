"""Benchmarks: each prints a measurement beside the alternative. `make bench` runs all."""
