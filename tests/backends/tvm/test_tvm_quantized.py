"""Products with quantised weights of the TVM package, against float64 sums over weights that are dequantised here."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.target import Target
from tvm.target.codegen import llvm_get_system_cpu

from qwenspec.backend.fold import declared_flags, fold

KERNELS = Path(__file__).parents[3] / "backends" / "qwenspec_tvm" / "kernels"
FILES = ("e4m3", "gemm", "linear", "panels", "quantized", "quantized_gemm", "quantized_panels", "rows", "target")
FLAGS = {
    "BITS": "4",
    "FP8": False,
    "ROUNDED_ACTIVATIONS": False,
    "STATIC_ACTIVATIONS": False,
    "WIDE_SCALES": False,
    "ZERO_POINTS": False,
    "ACT_ORDER": False,
    "INT8_HEAD": False,
    "QUANTIZED_HEAD": True,
    "ONE_PLUS": False,
}
# One core: also small matrices have panels enough for groups of them.
HOST = Target({"kind": "llvm", "mcpu": llvm_get_system_cpu(), "num-cores": 1})
AVX2 = Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3", "num-cores": 4})
OTHER = Target({"kind": "cuda", "arch": "sm_90", "max_num_threads": 1024})  # whose operators run here on the CPU
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
INPUT_SCALE = np.float32(2.0**-4 * 1.1)
# Unit roundoff of what is written, beside which float32's sums over K are small.
ROUNDING = {"float32": 2e-6, "float16": 2**-11, "bfloat16": 2**-8}


@dataclass(frozen=True)
class Format:
    bits: int
    group_size: int | None
    flags: dict[str, bool | str] = field(default_factory=dict)
    block: int = 1  # outputs that share a scale, of fp8


FP8: dict[str, bool | str] = {"BITS": "", "FP8": True, "WIDE_SCALES": True}
FORMATS = {
    "int4": Format(4, 32),
    "int4, groups of 64": Format(4, 64),
    "int4, one group": Format(4, None),
    "awq": Format(4, 128, {"ZERO_POINTS": True}),
    "gptq int4": Format(4, 20, {"ZERO_POINTS": True, "ACT_ORDER": True}),
    "gptq int8": Format(8, 24, {"BITS": "8", "ZERO_POINTS": True}),
    "gptq int8, one group": Format(8, None, {"BITS": "8", "ZERO_POINTS": True, "ACT_ORDER": True}),
    "int8": Format(8, None, {"BITS": "8"}),
    "int8 head of int4": Format(8, None, {"INT8_HEAD": True}),
    "int4 beside an int8 head": Format(4, 32, {"INT8_HEAD": True}),
    "fp8": Format(8, 128, FP8, block=128),
    "fp8, small blocks": Format(8, 48, FP8, block=20),
    "fp8 dynamic": Format(8, 128, FP8 | {"ROUNDED_ACTIVATIONS": True}, block=128),
    "fp8 static": Format(8, None, FP8 | {"ROUNDED_ACTIVATIONS": True, "STATIC_ACTIVATIONS": True}),
    "pack_quantized": Format(4, 20, {"ZERO_POINTS": True, "WIDE_SCALES": True}),
}
SIZES = ((261, 1030), (96, 256), (7, 3))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where folded variants lie as packages."""
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("folded_quantized")
    sys.path.insert(0, str(FOLDER))
    yield FOLDER
    sys.path.remove(str(FOLDER))


@cache
def kernels(name: str) -> ModuleType:
    """The modules of a package of a format, folded."""
    flags = FLAGS | FORMATS[name].flags
    package = "quantized_" + "".join(c if c.isalnum() else "_" for c in name)
    (FOLDER / package).mkdir()
    for file in FILES:
        source = (KERNELS / f"{file}.py").read_text()
        declared = declared_flags(source)
        (FOLDER / package / f"{file}.py").write_text(fold(source, {f: v for f, v in flags.items() if f in declared}))
    (FOLDER / package / "__init__.py").touch()
    importlib.invalidate_caches()
    for file in FILES:
        importlib.import_module(f"{package}.{file}")
    return sys.modules[package]


class Matrix:
    """A random weight, dequantised in float64 by the formats' formulas."""

    def __init__(self, name: str, outputs: int, inputs: int, seed: int = 0) -> None:
        form, rng = FORMATS[name], np.random.default_rng(seed)
        size = form.group_size or inputs
        group = np.arange(inputs) // size
        groups = group[-1] + 1
        self.form, self.name = form, name
        self.q = rng.integers(0, 2**form.bits, (outputs, inputs)).astype(np.uint8)
        self.zeros = rng.integers(0, 2**form.bits, (outputs, groups)).astype(np.uint8)
        self.order = rng.permutation(inputs).astype(np.int32)
        dtype = np.float32 if form.flags.get("WIDE_SCALES") or groups == 1 else np.float16
        rows = -(-outputs // form.block)
        self.scales = (rng.uniform(0.5, 2, (rows, groups)) * 2.0 ** (-8 if form.bits == 4 else -12)).astype(dtype)
        self.scales[rows // 2 :] *= dtype(100)  # another part
        scales = np.repeat(self.scales, form.block, axis=0)[:outputs].astype(np.float64)[:, group]
        if form.flags.get("FP8"):
            self.q[self.q & 127 == 127] = 0  # NaN
            self.weight = self.q.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales
        else:
            zeros = self.zeros if form.flags.get("ZERO_POINTS") else np.full_like(self.zeros, 2 ** (form.bits - 1))
            self.weight = (self.q.astype(np.float64) - zeros[:, group]) * scales

    def product(self, x: np.ndarray) -> np.ndarray:
        if self.form.flags.get("STATIC_ACTIVATIONS"):
            x = rounded_by(x.astype(np.float32)).astype(np.float64)
        elif self.form.flags.get("ROUNDED_ACTIVATIONS"):
            x = rounded_activations(x.astype(np.float32), self.form.group_size).astype(np.float64)
        return self._columns(x) @ self.weight.T

    def scale(self, x: np.ndarray) -> np.ndarray:
        """What rounding in float32 is relative to: the sum of the terms' sizes, zero points' apart."""
        terms = np.abs(self.weight).max(axis=1, keepdims=True)
        return np.abs(self._columns(x)) @ np.broadcast_to(terms, self.weight.shape).T

    def parameters(self, module: ModuleType, width: int | None) -> list[Any]:
        """As the kernels want them stored, in the order of a QuantizedWeight's attributes."""
        panels, form = module.quantized_panels, self.form
        layout = panels.Layout(*self.q.shape, form.bits, form.group_size, width)
        arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.arrays.items()}
        for start in range(0, len(self.q), 40):
            panels.store_values(arrays["values"], self.q[start : start + 40], start, layout)
        scales = np.repeat(self.scales, form.block, axis=0)[: len(self.q)]
        panels.store_scales(arrays["scales"], scales)
        if "zeros" in arrays:
            panels.store_zeros(arrays["zeros"], self.zeros)
        found = list(arrays.values())
        if form.flags.get("ACT_ORDER"):
            found.append(self.order)
        if form.flags.get("STATIC_ACTIVATIONS"):
            found.append(np.array([INPUT_SCALE]))
        return [tvm.runtime.tensor(array) for array in found]

    def _columns(self, x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x[:, self.order] if self.form.flags.get("ACT_ORDER") else x


def rounded_activations(x: np.ndarray, group: int) -> np.ndarray:
    """q · s with q = e4m3(x / s), s = max|x| / 448 over a row's `group` inputs, in float32 throughout."""
    out = np.zeros_like(x)
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group]
        scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(448)
        with np.errstate(divide="ignore", invalid="ignore"):
            q = np.clip(part / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        out[:, start : start + group] = np.where(scale == 0, 0, q * scale)
    return out


def rounded_by(x: np.ndarray) -> np.ndarray:
    """q · s with q = e4m3(x / s), in float32 throughout."""
    with np.errstate(over="ignore"):
        q = np.clip(x / INPUT_SCALE, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return q * INPUT_SCALE


def products(name: str, outputs: int, inputs: int, dtype: str) -> nn.Module:
    """Made within a target, as Linear and Embedding of a package are."""
    form, quantized = FORMATS[name], kernels(name).quantized

    class Products(nn.Module):
        def __init__(self) -> None:
            self.weight = quantized.QuantizedWeight(outputs, inputs, form.bits, form.group_size)
            self.bias = nn.Parameter((outputs,), dtype)
            self.to(dtype)

        def plain(self, x: nn.Tensor) -> nn.Tensor:
            return self.weight.linear(x, None)

        def biased(self, x: nn.Tensor) -> nn.Tensor:
            return self.weight.linear(x, self.bias)

        def widened(self, x: nn.Tensor) -> nn.Tensor:
            return self.weight.linear(x, None, "float32")

        def rows(self, ids: nn.Tensor) -> nn.Tensor:
            return self.weight.take(ids, dtype)

    return Products()


def export(name: str, outputs: int, inputs: int, dtype: str, methods: tuple[str, ...]) -> tuple[Any, list[str]]:
    arguments = {"x": nn.spec.Tensor(["n", inputs], dtype)}
    spec = {
        method: {
            **({"ids": nn.spec.Tensor(["n"], "int32")} if method == "rows" else arguments),
            "$": {"param_mode": "packed", "effect_mode": "none"},
        }
        for method in methods
    }
    module, parameters = products(name, outputs, inputs, dtype).export_tvm(spec)
    return module, [parameter for parameter, _ in parameters]


def tensor(values: Any, dtype: str) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(values).astype(DTYPES[dtype]))


def check_products(name: str, outputs: int, inputs: int, dtype: str, target: Target, rows: tuple[int, ...]) -> None:
    methods = ("plain", "biased", "widened", "rows")
    matrix, rng = Matrix(name, outputs, inputs), np.random.default_rng(1)
    with target:
        module, _ = export(name, outputs, inputs, dtype, methods)
        width = None if target is OTHER else kernels(name).linear.panel_width()
    vm = relax.VirtualMachine(tvm.compile(module, HOST if target is OTHER else target), tvm.cpu())
    bias = rng.standard_normal(outputs).astype(DTYPES[dtype])
    params = [*matrix.parameters(kernels(name), width), tensor(bias, dtype)]
    for n in rows:
        x = (rng.standard_normal((n, inputs)) * rng.choice([1, 40], (1, inputs), p=[0.9, 0.1])).astype(DTYPES[dtype])
        exact, scale = matrix.product(x), matrix.scale(x)
        for method, offset, out_dtype in (("plain", 0, dtype), ("biased", bias, dtype), ("widened", 0, "float32")):
            want = exact + np.asarray(offset, np.float64)
            got = vm[method](tensor(x, dtype), params).numpy()
            assert got.dtype == DTYPES[out_dtype]
            assert got.shape == (n, outputs)
            error = np.abs(got.astype(np.float64) - want)
            bound = ROUNDING[out_dtype] * np.abs(want) + ROUNDING["float32"] * (scale + np.abs(want - exact))
            assert (error <= bound).all(), (method, n, (error / bound).max())
    ids = rng.integers(0, outputs, 9).astype(np.int32)
    want = matrix.weight[ids].astype(np.float32).astype(DTYPES[dtype])
    assert (vm["rows"](tvm.runtime.tensor(ids), params).numpy() == want).all()


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_float64s(name: str, outputs: int, inputs: int) -> None:
    check_products(name, outputs, inputs, "float32", HOST, (1, 2, 5, 13, 30))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gptq int4", "int8", "fp8 dynamic"])
def test_16_bit_products_equal_float64s(name: str, dtype: str) -> None:
    check_products(name, 70, 150, dtype, HOST, (1, 3, 14))


@pytest.mark.parametrize("name", FORMATS)
def test_other_targets_products_equal_float64s(name: str) -> None:
    check_products(name, 21, 300, "float32", OTHER, (1, 3))


HAS_AVX2 = "avx2" in tvm.target.codegen.llvm_get_cpu_features(HOST)


@pytest.mark.skipif(not HAS_AVX2, reason="this CPU has no AVX2")
@pytest.mark.parametrize("name", ["awq", "int8", "fp8"])
def test_products_on_narrower_vectors_equal_float64s(name: str) -> None:
    check_products(name, 70, 330, "float32", AVX2, (1, 3, 14))


@pytest.mark.parametrize(
    "target",
    [
        {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "skylake-avx512"},
        {"kind": "llvm", "mtriple": "x86_64-linux-gnu"},
        {"kind": "llvm", "mtriple": "aarch64-linux-gnu"},
    ],
)
@pytest.mark.parametrize("name", ["awq", "fp8 dynamic"])
def test_other_cpus_compile(name: str, target: dict[str, str]) -> None:
    with Target(target):
        module, _ = export(name, 101, 56, "float32", ("biased",))
        assert tvm.compile(module, Target(target)) is not None


@pytest.mark.parametrize("name", ["int4", "awq", "int8", "fp8"])
def test_rows_and_padding_stay_apart(name: str) -> None:
    """An infinite row spoils its own results alone; what pads panels and groups spoils nothing."""
    outputs, inputs = 21, 50
    matrix, module = Matrix(name, outputs, inputs), kernels(name)
    with HOST:
        exported, _ = export(name, outputs, inputs, "float32", ("plain",))
        layout = module.quantized_panels.Layout(
            outputs, inputs, matrix.form.bits, matrix.form.group_size, module.linear.panel_width()
        )
    vm = relax.VirtualMachine(tvm.compile(exported, HOST), tvm.cpu())
    arrays = [parameter.numpy() for parameter in matrix.parameters(module, layout.width)]
    arrays[1][-1, :, outputs % layout.width :] = np.nan  # scales of outputs that there are not
    params = [*map(tvm.runtime.tensor, arrays), tensor(np.zeros(outputs), "float32")]
    x = np.random.default_rng(1).standard_normal((7, inputs)).astype(np.float32)
    x[3] = np.inf
    for rows in (x, x[:1], x[3:4]):
        got = vm["plain"](tensor(rows, "float32"), params).numpy()
        assert (np.isfinite(got) == np.isfinite(rows).all(axis=1, keepdims=True)).all()


def test_every_e4m3_is_dequantised_exactly() -> None:
    q = np.arange(256, dtype=np.uint8).reshape(2, 128)
    q[q & 127 == 127] = 0  # NaN, which loading refuses
    matrix = Matrix("fp8", 2, 128)
    matrix.q, matrix.scales = q, np.ones((1, 1), np.float32)
    for target in (HOST, OTHER):
        with target:
            exported, _ = export("fp8", 2, 128, "float32", ("rows",))
            width = None if target is OTHER else kernels("fp8").linear.panel_width()
        vm = relax.VirtualMachine(tvm.compile(exported, HOST), tvm.cpu())
        params = [*matrix.parameters(kernels("fp8"), width), tensor(np.zeros(2), "float32")]
        got = vm["rows"](tvm.runtime.tensor(np.array([0, 1], np.int32)), params).numpy()
        assert (got.view(np.uint32) == q.view(ml_dtypes.float8_e4m3fn).astype(np.float32).view(np.uint32)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [HOST, OTHER], ids=["cpu", "other"])
def test_activations_are_rounded_to_the_bit(target: Target, dtype: str) -> None:
    """Numbers of every size, ties among them, groups of zeros, of numbers too small for a scale, and with NaN."""
    group, inputs, rng = 48, 200, np.random.default_rng(0)
    x = np.exp2(rng.uniform(-24, 15 if dtype == "float16" else 24, (64, inputs))) * rng.choice([-1, 1], (64, inputs))
    x[:16] = rng.standard_normal((16, inputs))
    x[16, :group] = 0
    x[17, group : 2 * group] = 1e-45
    x[18] = np.where(np.arange(inputs) % 3, 448, np.arange(inputs) * 2.0**-10)  # a scale of 1
    x[19, 60] = np.nan
    with np.errstate(over="ignore"):  # in float16
        x = x.astype(np.float32).astype(DTYPES[dtype])
    e4m3 = kernels("fp8 dynamic").e4m3

    class Rounds(nn.Module):
        def rounded(self, x: nn.Tensor) -> nn.Tensor:
            return e4m3.round_activations(x, group)

    with target:
        exported, _ = Rounds().export_tvm({"rounded": {"x": nn.spec.Tensor(["n", inputs], dtype)}})
    vm = relax.VirtualMachine(tvm.compile(exported, HOST), tvm.cpu())
    got, want = vm["rounded"](tensor(x, dtype)).numpy(), rounded_activations(x.astype(np.float32), group)
    assert np.isnan(want[19, group : 2 * group]).all()
    assert np.isnan(want).sum() == group
    same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want)) | ((got == 0) & (want == 0))
    assert same.all()


@pytest.mark.parametrize("target", [HOST, OTHER], ids=["cpu", "other"])
def test_activations_are_rounded_with_a_stored_scale(target: Target) -> None:
    """Numbers of every size, beyond the largest too; NaN stays one."""
    inputs, rng = 200, np.random.default_rng(0)
    x = (np.exp2(rng.uniform(-24, 15, (9, inputs))) * rng.choice([-1, 1], (9, inputs))).astype(np.float32)
    x[3, 60], x[4, 0], x[5, 1] = np.nan, np.inf, -np.inf
    e4m3 = kernels("fp8 static").e4m3

    class Rounds(nn.Module):
        def rounded(self, x: nn.Tensor, scale: nn.Tensor) -> nn.Tensor:
            return e4m3.round_activations_by(x, scale)

    arguments = {"x": nn.spec.Tensor(["n", inputs], "float32"), "scale": nn.spec.Tensor([1], "float32")}
    with target:
        exported, _ = Rounds().export_tvm({"rounded": arguments})
    vm = relax.VirtualMachine(tvm.compile(exported, HOST), tvm.cpu())
    got = vm["rounded"](tensor(x, "float32"), tensor([INPUT_SCALE], "float32")).numpy()
    different = (got != rounded_by(x)) & ~np.isnan(x)
    assert not different.any(), (x[different], got[different], rounded_by(x)[different])
    assert got[4, 0] == -got[5, 1] == 448 * INPUT_SCALE
    assert np.isnan(got).sum() == 1


@pytest.mark.parametrize("name", ["awq", "int8", "fp8"])
def test_no_weight_is_stored_in_full_precision(name: str) -> None:
    """A CPU's functions are scheduled, and what they set aside is small beside the weight, even for many rows."""
    outputs, inputs = 4096, 2048
    with HOST:
        exported, _ = export(name, outputs, inputs, "float32", ("biased", "rows"))
    assert exported["take"].attrs["tirx.is_scheduled"]
    assert exported["linear"].attrs["tirx.is_scheduled"]
    sizes = [
        [int(size) for size in shape.split(", ")]
        for shape in re.findall(r"alloc_buffer\(\(([\d, ]+?),?\)", exported["linear"].script())
    ]
    assert len(sizes) >= 5
    assert max(map(math.prod, sizes)) <= outputs * inputs / 64
