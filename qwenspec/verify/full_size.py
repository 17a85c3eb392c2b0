"""What can be compared at a spec's own size without weights: rotary frequencies, and the checkpoint's tensors."""

from __future__ import annotations

import importlib
import inspect
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from qwenspec.backend.registry import MANIFEST
from qwenspec.backend.runtime.checkpoint import read_manifest
from qwenspec.backend.runtime.quantized import read_quantized
from qwenspec.spec.document import Spec
from qwenspec.verify.dequantize import quantized_matrices
from qwenspec.verify.reference import Reference
from qwenspec.verify.reference_rope import Array, attention_factor, inverse_frequencies

Shapes = dict[str, tuple[int, ...]]


def rope_errors(spec: Spec, package: ModuleType) -> dict[int, float]:
    """Length -> the largest relative error of a package's frequencies and attention factor at it."""
    arch, dim = spec.architecture, Reference(spec, {}).rotary_dim
    rope = importlib.import_module(f"{package.__name__}.rope")
    config = importlib.import_module(f"{package.__name__}.config").Config()
    follows_length = "length" in inspect.signature(rope.inverse_frequencies).parameters
    factor = attention_factor(arch.rope.scaling, arch.max_position_embeddings)
    own_factor = getattr(config, "rope_attention_factor", 1.0)  # a package whose factor is 1 does not have it
    errors: dict[int, float] = {}
    for length in rope_lengths(spec):
        expected = inverse_frequencies(arch.rope, dim, arch.max_position_embeddings, length)
        actual = np.array(rope.inverse_frequencies(config, *([length] if follows_length else [])), np.float64)
        same_shape = actual.shape == expected.shape
        error = float(np.max(np.abs(actual / expected - 1))) if same_shape else math.inf
        errors[length] = max(error, abs(own_factor / factor - 1))
    return errors


def rope_lengths(spec: Spec) -> list[int]:
    """1, and around every length at which the scaling may change: a token less, as many, and a token more."""
    arch = spec.architecture
    lengths = {arch.max_position_embeddings}
    for name in ("original_max_position_embeddings", "train_length"):
        length = getattr(arch.rope.scaling, name, None)
        while length is not None and length <= 2 * arch.max_position_embeddings:
            lengths.add(length)
            length *= 2
    lengths |= {2 * arch.max_position_embeddings}
    return sorted({1} | {max(1, length + side) for length in lengths for side in (-1, 0, 1)})


def tensors_read(spec: Spec) -> Shapes:
    """Every checkpoint tensor that the reference reads, with its shape: of quantised modules what their format stores,
    all that it may."""
    reference = _Reading(spec)
    reference.sequence().forward(np.empty(0, np.int64))
    shapes = reference.shapes
    for module, matrix in quantized_matrices(spec).items():
        del shapes[f"{module}.weight"]
        shapes |= {f"{module}.{suffix}": shape for suffix, shape in matrix.stored_shapes().items()}
    return shapes


class _Reading(Reference):
    """Remembers which tensors are asked for. They are of zeros, and take no memory."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec, {})
        self.shapes: Shapes = {}

    def tensor(self, name: str, *shape: int) -> Array:
        self.shapes[name] = shape
        zeros: npt.NDArray[np.float64] = np.broadcast_to(np.float64(0), shape)
        return zeros


def tensors_of_package(package: Path) -> Shapes:
    """Every checkpoint tensor that a package's manifest names, with its shape."""
    manifest = json.loads((package / MANIFEST).read_text(encoding="utf-8"))
    shapes = {
        tensor: (rows, *parameter.shape[1:])
        for parameter in read_manifest(manifest)
        for tensor, rows in parameter.sources
    }
    for entry in manifest["parameters"]:
        if "format" in entry:
            every = range(manifest["num_layers"]) if "{i}" in entry["name"] else (0,)
            matrices = [read_quantized(entry, i, {}) for i in entry.get("layers", every)]
            shapes |= {tensor.name: tensor.shape for matrix in matrices for tensor in matrix.tensors}
    return shapes


def differing(actual: Shapes, expected: Shapes) -> list[str]:
    """The tensors that are missing, too many or of another shape, in words."""
    told = [f"{name} is missing" for name in expected if name not in actual]
    told += [f"{name} is not expected" for name in actual if name not in expected]
    both = (name for name in expected if name in actual and actual[name] != expected[name])
    return told + [f"{name} is {list(actual[name])}, not {list(expected[name])}" for name in both]
