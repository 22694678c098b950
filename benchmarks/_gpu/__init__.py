"""GPU kernels: compiled without a GPU and their machine code read (`gpu_compile`), checked and timed on one (`gpu`)."""
