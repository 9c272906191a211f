"""Triton kernels, one file an op. Nothing here is imported before a kernel is wanted."""
