"""Benchmarks of the GPU kernels: `gpu` times them, `gpu_compile` compiles them without a GPU."""
