"""The CUDA target where there is no GPU: kernels compile for sm_90, fit the chip, and compute in float32."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tvm.relax.frontend import nn

from hf_parity.oracle import QWEN2, QWEN3, tiny_spec
from qwenspec.backend.emit import emit
from qwenspec.backend.load import import_package
from qwenspec.spec.quantization import Fp8Block, Gptq, Int4, Int8, Quantization

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, of the CUDA toolkit, is not on PATH")

ARCH = "sm_90"
SHARED_MEMORY = 48 << 10  # a block's, bytes, without asking for more
REGISTERS = 64 << 10  # a block's
SIZES = {"hidden_size": 256, "num_attention_heads": 14, "intermediate_size": 512, "attention": {"head_dim": 64}}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "float16": (SIZES, QWEN3, {"attention": {"sliding_window": {"window": 32, "layers": {"from": 1}}}}),
    "bfloat16": (SIZES, QWEN2, {"attention": {"bias": {"output": True}}, "mlp": {"bias": True}}),
}


@dataclass(frozen=True)
class Kernel:
    text: str
    threads: int  # of a block
    registers: int  # of a thread
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block


@dataclass(frozen=True)
class Compiled:
    kernels: dict[str, Kernel]
    cubin: bytes


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return import_package(emit(tiny_spec(*VARIANTS["float16"]), "tvm", tmp_path_factory.mktemp("package")))


@pytest.fixture(scope="module")
def cuda(package: ModuleType) -> ModuleType:
    return part(package, "cuda")


@pytest.fixture(scope="module", params=VARIANTS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    dtype, folder = request.param, tmp_path_factory.mktemp("cuda")
    module = import_package(emit(tiny_spec(*VARIANTS[dtype]), "tvm", folder))
    target = part(module, "targets").find_target(f"cuda:{ARCH}")
    compiler = part(module, "compiler")
    exported, _ = compiler.export(dtype, target)
    return compile_source(part(module, "cuda").source(compiler.compile_module(exported, target, {})), folder)


def part(package: ModuleType, name: str) -> ModuleType:
    return importlib.import_module(f"{package.__name__}.{name}")


def compile_source(source: str, folder: Path) -> Compiled:
    file = folder / "kernels.cu"
    file.write_text(source)
    command = ["nvcc", "-cubin", f"-arch={ARCH}", "-w", "-Xptxas", "-v", "-o", "kernels.cubin", file.name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = re.split(r"Compiling entry function '(\w+)'.*", done.stderr + done.stdout)
    usage = dict(zip(reports[1::2], reports[2::2], strict=True))
    definitions = re.findall(
        r'^extern "C" __global__ void __launch_bounds__\((\d+)\) (\w+)\([^;{]*\{\n(.*?)^\}', source, re.M | re.S
    )
    kernels = {
        name: Kernel(
            text,
            int(threads),
            number(r"Used (\d+) registers", usage[name]),
            number(r"(\d+) bytes spill stores", usage[name]) + number(r"(\d+) bytes spill loads", usage[name]),
            number(r"(\d+) bytes smem", usage[name]),
        )
        for threads, name, text in definitions
    }
    assert len(kernels) == len(set(re.findall(r"__launch_bounds__\(\d+\) (\w+)\(", source)))
    return Compiled(kernels, (folder / "kernels.cubin").read_bytes())


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


@needs_nvcc
def test_every_kernel_is_in_the_cubin_and_fits(compiled: Compiled) -> None:
    names = set(compiled.kernels)
    for wanted in ("NT_matmul", "rms_norm", "rotate", "act_and_mul", "batch_prefill_paged_kv", "batch_decode_paged_kv"):
        assert any(wanted in name for name in names), wanted
    for name, kernel in compiled.kernels.items():
        assert f".text.{name}\0".encode() in compiled.cubin, name
        assert kernel.shared <= SHARED_MEMORY, name
        assert kernel.registers * kernel.threads <= REGISTERS, name


@needs_nvcc
def test_kernels_of_the_model_do_not_spill(compiled: Compiled) -> None:
    attention = ("batch_prefill", "batch_decode", "batch_tree", "tree_attn")  # TVM's own
    spilled = {name: kernel.spilled for name, kernel in compiled.kernels.items() if kernel.spilled}
    assert not [name for name in spilled if not name.startswith(attention)]
    assert max(spilled.values(), default=0) <= 256, spilled


@needs_nvcc
def test_products_read_weights_as_they_are_and_sum_in_float32(compiled: Compiled) -> None:
    products = {name: kernel.text for name, kernel in compiled.kernels.items() if "matmul" in name}
    assert len(products) >= 10  # five, for one row and for many
    assert not [name for name in compiled.kernels if "transpose" in name and "append" not in name]
    for name, text in products.items():
        sums = re.findall(r"alignas\(64\) (\w+) NT_matmul_intermediate\w*\[", text)
        assert sums, name
        assert set(sums) <= {"float", "float2", "float4"}, name


# Scheme, bits of a value, what values and scales and zero points are read as.
QUANTIZED: dict[str, tuple[Quantization, int, tuple[str, ...]]] = {
    "int4": (Int4(scheme="int4", head="int4"), 4, ("int", "half")),
    "int8": (Int8(scheme="int8"), 8, ("signed char", "float")),
    "gptq": (Gptq(scheme="gptq", bits=4, sym=False, desc_act=True), 4, ("int", "half", "uchar")),
    "fp8": (Fp8Block(scheme="fp8_block"), 8, ("signed char", "float")),
}


@needs_nvcc
@pytest.mark.parametrize("name", QUANTIZED)
def test_products_dequantise_in_registers(name: str, tmp_path: Path) -> None:
    """For one row and for many: one kernel reads what is stored, and nothing of a weight is written but to the chip."""
    scheme, bits, stored = QUANTIZED[name]
    outputs, inputs = 512, 256
    spec = tiny_spec(SIZES, QWEN3).model_copy(update={"quantization": scheme})
    module = import_package(emit(spec, "tvm", tmp_path))
    quantized, compiler, cuda = (part(module, name) for name in ("kernels.quantized", "compiler", "cuda"))
    group = getattr(module.Config, "group_size", None) or getattr(module.Config, "weight_block", (None, None))[1]

    class Products(nn.Module):
        def __init__(self) -> None:
            self.weight = quantized.QuantizedWeight(outputs, inputs, bits, group)

        def product(self, x: nn.Tensor) -> nn.Tensor:
            return self.weight.linear(x, None)

    target = part(module, "targets").find_target(f"cuda:{ARCH}")
    for n in (1, "n"):
        with target:
            exported, _ = Products().export_tvm({"product": {"x": nn.spec.Tensor([n, inputs], "float16")}})
        source = cuda.source(compiler.compile_module(exported, target, {}))
        kernels = compile_source(source, tmp_path).kernels
        product, *others = sorted(kernels, key=lambda kernel: "NT_matmul" not in kernel)
        assert not [kernel for kernel in others if not re.match("columns|largest|round_activations", kernel)]
        assert "dequantized" not in "".join(re.findall(r"(\w+)_ptr[,)]", source))
        (signature,) = re.findall(rf"\) {product}\(([^{{;]*)\) {{", source)
        read = re.findall(r"([\w ]+)\* __restrict__ \w*weight_(?:values|scales|zeros)\w*_ptr", signature)
        assert sorted(kind.strip() for kind in read) == sorted(stored)
        assert kernels[product].spilled == 0
        assert kernels[product].shared <= SHARED_MEMORY


@needs_nvcc
def test_angles_are_turned_in_float64_and_pages_found_with_64_bits(compiled: Compiled) -> None:
    for name, kernel in compiled.kernels.items():
        if name.startswith("rotary_tables"):
            assert re.search(r"\b(cos|sin)\(\(\(double\)", kernel.text), name
        if "pages_ptr[" in kernel.text:
            assert "(int64_t)" in kernel.text, name


@needs_nvcc
def test_machine_code_is_compiled_once(cuda: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
    code = cuda.machine_code(text, ARCH, tmp_path / "cache")
    assert b".text.twice\0" in code
    monkeypatch.setattr(cuda.shutil, "which", lambda name: pytest.fail("compiled again"))
    assert cuda.machine_code(text, ARCH, tmp_path / "cache") == code
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_machine_code_is_kept_where_the_cache_can_be_written(
    cuda: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_nvcc", lambda text, arch: text.encode())
    monkeypatch.setattr(cuda, "_nvrtc", cuda._nvcc)
    cache = tmp_path / "cache"
    assert cuda.machine_code("code", ARCH, cache) == b"code"
    [kept] = cache.iterdir()
    assert (kept.read_bytes(), kept.stat().st_mode & 0o777) == (b"code", 0o600)
    kept.write_bytes(b"kept")
    assert cuda.machine_code("code", ARCH, cache) == b"kept"
    kept.unlink()
    kept.mkdir()  # cannot be read, nor replaced
    assert cuda.machine_code("code", ARCH, cache) == b"code"
    assert list(cache.iterdir()) == [kept]
    (tmp_path / "file").touch()
    assert cuda.machine_code("code", ARCH, tmp_path / "file" / "cache") == b"code"


@needs_nvcc
def test_source_that_nvcc_refuses(cuda: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(cuda.BuildError, match=r"nvcc cannot compile the kernels for sm_90: .*identifier \"y\""):
        cuda.machine_code('extern "C" __global__ void twice(float* x) { y = 2; }', ARCH, tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_compiler(cuda: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.shutil, "which", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(cuda.BuildError, match=r"need a compiler for sm_90: .*put nvcc .* on PATH, or pip install"):
        cuda.machine_code("", ARCH, tmp_path)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "reason"),
    [
        (28, 4, 128, None),
        (16, 8, 64, None),
        (40, 8, 128, None),
        (4, 2, 16, None),
        (4, 4, 16, "together they must have 32 values or more"),
        (40, 40, 80, "must be one of 16, 32, 64, 128"),
        (34, 2, 128, "34 query heads on 2 key heads do not divide"),
        (33, 33, 128, "33 query heads on 33 key heads do not divide"),
    ],
)
def test_heads(cuda: ModuleType, heads: int, kv_heads: int, head_dim: int, reason: str | None) -> None:
    config = replace(cuda.Config(), num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    if reason is None:
        cuda.check_sizes(config)
    else:
        with pytest.raises(cuda.BuildError, match=reason):
            cuda.check_sizes(config)
