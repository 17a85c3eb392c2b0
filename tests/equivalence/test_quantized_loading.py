"""What packages read of a quantised checkpoint is what the formats' descriptions say, bit for bit.

Here as plain numbers, before a backend packs them anew: for any scheme, in any layout, over any files."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from qwenspec.backend.package import common, manifest
from qwenspec.backend.structure import structure
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Model
from qwenspec.spec.document import Spec
from qwenspec.verify.dequantize import Dequantized, quantized_matrices
from qwenspec.verify.strategies import spec_of, specs
from qwenspec.verify.strategies_quantized import QUANTIZATIONS
from qwenspec.verify.weights import save_checkpoint, stored_weights

EXAMPLES = settings().max_examples  # 100 in the `ci` profile
Array = npt.NDArray[Any]
_numbers = itertools.count()


def reader(model: Model, folder: Path) -> ModuleType:
    """What a package of this model reads checkpoints with, alone in a package of its own."""
    folder.mkdir()
    needed = ("checkpoint", "stored", "quantized", "console", "machine", "ranks")
    files = common(structure(model), *needed) | manifest(model) | {"__init__.py": ""}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    name = f"reader_{next(_numbers)}"
    package = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert package is not None
    sys.modules[name] = importlib.util.module_from_spec(package)
    return importlib.import_module(f"{name}.checkpoint")


def plain(matrix: Any) -> Array:
    """A quantised matrix that a package has read, in float64."""
    pieces = list(matrix.pieces())
    starts = np.cumsum([0, *(len(values) for _, values in pieces)])
    assert [row for row, _ in pieces] == list(starts[:-1])
    q, scales, packing = np.concatenate([values for _, values in pieces]), matrix.scales(), matrix.format["packing"]
    assert q.dtype == np.uint8
    assert q.shape == tuple(matrix.shape)
    rows, columns = np.arange(q.shape[0]), np.arange(q.shape[1])
    if packing == "fp8":
        height, width = matrix.format["block"]
        assert scales.dtype == np.float32
        value = q.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return value * scales.astype(np.float64)[rows // height][:, columns // (width or q.shape[1])]
    assert scales.dtype == (np.float32 if packing in ("int8", "pack_quantized") else np.float16)
    bits, group = matrix.format["bits"], columns // (matrix.format["group_size"] or q.shape[1])
    zeros = matrix.zeros()[:, group].astype(np.int64) if matrix.format["zero_points"] else 1 << (bits - 1)
    assert q.max() < 1 << bits
    weight = (q.astype(np.int64) - zeros) * scales.astype(np.float64)[:, group]
    if not matrix.format["act_order"]:
        return weight
    order = matrix.order()
    assert order.dtype == np.int32
    in_place = np.full_like(weight, np.nan)
    in_place[:, order] = weight
    return in_place


def check(module: ModuleType, spec: Spec, folder: Path, tensors: Mapping[str, Array], piece: int) -> None:
    """`folder` has the tensors; `piece`: how many bytes are read at once."""
    expected = Dequantized(spec, tensors)
    sys.modules[module.__package__ + ".quantized"].PIECE = piece
    checkpoint = module.open_checkpoint(folder)
    found = dict[str, Array]()
    for matrix in checkpoint.matrices:
        modules = [next(iter(source.tensors.values())).name.rpartition(".")[0] for source in matrix.sources]
        rows = np.split(plain(matrix), np.cumsum([source.rows for source in matrix.sources])[:-1])
        found |= {f"{module}.weight": part for module, part in zip(modules, rows, strict=True)}
    assert set(found) == {f"{module}.weight" for module in quantized_matrices(spec)}
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, expected[name], err_msg=name)


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
@settings(max_examples=EXAMPLES // 4)
@given(st.data(), st.sampled_from([8 << 20, 1, 300]), st.integers(1, 3), st.integers(0, 99))
def test_plain_numbers(
    tmp_path_factory: pytest.TempPathFactory, scheme: str, data: st.DataObject, piece: int, shards: int, seed: int
) -> None:
    spec = data.draw(specs(max_layers=2, quantizations=[scheme]))
    folder, tensors = tmp_path_factory.mktemp("checkpoint"), stored_weights(spec, seed)
    save_checkpoint(spec, tensors, folder, "bfloat16", shards)
    ragged = {bool(matrix.columns % matrix.group_size) for matrix in quantized_matrices(spec).values()}
    event(f"ragged: {sorted(ragged)}")
    check(reader(lower(spec), folder / "reader"), spec, folder, tensors, piece)


def test_more_rows_than_are_read_at_once(tmp_path: Path) -> None:
    """Words of 8 outputs are not cut, and parts follow each other."""
    sizes = {"hidden_size": 64, "intermediate_size": 200, "vocab_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "attention": {"head_dim": 24}}
    other = {"max_position_embeddings": 64, "norm": {"eps": 1e-6}, "rope": {"theta": 1e4}, "dtype": "float32"}
    spec = spec_of(sizes | heads | other, {"scheme": "awq", "group_size": 8})
    save_checkpoint(spec, stored_weights(spec, 1), tmp_path, "float32")
    check(reader(lower(spec), tmp_path / "reader"), spec, tmp_path, stored_weights(spec, 1), piece=17 * 64)


# ---------------------------------------------------------------------------------------------------- refusals

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "dtype": "float32",
    "norm": {"eps": 1e-6},
    "attention": {"head_dim": 8},
    "rope": {"theta": 1e4},
}
GPTQ = {"scheme": "gptq", "bits": 4, "group_size": 16}
UP = "model.layers.0.mlp.up_proj"
ONE_GROUP = np.ones(32, np.int32)
MIDDLE = np.full((2, 3), 0x77777777, np.int32)
OTHER_GROUPS = np.repeat([0, 1, 0, 1], 8).astype(np.int32)


@pytest.mark.parametrize(
    ("quantization", "changed", "reason"),
    [
        (GPTQ, {f"{UP}.qzeros": MIDDLE - 1}, f"{UP}.qzeros are not all in the middle.*`sym: false`"),
        (GPTQ, {f"{UP}.g_idx": OTHER_GROUPS}, f"{UP}.g_idx has another order.*`desc_act: true`"),
        (GPTQ | {"desc_act": True}, {f"{UP}.g_idx": ONE_GROUP}, f"{UP}.g_idx does not put 16 inputs in every group"),
        (GPTQ, {f"{UP}.bias": np.array([0] * 23 + [1], np.float16)}, f"not zero: {UP}.bias"),
        (GPTQ, {f"{UP}.qweight": np.zeros((4, 23), np.int32)}, f"shape: {UP}.qweight"),
        (GPTQ, {f"{UP}.scales": np.full((2, 24), 1 + 2**-11, np.float32)}, "float16 cannot hold"),
        (GPTQ, {f"{UP}.scales": np.full((2, 24), np.nan, np.float16)}, "not a finite number"),
        (GPTQ, {f"{UP}.scales": np.full((2, 24), 1e6, np.float32)}, "float16 cannot hold"),
        (GPTQ, {f"{UP}.zeros": np.zeros((2, 24), np.float16)}, f"left over: {UP}.zeros"),
        (GPTQ, {f"{UP}.qweight": np.zeros((4, 24), np.uint8)}, f"dtype: {UP}.qweight is U8"),
        ({"scheme": "int8"}, {f"{UP}.weight": np.zeros((24, 32), np.float16)}, f"left over: {UP}.weight"),
        (
            GPTQ | {"bits": 8, "sym": False},
            {f"{UP}.qzeros": np.full((2, 6), -1, np.int32)},
            f"{UP}.qzeros: a zero point of 256 is beyond 8 bits",
        ),
        (
            {"scheme": "fp8_block"},
            {f"{UP}.weight": np.full((24, 32), np.nan, ml_dtypes.float8_e4m3fn)},
            "gate_up_proj.*a value is not a number",
        ),
    ],
    ids=itertools.count(),
)
def test_what_does_not_fit_is_named(
    quantization: dict[str, Any], changed: dict[str, Array], reason: str, tmp_path: Path
) -> None:
    spec = spec_of(SIZES, quantization)
    tensors = stored_weights(spec, 1) | changed
    save_checkpoint(spec, tensors, tmp_path, "float32")
    module = reader(lower(spec), tmp_path / "reader")
    with pytest.raises(module.CheckpointError, match=reason):
        check(module, spec, tmp_path, tensors, 8 << 20)


@pytest.mark.parametrize(
    ("stored", "wanted", "told"),
    [
        (GPTQ, None, r"its weights are quantised \(.*\.qweight\), and this package's are not"),
        (None, GPTQ, "its weights are in full precision, and this package's are quantised"),
    ],
)
def test_another_quantization_is_told_in_a_sentence(stored: Any, wanted: Any, told: str, tmp_path: Path) -> None:
    spec = spec_of(SIZES, stored)
    save_checkpoint(spec, stored_weights(spec, 1), tmp_path, "float32")
    module = reader(lower(spec_of(SIZES, wanted)), tmp_path / "reader")
    with pytest.raises(module.CheckpointError, match=told):
        module.open_checkpoint(tmp_path)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_of_a_kv_cache(shape: tuple[int, ...], tmp_path: Path) -> None:
    spec = spec_of(SIZES, None, {"scheme": "fp8_e4m3", "scales": "checkpoint"})
    module = reader(lower(spec), tmp_path / "reader")
    for value in (0.25, 0.0, -1.0, np.nan, np.inf):
        scale = np.full(shape, value, np.float32)
        save_checkpoint(
            spec, stored_weights(spec, 1) | {"model.layers.0.self_attn.k_scale": scale}, tmp_path, "float32"
        )
        checkpoint = module.open_checkpoint(tmp_path)
        (found,) = (p for p in checkpoint.parameters if p.name == "layers.0.attention.k_scale")
        if value == 0.25:
            pieces = checkpoint.pieces(found, "np")
            assert [(row, piece.tolist()) for row, piece in pieces] == [(0, [0.25])]
        else:
            with pytest.raises(module.CheckpointError, match=r"k_scale is .*, and a scale is above 0"):
                list(checkpoint.pieces(found, "np"))
