"""Compiling GPU kernels without a GPU, reading their machine code for what can be known before they run; and running them on one."""
