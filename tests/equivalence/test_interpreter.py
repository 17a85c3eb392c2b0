"""The same comparison, with Triton's kernels in Triton's interpreter instead of the PyTorch paths."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qwenspec.verify.search import cases
from qwenspec.verify.strategies import cache_sizes, specs

pytestmark = pytest.mark.interpreter


def test_kernels_in_the_interpreter(look: Callable[..., None]) -> None:
    drawn = cases(specs(max_layers=1), cache_sizes(), ("triton",), ("float32", "bfloat16"), hugging_face=False)
    look(drawn, cache_sizes(), examples=20, steps=8, seed=3000, max_length=24)
