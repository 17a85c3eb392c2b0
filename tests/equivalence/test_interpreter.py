"""The same comparison, with Triton's kernels in Triton's interpreter instead of the PyTorch paths."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qwenspec.verify.search import cases
from qwenspec.verify.strategies import SCALINGS, cache_sizes, specs

pytestmark = [
    pytest.mark.interpreter,
    # Rows of padding divide 0 by 0, and what comes of it is not stored.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
Look = Callable[..., None]


@pytest.mark.parametrize("scaling", [None, *SCALINGS])
def test_kernels(scaling: str | None, look: Look) -> None:
    drawn = specs(max_layers=1, scalings=[scaling])
    look(
        cases(drawn, cache_sizes(), ("triton",), ("float32", "bfloat16"), hugging_face=False),
        cache_sizes(),
        examples=4,
        steps=8,
        seed=6,
        max_length=24,
    )
