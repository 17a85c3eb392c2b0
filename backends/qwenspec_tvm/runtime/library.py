"""Compiled libraries: kept, found again, and checked before any of their code runs.

A library is one shared object. `_metadata()` in it says as JSON what was compiled, as in MLC's libraries; the same
JSON stands behind the object's end with a checksum, where it can be read without loading anything.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.runtime import Device
from tvm.support import cc
from tvm.target import Target

from . import cuda
from .config import Config
from .console import note
from .kept import cache_folder, doubt, make_private
from .targets import BuildError, features, host_target

HERE = Path(__file__).parent
DTYPES = ("float32", "float16", "bfloat16")
SOURCES = ("compiler.py", "config.py", "cuda.py", "layers.py", "model.py", "rope.py", "kernels/*.py")
MAGIC = b"qwenspec"


@dataclass(frozen=True)
class Library:
    """Code for one target and dtype. metadata: what compile_library writes."""

    metadata: dict[str, Any]
    module: Any  # what a virtual machine runs

    def open(self, device: Device) -> relax.VirtualMachine:
        """A virtual machine on a device of the target's kind.

        TVM's pools keep buffers by their exact size, so every new length of a prefill would leave its own behind:
        on CPUs the C library's allocator does as well without."""
        if self.metadata["target"]["kind"] == "cuda":
            cuda.install_compiler(self.metadata["target"]["arch"], cache_folder())
        return relax.VirtualMachine(self.module, device, "naive" if device.type == "cpu" else "pooled")


def find_library(target: Target, dtype: str, degree: int = 1) -> Library:
    """The library of this package for a target and each of `degree` ranks, from the cache, or compiled and kept there.

    Nothing is loaded that another user can have written (see kept.py). Several processes may look at once: each writes
    a file of its own and renames it.
    """
    wanted = describe(target, dtype, degree)
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    ranks = f"-tp{degree}" if degree > 1 else ""
    name = re.sub(r"[^\w.-]", "_", f"{wanted['variant']}-{dtype}-{target.kind.name}{ranks}-{key[:16]}.so")
    path = cache_folder() / name
    if wrong := doubt(path):
        note(f"{wrong}: another takes its place")
    elif not doubt(path.parent):
        try:
            return read_library(path)
        except BuildError:
            pass  # none, or damaged: a new one takes its place
    note(f"compiling {wanted['variant']} in {dtype} for {title(wanted)}, once")
    executable, metadata = compile_library(target, dtype, degree)
    try:
        _keep(executable, metadata, path)
    except BuildError as error:
        note(f"the library is used from memory, and will be compiled again next time: {error}")
        return Library(metadata, executable)
    try:
        return read_library(path)
    except BuildError:  # what lay there before and would not do is still loaded under this name
        return Library(metadata, executable)


def _keep(executable: relax.VMExecutable, metadata: dict[str, Any], path: Path) -> None:
    """In the cache, where that is this user's alone. Raises BuildError."""
    try:
        make_private(path.parent)
    except OSError as error:
        raise BuildError(f"{path.parent} cannot be written: {error.strerror}") from error
    if wrong := doubt(path.parent):
        raise BuildError(f"{wrong}; QWENSPEC_CACHE names another folder")
    write_library(executable, metadata, path)


def describe(target: Target, dtype: str, degree: int = 1) -> dict[str, Any]:
    """All that decides what a library holds, as a part of its metadata."""
    if dtype not in DTYPES:
        raise BuildError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    manifest = json.loads((HERE / "MANIFEST.json").read_text())
    arch = {"arch": str(target.attrs["arch"])} if target.kind.name == "cuda" else {}
    return {
        "variant": manifest["variant"],
        "spec_sha256": manifest["spec_sha256"],
        "sources_sha256": _sources_hash(),
        "dtype": dtype,
        "tensor_parallel_shards": degree,
        "target": {
            "kind": target.kind.name,
            **arch,
            "mcpu": str((target.host or target).attrs.get("mcpu", "generic")),
            "features": features(target),
            "json": str(target),
        },
        "tvm": tvm.__version__,
    }


def compile_library(target: Target, dtype: str, degree: int = 1) -> tuple[relax.VMExecutable, dict[str, Any]]:
    """An executable and its metadata: describe()'s, and `methods` and `params`, the latter in the order they are
    passed, with the shapes that each of `degree` ranks has."""
    from .compiler import METHODS, compile_module, export  # imports the kernels, which a kept library does not need

    wanted = describe(target, dtype, degree)
    if target.kind.name == "cuda":
        from . import cuda

        cuda.check_sizes(Config().share(degree))
        cuda.install_compiler(wanted["target"]["arch"], cache_folder())
    module, params = export(dtype, target, degree)
    metadata = {**wanted, "methods": list(METHODS), "params": params}
    return compile_module(module, target, metadata), metadata


def write_library(executable: relax.VMExecutable, metadata: dict[str, Any], path: Path) -> None:
    """Links an executable to one file."""
    if cc.get_cc() is None:
        raise BuildError("linking needs a C compiler, and none of g++, gcc, clang, cc is here: install one, or set CC")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as folder:
            file = Path(folder) / "library.so"
            _link(executable, file)
            with file.open("ab") as end:
                end.write(_seal(file.read_bytes(), json.dumps(metadata).encode()))
            file.chmod(file.stat().st_mode & ~0o022)  # code: others never write to it
            file.replace(path)
    except OSError as error:
        raise BuildError(f"{path} cannot be written: {error.strerror}") from error


def read_library(path: Path) -> Library:
    """A file that write_library wrote, if it suits this package, this TVM and this machine."""
    metadata = read_metadata(path)
    check(metadata, path)
    try:
        module = tvm.runtime.load_module(str(path))
        module["vm_load_executable"]  # AttributeError where the file holds something else
        return Library(metadata, module)
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        raise BuildError(f"{path} cannot be loaded: {first_line(error)}; {_rebuild(metadata)}") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """What a library says of itself; nothing of it is loaded."""
    try:
        if path.exists() and not path.is_file():  # a fifo would never end
            raise BuildError(f"{path} is no regular file")
        content = path.read_bytes()
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror}") from error
    size, magic = content[-12:-8], content[-8:]
    end = len(content) - 44 - int.from_bytes(size, "little")  # of the shared object
    if magic != MAGIC or end < 0 or _seal(content[:end], content[end:-44]) != content[end:]:
        raise BuildError(
            f"{path} is no library of a qwenspec package, or it is damaged: build it with "
            f"python -m {HERE.name}.build -o {path}"
        )
    metadata: dict[str, Any] = json.loads(content[end:-44])
    return metadata


def check(metadata: dict[str, Any], path: Path) -> None:
    """Raises BuildError where the code of a library would not do what this package says, or not run here."""
    target = metadata["target"]
    here = host_target()
    wanted = describe(here, metadata["dtype"])
    lacking = sorted(set(target["features"]) - set(features(here)))
    if metadata["variant"] != wanted["variant"]:
        reason = f"holds {metadata['variant']}, and this package is {wanted['variant']}"
    elif any(metadata[name] != wanted[name] for name in ("spec_sha256", "sources_sha256")):
        reason = f"was built from another version of this package ({wanted['variant']})"
    elif metadata["tvm"] != wanted["tvm"]:
        reason = f"was built with TVM {metadata['tvm']}, and {wanted['tvm']} is installed"
    elif lacking:
        reason = f"was built for a CPU ({target['mcpu']}) with {', '.join(lacking)}, and this one has none"
    else:
        return
    raise BuildError(f"{path} {reason}: {_rebuild(metadata)}")


def title(metadata: dict[str, Any]) -> str:
    """A target in a word or two, and for how many ranks."""
    target, degree = metadata["target"], metadata["tensor_parallel_shards"]
    ranks = f", {degree} ranks" if degree > 1 else ""
    return f"{target['kind']} {target.get('arch', target['mcpu'])}{ranks}"


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _link(executable: relax.VMExecutable, file: Path) -> None:
    try:
        executable.export_library(str(file))
    except (OSError, RuntimeError) as error:
        raise BuildError(f"{cc.get_cc()} cannot link: {str(error).strip().splitlines()[-1]}") from error


def _rebuild(metadata: dict[str, Any]) -> str:
    device = "cuda" if metadata["target"]["kind"] == "cuda" else "cpu"
    tp = f" --tp {metadata['tensor_parallel_shards']}" if metadata["tensor_parallel_shards"] > 1 else ""
    return f"build it here, python -m {HERE.name}.build --device {device} --dtype {metadata['dtype']}{tp} -o FILE"


def _seal(library: bytes, metadata: bytes) -> bytes:
    """What follows a shared object, which loaders never look at."""
    digest = hashlib.sha256(library + metadata).digest()
    return metadata + digest + len(metadata).to_bytes(4, "little") + MAGIC


def _sources_hash() -> str:
    """Of the files that decide what is compiled, without the banners, which only say where they come from."""
    digest = hashlib.sha256()
    for file in sorted(path for pattern in SOURCES for path in HERE.glob(pattern)):
        text = re.sub(r"\A(#.*\n)*", "", file.read_text(encoding="utf-8"))
        digest.update(f"{file.relative_to(HERE)} {len(text)}\n{text}".encode())
    return digest.hexdigest()
