"""The planted mistakes, each of which the suite must catch (`plant.py` plants them, one at a time).

Left out: code that only a GPU runs, and mistakes that are no larger than a dtype's rounding (the order of a norm's
casts, the dtype of cos and sin, a head's dtype where both are 16 bits wide).
"""

from __future__ import annotations

from mutants_core import CORE
from mutants_kv import KV_MUTANTS
from mutants_parallel import PARALLEL_MUTANTS
from mutants_quantized import QUANTIZED_MUTANTS
from mutants_quantized_kernels import QUANTIZED_KERNELS
from mutants_runtime import RUNTIME_FILES
from mutants_triton import TRITON_MUTANTS
from mutants_tvm import TVM_MUTANTS

MUTANTS = (
    *CORE,
    *QUANTIZED_MUTANTS,
    *QUANTIZED_KERNELS,
    *KV_MUTANTS,
    *PARALLEL_MUTANTS,
    *RUNTIME_FILES,
    *TRITON_MUTANTS,
    *TVM_MUTANTS,
)
