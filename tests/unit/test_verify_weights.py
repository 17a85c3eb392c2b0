"""Random weights: what the reference and the packages read, and that they make mistakes show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from qwenspec.ir.lower import lower
from qwenspec.spec.document import Spec
from qwenspec.verify.checkpoint import StoredTensors
from qwenspec.verify.features import features
from qwenspec.verify.reference import Reference
from qwenspec.verify.strategies import spec_of
from qwenspec.verify.weights import random_weights, save_checkpoint, to_bfloat16
from unit.test_verify_drawing import SMALLEST, draw

SPECS = draw(60)
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 10, 8, 0, 7, 9, 3]


class Recorded(Mapping[str, "npt.NDArray[Any]"]):
    """Tensors, and the names of those that were read."""

    def __init__(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        self.tensors, self.read = tensors, set[str]()

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        self.read.add(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def errors(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of each row, relative to its length."""
    difference: npt.NDArray[Any] = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return difference


def test_the_reference_reads_every_tensor_and_so_does_the_program() -> None:
    for spec in SPECS:
        weights = Recorded(random_weights(spec, 1))
        assert np.isfinite(Reference(spec, weights).logits(IDS)).all()
        assert weights.read == set(weights)
        sources = {
            source.tensor: (source.rows, *param.shape[1:]) for param in lower(spec).params() for source in param.sources
        }
        assert {name: tensor.shape for name, tensor in weights.tensors.items()} == sources


def test_float16_and_bfloat16_hold_every_value() -> None:
    for spec in SPECS[:20]:
        for name, tensor in random_weights(spec, 2).items():
            assert tensor.dtype == np.float32
            assert np.array_equal(tensor.astype(np.float16), tensor), name
            assert np.array_equal(tensor.astype(ml_dtypes.bfloat16), tensor), name
            assert np.abs(tensor[tensor != 0]).min() >= 2.0**-14


def changed(**changes: Any) -> Spec:
    base = SMALLEST | {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 2}
    return spec_of(base | {"attention": {"head_dim": 8, "bias": {"qkv": True}}, "mlp": {"bias": True}} | changes)


def test_a_seed_gives_the_same_values_and_another_seed_others() -> None:
    once, again, other = (random_weights(changed(), seed) for seed in (5, 5, 6))
    for name, tensor in once.items():
        assert np.array_equal(tensor, again[name])
        assert not np.array_equal(tensor, other[name])


def test_values_stay_when_other_parts_of_the_model_go() -> None:
    whole, part = random_weights(changed(num_hidden_layers=3), 5), random_weights(changed(mlp={}), 5)
    assert len(part) < len(whole)
    assert all(np.array_equal(whole[name], part[name]) for name in part if name != "model.norm.weight")


def test_values_do_not_depend_on_what_the_layout_fuses() -> None:
    split, fused = random_weights(changed(), 5), random_weights(changed(checkpoint={"layout": "qwen1"}), 5)
    for kind in ("weight", "bias"):
        parts = [split[f"model.layers.1.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        assert np.array_equal(np.concatenate(parts), fused[f"transformer.h.1.attn.c_attn.{kind}"])
        assert np.array_equal(split[f"model.layers.1.mlp.gate_proj.{kind}"], fused[f"transformer.h.1.mlp.w2.{kind}"])


def test_parts_of_a_fused_matrix_have_magnitudes_of_their_own() -> None:
    weights = random_weights(changed(hidden_size=64, intermediate_size=64), 5)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    q, k, v, gate, up = (np.median(abs(weights[f"model.layers.0.{name}.weight"])) for name in names)
    assert k > 1.3 * q > 1.3 * 1.3 * v
    assert gate > 2 * up


def test_channels_are_outliers() -> None:
    weights = random_weights(changed(hidden_size=64, intermediate_size=64), 5)
    embedding, down = weights["model.embed_tokens.weight"], weights["model.layers.0.mlp.down_proj.weight"]
    for matrix in (embedding, down, weights["model.layers.0.self_attn.v_proj.weight"].T):
        columns = np.sqrt((matrix**2).mean(axis=0))
        assert columns.max() > 7 * np.median(columns)


def test_an_untied_head_is_not_the_embedding() -> None:
    weights = random_weights(changed(hidden_size=64), 5)
    embedding, head = (np.delete(weights[f"{name}.weight"], 3, axis=1) for name in ("model.embed_tokens", "lm_head"))
    assert abs(np.corrcoef(embedding.ravel(), head.ravel())[0, 1]) < 0.2


def test_rounding_is_not_amplified() -> None:
    """Matrices that are off by 1e-6 of themselves move no row by much more, and float16 can hold what flows."""
    noise = np.random.default_rng(0)
    for spec in SPECS:
        weights = random_weights(spec, 3)
        matrices = {name: tensor for name, tensor in weights.items() if tensor.ndim == 2}
        off = {name: tensor * (1 + 1e-6 * noise.standard_normal(tensor.shape)) for name, tensor in matrices.items()}
        sequence = Reference(spec, weights).sequence()
        assert errors(Reference(spec, weights | off).logits(IDS), sequence.forward(IDS)).max() < 5e-5
        assert max(abs(tap).max() for tap in sequence.taps.values()) < 1e4


def test_every_tensor_counts() -> None:
    """Another tensor in its place moves the logits far more than float32 rounds them."""
    for spec in SPECS:
        sliding = spec.architecture.attention.sliding_window
        if sliding is not None and sliding.window == 1:
            continue  # softmax over one key: q and k do not matter
        weights, others = random_weights(spec, 3), random_weights(spec, 4)
        expected = Reference(spec, weights).logits(IDS)
        for name in weights:
            moved = errors(Reference(spec, weights | {name: others[name]}).logits(IDS), expected)
            assert moved.max() > 1e-3, name


# --------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_checkpoint_holds_the_weights(tmp_path: Path, dtype: str, shards: int) -> None:
    weights = random_weights(changed(), 7)
    save_checkpoint(changed(), weights, tmp_path / "new" / "folder", dtype, shards)
    files = sorted(file.name for file in (tmp_path / "new" / "folder").glob("*.safetensors"))
    assert len(files) == shards
    stored = StoredTensors(tmp_path / "new" / "folder")
    assert set(stored) == set(weights)
    for name, tensor in weights.items():
        assert stored[name].dtype == dtype
        assert np.array_equal(stored[name].astype(np.float32), tensor)


def test_a_checkpoint_of_several_files_has_an_index(tmp_path: Path) -> None:
    weights = random_weights(changed(), 7)
    save_checkpoint(changed(), weights, tmp_path, "bfloat16", shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights)
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}


def test_a_checkpoint_has_the_config_that_hugging_face_reads(tmp_path: Path) -> None:
    for i, spec in enumerate(draw(8, hugging_face=True)):
        save_checkpoint(spec, random_weights(spec, 7), tmp_path / str(i), "float32")
        config = json.loads((tmp_path / str(i) / "config.json").read_text())
        assert config["hidden_size"] == spec.architecture.hidden_size
    spec = next(spec for spec in SPECS if "attention.logn=set" in features(spec))
    save_checkpoint(spec, random_weights(spec, 7), tmp_path / "other", "float32")
    assert not (tmp_path / "other" / "config.json").exists()


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 20_000, dtype=np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.isfinite(values) & (abs(values) < 3e38)]
    assert np.array_equal(to_bfloat16(values), values.astype(ml_dtypes.bfloat16).view(np.uint16))
