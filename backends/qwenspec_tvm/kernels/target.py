"""What kernels need to know of the target that they are compiled for."""

from functools import cache

from tvm.target import Target
from tvm.target.codegen import llvm_cpu_has_features


def is_cpu() -> bool:
    """Whether the current target is a CPU: kernels are then TIR functions, scheduled by hand."""
    return Target.current(allow_none=False).kind.name == "llvm"


def lanes() -> int:
    """float32 values in a vector of the current target's CPU."""
    return _lanes(str(Target.current(allow_none=False)))


def cores() -> int:
    """Cores to share work among: the current target's num-cores, or 8 if it has none."""
    return int(Target.current(allow_none=False).attrs.get("num-cores", 0)) or 8


@cache
def _lanes(target: str) -> int:
    # LLVM's own vector width ignores the CPU's model; its list of features does not.
    for feature, width in (("avx512f", 16), ("avx2", 8)):
        if llvm_cpu_has_features(feature, Target(target)):
            return width
    return 4
