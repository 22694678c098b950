"""Compiling GPU kernels without a GPU, and reading from the machine code what can be known before anything runs."""
