"""Faster forms of layers for CPUs. Accelerators have fast kernels for these layers, XLA's CPU backend does not."""
