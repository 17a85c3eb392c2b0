"""The Triton/PyTorch backend: packages that import torch, triton and safetensors and nothing else."""

from qwenspec_triton.backend import BACKEND

__all__ = ["BACKEND"]
