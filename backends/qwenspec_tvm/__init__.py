"""The TVM Relax backend: packages that import tvm, numpy and safetensors and nothing else."""

from qwenspec_tvm.backend import BACKEND

__all__ = ["BACKEND"]
