"""Norms, rotation and activation of the TVM package against the PyTorch paths of the Triton package.

Each function has a path for CPUs and one for other targets; both run here, on the CPU.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from torch import Tensor
from tvm import relax
from tvm.relax.frontend import nn
from tvm.target import Target
from tvm.target.codegen import llvm_get_system_cpu

from qwenspec.backend.fold import declared_flags, fold

BACKENDS = Path(__file__).parents[3] / "backends"
FILES = {
    "triton": ("dispatch", "norm", "qkv", "activation"),
    "tvm": ("target", "attention_parts", "rows", "norm", "qkv", "activation"),
}
FLAGS = {
    "QK_NORM": False,
    "ONE_PLUS": False,
    "LOGN": False,
    "PARTIAL_ROTARY": False,
    "ACTIVATION": "silu",
    "DYNAMIC_ROPE": False,
    "ROUND_TABLES": False,
    "ATTENTION_FACTOR": False,
    "QUANTIZED_KV": False,
    "STORED_KV_SCALES": False,
    "TOKEN_SCALES": False,
    "KV_DTYPE": "",
}
HOST = Target({"kind": "llvm", "mcpu": llvm_get_system_cpu()})
GENERIC = Target({"kind": "llvm"})  # four lanes
EPS = 1e-6
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where folded variants lie as packages, which TVMScript needs: it reads the source of its functions."""
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("folded")
    sys.path.insert(0, str(FOLDER))
    yield FOLDER
    sys.path.remove(str(FOLDER))


def load(backend: str, **flags: bool | str) -> SimpleNamespace:
    """A variant's kernel modules, folded."""
    return _load(backend, tuple((FLAGS | flags).items()))


@cache
def _load(backend: str, flags: tuple[tuple[str, bool | str], ...]) -> SimpleNamespace:
    values = dict(flags)
    name = "_".join([backend, *map(str, values.values())])
    (FOLDER / name).mkdir()
    (FOLDER / name / "__init__.py").touch()
    for file in FILES[backend]:
        source = (BACKENDS / f"qwenspec_{backend}" / "kernels" / f"{file}.py").read_text(encoding="utf-8")
        text = fold(source, {flag: values[flag] for flag in declared_flags(source)})
        (FOLDER / name / f"{file}.py").write_text(text, encoding="utf-8")
    importlib.invalidate_caches()
    return SimpleNamespace(**{file: importlib.import_module(f"{name}.{file}") for file in FILES[backend]})


def compiled(
    function: Callable[..., Any], inputs: list[Tensor], target: Target = HOST, dynamic: int = 1
) -> Callable[..., Any]:
    """A function on Relax tensors as one on PyTorch's, for any length of the first dimension of `dynamic` inputs."""
    n = tvm.tirx.Var("n", "int64")
    builder = relax.BlockBuilder()
    parameters = [
        relax.Var(f"x{i}", relax.TensorType([n, *x.shape[1:]] if i < dynamic else x.shape, str(x.dtype)[6:]))
        for i, x in enumerate(inputs)
    ]
    with target:
        with builder.function("main", parameters):
            with builder.dataflow():
                out = function(*(nn.Tensor(_expr=parameter) for parameter in parameters))
                is_one = isinstance(out, nn.Tensor)
                result = builder.emit_output(out._expr if is_one else relax.Tuple([x._expr for x in out]))
            builder.emit_func_output(result)
        machine = relax.VirtualMachine(tvm.compile(builder.get(), target), tvm.cpu())

    def run(*values: Tensor) -> Any:
        result = machine["main"](*(tvm.runtime.from_dlpack(x) for x in values))
        return torch.from_dlpack(result) if is_one else tuple(torch.from_dlpack(x) for x in result)

    return run


PATHS = [
    *(pytest.param(dtype, HOST, True, id=f"{dtype}-cpu") for dtype in DTYPES),
    # Not bfloat16: on a CPU TVM leaves a cast to bfloat16 and back out of the code that it makes itself.
    *(pytest.param(dtype, HOST, False, id=f"{dtype}-elsewhere") for dtype in ("float32", "float16")),
    pytest.param("float32", GENERIC, True, id="float32-generic"),
]


def take(path: bool, *modules: Any) -> None:
    for module in modules:
        module.is_cpu = lambda: path


def normal(seed: int, *shape: int, dtype: str = "float32") -> Tensor:
    """Standard normal, but for outlier channels, which trained models have."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3::11] *= 40
    return x.to(DTYPES[dtype])


def assert_close(got: Tensor, want: Tensor, magnitude: Tensor | None = None) -> None:
    """Apart by roundings of float32, which now and then turn a rounding to the dtype."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    magnitude = want.double().abs() if magnitude is None else magnitude.double()
    eps = 2e-6 if want.dtype == torch.float32 else 2 * torch.finfo(want.dtype).eps
    error = (got.double() - want.double()).abs()
    assert bool((error <= eps * magnitude + 1e-12).all()), f"{(error / (eps * magnitude + 1e-12)).max():.3g} × allowed"
    assert (error > 2e-6 * magnitude + 1e-12).double().mean() < 0.01, "a rounding is left out, or taken elsewhere"


def counts(values: int) -> tuple[int, ...]:
    """Numbers of rows of so many values, enough for the parallel loop among them."""
    return 1, 3, 40, load("tvm").rows.SERIAL_VALUES // values + 2


@pytest.mark.parametrize(("dtype", "target", "on_cpu"), PATHS)
@pytest.mark.parametrize("one_plus", [False, True])
def test_norm(dtype: str, target: Target, on_cpu: bool, one_plus: bool) -> None:
    ours, reference = load("tvm", ONE_PLUS=one_plus).norm, load("triton", ONE_PLUS=one_plus).norm
    take(on_cpu, ours)
    for size in (128, 161):
        weight = normal(1, size, dtype=dtype) / 8

        def norms(x: Any, residual: Any, weight: Any) -> Any:
            return ours.rms_norm(x, weight, EPS), *ours.add_rms_norm(x, residual, weight, EPS)

        run = compiled(norms, [normal(2, 1, size, dtype=dtype)] * 2 + [weight], target, 2)
        for n in counts(size):
            x, residual = normal(3, n, size, dtype=dtype), normal(4, n, size, dtype=dtype)
            alone, out, h = run(x, residual, weight)
            assert_close(alone, reference.rms_norm(x, weight, EPS))
            want, want_h = reference.add_rms_norm(x, residual, weight, EPS)
            assert torch.equal(h, want_h)
            assert_close(out, want)


@pytest.mark.parametrize(("dtype", "target", "on_cpu"), PATHS)
def test_silu(dtype: str, target: Target, on_cpu: bool) -> None:
    check_activation("silu", dtype, target, on_cpu)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_other_activations(activation: str, on_cpu: bool) -> None:
    check_activation(activation, "float32", HOST, on_cpu)


def check_activation(activation: str, dtype: str, target: Target, on_cpu: bool) -> None:
    ours, reference = load("tvm", ACTIVATION=activation).activation, load("triton", ACTIVATION=activation).activation
    take(on_cpu, ours)
    size = 83
    run = compiled(ours.act_and_mul, [normal(5, 1, 2 * size, dtype=dtype)], target)
    for n in counts(2 * size):
        gate_up = normal(6, n, 2 * size, dtype=dtype)
        gate_up[0, :8] = torch.tensor([-200.0, -100, -87.5, -30, 0, 30, 100, 200])
        gate, up = gate_up.double().chunk(2, dim=-1)
        want = reference.act_and_mul(gate_up)
        # 1 + erf and 1 + tanh lose digits where the result is a small part of the gate.
        assert_close(run(gate_up), want, want.double().abs() + 5e-2 * (gate * up).abs())


ROTATIONS = [
    # heads, kv_heads, head_dim, rotary_dim, flags
    (3, 1, 16, 16, {}),
    (4, 2, 80, 80, {"QK_NORM": True}),
    (2, 2, 24, 12, {"QK_NORM": True, "PARTIAL_ROTARY": True, "LOGN": True}),
    (3, 3, 16, 4, {"PARTIAL_ROTARY": True, "LOGN": True}),
    (2, 1, 64, 32, {"QK_NORM": True, "ONE_PLUS": True, "PARTIAL_ROTARY": True}),
]


@pytest.mark.parametrize(("dtype", "target", "on_cpu"), PATHS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "rotary_dim", "flags"), ROTATIONS)
def test_rotate(
    dtype: str, target: Target, on_cpu: bool, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, flags: Any
) -> None:
    ours, reference = load("tvm", **flags).qkv, load("triton", **flags).qkv
    take(on_cpu, ours)
    all_heads, tables = heads + 2 * kv_heads, "float32" if heads == 3 else dtype
    weights = [normal(7 + i, head_dim, dtype=dtype) / 8 for i in range(2 if "QK_NORM" in flags else 0)]
    eps = [EPS] if "QK_NORM" in flags else []

    def arguments(n: int) -> list[Tensor]:
        angles = torch.rand(n, rotary_dim // 2, generator=torch.Generator().manual_seed(n)) * 100
        cos, sin = (table.to(DTYPES[tables]) for table in (angles.cos(), angles.sin()))
        scale = [1 + torch.rand(n, generator=torch.Generator().manual_seed(9))] if "LOGN" in flags else []
        return [normal(10, n, all_heads, head_dim, dtype=dtype), cos, sin, *scale]

    def rotate(qkv: Any, cos: Any, sin: Any, *rest: Any) -> Any:
        scale, weights = (rest[:1], rest[1:]) if "LOGN" in flags else ((), rest)
        return ours.rotate(qkv, cos, sin, heads, kv_heads, *weights, *eps, *scale)

    run = compiled(rotate, [*arguments(1), *weights], target, 3 + ("LOGN" in flags))
    for n in counts(all_heads * head_dim):
        qkv, cos, sin, *scale = arguments(n)
        got = run(qkv, cos, sin, *scale, *weights)
        cache = [torch.empty(1, n, kv_heads, head_dim, dtype=qkv.dtype) for _ in "kv"]
        slots = torch.arange(n)
        q = reference.rotate_and_cache(qkv.flatten(1), cos, sin, *cache, slots, *weights, *eps, *scale)
        want = torch.cat([q, cache[0][0], cache[1][0]], dim=1)
        # A turn of a pair is as exact as the pair is large.
        magnitude = want.double().abs()
        pair = magnitude[..., : rotary_dim // 2] + magnitude[..., rotary_dim // 2 : rotary_dim]
        magnitude[..., :rotary_dim] = torch.cat([pair, pair], dim=-1)
        assert_close(got, want, 1.5 * magnitude)
        assert torch.equal(got[:, -kv_heads:], qkv[:, -kv_heads:])


@pytest.mark.parametrize(
    ("dtype", "dynamic", "rounded", "factor"),
    [
        ("float32", False, False, False),
        ("float32", True, False, True),
        ("bfloat16", False, True, False),
        ("float16", True, True, True),
    ],
)
def test_rotary_tables(dtype: str, dynamic: bool, rounded: bool, factor: bool) -> None:
    ours = load("tvm", DYNAMIC_ROPE=dynamic, ROUND_TABLES=rounded, ATTENTION_FACTOR=factor).qkv
    positions = torch.tensor([0, 1, 777, 32767, 99991, 131071], dtype=torch.int32)
    inv_freq = 1e6 ** -(torch.arange(0, 24, 2) / 24)
    if dynamic:
        inv_freq = inv_freq / torch.arange(1, 7)[:, None]
    rest = [dtype] * rounded + [1.25] * factor
    inputs = [positions, inv_freq]
    cos, sin = compiled(lambda p, f: ours.rotary_tables(p, f, *rest), inputs, dynamic=1 + dynamic)(*inputs)
    angles = (positions.float()[:, None] * inv_freq).double()
    for got, want in ((cos, angles.cos()), (sin, angles.sin())):
        want = (want.float() * (1.25 if factor else 1.0)).to(DTYPES[dtype] if rounded else torch.float32)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_logn_scale() -> None:
    positions = torch.tensor([0, 1, 8190, 8191, 8192, 32767, 1_000_000], dtype=torch.int32)
    got = compiled(lambda p: load("tvm", LOGN=True).qkv.logn_scale(p, 8192), [positions])(positions)
    want = np.maximum(np.log(positions.numpy() + 1.0) / np.log(8192.0), 1)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-7)
