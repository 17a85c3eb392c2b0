"""IR -> the files of a PyTorch/Triton package."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from qwenspec.backend.package import common, manifest, render, vendor
from qwenspec.backend.structure import Structure, structure
from qwenspec.ir.nodes import Fp8Format, IntFormat, Model
from qwenspec_triton.linears import linear_context

HERE = Path(__file__).parent


def emit(model: Model) -> dict[str, str]:
    """Path inside the package -> text."""
    shape = structure(model)
    runtime = ["cache", "graphs", "parallel", "weights"]
    shared = ["checkpoint", "checks", "console", "machine", "ranks", "sequences", "stored", "text", "tokenizer"]
    if shape.head != "embedding":
        runtime.append("generate")
        shared += ["answers", "chat", "conversation", "detokenizer", "generation"]
    if shape.weights or shape.head_weights:
        shared.append("quantized")
    linears = linear_context(model, shape)
    return {
        **render(
            model,
            HERE / "templates",
            ["__init__", "__main__", "config", "layers", "model", "rope"],
            **linears,
        ),
        **vendor((HERE / "runtime" / f"{name}.py" for name in runtime), shape),
        **_kernels(shape, linears["plain_product"]),
        **common(shape, *shared, GPU_TENSORS=True),
        **manifest(model),
    }


def _kernels(shape: Structure, plain: bool) -> dict[str, str]:
    """`plain`: some products are with matrices that are not quantised."""
    names = ["__init__", "activation", "decode_attention", "dispatch", "norm", "paged", "prefill_attention", "qkv"]
    bias = shape.qkv_bias or shape.o_bias or shape.mlp_bias
    integers: dict[str, str] = {}
    for format in (shape.head_weights, shape.weights):
        if isinstance(format, IntFormat):
            names.append("columns")
            integers |= _int_kernels(shape, format, BIAS=bias and format == shape.weights)
        elif isinstance(format, Fp8Format):
            names += ["fp8_linear", "fp8_matrix", "e4m3"]
    if plain:
        names.append("linear")
    if shape.kv_cache:
        names += ["quantized_kv", "e4m3"] if shape.kv_cache.dtype == "fp8_e4m3" else ["quantized_kv"]
    return _vendor(shape, names, BIAS=bias) | integers


def _int_kernels(shape: Structure, format: IntFormat, **flags: bool) -> dict[str, str]:
    """`int_` in the names of files and functions becomes `int4_` or `int8_`: a package may have both."""
    files = _vendor(
        shape,
        ["int_linear", "int_matrix"],
        BITS=str(format.bits),
        GROUPS=format.group_size is not None,
        ZERO_POINTS=format.zero_points,
        ACT_ORDER=format.act_order,
        LOOKUP=shape.head == "tied" and format == shape.head_weights,
        **flags,
    )
    return {_sized(name, format.bits): _sized(text, format.bits) for name, text in files.items()}


def _sized(text: str, bits: int) -> str:
    return re.sub(r"(?<![A-Za-z])(int|Int)(?=_[a-z]|Matrix)", rf"\g<1>{bits}", text)


def _vendor(shape: Structure, names: Iterable[str], **flags: bool | str) -> dict[str, str]:
    return vendor((HERE / "kernels" / f"{name}.py" for name in sorted(set(names))), shape, "kernels", **flags)
