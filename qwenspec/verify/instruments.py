"""Which kernels of an opened package ran, by name, as they run.

Names are those of the package's source: on CPUs a Triton package reports the functions that its modules call
(`decode_attention`), in Triton's interpreter the kernels that these launch (`_decode_split_kernel`). A TVM package
reports the functions of its library (`act_and_mul`, `paged_prefill_attention`).
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenspec.backend.api import Runner

Count = Callable[[str], None]


def counting(runner: Runner, count: Count) -> frozenset[str]:
    """From now on `count(name)` is called whenever a kernel of the runner's package runs; -> every name it can report.

    One that never comes is of a kernel that nothing ran. To be called once on a runner, before its caches are created.
    On GPUs a replayed CUDA graph reports nothing. Of other backends than Triton's and TVM's nothing is known: no names.
    """
    opened: Any = runner
    match type(runner).__name__:
        case "TritonRunner":
            return _count_triton(opened.module, count)
        case "TvmRunner":
            return _count_tvm(opened.module, opened, count)
        case _:
            return frozenset()


# --------------------------------------------------------------------------------------------------- Triton


def _count_triton(package: ModuleType, count: Count) -> frozenset[str]:
    """Replaces attributes of the package's modules, which are this runner's alone (import_package)."""
    if _part(package, "kernels.dispatch").INTERPRET:
        found = list(_launched(package))
        wrap: Callable[[Any, str, Count], Any] = _CountedKernel
    else:
        found = list(_called(package))
        wrap = _counted_call
    for module, name in found:
        setattr(module, name, wrap(getattr(module, name), name, count))
    return frozenset(name for _, name in found)


def _called(package: ModuleType) -> Iterator[tuple[ModuleType, str]]:
    """Functions of the package's kernels/ where its other modules have them."""
    for module in (_part(package, "layers"), _part(package, "model")):
        for name, value in vars(module).items():
            ours = getattr(value, "__module__", "").startswith(f"{package.__name__}.kernels.")
            if ours and callable(value) and not isinstance(value, type):  # a quantised matrix is a class
                yield module, name


def _launched(package: ModuleType) -> Iterator[tuple[ModuleType, str]]:
    """Triton's kernels where they are defined, which is where they are launched."""
    for kernels in sorted({getattr(module, name).__module__ for module, name in _called(package)}):
        module = importlib.import_module(kernels)
        yield from ((module, name) for name in vars(module) if re.fullmatch(r"_\w+_kernel", name))


def _counted_call(function: Callable[..., Any], name: str, count: Count) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count(name)
        return function(*args, **kwargs)

    return counted


class _CountedKernel:
    """A Triton kernel whose launches, kernel[grid](...), are counted."""

    def __init__(self, kernel: Any, name: str, count: Count) -> None:
        self._kernel, self._name, self._count = kernel, name, count

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return _counted_call(self._kernel[grid], self._name, self._count)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._kernel, attribute)


# ------------------------------------------------------------------------------------------------------ TVM

_CREATE = "vm.builtin.paged_attention_kv_cache_create"

# TVM's cache calls these itself, past the virtual machine: the argument of _CREATE, and the function's name.
_OF_CACHE = {
    13: "append_to_pages",
    15: "ragged_prefill_attention",
    16: "paged_prefill_attention",
    17: "decode_attention",
    18: "sliding_paged_prefill_attention",
    19: "sliding_decode_attention",
    20: "paged_tree_attention",
    21: "tree_attention",
    23: "merge_attention",
    24: "split_qkv",
    25: "copy_page",
    26: "get_keys_and_values",
    27: "compact_pages",
}


def _count_tvm(package: ModuleType, runner: Any, count: Count) -> frozenset[str]:
    """Opens the library once more, in a virtual machine that reports its calls, and gives it to the runner's model."""
    targets, libraries, model = _part(package, "targets"), _part(package, "library"), runner.model
    tvm = libraries.tvm  # qwenspec itself imports no tensor library
    library = libraries.find_library(targets.find_target(runner._device), model.dtype)
    create = tvm.get_global_func(_CREATE)
    tvm.register_global_func(_CREATE, _counting_create(create, count), override=True)
    try:  # a machine looks its functions up as it is made
        machine = library.open(model.device)
    finally:
        tvm.register_global_func(_CREATE, create, override=True)
    names = _library_functions(library)
    model._methods = {name: _CountedMethod(machine, name, names, count) for name in library.metadata["methods"]}
    return frozenset(names.values())


def _library_functions(library: Any) -> dict[str, str]:
    """Symbol -> name of every kernel in a library: linear, linear1, linear2 are one for matrices of three shapes."""
    module = getattr(library.module, "mod", library.module)  # one that was compiled and not kept is still wrapped
    (listed,) = re.findall(r"^\s*Globals \(#\d+\): \[(.*)\]$", module["stats"](), re.MULTILINE)
    others = re.compile(r"vm\..*|_metadata|shape_func\d*|compute_symbolic_expr\d*|zeros\d*")
    methods = library.metadata["methods"]
    return {
        symbol: re.sub(r"\d+$", "", symbol)
        for symbol in listed.split(", ")
        if symbol not in methods and not others.fullmatch(symbol)
    }


class _CountedMethod:
    """A method of a virtual machine. There are no branches in it: what its first call runs, every call runs.

    So the first call alone is watched. Watching takes several times the step of a tiny model."""

    def __init__(self, machine: Any, method: str, names: dict[str, str], count: Count) -> None:
        self._machine, self._method, self._names, self._count = machine, machine[method], names, count
        self._kernels: list[str] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self._kernels is None:
            return self._watched(*arguments)
        for name in self._kernels:
            self._count(name)
        return self._method(*arguments)

    def _watched(self, *arguments: Any) -> Any:
        kernels: list[str] = []

        def instrument(_function: Any, symbol: str, before: bool, _result: Any, *_arguments: Any) -> int:
            if before and symbol in self._names:
                kernels.append(self._names[symbol])
                self._count(kernels[-1])
            return 0  # go on

        self._machine.set_instrument(instrument)
        try:
            result = self._method(*arguments)
        finally:
            self._machine.set_instrument(None)
        self._kernels = kernels
        return result


def _counting_create(create: Callable[..., Any], count: Count) -> Callable[..., Any]:
    """_CREATE with counted functions in the place of those that it is given."""

    def counted(argument: Any, name: str) -> Any:
        if callable(argument):
            return _counted_call(argument, name, count)
        return [counted(one, name) if callable(one) else one for one in argument]  # ("tirx", function), or none

    def counting_create(*arguments: Any) -> Any:
        wrapped = list(arguments)
        for position, name in _OF_CACHE.items():
            wrapped[position] = counted(wrapped[position], name)
        return create(*wrapped)

    return counting_create


def _part(package: ModuleType, name: str) -> ModuleType:
    return importlib.import_module(f"{package.__name__}.{name}")
