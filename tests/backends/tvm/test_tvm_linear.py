"""Matrix products of the TVM package on the CPU, against float64."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn

from qwenspec_tvm.kernels.linear import linear, panel_width, take, weight_shape
from qwenspec_tvm.kernels.panels import pack, pack_into, unpack
from qwenspec_tvm.kernels.target import is_cpu, lanes

# One core: also small matrices have panels enough for groups of them.
HOST = tvm.target.Target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu(), "num-cores": 1})
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Unit roundoff of what is written, beside which float32's sums over K are small.
ROUNDING = {"float32": 2e-6, "float16": 2**-11, "bfloat16": 2**-8}


class Products(nn.Module):
    def __init__(self, out_features, in_features, dtype):
        self.weight = nn.Parameter(weight_shape(out_features, in_features), dtype)
        self.bias = nn.Parameter((out_features,), dtype)
        self.out_features, self.in_features = out_features, in_features

    def plain(self, x: nn.Tensor):
        return linear(x, self.weight, None, self.out_features)

    def biased(self, x: nn.Tensor):
        return linear(x, self.weight, self.bias, self.out_features)

    def widened(self, x: nn.Tensor):
        return linear(x, self.weight, None, self.out_features, "float32")

    def rows(self, ids: nn.Tensor):
        return take(self.weight, ids, self.in_features)


def export(out_features, in_features, dtype, methods=("plain", "biased", "widened", "rows")):
    x, ids = {"x": nn.spec.Tensor(["n", in_features], dtype)}, {"ids": nn.spec.Tensor(["n"], "int32")}
    spec = {
        name: {
            **(ids if name == "rows" else x),
            "$": {"param_mode": "packed", "effect_mode": "none"},
        }
        for name in methods
    }
    return Products(out_features, in_features, dtype).export_tvm(spec)[0]


def load(module):
    return relax.VirtualMachine(tvm.compile(module, HOST), tvm.cpu())


def array(values, dtype):
    return tvm.runtime.tensor(np.ascontiguousarray(values).astype(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(128, 64), (261, 1030), (7, 3)])
def test_products_equal_float64s(out_features, in_features, dtype):
    rng = np.random.default_rng(0)
    with HOST:
        vm, width = load(export(out_features, in_features, dtype)), panel_width()
    weight = rng.standard_normal((out_features, in_features)).astype(DTYPES[dtype])
    bias = rng.standard_normal(out_features).astype(DTYPES[dtype])
    params = [array(pack(weight, width), dtype), array(bias, dtype)]
    for n in (1, 2, 5, 6, 7, 12, 13, 64, 125):
        x = rng.standard_normal((n, in_features)).astype(DTYPES[dtype])
        exact = x.astype(np.float64) @ weight.astype(np.float64).T
        scale = np.abs(x.astype(np.float64)) @ np.abs(weight.astype(np.float64)).T + 1
        for method, offset, out_dtype in (("plain", 0, dtype), ("biased", bias, dtype), ("widened", 0, "float32")):
            want = exact + np.asarray(offset, np.float64)
            got = vm[method](array(x, dtype), params).numpy()
            assert got.dtype == DTYPES[out_dtype]
            assert got.shape == (n, out_features)
            error = np.abs(got.astype(np.float64) - want)
            assert (error <= ROUNDING[out_dtype] * np.abs(want) + ROUNDING["float32"] * scale).all(), (method, n)
    ids = rng.integers(0, out_features, 9).astype(np.int32)
    assert (vm["rows"](tvm.runtime.tensor(ids), params).numpy() == weight[ids]).all()


def test_rows_and_padding_stay_apart():
    """An infinite row spoils its own results alone; what pads the last panel spoils nothing."""
    with HOST:
        vm, width = load(export(21, 40, "float32", ["plain"])), panel_width()
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((21, 40)).astype(np.float32)
    packed = np.full_like(pack(weight, width), np.nan)
    pack_into(packed, weight, 0)
    x = rng.standard_normal((7, 40)).astype(np.float32)
    x[3] = np.inf
    for rows in (x, x[:1]):
        got = vm["plain"](array(rows, "float32"), [array(packed, "float32"), array(np.zeros(21), "float32")]).numpy()
        assert (np.isfinite(got) == np.isfinite(rows).all(axis=1, keepdims=True)).all()


def test_cpus_run_the_scheduled_functions():
    with HOST:
        assert is_cpu()
        assert weight_shape(65, 32) == (-(-65 // panel_width()), 32, 2 * lanes())
        module = export(65, 32, "float32", ["biased", "rows"])
    assert module["linear"].attrs["tirx.is_scheduled"]
    assert module["take"].attrs["tirx.is_scheduled"]
    assert "R.matmul" not in module["biased"].script()


def test_other_targets_have_relaxs_matmul():
    """... which TVM's own lowering runs here on the CPU."""
    with tvm.target.Target({"kind": "cuda", "arch": "sm_90", "max_num_threads": 1024}):
        assert not is_cpu()
        assert weight_shape(20, 24) == (20, 24)
        module = export(20, 24, "float16")
    assert not {name.name_hint for name in module.get_global_vars()} & {"linear", "take"}
    assert 'R.matmul(x, permute_dims, out_dtype="float32")' in module["biased"].script().replace("1", "")
    vm = load(module)
    rng = np.random.default_rng(2)
    x, weight, bias = (rng.standard_normal(shape).astype(np.float16) for shape in ((3, 24), (20, 24), (20,)))
    params = [array(weight, "float16"), array(bias, "float16")]
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    np.testing.assert_allclose(vm["widened"](array(x, "float16"), params).numpy(), exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vm["biased"](array(x, "float16"), params).numpy(), exact + bias, rtol=1e-3, atol=1e-4)
    ids = np.array([19, 0, 7], np.int32)
    assert (vm["rows"](tvm.runtime.tensor(ids), params).numpy() == weight[ids]).all()


@pytest.mark.parametrize(
    "target",
    [
        {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "skylake-avx512"},
        {"kind": "llvm", "mtriple": "x86_64-linux-gnu"},
        {"kind": "llvm", "mtriple": "aarch64-linux-gnu"},
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_cpus_compile(target, dtype):
    target = tvm.target.Target(target)
    with target:
        assert tvm.compile(export(101, 56, dtype, ["biased"]), target) is not None


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(("out_features", "width"), [(101, 16), (32, 32), (5, 8), (640, 16)])
def test_packed_weights_unpack(out_features, width, dtype):
    weight = np.arange(out_features * 3).reshape(out_features, 3).astype(dtype)
    packed = pack(weight, width)
    assert packed.shape == (-(-out_features // width), 3, width)
    assert (unpack(packed, out_features) == weight).all()
    assert (unpack(packed, packed.shape[0] * width)[out_features:] == 0).all()
    in_parts = np.zeros_like(packed)
    for start, stop in itertools.pairwise((0, 1, 4, out_features // 2 + 3, out_features)):
        pack_into(in_parts, weight[start:stop], start)
    assert (in_parts == packed).all()
