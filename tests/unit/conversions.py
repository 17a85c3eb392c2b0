"""Checkpoints to convert, and what tests ask of a conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwenspec.convert.convert import Request, convert
from qwenspec.diagnostics import SpecError
from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Int4, Int8

QWEN3 = {"attention": {"head_dim": 20, "qk_norm": "per_head"}, "num_hidden_layers": 2, "dtype": "bfloat16"}
QWEN1 = {
    "num_key_value_heads": None,
    "attention": {"head_dim": 12, "bias": {"qkv": True}},
    "rope": {"theta": 1e4, "compute_dtype": "float32"},
    "checkpoint": {"layout": "qwen1"},
}
SCHEMES: list[Int8 | Int4] = [
    Int8(scheme="int8"),
    Int8(scheme="int8", head="none", skip=("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")),
    Int4(scheme="int4", group_size=32),
    Int4(scheme="int4", group_size=15, head="int4"),
    Int4(scheme="int4", group_size=64, head="none", skip=("lm_head",)),
]


def request(made: tuple[Spec, Path], out: Path, quantization: Int8 | Int4 = SCHEMES[2], **options: Any) -> Request:
    spec, folder = made
    return Request(folder, spec, quantization, out, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refusal(asked: Request) -> tuple[str, str]:
    """The only diagnostic's code and message; nothing has been written."""
    with pytest.raises(SpecError) as caught:
        convert(asked)
    (diagnostic,) = caught.value.diagnostics
    assert not asked.out.exists() or not any(asked.out.iterdir())
    return diagnostic.code, diagnostic.message
