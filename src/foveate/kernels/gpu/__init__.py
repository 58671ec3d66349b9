"""Triton kernels for NVIDIA GPUs, one file each, beside the plain torch that they equal within rounding.

`launch` decides whether they run and is all that may be imported without triton: the other files import it.
"""
