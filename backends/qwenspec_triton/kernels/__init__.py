"""Triton kernels, each behind a function that computes the same in plain PyTorch where Triton cannot run."""
