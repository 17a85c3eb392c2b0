"""Random quantised checkpoints: they mean about what they were made of, and say what their formats can say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qwenspec.backend.fitting import check_fits
from qwenspec.diagnostics import SpecError
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import Source
from qwenspec.ir.quantized import StoredTensor, stored_tensors
from qwenspec.spec.document import Spec
from qwenspec.spec.quantization import Awq, Fp8, Fp8Block, Gptq, Int4, Int8, PackQuantized, Quantization
from qwenspec.verify.case import Case
from qwenspec.verify.checkpoint import StoredTensors
from qwenspec.verify.dequantize import AWQ_ORDER, Dequantized, QuantizedMatrix, quantized_matrices, unpacked
from qwenspec.verify.full_size import tensors_read
from qwenspec.verify.huggingface import obstacle
from qwenspec.verify.quantize import AWQ_NIBBLES, packed, quantized
from qwenspec.verify.reference import Reference
from qwenspec.verify.session import Session
from qwenspec.verify.steps import Add, CacheSizes, Forward
from qwenspec.verify.strategies_quantized import QUANTIZATIONS
from qwenspec.verify.weights import random_weights, save_checkpoint, stored_weights
from unit.test_verify_drawing import draw

Array = npt.NDArray[Any]
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 10, 8, 0, 7, 9, 3]


def runs_of(runs: int, schemes: tuple[str, ...] = tuple(QUANTIZATIONS)) -> list[Spec]:
    """The same specs every time: of each scheme so many short runs, as those of a long one are alike."""
    return [spec for scheme in schemes for number in range(runs) for spec in draw(6, number, quantizations=(scheme,))]


SPECS = runs_of(2)


class Recorded(Mapping[str, Array]):
    """Tensors, and the names of those that were read."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self.tensors, self.read = tensors, set[str]()

    def __getitem__(self, name: str) -> Array:
        self.read.add(name)
        return self.tensors[name]

    def __iter__(self) -> Any:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


# A rounding, of the largest in a group: half a step, and as much again for zero points far from the middle.
STEPS = {"fp8_block": 1 / 16, "awq": 1.1 / 7, "int8": 0.51 / 127, "int4": 0.51 / 7}


def largest_in_group(w: Array, matrix: QuantizedMatrix) -> Array:
    """Of each element of [N, K]."""
    starts = range(matrix.group_size, w.shape[1], matrix.group_size)
    parts = np.split(np.abs(w), starts, axis=1)
    return np.concatenate([np.broadcast_to(p.max(axis=1, keepdims=True), p.shape) for p in parts], axis=1)


def test_quantised_weights_are_near_those_that_they_were_made_of() -> None:
    for spec in SPECS:
        weights = random_weights(spec, 1)
        read = Dequantized(spec, quantized(spec, weights, 1))
        assert set(weights) <= set(read)
        for module, matrix in quantized_matrices(spec).items():
            exact, found = weights[f"{module}.weight"], read[f"{module}.weight"]
            assert found.shape == exact.shape == (matrix.rows, matrix.columns)
            error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
            assert 0 < error < (0.6 if _asymmetric(matrix.scheme) else 0.2), (module, matrix.scheme)
            if isinstance(matrix.scheme, Int4 | Int8):
                limit = STEPS[matrix.scheme.scheme] * largest_in_group(exact, matrix)
                assert (np.abs(found - exact) <= limit * 1.001 + 1e-6).all()
            if isinstance(matrix.scheme, Fp8Block | Fp8):
                assert (np.abs(found - exact) <= np.abs(exact) / 15 + np.abs(exact).max() * 2**-17).all()
        for name in set(weights) - {f"{module}.weight" for module in quantized_matrices(spec)}:
            assert read[name] is weights[name]


def _asymmetric(scheme: Quantization) -> bool:
    return isinstance(scheme, Awq) or (isinstance(scheme, Gptq | PackQuantized) and not scheme.sym)


def test_the_reference_reads_everything_but_gptq_s_zeros() -> None:
    for spec in SPECS:
        stored = Recorded(stored_weights(spec, 1))
        assert np.isfinite(Reference(spec, Dequantized(spec, stored)).logits(IDS)).all()
        unread = set(stored) - stored.read
        assert all(name.endswith(".bias") and not stored.tensors[name].any() for name in unread)
        if not isinstance(spec.quantization, Gptq):
            assert not unread


def test_a_seed_gives_the_same_tensors() -> None:
    for spec in SPECS[::6]:
        once, again = stored_weights(spec, 5), stored_weights(spec, 5)
        assert list(once) == list(again)
        assert all(np.array_equal(once[name], again[name], equal_nan=True) for name in once)


def test_a_checkpoint_holds_them_in_their_dtypes(tmp_path: Path) -> None:
    for number, spec in enumerate(SPECS[::3]):
        tensors, dtype = stored_weights(spec, 1), ("float32", "bfloat16", "float16")[number % 3]
        save_checkpoint(spec, tensors, tmp_path / str(number), dtype, shards=1 + number % 2)
        stored = StoredTensors(tmp_path / str(number))
        assert set(stored) == set(tensors)
        modules = quantized_matrices(spec)
        for name, tensor in tensors.items():
            module, _, suffix = name.rpartition(".")
            own = module in modules and suffix in modules[module].stored_shapes()
            assert stored[name].dtype == (tensor.dtype if own or tensor.dtype == np.float16 else dtype), name
            assert np.array_equal(stored[name].astype(np.float64), tensor.astype(np.float64)), name


DTYPES = {
    "fp8_block": {"weight": {"float8_e4m3fn"}, "weight_scale_inv": {"float32", "bfloat16"}},
    "fp8": {
        "weight": {"float8_e4m3fn"},
        "weight_scale": {"float32", "bfloat16"},
        "input_scale": {"float32", "bfloat16"},
    },
    "awq": {"qweight": {"int32"}, "qzeros": {"int32"}, "scales": {"float16"}},
    "gptq": {"qweight": {"int32"}, "qzeros": {"int32"}, "scales": {"float16"}, "g_idx": {"int32"}},
    "pack_quantized": {
        "weight_packed": {"int32"},
        "weight_scale": {"float16", "bfloat16", "float32"},
        "weight_shape": {"int64"},
        "weight_zero_point": {"int32"},
        "weight_g_idx": {"int32"},
    },
    "int8": {"qweight": {"int8"}, "scales": {"float32"}},
    "int4": {"qweight": {"uint8"}, "scales": {"float16"}},
}


def test_dtypes_are_the_formats() -> None:
    found: dict[str, dict[str, set[str]]] = {scheme: {} for scheme in DTYPES}
    for spec in SPECS:
        tensors = stored_weights(spec, 2)
        for module, matrix in quantized_matrices(spec).items():
            for suffix, shape in matrix.stored_shapes().items():
                tensor = tensors.get(f"{module}.{suffix}")
                if tensor is not None:
                    assert tensor.shape in (shape, shape if shape != (1,) else ())
                    found[matrix.scheme.scheme].setdefault(suffix, set()).add(tensor.dtype.name)
    assert found == DTYPES


def test_what_formats_allow_and_tools_seldom_write_is_drawn() -> None:
    seen = set[str]()
    for spec in runs_of(8, ("awq", "gptq", "int4")):
        tensors, weights = stored_weights(spec, 3), random_weights(spec, 3)
        for module, matrix in quantized_matrices(spec).items():
            stored = {suffix: tensors.get(f"{module}.{suffix}") for suffix in matrix.stored_shapes()}
            scales = stored["scales"]
            assert scales is not None
            if scales.dtype == np.float16 and (scales[scales > 0] < 2.0**-14).any():
                seen.add("scales below float16's normal numbers")
            match matrix.scheme:
                case Awq():
                    _see_zeros(seen, "awq", unpacked(_present(stored["qzeros"]), 4, axis=1))
                case Gptq(bits=bits, sym=sym, desc_act=desc_act, checkpoint_format=version):
                    stored_zeros = unpacked(_present(stored["qzeros"]), bits, axis=1)
                    zeros = stored_zeros + (version == "gptq")
                    assert zeros.max() < 256
                    if sym:
                        assert (zeros == 1 << (bits - 1)).all()
                    elif bits == 4:
                        _see_zeros(seen, version, zeros)
                    _see_groups(seen, matrix, stored["g_idx"], desc_act)
                    if f"{module}.bias" in tensors and f"{module}.bias" not in weights:
                        seen.add("a bias of zeros")
                case Int4() if matrix.columns % 2 and (_present(stored["qweight"])[:, -1] >> 4 != 8).any():
                    seen.add("something in the last nibble")
    ends = {f"{kind} zero point {z}" for kind, z in (("awq", 0), ("awq", 15), ("gptq", 1), ("gptq", 16))}
    ends |= {f"gptq_v2 zero point {z}" for z in (0, 15)}
    orders = {"no g_idx", "groups in order", "groups in another order", "a ragged group"}
    assert seen == ends | orders | {
        "scales below float16's normal numbers",
        "a bias of zeros",
        "something in the last nibble",
    }


def _present(tensor: Array | None) -> Array:
    assert tensor is not None
    return tensor


def _see_zeros(seen: set[str], kind: str, zeros: Array) -> None:
    least = int(kind == "gptq")
    assert least <= zeros.min() <= zeros.max() <= 15 + least
    seen |= {f"{kind} zero point {z}" for z in (least, 15 + least) if (zeros == z).any()}


def _see_groups(seen: set[str], matrix: QuantizedMatrix, g_idx: Array | None, desc_act: bool) -> None:
    in_order = np.arange(matrix.columns) // matrix.group_size
    if g_idx is None:
        assert not desc_act
        seen.add("no g_idx")
        return
    assert np.array_equal(np.sort(g_idx), in_order)
    assert desc_act or np.array_equal(g_idx, in_order)
    seen.add("groups in order" if np.array_equal(g_idx, in_order) else "groups in another order")
    if matrix.columns % matrix.group_size:
        seen.add("a ragged group")


def test_parts_that_may_lie_in_one_matrix_are_a_hundred_times_apart() -> None:
    for spec in SPECS:
        if len(spec.layout.attention.qkv) == 1 or len(spec.layout.mlp.gate_up) == 1:
            continue
        weights, layer = random_weights(spec, 5), spec.layout.layer.format(i=0)
        names = (*spec.layout.attention.qkv, *spec.layout.mlp.gate_up)
        q, k, v, gate, up = (np.median(np.abs(weights[f"{layer}.{name}.weight"])) for name in names)
        assert q > 100 * k
        assert q > 100 * v
        assert gate > 100 * up


def test_rounding_is_not_amplified() -> None:
    """Weights that are off by 1e-6 of themselves move no row by much more, where activations are not rounded."""
    noise = np.random.default_rng(0)
    for spec in SPECS:
        if isinstance(spec.quantization, Fp8Block | Fp8) and spec.quantization.activations != "none":
            continue
        weights = dict(Dequantized(spec, stored_weights(spec, 3)))
        off = {name: w * (1 + 1e-6 * noise.standard_normal(w.shape)) for name, w in weights.items() if w.ndim == 2}
        sequence = Reference(spec, weights).sequence()
        expected = sequence.forward(IDS)
        moved = np.linalg.norm(Reference(spec, weights | off).logits(IDS) - expected, axis=-1)
        assert (moved / np.linalg.norm(expected, axis=-1)).max() < 5e-5
        assert max(abs(tap).max() for tap in sequence.taps.values()) < 1e4


def test_every_quantised_tensor_counts() -> None:
    """Another one in its place moves the logits more than float32 rounds them: even scales, which hardly differ."""
    for spec in SPECS[::2]:
        sliding = spec.architecture.attention.sliding_window
        if sliding is not None and sliding.window == 1:
            continue  # softmax over one key: q and k do not matter
        stored, others = stored_weights(spec, 3), stored_weights(spec, 4)
        expected = Reference(spec, Dequantized(spec, stored)).logits(IDS)
        for module, matrix in quantized_matrices(spec).items():
            for suffix in set(matrix.stored_shapes()) - {"g_idx", "weight_g_idx"}:
                name = f"{module}.{suffix}"
                if np.array_equal(stored[name], others[name]):
                    continue  # zero points in the middle
                found = Reference(spec, Dequantized(spec, stored | {name: others[name]})).logits(IDS)
                moved = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
                assert moved.max() > 1e-5, (name, matrix.scheme)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_and_unpacking(bits: int, axis: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, (16, 24))
    words = packed(values, bits, axis)
    assert words.dtype == np.int32
    assert words.shape[axis] == values.shape[axis] * bits // 32
    assert np.array_equal(unpacked(words, bits, axis), values)


def test_the_orders_of_awq_undo_each_other() -> None:
    assert [AWQ_ORDER[place] for place in AWQ_NIBBLES] == list(range(8))
    assert list(AWQ_NIBBLES) == [i % 2 * 4 + i // 2 for i in range(8)]


# ------------------------------------------------------------------------------------------------ what is read


def test_the_resolved_program_stores_what_the_reference_reads() -> None:
    for spec in SPECS:
        of_program = {
            tensor.name: tensor.shape
            for param in lower(spec).params()
            for source in param.sources
            for tensor in _tensors_of(source, param.shape)
        }
        assert tensors_read(spec) == of_program


def _tensors_of(source: Source, shape: tuple[int, ...]) -> list[StoredTensor]:
    if source.format is None:
        return [StoredTensor(source.tensor, (source.rows, *shape[1:]), ())]
    return list(stored_tensors(source, shape[1]).values())


def test_a_checkpoint_fits_whose_optional_tensors_are_absent(tmp_path: Path) -> None:
    for number, spec in enumerate(SPECS[::4]):
        folder = tmp_path / str(number)
        save_checkpoint(spec, stored_weights(spec, 1), folder, "float32")
        check_fits(spec, folder)
        missing = next(f"{m}.{suffix}" for m, x in quantized_matrices(spec).items() for suffix in x.stored_shapes())
        tensors = {name: tensor for name, tensor in stored_weights(spec, 1).items() if name != missing}
        save_checkpoint(spec, tensors, folder, "float32")
        with pytest.raises(SpecError, match=f"missing: {missing} "):
            check_fits(spec, folder)


def test_hugging_face_agrees_where_weights_alone_are_quantised() -> None:
    """Its float32 with dequantised weights, and the reference's float64."""
    sizes, dynamic = CacheSizes(page_size=4, pages=8, max_batch_size=2, chunk=16), 0
    for scheme in QUANTIZATIONS:
        drawn = draw(12, quantizations=(scheme,), scalings=(None, "yarn"), hugging_face=True)
        dynamic += sum("FP8" in (obstacle(spec) or "") for spec in drawn)
        able = [spec for spec in drawn if obstacle(spec) is None]
        assert able
        for spec in able[:3]:
            session = Session(Case(spec, 1, "float32", sizes, ("reference", "huggingface")))
            session.do(Add(0))
            session.do(Forward({0: tuple(IDS[:9])}, "batch_verify"))
    assert dynamic > 0
