"""Devices and targets: what a library runs on, and what it is compiled for."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import tvm
from tvm.runtime import Device
from tvm.target import Target, codegen

QUANTIZED_KV = False  # flag: keys and values are cached quantised
DEFAULT_ARCH = "sm_90"  # where no GPU tells its own
CUDA = {
    "max_num_threads": 1024,
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 49152,
    "thread_warp_size": 32,
}
KNOWN = (
    'known are "cpu", "cuda", "cuda:1" (a GPU), "cuda:sm_90" (an architecture), a TVM target tag as '
    '"nvidia/nvidia-h100", and TVM target JSON of kind llvm or cuda as \'{"kind": "llvm", "mcpu": "x86-64-v3"}\''
)

# x86 extensions that LLVM may use unasked, by its names.
_NAMES = (
    "sse3 ssse3 sse4.1 sse4.2 sse4a cx16 sahf popcnt lzcnt movbe bmi bmi2 tbm adx aes pclmul gfni vaes vpclmulqdq f16c "
    "fma fma4 xop avx avx2 avxifma avxneconvert avxvnni avxvnniint8 avx512f avx512bf16 avx512bitalg avx512bw avx512cd "
    "avx512dq avx512fp16 avx512ifma avx512vbmi avx512vbmi2 avx512vl avx512vnni avx512vpopcntdq"
)
X86 = frozenset(_NAMES.split())
# Linux's names, where they differ by more than punctuation.
LINUX = {"sse3": "pni", "sahf": "lahflm", "lzcnt": "abm", "bmi": "bmi1", "pclmul": "pclmulqdq"}


class BuildError(RuntimeError):
    """No library can be built for a target, or it cannot be used here; the message says what to do."""


def find_target(name: str) -> Target:
    """The target that a name stands for.

    name: "cpu" or "llvm", this machine's CPU; "cuda" or "cuda:1", that GPU; "cuda:sm_80", an architecture; a tag of
        TVM's; or TVM's JSON
    Raises BuildError, for a GPU that is not here too.
    """
    if name in ("cpu", "llvm"):
        return host_target()
    if cuda := re.fullmatch(r"cuda(?::(\d+)|:(sm_\w+))?", name):
        return _cuda_target({"kind": "cuda", "arch": cuda[2]}) if cuda[2] else _cuda_target({"kind": "cuda"}, name)
    try:
        config = json.loads(name) if name.startswith("{") else dict(Target(name).export())
        kind = config.get("kind")
        if kind == "cuda":
            return _cuda_target(config)
        if kind == "llvm":
            return _llvm_target(config)
    except (ValueError, TypeError) as error:
        raise BuildError(f"{name!r} is no target: {str(error).splitlines()[0]}; {KNOWN}") from error
    raise BuildError(f"{name!r} is of kind {kind!r}, which this package has no kernels for; {KNOWN}")


def find_device(name: str) -> Device:
    """The device that runs a target of this name: its own, or the first of its kind."""
    if find_target(name).kind.name == "llvm":
        return tvm.cpu()
    return find_gpu(name)


def find_gpu(name: str) -> Device:
    """The GPU that "cuda:1" names; the first, for other names. Raises BuildError where it is not here."""
    index = re.fullmatch(r"cuda:(\d+)", name)
    device = tvm.cuda(int(index[1]) if index else 0)
    if not device.exist:
        raise BuildError(
            f"{name!r}: no such GPU is visible here: use device 'cpu', check nvidia-smi, or, to build for another "
            "machine, name the architecture: cuda:sm_90"
        )
    return device


@functools.cache
def host_target() -> Target:
    """This machine's CPU, and the cores of it that this process may use: kernels cut their work for so many.

    LLVM goes by the model's name, and a virtual machine may lack what that promises or have more: where the kernel
    says which instructions work, they decide.
    """
    here = {"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu(), "num-cores": usable_cores()}
    named = Target(here)
    flags = _cpu_flags()
    if not flags or not _is_x86(named):
        return named
    promised = set(features(named))
    present = {feature for feature in X86 if LINUX.get(feature, feature.replace(".", "")) in flags}
    changes = [f"-{f}" for f in sorted(promised - present)] + [f"+{f}" for f in sorted(present - promised)]
    return Target({**here, "mattr": changes}) if changes else named


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def features(target: Target) -> list[str]:
    """Instruction-set extensions that code for a target (its host's part, for a GPU) may use."""
    target = target.host or target
    found = codegen.llvm_get_cpu_features(target)
    return sorted(found & X86 if _is_x86(target) else found)


def _llvm_target(config: dict[str, Any]) -> Target:
    cpu, triple = config.get("mcpu"), config.get("mtriple") or codegen.llvm_get_system_triple()
    # Checked here: TVM itself ends the process over a triple that LLVM does not know, and of a CPU or a feature prints
    # a line and goes on without.
    if not _known_triple(triple):
        raise BuildError(f"LLVM knows no machine {triple!r}: a triple is like {codegen.llvm_get_system_triple()!r}")
    if cpu and cpu not in codegen.llvm_get_cpu_archlist(Target({"kind": "llvm", "mtriple": triple})):
        raise BuildError(
            f"LLVM knows no CPU {cpu!r} of {triple}; this machine's is {codegen.llvm_get_system_cpu()!r}, and "
            "tvm.target.codegen.llvm_get_cpu_archlist() lists all"
        )
    target = Target(config)
    names = {feature.lstrip("+-") for feature in config.get("mattr") or ()}
    asked = Target({"kind": "llvm", "mtriple": triple, "mattr": [f"+{name}" for name in sorted(names)]})
    if unknown := sorted(names - set(codegen.llvm_get_cpu_features(asked))):
        raise BuildError(f"LLVM knows no feature {', '.join(unknown)} of {triple}: mattr is a list like ['+avx2']")
    return target


def _known_triple(triple: str) -> bool:
    architecture = str(triple).split("-")[0]
    spelled = re.fullmatch(r"i[3-6]86|amd64|arm64|(arm|thumb)v[5-9]\w*|ppc(64)?(le)?", architecture)
    return bool(spelled) or architecture in codegen.llvm_get_targets()


def _cuda_target(config: dict[str, Any], gpu: str = "") -> Target:
    """gpu: the name of the one whose architecture it is, where the config has none."""
    if QUANTIZED_KV:
        raise BuildError(
            "a quantised KV cache works on CPUs alone here, for on GPUs attention is TVM's, which reads none: take "
            "device 'cpu', or a package that qwenspec generated with --kv-cache none"
        )
    if gpu:
        config = {**config, "arch": "sm_" + str(find_gpu(gpu).compute_version).replace(".", "")}
    arch = str(config.get("arch", DEFAULT_ARCH))
    if not re.fullmatch(r"sm_([5-9]\d|1\d\d)[af]?", arch):
        raise BuildError(f"{arch!r} is no architecture of a GPU that this package has kernels for: they are like sm_90")
    # The host's part only launches kernels: compiled for any CPU of this architecture.
    return Target({"arch": DEFAULT_ARCH, **CUDA, "host": {"kind": "llvm"}, **config})


def _is_x86(target: Target) -> bool:
    return str(target.attrs.get("mtriple", codegen.llvm_get_system_triple())).startswith(("x86_64", "i686"))


def _cpu_flags() -> set[str]:
    """The instruction-set extensions that the kernel lets programs use, without underscores; none where it is mute."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].replace("_", "").split()) if found else set()
