"""Words and expressions of generated code that depend on the variant's features."""

from __future__ import annotations

from pathlib import Path

import pytest
from ir_specs import make_spec

from qwenspec.backend.config import config_fields
from qwenspec.backend.package import attention_title
from qwenspec.ir.lower import lower


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({}, ""),
        ({"qk_norm": "per_head"}, ", with per-head QK-norm"),
        ({"qk_norm": "per_head", "logn": {"train_length": 64}}, ", with per-head QK-norm and LogN scaling"),
        (
            {"qk_norm": "per_head", "logn": {"train_length": 64}, "sliding_window": {"window": 8}},
            ", with per-head QK-norm, LogN scaling and a sliding window",
        ),
    ],
)
def test_the_attention_is_described_in_a_sentence(features: dict[str, object], words: str, tmp_path: Path) -> None:
    title = attention_title(lower(make_spec(tmp_path, attention=features)))
    assert title == f"Grouped-query attention over a paged cache{words}"


@pytest.mark.parametrize(
    ("windowed", "text"),
    [
        ({"from": 28}, "(None,) * 28 + (4096,) * 4"),
        ({"from": 31}, "(None,) * 31 + (4096,)"),
        (list(range(1, 32, 2)), "(None, 4096) * 16"),
        ([1, 3, 5], "(None, 4096, None, 4096, None, 4096) + (None,) * 26"),
    ],
)
def test_the_layers_windows_are_an_expression_as_short_as_they_allow(
    windowed: object, text: str, tmp_path: Path
) -> None:
    attention = {"sliding_window": {"window": 4096, "layers": windowed}}
    model = lower(make_spec(tmp_path, num_hidden_layers=32, attention=attention))
    (field,) = (field for field in config_fields(model, "mixed") if field.name == "layer_windows")
    assert field.value == text
    assert eval(field.value) == tuple(layer.mixer.window for layer in model.layers)
