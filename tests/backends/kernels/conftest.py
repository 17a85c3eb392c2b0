"""TRITON_INTERPRET is read when triton is imported and decides for the whole process, so that it takes two runs:

TRITON_INTERPRET=1 pytest -m interpreter tests/backends/kernels    the kernels, interpreted
pytest tests/backends/kernels                                      everything else
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop what cannot run in this process; the other run has it."""
    import torch

    def runs(item: pytest.Item) -> bool:
        if Path(__file__).parent not in item.path.parents:
            return True
        if "gpu" in item.keywords:
            return torch.cuda.is_available() and not INTERPRETED
        return ("interpreter" in item.keywords) == INTERPRETED

    dropped = [item for item in items if not runs(item)]
    items[:] = [item for item in items if runs(item)]
    config.hook.pytest_deselected(items=dropped)
