"""Specs made smaller: they stay valid and say the same, and short sequences pass their lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwenspec.spec.document import Spec
from qwenspec.spec.load import load_all
from qwenspec.spec.rules import RULES
from qwenspec.verify.features import features
from qwenspec.verify.machine import MAX_LENGTH
from qwenspec.verify.reduce import LENGTH, VOCABULARY, WIDTH, reduced
from qwenspec.verify.reference import window_of_layer
from qwenspec.verify.strategies import spec_of

RELEASED = [spec for file in sorted((Path(__file__).parents[2] / "specs").glob("*.yaml")) for spec in load_all(file)]
QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "norm": {"eps": 1e-6},
    "rope": {"theta": 1e6},
}


def mistakes(spec: Spec) -> list[str]:
    return [mistake.message for rule in RULES for mistake in rule.check(spec)]


def smaller(**changes: Any) -> Spec:
    return reduced(spec_of(QWEN | changes))


@pytest.mark.parametrize("spec", RELEASED, ids=lambda spec: spec.variant)
def test_released_variants_stay_valid_and_say_the_same(spec: Spec) -> None:
    small = reduced(spec)
    assert mistakes(small) == []
    assert features(small) == features(spec)
    arch = small.architecture
    head_dim = arch.attention.head_dim or arch.hidden_size // arch.num_attention_heads
    assert arch.num_attention_heads * head_dim <= WIDTH
    assert arch.vocab_size <= VOCABULARY
    assert arch.num_hidden_layers == 2
    assert small.quantization == spec.quantization
    assert reduced(small) == small


def test_there_are_all_75() -> None:
    assert len(RELEASED) == 75


def test_heads_keep_their_ratio_while_they_fit() -> None:
    wide = smaller()  # 7 query heads a KV head, of 128
    assert (wide.architecture.num_attention_heads, wide.architecture.num_key_value_heads) == (6, 2)
    narrow = smaller(hidden_size=896, num_attention_heads=14, num_key_value_heads=2)
    assert (narrow.architecture.num_attention_heads, narrow.architecture.num_key_value_heads) == (14, 2)
    assert smaller(num_key_value_heads=1).architecture.num_key_value_heads == 1
    assert smaller(num_key_value_heads=None).architecture.num_key_value_heads is None


@pytest.mark.parametrize(
    ("layers", "windows"),
    [
        ("all", [12, 12]),
        ({"from": 0}, [12, 12]),
        ({"from": 21}, [None, 12, 12]),
        ({"from": 28}, [None, None]),
        ([0, 2, 4], [12, None, 12]),
        ([5, 11, 17], [None, 12, None]),
        (list(range(28)), [12, 12]),
    ],
)
def test_kinds_of_layers_are_kept(layers: Any, windows: list[int | None]) -> None:
    arch = smaller(attention={"sliding_window": {"window": 4096, "layers": layers}}).architecture
    found = [window_of_layer(arch.attention.sliding_window, i) for i in range(arch.num_hidden_layers)]
    assert found == windows
    full_size = spec_of(QWEN | {"attention": {"sliding_window": {"window": 9, "layers": layers}}}).architecture
    assert type(arch.attention.sliding_window.layers) is type(full_size.attention.sliding_window.layers)


def test_lengths_shrink_together() -> None:
    divisors = [1.0] * 64
    long = {"kind": "longrope", "short_factor": divisors, "long_factor": divisors}
    arch = smaller(
        max_position_embeddings=131072,
        attention={"sliding_window": {"window": 1024}, "logn": {"train_length": 32768}},
        rope={"theta": 1e4, "scaling": long | {"original_max_position_embeddings": 32768}},
    ).architecture
    assert arch.attention.sliding_window is not None
    assert arch.attention.logn is not None
    assert arch.attention.sliding_window.window == LENGTH
    assert arch.attention.logn.train_length == arch.rope.scaling.original_max_position_embeddings == 2 * LENGTH
    assert arch.max_position_embeddings == 8 * LENGTH  # four times the original length, as before
    assert arch.rope.scaling.long_factor == tuple(divisors)


@pytest.mark.parametrize(
    "scaling",
    [
        {"kind": "dynamic", "factor": 4.0},
        {"kind": "dynamic_qwen1", "train_length": 8192},
        {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    ],
)
def test_sequences_pass_the_lengths_of_rope(scaling: dict[str, Any]) -> None:
    arch = smaller(rope={"theta": 1e6, "scaling": scaling}).architecture
    told = arch.rope.scaling.model_dump() | {"dynamic": arch.max_position_embeddings}
    length = told.get("train_length") or told.get("original_max_position_embeddings") or told["dynamic"]
    assert 2 * length + 1 < MAX_LENGTH


def test_what_is_small_stays() -> None:
    small = spec_of(
        QWEN
        | {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"intermediate_size": 48, "num_hidden_layers": 1, "max_position_embeddings": 64}
    )
    assert reduced(small) == small


@pytest.mark.parametrize("head_dim", [None, 64, 256])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "quantization",
    [
        {"scheme": "fp8_block"},
        {"scheme": "fp8_block", "block": [64, 32]},
        {"scheme": "awq"},
        {"scheme": "gptq", "bits": 4},
        {"scheme": "gptq", "bits": 8, "group_size": -1},
        {"scheme": "int8"},
        {"scheme": "int4"},
    ],
)
def test_groups_and_blocks_stay_whole_or_ragged(
    quantization: dict[str, Any], ragged: bool, head_dim: int | None
) -> None:
    changes: dict[str, Any] = {"attention": {"head_dim": head_dim}}
    if ragged and quantization["scheme"] != "awq":
        changes |= {"hidden_size": 3696, "intermediate_size": 18960}  # 28 · 132, and words of 8
    spec = spec_of(QWEN | changes, quantization)
    small = reduced(spec)
    assert mistakes(small) == []
    assert features(small) == features(spec)
    assert small.architecture.intermediate_size < 512
    assert small.architecture.hidden_size <= WIDTH + 128


def test_skipped_modules_of_layers_that_went_are_forgotten() -> None:
    skip = ["model.layers.1.mlp.down_proj", "model.layers.20.mlp.down_proj"]
    spec = spec_of(QWEN)
    quantized = Spec.model_validate(
        spec.model_dump(mode="json", by_alias=True) | {"quantization": {"scheme": "int8", "skip": skip}}, strict=False
    )
    small = reduced(quantized)
    assert small.quantization is not None
    assert small.quantization.skip == (skip[0],)
