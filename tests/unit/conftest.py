"""What several modules of unit tests are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversions import QWEN3
from ir_specs import make_spec

from qwenspec.spec.document import Spec
from qwenspec.verify.weights import random_weights, save_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., tuple[Spec, Path]]:
    """A checkpoint of random weights with a tokenizer; returns its spec and folder."""

    def make(dtype: str = "bfloat16", shards: int = 1, **changes: Any) -> tuple[Spec, Path]:
        spec = make_spec(tmp_path, **QWEN3 | changes)
        folder = tmp_path / "tiny"
        save_checkpoint(spec, random_weights(spec, 0), folder, dtype, shards)
        for name, text in {"tokenizer.json": "{}", ".hidden": "", "old.bin": "", "1_Pooling/config.json": "[]"}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        return spec, folder

    return make
