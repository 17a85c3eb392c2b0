"""Ahead-of-time compilation without a GPU, and what the result needs of the chip.

`capture` runs a kernel's Python function on fake CUDA tensors and keeps the launches it would make, so that what is
compiled is what runs: the same arguments, constants, warps and stages.
"""
